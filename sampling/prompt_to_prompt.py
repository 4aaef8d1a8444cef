"""Prompt-to-Prompt as a method: the source's cross- and self-attention maps, on a schedule."""

from __future__ import annotations

from ..attention.edit import Edit
from ..attention.plan import Plan, make_plan
from ..attention.schedule import TauSchedule
from ..attention.taken import SelfTaken, Taken
from .layout import layout_of
from .network import of_kind
from .run import Call


class PromptToPrompt:
    """Hertz et al. 2023. tau: for the targets that have no schedule of their own."""

    def __init__(self, edit: Edit, tau: TauSchedule):
        self.edit = edit
        self.schedules = [target.tau or tau for target in edit.targets]
        self.tau = tau

    def taken(self, call: Call) -> Taken:
        """The source's maps in the pair's own conditioning; of self-attention, in the others too if asked."""
        both = self._self_attention(call, "map in both halves", everywhere=True)
        if call.length is None:
            return Taken(self_=both)
        return Taken(self._plan(call).cross[call.run.place], self._self_attention(call, "map") + both)

    def _self_attention(self, call: Call, mode: str, everywhere: bool = False) -> tuple[SelfTaken, ...]:
        weights = tuple(
            schedule.self_weight(call.progress(schedule.measure), mode) for schedule in self.schedules
        )
        if not any(weights):
            return ()
        layers = of_kind(call.run.layers, "self", "joint")
        largest = tuple(schedule.self_resolution for schedule in self.schedules)
        return (SelfTaken("map", weights, layers, largest, everywhere),)

    def _plan(self, call: Call) -> Plan:
        return call.run.once(
            ("plan", call.length, call.texts),
            lambda: make_plan(self.edit, self.tau, call.run.progress, layout_of(self.edit, call)),
        )
