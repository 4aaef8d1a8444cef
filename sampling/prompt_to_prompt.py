"""Prompt-to-Prompt as a method: the source's cross- and self-attention maps, on a schedule."""

from __future__ import annotations

from ..attention.edit import Edit
from ..attention.plan import Plan, make_plan
from ..attention.schedule import TauSchedule
from ..attention.taken import SelfTaken, Taken
from .network import of_kind
from .run import Call


class PromptToPrompt:
    """Hertz et al. 2023. tau: for the targets that have no schedule of their own."""

    def __init__(self, edit: Edit, tau: TauSchedule):
        self.edit = edit
        self.schedules = [target.tau or tau for target in edit.targets]
        self.tau = tau

    def taken(self, call: Call) -> Taken:
        """The source's maps, in the pair's own conditioning."""
        if call.length is None:
            return Taken()
        plan = self._plan(call)
        weights = plan.self_[call.step]
        self_ = SelfTaken(
            "map",
            weights,
            of_kind(call.run.layers, "self"),
            tuple(schedule.self_resolution for schedule in self.schedules),
        )
        return Taken(plan.cross[call.step], (self_,) if any(weights) else ())

    def _plan(self, call: Call) -> Plan:
        length = call.length
        assert length is not None
        return call.run.once(
            ("plan", length), lambda: make_plan(self.edit, self.tau, call.run.steps, length)
        )
