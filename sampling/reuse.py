"""The source run kept for the next edit: forwards that know what the sources give leave them out.

Kept of each forward are the network's output in the sources' rows and, in the layers that were injected, the
sources' queries and keys, in host memory. Runs are the same if they agree in all that the network sees of the
sources: the model's weights and patches, the conditionings, noise and latent. A forward is the same one if
moreover the sources' rows come in with the same values, at the same sigma, in the same order.
"""

from __future__ import annotations

import logging
import uuid
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from comfy.cli_args import args as host_args
from torch import Tensor

from .encode import KEY
from .injection import Slot
from .run import BlockKey, Run

GIGABYTE = 2**30


@dataclass(eq=False)
class SourceForward:
    """What one forward of the model was for the sources' rows.

    x (chunks x pairs, ...), sigma and roles say which forward it was; out is its result.
    attention: (q, k) of the layers that were injected, in the rows of the pair's own chunks.
    grids: of the layers with self-attention, their sides as a fraction of the latent's.
    room: takes a number of bytes and says whether they may be kept. nbytes: host memory of all that is kept.
    """

    x: Tensor
    sigma: float
    roles: tuple
    room: Callable[[int], bool]
    nbytes: int
    out: Tensor | None = None
    attention: dict[Slot, tuple[Tensor, Tensor]] = field(default_factory=dict)
    grids: dict[BlockKey, float] = field(default_factory=dict)

    def is_for(self, x: Tensor, sigma: float, roles: tuple) -> bool:
        return (
            (self.sigma, self.roles, self.x.shape) == (sigma, roles, x.shape)
            and self.x.dtype == x.dtype
            and torch.equal(self.x.to(x.device, non_blocking=True), x)
        )

    def keep(self, slot: Slot, q: Tensor, k: Tensor) -> None:
        """Keep the sources' queries and keys of a layer, if there is room."""
        size = host_bytes(q) + host_bytes(k)
        if slot not in self.attention and self.room(self.nbytes + size):
            self.attention[slot] = (to_host(q), to_host(k))
            self.nbytes += size


@dataclass(eq=False)
class SourceRun:
    """A run's sources, forward by forward. model: the network that it was made with, while it lives."""

    model: weakref.ref
    fingerprint: Any
    forwards: dict[int, SourceForward] = field(default_factory=dict)
    nbytes: int = 0


class SourceCache:
    """The source runs that are kept, the latest last."""

    def __init__(self) -> None:
        self.runs: list[SourceRun] = []

    @property
    def nbytes(self) -> int:
        return sum(run.nbytes for run in self.runs)

    def clear(self) -> None:
        self.runs.clear()

    def open(self, model: Any, fingerprint: Any) -> SourceRun:
        """The kept run of this model and fingerprint, or a new one."""
        found = next(
            (run for run in self.runs if run.model() is model and same(run.fingerprint, fingerprint)), None
        )
        if found is None:
            found = SourceRun(weakref.ref(model, self._forget), fingerprint)
        else:
            self.runs.remove(found)
        self.runs.append(found)
        return found

    def has_room(self, wanted: SourceRun, nbytes: int, limit: int) -> bool:
        """Whether `nbytes` more for the wanted run stay within the limit, older runs given up if need be."""
        while self.nbytes + nbytes > limit and self.runs and self.runs[0] is not wanted:
            self.runs.pop(0)
        return self.nbytes + nbytes <= limit

    def _forget(self, model: weakref.ref) -> None:
        self.runs = [run for run in self.runs if run.model is not model]
        accelerator = getattr(torch, "accelerator", None)  # which keeps freed pinned memory for itself
        getattr(accelerator, "empty_host_cache", lambda: None)()


CACHE = SourceCache()


@dataclass(eq=False)
class Reuse:
    """One run's use of the cache. limit: bytes. reused: forwards without sources, of `forwards` so far."""

    source: SourceRun
    limit: int
    cache: SourceCache
    forwards: int = 0
    reused: int = 0

    def next(self, x: Tensor, sigma: float, roles: tuple) -> SourceForward | None:
        """What is kept of the run's next forward, if anything. x: the sources' rows."""
        known = self.source.forwards.get(self.forwards)
        self.forwards += 1
        return known if known is not None and known.is_for(x, sigma, roles) else None

    def begin(self, x: Tensor, sigma: float, roles: tuple, known: SourceForward | None) -> SourceForward:
        """Room for what this forward gives, in place of what was kept; `known` of it stays."""
        before = self.source.forwards.pop(self.forwards - 1, None)
        self.source.nbytes -= before.nbytes if before is not None else 0
        fresh = SourceForward(to_host(x), sigma, roles, self._has_room, host_bytes(x))
        if known is not None:
            fresh.grids.update(known.grids)
            for slot, (q, k) in known.attention.items():
                fresh.attention[slot] = (q, k)
                fresh.nbytes += host_bytes(q) + host_bytes(k)
        return fresh

    def _has_room(self, nbytes: int) -> bool:
        return self.cache.has_room(self.source, nbytes, self.limit)

    def keep(self, forward: SourceForward, out: Tensor) -> None:
        """Keep a forward that has ended. out: the result in the sources' rows."""
        forward.nbytes += host_bytes(out)
        if self._has_room(forward.nbytes):
            forward.out = to_host(out)
            self.source.forwards[self.forwards - 1] = forward
            self.source.nbytes += forward.nbytes

    def report(self) -> None:
        logging.info(
            "[prompt-to-prompt] %d of %d model calls without the source; kept source runs: %.2f of %.2f GB",
            self.reused,
            self.forwards,
            self.cache.nbytes / GIGABYTE,
            self.limit / GIGABYTE,
        )


def begin_reuse(guider: Any, run: Run, start: tuple, limit: int, cache: SourceCache = CACHE) -> Reuse | None:
    """Look for a kept run of the same sources. None where several GPUs share the model calls.

    guider: the host's, with its conditionings processed. start: noise, latent and mask of the run.
    """
    if guider.model_options.get("multigpu_clones"):
        logging.info("[prompt-to-prompt] several GPUs: the source run is neither kept nor reused")
        return None
    patcher = guider.model_patcher
    seen = {
        "patches": patcher.patches_uuid,
        "objects": patcher.object_patches,
        "injections": patcher.injections,
        "attachments": patcher.attachments,
        "models": patcher.additional_models,
        "options": guider.model_options,
        "conds": guider.conds,
        "start": start,
    }
    return Reuse(cache.open(patcher.model, frozen(seen, run)), limit, cache)


def to_host(x: Tensor) -> Tensor:
    """A copy in host memory, made while a GPU goes on if that memory is pinned."""
    if not _pins(x):
        return x.to("cpu", copy=True)
    host = host_memory(x)
    return host.copy_(x, non_blocking=host.is_pinned())


def host_memory(x: Tensor) -> Tensor:
    """Host memory for a copy of x: pinned, or ordinary memory where the system pins no more."""
    try:
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    except RuntimeError:
        return torch.empty(x.shape, dtype=x.dtype)


def host_bytes(x: Tensor) -> int:
    """Bytes that `to_host` takes for x, or that x takes there: PyTorch pins blocks of powers of two."""
    return 1 << (x.nbytes - 1).bit_length() if _pins(x) or x.is_pinned() else x.nbytes


def _pins(x: Tensor) -> bool:
    return x.device.type == "cuda" and not getattr(host_args, "disable_pinned_memory", False)


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
