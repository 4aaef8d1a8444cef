"""The nodes on the page: found, added, connected, saved, explained, in every language."""

import contextlib
import json
import re

import pytest
import requests
from p2p.tests.conftest import ROOT
from p2p.tools.browser import open_editor
from p2p.tools.server import PACK
from playwright.sync_api import TimeoutError

ALL = "() => Object.keys(LiteGraph.registered_node_types).filter((type) => type.startsWith('P2P')).sort()"
ADD = """(types) => {
  app.graph.clear();
  types.forEach((type, n) => {
    const node = LiteGraph.createNode(type);
    node.pos = [500 * n, 0];
    app.graph.add(node);
  });
}"""
# Connects each input of each node to the first output on the page that fits: a graph of all nodes.
CONNECT = """() => {
  const nodes = app.graph.nodes;
  for (const node of nodes)
    node.inputs.forEach((input, n) => {
      if (input.widget) return;
      for (const other of nodes.filter((each) => each !== node)) {
        const output = other.outputs.findIndex((each) => each.type === input.type);
        if (output >= 0 && other.connect(output, node, n)) return;
      }
    });
}"""


@pytest.fixture(scope="module")
def editor(server):
    with open_editor(server) as editor:
        editor.page.set_default_timeout(20_000)
        yield editor


@pytest.fixture(autouse=True)
def no_error_of_the_packs_files(editor):
    editor.console.clear()
    yield
    assert editor.console == []


def values(workflow):
    return {node["id"]: node.get("widgets_values") or [] for node in workflow["nodes"]}


@pytest.mark.parametrize(
    ("words", "node"),
    [("Prompt Pair", "P2PPromptPair"), ("tau scheduler", "P2PTauScheduler"), ("Invert Image", "P2PInvert")],
)
def test_a_node_is_found_in_the_search_box(editor, words, node):
    page = editor.page
    page.evaluate("() => { app.graph.clear(); app.canvas.setDirty(true, true); }")
    box = page.get_by_placeholder(re.compile("^(Search Nodes|Add a node)"))
    box.wait_for(state="hidden")  # one of before may still be closing
    page.wait_for_timeout(300)
    for _ in range(5):  # a page that is still busy misses clicks
        page.mouse.dblclick(800, 500)
        with contextlib.suppress(TimeoutError):
            box.wait_for(timeout=5000)
            break
    page.wait_for_timeout(300)
    box.press_sequentially(words)
    page.wait_for_timeout(700)  # the list follows after a moment
    # By the pack's name too: a node of ComfyUI's own may be called the same.
    page.get_by_role("option").filter(has_text=PACK).first.click()
    page.wait_for_function("() => app.graph.nodes.length === 1")
    assert page.evaluate("() => app.graph.nodes[0].type") == node


def test_a_graph_of_all_nodes_is_saved_and_loaded_as_it_is(editor):
    editor.page.evaluate(ADD, editor.page.evaluate(ALL))
    editor.page.evaluate(CONNECT)
    saved = editor.workflow()
    assert len(saved["links"]) > 15
    editor.load(json.loads(json.dumps(saved)), "all nodes")
    again = editor.workflow()
    assert sorted(again["links"]) == sorted(saved["links"])
    for before, after in zip(saved["nodes"], again["nodes"], strict=True):
        for key in ("id", "type", "pos", "size", "widgets_values"):
            assert (after.get(key) or None) == (before.get(key) or None), (before["type"], key)
    editor.page.wait_for_timeout(1000)  # the page keeps its draft
    editor.page.reload()
    editor.await_ready()
    editor.page.wait_for_function("(count) => app.graph.nodes.length === count", arg=len(saved["nodes"]))
    assert values(editor.workflow()) == values(saved)


@pytest.mark.parametrize("language", ["ko", "ja", "zh"])
def test_the_page_speaks_the_users_language(editor, language):
    texts = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    own = json.loads((ROOT / "locales" / language / "main.json").read_text(encoding="utf-8"))[
        "promptToPrompt"
    ]
    requests.post(f"{editor.server.url}/settings", json={"Comfy.Locale": language}, timeout=30)
    try:
        editor.open()
        title, labels = editor.page.evaluate(
            """() => {
              app.graph.clear();
              const pair = LiteGraph.createNode('P2PPromptPair');
              const tau = LiteGraph.createNode('P2PTauScheduler');
              pair.pos = [400, 200]; tau.pos = [900, 200];
              app.graph.add(pair); app.graph.add(tau);
              app.canvas.ds.scale = 1; app.canvas.ds.offset = [0, 0]; app.canvas.setDirty(true, true);
              return [pair.title, tau.widgets.map((widget) => widget.label ?? widget.name)];
            }"""
        )
        assert title == texts["P2PPromptPair"]["display_name"]
        assert texts["P2PTauScheduler"]["inputs"]["cross_end"]["name"] in labels
        editor.page.locator(".p2p-status").get_by_text(own["write"]).wait_for()
        editor.page.locator(".p2p-status").get_by_text(own["run"]).wait_for()
    finally:
        requests.post(f"{editor.server.url}/settings", json={"Comfy.Locale": "en"}, timeout=30)


def test_the_help_of_a_node_opens_with_its_pictures(editor):
    editor.open()
    page = editor.page
    page.evaluate(
        """() => {
          app.graph.clear();
          const node = LiteGraph.createNode('P2PTauScheduler');
          node.pos = [700, 300];
          app.graph.add(node);
          app.canvas.ds.scale = 1; app.canvas.ds.offset = [0, 0];
          app.canvas.selectNode(node); app.canvas.setDirty(true, true);
        }"""
    )
    button = page.get_by_test_id("info-button")
    if not button.count():
        page.wait_for_timeout(1000)
    if not button.count():
        pytest.skip("this page opens help in another way")
    button.click()
    page.get_by_text("Typical mistakes").wait_for()
    page.wait_for_function(
        """() => { const pictures = [...document.querySelectorAll('img[src*="P2PTauScheduler"]')];
          return pictures.length === 3 && pictures.every((picture) => picture.naturalWidth > 100); }"""
    )
    editor.console.clear()  # the page looks for an English page under another name first, which Chromium logs
