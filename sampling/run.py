"""What one sampling run remembers, and what one forward of the model is to it."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from ..attention.inject import Numbers, Rows, as_rows, paired_numbers
from ..attention.maps import MapRows, Tokens, map_rows
from ..attention.schedule import in_steps, place_of
from ..attention.taken import Taken
from .families import Family
from .host import KEY
from .network import Layer, Layers

T = TypeVar("T")

Lengths = tuple[tuple[int, ...], ...]
"""Tokens of each branch's text, part by part, without padding."""

Group = tuple[int, ...]
"""Numbers of targets, from 0."""


@dataclass(frozen=True, eq=False)
class Forward:
    """What the host calls its model with: apply_model(x, *args, options, **kwargs).

    x (b, channels, height, width). args: timestep, c_concat, c_crossattn, control. options: the call's own
    transformer_options. kwargs: whatever else the model's conditionings hold.
    """

    x: Tensor
    args: tuple
    options: dict
    kwargs: dict

    @property
    def arguments(self) -> dict[str, Any]:
        """What the conditionings gave, by name."""
        return {**self.kwargs, "c_crossattn": self.context}

    @property
    def context(self) -> Tensor | None:
        """The text, (b, L, c)."""
        return self.args[2]

    def to(self, model: Callable[..., Tensor]) -> Tensor:
        return model(self.x, *self.args, self.options, **self.kwargs)


class Sources(Protocol):
    """Where the targets of a forward find what their sources give."""

    in_batch: ClassVar[bool]
    """Whether the sources' rows are in the batch; if not, what they give stands behind it."""

    def begin(self) -> None:
        """A forward begins, or begins again after it ran out of memory."""
        ...

    def queries_and_keys(self, call: Call, layer: Layer, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q and k of a layer in which `Rows.origin` finds the sources'."""
        ...

    def note_grid(self, layer: Layer, fraction: float) -> None:
        """A self-attention layer has a grid with this fraction of the latent's sides."""
        ...

    def out(self, like: Tensor) -> Tensor | None:
        """The forward's result in the sources' rows, if they are not in the batch. like: for the device."""
        ...

    def end(self, out: Tensor) -> None:
        """The forward has ended. out: its result, of the whole batch."""
        ...


class InBatch:
    """The sources are in the batch, and nothing is kept of them."""

    in_batch: ClassVar[bool] = True

    def begin(self) -> None:
        pass

    def queries_and_keys(self, call: Call, layer: Layer, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q, k

    def note_grid(self, layer: Layer, fraction: float) -> None:
        pass

    def out(self, like: Tensor) -> Tensor | None:
        return None

    def end(self, out: Tensor) -> None:
        pass


IN_BATCH: Sources = InBatch()


@dataclass(frozen=True, eq=False)
class Part:
    """What of a batch goes through the model at once: these targets, with their sources or without them."""

    targets: Group
    sources: Sources = IN_BATCH

    @property
    def branches(self) -> list[int]:
        """The rows of each pair, 0 the source."""
        return [*([0] if self.sources.in_batch else []), *(target + 1 for target in self.targets)]


@dataclass(frozen=True, eq=False)
class Call:
    """One forward of the model within the pair's own prediction, or a part of it.

    batch: its rows b, in `chunks` conditionings. own: the chunks that are the pair's positive conditioning;
    the others are its negative ones, or other nodes'. size: height and width of the latent. tokens: L of the
    text, which the host may have repeated; length: t of the pair's own conditioning, None without an own
    chunk. part: the targets that it computes. texts: tokens of each branch's text without padding, of
    transformers only.
    """

    run: Run
    batch: int
    chunks: int
    own: tuple[int, ...]
    size: tuple[int, int]
    device: torch.device
    tokens: int
    length: int | None
    part: Part
    texts: Lengths | None = None

    def progress(self, measure: str = "steps") -> float:
        """The call's place in the run, from 0 to 1."""
        return self.run.progress(measure)[self.run.place]

    @property
    def chunk(self) -> int:
        """Rows of a chunk."""
        return self.batch // self.chunks

    @property
    def copies(self) -> int:
        """How often the text repeats the pair's own conditioning, beside a longer negative prompt."""
        assert self.length is not None
        return self.tokens // self.length

    @property
    def is_whole_image(self) -> bool:
        """Whether it computes the whole latent, and not an area or a tile of it."""
        return self.size == self.run.shape[-2:]

    def of(self, part: Part) -> Call:
        """The same call as it is for some of the targets."""
        return replace(self, batch=self.batch // self.run.branches * len(part.branches), part=part)

    def rows(self, everywhere: bool = False, taking: Collection[int] | None = None) -> Rows:
        """The targets' rows in the pair's own chunks, or in all chunks.

        taking: of these targets, by number; of all of them by default.
        """
        chunks = tuple(range(self.chunks)) if everywhere else self.own
        return self.rows_in(chunks, None if taking is None else tuple(taking))

    def rows_in(self, chunks: tuple[int, ...], taking: Group | None) -> Rows:
        """The targets' rows in some chunks."""
        numbers = self.numbers_in(chunks, taking)
        key = ("rows", *self._pairing(chunks, taking), self.device)
        return self.run.once(key, lambda: as_rows(numbers, self.device))

    def numbers_in(self, chunks: tuple[int, ...], taking: Group | None) -> Numbers:
        """The same rows as numbers."""
        pairing = self._pairing(chunks, taking)
        return self.run.once(("numbers", *pairing), lambda: paired_numbers(*pairing))

    def _pairing(self, chunks: tuple[int, ...], taking: Group | None) -> tuple:
        """The arguments of `paired_numbers`."""
        offsets = tuple(n * self.chunk for n in chunks)
        return self.batch, self.part.targets, offsets, self.chunk, taking, not self.part.sources.in_batch

    def source_rows(self) -> Tensor:
        """The sources' rows in the pair's own chunks."""
        key = ("source rows", self.batch, self.chunk, self.own, self.part.targets, self.device)
        rows = [
            n * self.chunk + row for n in self.own for row in range(0, self.chunk, len(self.part.branches))
        ]
        return self.run.once(key, lambda: torch.tensor(rows, dtype=torch.long, device=self.device))

    def map_rows(self) -> MapRows:
        """The rows whose maps are read: all of the pair's own chunks."""
        key = ("map rows", self.chunk, self.own, self.part.targets, self.device)
        offsets = [n * self.chunk for n in self.own]
        return self.run.once(key, lambda: map_rows(self.part.branches, offsets, self.chunk, self.device))


class Reading(Protocol):
    """What a guest reads in the layers of one forward. It counts once the forward has ended.

    tokens: the wanted tokens of each branch's prompt.
    """

    @property
    def layers(self) -> Collection[Layer]: ...

    @property
    def tokens(self) -> Tokens: ...

    def columns(self, call: Call) -> Tensor:
        """The wanted columns of each branch's maps, (B, t, W), float64 on the CPU."""
        ...

    def add(self, call: Call, layer: Layer, maps: Tensor, grid: tuple[int, int]) -> None:
        """A layer's maps, (chunks x pairs x branches, n, W), in the order of `Call.map_rows`.

        grid: height and width of its n queries.
        """
        ...

    def commit(self) -> None:
        """The forward has ended, in all its parts; without this, what was read is as if it had not been."""
        ...


@dataclass(frozen=True, eq=False)
class Start:
    """What a run is given. denoise_mask: of inpainting, or None. again: makes the run once more."""

    noise: Tensor
    sampler: Any
    denoise_mask: Tensor | None
    again: Callable[[], object]


class Guest:
    """Something that takes part in one run, made for that run. By itself it does nothing."""

    acts_on_state: bool = False
    """Whether it has a `step`."""
    reads: bool = False
    """Whether it reads layers of forwards."""
    mask: Tensor | None = None
    """Where the targets may differ from their sources, (pairs, N, height, width), if it decides that."""

    def conditioned(self, guider: Any, start: tuple) -> None:
        """The guider's conditionings are processed, and sampling begins from `start`."""

    def sources(self, forward: Forward, call: Call | None, taken: Taken) -> Sources | None:
        """Where this forward's targets find their sources, or None to leave that to others."""
        return None

    def watch(self, call: Call, taken: Taken) -> Reading | None:
        """What to read in this forward."""
        return None

    def step(self, x: Tensor, n: int) -> None:
        """Change rows of x in place.

        x (pairs x branches, channels, height, width): the state at run.sigmas[n], in the sampler's space:
        before step number n, from 0, or (n = run.steps) the run's result.
        """

    def end(self, samples: Tensor) -> None:
        """The run has ended well."""


class Entry(Protocol):
    """What a controller has for every run, immutable: it makes the run's guest."""

    def begin(self, run: Run, start: Start) -> Guest:
        """Raises ValueError, before the first step, for a run that the guest cannot take part in."""
        ...


@dataclass(eq=False)
class Run:
    """One sampling run; dropped at its end. It travels in the run's own `transformer_options`.

    sigmas: the run's list. shape: of the sampler's batch, (pairs x branches, channels, height, width).
    branches: rows of a pair. layers: of the network; family: of a transformer. guests: what takes part in it.
    sigma_of: the model's noise schedule, from percent to sigma.
    lengths: uuid of each of the pair's own conditioning entries -> its number of tokens; texts: and those of
    each branch, of transformers.
    groups: the targets that go through the model together, all of them if memory allows.
    place, sigma: of the prediction under way: the last of the run's sigmas that it has reached, and its own.
    known_sigma: what was already read for the next prediction.
    injecting: whether the model calls under way belong to the pair's own prediction.
    predicted: whether that prediction was already made for this call of the sampler.
    injected, due: forwards in which layers took from the source, and in which they should have.
    lock: for what several GPUs' threads change.
    """

    sigmas: list[float]
    shape: tuple[int, ...]
    branches: int
    layers: Layers
    guests: tuple[Guest, ...] = ()
    family: Family | None = None
    sigma_of: Callable[[float], Any] | None = None
    lengths: dict[uuid.UUID, int] = field(default_factory=dict)
    texts: dict[uuid.UUID, Lengths] = field(default_factory=dict)
    groups: tuple[Group, ...] = ()
    place: int = 0
    sigma: float = 0.0
    known_sigma: float | None = None
    injecting: bool = False
    predicted: bool = False
    injected: int = 0
    due: int = 0
    lock: Any = field(default_factory=threading.RLock)
    _made: dict[Hashable, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.groups = self.groups or (self.everyone,)

    @property
    def everyone(self) -> Group:
        return tuple(range(self.branches - 1))

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def step(self) -> int:
        """The step of the prediction under way."""
        return min(self.place, self.steps - 1)

    def progress(self, measure: str) -> Sequence[float]:
        """The progress at each of the run's sigmas, from 0 to 1."""
        return self.once(("progress", measure), lambda: self._progress(measure))

    def _progress(self, measure: str) -> Sequence[float]:
        if measure == "steps" or self.sigma_of is None:
            return in_steps(self.steps)(measure)
        return [percent_of(sigma, self.sigma_of) for sigma in self.sigmas]

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What is worked out once per run. key: of all that it depends on."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def at(self, sigma: float) -> None:
        """A prediction at this sigma begins."""
        self.sigma, self.place = sigma, place_of(sigma, self.sigmas)

    def call(self, forward: Forward) -> Call | None:
        """What a forward is to the run, or None where it is not part of the pair's own prediction.

        Prompts that were padded are the run's in every forward.
        Raises ValueError where another node changed the rows of the call, or lengths of conditionings.
        """
        uuids = forward.options.get("uuids", ())
        if not self.injecting and not any(len(set(self.texts.get(chunk, ()))) > 1 for chunk in uuids):
            return None
        own = tuple(n for n, chunk in enumerate(uuids) if chunk in self.lengths)
        rows = forward.x.shape[0]
        if own and rows != len(uuids) * self.shape[0]:
            raise ValueError(
                f"A model call has {rows} rows where {len(uuids)} conditionings of {self.shape[0]} latents "
                "are expected: another node between Attention Controller and sampler computes several tiles "
                "or windows in one call. Set its tile batch size to 1, or take it out."
            )
        lengths = {self.lengths[uuids[n]] for n in own}
        if len(lengths) > 1:
            raise ValueError(
                "Conditionings of one Attention Controller meet in a model call with different numbers of "
                f"tokens ({', '.join(map(str, sorted(lengths)))}): another node appended text to some of "
                "them. Write that text into the source and target prompts instead."
            )
        return Call(
            self,
            rows,
            len(uuids),
            own,
            (forward.x.shape[-2], forward.x.shape[-1]),
            forward.x.device,
            0 if forward.context is None else forward.context.shape[1],
            lengths.pop() if lengths else None,
            Part(self.everyone),
            self.texts.get(uuids[own[0]]) if own else None,
        )


def percent_of(sigma: float, sigma_of: Callable[[float], Any]) -> float:
    """Where in the model's noise schedule a sigma lies, from 0 to 1: the last percent p with

        sigma_of(p) >= sigma

    to five decimals. sigma_of: descends, as the host's `percent_to_sigma` of every kind of model does.
    """
    low, high = 0.0, 1.0
    if float(sigma_of(low)) < sigma:
        return low
    for _ in range(30):
        middle = (low + high) / 2
        if float(sigma_of(middle)) >= sigma * (1.0 - 1e-6):
            low = middle
        else:
            high = middle
    return round(low, 5)


def run_of(options: dict) -> Run | None:
    """The run that `model_options` belong to."""
    return options.get("transformer_options", {}).get(KEY)
