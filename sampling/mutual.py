"""Mutual self-attention as a method: targets look at their source, and keep its looks."""

from __future__ import annotations

import math

from ..attention.edit import Edit
from ..attention.schedule import TauSchedule
from ..attention.taken import SelfTaken, Taken
from .network import Layer, of_kind
from .run import Call


class MutualSelfAttention:
    """Cao et al. 2023 (MasaCtrl), for the targets whose schedule has the self-attention mode "mutual".

    tau: for the targets that have no schedule of their own.
    """

    def __init__(self, edit: Edit, tau: TauSchedule):
        self.schedules = [target.tau or tau for target in edit.targets]

    def taken(self, call: Call) -> Taken:
        """The source's keys and values of self-attention, in every conditioning."""
        weights = [
            schedule.self_weight(call.progress(schedule.measure), "mutual") for schedule in self.schedules
        ]
        if not any(weights):
            return Taken()
        layers = of_kind(call.run.layers, "self", "joint")
        first = [round(schedule.mutual_layer * len(layers)) for schedule in self.schedules]
        by_weights: dict[tuple[float, ...], list[Layer]] = {}
        for number, layer in enumerate(layers):
            here = tuple(w if number >= start else 0.0 for w, start in zip(weights, first, strict=True))
            if any(here):
                by_weights.setdefault(here, []).append(layer)
        anywhere = (math.inf,) * len(weights)
        return Taken(
            self_=tuple(
                SelfTaken("mutual", here, tuple(some), anywhere, everywhere=True)
                for here, some in by_weights.items()
            )
        )
