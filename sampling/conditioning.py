"""The pair's conditionings: source and targets side by side, and what belongs to items laid out for pairs.

Rows are ordered (pair, branch), the branch running fastest: source, target 1 .. N, source, target 1 .. N ...
The host gives row i of a batch the value number i modulo the number of values. In a paired batch the rows of
an item are its branches, so values that belong to items are repeated over these before the run.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Container, Mapping
from functools import partial
from typing import Any

import comfy.utils
import torch
from einops import repeat
from torch import Tensor

from ..attention.edit import Edit
from ..attention.plan import conditioning_length
from .encode import encoded
from .host import KEY


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


SEEN = (
    ("concat_latent_image", "concat_mask"),
    ("control", "control_apply_to_uncond"),
    ("gligen",),
    ("reference_latents",),
    ("reference_latents_method",),
    ("guidance",),
)
"""Options of a conditioning that the host's nodes, or the host itself, put on positive and negative alike."""


def seeing_images_of(negative: list, positive: list) -> list:
    """The positive CONDITIONING with what the negative one was given for the model to see.

    That is the image of inpainting and InstructPix2Pix models, the ControlNets and T2I-Adapters, GLIGEN's
    boxes, reference images and the guidance of distilled models; of each, what the first of several negatives
    with any has.
    """
    seen: dict[str, Any] = {}
    given: dict[str, Any]
    for names in SEEN:
        given = next((options for _, options in negative if options.get(names[0]) is not None), {})
        seen |= {name: given[name] for name in names if name in given}
    return [[cond, {**seen, **options}] for cond, options in positive]


def own_conditionings(conds: Mapping[str, list[dict]], edit: Edit, mark: str) -> dict[uuid.UUID, int]:
    """The entries of a run's conditionings that are the pair's own: uuid -> length in tokens; in place.

    For prompts with areas the host makes copies that have one entry's options, mark and uuid included,
    and another's tensors. A copy with the pair's own tensors is the pair's, any other loses the mark, and
    every copy gets a uuid of its own.
    """
    own: dict[uuid.UUID, int] = {}
    tensors: list[Any] = []
    for name, entries in conds.items():
        for entry in entries:
            if entry.get(KEY) == mark and _has_own_tensors(entry):
                if "negative" not in name:  # PerpNegGuider's is "empty_negative_prompt"
                    tensors.append(entry["model_conds"]["c_crossattn"])
                elif any(
                    _begins_with(entry["cross_attn"], cond) for cond, _ in encoded(edit)[0].conditioning
                ):
                    raise ValueError(
                        "The Attention Controller's positive conditioning is connected to a "
                        "negative input. Connect an ordinary CLIP Text Encode there."
                    )
    for entries in conds.values():
        for n, entry in enumerate(entries):
            used = entry["model_conds"].get("c_crossattn")
            if any(used is tensor for tensor in tensors):
                entries[n] = {**entry, KEY: mark, "uuid": uuid.uuid4()}
                own[entries[n]["uuid"]] = used.cond.shape[1]
            elif entry.get(KEY) == mark:
                entries[n] = {k: v for k, v in entry.items() if k != KEY} | {"uuid": uuid.uuid4()}
    if not own:
        raise ValueError(
            "The model comes from an Attention Controller, but the positive conditioning does not. "
            "Connect that controller's positive output, or use the model from before the controller."
        )
    return own


def _has_own_tensors(entry: dict) -> bool:
    """Whether a conditioning's tensors are those that its options were made with."""
    used, made = entry["model_conds"].get("c_crossattn"), entry.get("cross_attn")
    return used is not None and made is not None and used.cond.shape == made.shape and _same(used.cond, made)


def _begins_with(cond: Tensor, source: Tensor) -> bool:
    return cond.shape[1] >= source.shape[1] and _same(cond[:1, : source.shape[1]], source)


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.to(b.device, b.dtype), b)


PROMPTS = ("cross_attn", "pooled_output", "cross_attn_controlnet", "pooled_output_controlnet")
"""Options that the pair's own conditioning has per branch, and any other one per item."""


def lay_out(conds: dict[str, list[dict]], pairs: int, branches: int) -> None:
    """Lay out masks, ControlNet images, concatenated latents and prompts of several rows; in place.

    conds: of a guider at the beginning of its run, by role; the tensors and ControlNets in them, which are
    the user's values, are left as they are. Entries with a controller's mark keep the rows of their prompts.
    """
    tiled = partial(_tiled, pairs=pairs, branches=branches)
    controls: dict[int, Any] = {}
    for entries in conds.values():
        for entry in entries:
            prompts = () if KEY in entry else PROMPTS
            for name in ("mask", *prompts):
                if _has_rows(entry.get(name), 3 if name == "mask" else 2):
                    entry[name] = tiled(entry[name])
            for name in ("concat_latent_image", "concat_mask"):
                if _has_rows(entry.get(name), 3):
                    items = comfy.utils.resize_to_batch_size(entry[name], pairs)  # as the host does
                    entry[name] = repeat(items, "b ... -> (b n) ...", n=branches)
            if entry.get("control") is not None:
                entry["control"] = _laid_out_control(entry["control"], tiled, controls)


def _tiled(values: Tensor, pairs: int, branches: int) -> Tensor:
    """Value p modulo their number for each pair p, on each of its branches."""
    items = torch.arange(pairs, device=values.device) % values.shape[0]
    return values[items.repeat_interleave(branches)]


def _has_rows(value: Any, dimensions: int) -> bool:
    return torch.is_tensor(value) and value.ndim >= dimensions and value.shape[0] > 1


def _laid_out_control(control: Any, tiled: Callable[[Tensor], Tensor], made: dict[int, Any]) -> Any:
    """A ControlNet, or the chain that it ends, with images for every row; itself where one does for all.

    made: what was made for each; conditionings that share one keep sharing it, and so a model call.
    """
    if id(control) not in made:
        previous = control.previous_controlnet
        before = None if previous is None else _laid_out_control(previous, tiled, made)
        images = control.cond_hint_original
        result = control
        if before is not previous or _has_rows(images, 4):
            result = control.copy()
            result.previous_controlnet = before
            if _has_rows(images, 4):
                count = images.shape[0]
                result.cond_hint_original = tiled(images)
                result.extra_concat_orig = [
                    tiled(comfy.utils.repeat_to_batch_size(extra, count)) if extra.shape[0] > 1 else extra
                    for extra in control.extra_concat_orig
                ]
        made[id(control)] = result
    return made[id(control)]
