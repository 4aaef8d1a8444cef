"""What one sampling run needs to remember, and what one forward of the model looks like from inside it."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..attention.inject import Rows, paired_rows
from ..attention.schedule import step_of
from .encode import KEY

if TYPE_CHECKING:
    from .maps import MapStore
    from .reuse import Reuse, SourceForward


Group = tuple[int, ...]
"""Numbers of targets, from 0."""
BlockKey = tuple[str, int, int]
"""A transformer block as the host names it: "input", "middle" or "output", number, depth."""


@dataclass(frozen=True, eq=False)
class Part:
    """What of a batch one forward of the model computes.

    targets: those in it, with their sources; without them where `known` has what they give. kept: where to
    keep the sources' attention for later runs, or None.
    """

    targets: Group
    known: SourceForward | None = None
    kept: SourceForward | None = None

    @property
    def branches(self) -> list[int]:
        """The rows of each pair, 0 the source."""
        return [*([0] if self.known is None else []), *(target + 1 for target in self.targets)]


@dataclass(eq=False)
class Run:
    """One sampling run; dropped at its end. It travels in the run's own `transformer_options`.

    sigmas: the run's list. shape: of the sampler's batch, (pairs x branches, channels, height, width).
    branches: rows of a pair. maps: the words' maps, if they are wanted. blend: the latest mask of the local
    blend, (pairs, targets, height, width).
    lengths: uuid of each of the pair's own conditioning entries -> its number of tokens.
    groups: the targets that go through the model together, all of them if memory allows.
    reuse: what is kept of the sources for later runs, and known from earlier ones, if that is wanted.
    injecting: whether the model calls under way belong to the pair's own prediction.
    predicted: whether that prediction was already made for this call of the sampler.
    made: what is worked out once per run, by key.
    """

    sigmas: list[float]
    shape: tuple[int, ...]
    branches: int
    maps: MapStore | None = None
    blend: Tensor | None = None
    lengths: dict[uuid.UUID, int] = field(default_factory=dict)
    groups: tuple[Group, ...] = ()
    reuse: Reuse | None = None
    injecting: bool = False
    predicted: bool = False
    made: dict[tuple, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.groups = self.groups or (tuple(range(self.branches - 1)),)

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1


def run_of(options: dict) -> Run | None:
    """The run that `model_options` belong to."""
    return options.get("transformer_options", {}).get(KEY)


@dataclass(frozen=True, eq=False)
class Call:
    """One forward of the diffusion model within the pair's own prediction.

    x (b, channels, height, width): the batch, `chunks` conditionings of `size` rows each. context (b, L, c).
    options: the forward's transformer_options. own: chunks that are the pair's positive conditioning; the
    others of this prediction are its negative ones, or other nodes'. part: what of the batch it computes.
    network: the host's U-Net whose forward it is.
    """

    run: Run
    x: Tensor
    context: Tensor
    options: dict
    step: int
    chunks: int
    own: tuple[int, ...]
    part: Part
    network: Any

    @property
    def size(self) -> int:
        return self.x.shape[0] // self.chunks

    @property
    def length(self) -> int:
        """Tokens of the pair's own conditioning, which the host may have repeated in `context`."""
        uuids = self.options["uuids"]
        lengths = {self.run.lengths[uuids[n]] for n in self.own}
        if len(lengths) > 1:
            raise ValueError(
                "Conditionings of one Attention Controller meet in a model call with different numbers of "
                f"tokens ({', '.join(map(str, sorted(lengths)))}); concatenate the same text to all of them."
            )
        return lengths.pop()

    @property
    def copies(self) -> int:
        """How often `context` repeats the pair's own conditioning, beside a longer negative prompt."""
        return self.context.shape[1] // self.length

    def rows(self, chunks: tuple[int, ...], active: tuple[bool, ...] | None = None) -> Rows:
        """The targets' rows in some of the chunks; of all targets, or of those that are active, by number."""
        targets, known = self.part.targets, self.part.known is not None
        key = ("rows", self.x.shape[0], self.size, chunks, targets, known, active, self.x.device)
        if key not in self.run.made:
            offsets = [n * self.size for n in chunks]
            taking = [n for n in targets if active is None or active[n]]
            self.run.made[key] = paired_rows(
                self.x.shape[0], targets, offsets, self.size, self.x.device, taking, known
            )
        return self.run.made[key]

    def sources(self, slot: str, q: Tensor, k: Tensor, extra_options: dict) -> tuple[Tensor, Tensor]:
        """Queries and keys of a layer in which `Rows.origin` finds the sources'.

        Those of the batch, or, where the sources are not in it, with the known ones behind. slot: "attn1" or
        "attn2". extra_options: of the host's replacement, which names the layer.
        """
        layer = (slot, _block(extra_options))
        if self.part.known is not None:
            known = self.part.known.attention[layer]
            return (
                torch.cat([q, known[0].to(q.device, non_blocking=True)]),
                torch.cat([k, known[1].to(k.device, non_blocking=True)]),
            )
        if self.part.kept is not None and q.shape[0] == k.shape[0] == self.x.shape[0]:
            rows = self._source_rows()
            self.part.kept.keep(layer, q.index_select(0, rows), k.index_select(0, rows))
        return q, k

    def keep_grid(self, extra_options: dict, fraction: float) -> None:
        """Note the size of a layer's grid for later runs."""
        if self.part.kept is not None:
            self.part.kept.grids[_block(extra_options)] = fraction

    def _source_rows(self) -> Tensor:
        """The sources' rows in the pair's own chunks."""
        key = ("source rows", self.x.shape[0], self.size, self.own, self.part.targets, self.x.device)
        if key not in self.run.made:
            starts = [n * self.size for n in self.own]
            step = len(self.part.branches)
            rows = [start + row for start in starts for row in range(0, self.size, step)]
            self.run.made[key] = torch.tensor(rows, dtype=torch.long, device=self.x.device)
        return self.run.made[key]


def _block(extra_options: dict) -> BlockKey:
    """The transformer block that the host's replacement is called for."""
    name, number = extra_options["block"][:2]
    return name, number, extra_options["block_index"]


def begin_call(x: Tensor, context: Any, options: dict, sigma: float, part: Part, network: Any) -> Call | None:
    """What this forward is to the run, or None where it is not part of the pair's own prediction.

    sigma: the forward's. part: what of the batch it computes.
    Raises ValueError where another node changed the rows of the call.
    """
    run: Run | None = options.get(KEY)
    if run is None or not run.injecting:
        return None
    uuids = options["uuids"]
    own = tuple(n for n, chunk in enumerate(uuids) if chunk in run.lengths)
    latents = run.shape[0] // run.branches * len(part.branches)
    if own and x.shape[0] != len(uuids) * latents:
        raise ValueError(
            f"A model call has {x.shape[0]} rows where {len(uuids)} conditionings of {latents} latents are "
            "expected: another node between the Attention Controller and the sampler computes several tiles "
            "or windows in one call. Set its tile batch size to 1, or take it out."
        )
    step = step_of(sigma, run.sigmas)
    return Call(run, x, context, options, step, len(uuids), own, part, network)
