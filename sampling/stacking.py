"""The pair's conditionings on transformers: one for each branch until the host has made them, then one.

In a joint softmax a repeated prompt would count twice, so prompts of unequal length are padded, on the side
on which that is exact, and attention leaves the padding out (`overrides`). What the model is given is not
what the text encoder gave (some families pad, project or mask it first), so each branch's own is made first.
"""

from __future__ import annotations

import itertools
import math
import uuid
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.edit import Edit
from .control_nets import by_branch
from .encode import encoded
from .families import Family
from .host import KEY
from .run import Lengths

BRANCH = "prompt_to_prompt_branch"
"""An entry of the pair's CONDITIONING has under this key the number of the branch that it belongs to."""


def branch_conditioning(edit: Edit, mark: str, family: Family, network: Any) -> list:
    """The host's CONDITIONING with an entry for each branch, each marked as the controller's own.

    Raises ValueError if the prompts were encoded into different numbers of entries, or have lengths that the
    family cannot have side by side.
    """
    branches = [prompt.conditioning for prompt in encoded(edit)]
    if len({len(entries) for entries in branches}) != 1:
        raise ValueError(
            "Source and targets were encoded into different numbers of conditionings "
            f"({', '.join(str(len(entries)) for entries in branches)}); use the same CLIP for all of them."
        )
    alike = list(zip(*branches, strict=True))
    for entries in alike:
        check_lengths(tuple((cond.shape[1],) for cond, _ in entries), family, network)
    return [
        [cond, {**options, KEY: mark, BRANCH: branch}]
        for entries in alike
        for branch, (cond, options) in enumerate(entries)
    ]


def longest(texts: Lengths) -> int:
    """Tokens of a text after padding, its parts together."""
    return sum(max(lengths) for lengths in zip(*texts, strict=True))


def check_lengths(texts: Lengths, family: Family, network: Any) -> None:
    """Raise ValueError for prompts of unequal length that would not be what they are alone."""
    if len(set(texts)) == 1:
        return
    given = " and ".join(str(sum(lengths)) for lengths in texts)
    what = f"The prompts of the edit have {given} tokens, and {family.name} "
    advice = " Write prompts of as many tokens, for example by adding or dropping a word."
    if family.padding is None:
        raise ValueError(f"{what}needs as many in source and targets. {family.unequal}{advice}")
    if sum(any(part) for part in zip(*texts, strict=True)) > 1:
        raise ValueError(f"{what}reads them in several parts, whose lengths have to be equal.{advice}")
    if family.multiple is not None:
        multiple = getattr(network, family.multiple)
        filled = {math.ceil(sum(lengths) / multiple) * multiple for lengths in texts}
        if len(filled) > 1:
            raise ValueError(
                f"{what}fills each up to a multiple of {multiple} tokens, which here are "
                f"{' and '.join(map(str, sorted(filled)))}: source and targets need the same."
                " Write prompts of more alike length."
            )


def stack_branches(
    conds: dict[str, list[dict]], edit: Edit, mark: str, family: Family, network: Any
) -> dict[uuid.UUID, Lengths]:
    """Put the branches' entries together into one, in place: uuid -> lengths of the branches' texts.

    conds: of a guider, by role, as the host processed them.
    Raises ValueError where the pair's entries are not there, not whole or in a negative input.
    """
    texts: dict[uuid.UUID, Lengths] = {}
    for role, entries in conds.items():
        marked = [entry for entry in entries if entry.get(KEY) == mark]
        if not marked:
            continue
        if "negative" in role:
            raise ValueError(
                "The Attention Controller's positive conditioning is connected to a negative input. Connect "
                "an ordinary CLIP Text Encode there."
            )
        _check_areas(conds)
        groups = [marked[n : n + edit.branches] for n in range(0, len(marked), edit.branches)]
        stacked = {}
        for group in groups:
            if [entry.get(BRANCH) for entry in group] != list(range(edit.branches)):
                raise ValueError(
                    "Another node took conditionings of the Attention Controller's positive output apart or "
                    "changed their order; connect that output as a whole."
                )
            entry, lengths = _stacked(group, family, network)
            texts[entry["uuid"]] = lengths
            stacked[id(group[0])] = entry
        conds[role] = [
            stacked.get(id(entry), entry)
            for entry in entries
            if entry.get(KEY) != mark or id(entry) in stacked
        ]
    if not texts:
        raise ValueError(
            "The model comes from an Attention Controller, but the positive conditioning does not. "
            "Connect that controller's positive output, or use the model from before the controller."
        )
    return texts


def _check_areas(conds: dict[str, list[dict]]) -> None:
    if any("area" in entry for entries in conds.values() for entry in entries):
        raise ValueError(
            "A conditioning is limited to an area, which does not work on transformers yet; take out "
            "Conditioning (Set Area), or limit it by a mask instead."
        )


def _stacked(group: Sequence[dict], family: Family, network: Any) -> tuple[dict, Lengths]:
    """One entry from those of the branches, a row for each in all that differs, and their texts' lengths."""
    given = [entry["model_conds"] for entry in group]
    if len({frozenset(conds) for conds in given}) > 1:
        names = sorted(set().union(*given) - set(given[0]).intersection(*given))
        raise ValueError(
            f"Source and targets were encoded differently: only some of them have {', '.join(names)}. Use "
            "the same CLIP and settings for all of them."
        )
    arguments = [{name: value.cond for name, value in conds.items()} for conds in given]
    texts = tuple(family.text_lengths(values) for values in arguments)
    check_lengths(texts, family, network)
    axes = {part.key: part.axis for part in family.texts}
    conds = {
        name: _in_rows(name, [values[name] for values in given], axes.get(name), family.padding == "front")
        for name in given[0]
    }
    entry = {**group[0], "model_conds": conds, "uuid": uuid.uuid4()}
    if entry.get("control") is not None:
        entry["control"] = by_branch(entry["control"], texts, family)
    return entry, texts


def _in_rows(name: str, values: Sequence[Any], axis: int | None, front: bool) -> Any:
    """One of the host's conds from one for each branch. axis: of its tokens, of a text."""
    first, contents = values[0], [value.cond for value in values]
    if all(_equal(content, contents[0]) for content in contents):
        return first
    if name == "num_tokens":
        return type(first)(max(contents))
    if axis is None and "mask" in name:
        axis = contents[0].ndim - 1
    if axis is not None:
        length = max(content.shape[axis] for content in contents)
        contents = [_padded(content, axis, length, front) for content in contents]
    images = all(isinstance(content, list) for content in contents)  # of reference, in each entry's order
    parts = list(itertools.zip_longest(*contents)) if images else [tuple(contents)]
    if all(_is_alike(part) for part in parts):
        rows = [torch.cat(part) for part in parts]
        return type(first)(rows if images else rows[0])
    raise ValueError(
        f"Source and targets were encoded into different shapes of {name}; use the same CLIP for all."
    )


def _is_alike(values: Sequence[Any]) -> bool:
    """Whether they are tensors of one row and the same shape."""
    if not all(isinstance(value, Tensor) and value.shape[:1] == (1,) for value in values):
        return False
    return len({value.shape for value in values}) == 1


def _padded(x: Tensor, axis: int, length: int, front: bool) -> Tensor:
    more = length - x.shape[axis]
    return F.pad(x, (0, 0) * (x.ndim - 1 - axis) + ((more, 0) if front else (0, more)))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return type(one) is type(other) and bool(one == other)
