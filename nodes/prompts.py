"""What to change: source and target prompts, and the weight of single words."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..attention.alignment import MODES
from ..attention.edit import GAIN_LIMIT, Edit, words_to_reweight
from ..sampling.encode import add_target, check_prompt, encoded, start_edit
from ..sampling.preview import READERS
from .page import alignment_data
from .types import CATEGORY, EditIO, also_called, edit_input


def _mode_input() -> io.Combo.Input:
    return io.Combo.Input(
        "mode",
        options=list(MODES),
        default="auto",
        tooltip="auto: replaced words take the old words' maps; a tag that only moved stays shared. swap: "
        "the same, strictly by position. refine: only shared words keep the source's maps.",
    )


def _alignment(clip: Any, edit: Edit) -> dict[str, tuple]:
    """What the page shows of an edit's last target, and the name of the text encoder to ask with."""
    source, *_, target = encoded(edit)
    data = alignment_data(source, target, edit.targets[-1].alignment)
    return {"alignment": ({**data, "encoder": READERS.remember(clip)},)}


class PromptPair(io.ComfyNode):
    """Source and target prompt, aligned word by word."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="P2PPromptPair",
            display_name="Prompt Pair",
            category=CATEGORY,
            **also_called("word swap", "edit prompt"),
            description="Encodes source and target prompt and finds which words share their attention maps.",
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder of the checkpoint."),
                io.String.Input(
                    "source",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="The prompt of the image to start from.",
                ),
                io.String.Input(
                    "target",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="The edited prompt: swap, add or remove words; keep the rest as in the source.",
                ),
                _mode_input(),
            ],
            outputs=[EditIO.Output("pair", display_name="edit")],
        )

    @classmethod
    def execute(cls, clip: Any, source: str, target: str, mode: str) -> io.NodeOutput:
        edit = start_edit(clip, source, target, mode)
        return io.NodeOutput(edit, ui=_alignment(clip, edit))


class AddTarget(io.ComfyNode):
    """One more edit of the same source, in the same run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="P2PAddTarget",
            display_name="Add Target",
            category=CATEGORY,
            description="Adds a target prompt to an edit: N targets share one source and cost N + 1 images.",
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder that the edit's other prompts went through."),
                edit_input(),
                io.String.Input(
                    "target",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="Another edited prompt: swap, add or remove words of the source.",
                ),
                _mode_input(),
            ],
            outputs=[EditIO.Output("extended", display_name="edit")],
        )

    @classmethod
    def validate_inputs(cls, target: str | None = None) -> bool | str:
        try:
            if target is not None:
                check_prompt(target, "target")
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, clip: Any, edit: Edit, target: str, mode: str) -> io.NodeOutput:
        extended = add_target(clip, edit, target, mode)
        return io.NodeOutput(extended, ui=_alignment(clip, extended))


class TokenReweight(io.ComfyNode):
    """Scale the attention maps of words."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="P2PTokenReweight",
            display_name="Token Reweight",
            category=CATEGORY,
            description="Strengthens, weakens or inverts words of the target: scales their attention maps.",
            inputs=[
                edit_input(),
                io.String.Input(
                    "words",
                    tooltip="Words or phrases of the target, separated by commas; word#2 is the second one.",
                ),
                io.Float.Input(
                    "scale",
                    default=1.0,
                    min=-GAIN_LIMIT,
                    max=GAIN_LIMIT,
                    step=0.05,
                    tooltip="c from -2 to 2: 1 leaves the word as it is, 2 doubles its effect, 0 removes it, "
                    "below 0 pushes away from it. Scales of several nodes multiply; their product must stay "
                    "in this range.",
                ),
                io.Int.Input(
                    "target", default=0, min=0, max=64, tooltip="Which target, from 1; 0 means all of them."
                ),
            ],
            outputs=[EditIO.Output("reweighted", display_name="edit")],
        )

    @classmethod
    def validate_inputs(cls, words: str | None = None) -> bool | str:
        try:
            if words is not None:
                words_to_reweight(words)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, edit: Edit, words: str, scale: float, target: int) -> io.NodeOutput:
        return io.NodeOutput(edit.reweighted(words, scale, target))
