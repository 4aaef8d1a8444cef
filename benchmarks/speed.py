"""What does an edit cost?  Ratios of time and memory to the host sampling the same rows as one plain batch.

python benchmarks/speed.py                        the bundled model, a minute: a table, no page
python benchmarks/speed.py --page [--only NAME]   real widths, random weights: docs/benchmarks.md

A table has the median and range of the ratios, of steps in which everything is injected. edits.py says how
time and memory are measured, gpu.py does it on a GPU.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from edits import MATERIALISED, PLAIN, REFINED, SOURCE, SWAP, Bench, Plan, Result, compare, now, schedule
from inside import paths_table, work_table
from joint import LAYOUTS, JointBench
from measure import machine, write_section
from models import bundled_model, random_model
from pack import ROOT, load_pack

PAGE = ROOT / "docs" / "benchmarks.md"
INJECTED = ("swap", "swap, self-attention", "refine", "refine, tau per word", "re-weight")


def table(results: dict[str, Result]) -> list[str]:
    lines = [
        "| | s per step | time | range | memory | attention calls per step | rows in them |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in results.items():
        memory = "" if one.memory is None else f"{one.memory:.3f}"
        calls, rows = ("" if number is None else str(number) for number in (one.calls, one.rows))
        lines.append(
            f"| {name} | {one.seconds:.3f} | {one.ratio:.3f} | {one.spread} | {memory} | {calls} | {rows} |"
        )
    return lines


U_NET_GOALS = [("swap", "time", 1.03), ("swap", "memory", 1.02), ("refine", "time", 1.06)]
JOINT_GOALS = [
    ("image", "time", 1.03),
    ("image", "memory", 1.02),
    ("words, swap", "time", 1.10),
    ("words, swap", "memory", 1.02),
]


def goals(results: dict[str, Result], asked: Sequence[tuple[str, str, float]]) -> list[str]:
    """The goals, with what was measured."""
    lines = ["", "Goals:", ""]
    for name, what, limit in asked:
        found = results[name].ratio if what == "time" else results[name].memory
        assert found is not None
        lines.append(
            f"- {name}, {what}: {found:.3f} of the plain batch (goal: {limit} or less, "
            f"{'met' if found <= limit else 'not met'})."
        )
    return lines


def edits_table(bench: Bench, title: str, size: int, plan: Plan, names: Sequence[str] = ()) -> str:
    """Every kind of edit, or some, with memory and calls."""
    variants, asked = bench.variants(), JOINT_GOALS if isinstance(bench, JointBench) else U_NET_GOALS
    results = compare(bench, {name: variants[name] for name in names or variants}, size, plan, details=True)
    heading = f"**{title}, {size} px, one target, {plan.rounds} rounds of {plan.steps} timed steps**"
    return "\n".join([heading, "", *table(results), *goals(results, asked)])


def reuse_table(bench: Bench, title: str, size: int, plan: Plan) -> str:
    """A further edit of a source whose run was kept, against the same edit as a fresh pair; whole runs."""
    from p2p.sampling.reuse import CACHE, GIGABYTE

    both = bench.edit(SOURCE, SWAP, "a dog riding a bicycle")
    first, further = (replace(both, targets=(target,)) for target in both.targets)
    tau, room = schedule(0.8, 0.4), 64.0
    steps = max(plan.steps, 5)  # of which tau injects 4 and 2
    bench.run(bench.ours(first, tau), size, 1)  # warms up

    def seconds(edit: Any, reuse: float) -> float:
        variant, start = bench.ours(edit, tau, reuse=reuse), now()
        bench.run(variant, size, steps)
        return now() - start

    kept = 0
    ratios: dict[str, list[float]] = {"first run, keeping its source": [], "further edit": []}
    for turn in range(plan.rounds):
        CACHE.clear()
        fresh, times = seconds(further, 0.0), (seconds(first, room), seconds(further, room))
        kept = CACHE.nbytes
        for found, one in zip(ratios.values(), times, strict=True):
            found.append(one / fresh)
        print(f"  round {turn + 1}: {fresh:.2f} s, {times[0]:.2f} s, {times[1]:.2f} s", flush=True)
    limits = {"first run, keeping its source": 1.02, "further edit": 0.55}
    lines = [
        f"**{title}, {size} px, runs of {steps} steps at the default tau, {plan.rounds} rounds**",
        "",
        "| | time, the same edit as a fresh pair = 1 | range | goal |",
        "|---|---|---|---|",
    ]
    for name, found in ratios.items():
        spread = f"{min(found):.2f} to {max(found):.2f}"
        lines.append(f"| {name} | {statistics.median(found):.3f} | {spread} | {limits[name]} or less |")
    return "\n".join([*lines, "", f"Kept in host memory: {kept / GIGABYTE:.2f} GB."])


def curves(bench: Bench, title: str, plan: Plan, path: Path) -> str:
    """Cost against pixels, tokens and targets, of swap, refine and the materialised swap."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    def at(size: int = 128, words: int = 0, targets: int = 1) -> dict[str, Result]:
        more, tau = " and a tree" * words, schedule(1.0, 0.0)
        swap, refine = (bench.edit(SOURCE + more, *[text + more] * targets) for text in (SWAP, REFINED))
        variants = {
            PLAIN: bench.plain(swap),
            "swap": bench.ours(swap, tau),
            "refine": bench.ours(refine, tau),
            MATERIALISED: bench.built(swap, tau),
        }
        return compare(bench, variants, size, plan)

    first = at()
    panels = {
        "picture's side, px (77 tokens, 1 target)": {128: first, 256: at(256), 384: at(384)},
        "tokens (128 px, 1 target)": {77: first, 154: at(words=30), 231: at(words=55)},
        "targets (128 px, 77 tokens)": {1: first, **{count: at(targets=count) for count in (2, 4, 8)}},
    }
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.4), layout="constrained", sharey=True)
    lines = [f"**{title}, {plan.rounds} rounds of {plan.steps} timed steps**", ""]
    lines += [f"![Cost against pixels, tokens and targets](benchmarks/{path.name})"]
    for axis, (label, found) in zip(axes, panels.items(), strict=True):
        lines += ["", f"| {label} | plain batch, s | swap | refine | {MATERIALISED} |"]
        lines += ["|---|---|---|---|---|"]
        for x, results in found.items():
            cells = [f"{one.ratio:.3f} ({one.spread})" for name, one in results.items() if name != PLAIN]
            lines.append(f"| {x} | {results[PLAIN].seconds:.2f} | {' | '.join(cells)} |")
        for name in ("swap", "refine", MATERIALISED):
            ratios = [results[name].ratio for results in found.values()]
            axis.plot(list(found), ratios, marker="o", ms=4, label=name)
        axis.axhline(1.0, color="gray", lw=0.8)
        axis.set(xlabel=label, xticks=list(found))
    axes[0].set_ylabel("time, plain batch = 1")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=80)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--page", action="store_true", help="write docs/benchmarks.md")
    names = ["edits", "paths", "work", "curves", "sdxl", "reuse", *LAYOUTS]
    parser.add_argument("--only", choices=names, help="one part of the page")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="timed at a time (1, of the bundled model 10)")
    parser.add_argument("--size", type=int, help="px, of the table of edits")
    options = parser.parse_args()
    load_pack()
    import torch

    torch.set_grad_enabled(False)
    demo, clip = bundled_model()
    plan = Plan(options.rounds, options.steps or (1 if options.page else 10))
    if not options.page:
        bundled = Bench(demo, clip)
        print(machine())
        print(edits_table(bundled, "the bundled model", options.size or 128, plan))
        return
    folder = PAGE.parent / "benchmarks"
    folder.mkdir(exist_ok=True)

    def joint_table(name: str) -> str:
        return edits_table(bench(name), f"Blocks of {name}", options.size or 512, plan)

    parts: dict[str, Callable[[], str]] = {
        "edits": lambda: edits_table(bench("SD1.5"), "SD1.5's U-Net", options.size or 512, plan),
        "paths": lambda: paths_table(bench("SD1.5"), bench("SD1.5").by_default(), "SD1.5's U-Net"),
        "work": lambda: work_table(
            bench("SD1.5"),
            {name: bench("SD1.5").variants()[name] for name in INJECTED},
            "SD1.5's U-Net",
            options.size or 512,
            plan.steps,
            now,
        ),
        "reuse": lambda: reuse_table(bench("SD1.5"), "SD1.5's U-Net", options.size or 512, plan),
        "curves": lambda: curves(bench("SD1.5"), "SD1.5's U-Net", plan, folder / "speed.png"),
        "sdxl": lambda: edits_table(
            bench("SDXL"), "SDXL's U-Net", options.size or 1024, plan, [PLAIN, "swap", "refine", MATERIALISED]
        ),
    }
    parts |= {name: partial(joint_table, name) for name in LAYOUTS}
    models: dict[str, Bench] = {}

    def bench(name: str) -> Bench:
        if name not in models:
            models.clear()
            kind = JointBench(name, clip) if name in LAYOUTS else Bench(random_model(name), clip)
            models[name] = kind
        return models[name]

    for name, part in parts.items():
        if options.only in (None, name):
            dtype = "float16" if torch.cuda.is_available() else "bfloat16 where the processor has it"
            text = f"{machine()}, {dtype}.\n\n{part()}"
            write_section(PAGE, f"speed {name}", text)
            print(text)


if __name__ == "__main__":
    main()
