"""The paired sampler: source and targets in one batch, through the host's own sampling."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import comfy.sample
import comfy.utils
import latent_preview
import torch
from einops import rearrange, repeat
from torch import Tensor

from ..attention.blend import LocalBlend
from ..attention.edit import Edit
from ..attention.schedule import TauSchedule
from .conditioning import seeing_images_of
from .controller import control
from .latents import PAIRED, paired_latent, repeated_latent, source_latent, split_rows
from .maps import MapsHandle
from .reuse import NOTHING_KEPT, Keep
from .trajectory import Trajectory

MOST_IN_A_ROW = 4
"""Branches of a preview that stand side by side."""


def sample_pairs(
    model: Any,
    edit: Edit,
    tau: TauSchedule,
    *,
    negative: list,
    latent: dict,
    seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    denoise: float = 1.0,
    blend: LocalBlend | None = None,
    trajectory: Trajectory | None = None,
    maps: MapsHandle | None = None,
    keep: Keep = NOTHING_KEPT,
) -> tuple[dict, dict, dict]:
    """Sample every item of a LATENT as a pair; with a trajectory, from its noise and not a seed's.

    latent: an ordinary one, which all branches start from, or a paired one (`latents.PAIRED`), whose branches
    start from their own rows: for second passes.
    Returns the sources' LATENT, item by item, the targets', all targets of an item in a row, and all of them
    as a paired one.
    """
    if maps is not None:
        given = {name: value for name, value in locals().items() if name not in ("model", "maps")}
        maps.again = partial(_sample_again, weakref.ref(model), given)
    patched, positive = control(
        model, edit, tau, blend=blend, trajectory=trajectory, maps=maps, keep=keep
    )
    positive = seeing_images_of(negative, positive)
    latent = {**latent, "samples": comfy.sample.fix_empty_latent_channels(patched, latent["samples"])}
    items = source_latent(latent, edit.branches)
    noise = comfy.sample.prepare_noise(items["samples"], seed, items.get("batch_index"))
    paired = latent if PAIRED in latent else paired_latent(items, edit.branches)
    samples = comfy.sample.sample(
        patched,
        repeat(noise, "b ... -> (b n) ...", n=edit.branches),
        steps,
        cfg,
        sampler_name,
        scheduler,
        positive,
        negative,
        paired["samples"],
        denoise=denoise,
        noise_mask=paired.get("noise_mask"),
        callback=preview_callback(patched, steps, edit.branches),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    sources, targets = split_rows(samples, edit.branches)
    return (
        {**items, "samples": sources},
        {**repeated_latent(items, len(edit.targets)), "samples": targets},
        {**paired, "samples": samples},
    )


def _sample_again(model: weakref.ref, given: dict, maps: MapsHandle) -> None:
    """The same run once more, with its maps. Raises ValueError if its model was freed."""
    alive = model()
    if alive is None:
        raise ValueError(
            "The run ended without maps, and its model is no longer in memory. Sample again, for example "
            "with another seed, with the maps connected."
        )
    sample_pairs(alive, **given, maps=maps)


def preview_callback(model: Any, steps: int, branches: int) -> Callable:
    """The host's preview and progress callback, showing the first pair's branches side by side.

    Many branches stand in rows: the preview is about as high as it is wide.
    """
    show = latent_preview.prepare_callback(model, steps)
    columns = branches if branches <= MOST_IN_A_ROW else math.ceil(math.sqrt(branches))

    def callback(step: int, x0: Tensor, x: Tensor, total_steps: int) -> None:
        images = x0[:branches] if x0.ndim == 4 else x0[:branches, :, 0]  # of clips the first frame
        blank = images.new_zeros(-branches % columns, *images.shape[1:])
        strip = rearrange(torch.cat([images, blank]), "(r n) c h w -> 1 c (r h) (n w)", n=columns)
        show(step, strip, x, total_steps)

    return callback
