"""From values that nodes connect to a model that samples them: the hooks of an edit on a model's clone."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

from comfy.patcher_extension import WrappersMP

from ..attention.blend import LocalBlend, regions
from ..attention.edit import Edit, Source
from ..attention.plan import check_words
from ..attention.schedule import TauSchedule, Window
from .blend import Blending
from .conditioning import paired_conditioning
from .encode import encoded
from .families import family_of
from .hooks import Hooks
from .host import KEY
from .maps import MapRecording, MapsHandle
from .mutual import MutualSelfAttention
from .network import layers_of
from .notice import Notice
from .plug_and_play import PlugAndPlay
from .prompt_to_prompt import PromptToPrompt
from .reuse import NOTHING_KEPT, Keep
from .run import Entry
from .stacking import branch_conditioning
from .trajectory import Following, Trajectory, follow


def control(
    model: Any,
    edit: Edit,
    tau: TauSchedule,
    *,
    blend: LocalBlend | None = None,
    trajectory: Trajectory | None = None,
    maps: MapsHandle | None = None,
    keep: Keep = NOTHING_KEPT,
) -> tuple[Any, list]:
    """A clone of the model that samples the edit, and the positive CONDITIONING that goes with it.

    maps: where the runs are to leave their words' maps. keep: what runs keep of their sources for later runs
    with the same ones.

    Raises ValueError for an unsupported model, a model with a controller on it or a trajectory of another
    model, WordNotFound for words of the schedule that are in no target or of the blend that are in no prompt.
    """
    check_words(edit, tau)
    family = family_of(model.model)
    layers = layers_of(model.get_model_object("diffusion_model"), family)
    follows = follow(model, trajectory)
    entries: list[Entry] = [] if follows is None else [follows]
    if blend is not None:
        entries.append(Blending(edit, blend, regions(blend, edit), tau.measure))
    entries += [_recording(edit, maps, tau.measure), keep, Notice(edit)]
    methods = (PromptToPrompt(edit, tau), MutualSelfAttention(edit, tau))
    return _controlled(
        model, Hooks(edit, layers, methods, tuple(entries), family, unguided=_unguided(follows))
    )


def plug_and_play(
    model: Any,
    edit: Edit,
    feature_end: float,
    attention_end: float,
    *,
    trajectory: Trajectory | None = None,
    source_conditioning: list | None = None,
    maps: MapsHandle | None = None,
) -> tuple[Any, list]:
    """A clone of the model that samples source and targets by Plug-and-Play, and the positive CONDITIONING.

    feature_end, attention_end: fractions of the run's steps, from 0 to 1. trajectory: of an inverted image.
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
    family = family_of(model.model)
    if family is not None:
        raise ValueError(
            f"Plug-and-Play Features copies features of a U-Net's decoder; {family.name} is a transformer, "
            "which has none. Use Attention Controller, with self_mode mutual in tau Scheduler, instead."
        )
    layers = layers_of(model.get_model_object("diffusion_model"))
    method = PlugAndPlay(Window(0.0, feature_end), Window(0.0, attention_end), layers)
    follows = follow(model, trajectory)
    entries: list[Entry] = [*([] if follows is None else [follows]), _recording(edit, maps), Notice(edit)]
    unguided = source_conditioning is not None or _unguided(follows)
    return _controlled(model, Hooks(edit, layers, (method,), tuple(entries), unguided=unguided))


def _recording(edit: Edit, maps: MapsHandle | None, measure: str = "steps") -> MapRecording:
    return MapRecording(edit, weakref.ref(maps or MapsHandle()), measure)


def _unguided(follows: Following | None) -> bool:
    return follows is not None and follows.trajectory.reconstruction == "negative prompt"


def _controlled(model: Any, hooks: Hooks) -> tuple[Any, list]:
    """A clone of the model with the hooks on it, and the positive CONDITIONING that goes with it."""
    if model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY):
        raise ValueError(
            "The model already comes from an Attention Controller or Plug-and-Play Features; "
            "connect the model from before that node. To edit several targets, use Add Target."
        )
    patched = model.clone()
    hooks.install(patched)
    if hooks.family is not None:
        return patched, branch_conditioning(hooks.edit, hooks.mark, hooks.family, model.model.diffusion_model)
    return patched, paired_conditioning(hooks.edit, hooks.mark)
