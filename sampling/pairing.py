"""Pairs as ComfyUI's values: conditionings and latents in which source and targets lie side by side.

Rows are ordered (pair, branch), the branch running fastest: source, target 1 .. N, source, target 1 .. N ...
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Container
from typing import Any

import torch
from einops import repeat
from torch import Tensor

from ..attention.edit import Edit
from ..attention.plan import conditioning_length
from .encode import KEY, encoded


def paired_conditioning(edit: Edit, mark: str) -> list:
    """The host's CONDITIONING with one batch row per branch, each entry marked as the controller's own.

    Prompts of different lengths are repeated to their common multiple, which leaves attention as it is; the
    host does the same for prompt and negative prompt.

    Raises ValueError if the prompts were encoded into different numbers or shapes of entries.
    """
    branches = [prompt.conditioning for prompt in encoded(edit)]
    if len({len(entries) for entries in branches}) != 1:
        raise ValueError(
            "Source and targets were encoded into different numbers of conditionings "
            f"({', '.join(str(len(entries)) for entries in branches)}); use the same CLIP for all of them."
        )
    tokens = (cond.shape[1] for entries in branches for cond, _ in entries)
    length = math.lcm(conditioning_length(edit), *tokens)
    return [_pair_entry(entries, length, mark) for entries in zip(*branches, strict=True)]


def _pair_entry(entries: tuple, length: int, mark: str) -> list:
    """One entry (tensor, options) of the pair, from the same entry of each branch."""
    cond = torch.cat([repeat(cond, "b t c -> b (r t) c", r=length // cond.shape[1]) for cond, _ in entries])
    options: dict[str, Any] = dict(entries[0][1])
    for name in [name for name, value in options.items() if torch.is_tensor(value)]:
        values = [other.get(name) for _, other in entries]
        if not all(torch.is_tensor(value) and value.shape == values[0].shape for value in values):
            raise ValueError(
                f"Source and targets were encoded into different shapes of {name}; use the same CLIP for all."
            )
        options[name] = torch.cat(values)
    return [cond, {**options, KEY: mark}]


def unguided_sources(conds: dict[str, list[dict]], own: Container[uuid.UUID], branches: int) -> None:
    """Make the sources' positive conditioning their negative one too: guidance then does not move them.

    conds: of a guider, by role, changed in place. own: uuids of the pair's own entries.
    Raises ValueError unless the pair has one entry of its own.
    """
    pair = [entry for entries in conds.values() for entry in entries if entry["uuid"] in own]
    if len(pair) != 1:
        raise ValueError(
            f"The source prompt cannot be its own negative prompt: the positive has {len(pair)} "
            "conditionings, and 1 is expected. Use one prompt without areas or schedules."
        )
    for n, entry in enumerate(conds.get("negative", ())):
        model_conds = dict(entry["model_conds"])
        for name in ("c_crossattn", "y"):
            if name in model_conds and name in pair[0]["model_conds"]:
                mine = pair[0]["model_conds"][name].cond
                mine, rows = _same_size(mine, model_conds[name].cond)
                rows[::branches] = mine[::branches]
                model_conds[name] = type(model_conds[name])(rows)
        conds["negative"][n] = {**entry, "model_conds": model_conds, "uuid": uuid.uuid4()}


def _same_size(a: Tensor, b: Tensor) -> list[Tensor]:
    """Both, new, repeated along rows and tokens to their common multiples."""
    sides = [math.lcm(*sizes) for sizes in zip(a.shape[:-1], b.shape[:-1], strict=True)]
    return [
        x.repeat(*(side // size for side, size in zip(sides, x.shape[:-1], strict=True)), 1) for x in (a, b)
    ]


SEEN = (("concat_latent_image", "concat_mask"), ("control", "control_apply_to_uncond"), ("gligen",))
"""Options of a conditioning that the host's nodes, or the host itself, put on positive and negative alike."""


def seeing_images_of(negative: list, positive: list) -> list:
    """The positive CONDITIONING with what the negative one was given for the model to see.

    That is the image of inpainting and InstructPix2Pix models, the ControlNets and T2I-Adapters, and GLIGEN's
    boxes; of each, what the first of several negatives with any has.
    """
    seen: dict[str, Any] = {}
    given: dict[str, Any]
    for names in SEEN:
        given = next((options for _, options in negative if options.get(names[0]) is not None), {})
        seen |= {name: given[name] for name in names if name in given}
    return [[cond, {**seen, **options}] for cond, options in positive]


PAIRED = "p2p_branches"
"""In a LATENT that is paired: the branches of each pair."""


def paired_latent(latent: dict, branches: int) -> dict:
    """Repeat each item of a LATENT once per branch, with tied `batch_index`: a pair starts from one noise.

    Raises ValueError if it is paired already.
    """
    if PAIRED in latent:
        raise ValueError(
            f"The latent is paired already, {latent[PAIRED]} branches to a pair; an ordinary one is expected."
        )
    return {**repeated_latent(latent, branches), PAIRED: branches}


def repeated_latent(latent: dict, times: int) -> dict:
    """A LATENT with each item `times` times in a row, and the items' numbers in `batch_index`."""
    samples = latent["samples"]
    items = samples.shape[0]
    index = latent.get("batch_index", range(items))
    repeated = {**latent, "samples": repeat(samples, "b ... -> (b n) ...", n=times)}
    repeated["batch_index"] = [number for number in index for _ in range(times)]
    mask = latent.get("noise_mask")
    if mask is not None and mask.ndim > 2:
        repeated["noise_mask"] = repeat(mask, "b ... -> (b n) ...", n=times)
    return repeated


def source_latent(latent: dict, branches: int) -> dict:
    """The sources of a paired LATENT, as an ordinary one; an ordinary LATENT itself.

    Raises ValueError for pairs of another number of branches.
    """
    if PAIRED not in latent:
        return latent
    rows = latent["samples"].shape[0]
    if latent[PAIRED] != branches or rows % branches:
        raise ValueError(
            f"The latent has {rows} rows in pairs of {latent[PAIRED]} branches, but the edit has "
            f"{_described(branches)}. Connect a latent that was paired for the same edit, whole, or an "
            "ordinary one."
        )
    sources = {name: value for name, value in latent.items() if name not in (PAIRED, "batch_index")}
    sources["samples"] = latent["samples"][::branches]
    index = latent.get("batch_index", range(rows))[::branches]
    if list(index) != list(range(len(index))):  # else what the host assumes without it
        sources["batch_index"] = list(index)
    mask = latent.get("noise_mask")
    if mask is not None and mask.ndim > 2 and mask.shape[0] == rows:
        sources["noise_mask"] = mask[::branches]
    return sources


def check_rows(rows: int, branches: int, what: str) -> None:
    """Raise ValueError unless `rows` is a multiple of `branches`; the message says both numbers."""
    if rows == 0 or rows % branches:
        raise ValueError(
            f"{what} has a batch of {rows}, which is not a multiple of the edit's {_described(branches)}. "
            "Put a Paired Latent node between the latent and the sampler, and connect the same edit to it, "
            "to the controller and to Split Branches."
        )


def _described(branches: int) -> str:
    return f"{branches} branches (1 source and {branches - 1} target{'s' if branches > 2 else ''})"


def split_rows(rows: Tensor, branches: int) -> tuple[Tensor, Tensor]:
    """(pairs x branches, ...) -> the sources (pairs, ...) and the targets (pairs x targets, ...)."""
    is_source = torch.arange(rows.shape[0]) % branches == 0
    return rows[is_source], rows[~is_source]


def tie_rows(noise: Tensor, branches: int) -> Tensor:
    """Noise in which every branch of a pair has its source's."""
    return repeat(noise[::branches], "b ... -> (b n) ...", n=branches)
