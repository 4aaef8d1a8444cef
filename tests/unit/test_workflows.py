"""The shared workflows as files: explained, repeatable, each with a thumbnail."""

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "workflows"


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


every_workflow = pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)


def test_the_four_edits_of_the_paper_are_there():
    assert {"word_swap", "refinement", "reweighting", "tau"} <= {path.stem for path in FOLDER.glob("*.json")}


@every_workflow
def test_a_note_explains_it_and_says_which_node_to_exchange(path):
    notes = [node["widgets_values"][0] for node in read(path)["nodes"] if node["type"] == "MarkdownNote"]
    assert any("Load Demo Model" in text and "Load Checkpoint" in text for text in notes)


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
