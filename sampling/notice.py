"""What a user is told whose edit did not happen."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..attention.edit import Edit
from . import host
from .run import Guest, Run, Start

SAME = 0.3
"""A target that differs from its source by less came out as its source (`changes`); docs/benchmarks.md."""


@dataclass(frozen=True, eq=False)
class Notice:
    """Says at a run's end which targets came out as their source: an `Entry`."""

    edit: Edit

    def begin(self, run: Run, start: Start) -> Guest:
        return _Notice(run, self.edit)


class _Notice(Guest):
    def __init__(self, run: Run, edit: Edit):
        self.run, self.edit = run, edit

    def end(self, samples: Tensor) -> None:
        asked = [
            target.text != self.edit.source.text or bool((target.gain != 1.0).any())
            for target in self.edit.targets
        ]
        if not any(asked):
            return
        same = [
            f'target {number} ("{target.text}")'
            for number, (target, wanted, change) in enumerate(
                zip(self.edit.targets, asked, changes(samples, self.run.branches), strict=True), 1
            )
            if wanted and change < SAME
        ]
        if same:
            host.tell(
                f"{', '.join(same)} came out nearly as the source: the change did not happen. "
                "Lower cross_end or self_end of the tau Scheduler."
            )


def changes(samples: Tensor, branches: int) -> list[float]:
    """How far each target is from its source, in the pair in which it is furthest:

        |x_t - x_s| / |x_s - mean(x_s)|

    with the mean over the pixels of each channel. samples (pairs x branches, channels, ..., height, width).
    """
    rows = samples.float().unflatten(0, (-1, branches)).flatten(3)  # (pairs, B, channels, pixels)
    source, targets = rows[:, :1], rows[:, 1:]
    spread = (source - source.mean(-1, keepdim=True)).flatten(2).norm(dim=2)
    return ((targets - source).flatten(2).norm(dim=2) / spread.clamp_min(1e-12)).amax(0).tolist()
