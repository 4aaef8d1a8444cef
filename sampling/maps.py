"""Reading the words' maps of a run, while it runs."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..attention.edit import Edit
from ..attention.maps import Tokens, token_columns
from ..attention.taken import Taken
from ..attention.word_maps import WordMaps, nearest
from .families import Family
from .host_memory import to_host
from .layout import layout_of
from .network import Layer, Layers, of_kind
from .run import Call, Guest, Run, Start

RUNS_KEPT = 2
"""Runs that a controller's maps can be asked for: a first pass and a second."""


def shown_layers(layers: Layers, family: Family | None = None) -> Layers:
    """The layers whose maps are shown: of a U-Net all cross-attention coarser than the latent, if any is."""
    if family is not None:
        return family.map_layers(layers)
    cross = of_kind(layers, "cross")
    return tuple(layer for layer in cross if layer.scale > 1) or cross


def region_layers(layers: Layers, family: Family | None = None) -> Layers:
    """The layers that tell a word's region: of a U-Net those nearest to the published resolution."""
    if family is not None:
        return family.map_layers(layers)
    cross = of_kind(layers, "cross")
    scale = nearest(layer.scale for layer in cross)
    return tuple(layer for layer in cross if layer.scale == scale)


@dataclass(eq=False)
class MapReader:
    """Maps of one run. layers: those to read.

    keep_steps: keep the maps of every step (on the CPU), not only the sum over the run so far.
    measure: what the steps' progress is a fraction of, as in `TauSchedule`.
    """

    run: Run
    edit: Edit
    tokens: Tokens
    layers: Layers
    keep_steps: bool
    measure: str = "steps"
    _total: dict[int, Tensor] = field(default_factory=dict)
    _now: dict[int, tuple[Tensor, int]] = field(default_factory=dict)
    _step: int = 0
    _steps: dict[int, dict[int, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises ValueError for latents of several frames."""
        frames = self.run.shape[2] if len(self.run.shape) == 5 else 1
        if frames > 1:
            raise ValueError(
                "Attention Maps and Local Blend by words read one image, and the latent has "
                f"{frames} frames. Use a latent of one frame; or disconnect the maps, and give Local Blend a "
                "mask without words."
            )

    def watch(self, call: Call) -> MapReading | None:
        """What to read in a forward, edits included; nothing where it sees a part of the image only."""
        if not call.own or not call.is_whole_image:
            return None
        return MapReading(self)

    def add(self, scale: int, maps: Tensor, count: int) -> None:
        """Maps of one forward: (pairs, B, W, height, width), summed over `count` layers and conditionings."""
        before = self._total.get(scale)
        if before is not None:
            maps = maps.to(before.device)  # several GPUs compute conditionings of one run
            if before.shape != maps.shape:  # another node shrank the layer for a while
                flat = F.interpolate(
                    maps.flatten(0, 1), before.shape[-2:], mode="bilinear", align_corners=False
                )
                maps = flat.view(before.shape)
        self._total[scale] = maps if before is None else before + maps
        if self.keep_steps:
            if self.run.step != self._step:
                self._flush()
                self._step = self.run.step
            total, seen = self._now.get(scale, (None, 0))
            self._now[scale] = (maps if total is None else total + maps, seen + count)

    def _flush(self) -> None:
        for scale, (total, count) in self._now.items():
            self._steps.setdefault(scale, {})[self._step] = to_host(total / count)
        self._now.clear()

    def total(self) -> Tensor | None:
        """Maps summed over the run so far, of the layers nearest a quarter of the latent's sides."""
        return self._total[nearest(self._total)] if self._total else None

    def finish(self, blend: Tensor | None) -> WordMaps:
        """The maps of the whole run. blend: its final mask."""
        self._flush()
        seen = sorted({step for maps in self._steps.values() for step in maps})
        by_scale = {
            scale: tuple(maps[step] for step in seen if step in maps)
            for scale, maps in sorted(self._steps.items())
        }
        reached = self.run.progress(self.measure)
        progress = tuple(reached[step] for step in seen)
        height, width = self.run.shape[-2:]
        mask = None if blend is None else blend.cpu()
        family = self.run.family
        pixels = 8 if family is None else 16 // family.patch
        return WordMaps(self.edit, self.tokens, progress, by_scale, mask, (height, width), pixels)


@dataclass(eq=False)
class MapReading:
    """What one forward gives to its reader."""

    reader: MapReader
    _sums: dict[int, tuple[Tensor, int]] = field(default_factory=dict)

    @property
    def layers(self) -> Collection[Layer]:
        return self.reader.layers

    @property
    def tokens(self) -> Tokens:
        return self.reader.tokens

    def columns(self, call: Call) -> Tensor:
        return call.run.once(
            ("map columns", self.tokens, call.length, call.texts),
            lambda: token_columns(layout_of(self.reader.edit, call), self.tokens),
        )

    def add(self, call: Call, layer: Layer, maps: Tensor, grid: tuple[int, int]) -> None:
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
        total, count = self._sums.get(layer.scale, (None, 0))
        self._sums[layer.scale] = (maps if total is None else total + maps, count + first)

    def commit(self) -> None:
        for scale, (maps, count) in self._sums.items():
            self.reader.add(scale, maps, count)


@dataclass(frozen=True, eq=False)
class _Recorded:
    """A run that has ended. again: makes it once more, and so records it once more."""

    samples: Tensor
    maps: WordMaps | None
    again: Callable[[MapsHandle], object]


class MapsHandle:
    """What a `maps` output carries: the way to the maps of its controller's latest runs.

    The output exists before the run does; a run leaves its maps here when it ends, if it still exists.
    wanted: whether runs are to read their maps. A run that ended without is made again when they are needed,
    if its model still exists: nothing here keeps one. again: how to, where the run itself cannot say.
    """

    def __init__(self, wanted: bool = False):
        self.wanted = wanted
        self.again: Callable[[MapsHandle], object] | None = None
        self._runs: deque[_Recorded] = deque(maxlen=RUNS_KEPT)

    def __deepcopy__(self, memo: dict) -> MapsHandle:
        return self  # some hosts copy what is attached to a model

    def get_ram_usage(self) -> int:
        """Bytes, for those of the host's caches that go by memory."""
        return sum(run.samples.nbytes + (run.maps.nbytes if run.maps else 0) for run in self._runs)

    def record(
        self, samples: Tensor, maps: WordMaps | None, again: Callable[[MapsHandle], object]
    ) -> None:
        self._runs.append(_Recorded(samples.cpu(), maps, self.again or again))

    def maps_of(self, samples: Tensor) -> WordMaps:
        """Maps of the run that made `samples`, all of its rows or some; else of the latest run.

        Raises ValueError if there was no run yet, for an empty latent that no run made, and where a run that
        ended without maps cannot be made again.
        """
        if not self._runs:
            raise ValueError(
                "No run has been made with this controller yet, or its sampler had no step (denoise 0). "
                "Connect the sampler's latent to samples."
            )
        found = next((run for run in reversed(self._runs) if _holds(run.samples, samples)), None)
        if found is None:
            if not torch.count_nonzero(samples):
                raise ValueError("samples is an empty latent; connect the sampler's latent.")
            found = self._runs[-1]
        if found.maps is None:
            self.wanted = True
            found.again(self)
            found = self._runs[-1]
        assert found.maps is not None
        return found.maps


@dataclass(frozen=True, eq=False)
class MapRecording:
    """Leaves the maps of a run's words in a handle, while somebody has that: an `Entry`."""

    edit: Edit
    handle: weakref.ref[MapsHandle]
    measure: str = "steps"

    def begin(self, run: Run, start: Start) -> Guest:
        handle = self.handle()
        if handle is None:
            return Guest()
        reader = None
        if handle.wanted:
            layers = shown_layers(run.layers, run.family)
            reader = MapReader(run, self.edit, self.edit.tokens, layers, True, self.measure)
        return _Recorder(run, self.handle, reader, start.again)


class _Recorder(Guest):
    def __init__(
        self,
        run: Run,
        handle: weakref.ref[MapsHandle],
        reader: MapReader | None,
        again: Callable[[], object],
    ):
        self.run, self.handle, self.reader, self.again = run, handle, reader, again
        self.reads = reader is not None

    def watch(self, call: Call, taken: Taken) -> MapReading | None:
        return self.reader.watch(call) if self.reader is not None else None

    def end(self, samples: Tensor) -> None:
        handle = self.handle()
        if handle is not None:
            mask = next((guest.mask for guest in self.run.guests if guest.mask is not None), None)
            maps = None if self.reader is None else self.reader.finish(mask)
            again = self.again
            handle.record(samples, maps, lambda _: again())


def _holds(rows: Tensor, some: Tensor) -> bool:
    """Whether every row of `some` is one of `rows`."""
    if rows.shape[1:] != some.shape[1:]:
        return False
    rows = rows.to(some)
    return all(any(torch.equal(row, other) for other in rows) for row in some)
