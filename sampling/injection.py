"""What a forward of the model takes from the source: attention's slots are filled for this one call."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import comfy.ldm.modules.attention as host_attention
from torch import Tensor

from ..attention.edit import Edit
from ..attention.features import mutual_self_attention
from ..attention.inject import Rows, SelfStep, cross_attention, self_attention, self_step
from ..attention.plan import CrossStep, Plan, make_plan
from ..attention.schedule import TauSchedule
from .run import BlockKey, Call

Replacement = Callable[[Tensor, Tensor, Tensor, dict], Tensor]
"""In the host's form: q, k, v, extra_options -> attention's output."""
Slot = tuple[str, BlockKey]
"""("attn1" or "attn2", block)"""
Inject = Callable[[Callable, Callable, Tensor, Tensor, Tensor, dict], Tensor]
"""attend (what was in the slot before), attend_own (the host's attention), q, k, v, extra_options."""


class Injection(Protocol):
    """A method of editing: what the targets' rows of a forward take from their source's."""

    def injected(self, call: Call) -> AbstractContextManager[dict]:
        """For the time of one forward: the transformer_options that it is to run with."""
        ...

    def cross_step(self, call: Call) -> CrossStep | None:
        """How the call's cross-attention maps are edited, re-weighting left out; None where they are not."""
        ...

    def reads(self, call: Call, grids: dict[BlockKey, float]) -> set[Slot] | None:
        """The layers whose queries and keys of the sources the call takes; None where it takes more of them.

        grids: sides of the layers' grids as a fraction of the latent's, as far as they are known.
        """
        ...


@dataclass(frozen=True, eq=False)
class PromptToPrompt:
    """Hertz et al. 2023: the source's cross- and self-attention maps, on a schedule."""

    edit: Edit
    tau: TauSchedule
    blocks: tuple[BlockKey, ...]

    @contextmanager
    def injected(self, call: Call) -> Iterator[dict]:
        slots = Slots(call.options, self.blocks)
        if call.own:
            self._inject_maps(call, slots)
        self._inject_mutual(call, slots)
        yield slots.options

    def _inject_maps(self, call: Call, slots: Slots) -> None:
        """The source's maps, in the pair's own conditioning."""
        plan = self._plan(call)
        cross = plan.cross[call.step]
        if cross is not None:
            rows, copies = call.rows(call.own), call.copies
            step = _cross_step(call, rows, cross)
            slots.fill(
                "attn2",
                lambda attend, attend_own, q, k, v, extra: cross_attention(
                    attend, attend_own, q, k, v, rows, step, copies, call.sources("attn2", q, k, extra)
                ),
            )
        weights = plan.self_[call.step]
        if any(weights):
            caps = self._caps()

            def inject(
                attend: Callable, attend_own: Callable, q: Tensor, k: Tensor, v: Tensor, extra_options: dict
            ) -> Tensor:
                grid = grid_fraction(extra_options["activations_shape"][-2:], call.x.shape[-2:])
                call.keep_grid(extra_options, grid)
                here = tuple(w if grid <= cap else 0.0 for w, cap in zip(weights, caps, strict=True))
                if not any(here):
                    return attend(q, k, v)
                check_pixels(q, k, "Set self_resolution of the tau Scheduler to 0.5 or less")
                step = _self_step(call, call.own, here, v)
                sources = call.sources("attn1", q, k, extra_options)
                return self_attention(attend, attend_own, q, k, v, step, sources)

            slots.fill("attn1", inject)

    def _inject_mutual(self, call: Call, slots: Slots) -> None:
        """The source's keys and values of self-attention, in every conditioning."""
        schedules = [target.tau or self.tau for target in self.edit.targets]
        weights = self._mutual_weights(call)
        first = [round(schedule.mutual_layer * len(self.blocks)) for schedule in schedules]
        for layer, block in enumerate(self.blocks):
            here = tuple(w if layer >= start else 0.0 for w, start in zip(weights, first, strict=True))
            if any(here):
                slots.fill("attn1", _mutual(call, here), (block,))

    def _mutual_weights(self, call: Call) -> list[float]:
        progress = call.step / call.run.steps
        return [(target.tau or self.tau).self_weight(progress, "mutual") for target in self.edit.targets]

    def _caps(self) -> list[float]:
        return [(target.tau or self.tau).self_resolution for target in self.edit.targets]

    def cross_step(self, call: Call) -> CrossStep | None:
        return self._plan(call, gain=False).cross[call.step]

    def reads(self, call: Call, grids: dict[BlockKey, float]) -> set[Slot] | None:
        if any(self._mutual_weights(call)):
            return None
        read: set[Slot] = set()
        if call.own:
            plan = self._plan(call)
            cross, weights = plan.cross[call.step], plan.self_[call.step]
            if cross is not None and cross.moved is not None:
                read |= {("attn2", block) for block in self.blocks}
            cap = max((c for w, c in zip(weights, self._caps(), strict=True) if w), default=None)
            if cap is not None:
                read |= {("attn1", block) for block in self.blocks if grids.get(block, 0.0) <= cap}
        return read

    def _plan(self, call: Call, gain: bool = True) -> Plan:
        """The run's plan, with the scales of re-weighted words or without them."""
        key = ("plan", call.length, call.x.device, call.x.dtype, gain)
        if key not in call.run.made:
            edit = self.edit if gain else self.edit.without_gain()
            call.run.made[key] = make_plan(
                edit, self.tau, call.run.steps, call.length, call.x.device, call.x.dtype
            )
        return call.run.made[key]


def _mutual(call: Call, weights: tuple[float, ...]) -> Inject:
    def inject(attend: Callable, attend_own: Callable, q: Tensor, k: Tensor, v: Tensor, _: dict) -> Tensor:
        step = _self_step(call, tuple(range(call.chunks)), weights, v)
        return mutual_self_attention(attend, attend_own, q, k, v, step)

    return inject


def check_pixels(q: Tensor, k: Tensor, remedy: str) -> None:
    """Raise ValueError, with what to do, if the pixels of self-attention's queries were merged."""
    if q.shape[0] * q.shape[1] < k.shape[0] * k.shape[1]:
        raise ValueError(
            "Another node merges pixels for self-attention (ToMe), differently for source and target, in a "
            f"layer in which the source's self-attention is injected. {remedy}, or take the other node out."
        )


def _cross_step(call: Call, rows: Rows, cross: CrossStep) -> CrossStep:
    key = ("cross", rows, cross)
    if key not in call.run.made:
        call.run.made[key] = cross.by_row(rows.branch)
    return call.run.made[key]


def _self_step(call: Call, chunks: tuple[int, ...], weights: tuple[float, ...], like: Tensor) -> SelfStep:
    rows = call.rows(chunks, tuple(weight > 0.0 for weight in weights))
    key = ("self", rows, weights, like.dtype)
    if key not in call.run.made:
        call.run.made[key] = self_step(rows, weights, like.dtype)
    return call.run.made[key]


class Slots:
    """The slots for attention replacements of one forward; what other nodes put there is kept and called."""

    def __init__(self, options: dict, blocks: tuple[BlockKey, ...]):
        self._blocks = blocks
        self._replaced = {name: dict(patches) for name, patches in options.get("patches_replace", {}).items()}
        self.options = {**options, "patches_replace": self._replaced}

    def fill(self, name: str, inject: Inject, blocks: tuple[BlockKey, ...] | None = None) -> None:
        """Put `inject` around whatever sits in the slot "attn1" or "attn2" of the blocks, all by default."""
        slots = self._replaced.setdefault(name, {})
        for block in self._blocks if blocks is None else blocks:
            slots[block] = _around(slots.get(block, slots.get(block[:2])), inject)


def _around(previous: Replacement | None, inject: Inject) -> Replacement:
    def replacement(q: Tensor, k: Tensor, v: Tensor, extra_options: dict) -> Tensor:
        def attend_own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return host_attention.optimized_attention(
                q,
                k,
                v,
                extra_options["n_heads"],
                attn_precision=extra_options["attn_precision"],
                transformer_options=extra_options,
            )

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend_own(q, k, v) if previous is None else previous(q, k, v, extra_options)

        return inject(attend, attend_own, q, k, v, extra_options)

    return replacement


def grid_fraction(grid: Sequence[int], latent: Sequence[int]) -> float:
    """Sides of a layer's grid as a fraction of the latent's, the larger of the two.

    A side that was halved k times, rounding up, is exactly 1 / 2^k; others come from nodes that
    resize features.
    """

    def fraction(side: int, full: int) -> float:
        factor = 2.0 ** round(math.log2(full / side))
        return 1.0 / factor if side == math.ceil(full / factor) else side / full

    return max(fraction(side, full) for side, full in zip(grid, latent, strict=True))
