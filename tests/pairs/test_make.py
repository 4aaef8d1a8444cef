"""The tool as it is run: a set is the same whatever happened on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from p2p.pairs.fields import COLUMNS
from p2p.pairs.select import BUNDLED, PUBLISHED, Filter
from p2p.pairs.store import Store
from p2p.tests.pairs.conftest import COMMAND, edits, files, lines, make, run, started


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve edits, a line that cannot be read in their middle, and one edit again."""
    path = tmp_path_factory.mktemp("table") / "table.jsonl"
    rows = [json.dumps({**row, "note": n}) for n, row in enumerate(edits(12))]
    path.write_text("\n".join([*rows[:6], "{", *rows[6:], rows[0]]) + "\n")
    return path


@pytest.fixture(scope="module")
def whole(table: Path) -> Path:
    """The set of a run that nothing disturbed, beside a Ray cluster of somebody else."""
    out = table.parent / "whole"
    done = run(*make(table, out), env={**os.environ, "RAY_ADDRESS": "127.0.0.1:9"})
    assert "line 7: not JSON" in done.stderr
    assert "14 rows: 12 made, 0 were done, 1 repeated, 1 left out. 24 tries, 0 failed" in done.stdout
    return out


def test_every_row_of_the_table_is_there_once_and_whole(whole: Path) -> None:
    found = lines(whole)
    assert [line["note"] for line in found] == sorted(2 * list(range(12)))
    assert len({line["id"] for line in found}) == 24
    assert list(found[0]) == [*COLUMNS, "note"]
    names = {line[name] for line in found for name in ("original_image_file_name", "edited_image_file_name")}
    assert names == set(files(whole)) - {"metadata.jsonl"} and len(names) == 48


def test_what_is_done_is_not_made_again(table: Path, whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*.png")}
    done = run(*make(table, whole))
    assert "0 made, 12 were done" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*.png")} == before


@pytest.mark.parametrize("victim", ["driver", "worker", "ctrl-c"])
def test_a_killed_run_that_goes_on_gives_the_same_set(
    table: Path, whole: Path, tmp_path: Path, victim: str
) -> None:
    import psutil

    out = tmp_path / "set"
    with started(*make(table, out, "--stand-in", "0.3")) as process:
        while not list(out.rglob("*_1.png")):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        if victim == "worker":
            children = psutil.Process(process.pid).children(recursive=True)
            workers = [child for child in children if "ray::MapWorker" in " ".join(child.cmdline())]
            assert workers
            workers[0].kill()
        else:
            os.kill(process.pid, signal.SIGINT if victim == "ctrl-c" else signal.SIGKILL)
        text = process.communicate(timeout=900)[0]
        assert process.returncode == {"driver": -9, "worker": 0, "ctrl-c": 130}[victim], text
    if victim != "worker":
        assert len(list(out.rglob("*_1.png"))) < 24
        run(*make(table, out))
    assert files(out) == files(whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with room for a part of the set."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=120k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk takes root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_in_one_line_and_with_room_the_set_is_the_same(
    table: Path, whole: Path, small_disk: Path
) -> None:
    done = run(*make(table, small_disk), code=1)
    assert "No space left" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert 0 < len(files(small_disk)) < 48
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    run(*make(table, small_disk))
    assert files(small_disk) == files(whole)


def test_the_filter_chooses_again_without_sampling(whole: Path) -> None:
    before = (whole / "metadata.jsonl").read_bytes()
    done = run(*COMMAND, "filter", str(whole), "--keep", "1", "--format", "webdataset")
    assert "12 pairs" in done.stdout and len(lines(whole)) == 12
    import webdataset

    shards = [str(path) for path in sorted((whole / "webdataset").glob("*.tar"))]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [json.loads(sample["json"]) for sample in samples] == lines(whole)
    first = lines(whole)[0]
    assert samples[0]["edited.png"] == (whole / first["edited_image_file_name"]).read_bytes()
    for path in (whole / "webdataset").iterdir():
        path.unlink()
    (whole / "webdataset").rmdir()
    run(*COMMAND, "filter", str(whole))
    assert (whole / "metadata.jsonl").read_bytes() == before


def test_the_library_datasets_reads_the_set(whole: Path, tmp_path: Path) -> None:
    from datasets import load_dataset

    found = load_dataset("imagefolder", data_dir=str(whole), split="train", cache_dir=str(tmp_path))
    assert len(found) == 24
    assert found[0]["original_image"].size == (16, 16)
    assert [row["edited_prompt"] for row in found] == [line["edited_prompt"] for line in lines(whole)]


def test_the_report_is_one_page_that_needs_nothing_else(whole: Path) -> None:
    run(*COMMAND, "report", str(whole))
    page = (whole / "report.html").read_text()
    (whole / "report.html").unlink()
    assert "12 rows, 24 tries, <b>24 pairs kept</b>" in page
    assert page.count("data:image/jpeg") == 2 * 3 * 6 and "All were taken" in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_the_bundled_model_is_sampled_and_scored_by_the_bundled_clip(table: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join(table.read_text().splitlines(True)[:2]))
    recipe = ["--recipe", "instructpix2pix", "--steps", "3", "--cfg", "4"]
    out = tmp_path / "set"
    run(*make(few, out, "--demo", *recipe, "--width", "64", "--height", "64", "--min-direction", "-1"))
    noted = json.loads((out / ".pairs" / "run.json").read_text())
    assert noted["clip"] == "demo" and noted["filter"]["least"] == {**BUNDLED, "clip_sim_dir": -1.0}
    tries = [values for row in Store(str(out)).rows() for values in row["tries"]]
    assert len(tries) == 4
    for values in tries:
        assert values["self_mode"] == "map in both halves" and values["self_end"] in (1 / 3, 2 / 3)
        assert all(-1 <= values[name] <= 1 for name in PUBLISHED)
    kept = Filter(**noted["filter"]).kept(Store(str(out)).rows())
    assert [values["id"] for values in kept] == [line["id"] for line in lines(out)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "name one of --checkpoint"),
        (["--checkpoint", "nowhere.safetensors", "--clip", "none"], "nowhere.safetensors cannot be read"),
        (["--stand-in", "0", "--clip", "no/where"], "no CLIP in the folder or name on the hub no/where"),
        (["--stand-in", "0", "--min-text", "0.3"], "need a CLIP that scores"),
        (["--stand-in", "0", "--cfg", "9:1"], "cfg is '9:1'"),
        (["--stand-in", "0", "--self-mode", "both"], "self_mode is 'both'; expected one of map, mutual"),
        (["--stand-in", "0", "--width", "100"], "width is 100; expected a multiple of 8"),
        (["--stand-in", "0", "--out", "/proc/set"], "the folder /proc/set cannot be written"),
        (["--stand-in", "0", "--address", "127.0.0.1:9"], "no Ray cluster at 127.0.0.1:9"),
        (["--stand-in", "0", "--address", "cluster"], "is 'cluster'; expected HOST:PORT"),
    ],
)
def test_what_cannot_start_says_why_in_one_line(
    table: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [*COMMAND, "make", str(table), "--out", str(tmp_path / "set"), *options]
    done = run(*command, code=1, env=environment)
    assert message in done.stderr
    assert done.stderr.splitlines()[-1].startswith("pairs: ") and "Traceback" not in done.stderr
    assert not (tmp_path / "set").exists()


def test_a_folder_of_other_settings_is_refused(table: Path, whole: Path) -> None:
    done = run(*make(table, whole, "--steps", "7"), code=1)
    assert "steps is 50, not 7" in done.stderr
