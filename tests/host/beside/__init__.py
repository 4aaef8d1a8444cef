"""Other nodes beside a paired run: what each of them changes in the graph, and what holds then.

A `Neighbour` is a graph with one more node. The tests of test_compose.py hold for every one of them;
docs/compatibility.md is made from this list and from what `works` and `refused` say of single tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import pytest
import torch
from p2p.attention.edit import Edit
from p2p.attention.schedule import TauSchedule
from p2p.nodes import AttentionController
from p2p.tests.host.runs import (
    EMPTY,
    PART,
    SOURCE,
    TARGET,
    Settings,
    Studio,
    assert_close,
    ksampler,
    paired_sampler,
)
from torch import Tensor

KINDS = ("Weights", "Guidance", "Attention and features", "Conditioning", "Control", "Latents", "Runs")
TRANSFORMERS = "On transformers"
LAWS = ("same prompt", "tau empty", "source", "acts", "order", "Paired Sampler")
"""What can hold beside another node, as columns of docs/compatibility.md."""


AVERAGES = {
    "tau empty": "It averages over the whole batch, with this pack or without: a row differs from a run "
    "of its own,",
    "source": "and an edit of the target moves the source a little.",
}
"""Reasons of nodes whose rows are not independent."""


@dataclass(frozen=True)
class Entry:
    """One line of docs/compatibility.md. holds: laws that tests show. fails: laws that do not hold.

    error: it is refused instead.
    """

    kind: str
    name: str
    origin: str
    holds: tuple[str, ...] = ()
    fails: tuple[str, ...] = ()
    note: str = ""
    error: bool = False


ENTRIES: dict[tuple[str, str], Entry] = {}


def list_entry(entry: Entry) -> None:
    assert entry.kind in (*KINDS, TRANSFORMERS) and set(entry.holds) <= set(LAWS)
    ENTRIES[entry.kind, entry.name] = entry


def works(kind: str, name: str, origin: str = "ComfyUI", **fields: Any) -> Any:
    """Marks a test that shows what holds beside something that is no `Neighbour`; fields as in `Entry`."""
    list_entry(Entry(kind, name, origin, **fields))
    return lambda test: test


def refused(kind: str, name: str, origin: str = "ComfyUI", note: str = "") -> Any:
    """Marks a test that shows the error for something that cannot work."""
    list_entry(Entry(kind, name, origin, note=note, error=True))
    return lambda test: test


Change = Callable[[Studio, Any], Any]


@dataclass(frozen=True)
class Neighbour:
    """A graph with one more node.

    line: its line in docs/compatibility.md, if not its name; several neighbours may share one.
    model: changes the MODEL, before or after the controller. positive: changes the controller's CONDITIONING,
    or a plain run's; negative likewise. latent: changes the LATENT before it is paired. sample: the sampler
    node. seeded: the node draws random numbers of its own. shared: what Paired Sampler's negative is given in
    place of `positive` or `sample`, for the pairs take it from there. target: the target's prompt.
    families: of transformers (`transformers.TINY`) that it stands beside, in place of the bundled model.
    fails: laws that do not hold, with the reason. acts: False where the node only must do no harm.
    """

    kind: str
    name: str
    origin: str = "ComfyUI"
    note: str = ""
    line: str = ""
    model: Change | None = None
    positive: Change | None = None
    negative: Change | None = None
    latent: Change | None = None
    sample: Callable[[Studio, Any, list, list, dict, Settings], Tensor] | None = None
    settings: Settings = Settings(steps=3)
    size: tuple[int, int, int] = (1, 8, 8)
    target: str = TARGET
    families: tuple[str, ...] = ()
    seeded: bool = False
    shared: Change | None = None
    tau: TauSchedule = PART
    acts: bool = True
    tolerance: float = 2e-3
    fails: Mapping[str, str] = field(default_factory=dict)

    @property
    def fits_paired_sampler(self) -> bool:
        given = self.positive and not self.negative  # what both have, the pair takes from its negative
        return self.shared is not None or not (given or self.sample or self.settings.advanced)

    @property
    def entry(self) -> Entry:
        possible = {
            "order": self.model is not None,
            "Paired Sampler": self.fits_paired_sampler,
            "acts": self.acts,
        }
        holds = tuple(law for law in LAWS if possible.get(law, True) and law not in self.fails)
        note = " ".join(filter(None, (self.note, *self.fails.values())))
        origin = ", on ".join(filter(None, (self.origin, ", ".join(self.families))))
        return Entry(self.kind, self.line or self.name, origin, holds, tuple(self.fails), note)


NEIGHBOURS: dict[str, Neighbour] = {}
"""By name, beside the bundled model."""
OF_TRANSFORMERS: dict[str, Neighbour] = {}


def add(kind: str, name: str, **fields: Any) -> None:
    """List a neighbour; fields as in `Neighbour`."""
    neighbour = Neighbour(kind, name, **fields)
    (OF_TRANSFORMERS if neighbour.families else NEIGHBOURS)[name] = neighbour
    list_entry(neighbour.entry)


def stock(module: str, name: str, **inputs: Any) -> Any:
    """Run a node of the host, of either node API; its first output. Skips the test if there is none."""
    outputs = stock_outputs(module, name, **inputs)
    return outputs[0]


def stock_outputs(module: str, name: str, **inputs: Any) -> tuple:
    try:
        found = getattr(import_module(module), name, None)
    except ModuleNotFoundError:
        found = None
    if found is None:
        pytest.skip(f"This ComfyUI has no {name}.")
    function = found.execute if hasattr(found, "define_schema") else getattr(found(), found.FUNCTION)
    output = function(**inputs)
    return tuple(getattr(output, "args", output))


def model_node(module: str, name: str, **inputs: Any) -> Change:
    """A node of the host that takes a MODEL and gives one."""
    return lambda _studio, model: stock(module, name, model=model, **inputs)


def latent_of(studio: Studio, neighbour: Neighbour) -> dict:
    latent = studio.empty(*neighbour.size)
    return neighbour.latent(studio, latent) if neighbour.latent else latent


def sample(studio: Studio, neighbour: Neighbour, model: Any, positive: list, latent: dict) -> Tensor:
    """The rest of the graph: everything but what is paired."""
    negative = neighbour.negative(studio, studio.negative) if neighbour.negative else studio.negative
    positive = neighbour.positive(studio, positive) if neighbour.positive else positive
    if neighbour.seeded:
        torch.manual_seed(0)
    if neighbour.sample:
        return neighbour.sample(studio, model, positive, negative, latent, neighbour.settings)
    return ksampler(model, positive, negative, latent, neighbour.settings)


class Beside:
    """Runs beside a neighbour, each made once."""

    def __init__(self, studio: Studio):
        self.studio, self._made = studio, {}

    def _once(self, key: tuple, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def paired(
        self, neighbour: Neighbour, targets: tuple[str, ...], tau: TauSchedule, order: str = "before"
    ) -> tuple[Tensor, Tensor]:
        """(sources, targets) through stock nodes; a model node before or after the controller."""
        return self._once(
            (neighbour.name, targets, tau, order),
            lambda: paired(self.studio, neighbour, self.studio.edit(SOURCE, *targets), tau, order),
        )

    def plain(self, neighbour: Neighbour, text: str) -> Tensor:
        """The same graph without this pack's nodes."""
        return self._once((neighbour.name, text), lambda: plain(self.studio, neighbour, text))


def paired(
    studio: Studio, neighbour: Neighbour, edit: Edit, tau: TauSchedule, order: str
) -> tuple[Tensor, Tensor]:
    model = studio.model
    if neighbour.model and order == "before":
        model = neighbour.model(studio, model)
    model, positive = AttentionController.execute(model, edit, tau).args[:2]
    if neighbour.model and order == "after":
        model = neighbour.model(studio, model)
    rows = studio.rows(edit, latent_of(studio, neighbour))
    return studio.split(edit, sample(studio, neighbour, model, positive, rows))


def by_paired_sampler(
    studio: Studio, neighbour: Neighbour, edit: Edit, tau: TauSchedule
) -> tuple[Tensor, Tensor]:
    model = neighbour.model(studio, studio.model) if neighbour.model else studio.model
    change = neighbour.shared or neighbour.negative
    negative = change(studio, studio.negative) if change else studio.negative
    latent = latent_of(studio, neighbour)
    if neighbour.seeded:
        torch.manual_seed(0)
    outputs = paired_sampler(model, edit, tau, negative, latent, neighbour.settings)
    return outputs[0]["samples"], outputs[1]["samples"]


def plain(studio: Studio, neighbour: Neighbour, text: str) -> Tensor:
    model = neighbour.model(studio, studio.model) if neighbour.model else studio.model
    return sample(studio, neighbour, model, studio.encode(text), latent_of(studio, neighbour))


def without(studio: Studio, neighbour: Neighbour, text: str) -> Tensor:
    """A plain run without the neighbour, but of the same size."""
    latent = latent_of(studio, neighbour)["samples"]
    if torch.equal(latent, studio.empty()["samples"]) and not neighbour.settings.advanced:
        return studio.plain(text, neighbour.settings)
    return ksampler(
        studio.model, studio.encode(text), studio.negative, {"samples": latent}, neighbour.settings
    )


def equal_prompts_give_equal_images(beside: Beside, neighbour: Neighbour) -> None:
    source, target = beside.paired(neighbour, (SOURCE,), neighbour.tau)
    assert_close(target, source, neighbour.tolerance)


def tau_empty_gives_plain_runs(beside: Beside, neighbour: Neighbour) -> None:
    source, target = beside.paired(neighbour, (neighbour.target,), EMPTY)
    assert_close(source, beside.plain(neighbour, SOURCE), neighbour.tolerance)
    assert_close(target, beside.plain(neighbour, neighbour.target), neighbour.tolerance)


def the_source_never_changes(beside: Beside, neighbour: Neighbour) -> None:
    source, _ = beside.paired(neighbour, (neighbour.target,), EMPTY)
    again, _ = beside.paired(neighbour, (neighbour.target,), neighbour.tau)
    assert torch.equal(again, source)
