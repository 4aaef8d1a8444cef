"""Forwards in parts, each the sources with some of their targets, where all targets do not fit in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import comfy.model_management
import torch
from torch import Tensor
from torch.random import fork_rng

from .run import Group, Part, Run

if TYPE_CHECKING:
    from .reuse import SourceForward


def fitting_groups(model: Any, x: Tensor, run: Run) -> tuple[Group, ...]:
    """The targets in as few groups as fit in the device's free memory, by the host's own estimate.

    model: the host's BaseModel. x (pairs x branches, channels, height, width).
    """
    targets = run.branches - 1
    pairs = x.shape[0] // run.branches
    host = comfy.model_management
    free = getattr(model.current_patcher, "get_free_memory", host.get_free_memory)(x.device)
    for count in range(1, targets):
        rows = pairs * (1 + -(-targets // count))
        if model.memory_required([rows, *x.shape[1:]]) <= free:
            return _groups(targets, count)
    return _groups(targets, targets)


def _groups(targets: int, count: int) -> tuple[Group, ...]:
    size = -(-targets // count)
    return tuple(tuple(range(first, min(first + size, targets))) for first in range(0, targets, size))


def replaces_attention(options: dict) -> bool:
    """Whether another node's function stands in attention's place, by transformer_options.

    Such a function may go by the batch's rows or remember them, so it has to see all of them at once.
    """
    slots = options.get("patches_replace", {})
    return bool(slots.get("attn1") or slots.get("attn2"))


Forward = Callable[[Part, Tensor, tuple, dict, dict], Tensor]
"""The part that it computes, its x, the arguments after x, its transformer_options, and arguments by name."""


def forward_in_groups(
    run: Run,
    x: Tensor,
    args: tuple,
    options: dict,
    kwargs: dict,
    forward: Forward,
    known: SourceForward | None = None,
    kept: SourceForward | None = None,
) -> Tensor:
    """The forward of a whole batch, in the run's groups of targets; in smaller ones once memory runs out.

    Every group has the sources with it, whose result is the first group's; or none has, if what they give is
    known. kept: where to keep it, if all goes in one group. Arguments that have one row for each of the
    batch's, at any depth of lists and dicts, are split with it, and such tensors in the options. A batch that
    is not made of pairs stays whole, and one whose attention another node replaces.
    """
    everyone: Group = tuple(range(run.branches - 1))
    whole = x.shape[0] % run.branches != 0 or replaces_attention(options)
    while True:
        try:
            if whole or (run.groups == (everyone,) and known is None):
                return forward(Part(everyone, None, kept), x, _copied(args), options, _copied(kwargs))
            return _split(run, x, args, options, kwargs, forward, known)
        except Exception as error:
            largest = max(map(len, run.groups))
            if whole or largest == 1 or not _is_out_of_memory(error):
                raise
            run.groups = _groups(run.branches - 1, -(-(run.branches - 1) // (largest // 2)))
        comfy.model_management.soft_empty_cache()


def _is_out_of_memory(error: Exception) -> bool:
    """As the host tells it, which knows more than one such exception in later versions."""
    host = comfy.model_management
    return host.is_oom(error) if hasattr(host, "is_oom") else isinstance(error, host.OOM_EXCEPTION)


def _split(
    run: Run,
    x: Tensor,
    args: tuple,
    options: dict,
    kwargs: dict,
    forward: Forward,
    known: SourceForward | None,
) -> Tensor:
    """All groups draw the same random numbers, as one forward of the whole batch would."""
    result: Tensor | None = None
    if known is not None:
        assert known.out is not None
        result = known.out.new_empty((x.shape[0], *known.out.shape[1:]), device=x.device)
        result[:: run.branches] = known.out.to(x.device, non_blocking=True)
    devices = [x.device] if x.device.type == "cuda" else []
    for group in run.groups:
        part = Part(group, known)
        rows = _rows(run, x, part)
        own = {
            name: value.index_select(0, rows) if name != "sample_sigmas" and _is_batch(value, x) else value
            for name, value in options.items()
        }
        if "middle_patch" in own.get("patches", {}):
            patches = [_of_whole_batch(patch, rows, x.shape[0]) for patch in own["patches"]["middle_patch"]]
            own["patches"] = {**own["patches"], "middle_patch": patches}
        with fork_rng(devices, enabled=group != run.groups[-1]):
            out = forward(part, x.index_select(0, rows), _taken(args, x, rows), own, _taken(kwargs, x, rows))
        if result is None:
            result = out.new_empty((x.shape[0], *out.shape[1:]))
        elif known is None:  # the sources are there already
            rows, out = (_without_sources(value, len(group)) for value in (rows, out))
        result.index_copy_(0, rows, out)
    assert result is not None
    return result


def _rows(run: Run, x: Tensor, part: Part) -> Tensor:
    """The part's rows of the batch."""
    branches = part.branches
    key = ("part rows", x.shape[0], tuple(branches), x.device)
    if key not in run.made:
        rows = [first + branch for first in range(0, x.shape[0], run.branches) for branch in branches]
        run.made[key] = torch.tensor(rows, dtype=torch.long, device=x.device)
    return run.made[key]


def _without_sources(value: Tensor, targets: int) -> Tensor:
    return value.unflatten(0, (-1, 1 + targets))[:, 1:].flatten(0, 1)


def _of_whole_batch(patch: Callable, rows: Tensor, batch: int) -> Callable:
    """A patch whose own tensors have a row for each of the batch's (GLIGEN's), for some of the rows only."""

    def of_part(x: Tensor, extra_options: dict) -> Tensor:
        whole = x.new_zeros((batch, *x.shape[1:])).index_copy_(0, rows, x)
        return patch(whole, extra_options).index_select(0, rows)

    return of_part


def _is_batch(value: Any, x: Tensor) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == x.shape[0]


def _taken(value: Any, x: Tensor, rows: Tensor) -> Any:
    if isinstance(value, dict):
        return {name: _taken(entry, x, rows) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_taken(entry, x, rows) for entry in value)
    return value.index_select(0, rows.to(value.device)) if _is_batch(value, x) else value


def _copied(value: Any) -> Any:
    """Lists and dicts anew, for a forward may take entries out of them."""
    if isinstance(value, dict):
        return {name: _copied(entry) for name, entry in value.items()}
    return type(value)(map(_copied, value)) if isinstance(value, list | tuple) else value
