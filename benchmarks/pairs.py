"""Pairs at scale: what the engine costs, how it scales, and whether kills at random moments leave a trace.

python benchmarks/pairs.py speed        one and two workers beside a plain loop of the same sampling
python benchmarks/pairs.py engine       a sampler that does nothing, over many rows; then the same again
python benchmarks/pairs.py acceptance   how many rows have a pair after so many tries
python benchmarks/pairs.py kills        kill drivers, workers and nodes at random moments, go on, compare
python benchmarks/pairs.py cost         hours of a GPU for a set, from the operations that SD1.5 takes

Each prints its figures, and keeps them in output/pairs/NAME.json; what is there is not measured again, and
kills and speed go on after the last round there. Processor time is what a process and those that it started
have used: other programs beside it change it little.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pack import ROOT, load_pack

OUT = ROOT / "output" / "pairs"
MAKE = [sys.executable, str(ROOT / "pairs"), "make"]
EDITS = (
    ("a cat riding a bicycle", "turn the bicycle into a car", "a cat riding a car"),
    ("a castle on a mountain", "make it snow", "a castle on a snowy mountain"),
    ("a red house in a field", "paint it blue", "a blue house in a field"),
    ("a dog on a beach", "make it an elephant", "an elephant on a beach"),
)


def edits(count: int) -> Iterator[dict[str, Any]]:
    for n in range(count):
        names = ("original_prompt", "edit_prompt", "edited_prompt")
        yield {**dict(zip(names, EDITS[n % len(EDITS)], strict=True)), "seed": 1000 * n}


def write_table(path: Path, count: int, unreadable: int | None = None) -> Path:
    """unreadable: the line that is no JSON."""
    with path.open("w") as file:
        for n, row in enumerate(edits(count), 1):
            file.write("{unreadable\n" if n == unreadable else json.dumps(row) + "\n")
    return path


def digests(folder: Path) -> dict[str, str]:
    """Every file of a set, but the tool's own, with its hash."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".pairs" not in path.parts
    }


class Nothing:
    """Samples nothing and writes nothing."""

    def make(self, unit: dict[str, Any]) -> None:
        pass


def engine(options: argparse.Namespace, figures: dict[str, Any], keep: Callable[[], None]) -> None:
    """Rate over many rows of one try, memory of this process, and the time of a run that finds all done."""
    from p2p.pairs.engine import Counts, Job, run
    from p2p.pairs.select import Filter
    from p2p.pairs.table import read_table
    from p2p.pairs.tries import Settings

    figures["memory_mb"] = []
    with TemporaryDirectory() as scratch:
        from p2p.pairs.store import Store

        out, table = f"{scratch}/set", write_table(Path(scratch, "table.jsonl"), options.rows)
        Store(out).prepare()
        job = Job(out, Settings(), 1, Filter(least={}), Nothing, None, workers=1)
        begun: list[float] = []
        ended = [0.0]

        def watch(counts: Counts, finished: int) -> None:
            if finished:
                if not begun:
                    begun.extend((time.monotonic(), processor()))
                if counts.made % max(1, options.rows // 10) == 0:
                    figures["memory_mb"].append(memory())
                    ended[0] = processor()

        run(job, read_table(str(table)), watch)
        figures["rows_a_second"] = round(options.rows / (time.monotonic() - begun[0]))
        figures["processor_ms_a_row"] = round(1000 * (ended[0] - begun[1]) / options.rows, 3)
        again, used = time.monotonic(), time.process_time()
        counts = run(job, read_table(str(table)))
        figures["resume_seconds"] = round(time.monotonic() - again, 1)
        figures["resume_processor_seconds"] = round(time.process_time() - used, 1)
        assert counts.done_before == options.rows


def processor(without: int = 0) -> float:
    """Seconds of processor time of this process and those below it that live, without the one of that id."""
    import psutil

    here = psutil.Process()
    found = (process for process in (here, *here.children(recursive=True)) if process.pid != without)
    times = [safely(process.cpu_times) for process in found]
    return sum(each.user + each.system for each in times if each)


def memory() -> int:
    """MB that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() // 2**20


def speed(options: argparse.Namespace, figures: dict[str, Any], keep: Callable[[], None]) -> None:
    """One and two workers, each beside a plain loop of the same sampling that runs at the same time, so that
    other programs slow both alike; and workers that sleep for half a second, which shows the engine alone."""
    os.environ.setdefault("RAY_worker_niceness", "0")  # no lower than the loop's
    rounds = figures.setdefault("rounds", [])
    with TemporaryDirectory() as scratch:
        table = write_table(Path(scratch, "table.jsonl"), options.rows)
        while len(rounds) < options.rounds:
            one: dict[str, Any] = {"load": round(os.getloadavg()[0], 1)}
            for workers in (1, 2):
                out = Path(scratch, f"{len(rounds)}-{workers}")
                one[f"workers_{workers}"] = beside_the_loop(out, table, workers)
            rounds.append(one)
            keep()
        for workers in (1, 2, 8):
            name = f"asleep_{workers}"
            if name not in figures:
                some = write_table(Path(scratch, f"{name}.jsonl"), 8 * workers)
                marks = with_workers(asleep_job(Path(scratch, name), workers), some)
                figures[name] = {"pairs_a_minute": round(60 * rate(marks)[0], 1)}
                keep()
    for name in ("workers_1", "workers_2"):
        figures[name] = {
            what: round(statistics.median(one[name][what] for one in rounds), 3) for what in rounds[0][name]
        }


def beside_the_loop(out: Path, table: Path, workers: int) -> dict[str, float]:
    """Pairs a minute of both, processor seconds a pair of both, and the ratios."""
    with plain_loop(out / "loop", table) as (loop_id, end_loop):
        marks = with_workers(demo_job(out / "set", workers), table, loop_id)
        alone = [mark for mark in end_loop() if marks[0][0] <= mark[0] <= marks[-1][0]]
    (ours, used), (loop, loop_used) = rate(marks), rate(alone)
    return {
        "pairs_a_minute": round(60 * ours, 1),
        "loop_pairs_a_minute": round(60 * loop, 1),
        "of_loop": round(ours / loop, 3),
        "processor_s": round(used, 3),
        "loop_processor_s": round(loop_used, 3),
        "processor_of_loop": round(used / loop_used, 3),
    }


Mark = tuple[float, float, int]
"""Time, processor time and pairs until then."""


def rate(marks: list[Mark]) -> tuple[float, float]:
    """Pairs a second from the first mark to the last, and processor seconds a pair."""
    (begun, before, first), (ended, after, last) = marks[0], marks[-1]
    return (last - first) / (ended - begun), (after - before) / (last - first)


def demo_job(out: Path, workers: int, clip: str | None = None, **settings: Any) -> Any:
    from p2p.pairs import samplers
    from p2p.pairs.engine import Job
    from p2p.pairs.scores import Scorer
    from p2p.pairs.select import Filter
    from p2p.pairs.store import Store
    from p2p.pairs.tries import Settings

    Store(str(out)).prepare()
    chosen = Settings(cfg=(4.0, 4.0), steps=20, width=128, height=128, **settings)
    make = partial(samplers.ComfySampler, str(out), samplers.DEMO, 1)
    score = partial(Scorer, str(out), clip)
    return Job(str(out), chosen, 2, Filter(least={}), make, score, workers, order=1)


def asleep_job(out: Path, workers: int) -> Any:
    from p2p.pairs import samplers
    from p2p.pairs.engine import Job
    from p2p.pairs.select import Filter
    from p2p.pairs.store import Store
    from p2p.pairs.tries import Settings

    Store(str(out)).prepare()
    make = partial(samplers.StandIn, str(out), 0.5)
    return Job(str(out), Settings(width=16, height=16), 2, Filter(least={}), make, None, workers, order=1)


@contextmanager
def plain_loop(out: Path, table: Path) -> Iterator[tuple[int, Callable[[], list[Mark]]]]:
    """The same sampling, writing and scoring without an engine, in a process of its own, again and again with
    other seeds. Yields its process id, and a function that ends it and returns its marks."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import itertools, time\n"
        "from dataclasses import replace\nfrom pathlib import Path\n"
        "from pairs import demo_job, load_pack\nload_pack()\n"
        "from p2p.pairs.engine import sample_step, score_step\nfrom p2p.pairs.table import read_table\n"
        "from p2p.pairs.tries import expand\n"
        "job = demo_job(Path(sys.argv[2]), 1)\nsampler, scorer = job.sampler(), job.scorer()\n"
        "rows, made = list(read_table(sys.argv[3])), itertools.count(1)\n"
        "for again in itertools.count():\n"
        "    for row in rows:\n"
        "        row = replace(row, options={'seed': row.options['seed'] + 2 * again})\n"
        "        for unit in expand(row, job.settings, 2):\n"
        "            sample_step(sampler, unit); score_step(scorer, unit)\n"
        "            print(time.monotonic(), time.process_time(), next(made), flush=True)\n"
    )
    command = [sys.executable, "-c", code, str(ROOT / "benchmarks"), str(out), str(table)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    def end() -> list[Mark]:
        process.kill()
        lines = process.communicate()[0].splitlines()
        return [(float(at), float(used), int(count)) for at, used, count in map(str.split, lines)]

    try:
        yield process.pid, end
    finally:
        process.kill()


def with_workers(job: Any, table: Path, without: int = 0) -> list[Mark]:
    """Two marks of a run, where an eighth and seven eighths are done: it has settled, and all still work.

    without: as in `processor`.
    """
    from p2p.pairs.engine import Counts, run
    from p2p.pairs.table import read_table

    marks: list[Mark] = []

    def watch(counts: Counts, finished: int) -> None:
        if finished and counts.made in (counts.to_do // 8, counts.to_do * 7 // 8):
            marks.append((time.monotonic(), processor(without), counts.made))

    run(job, read_table(str(table)), watch)
    return marks


def acceptance(options: argparse.Namespace, figures: dict[str, Any], keep: Callable[[], None]) -> None:
    """Shares of rows with a kept pair and of tries that pass, by number of tries; the bundled model."""
    from p2p.pairs.engine import run
    from p2p.pairs.scores import DEMO
    from p2p.pairs.select import BUNDLED, Filter
    from p2p.pairs.store import Store
    from p2p.pairs.table import read_table

    with TemporaryDirectory() as scratch:
        table = write_table(Path(scratch, "table.jsonl"), options.rows)
        out = Path(scratch, "set")
        job = replace(demo_job(out, os.cpu_count() or 1, DEMO, cross_end=(0.2, 0.9)), tries=options.tries)
        run(job, read_table(str(table)))
        rows = list(Store(str(out)).rows())
    chosen = Filter(least=BUNDLED)
    passed = [[not chosen.reasons(values) for values in row["tries"]] for row in rows]
    counts = [n for n in (1, 2, 4, 8, 16, 32) if n <= options.tries]
    figures["tries_that_pass"] = round(sum(map(sum, passed)) / sum(map(len, passed)), 3)
    figures["rows_with_a_pair"] = {
        n: round(sum(any(row[:n]) for row in passed) / len(rows), 3) for n in counts
    }


def cost(options: argparse.Namespace, figures: dict[str, Any], keep: Callable[[], None]) -> None:
    """GPU hours of a set with SD1.5 at 512 px, on paper.

    A try is two images, each of two halves of guidance in each step, decoded and seen by CLIP ViT-L/14.
    """
    figures["tflop"] = tflop = operations()
    for name, (steps, per_pair) in {"published": (100, 25), "usual": (50, 2)}.items():
        one = 2 * (2 * steps * tflop["unet"] + tflop["vae"] + tflop["clip"])
        hours = options.pairs * per_pair * one / (options.peak * options.utilization) / 3600
        figures[name] = {
            "tries_per_kept_pair": per_pair,
            "tflop_a_try": round(one, 1),
            "tries_a_second": round(options.peak * options.utilization / one, 2),
            "gpu_hours": round(hours),
            "hours_on_32": round(hours / 32, 1),
        }


def operations() -> dict[str, float]:
    """10^12 operations of a forward of SD1.5's U-Net, its VAE's decoder, and the image tower of ViT-L/14."""
    import comfy.supported_models
    import torch
    from comfy.ldm.models.autoencoder import AutoencoderKL
    from models import COMMON, SD15
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import CLIPVisionConfig, CLIPVisionModel

    with torch.device("meta"):
        config = comfy.supported_models.SD15({**COMMON, **SD15})
        config.set_inference_dtype(torch.float32, None)
        unet = config.get_model({}, "", device=torch.device("meta")).diffusion_model.to("meta")
        layout: dict[str, Any] = {"double_z": True, "z_channels": 4, "in_channels": 3, "out_ch": 3, "ch": 128}
        layout |= {"ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "resolution": 256}
        vae = AutoencoderKL(ddconfig={**layout, "dropout": 0.0}, embed_dim=4)
        width: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
        clip = CLIPVisionModel(CLIPVisionConfig(**width, num_attention_heads=16, patch_size=14))
        latent, tokens = torch.empty(1, 4, 64, 64), torch.empty(1, 77, 768)
        calls: dict[str, Callable[[], Any]] = {
            "unet": lambda: unet(latent, torch.empty(1), tokens),
            "vae": lambda: vae.decode(latent),
            "clip": lambda: clip(torch.empty(1, 3, 224, 224)),
        }
        found = {}
        for name, call in calls.items():
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                call()
            found[name] = round(counter.get_total_flops() / 1e12, 3)
    return found


VICTIMS = ("driver", "worker", "node", "disk")


def kills(options: argparse.Namespace, figures: dict[str, Any], keep: Callable[[], None]) -> None:
    """Rounds of a run in which something dies at a random moment, and a run that nobody disturbs.

    driver: SIGKILL to the command. worker: to one of the processes that Ray started for it. node: a cluster
    of three nodes loses one. disk: the folder has room for a part of the set. Raises AssertionError if a set
    is not, byte for byte, the one of a run that was never disturbed.
    """
    if not figures:
        figures |= {"rounds": 0, "went_on_by_themselves": 0, "struck": dict.fromkeys(VICTIMS, 0)}
    with TemporaryDirectory() as scratch:
        table = write_table(Path(scratch, "table.jsonl"), options.rows, unreadable=options.rows // 2)
        whole = Path(scratch, "whole")
        ended(command(table, whole))
        expected = digests(whole)
        figures["files"] = len(expected)
        for number in range(figures["rounds"], options.rounds):
            r = random.Random(f"{options.seed} {number}")
            out = Path(scratch, str(number))
            victim = options.victim or VICTIMS[number % len(VICTIMS)]
            with disk(out, small=victim == "disk") as grow:
                struck, code = disturbed(table, out, victim, r)
                there = len(list(out.rglob("*_1.png")))
                grow()
                ended(command(table, out))
                found = digests(out)
            names = {name for name in {*found, *expected} if found.get(name) != expected.get(name)}
            assert not names, f"round {number}, {victim}: {len(names)} files differ: {sorted(names)[:5]}"
            figures["rounds"] += 1
            figures["struck"][victim] += struck
            figures["went_on_by_themselves"] += struck and code == 0
            keep()
            print(f"round {number}: {victim}, {there} targets there then, all as undisturbed", flush=True)


def command(table: Path, out: Path, *more: str) -> list[str]:
    size = ["--width", "32", "--height", "32", "--tries", "3", "--keep", "2", "--workers", "2"]
    return [*MAKE, str(table), "--out", str(out), "--stand-in", "0.05", *size, *more]


def ended(run: list[str]) -> int:
    """Run to the end; its code."""
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.returncode


def disturbed(table: Path, out: Path, victim: str, r: random.Random) -> tuple[bool, int]:
    """A run that is struck at a random moment after sampling began: whether it was, and the run's code."""
    if victim == "node":
        with nodes() as (address, lose):
            return struck_in(command(table, out, "--address", address), out, r, lambda _: lose())
    if victim == "disk":
        done = subprocess.run(command(table, out), capture_output=True, text=True)
        assert done.returncode == 1 and "No space left" in done.stderr.splitlines()[-1], done.stderr
        return True, 1
    return struck_in(command(table, out), out, r, partial(kill, victim, r))


def struck_in(
    run: list[str], out: Path, r: random.Random, strike: Callable[[subprocess.Popen], bool]
) -> tuple[bool, int]:
    process = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(out.rglob("*_1.png")):
        time.sleep(0.1)
    time.sleep(r.uniform(0, 4))
    struck = process.poll() is None and strike(process)
    return struck, process.wait(timeout=1800)


def kill(victim: str, r: random.Random, process: subprocess.Popen) -> bool:
    import psutil

    if victim == "driver":
        process.kill()
        return True
    children = psutil.Process(process.pid).children(recursive=True)
    found = [child for child in children if "ray::MapWorker" in " ".join(safely(child.cmdline)[:1])]
    if found:
        r.choice(found).kill()
    return bool(found)


@contextmanager
def disk(folder: Path, small: bool) -> Iterator[Callable[[], object]]:
    """If small, a file system of 300 kB as the folder, for root on Linux; a function that makes it larger."""
    if not small:
        yield lambda: None
        return
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)], check=True)
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def safely(read: Callable[[], Any]) -> Any:
    import psutil

    try:
        return read()
    except psutil.Error:
        return ""


@contextmanager
def nodes() -> Iterator[tuple[str, Callable[[], bool]]]:
    """A Ray cluster of three nodes on this machine: its address, and a function that ends one of them."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    others = [cluster.add_node(num_cpus=2) for _ in range(2)]

    def lose() -> bool:
        cluster.remove_node(others.pop(), allow_graceful=False)
        return True

    try:
        yield cluster.address, lose
    finally:
        cluster.shutdown()


PARTS = {"speed": speed, "engine": engine, "acceptance": acceptance, "kills": kills, "cost": cost}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    for name, rows in (("speed", 40), ("engine", 100_000), ("acceptance", 24), ("kills", 40), ("cost", 0)):
        part = parts.add_parser(name)
        if name == "cost":
            part.add_argument("--pairs", type=int, default=300_000)
            part.add_argument("--peak", type=float, default=989.0, help="TFLOP/s; H100 SXM, bfloat16, dense")
            part.add_argument("--utilization", type=float, default=0.3, help="of the peak")
            continue
        part.add_argument("--rows", type=int, default=rows)
        if name == "speed":
            part.add_argument("--rounds", type=int, default=3)
        if name == "acceptance":
            part.add_argument("--tries", type=int, default=16)
        if name == "kills":
            part.add_argument("--rounds", type=int, default=20)
            part.add_argument("--seed", type=int, default=0)
            part.add_argument("--victim", choices=VICTIMS)
    options = parser.parse_args()
    load_pack()
    kept = OUT / f"{options.part}.json"
    given = {name: value for name, value in vars(options).items() if name not in ("part", "rounds")}
    figures: dict[str, Any] = {}
    if kept.exists() and (before := json.loads(kept.read_text()))["options"] == given:
        figures |= before["figures"]

    def keep() -> None:
        OUT.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({"options": given, "figures": figures}, indent=1) + "\n")

    if not figures or "rounds" in options:
        PARTS[options.part](options, figures, keep)
        keep()
    print(kept.read_text(), end="")


if __name__ == "__main__":
    main()
