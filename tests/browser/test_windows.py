"""The page and the sampler read and weigh the windows of tau alike."""

import pytest
from p2p.attention.schedule import Window, parse_word_windows
from p2p.tools.browser import open_editor
from p2p.tools.server import PACK

IMPORT = f"const windows = await import('/extensions/{PACK}/js/windows.js');"
LINES = [
    "hat: 0.6",
    "hat: 0.2-0.6",
    "  red hair :  .25 -  1  ",
    "hat: 0.6, red hair: 0.2-0.9",
    "hat: 0.6, coat: 1,",
    "hat, coat: 0.5",
    "hat: 0.3 coat: 0.5",
    "a: b: 0.5",
    "a:b:0.1-0.5",
    "12:30: 0.5",
    "\u732b: 0.5, \u5e3d\u5b50: 0-0.25",
    "embedding:ugly.pt: 0.4",
    "hat: 00.50",
    "",
    "hat",
    "hat: ",
    "hat 0.3",
    "hat: 0.3 0.5",
    "hat: 0.3-",
    "hat: -0.3",
    "hat: 1.",
    "hat: .",
    "hat: 1.2.3",
    "hat: 1e-3",
    "hat: 0.3, coat",
    "hat: 0.3,, coat: 0.5",
    ": 0.3",
    ", hat: 0.3",
    "hat, 0.3",
    "hat:, 0.3",
    ": 0.3, hat: 0.5",
    "hat: 0.3, : 0.5",
    "hat: 0.3, coat: , 0.5",
    "0.3",
    "hat: 0.3; coat: 0.5",
]


@pytest.fixture(scope="module")
def page(server):
    with open_editor(server) as editor:
        yield editor.page


def read(line):
    try:
        return [
            {"name": name, "start": window.start, "end": window.end}
            for name, window in parse_word_windows(line)
        ]
    except ValueError:
        return []


def test_a_line_of_windows_is_read_alike(page):
    shown = page.evaluate(f"async (lines) => {{ {IMPORT} return lines.map(windows.parseLine); }}", LINES)
    assert dict(zip(LINES, shown, strict=True)) == {line: read(line) for line in LINES}
    assert 10 < sum(map(bool, shown)) < len(LINES) - 10


@pytest.mark.parametrize("fade", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(("start", "end"), [(0, 0), (0, 0.8), (0.2, 0.6), (0.2, 1), (0, 1), (0.5, 0.5)])
def test_a_window_has_the_same_weight_at_every_step(page, start, end, fade):
    steps = [step / 40 for step in range(41)]
    shown = page.evaluate(
        f"""async ([window, fade, steps]) => {{
          {IMPORT} return steps.map((progress) => windows.weight(window, progress, fade));
        }}""",
        [{"start": start, "end": end}, fade, steps],
    )
    assert shown == pytest.approx([Window(start, end).weight(progress, fade) for progress in steps])
