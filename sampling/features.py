"""Plug-and-Play: what the targets' decoder takes from their source's, features and attention."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from torch import Tensor

from ..attention.edit import Edit, Source
from ..attention.features import source_features
from ..attention.inject import Rows, self_attention, self_step
from ..attention.plan import CrossStep
from ..attention.schedule import Window
from .controller import Controller, controlled, cross_attention_blocks
from .encode import encoded
from .injection import Slot, Slots, check_pixels
from .maps import MapsHandle
from .run import BlockKey, Call
from .trajectory import Trajectory, follow

FACTOR = 4
"""Downsampling of the decoder's layers that the injection begins in: 16 x 16 of 64 x 64, as published."""


@dataclass(frozen=True, eq=False)
class PlugAndPlay:
    """Tumanyan et al. 2023: features and self-attention of the source, in every conditioning of the targets.

    features, attention: windows of the run. number: the output block whose residual block gives the features.
    blocks: those whose self-attention is injected.
    """

    features: Window
    attention: Window
    number: int
    blocks: tuple[BlockKey, ...]

    @contextmanager
    def injected(self, call: Call) -> Iterator[dict]:
        rows = call.rows(tuple(range(call.chunks)))
        progress = call.step / call.run.steps
        slots = Slots(call.options, self.blocks)
        if self.attention.weight(progress):
            step = self_step(rows, (1.0,) * (call.run.branches - 1), call.x.dtype)

            def inject(
                attend: Callable, attend_own: Callable, q: Tensor, k: Tensor, v: Tensor, _: dict
            ) -> Tensor:
                check_pixels(q, k, "Set attention_end to 0")
                return self_attention(attend, attend_own, q, k, v, step)

            slots.fill("attn1", inject)
        copied = self.features.weight(progress) > 0.0
        with copied_features(call.network, self.number, rows) if copied else nullcontext():
            yield slots.options

    def cross_step(self, call: Call) -> CrossStep | None:
        return None

    def reads(self, call: Call, grids: dict[BlockKey, float]) -> set[Slot] | None:
        return None


@contextmanager
def copied_features(network: Any, number: int, rows: Rows) -> Iterator[None]:
    """While this is open, an output block's residual features are the source's in the targets' rows.

    The features are what the residual block adds to its skip connection. The host has no hook at this place,
    so one of PyTorch's sits on the residual block's last layer for the time of one forward.

    Raises ValueError if the forward went by without it, as that of a compiled model does.
    """
    (block,) = [layer for layer in network.output_blocks[number] if isinstance(layer, ResBlock)]
    fired = []

    def copy(module: Any, given: Any, features: Tensor) -> Tensor:
        fired.append(True)
        return source_features(features, rows)

    handle = block.out_layers[-1].register_forward_hook(copy)
    try:
        yield
    finally:
        handle.remove()
    if not fired:
        raise ValueError(
            "Plug-and-Play cannot reach the features inside a compiled model; take out the node that "
            "compiles it (Torch Compile Model), or set feature_end to 0."
        )


def feature_layers(blocks: dict[BlockKey, int]) -> tuple[int, tuple[BlockKey, ...]]:
    """Where Plug-and-Play acts: the output block of the features, and the transformer blocks from there on.

    The second output block at a quarter of the latent's sides, or of the coarsest where none is that coarse:
    block 4 of SD1.x and SD2.x, as published; block 1 of SDXL, whose decoder begins at that level.

    blocks: of the model, with their downsampling.
    """
    decoder = {block: factor for block, factor in blocks.items() if block[0] == "output"}
    factor = min(FACTOR, max(decoder.values()))
    numbers = sorted({block[1] for block, scale in decoder.items() if scale == factor})
    number = numbers[min(1, len(numbers) - 1)]
    return number, tuple(block for block in decoder if block[1] >= number)


def plug_and_play(
    model: Any,
    edit: Edit,
    feature_end: float,
    attention_end: float,
    trajectory: Trajectory | None = None,
    source_conditioning: list | None = None,
    maps: MapsHandle | None = None,
) -> tuple[Any, list]:
    """A clone of the model that samples source and targets by Plug-and-Play, and the positive CONDITIONING.

    feature_end, attention_end: fractions of the run's steps, from 0 to 1. trajectory: of an inverted picture.
    source_conditioning: what such a source is denoised under, without guidance, in place of its prompt.

    Raises ValueError for what does not fit together and for an unsupported model.
    """
    if source_conditioning is not None and trajectory is None:
        raise ValueError(
            "source_conditioning is for the source of a trajectory; a generated one is drawn by its prompt. "
            "Connect a trajectory, or disconnect source_conditioning."
        )
    for n, target in enumerate(edit.targets, 1):
        if bool((target.gain != 1.0).any()) or target.tau is not None:
            raise ValueError(
                f"Target {n} of the edit has re-weighted words or a tau schedule of its own, which "
                "Plug-and-Play has no use for; connect the edit from before Token Reweight and tau Sweep."
            )
    if source_conditioning is not None:
        if maps is not None and maps.wanted:
            raise ValueError(
                "The source is denoised under source_conditioning, so its prompt's words have no maps; "
                "disconnect source_conditioning or the maps output."
            )
        edit = replace(edit, source=Source(replace(encoded(edit)[0], conditioning=source_conditioning)))
    blocks = cross_attention_blocks(model.get_model_object("diffusion_model"))
    injection = PlugAndPlay(Window(0.0, feature_end), Window(0.0, attention_end), *feature_layers(blocks))
    follows = follow(model, trajectory)
    unguided = source_conditioning is not None or (
        follows is not None and follows.trajectory.reconstruction == "negative prompt"
    )
    state = () if follows is None else (follows,)
    controller = Controller(
        edit, injection, blocks, weakref.ref(maps or MapsHandle()), None, state, unguided=unguided
    )
    return controlled(model, controller)
