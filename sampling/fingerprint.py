"""What a run is given, as values that a later run can be compared with."""

from __future__ import annotations

import uuid
import weakref
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from .host import KEY
from .run import Run

_NOT_SEEN = ("uuid", KEY)
"""What the pack and the host write into conditionings and options anew for every run."""


_BY_VALUE = (str, bytes, int, float, complex, bool, type(None), uuid.UUID, torch.dtype, torch.device)


def frozen(value: Any, run: Run, own: bool = False) -> Any:
    """A run's inputs as values to compare later: of tensors with the batch's rows the sources' rows.

    Objects of the host and of other nodes are not kept alive for it. own: within the pair's own conditioning,
    whose tensors have one row for each branch.
    """
    if isinstance(value, dict):
        own = own or KEY in value
        return {name: frozen(entry, run, own) for name, entry in value.items() if name not in _NOT_SEEN}
    if isinstance(value, list | tuple):
        return [frozen(entry, run, own) for entry in value]
    if isinstance(value, Tensor):
        batch = (run.shape[0], run.branches) if own else (run.shape[0],)
        rows = value[:: run.branches] if value.ndim and value.shape[0] in batch else value
        return rows.to("cpu", copy=True)
    if hasattr(value, "cond") and type(value).__module__ == "comfy.conds":
        return [frozen(type(value), run), frozen(value.cond, run, own)]
    if isinstance(value, _BY_VALUE):
        return value
    try:
        return weakref.WeakMethod(value) if isinstance(value, MethodType) else weakref.ref(value)
    except TypeError:
        return object()  # equal to nothing


def same(a: Any, b: Any) -> bool:
    """Whether two frozen values agree: tensors by their values, objects by being the same and still there."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, weakref.ref) and isinstance(b, weakref.ref):
        thing, other = a(), b()
        return thing is not None and (thing is other or (isinstance(thing, MethodType) and thing == other))
    return type(a) is type(b) and isinstance(a, _BY_VALUE) and bool(a == b)
