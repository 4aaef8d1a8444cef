"""Runs for the laws on a GPU, and how exactly the host itself computes there."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from edits import SOURCE, Bench, Variant, device
from models import Model
from p2p.attention.schedule import TauSchedule, Window
from torch import Tensor

TARGET = "a fluffy cat riding a red car"
STEPS = 4

EMPTY = TauSchedule(Window(0, 0), Window(0, 0))
FULL = TauSchedule(Window(0, 1), Window(0, 1), self_resolution=1.0)
PART = TauSchedule(Window(0, 0.8), Window(0, 0.5), fade=0.3, self_resolution=1.0)


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference as a fraction of the largest value."""
    assert found.shape == expected.shape and torch.isfinite(found).all() and torch.isfinite(expected).all()
    return float((found - expected).abs().max() / expected.abs().max())


class Lab(Bench):
    """A model, its edits, and the host's own runs to compare with. size: px of the pictures."""

    def __init__(self, model: Model, clip: Any, dtype: torch.dtype):
        super().__init__(model, clip)
        self.dtype, self.device = dtype, device()
        self.size = 64 if self.device.type == "cpu" else 256

    def sample(self, variant: Variant, items: Sequence[int] = (0,)) -> Tensor:
        """(items x rows, channels, height, width)"""
        return self.run(variant, self.size, STEPS, items=items)

    def paired(
        self, edit: Any, tau: TauSchedule, items: Sequence[int] = (0,), **parts: Any
    ) -> tuple[Tensor, Tensor]:
        """Latents of the sources and of the targets, item by item."""
        rows = self.sample(self.ours(edit, tau, **parts), items).unflatten(0, (-1, edit.branches))
        return rows[:, 0], rows[:, 1:].flatten(0, 1)

    @cached_property
    def plain_pair(self) -> Tensor:
        """The host's batch of source and target prompt, from one noise."""
        return self.sample(self.plain(self.edit(SOURCE, TARGET)))

    @cached_property
    def tolerance(self) -> float:
        """Four times what the host itself differs by between a batch and single runs, or what dtype holds."""
        edit = self.edit(SOURCE, TARGET)
        single = [
            self.sample(Variant(self.model.patcher, prompt.conditioning, 1)) for prompt in edit.prompts
        ]
        return 4 * max(difference(self.plain_pair, torch.cat(single)), torch.finfo(self.dtype).eps)
