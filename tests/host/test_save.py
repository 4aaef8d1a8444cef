"""Save Pairs: which files a run leaves, what is in them, and what it never does to those of before."""

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import folder_paths
import numpy as np
import pytest
import torch
from comfy.cli_args import args
from p2p.nodes import SavePairs
from p2p.nodes.save import settings_of
from p2p.pairs.fields import COLUMNS
from p2p.tests.host.runs import SOURCE, TARGET
from PIL import Image

import nodes as host_nodes

TARGETS = (TARGET, "a (red:1.3) castle", "\ub208 \ub36e\uc778 \uc131", "a \u732b")
FIELDS = [
    "original_prompt",
    "edit_prompt",
    "edited_prompt",
    "original_image_file_name",
    "edited_image_file_name",
]


@pytest.fixture(autouse=True)
def output(tmp_path):
    before = folder_paths.get_output_directory()
    (tmp_path / "output").mkdir()
    folder_paths.set_output_directory(str(tmp_path / "output"))
    yield tmp_path / "output"
    folder_paths.set_output_directory(before)


def pictures(count, height=12, width=10, seed=0):
    """Every pixel of every picture its own."""
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(seed))


def save(edit, items=1, seed=0, prefix="pairs/pair", instruction="", node=SavePairs):
    """Saves new pictures; returns them and the names that the page shows."""
    source, targets = pictures(items, seed=seed), pictures(items * len(edit.targets), 8, 14, seed + 1)
    shown = node.execute(edit, source, targets, prefix, instruction).ui.as_dict()["images"]
    return source, targets, shown


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text("utf-8").split("\n")[:-1]]


def read(path):
    return np.asarray(Image.open(path))


def quantised(image):
    return (image.double().numpy() * 255).astype(np.uint8)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("items", [1, 2])
def test_each_line_has_the_pictures_and_prompts_of_its_pair(studio, output, items, count):
    edit = studio.edit(SOURCE, *TARGETS[:count])
    instruction = "\n".join(f"edit {n}" for n in range(count))
    source, targets, shown = save(edit, items, instruction=instruction)
    lines = lines_of(output / "pairs")
    pairs = [(item, n) for item in range(items) for n in range(count)]
    assert len(lines) == len(pairs)
    for line, (item, n) in zip(lines, pairs, strict=True):
        assert list(line) == list(COLUMNS) and list(line)[:5] == FIELDS
        assert (line["batch"], line["item"], line["seed"]) == (items, item, None)
        assert (line["width"], line["height"]) == (10, 12)
        assert line["original_prompt"] == SOURCE and line["edited_prompt"] == TARGETS[n]
        assert line["edit_prompt"] == f"edit {n}"
        assert line["edited_image_file_name"].endswith(f"_target{n + 1}.png")
        found = read(output / "pairs" / line["original_image_file_name"])
        np.testing.assert_array_equal(found, quantised(source[item]))
        found = read(output / "pairs" / line["edited_image_file_name"])
        np.testing.assert_array_equal(found, quantised(targets[item * count + n]))
    assert len({line["id"] for line in lines}) == len(lines)
    named = {line[key] for line in lines for key in FIELDS[3:]}
    assert len(named) == items * (1 + count)  # a source is written once, for all of its targets
    assert {path.name for path in (output / "pairs").iterdir()} == named | {"metadata.jsonl"}
    assert [(each["subfolder"], each["type"]) for each in shown] == [("pairs", "output")] * len(named)
    assert {each["filename"] for each in shown} == named


def test_prompts_are_written_as_typed(studio, output):
    typed = "  a (cat:1.3), ((riding)) a\nbicycle \\(old\\), \"\uace0\uc591\uc774\"  "
    save(studio.edit(typed, typed.replace("cat", "dog")), instruction="\ubc14\uafd4\n")
    (line,) = lines_of(output / "pairs")
    assert line["original_prompt"] == typed and line["edited_prompt"] == typed.replace("cat", "dog")
    assert line["edit_prompt"] == "\ubc14\uafd4"
    assert "\uace0\uc591\uc774" in (output / "pairs" / "metadata.jsonl").read_text("utf-8")


def test_no_run_touches_the_files_of_the_runs_before(studio, output):
    edit = studio.edit(SOURCE, *TARGETS[:2])
    for run in range(4):
        before = contents(output)
        save(edit, 1 + run % 2, seed=run, instruction="" if run % 2 else "a\nb")
        after = contents(output)
        for path, content in before.items():
            assert after[path].startswith(content) if path.suffix == ".jsonl" else after[path] == content
        assert len(after) - max(len(before), 1) == 3 * (1 + run % 2)
    lines = lines_of(output / "pairs")
    assert len(lines) == len({line["edited_image_file_name"] for line in lines}) == 12
    assert len({line["original_image_file_name"] for line in lines}) == 6


@pytest.fixture
def counts_from_one(output, monkeypatch):
    """The host looked into the folder before the other files were there."""
    (output / "set").mkdir()

    def look(prefix, *_):
        return str(output / "set"), prefix.split("/")[1], 1, "set", prefix

    monkeypatch.setattr(folder_paths, "get_save_image_path", look)


@pytest.mark.parametrize("there", ["source", "target1", "target2"])
def test_a_number_that_one_file_has_is_left_to_it(studio, output, counts_from_one, there):
    file = output / "set" / f"pair_00001_{there}.png"
    file.write_bytes(b"of before")
    *_, shown = save(studio.edit(SOURCE, *TARGETS[:2]), 2, prefix="set/pair")
    assert [each["filename"][5:10] for each in shown] == ["00002"] * 3 + ["00003"] * 3
    assert file.read_bytes() == b"of before"


def test_a_number_that_another_server_takes_at_the_last_moment_is_left_to_it(
    studio, output, counts_from_one, monkeypatch
):
    source, *_ = save(studio.edit(), prefix="set/pair")
    monkeypatch.setattr(Path, "exists", lambda self: False)  # as it was when this server looked
    *_, shown = save(studio.edit(), seed=4, prefix="set/pair")
    assert [each["filename"][5:10] for each in shown] == ["00002"] * 2
    np.testing.assert_array_equal(read(output / "set" / "pair_00001_source.png"), quantised(source[0]))


@pytest.mark.parametrize("prefix", ["set/pair", "set/%batch_num%"])
def test_servers_that_save_into_one_folder_at_once_share_no_file_and_mix_no_line(
    studio, output, counts_from_one, prefix
):
    edit, saved, errors = studio.edit(SOURCE, *TARGETS[:2]), {}, []

    def work(seed):
        try:
            saved[seed] = save(edit, 2, seed, prefix, f"first of {seed}\nsecond of {seed}")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed * 10,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(saved) == 6
    lines = lines_of(output / "set")
    assert len({line["edited_image_file_name"] for line in lines}) == len(lines) == 24
    for seed, (source, targets, _) in saved.items():
        own = [line for line in lines if line["edit_prompt"].endswith(f" of {seed}")]
        first = lines.index(own[0])
        assert lines[first : first + 4] == own
        for n, line in enumerate(own):
            found = read(output / "set" / line["original_image_file_name"])
            np.testing.assert_array_equal(found, quantised(source[n // 2]))
            np.testing.assert_array_equal(
                read(output / "set" / line["edited_image_file_name"]), quantised(targets[n])
            )


def test_a_run_that_ends_among_its_pictures_leaves_no_line(studio, output, monkeypatch):
    edit = studio.edit()
    save(edit)
    before = contents(output)
    write, written = Image.Image.save, []

    def full(self, *given, **options):
        if len(written) == 2:
            raise OSError("No space left on device")
        written.append(given)
        write(self, *given, **options)

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        patched.setattr(Image.Image, "save", full)
        save(edit, 2, seed=7)
    assert contents(output).items() >= before.items() and len(lines_of(output / "pairs")) == 1
    source, *_ = save(edit, seed=9)
    line = lines_of(output / "pairs")[1]
    np.testing.assert_array_equal(
        read(output / "pairs" / line["original_image_file_name"]), quantised(source[0])
    )


def test_a_last_line_without_its_end_stays_a_line_of_its_own(studio, output):
    (output / "pairs").mkdir()
    (output / "pairs" / "metadata.jsonl").write_text('{"edit_prompt": "by hand"}')
    save(studio.edit())
    assert [line["edit_prompt"] for line in lines_of(output / "pairs")] == ["by hand", ""]


def test_pixels_and_what_the_page_finds_in_a_picture_are_those_of_save_image(studio, output, monkeypatch):
    hidden = SimpleNamespace(prompt={"1": {"class_type": "A"}}, extra_pnginfo={"workflow": {"nodes": [1]}})
    node = type("Executed", (SavePairs,), {"hidden": hidden})
    _, targets, shown = save(studio.edit(), seed=3, node=node)
    host_nodes.SaveImage().save_images(targets, "stock", hidden.prompt, hidden.extra_pnginfo)
    stock, own = Image.open(output / "stock_00001_.png"), Image.open(output / "pairs" / shown[1]["filename"])
    np.testing.assert_array_equal(np.asarray(own), np.asarray(stock))
    assert own.text == stock.text and json.loads(own.text["workflow"]) == {"nodes": [1]}
    assert Image.open(output / "pairs" / shown[0]["filename"]).text == stock.text
    monkeypatch.setattr(args, "disable_metadata", True)
    *_, shown = save(studio.edit(), node=node)
    assert [Image.open(output / "pairs" / each["filename"]).text for each in shown] == [{}, {}]


def test_names_are_those_of_the_host(studio, output):
    host_nodes.SaveImage().save_images(pictures(3), "sets/%year%/p")  # counts on from these
    *_, shown = save(studio.edit(), prefix="sets/%year%/p")
    folder = f"sets/{time.strftime('%Y')}"
    assert [(Path(each["subfolder"]).as_posix(), each["filename"]) for each in shown] == [
        (folder, "p_00004_source.png"),
        (folder, "p_00004_target1.png"),
    ]
    *_, shown = save(studio.edit(), prefix="%width%x%height%")
    assert shown[0]["filename"] == "10x12_00001_source.png" and not shown[0]["subfolder"]
    assert len(lines_of(output)) == 1


@pytest.mark.parametrize("prefix", ["../pair", "/tmp/pair"])
def test_nothing_is_written_outside_of_the_output_folder(studio, output, prefix):
    with pytest.raises(Exception, match="outside the output folder"):
        save(studio.edit(), prefix=prefix)
    assert not contents(output.parent)


@pytest.mark.parametrize(
    ("targets", "sources", "edited", "says"),
    [
        (1, 2, 1, "source has 2 pictures and targets has 1.*1 target prompt, 2 targets are expected"),
        (2, 1, 1, "source has 1 pictures and targets has 1.*2 target prompts, 2 targets are expected"),
        (2, 2, 3, "source has 2 pictures and targets has 3.*4 targets"),
        (1, 0, 0, "source has 0 pictures"),
    ],
)
def test_pictures_of_another_edit_are_an_error_before_anything_is_written(
    studio, output, targets, sources, edited, says
):
    with pytest.raises(ValueError, match=says):
        SavePairs.execute(
            studio.edit(SOURCE, *TARGETS[:targets]), pictures(sources), pictures(edited), "pairs/pair"
        )
    assert not list(output.iterdir())


@pytest.mark.parametrize(("targets", "text"), [(3, "one"), (3, "one\ntwo"), (1, "one\ntwo"), (2, "1\n2\n3")])
def test_another_number_of_instructions_is_an_error_before_anything_is_written(
    studio, output, targets, text
):
    with pytest.raises(ValueError, match=f"instruction has {len(text.split())} line.* {targets} target"):
        save(studio.edit(SOURCE, *TARGETS[:targets]), instruction=text)
    assert not list(output.iterdir())


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", ["", ""]), (" \n", ["", ""]), ("one", ["one", "one"]), ("1\n\n", ["1", "1"]), ("1\n2", ["1", "2"])],
)
def test_targets_of_one_prompt_may_share_an_instruction(studio, output, text, expected):
    save(studio.edit(SOURCE, TARGET, TARGET), instruction=text)
    assert [line["edit_prompt"] for line in lines_of(output / "pairs")] == expected


@pytest.mark.parametrize("name", ["pair", "test"])  # "test" names a split to it, unless it is told the files
def test_the_library_datasets_finds_both_pictures_and_all_texts(studio, output, monkeypatch, name):
    datasets = pytest.importorskip("datasets", minversion="3.4")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    edit = studio.edit(SOURCE, *TARGETS[:2])
    runs = [save(edit, 2, n, f"pairs/{name}", text)[:2] for n, text in ((0, ""), (5, "one\ntwo"))]
    files = {"train": str(output / "pairs" / "**")}
    cache = str(output.parent / "cache")
    rows = datasets.load_dataset("imagefolder", data_files=files, cache_dir=cache, split="train")
    assert rows.column_names == [field.removesuffix("_file_name") for field in COLUMNS]
    assert rows["edit_prompt"][:] == ["", ""] * 2 + ["one", "two"] * 2
    expected = [
        (source[item], targets[2 * item + n])
        for source, targets in runs
        for item in range(2)
        for n in range(2)
    ]
    for row, pair in zip(rows, expected, strict=True):
        for name, picture in zip(("original_image", "edited_image"), pair, strict=True):
            np.testing.assert_array_equal(np.asarray(row[name]), quantised(picture))


def test_the_settings_of_a_run_are_those_of_the_nearest_nodes_before(studio):
    wired = {"model": ["1", 0], "tau": ["2", 0], "blend": ["3", 0], "steps": ["9", 0]}
    tau = {"cross_end": 0.7, "self_end": 0.3, "self_mode": "map"}
    graph = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd15.safetensors"}},
        "2": {"class_type": "P2PTauScheduler", "inputs": {**tau, "words": "x"}},
        "3": {"class_type": "P2PLocalBlend", "inputs": {"words": "dog", "source_words": "cat"}},
        "4": {"class_type": "P2PSampler", "inputs": {**wired, "seed": 7, "cfg": 4.0}},
        "5": {"class_type": "VAEDecode", "inputs": {"samples": ["4", 0], "vae": ["1", 2]}},
        "6": {"class_type": "P2PSavePairs", "inputs": {"source": ["5", 0], "instruction": ""}},
        "8": {"class_type": "KSampler", "inputs": {"seed": 1, "steps": 99}},
    }
    expected = {
        "seed": 7,
        "cfg": 4.0,
        **tau,
        "blend_words": "dog",
        "blend_source_words": "cat",
        "model": "sd15.safetensors",
    }
    assert settings_of(graph, "6") == expected
    assert settings_of(None, None) == {}
