"""Reading the words' maps of a run, while it runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..attention.edit import Edit
from ..attention.inject import CrossStep
from ..attention.maps import MapStep, Tokens, map_rows, map_step, token_columns, token_maps
from ..attention.prompt import split_words
from .injection import Injection, Slots
from .run import BlockKey, Call, Run

PUBLISHED_FACTOR = 4
"""A quarter of the latent's sides (16 x 16 of 64 x 64) is the published resolution for a word's region."""
RUNS_KEPT = 2
"""Runs that a controller's maps can be asked for: a first pass and a second."""


@dataclass(frozen=True, eq=False)
class WordMaps:
    """Where the words of each branch looked during a run.

    tokens: which tokens of each branch's prompt were read. progress: of each step, from 0 to 1.
    by_factor: downsampling of the layers -> (steps, pairs, branches, W, h, w), averaged over these layers and
    their heads, on the CPU. size: height and width of the latent.
    blend: the final mask of the local blend, (pairs, targets, height, width), or None.
    """

    edit: Edit
    tokens: Tokens
    progress: tuple[float, ...]
    by_factor: dict[int, Tensor]
    blend: Tensor | None
    size: tuple[int, int]

    def phrases(self, branch: int, words: str) -> tuple[list[str], list[tuple[int, ...]]]:
        """Words or phrases of a branch's prompt, separated by commas, and their tokens; all words for none.

        Raises ValueError for a branch that is not there, WordNotFound, which lists the words.
        """
        self._check_branch(branch)
        prompt = self.edit.prompts[branch]
        wanted = split_words(words)
        if wanted:
            return wanted, [prompt.find(phrase) for phrase in wanted]
        return [word.text for word in prompt.words], [word.tokens for word in prompt.words]

    def layers(self, factor: int) -> int:
        """The downsampling that is meant by the published one: the nearest that the model has."""
        return nearest(self.by_factor) if factor == PUBLISHED_FACTOR else factor

    def blend_of(self, branch: int) -> Tensor | None:
        """The final mask of a target's local blend, (pairs, height, width); for the source any target's."""
        self._check_branch(branch)
        if self.blend is None:
            return None
        return self.blend.amax(1) if branch == 0 else self.blend[:, branch - 1]

    def _check_branch(self, branch: int) -> None:
        if not 0 <= branch < self.edit.branches:
            raise ValueError(
                f"branch is {branch}, but the edit has branches 0 (source) to {self.edit.branches - 1}."
            )

    def of(
        self, branch: int, phrases: Sequence[tuple[int, ...]], factor: int, start: float, end: float
    ) -> Tensor:
        """Maps of phrases, each given by its tokens: (pairs, phrases, h, w), the sums of their tokens' maps.

        factor: downsampling of the layers to average over, 0 for all of them, the coarser ones enlarged.
        start, end: part of the run to average over, start <= progress < end.

        Raises ValueError for a branch, a factor or a part of the run without maps.
        """
        self._check_branch(branch)
        steps = [n for n, progress in enumerate(self.progress) if start <= progress < end]
        if not steps:
            raise ValueError(
                f"No step of the run lies from {start:g} to {end:g}; its steps are at "
                f"{', '.join(f'{progress:.3g}' for progress in self.progress) or 'no fraction at all'}."
            )
        if factor and factor not in self.by_factor:
            raise ValueError(
                f"The model has no attention layers at 1/{factor} of the latent's sides; it has "
                f"{', '.join(f'1/{found}' for found in self.by_factor)}."
            )
        chosen = [self.by_factor[factor]] if factor else list(self.by_factor.values())
        size = chosen[0].shape[-2:]
        columns = [[self.tokens[branch].index(token) for token in phrase] for phrase in phrases]
        layers = []
        for maps in chosen:
            mean = maps[steps, :, branch].mean(0)
            found = torch.stack([mean[:, column].sum(1) for column in columns], dim=1)
            layers.append(F.interpolate(found, size, mode="bilinear", align_corners=False))
        return torch.stack(layers).mean(0)


@dataclass(eq=False)
class MapStore:
    """Maps of one run. blocks: those to read, with the downsampling of each.

    keep_steps: keep the maps of every step (on the CPU), not only the sum over the run so far.
    """

    edit: Edit
    tokens: Tokens
    blocks: dict[BlockKey, int]
    keep_steps: bool
    _total: dict[int, Tensor] = field(default_factory=dict)
    _now: dict[int, tuple[Tensor, int]] = field(default_factory=dict)
    _step: int = 0
    _steps: dict[int, dict[int, Tensor]] = field(default_factory=dict)

    def watch(self, call: Call, injection: Injection, options: dict) -> dict:
        """The transformer_options of a forward whose cross-attention is read as well, edits included.

        Forwards that see a part of the picture only are not read.
        """
        if not call.own or call.x.shape[-2:] != call.run.shape[-2:]:
            return options
        slots = Slots(options, tuple(self.blocks))
        cross = injection.cross_step(call)

        for block, factor in self.blocks.items():

            def read(
                attend: Callable,
                attend_own: Callable,
                q: Tensor,
                k: Tensor,
                v: Tensor,
                extra: dict,
                factor: int = factor,
            ) -> Tensor:
                grid = _grid(q.shape[1], factor, call.x, extra)
                if grid is not None:
                    rows = self._rows(call)
                    maps = token_maps(q, k, extra["n_heads"], rows, self._map_step(call, cross), call.copies)
                    self._add(call, factor, grid, maps)
                return attend(q, k, v)

            slots.fill("attn2", read, (block,))
        return slots.options

    def _rows(self, call: Call) -> Any:
        key = ("map rows", call.size, call.own, call.part.targets, call.x.device)
        if key not in call.run.made:
            offsets = [n * call.size for n in call.own]
            call.run.made[key] = map_rows(call.part.branches, offsets, call.size, call.x.device)
        return call.run.made[key]

    def _map_step(self, call: Call, cross: CrossStep | None) -> MapStep:
        key = ("map step", call.length, call.x.device, call.x.dtype, cross)
        if key not in call.run.made:
            columns = token_columns(self.edit, self.tokens, call.length, call.x.device, call.x.dtype)
            call.run.made[key] = map_step(columns, cross)
        return call.run.made[key]

    def _add(self, call: Call, factor: int, grid: tuple[int, int], maps: Tensor) -> None:
        branches = call.part.branches
        maps = rearrange(
            maps, "(c p b) (h w) t -> c p b t h w", c=len(call.own), b=len(branches), h=grid[0]
        ).mean(0)
        first = call.part.targets[0] == 0
        if len(branches) < call.run.branches:  # a part of the targets; the sources are in every part
            whole = maps.new_zeros(maps.shape[0], call.run.branches, *maps.shape[2:])
            whole[:, branches] = maps
            maps = whole
            if not first:
                maps[:, 0] = 0.0
        before = self._total.get(factor)
        if before is not None and before.shape != maps.shape:  # another node shrank the layer for a while
            flat = F.interpolate(
                maps.flatten(0, 1), before.shape[-2:], mode="bilinear", align_corners=False
            )
            maps = flat.view(before.shape)
        self._total[factor] = maps if before is None else before + maps
        if self.keep_steps:
            if call.step != self._step:
                self._flush()
                self._step = call.step
            total, count = self._now.get(factor, (None, 0))
            self._now[factor] = (maps if total is None else total + maps, count + first)

    def _flush(self) -> None:
        for factor, (total, count) in self._now.items():
            self._steps.setdefault(factor, {})[self._step] = (total / count).cpu()
        self._now.clear()

    def total(self) -> Tensor | None:
        """Maps summed over the run so far, of the layers nearest a quarter of the latent's sides."""
        if not self._total:
            return None
        return self._total[nearest(self._total)]

    def finish(self, run: Run) -> WordMaps:
        """The maps of the whole run."""
        self._flush()
        seen = sorted({step for maps in self._steps.values() for step in maps})
        by_factor = {
            factor: torch.stack([maps[step] for step in seen if step in maps])
            for factor, maps in sorted(self._steps.items())
        }
        progress = tuple(step / run.steps for step in seen)
        blend = None if run.blend is None else run.blend.cpu()
        return WordMaps(self.edit, self.tokens, progress, by_factor, blend, (run.shape[-2], run.shape[-1]))


@dataclass(frozen=True, eq=False)
class _Recorded:
    """A run that has ended. again: makes it once more, and so records it once more."""

    samples: Tensor
    maps: WordMaps | None
    again: Callable[[], object]


class MapsHandle:
    """What a `maps` output carries: the way to the maps of its controller's latest runs.

    The output exists before the run does; a run leaves its maps here when it ends, if it still exists.
    wanted: whether runs are to read their maps. A run that ended without is made again when they are needed.
    """

    def __init__(self, wanted: bool = False):
        self.wanted = wanted
        self._runs: deque[_Recorded] = deque(maxlen=RUNS_KEPT)

    def __deepcopy__(self, memo: dict) -> MapsHandle:
        return self  # some hosts copy what is attached to a model

    def record(self, samples: Tensor, maps: WordMaps | None, again: Callable[[], object]) -> None:
        self._runs.append(_Recorded(samples.cpu(), maps, again))

    def maps_of(self, samples: Tensor) -> WordMaps:
        """Maps of the run that made `samples`, all of its rows or some; else of the latest run.

        Raises ValueError if there was no run yet, and for an empty latent that no run made.
        """
        if not self._runs:
            raise ValueError(
                "No run has been made with this controller yet. Connect the latent that its sampler puts out "
                "to samples."
            )
        found = next((run for run in reversed(self._runs) if _holds(run.samples, samples)), None)
        if found is None:
            if not torch.count_nonzero(samples):
                raise ValueError("samples is an empty latent; connect the latent that the sampler puts out.")
            found = self._runs[-1]
        if found.maps is None:
            self.wanted = True
            found.again()
            found = self._runs[-1]
        assert found.maps is not None
        return found.maps


def _holds(rows: Tensor, some: Tensor) -> bool:
    """Whether every row of `some` is one of `rows`."""
    if rows.shape[1:] != some.shape[1:]:
        return False
    rows = rows.to(some)
    return all(any(torch.equal(row, other) for other in rows) for row in some)


def nearest(factors: Iterable[int]) -> int:
    """The layers' downsampling that is nearest to the published choice."""
    return min(
        set(factors),
        key=lambda factor: (abs(factor.bit_length() - PUBLISHED_FACTOR.bit_length()), factor),
    )


def _grid(tokens: int, factor: int, x: Tensor, extra: dict) -> tuple[int, int] | None:
    """Height and width of a layer's grid of queries, or None where another node made something else of it."""
    height, width = extra.get("activations_shape", (0, 0))[-2:]
    if height * width == tokens:
        return height, width
    height, width = (-(-side // factor) for side in x.shape[-2:])
    return (height, width) if height * width == tokens else None
