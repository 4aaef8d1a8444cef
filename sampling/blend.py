"""Local blend on the sampler's state."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.blend import LocalBlend, Regions, region_mask, tokens_of
from ..attention.edit import Edit
from ..attention.taken import Taken
from .maps import MapReader, MapReading, region_layers
from .run import Call, Guest, Run, Start


@dataclass(frozen=True, eq=False)
class Blending:
    """Keeps the targets of a run equal to their sources outside of regions: an `Entry`.

    regions: of each target. measure: what the blend's start is a fraction of, as in `TauSchedule`.
    """

    edit: Edit
    blend: LocalBlend
    regions: tuple[Regions, ...]
    measure: str = "steps"

    def begin(self, run: Run, start: Start) -> Guest:
        """Raises ValueError for another number of pairs than of masks."""
        masks, pairs = self.blend.mask, run.shape[0] // run.branches
        if masks is not None and len(masks) not in (1, pairs):
            raise ValueError(f"Local Blend has {len(masks)} masks for {pairs} pairs; expected 1 or {pairs}.")
        reader = None
        if self.blend.needs_maps:
            tokens = tokens_of(self.regions, run.branches)
            reader = MapReader(
                run, self.edit, tokens, region_layers(run.layers, run.family), keep_steps=False
            )
        return _Blend(run, self, reader)


class _Blend(Guest):
    """Puts the source's latent back where the mask is 0, after every step from the start on and the last:

        x_t <- x_s + mask (x_t - x_s)

    Source: Hertz et al. 2023, section 4, local editing.
    """

    acts_on_state = True

    def __init__(self, run: Run, entry: Blending, reader: MapReader | None):
        self.run, self.blend, self.regions, self.reader = run, entry.blend, entry.regions, reader
        self.measure = entry.measure
        self.reads = reader is not None

    def watch(self, call: Call, taken: Taken) -> MapReading | None:
        return self.reader.watch(call) if self.reader is not None else None

    def step(self, x: Tensor, n: int) -> None:
        run = self.run
        last = n == run.steps and (self.measure == "steps" or run.sigmas[n] == 0.0)
        if n == 0 or (not last and run.progress(self.measure)[n - 1] < self.blend.start):
            return
        self.mask = self._mask(x)
        rows = x.unflatten(0, (-1, run.branches))  # a view of x
        source, targets = rows[:, :1], rows[:, 1:]
        mask = self.mask.reshape(*self.mask.shape[:2], *[1] * (x.ndim - 3), *self.mask.shape[2:])
        targets.copy_(torch.lerp(source.expand_as(targets), targets, mask.to(x)))

    def _mask(self, x: Tensor) -> Tensor:
        """(pairs, N, height, width), from 0 to 1."""
        pairs, size = x.shape[0] // self.run.branches, (x.shape[-2], x.shape[-1])
        mask = x.new_ones(pairs, len(self.regions), *size, dtype=torch.float32)
        if self.reader is not None:
            maps, tokens, blend = self.reader.total(), self.reader.tokens, self.blend
            if maps is None:
                raise ValueError(
                    "Local Blend found no attention maps of the whole image: the positive conditioning is "
                    "limited to an area, or another node replaced the layers' attention."
                )
            mask = torch.cat(
                [
                    region_mask(found, maps, tokens, size, blend.threshold, blend.softness)
                    for found in self.regions
                ],
                dim=1,
            )
        if self.blend.mask is not None:
            given = self.blend.mask.to(mask, non_blocking=True)
            mask = mask * F.interpolate(given[:, None], size, mode="bilinear", align_corners=False)
        return mask
