"""Local blend on the sampler's state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.blend import LocalBlend, Regions, region_mask
from .run import Run


@dataclass(frozen=True, eq=False)
class BlendState:
    """Puts the source's latent back where the mask is 0, after every step from the start on and the last:

        x_t <- x_s + mask (x_t - x_s)

    regions: of each target. Source: Hertz et al. 2023, section 4, local editing.
    """

    blend: LocalBlend
    regions: tuple[Regions, ...]

    def begin(self, run: Run, noise: Tensor, sampler: Any, denoise_mask: Tensor | None) -> None:
        """Raise ValueError for another number of pairs than of masks."""
        masks, pairs = self.blend.mask, run.shape[0] // run.branches
        if masks is not None and len(masks) not in (1, pairs):
            raise ValueError(f"Local Blend has {len(masks)} masks for {pairs} pairs; expected 1 or {pairs}.")

    def edit(self, x: Tensor, step: int, run: Run) -> None:
        if step == 0 or (step < run.steps and (step - 1) / run.steps < self.blend.start):
            return
        run.blend = self._mask(run, x)
        rows = x.unflatten(0, (-1, run.branches))  # a view of x
        source, targets = rows[:, :1], rows[:, 1:]
        targets.copy_(torch.lerp(source.expand_as(targets), targets, run.blend[:, :, None].to(x)))

    def _mask(self, run: Run, x: Tensor) -> Tensor:
        """(pairs, targets, height, width), from 0 to 1."""
        pairs, size = x.shape[0] // run.branches, (x.shape[-2], x.shape[-1])
        mask = x.new_ones(pairs, len(self.regions), *size, dtype=torch.float32)
        if self.blend.needs_maps:
            maps = run.maps.total() if run.maps is not None else None
            if run.maps is None or maps is None:
                raise ValueError(
                    "Local Blend found no attention maps of the whole picture: the controller's positive "
                    "conditioning is limited to an area, or another node replaced the layers' attention."
                )
            tokens, blend = run.maps.tokens, self.blend
            mask = torch.cat(
                [
                    region_mask(found, maps, tokens, size, blend.threshold, blend.softness)
                    for found in self.regions
                ],
                dim=1,
            )
        if self.blend.mask is not None:
            given = self.blend.mask.to(mask)
            mask = mask * F.interpolate(given[:, None], size, mode="bilinear", align_corners=False)
        return mask
