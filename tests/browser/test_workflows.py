"""The shared workflows on ComfyUI's own page, in Chromium, as `make demo` and a user run them."""

import io
import json

import pytest
from p2p.tests.conftest import ROOT
from p2p.tools.browser import open_editor
from p2p.tools.server import PACK, ServerError
from PIL import Image

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
every_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)

@pytest.fixture(scope="module")
def editor(server):
    with open_editor(server) as editor:
        yield editor


def graph(workflow):
    """A workflow's nodes with their inputs and values, links and groups, wherever they stand."""
    nodes = {
        node["id"]: (
            node["type"],
            node.get("title"),
            node["mode"],
            {entry["name"]: entry["link"] for entry in node["inputs"]},
            node.get("widgets_values") or [],  # some pages write an empty list
        )
        for node in workflow["nodes"]
    }
    return nodes, sorted(workflow["links"]), [group["title"] for group in workflow["groups"]]


@every_workflow
def test_a_workflow_runs_and_leaves_a_picture(editor, path):
    editor.console.clear()
    editor.load(json.loads(path.read_text()), path.stem)
    images = editor.server.images(editor.run())
    assert images
    for _, content in images:
        pixels = Image.open(io.BytesIO(content)).convert("L").getextrema()
        assert pixels[0] < pixels[1], "the picture is one flat colour"
    assert editor.console == []


@every_workflow
def test_no_node_is_one_that_this_host_calls_deprecated(editor, path):
    types = {node["type"] for node in json.loads(path.read_text())["nodes"]}
    nodes = editor.server.get("/object_info").json()
    assert {name for name in types & nodes.keys() if nodes[name].get("deprecated")} == set()


@every_workflow
def test_saving_what_was_opened_gives_the_same_workflow(editor, path):
    workflow = json.loads(path.read_text())
    editor.load(workflow, path.stem)
    assert graph(editor.workflow()) == graph(workflow)


def open_by_address(page):
    page.goto(f"{page.url.split('?')[0]}?template=word_swap&source={PACK}")


def open_by_hand(page):
    page.get_by_role("button", name="Templates").click()
    templates = page.get_by_role("dialog")
    templates.get_by_text(PACK, exact=True).first.click()
    templates.get_by_text("word_swap", exact=True).first.click()


@pytest.mark.parametrize("way", [open_by_address, open_by_hand])
def test_a_newcomer_opens_a_template_and_presses_run(editor, way):
    editor.console.clear()
    editor.open()
    way(editor.page)
    editor.await_ready()
    expected = json.loads((ROOT / "workflows" / "word_swap.json").read_text())
    editor.page.wait_for_function("(id) => window.app.graph.id === id", arg=expected["id"])
    with editor.page.expect_response(lambda answer: answer.url.endswith("/prompt")) as answer:
        editor.page.get_by_role("button", name="Run", exact=True).first.click()  # its menu follows
    entry = editor.server.wait(answer.value.json()["prompt_id"])
    assert entry["status"]["status_str"] == "success"
    assert editor.console == []


def test_reloading_the_page_keeps_everything(editor):
    editor.load(json.loads((ROOT / "workflows" / "reweighting.json").read_text()), "reweighting")
    editor.page.evaluate(
        """() => {
          const node = window.app.graph.findNodesByType('P2PTokenReweight')[0];
          node.widgets.find((widget) => widget.name === 'scale').value = -1.5;
          window.app.extensionManager.workflow.activeWorkflow?.changeTracker?.checkState();
        }"""
    )
    before = graph(editor.workflow())
    editor.page.wait_for_timeout(1000)
    editor.page.reload()
    editor.await_ready()
    editor.page.wait_for_function("() => window.app.graph.findNodesByType('P2PTokenReweight').length > 0")
    assert graph(editor.workflow()) == before


def test_a_failing_node_is_reported_with_its_message(editor):
    workflow = json.loads((ROOT / "workflows" / "reweighting.json").read_text())
    next(node for node in workflow["nodes"] if node["type"] == "P2PTokenReweight")["widgets_values"][0] = (
        "dog"
    )
    editor.load(workflow, "broken")
    with pytest.raises(ServerError, match="P2PTokenReweight.*dog.*snowy"):
        editor.run()


def test_a_rejected_graph_is_reported_with_its_reason(editor):
    workflow = json.loads((ROOT / "workflows" / "word_swap.json").read_text())
    next(node for node in workflow["nodes"] if node["type"] == "P2PPromptPair")["widgets_values"][1] = " "
    editor.load(workflow, "broken")
    with pytest.raises(ServerError, match="P2PPromptPair.*empty"):
        editor.run()
