"""The shared workflows as files: legible, explained, and free of what only one machine has."""

import itertools
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
TITLE = 30  # a node's title bar lies above its position


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def box(node):
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE, x + width, y + height


def overlap(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


every_workflow = pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)


def test_the_four_edits_of_the_paper_are_there():
    assert {"word_swap", "refinement", "reweighting", "tau"} <= {path.stem for path in FOLDER.glob("*.json")}


@every_workflow
def test_no_nodes_overlap(path):
    for a, b in itertools.combinations(read(path)["nodes"], 2):
        assert not overlap(box(a), box(b)), f"{a['type']} {a['id']} lies on {b['type']} {b['id']}"


@every_workflow
def test_every_node_stands_in_a_titled_group(path):
    workflow = read(path)
    frames = [(x, y, x + w, y + h) for group in workflow["groups"] for x, y, w, h in [group["bounding"]]]
    assert all(group["title"] for group in workflow["groups"])
    for node in workflow["nodes"]:
        left, top, right, bottom = box(node)
        inside = [f for f in frames if f[0] <= left and f[1] <= top and right <= f[2] and bottom <= f[3]]
        assert len(inside) == 1, f"{node['type']} {node['id']} stands in {len(inside)} groups"


@every_workflow
def test_a_note_says_what_it_shows_and_which_node_to_exchange(path):
    notes = [node["widgets_values"][0] for node in read(path)["nodes"] if node["type"] == "MarkdownNote"]
    assert any("Load Demo Model" in text and "Load Checkpoint" in text and "Try" in text for text in notes)


@every_workflow
def test_a_run_gives_the_same_picture_again(path):
    for node in read(path)["nodes"]:
        assert "randomize" not in node.get("widgets_values", []), f"{node['type']} draws a new seed"


@every_workflow
def test_it_has_a_thumbnail(path):
    assert path.with_suffix(".jpg").read_bytes()[:2] == b"\xff\xd8"


@every_workflow
def test_every_link_joins_two_nodes(path):
    workflow = read(path)
    ids = {node["id"] for node in workflow["nodes"]}
    assert all(source in ids and target in ids for _, source, _, target, *_ in workflow["links"])
    assert workflow["links"]
