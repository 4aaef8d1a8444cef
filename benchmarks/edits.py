"""Every kind of edit of a model, ready for the host's sampler, and how runs of them are compared.

The variants of a table alternate in one process; ratios are taken within a round. Time is per sampling step
with guidance: of the process itself on a CPU, so that other programs count for little, between two of its own
events on a GPU. Memory is the largest sum of tensors that live during a step, the model's weights included.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from models import Model
from waits import Reads, waits

SOURCE, SWAP = "a cat riding a bicycle", "a cat riding a car"
REFINED = "a watercolor of a cat riding a red bicycle"
PLAIN, MATERIALISED = "plain batch", "materialised swap"


@dataclass(frozen=True)
class Variant:
    """model and positive: what the host's sampler is given. rows: of the latent, for each item.

    maps: where its runs leave their maps, while this exists.
    """

    model: Any
    positive: list
    rows: int
    maps: Any = None


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
        self,
        edit: Any,
        tau: Any,
        blend: Any = None,
        maps: bool = False,
        reuse: float = 0.0,
        trajectory: Any = None,
    ) -> Variant:
        """The edit by this pack. reuse: GB that it may keep of its source."""
        from p2p.sampling.controller import control
        from p2p.sampling.maps import MapsHandle
        from p2p.sampling.reuse import Keep

        handle = MapsHandle(wanted=maps)
        parts: dict[str, Any] = {"blend": blend, "trajectory": trajectory, "keep": Keep(reuse)}
        model, positive = control(self.model.patcher, edit, tau, maps=handle, **parts)
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
        mutual = replace(both, self_mode="mutual")
        per_word = replace(cross, words=parse_word_windows("bicycle: 0"))
        return {
            PLAIN: self.plain(swap),
            "swap": self.ours(swap, cross),
            "swap, self-attention": self.ours(swap, both),
            "refine": self.ours(refine, cross),
            "refine, tau per word": self.ours(refine, per_word),
            "re-weight": self.ours(swap.reweighted("cat", 2.0), cross),
            "swap, mutual": self.ours(swap, mutual),
            "swap, local blend": self.ours(swap, cross, LocalBlend(words=("car",), start=0.0)),
            "swap, maps": self.ours(swap, cross, maps=True),
            MATERIALISED: self.built(swap, cross),
        }

    def run(
        self,
        variant: Variant,
        size: int,
        steps: int,
        finished: Callable[[], None] = lambda: None,
        items: Sequence[int] = (0,),
    ) -> Any:
        """Sample at `size` px: the latents. `finished` is called after each step.

        items: places in the seed's noise, one for each of the batch; the rows of an item share it.
        """
        import comfy.sample

        places = [item for item in items for _ in range(variant.rows)]
        latent = self.latent(len(places), size)
        return comfy.sample.sample(
            variant.model,
            comfy.sample.prepare_noise(latent, 0, places),
            steps,
            self.cfg,
            "euler",
            "normal",
            variant.positive,
            self.negative,
            latent,
            callback=lambda *_: finished(),
            disable_pbar=True,
        )

    cfg = 7.0

    def latent(self, rows: int, size: int) -> Any:
        import torch

        return torch.zeros(rows, 4, size // 8, size // 8)

    @property
    def negative(self) -> list:
        """A CONDITIONING of zeros."""
        import torch

        pooled = torch.zeros(1, self.model.pooled) if self.model.pooled else None
        return [[torch.zeros(1, 77, self.model.width), {"pooled_output": pooled}]]

    def seconds(self, variant: Variant, size: int, steps: int) -> float:
        """Of a step, the mean of a run's steps but the first, which makes what a run needs."""
        marks: list[Any] = []
        self.run(variant, size, steps + 1, lambda: marks.append(mark()))
        return between(marks[0], marks[-1]) / (len(marks) - 1)

    def memory(self, variant: Variant, size: int) -> float:
        """Bytes of tensors at the peak of a run, the model's weights included."""
        import torch

        if on_gpu():
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

    def reads(self, variant: Variant, size: int, steps: int = 4) -> list[int]:
        """How often each step of a run but the first, which makes what a run needs, reads from the device."""
        with Reads(device()) as reads:
            counts: list[int] = []
            self.run(variant, size, steps, lambda: counts.append(len(reads.found)))
        return [after - before for before, after in zip(counts, counts[1:], strict=False)]

    def waits(self, variant: Variant, size: int, steps: int = 4) -> list[str]:
        """The places in the code at which the steps of a run but the first wait for the device."""
        begun: list[int] = []
        with waits(device()) as places:
            self.run(variant, size, steps, lambda: begun.append(len(places)))
        return places[begun[0] : begun[-1]]

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


def device() -> Any:
    """Where the host computes."""
    import comfy.model_management

    return comfy.model_management.get_torch_device()


def on_gpu() -> bool:
    return device().type == "cuda"


def now() -> float:
    """Seconds, when all that was begun has ended."""
    import torch

    if not on_gpu():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def mark() -> Any:
    """This moment: of the GPU, which has reached it when this returns, or of the process."""
    import torch

    if not on_gpu():
        return time.process_time()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    event.synchronize()
    return event


def between(first: Any, last: Any) -> float:
    """Seconds from one mark to another."""
    return last - first if isinstance(first, float) else first.elapsed_time(last) / 1000


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
