"""A forward in parts: groups of targets where memory is short, targets alone where sources are known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.random import fork_rng

from . import host
from .run import IN_BATCH, Forward, Group, Part, Run, Sources

Pieces = list[tuple[Part, Forward]]


def fitting_groups(model: Any, x: Tensor, run: Run) -> tuple[Group, ...]:
    """The targets in as few groups as fit in the device's free memory, by the host's own estimate.

    model: the host's BaseModel. x (pairs x branches, channels, height, width).
    """
    targets = run.branches - 1
    pairs = x.shape[0] // run.branches
    free = host.free_memory(model, x.device)
    for count in range(1, targets):
        rows = pairs * (1 + -(-targets // count))
        if model.memory_required([rows, *x.shape[1:]]) <= free:
            return _groups(targets, count)
    return _groups(targets, targets)


def shrink_groups(run: Run, groups: tuple[Group, ...]) -> bool:
    """After these groups ran out of memory: smaller ones for the rest of the run; False if there are none."""
    largest = max(map(len, groups))
    if largest == 1:
        return False
    with run.lock:
        if run.groups == groups:  # another thread may have done it
            run.groups = _groups(run.branches - 1, -(-(run.branches - 1) // (largest // 2)))
    return True


def _groups(targets: int, count: int) -> tuple[Group, ...]:
    size = -(-targets // count)
    return tuple(tuple(range(first, min(first + size, targets))) for first in range(0, targets, size))


def is_whole(run: Run, forward: Forward) -> bool:
    """Whether a forward cannot be split: a batch that is not made of pairs, or one that others see whole."""
    return forward.x.shape[0] % run.branches != 0 or is_seen_whole(forward.options)


def is_seen_whole(options: dict) -> bool:
    """Whether another node's function stands in attention's place or around the network.

    Such a function may go by the batch's rows or remember them, so it has to see all of them at once.
    options: transformer_options.
    """
    slots = options.get("patches_replace", {})
    return bool(slots.get("attn1") or slots.get("attn2")) or host.wraps_network(options)


def parts(run: Run, forward: Forward, sources: Sources) -> Pieces:
    """The forward of a whole batch in the run's groups of targets.

    Every group has the sources with it, whose result is the first group's; or none has, if what they give is
    known. What is kept of the sources is kept where all goes in one group. Arguments that have one row for
    each of the batch's, at any depth of lists and dicts, are split with it, and such tensors in the options.
    """
    if sources.in_batch and (is_whole(run, forward) or run.groups == (run.everyone,)):
        fresh = replace(forward, args=_copied(forward.args), kwargs=_copied(forward.kwargs))
        return [(Part(run.everyone, sources), fresh)]
    kept = IN_BATCH if sources.in_batch else sources
    return [(part, _piece(run, forward, part)) for part in (Part(group, kept) for group in run.groups)]


def join(run: Run, forward: Forward, sources: Sources, outs: Sequence[tuple[Part, Tensor]]) -> Tensor:
    """The result of the whole batch from those of its parts."""
    if len(outs) == 1 and sources.in_batch:
        return outs[0][1]
    first = outs[0][1]
    result = first.new_empty((forward.x.shape[0], *first.shape[1:]))
    known = sources.out(first)
    if known is not None:
        result[:: run.branches] = known
    for n, (part, out) in enumerate(outs):
        rows = _rows(run, forward.x, part)
        if n > 0 and known is None:  # the sources are there already
            rows, out = (_without_sources(value, len(part.targets)) for value in (rows, out))
        result[rows] = out
    return result


@contextmanager
def one_after_another(run: Run, pieces: Pieces) -> Iterator[Callable[[int], Any]]:
    """For the time of a forward: a context for each part, by number, that gives all the same random numbers.

    So every part draws what one forward of the whole batch would. Generators belong to the process, so where
    there are several parts only one forward of the run goes on at a time.
    """
    if len(pieces) == 1:
        yield lambda number: fork_rng([], enabled=False)
        return
    x = pieces[0][1].x
    devices = [x.device] if x.device.type == "cuda" else []
    with run.lock:
        yield lambda number: fork_rng(devices, enabled=number < len(pieces) - 1)


def _piece(run: Run, forward: Forward, part: Part) -> Forward:
    x, rows = forward.x, _rows(run, forward.x, part)
    options = {
        name: value.index_select(0, rows.to(value.device))
        if name != "sample_sigmas" and _is_batch(value, x)
        else value
        for name, value in forward.options.items()
    }
    if "middle_patch" in options.get("patches", {}):
        patches = [_of_whole_batch(patch, rows, x.shape[0]) for patch in options["patches"]["middle_patch"]]
        options["patches"] = {**options["patches"], "middle_patch": patches}
    return Forward(
        x.index_select(0, rows), _taken(forward.args, x, rows), options, _taken(forward.kwargs, x, rows)
    )


def _rows(run: Run, x: Tensor, part: Part) -> Tensor:
    """The part's rows of the batch."""
    branches = part.branches
    rows = [first + branch for first in range(0, x.shape[0], run.branches) for branch in branches]
    return run.once(
        ("part rows", x.shape[0], tuple(branches), x.device),
        lambda: torch.tensor(rows, dtype=torch.long, device=x.device),
    )


def _without_sources(value: Tensor, targets: int) -> Tensor:
    return value.unflatten(0, (-1, 1 + targets))[:, 1:].flatten(0, 1)


def _of_whole_batch(patch: Callable, rows: Tensor, batch: int) -> Callable:
    """A patch whose own tensors have a row for each of the batch's (GLIGEN's), for some of the rows only."""

    def of_part(x: Tensor, extra_options: dict) -> Tensor:
        whole = x.new_zeros((batch, *x.shape[1:]))
        whole[rows] = x
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
