"""The source run kept for the next edit: forwards that know what the sources give leave them out.

Kept of each forward are the network's output in the sources' rows and, in the layers that were injected, the
sources' queries and keys, in host memory. Runs are the same if they agree in all that the network sees of the
sources: the model's weights and patches, the conditionings, noise and latent. A forward is the same one if
moreover the sources' rows come in with the same values, at the same sigma, in the same order.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Set
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..attention.taken import Taken
from . import host
from .fingerprint import frozen, same
from .forward import is_seen_whole
from .host_memory import host_bytes, to_host
from .network import Layer, of_kind
from .run import Call, Forward, Guest, Run, Sources, Start

GIGABYTE = 2**30


@dataclass(eq=False)
class SourceForward:
    """What one forward of the model was for the sources' rows.

    x (chunks x pairs, ...), sigma and roles say which forward it was; out is its result.
    attention: (q, k) of the layers that were injected, in the rows of the pair's own chunks.
    grids: of the layers with self-attention, their sides as a fraction of the latent's.
    nbytes: host memory of all that is kept.
    """

    x: Tensor
    sigma: float
    roles: tuple
    nbytes: int
    out: Tensor | None = None
    attention: dict[Layer, tuple[Tensor, Tensor]] = field(default_factory=dict)
    grids: dict[Layer, float] = field(default_factory=dict)

    def is_for(self, x: Tensor, sigma: float, roles: tuple) -> bool:
        return (
            (self.sigma, self.roles, self.x.shape) == (sigma, roles, x.shape)
            and self.x.dtype == x.dtype
            and torch.equal(self.x.to(x.device, non_blocking=True), x)
        )

    def suffices(self, call: Call, taken: Taken) -> bool:
        """Whether this is all that the targets of a call take from their sources."""
        if taken.features is not None or any(part.everywhere for part in taken.self_):
            return False
        read: set[Layer] = set()
        if taken.cross is not None and taken.cross.moved is not None:
            read |= set(of_kind(call.run.layers, "cross", "joint"))
        for part in taken.self_:
            cap = max(c for w, c in zip(part.weights, part.largest, strict=True) if w)
            read |= {layer for layer in part.layers if self.grids.get(layer, 0.0) <= cap}
        return read <= self.attention.keys()


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
        self.limits: dict[str, int] = {}

    @property
    def nbytes(self) -> int:
        return sum(run.nbytes for run in self.runs)

    def clear(self) -> None:
        self.runs.clear()
        self.limits.clear()

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

    def allow(self, keep: Keep) -> int:
        """The limit in bytes now that a node asks to `keep` this much; what is beyond it is given up at once.

        It is the largest that a node of the graph asks for: one that keeps nothing, such as a second pass,
        does not take away what another one keeps.
        """
        self.limits = {node: limit for node, limit in self.limits.items() if node in keep.graph}
        self.limits[keep.node] = keep.nbytes
        limit = max(self.limits.values())
        before = len(self.runs)
        while self.runs and (self.nbytes > limit or not limit):
            self.runs.pop(0)
        if len(self.runs) < before:
            _free_pinned()
        return limit

    def _forget(self, model: weakref.ref) -> None:
        self.runs = [run for run in self.runs if run.model is not model]
        _free_pinned()


def _free_pinned() -> None:
    """PyTorch keeps freed pinned memory for itself."""
    accelerator = getattr(torch, "accelerator", None)
    getattr(accelerator, "empty_host_cache", lambda: None)()


CACHE = SourceCache()


@dataclass(frozen=True)
class Keep:
    """How much of source runs to keep: an `Entry`.

    gigabytes: host memory, in GB (2^30 bytes), of all kept runs together; 0 for none.
    node, graph: the node that asks, and all nodes of its graph, as the host calls them.
    """

    gigabytes: float = 0.0
    node: str = ""
    graph: Set[str] = frozenset()

    @property
    def nbytes(self) -> int:
        return int(self.gigabytes * GIGABYTE)

    def begin(self, run: Run, start: Start, cache: SourceCache | None = None) -> Guest:
        cache = CACHE if cache is None else cache
        limit = cache.allow(self)
        return Reuse(run, cache, limit) if self.nbytes else Guest()


NOTHING_KEPT = Keep()


class Reuse(Guest):
    """One run's use of the cache. limit: bytes. reused: forwards without sources, of `forwards` so far."""

    def __init__(self, run: Run, cache: SourceCache, limit: int):
        self.run, self.cache, self.limit = run, cache, limit
        self.source: SourceRun | None = None
        self.forwards = self.reused = 0

    def conditioned(self, guider: Any, start: tuple) -> None:
        """Look for a kept run of the same sources; not where several GPUs share the model calls."""
        if host.is_multigpu(guider.model_options):
            logging.info("[prompt-to-prompt] several GPUs: the source run is neither kept nor reused")
            return
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
        self.source = self.cache.open(patcher.model, frozen(seen, self.run))

    def sources(self, forward: Forward, call: Call | None, taken: Taken) -> Sources | None:
        if self.source is None or forward.x.shape[0] % self.run.branches:
            return None
        x, sigma, roles = forward.x[:: self.run.branches], self.run.sigma, self._roles(forward.options)
        known = self.source.forwards.get(self.forwards)
        self.forwards += 1
        if known is not None and not known.is_for(x, sigma, roles):
            known = None
        reads = call is not None and any(guest.reads for guest in self.run.guests)
        alone = not reads and not _sees_all_rows(forward.options)
        if known is not None and alone and (call is None or known.suffices(call, taken)):
            self.reused += 1
            return Known(known)
        return Keeping(self, self.source, self.forwards - 1, x, sigma, roles, known)

    def _roles(self, options: dict) -> tuple:
        """Whose conditionings a forward computes, which with its sigma tells it from the run's others."""
        own = [chunk in self.run.lengths for chunk in options["uuids"]]
        return (*options["cond_or_uncond"], *own, self.run.injecting)

    def end(self, samples: Tensor) -> None:
        if self.source is not None:
            logging.info(
                "[prompt-to-prompt] %d of %d model calls without the source; kept runs: %.2f of %.2f GB",
                self.reused,
                self.forwards,
                self.cache.nbytes / GIGABYTE,
                self.limit / GIGABYTE,
            )


class Known:
    """The sources are not in the batch: what they give was kept."""

    in_batch: ClassVar[bool] = False

    def __init__(self, forward: SourceForward):
        self.forward = forward

    def begin(self) -> None:
        pass

    def queries_and_keys(self, call: Call, layer: Layer, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """The known ones stand behind the batch's."""
        queries, keys = (x.to(q.device, non_blocking=True) for x in self.forward.attention[layer])
        return torch.cat([q, queries]), torch.cat([k, keys])

    def note_grid(self, layer: Layer, fraction: float) -> None:
        pass

    def out(self, like: Tensor) -> Tensor | None:
        assert self.forward.out is not None
        return self.forward.out.to(like.device, non_blocking=True)

    def end(self, out: Tensor) -> None:
        pass


class Keeping:
    """The sources are in the batch, and what they give is kept as forward number `number` of the run.

    known: what is already kept of it, which was too little.
    """

    in_batch: ClassVar[bool] = True

    def __init__(
        self,
        reuse: Reuse,
        source: SourceRun,
        number: int,
        x: Tensor,
        sigma: float,
        roles: tuple,
        known: SourceForward | None,
    ):
        self.reuse, self.source, self.number, self.known = reuse, source, number, known
        before = source.forwards.pop(number, None)
        source.nbytes -= before.nbytes if before is not None else 0
        self.forward = SourceForward(to_host(x), sigma, roles, host_bytes(x))

    def begin(self) -> None:
        forward, known = self.forward, self.known
        forward.attention = dict(known.attention) if known is not None else {}
        forward.grids = dict(known.grids) if known is not None else {}
        kept = (host_bytes(x) for pair in forward.attention.values() for x in pair)
        forward.nbytes = host_bytes(forward.x) + sum(kept)

    def queries_and_keys(self, call: Call, layer: Layer, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the batch; the sources' are kept if there is room."""
        if q.shape[0] == k.shape[0] == call.batch and call.own and layer not in self.forward.attention:
            queries, keys = (x.index_select(0, call.source_rows()) for x in (q, k))
            size = host_bytes(queries) + host_bytes(keys)
            if self._has_room(self.forward.nbytes + size):
                self.forward.attention[layer] = (to_host(queries), to_host(keys))
                self.forward.nbytes += size
        return q, k

    def note_grid(self, layer: Layer, fraction: float) -> None:
        self.forward.grids[layer] = fraction

    def out(self, like: Tensor) -> Tensor | None:
        return None

    def end(self, out: Tensor) -> None:
        sources = out[:: self.reuse.run.branches]
        self.forward.nbytes += host_bytes(sources)
        if self._has_room(self.forward.nbytes):
            self.forward.out = to_host(sources)
            self.source.forwards[self.number] = self.forward
            self.source.nbytes += self.forward.nbytes

    def _has_room(self, nbytes: int) -> bool:
        return self.reuse.cache.has_room(self.source, nbytes, self.reuse.limit)


def _sees_all_rows(options: dict) -> bool:
    """Whether another node acts inside attention, where it may mix the batch's rows or split them."""
    patches = options.get("patches", {})
    return is_seen_whole(options) or bool(patches.get("attn1_patch") or patches.get("attn2_patch"))
