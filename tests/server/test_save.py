"""Save Pairs in a real server: what clients that queue pairs leave on disk and see on the page."""

import io
import json
import re
import subprocess
import sys

import pytest
import requests
from p2p.tests.conftest import ROOT
from p2p.tools.graphs import node, paired
from p2p.tools.server import failure
from PIL import Image, ImageChops

SOURCE, TARGETS = "a cat riding a bicycle", ["a (cat:1.2) riding a car", "a dog riding a bicycle"]


def graph(folder, seed=1, items=2):
    """Pairs of two targets, and the same images through Save Image."""
    found = paired(SOURCE, TARGETS[0], side=64, items=items, seed=seed, steps=2)
    found["edit"] = node(
        "P2PAddTarget", clip=["model", 1], edit=["prompts", 0], target=TARGETS[1], mode="auto"
    )
    found["sample"]["inputs"]["edit"] = ["edit", 0]
    for output, name in enumerate(("source", "targets")):
        found[name] = node("VAEDecode", samples=["sample", output], vae=["model", 2])
        found[f"stock_{name}"] = node(
            "SaveImage", images=[name, 0], filename_prefix=f"{folder}_{seed}/{name}"
        )
    found["pairs"] = node(
        "P2PSavePairs",
        edit=["edit", 0],
        source=["source", 0],
        targets=["targets", 0],
        filename_prefix=f"{folder}/pair",
        instruction="turn the bicycle into a car\nturn the cat into a dog",
    )
    return found


def queue(server, prompt, client):
    extra = {"extra_pnginfo": {"workflow": {"id": client}}}
    answer = requests.post(
        f"{server.url}/prompt",
        json={"prompt": prompt, "client_id": client, "extra_data": extra},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    return answer.json()["prompt_id"]


def finished(server, prompt_id):
    entry = server.wait(prompt_id)
    assert failure(entry) is None
    return entry


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text("utf-8").splitlines()]


def same(a, b):
    return ImageChops.difference(Image.open(a).convert("RGB"), Image.open(b).convert("RGB")).getbbox() is None


def test_two_clients_fill_one_set_and_every_line_has_the_pictures_of_its_pair(server):
    output = server.folder / "output"
    queued = {seed: queue(server, graph("two", seed), f"client {seed % 2}") for seed in (1, 2, 3, 4)}
    entries = {seed: finished(server, prompt_id) for seed, prompt_id in queued.items()}
    lines = lines_of(output / "two")
    assert len(lines) == 4 * 2 * 2
    assert len({line["edited_image_file_name"] for line in lines}) == 16
    assert len({line["original_image_file_name"] for line in lines}) == 8
    for run, seed in enumerate(queued):
        for item in range(2):
            for n, instruction in enumerate(("turn the bicycle into a car", "turn the cat into a dog")):
                line = lines[4 * run + 2 * item + n]
                assert (line["original_prompt"], line["edited_prompt"]) == (SOURCE, TARGETS[n])
                assert line["edit_prompt"] == instruction
                stock = output / f"two_{seed}"
                own = output / "two" / line["original_image_file_name"]
                assert same(own, stock / f"source_{item + 1:05}_.png")
                text = Image.open(own).text
                assert line["seed"] == json.loads(text["prompt"])["sample"]["inputs"]["seed"] == seed
                assert json.loads(text["workflow"]) == {"id": f"client {seed % 2}"}
                own = output / "two" / line["edited_image_file_name"]
                assert same(own, stock / f"targets_{2 * item + n + 1:05}_.png")
        shown = entries[seed]["outputs"]["pairs"]["images"]
        roles = [each["filename"].split("_")[2] for each in shown]
        assert roles == ["source.png", "target1.png", "target2.png"] * 2
        content = requests.get(f"{server.url}/view", params=shown[4], timeout=60).content
        assert content == (output / "two" / shown[4]["filename"]).read_bytes()
        Image.open(io.BytesIO(content)).verify()


def test_a_graph_that_is_queued_again_unchanged_adds_nothing(server):
    for _ in range(2):
        finished(server, queue(server, graph("same", items=1), "client"))
    assert len(lines_of(server.folder / "output" / "same")) == 2


def test_the_script_of_the_documentation_queues_a_run_for_each_line(server, tmp_path):
    page = (ROOT / "docs" / "training-pairs.md").read_text(encoding="utf-8")
    script = next(code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "argv" in code)
    (tmp_path / "queue_pairs.py").write_text(script, encoding="utf-8")
    prompt = graph("script", items=1)
    del prompt["edit"]
    for user in ("sample", "pairs"):
        prompt[user]["inputs"]["edit"] = ["prompts", 0]
    (tmp_path / "graph.json").write_text(json.dumps(prompt), encoding="utf-8")
    asked = [
        {"original_prompt": "a cat", "edit_prompt": "turn the cat into a dog", "edited_prompt": "a dog"},
        {"original_prompt": "a castle", "edit_prompt": "\ubc24", "edited_prompt": "a castle at night"},
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(each) + "\n" for each in asked), "utf-8")
    before = set(server.get("/history").json())
    command = [sys.executable, "queue_pairs.py", "graph.json", "prompts.jsonl", server.url]
    subprocess.run(command, cwd=tmp_path, check=True)
    last = queue(server, graph("after", items=1), "client")
    finished(server, last)
    entries = {key: entry for key, entry in server.get("/history").json().items() if key not in before}
    assert len(entries) == 3 and not any(map(failure, entries.values()))
    lines = lines_of(server.folder / "output" / "script")
    assert [{key: line[key] for key in asked[0]} for line in lines] == asked


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"targets": ["source", 0]}, ["source has 2 pictures and targets has 2", "4 targets"]),
        ({"instruction": "turn it"}, ["instruction has 1 line for 2 target prompts"]),
        ({"filename_prefix": "../pair"}, ["outside the output folder"]),
    ],
)
def test_what_does_not_fit_is_an_error_and_writes_nothing(server, change, says):
    prompt = graph("wrong")
    prompt["pairs"]["inputs"] |= change
    message = failure(server.wait(queue(server, prompt, "client")))
    assert message and "P2PSavePairs" in message and all(part in message for part in says)
    assert not (server.folder / "output" / "wrong").exists()
