"""What a user is told whose edit did not happen."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..attention.edit import Edit, Source, Target
from . import host
from .run import Guest, Run, Start

OTHER_WORDS, OTHER_SCALES = 0.35, 0.1
"""A target that differs from its source by less (`changes`) came out nearly as its source: one of another
text, and one of the same text whose words were re-weighted. Chosen from the table in docs/benchmarks.md.
"""


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
        if self.run.sigmas[-1] > 0.0:  # noise is left, which a pair shares: another run goes on from here
            return
        limits = [least_change(self.edit.source, target) for target in self.edit.targets]
        if not any(limits):
            return
        found = zip(self.edit.targets, limits, changes(samples, self.run.branches), strict=True)
        same = [
            f'target {number} ("{target.text}")'
            for number, (target, limit, change) in enumerate(found, 1)
            if change < limit
        ]
        if same:
            host.tell(
                f"{', '.join(same)} came out nearly as the source: the change did not happen. "
                "Lower cross_end or self_end of the tau Scheduler."
            )


def least_change(source: Source, target: Target) -> float:
    """What a target that came out as it should differs by at least; 0 if it asks for no change."""
    if target.text != source.text:
        return OTHER_WORDS
    return OTHER_SCALES if bool((target.gain != 1.0).any()) else 0.0


def changes(samples: Tensor, branches: int) -> list[float]:
    """How far each target is from its source, in the pair in which it is furthest:

        |x_t - x_s| / |x_s - mean(x_s)|

    with the mean over the pixels of each channel. samples (pairs x branches, channels, ..., height, width).
    """
    rows = samples.float().unflatten(0, (-1, branches)).flatten(3)  # (pairs, B, channels, pixels)
    source, targets = rows[:, :1], rows[:, 1:]
    spread = (source - source.mean(-1, keepdim=True)).flatten(2).norm(dim=2)
    return ((targets - source).flatten(2).norm(dim=2) / spread.clamp_min(1e-12)).amax(0).tolist()
