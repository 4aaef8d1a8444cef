"""What Prompt Pair, Add Target and tau Scheduler show, in both ways in which the page draws nodes."""

import pytest
import requests
from p2p.tests.conftest import ROOT
from p2p.tools.browser import open_editor

SCREENSHOTS = ROOT / "output" / "screenshots"
VUE = "Comfy.VueNodes.Enabled"
SOURCE = "a cat riding a bicycle"
TARGET = "a dog riding a bicycle at night"

BUILD = """(nodes) => {
  const graph = window.app.graph;
  const last = graph.last_node_id; // some pages give a new node with an old one's id the old one's values
  graph.clear();
  graph.last_node_id = last;
  const made = nodes.map(([type, x, y, widgets, size]) => {
    const node = window.LiteGraph.createNode(type);
    node.pos = [x, y];
    graph.add(node);
    if (size) node.setSize(size);
    for (const [name, value] of Object.entries(widgets))
      node.widgets.find((widget) => widget.name === name).value = value;
    return node;
  });
  window.app.canvas.ds.scale = 1;
  window.app.canvas.ds.offset = [0, 110];
  window.app.canvas.setDirty(true, true);
  return made.map((node) => node.id);
}"""
VALUES = """(type) => Object.fromEntries(window.app.graph.findNodesByType(type)[0].widgets
  .filter((widget) => widget.type !== 'prompt_to_prompt').map((widget) => [widget.name, widget.value]))"""
SET = """([type, values]) => {
  const node = window.app.graph.findNodesByType(type)[0];
  for (const [name, value] of Object.entries(values)) {
    const widget = node.widgets.find((each) => each.name === name);
    widget.value = value;
    widget.callback?.(value);
  }
}"""
CHIPS = """() => [...document.querySelectorAll('.p2p-alignment .p2p-word')].map(
  (chip) => [chip.dataset.side, chip.textContent, chip.dataset.kind])"""
# What a long prompt's picture says, read from left to right.
LIST = """() => [...document.querySelectorAll('.p2p-list > *')].map((part) => part.textContent).join(' ')"""
# By how much the pictures' contents are taller than what can be seen of them.
HIDDEN = """() => [...document.querySelectorAll('.p2p-scroll')].map(
  (area) => area.scrollHeight - area.clientHeight)"""
EDGES = """() => Object.fromEntries([...document.querySelectorAll('.p2p-edge')].map(
  (edge) => [edge.dataset.edge, Number(edge.getAttribute('aria-valuenow'))]))"""
# The lowest contrast of a text with what lies behind it, as WCAG 2 defines it, and the text.
CONTRAST = """() => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgb = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (colour) => {
    const [r, g, b] = rgb(colour).map((v) => v / 255)
      .map((v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const ground = (element) => {
    const colour = getComputedStyle(element).backgroundColor;
    return rgb(colour)[3] === 255 ? colour : ground(element.parentElement);
  };
  const texts = document.querySelectorAll(
    '.p2p-word, .p2p-name, .p2p-fold, .p2p-comma, .p2p-arrow, .p2p-status, .p2p text');
  const found = [...texts].map((element) => {
    const style = getComputedStyle(element);
    const [a, b] = [light(element instanceof SVGElement ? style.fill : style.color), light(ground(element))];
    return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), element.textContent];
  });
  return found.sort((a, b) => a[0] - b[0])[0];
}"""


def configure(server, **settings):
    requests.post(f"{server.url}/settings", json=settings, timeout=30).raise_for_status()


@pytest.fixture(scope="module", params=["canvas", "vue"])
def editor(server, request):
    configure(server, **{VUE: request.param == "vue", "Comfy.VueNodes.AutoScaleLayout": False})
    try:
        with open_editor(server) as editor:
            editor.page.set_default_timeout(20_000)
            yield editor
    finally:
        configure(server, **{VUE: False})


@pytest.fixture(autouse=True)
def no_error_of_the_packs_files(editor):
    editor.console.clear()
    yield
    assert editor.console == []


def build(editor, *nodes):
    """Fresh nodes on the page: (type, x, y, widgets[, size])."""
    ids = editor.page.evaluate(BUILD, [list(node) for node in nodes])
    remember(editor)
    return ids


def remember(editor):
    editor.page.evaluate("() => { app.canvas.emitBeforeChange(); app.canvas.emitAfterChange(); }")


def values(editor, node="P2PTauScheduler"):
    return editor.page.evaluate(VALUES, node)


def wait_for_chips(editor, expected):
    shown = f"(expected) => JSON.stringify(({CHIPS})()) === JSON.stringify(expected)"
    editor.page.wait_for_function(shown, arg=expected)


def box(editor, name):
    page = editor.page
    return page.get_by_placeholder(name, exact=True).or_(page.get_by_label(name, exact=True)).first


def pair(**widgets):
    return ("P2PPromptPair", 100, 100, widgets, [460, 420])


def schedule(**widgets):
    return ("P2PTauScheduler", 700, 100, widgets, [400, 460])


def row(side, text, kinds):
    return [[side, word, kind] for word, kind in zip(text.split(), kinds.split(), strict=True)]


ALIGNED = row("source", SOURCE, "shared swapped shared shared shared") + row(
    "target", TARGET, "shared swapped shared shared shared new new"
)


def test_the_alignment_follows_typing(editor):
    build(editor, pair())
    box(editor, "source").fill(SOURCE)
    box(editor, "target").press_sequentially(TARGET, delay=5)
    wait_for_chips(editor, ALIGNED)
    assert editor.page.locator(".p2p-lines path").count() == 5
    assert "4 shared, 1 swapped, 2 new, 0 removed" in editor.page.locator(".p2p-status").inner_text()
    box(editor, "target").fill(SOURCE)
    wait_for_chips(editor, row("source", SOURCE, "shared " * 5) + row("target", SOURCE, "shared " * 5))


TAGS = (
    "masterpiece, best quality, 1girl, solo, long hair, (red hair:1.2), blue eyes, school uniform, smile, "
    "outdoors, cherry blossoms, wind, petals, detailed background, very aesthetic, absurdres"
)
EDITED = TAGS.replace("red hair", "silver hair").replace("cherry blossoms", "autumn leaves") + ", glasses"


def wait_for_list(editor, expected):
    editor.page.wait_for_function(f"(expected) => ({LIST})() === expected", arg=expected)


def test_a_long_prompt_is_a_list_of_its_edits_all_of_them_in_view(editor):
    build(editor, ("P2PPromptPair", 100, 100, {"source": TAGS, "target": EDITED}, [400, 330]))
    edits = (
        "\u2026 8 shared red\u2192silver hair \u2026 6 shared cherryblossoms\u2192autumnleaves "
        "\u2026 7 shared glasses"
    )
    wait_for_list(editor, edits)
    assert "22 shared, 3 swapped, 1 new, 0 removed" in editor.page.locator(".p2p-status").inner_text()
    editor.page.wait_for_timeout(300)  # until the page gave it the height that it asks for
    assert editor.page.evaluate(HIDDEN) == [0]
    assert editor.page.evaluate("() => app.graph.nodes[0].size[1]") <= 335
    fold = editor.page.locator(".p2p-fold").nth(1)
    fold.click()
    opened = edits.replace("\u2026 6 shared", "6 shared , blue eyes , school uniform , smile , outdoors ,")
    wait_for_list(editor, opened)
    assert fold.get_attribute("aria-expanded") == "true"
    editor.page.keyboard.press("ArrowRight")
    assert editor.page.locator(".p2p-word:focus").inner_text() == "blue"
    editor.page.keyboard.press("ArrowLeft")
    editor.page.keyboard.press("Enter")
    wait_for_list(editor, edits)


def test_a_long_prompt_says_what_was_removed_where_it_stood(editor):
    prompt = "a photograph of an old man with a hat sitting on a bench in a park beside a dog"
    build(editor, pair(source=prompt, target=prompt.replace(" with a hat", "").replace("dog", "cat")))
    wait_for_list(editor, "\u2026 6 shared with a hat \u2026 9 shared dog\u2192cat")


def test_both_prompts_stay_named_once_they_are_written(editor, request):
    if request.node.callspec.params["editor"] == "vue":
        pytest.skip("the page draws text boxes itself there")
    build(editor, pair(source=SOURCE, target=TARGET))
    shown = editor.page.evaluate(
        """() => {
          const node = app.graph.nodes[0], said = [];
          const context = new Proxy({}, {
            get: (_, name) => (...given) => name === 'fillText' && said.push(given) });
          node.onDrawForeground(context);
          const boxes = node.widgets.filter((widget) => ['source', 'target'].includes(widget.name));
          return said.map(([name, , y], n) => [name, y > boxes[n].y, y <= boxes[n].y + 10]);
        }"""
    )
    assert shown == [["source", True, True], ["target", True, True]]  # in the margin above each box


def test_the_alignment_follows_the_mode(editor):
    build(editor, pair(source=SOURCE, target=TARGET, mode="refine"))
    refined = [[side, word, kind if kind != "swapped" else "removed" if side == "source" else "new"]
               for side, word, kind in ALIGNED]  # fmt: skip
    wait_for_chips(editor, refined)


def test_words_can_be_walked_with_the_keyboard_and_say_what_becomes_of_them(editor):
    build(editor, pair(source=SOURCE, target=TARGET))
    wait_for_chips(editor, ALIGNED)
    chips = editor.page.locator(".p2p-word")
    assert [chips.nth(n).get_attribute("tabindex") for n in range(chips.count())].count("0") == 1
    chips.first.focus()
    for key, expected in (("ArrowRight", "cat"), ("ArrowDown", "dog"), ("End", "night"), ("ArrowLeft", "at")):
        editor.page.keyboard.press(key)
        focused = editor.page.locator(".p2p-word:focus")
        assert focused.inner_text() == expected
        says = focused.get_attribute("aria-label")
        assert editor.page.locator(".p2p-status").inner_text() == says
    assert "1 token" in says and "new" in says


def test_a_prompt_that_comes_by_a_link_is_aligned_after_the_run(editor, request):
    source = SOURCE + " " * len(request.node.name)  # not the one that the server has cached
    build(
        editor,
        pair(target=TARGET),
        ("PrimitiveString", 700, 100, {"value": source}),
        ("P2PDemoModel", 700, 300, {}),
        ("P2PTokenReweight", 700, 500, {"words": "dog"}),
        ("P2PPairedLatent", 1000, 500, {}),
        ("EmptyLatentImage", 1000, 100, {"width": 64, "height": 64}),
        ("VAEDecode", 1000, 300, {}),
        ("PreviewImage", 1000, 650, {}),
    )
    editor.page.evaluate(
        """() => {
          const [pair, text, model, weight, latent, empty, decode, preview] = app.graph.nodes;
          text.connect(0, pair, pair.inputs.findIndex((input) => input.name === 'source'));
          for (const [from, slot, to, name] of [[model, 1, pair, 'clip'], [pair, 0, weight, 'edit'],
            [weight, 0, latent, 'edit'], [empty, 0, latent, 'latent'], [latent, 0, decode, 'samples'],
            [model, 2, decode, 'vae'], [decode, 0, preview, 'images']])
            from.connect(slot, to, to.inputs.findIndex((input) => input.name === name));
        }"""
    )
    status = editor.page.locator(".p2p-status")
    status.get_by_text("when the graph runs").wait_for()
    editor.run()
    wait_for_chips(editor, ALIGNED)


def test_choices_that_the_page_draws_are_not_shown_as_words(editor):
    build(editor, pair(source="a {cat|dog}", target="a bird"))
    editor.page.locator(".p2p-status").get_by_text("when the graph runs").wait_for()


def test_what_cannot_be_aligned_says_why(editor):
    build(editor, pair(source="cat " * 2500, target="a bird"))
    editor.page.locator(".p2p-status").get_by_text("10000 characters").wait_for()
    editor.page.evaluate(SET, ["P2PPromptPair", {"source": " "}])
    editor.page.locator(".p2p-status").get_by_text("Write both prompts").wait_for()
    editor.console.clear()  # Chromium logs every answer of 400


def test_words_are_shown_as_text(editor):
    build(editor, pair(source="<img src=x onerror=alert(1)>", target="&lt;b&gt;"))
    editor.page.locator(".p2p-word").first.wait_for()
    assert editor.page.locator(".p2p img").count() == 0


def edge_box(editor, edge):
    found = editor.page.locator(f'[data-edge="{edge}"]').bounding_box()
    return found["x"] + found["width"] / 2, found["y"] + found["height"] / 2


def drag(editor, edge, fraction):
    """Drags an edge of the timeline to a fraction of the run."""
    editor.page.locator(f'[data-edge="{edge}"]').hover()  # once it stands still
    x, y = edge_box(editor, edge)
    track = editor.page.locator(".p2p-track").first.bounding_box()
    editor.page.mouse.down()
    editor.page.mouse.move(track["x"] + 0.5 * track["width"], y, steps=3)
    editor.page.mouse.move(track["x"] + fraction * track["width"], y, steps=3)
    editor.page.mouse.up()


def assert_agree(editor, **expected):
    """Chart and widgets show the same; and what is expected."""
    edges = {name: value for name, value in expected.items() if name != "words"}
    editor.page.wait_for_function(
        f"""([edges, values]) => {{
          const [shown, now] = [({EDGES})(), ({VALUES})('P2PTauScheduler')];
          return Object.entries(edges).every(([name, value]) => shown[name] === value)
            && Object.entries(values).every(([name, value]) => now[name] === value);
        }}""",
        arg=[edges, expected],
    )
    shown, now = editor.page.evaluate(EDGES), values(editor)
    for name in ("cross_start", "cross_end", "self_start", "self_end"):
        assert shown[name] == now[name]

def show(editor, zoom):
    """Sets the zoom and moves the view until the timeline, wherever the page drew it, is in it."""
    editor.page.evaluate("(zoom) => { app.canvas.ds.scale = zoom; app.canvas.setDirty(true, true); }", zoom)
    for _ in range(20):
        editor.page.locator(".p2p-track").first.wait_for()
        editor.page.wait_for_timeout(400)
        box, size = editor.page.locator(".p2p-track").first.bounding_box(), editor.page.viewport_size
        right, bottom = box["x"] + box["width"], box["y"] + box["height"]
        if box["x"] >= 100 and box["y"] >= 100 and right <= size["width"] and bottom <= size["height"] - 150:
            return
        editor.page.evaluate(
            """([x, y, zoom]) => {
              const [left, top] = app.canvas.ds.offset;
              app.canvas.ds.offset = [left + (300 - x) / zoom, top + (300 - y) / zoom];
              app.canvas.setDirty(true, true);
            }""",
            [box["x"], box["y"], zoom],
        )
    raise AssertionError(f"the timeline is not in view: {box}")



@pytest.mark.parametrize("zoom", [1.0, 1.3, 0.75])
def test_dragging_an_edge_sets_its_widget_at_any_zoom(editor, zoom):
    build(editor, schedule())
    show(editor, zoom)
    drag(editor, "cross_end", 0.6)
    assert abs(values(editor)["cross_end"] - 0.6) <= 0.02
    drag(editor, "self_end", 1.2)
    assert_agree(editor, self_end=1)
    drag(editor, "self_start", 0.25)
    assert abs(values(editor)["self_start"] - 0.25) <= 0.02
    drag(editor, "cross_start", 0.9)
    now = values(editor)
    assert now["cross_start"] == now["cross_end"]  # a window never ends before it starts
    assert_agree(editor)


def test_the_chart_belongs_to_the_node_that_replaced_an_equal_one(editor):
    build(editor, schedule())
    editor.page.locator(".p2p-track").first.wait_for()
    editor.page.wait_for_timeout(500)
    build(editor, schedule())  # with the same id, as after undo; one way of drawing keeps the old element
    editor.page.wait_for_timeout(500)
    drag(editor, "cross_end", 0.6)
    assert abs(values(editor)["cross_end"] - 0.6) <= 0.02


def test_edges_move_by_keyboard_and_undo_takes_it_back(editor):
    build(editor, schedule())
    edge = editor.page.locator('[data-edge="cross_end"]')
    edge.focus()
    presses = {"ArrowLeft": 0.79, "Shift+ArrowRight": 0.89, "End": 1, "Home": 0, "PageUp": 0.1}
    for key, expected in presses.items():
        editor.page.keyboard.press(key)
        assert_agree(editor, cross_end=expected)
    assert editor.page.evaluate("() => document.activeElement.dataset.edge") == "cross_end"
    for key, expected in (("Control+z", 0), ("Control+z", 1), ("Control+y", 0)):
        editor.page.keyboard.press(key)
        assert_agree(editor, cross_end=expected)


def test_the_chart_follows_widgets_and_the_words_box(editor):
    build(editor, schedule())
    words = "hat: 0.3\n\n red hair :0.1-0.65"
    editor.page.evaluate(SET, ["P2PTauScheduler", {"cross_start": 0.2, "words": words}])
    assert_agree(editor, cross_start=0.2)
    editor.page.locator('[data-edge="red hair_end"]').focus()
    editor.page.keyboard.press("ArrowRight")
    editor.page.locator('[data-edge="hat_start"]').focus()
    editor.page.keyboard.press("PageUp")
    assert values(editor)["words"] == "hat: 0.1-0.3\n\nred hair: 0.1-0.66"
    editor.page.evaluate(SET, ["P2PTauScheduler", {"words": "hat: 0.3, dog: 0.5,"}])
    editor.page.locator('[data-edge="dog_end"]').focus()
    editor.page.keyboard.press("ArrowLeft")
    assert values(editor)["words"] == "hat: 0.3, dog: 0.49"
    editor.page.evaluate(SET, ["P2PTauScheduler", {"words": "hat 0.3"}])
    editor.page.locator(".p2p-status").get_by_text('Cannot read the line "hat 0.3"').wait_for()
    editor.page.evaluate(SET, ["P2PTauScheduler", {"words": "", "self_start": 0.9}])
    editor.page.locator(".p2p-status").get_by_text("ends before it starts").wait_for()


@pytest.mark.parametrize("words", ["", "hat: 0.3\nred hair: 0.1-0.65", "hat 0.3"])
def test_the_whole_chart_is_in_view_in_the_smallest_node(editor, words):
    build(editor, ("P2PTauScheduler", 700, 100, {"words": words}))
    editor.page.evaluate("() => { const [tau] = app.graph.nodes; tau.setSize([400, tau.computeSize()[1]]); }")
    editor.page.locator(".p2p-track").first.wait_for()
    editor.page.wait_for_timeout(500)
    assert editor.page.evaluate(HIDDEN) == [0]


def test_an_edge_whose_value_is_linked_stays(editor):
    build(editor, schedule(), ("PrimitiveFloat", 100, 100, {"value": 0.3}))
    editor.page.evaluate(
        """() => { const [tau, number] = app.graph.nodes;
          number.connect(0, tau, tau.inputs.findIndex((input) => input.name === 'cross_end')); }"""
    )
    editor.page.locator('[data-edge="cross_end"][aria-disabled]').wait_for()
    before = values(editor)["cross_end"]
    drag(editor, "cross_end", 0.2)
    assert values(editor)["cross_end"] == before


def test_loading_and_pasting_show_what_was_saved(editor):
    build(editor, schedule(cross_end=0.35, words="hat: 0.2-0.5"), pair(source=SOURCE, target=TARGET))
    saved = editor.workflow()
    stored = next(node for node in saved["nodes"] if node["type"] == "P2PTauScheduler")["widgets_values"]
    assert [value for value in stored if value not in (None, "")] == list(values(editor).values())
    build(editor)
    editor.load(saved)
    assert_agree(editor, cross_end=0.35, words="hat: 0.2-0.5")
    wait_for_chips(editor, ALIGNED)
    for before, after in zip(saved["nodes"], editor.workflow()["nodes"], strict=True):
        assert {**before, "size": None} == {**after, "size": None}  # Vue nodes grow with their contents
    editor.page.evaluate(
        """() => { const tau = app.graph.findNodesByType('P2PTauScheduler')[0];
          app.canvas.selectNode(tau); app.canvas.copyToClipboard(); app.graph.remove(tau);
          app.canvas.pasteFromClipboard(); }"""
    )
    assert_agree(editor, cross_end=0.35, words="hat: 0.2-0.5")


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_everything_is_legible_in_both_themes(editor, theme, request):
    configure(editor.server, **{"Comfy.ColorPalette": theme})
    try:
        editor.open()
        editor.page.wait_for_timeout(2000)  # some pages bring back late what they showed before
        build(
            editor,
            pair(source=SOURCE + " on a beach", target="a dog riding a red sports car on a beach at night"),
            ("P2PAddTarget", 100, 560, {"target": "a cat riding"}, [460, 300]),
            schedule(fade=0.15, words="dog: 0.6\nred sports car: 0.2-0.9"),
            ("P2PPromptPair", 1150, 100, {"source": TAGS, "target": EDITED}, [400, 330]),
        )
        editor.page.evaluate("() => app.graph.nodes[0].connect(0, app.graph.nodes[1], 'edit')")
        editor.page.wait_for_function("() => document.querySelectorAll('.p2p-word').length > 25")
        contrast, text = editor.page.evaluate(CONTRAST)
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        name = f"pictures-{request.node.callspec.params['editor']}-{theme}.png"
        editor.page.screenshot(path=SCREENSHOTS / name)
        assert contrast >= 4.5, text
    finally:
        configure(editor.server, **{"Comfy.ColorPalette": "dark"})
