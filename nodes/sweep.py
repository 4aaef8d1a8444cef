"""One target at several values of tau or of a word's scale, in one run."""

from __future__ import annotations

from comfy_api.latest import io

from ..attention.edit import Edit
from ..attention.schedule import TauSchedule
from ..attention.sweep import LIMITS, PARAMETERS, sweep
from .types import CATEGORY, EditIO, TauIO, check_words


class TauSweep(io.ComfyNode):
    """The paper's figure of tau as one graph."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="P2PTauSweep",
            display_name="\N{GREEK SMALL LETTER TAU} Sweep",
            category=CATEGORY,
            description="Repeats a target at evenly spaced values of tau, or of a word's scale, as the "
            "targets of one run.",
            inputs=[
                EditIO.Input("edit", tooltip="An edit with one target."),
                TauIO.Input(
                    "tau", tooltip="The schedule of all the targets, but for the value that is swept."
                ),
                io.Int.Input(
                    "count",
                    default=5,
                    min=LIMITS[0],
                    max=LIMITS[1],
                    tooltip="How many values, from 2 to 16. The run also makes the source.",
                ),
                io.Combo.Input(
                    "parameter",
                    options=list(PARAMETERS),
                    tooltip="cross_end, self_end: from the window's start to 1. scale: of the words, from -2 "
                    "to 2.",
                ),
                io.String.Input(
                    "words",
                    default="",
                    optional=True,
                    tooltip="For scale: words or phrases of the target. Empty: those that Token Reweight "
                    "scaled, else those that the source does not have.",
                ),
            ],
            outputs=[
                EditIO.Output("swept", display_name="edit"),
                io.String.Output("labels", display_name="labels", tooltip="One line for each target."),
            ],
        )

    @classmethod
    def execute(
        cls, edit: Edit, tau: TauSchedule, count: int, parameter: str, words: str = ""
    ) -> io.NodeOutput:
        if len(edit.targets) != 1:
            raise ValueError(
                f"A sweep repeats one target, but the edit has {len(edit.targets)}; connect the edit from "
                "before Add Target."
            )
        check_words(edit, tau)
        swept, labels = sweep(edit, tau, count, parameter, words)
        return io.NodeOutput(swept, "\n".join(labels))
