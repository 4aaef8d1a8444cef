"""What does an edit cost?  Ratios of time and memory to the host sampling the same rows as one plain batch.

python benchmarks/speed.py                        the bundled model, a minute: a table, no page
python benchmarks/speed.py --page [--only NAME]   real widths, random weights: docs/benchmarks.md

The variants of a table alternate in one process; ratios are taken within a round and the table has their
median and range. Time is per sampling step with guidance, of a step in which everything is injected: of the
process itself on a CPU, so that other programs count for little, of the clock on a GPU. Memory is the largest
sum of tensors that live during a step, the model's weights included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from inside import paths_table, work_table
from measure import machine, write_section
from models import Model, random_model
from pack import ROOT, load_pack

PAGE = ROOT / "docs" / "benchmarks.md"
SOURCE, SWAP = "a cat riding a bicycle", "a cat riding a car"
REFINED = "a watercolor of a cat riding a red bicycle"
PLAIN, MATERIALISED = "plain batch", "materialised swap"
INJECTED = ("swap", "swap, self-attention", "refine", "refine, tau per word", "re-weight")


@dataclass(frozen=True)
class Variant:
    """model and positive: what the host's sampler is given. rows: of the latent."""

    model: Any
    positive: list
    rows: int
    maps: Any = None  # whoever reads maps keeps the handle


class Bench:
    """A model, and the prompts' edits for it."""

    def __init__(self, model: Model, clip: Any):
        self.model, self.clip = model, clip

    def edit(self, source: str, *targets: str) -> Any:
        from p2p.sampling.encode import add_target, start_edit

        first, *others = targets
        edit = start_edit(self.clip, source, first, "auto")
        for target in others:
            edit = add_target(self.clip, edit, target, "auto")
        return self.model.edit(edit)

    def plain(self, edit: Any) -> Variant:
        """The host alone, with one prompt for each row."""
        from p2p.sampling.conditioning import paired_conditioning

        return Variant(self.model.patcher, paired_conditioning(edit, "plain"), edit.branches)

    def ours(
        self, edit: Any, tau: Any, blend: Any = None, maps: bool = False, reuse: float = 0.0
    ) -> Variant:
        from p2p.sampling.controller import control
        from p2p.sampling.maps import MapsHandle
        from p2p.sampling.reuse import Keep

        handle = MapsHandle(wanted=maps)
        model, positive = control(
            self.model.patcher, edit, tau, blend=blend, maps=handle, keep=Keep(reuse)
        )
        return Variant(model, positive, edit.branches, handle)

    def built(self, edit: Any, tau: Any) -> Variant:
        """The edit with materialised maps."""
        from materialised import materialised

        model, positive = materialised(self.model.patcher, edit, tau)
        return Variant(model, positive, edit.branches)

    def by_default(self) -> dict[str, Variant]:
        """Edits at the default tau."""
        from p2p.attention.schedule import TauSchedule, parse_word_windows

        swap, refine, tau = self.edit(SOURCE, SWAP), self.edit(SOURCE, REFINED), TauSchedule()
        return {
            PLAIN: self.plain(swap),
            "swap": self.ours(swap, tau),
            "refine": self.ours(refine, tau),
            "refine, tau per word": self.ours(refine, replace(tau, words=parse_word_windows("bicycle: 0.4"))),
            "re-weight": self.ours(swap.reweighted("cat", 2.0), tau),
        }

    def variants(self) -> dict[str, Variant]:
        """Every kind of edit with one target, injected in all steps."""
        from p2p.attention.blend import LocalBlend
        from p2p.attention.schedule import parse_word_windows

        swap, refine = self.edit(SOURCE, SWAP), self.edit(SOURCE, REFINED)
        cross, both = schedule(1.0, 0.0), schedule(1.0, 1.0)
        per_word = replace(cross, words=parse_word_windows("bicycle: 0"))
        return {
            PLAIN: self.plain(swap),
            "swap": self.ours(swap, cross),
            "swap, self-attention": self.ours(swap, both),
            "refine": self.ours(refine, cross),
            "refine, tau per word": self.ours(refine, per_word),
            "re-weight": self.ours(swap.reweighted("cat", 2.0), cross),
            "swap, local blend": self.ours(swap, cross, LocalBlend(words=("car",), start=0.0)),
            "swap, maps": self.ours(swap, cross, maps=True),
            MATERIALISED: self.built(swap, cross),
        }

    def run(
        self, variant: Variant, size: int, steps: int, finished: Callable[[], None] = lambda: None
    ) -> None:
        """Sample at `size` px; `finished` is called after each step."""
        import comfy.sample
        import torch

        latent = torch.zeros(variant.rows, 4, size // 8, size // 8)
        pooled = torch.zeros(1, self.model.pooled) if self.model.pooled else None
        negative = [[torch.zeros(1, 77, self.model.width), {"pooled_output": pooled}]]
        comfy.sample.sample(
            variant.model,
            comfy.sample.prepare_noise(latent, 0, [0] * variant.rows),
            steps,
            7.0,
            "euler",
            "normal",
            variant.positive,
            negative,
            latent,
            callback=lambda *_: finished(),
            disable_pbar=True,
        )

    def seconds(self, variant: Variant, size: int, steps: int) -> float:
        """Of a step, the mean of a run's steps but the first, which makes what a run needs."""
        times: list[float] = []
        self.run(variant, size, steps + 1, lambda: times.append(now()))
        return (times[-1] - times[0]) / (len(times) - 1)

    def memory(self, variant: Variant, size: int) -> float:
        """Bytes of tensors at the peak of a run, the model's weights included."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.run(variant, size, 2)
            return torch.cuda.max_memory_allocated()
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            self.run(variant, size, 2)
        with tempfile.TemporaryDirectory() as folder:
            profile.export_chrome_trace(str(trace := Path(folder) / "trace.json"))
            events = json.loads(trace.read_text())["traceEvents"]
        totals = [e["args"]["Total Allocated"] for e in events if e.get("name") == "[memory]"]
        weights = sum(p.nbytes for p in self.model.patcher.model.diffusion_model.parameters())
        return weights + max(totals) - min(totals[0], 0)

    def calls(self, variant: Variant, size: int, steps: int = 1) -> dict[str, int]:
        """Attention calls of a run, and rows in them, by the host's own hook around attention."""
        counted = {"calls": 0, "rows": 0}

        def count(attention: Callable, q: Any, *args: Any, **kwargs: Any) -> Any:
            counted["calls"] += 1
            counted["rows"] += q.shape[0]
            return attention(q, *args, **kwargs)

        model = variant.model.clone()
        options = model.model_options.setdefault("transformer_options", {})
        options["optimized_attention_override"] = count
        self.run(replace(variant, model=model), size, steps)
        return counted


def schedule(cross: float, self_: float) -> Any:
    from p2p.attention.schedule import TauSchedule, Window

    return TauSchedule(Window(0.0, cross), Window(0.0, self_))


def now() -> float:
    import torch

    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


@dataclass(frozen=True)
class Plan:
    """How much is timed: every variant in each of `rounds`, `steps` steps at a time."""

    rounds: int
    steps: int


@dataclass(frozen=True)
class Result:
    """seconds: of a plain step. ratios: of each round to the plain batch. memory: ratio, or None."""

    seconds: float
    ratios: list[float]
    memory: float | None = None
    calls: int | None = None
    rows: int | None = None

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def spread(self) -> str:
        return f"{min(self.ratios):.2f} to {max(self.ratios):.2f}"


def compare(
    bench: Bench, variants: dict[str, Variant], size: int, plan: Plan, details: bool = False
) -> dict[str, Result]:
    """Alternating runs of all variants; the first of them is what the others are divided by."""
    base = next(iter(variants))
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    bench.run(variants[base], size, 1)  # warms up
    for turn in range(plan.rounds):
        order = list(variants) if turn % 2 == 0 else list(reversed(variants))
        for name in order:
            seconds[name].append(bench.seconds(variants[name], size, plan.steps))
            print(f"  {size} px, round {turn + 1}, {name}: {seconds[name][-1]:.3f} s", flush=True)
    memory = {name: bench.memory(variants[name], size) for name in variants} if details else {}
    calls = {name: bench.calls(variants[name], size) for name in variants} if details else {}
    return {
        name: Result(
            statistics.median(seconds[name]),
            [a / b for a, b in zip(seconds[name], seconds[base], strict=True)],
            memory[name] / memory[base] if memory else None,
            **calls.get(name, {}),
        )
        for name in variants
    }


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


def goals(results: dict[str, Result]) -> list[str]:
    """The goals, with what was measured."""
    asked = [("swap", "time", 1.03), ("swap", "memory", 1.02), ("refine", "time", 1.06)]
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
    variants = bench.variants()
    results = compare(bench, {name: variants[name] for name in names or variants}, size, plan, details=True)
    heading = f"**{title}, {size} px, one target, {plan.rounds} rounds of {plan.steps} timed steps**"
    return "\n".join([heading, "", *table(results), *goals(results)])


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
    names = ["edits", "paths", "work", "curves", "sdxl", "reuse"]
    parser.add_argument("--only", choices=names, help="one part of the page")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="timed at a time (1, of the bundled model 10)")
    parser.add_argument("--size", type=int, help="px, of the table of edits")
    options = parser.parse_args()
    load_pack()
    import torch
    from p2p.demo.loader import load_demo_model

    torch.set_grad_enabled(False)
    demo, clip, _ = load_demo_model()
    plan = Plan(options.rounds, options.steps or (1 if options.page else 10))
    if not options.page:
        bundled = Bench(Model(demo, 128, 0), clip)
        print(machine())
        print(edits_table(bundled, "the bundled model", options.size or 128, plan))
        return
    folder = PAGE.parent / "benchmarks"
    folder.mkdir(exist_ok=True)
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
    models: dict[str, Bench] = {}

    def bench(name: str) -> Bench:
        if name not in models:
            models.clear()
            models[name] = Bench(random_model(name), clip)
        return models[name]

    for name, part in parts.items():
        if options.only in (None, name):
            dtype = "float16" if torch.cuda.is_available() else "bfloat16 where the processor has it"
            text = f"{machine()}, {dtype}.\n\n{part()}"
            write_section(PAGE, f"speed {name}", text)
            print(text)


if __name__ == "__main__":
    main()
