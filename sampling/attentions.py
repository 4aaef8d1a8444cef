"""The one place that puts something into the host's attention: what is taken and read in one forward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..attention.inject import (
    Attention,
    SelfStep,
    cross_attention,
    mutual_self_attention,
    self_attention,
    self_step,
)
from ..attention.maps import map_step, token_maps
from ..attention.taken import CrossStep, SelfTaken, Taken
from .host import optimized_attention
from .network import Layer, of_kind
from .run import Call, Reading

Replacement = Callable[[Tensor, Tensor, Tensor, dict], Tensor]
"""In the host's form: q, k, v, extra_options -> attention's output."""
SLOTS = {"self": "attn1", "cross": "attn2"}
"""What the host calls the slot for replacements of each kind of layer."""


@dataclass(frozen=True, eq=False)
class At:
    """A layer's attention in the forward under way.

    attend: what was in the layer's slot before, another node's replacement or the host's attention.
    attend_own: the host's attention. options: the host's, of this call of the layer.
    """

    layer: Layer
    attend: Attention
    attend_own: Attention
    options: dict


Inject = Callable[[At, Tensor, Tensor, Tensor], Tensor]


def fill(call: Call, taken: Taken, readings: Sequence[Reading], options: dict) -> tuple[dict, list[Layer]]:
    """The transformer_options of a forward, or of a part of it, in whose layers this is taken and read.

    What other nodes put into the layers' slots is kept and called. The second result is the layers in which
    something was taken, which fills while the forward runs.
    """
    replaced = {name: dict(patches) for name, patches in options.get("patches_replace", {}).items()}
    reached: list[Layer] = []

    def put(layer: Layer, inject: Inject) -> None:
        slots = replaced.setdefault(SLOTS[layer.kind], {})
        block = layer.block
        slots[block] = _around(slots.get(block, slots.get(block[:2])), layer, inject)

    if taken.cross is not None and call.own:
        for layer in of_kind(call.run.layers, "cross"):
            put(layer, _Cross(call, taken.cross, reached))
    for part in taken.self_:
        if part.everywhere or call.own:
            for layer in part.layers:
                put(layer, _Map(call, part, reached) if part.kind == "map" else _Mutual(call, part, reached))
    for reading in readings:
        for layer in reading.layers:
            put(layer, _Read(call, reading, taken.cross))
    return {**options, "patches_replace": replaced}, reached


def due(call: Call, taken: Taken) -> bool:
    """Whether `fill` puts something that takes from the source into any layer."""
    return bool(call.own and taken.cross is not None) or any(
        part.layers and (part.everywhere or call.own) for part in taken.self_
    )


@dataclass(frozen=True, eq=False)
class _Cross:
    call: Call
    step: CrossStep
    reached: list[Layer]

    def __call__(self, at: At, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.reached.append(at.layer)
        call, rows = self.call, self.call.rows()
        step = call.run.once(
            ("cross", rows, self.step, v.dtype), lambda: self.step.to(v.device, v.dtype).by_row(rows.branch)
        )
        sources = call.part.sources.queries_and_keys(call, at.layer, q, k) if step.moved is not None else None
        return cross_attention(
            at.attend, at.attend_own, q, k, v, rows=rows, step=step, copies=call.copies, sources=sources
        )


@dataclass(frozen=True, eq=False)
class _Map:
    call: Call
    taken: SelfTaken
    reached: list[Layer]

    def __call__(self, at: At, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.reached.append(at.layer)
        grid = grid_fraction(at.options["activations_shape"][-2:], self.call.size)
        self.call.part.sources.note_grid(at.layer, grid)
        weights = tuple(
            weight if grid <= largest else 0.0
            for weight, largest in zip(self.taken.weights, self.taken.largest, strict=True)
        )
        if not any(weights):
            return at.attend(q, k, v)
        _check_pixels(q, k)
        step = _self_step(self.call, self.taken, weights, v)
        sources = self.call.part.sources.queries_and_keys(self.call, at.layer, q, k)
        return self_attention(at.attend, at.attend_own, q, k, v, step=step, sources=sources)


@dataclass(frozen=True, eq=False)
class _Mutual:
    call: Call
    taken: SelfTaken
    reached: list[Layer]

    def __call__(self, at: At, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.reached.append(at.layer)
        step = _self_step(self.call, self.taken, self.taken.weights, v)
        return mutual_self_attention(at.attend, at.attend_own, q, k, v, step=step)


@dataclass(frozen=True, eq=False)
class _Read:
    """cross: how the layer's maps are edited."""

    call: Call
    reading: Reading
    cross: CrossStep | None

    def __call__(self, at: At, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grid = _grid(q.shape[1], at.layer.scale, self.call.size, at.options)
        if grid is not None:
            self.reading.add(self.call, at.layer, self._maps(at, q, k), grid)
        return at.attend(q, k, v)

    def _maps(self, at: At, q: Tensor, k: Tensor) -> Tensor:
        call, reading = self.call, self.reading
        step = call.run.once(
            ("map step", reading.tokens, call.length, q.device, q.dtype, self.cross),
            lambda: map_step(reading.columns(call), self.cross).to(q.device, q.dtype),
        )
        return token_maps(
            at.attend_own,
            q,
            k,
            heads=at.options["n_heads"],
            rows=call.map_rows(),
            step=step,
            copies=call.copies,
        )


def _self_step(call: Call, taken: SelfTaken, weights: tuple[float, ...], like: Tensor) -> SelfStep:
    rows = call.rows(taken.everywhere, [n for n in call.part.targets if weights[n] > 0.0])
    return call.run.once(("self", rows, weights, like.dtype), lambda: self_step(rows, weights, like.dtype))


def _check_pixels(q: Tensor, k: Tensor) -> None:
    """Raise ValueError if the pixels of self-attention's queries were merged."""
    if q.shape[0] * q.shape[1] < k.shape[0] * k.shape[1]:
        raise ValueError(
            "Another node merges pixels for self-attention (ToMe), differently for source and target, in a "
            "layer in which the source's self-attention is injected. Take that node out, or leave these "
            "layers alone: self_resolution of the tau Scheduler at 0.5 or less, attention_end of "
            "Plug-and-Play Features at 0."
        )


def _around(previous: Replacement | None, layer: Layer, inject: Inject) -> Replacement:
    def replacement(q: Tensor, k: Tensor, v: Tensor, extra_options: dict) -> Tensor:
        def attend_own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return optimized_attention(
                q,
                k,
                v,
                extra_options["n_heads"],
                attn_precision=extra_options["attn_precision"],
                transformer_options=extra_options,
            )

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend_own(q, k, v) if previous is None else previous(q, k, v, extra_options)

        return inject(At(layer, attend, attend_own, extra_options), q, k, v)

    return replacement


def _grid(tokens: int, scale: int, size: tuple[int, int], extra: dict) -> tuple[int, int] | None:
    """Height and width of a layer's grid of queries, or None where another node made something else of it."""
    height, width = extra.get("activations_shape", (0, 0))[-2:]
    if height * width == tokens:
        return height, width
    height, width = (-(-side // scale) for side in size)
    return (height, width) if height * width == tokens else None


def grid_fraction(grid: Sequence[int], latent: Sequence[int]) -> float:
    """Sides of a layer's grid as a fraction of the latent's, the larger of the two.

    A side that was halved k times, rounding up, is exactly 1 / 2^k; others come from nodes that
    resize features.
    """

    def fraction(side: int, full: int) -> float:
        factor = 2.0 ** round(math.log2(full / side))
        return 1.0 / factor if side == math.ceil(full / factor) else side / full

    return max(fraction(side, full) for side, full in zip(grid, latent, strict=True))
