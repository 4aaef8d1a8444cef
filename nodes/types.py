"""The values that travel between this pack's nodes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from comfy_api.latest import io

from ..attention import plan
from ..attention.blend import LocalBlend, regions
from ..attention.edit import Edit
from ..attention.schedule import TauSchedule
from ..sampling.reuse import Keep

CATEGORY = "prompt-to-prompt"
MODEL_OUTPUT, POSITIVE_OUTPUT = 0, 1
"""Which outputs of the nodes that make a model carry it and the conditioning that goes with it."""
MAPS_OUTPUT = 2
"""Which output of the nodes that sample, or make a model that samples, carries the maps."""

EditIO = io.Custom("P2P_EDIT")
TauIO = io.Custom("P2P_TAU")
BlendIO = io.Custom("P2P_BLEND")
MapsIO = io.Custom("P2P_MAPS")
TrajectoryIO = io.Custom("P2P_TRAJECTORY")


METHOD = ("prompt to prompt", "prompt-to-prompt", "p2p")


def also_called(*names: str) -> dict[str, list[str]]:
    """Other names under which a node is searched, as an argument of its schema where the host's takes it."""
    known = {entry.name for entry in fields(io.Schema)}
    return {"search_aliases": [*METHOD, *names]} if "search_aliases" in known else {}


def model_input(models: str = "SD, SDXL, SD3.5, Flux, Qwen-Image, Z-Image and more") -> io.Input:
    return io.Model.Input("model", tooltip=f"{models}, with any LoRAs and patches already on it.")


def edit_input() -> io.Input:
    return EditIO.Input("edit", tooltip="From Prompt Pair, or from a node that adds to its edit.")


def tau_input() -> io.Input:
    return TauIO.Input("tau", tooltip="When the source's attention is injected, from tau Scheduler.")


def blend_input() -> io.Input:
    return BlendIO.Input(
        "blend", optional=True, tooltip="From Local Blend: the targets stay the source outside of its region."
    )


def trajectory_input() -> io.Input:
    return TrajectoryIO.Input(
        "trajectory",
        optional=True,
        tooltip="From Invert Image: edits that image. The run starts from its noise, whatever the seed, "
        "and the source stays on its trajectory. Needs its steps and scheduler, and euler, ddim or "
        "euler_cfg_pp.",
    )


def reuse_input() -> io.Input:
    return io.Float.Input(
        "reuse_gb",
        default=0.0,
        min=0.0,
        max=256.0,
        step=0.5,
        optional=True,
        tooltip="System RAM in GB for keeping source runs: the next edit of the same source then takes about "
        "half the time. 0 turns it off.",
    )


def is_wired(hidden: Any, output: int) -> bool:
    """Whether an output of the node goes anywhere in the prompt that is being executed.

    hidden: the node's hidden inputs `prompt` and `unique_id`, or None outside of the host.
    """
    if hidden is None or not hidden.prompt:
        return False
    inputs = (value for entry in hidden.prompt.values() for value in entry.get("inputs", {}).values())
    return any(isinstance(value, list) and value == [hidden.unique_id, output] for value in inputs)


def keep_sources(hidden: Any, gigabytes: float) -> Keep:
    """What a node keeps of its source runs. hidden: as in `is_wired`."""
    if hidden is None or not hidden.prompt:
        return Keep(gigabytes)
    return Keep(gigabytes, str(hidden.unique_id), frozenset(hidden.prompt))


def check_wiring(hidden: Any) -> None:
    """Raise ValueError where a controller's positive is in use and its model is not: nothing would be edited.

    hidden: as in `is_wired`.
    """
    if is_wired(hidden, POSITIVE_OUTPUT) and not is_wired(hidden, MODEL_OUTPUT):
        raise ValueError(
            "This node's positive is connected, but its model is not, so nothing would be edited; connect "
            "its model to the sampler too."
        )


def check_options(**choices: tuple[str, Sequence[str]]) -> None:
    """Raise ValueError for a combo's value that is not one of its options, which some hosts let through.

    choices: name -> (value, options).
    """
    for name, (value, options) in choices.items():
        if value not in options:
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(options)}.")


def check_words(edit: Edit, tau: TauSchedule, blend: LocalBlend | None = None) -> None:
    """Raise ValueError, which names node and widget, for words of tau or blend that the edit lacks."""
    with _written_in("tau Scheduler"):
        plan.check_words(edit, tau)
    if blend is not None:
        with _written_in("Local Blend"):
            regions(blend, edit)


@contextmanager
def _written_in(node: str) -> Iterator[None]:
    """Say in a ValueError from inside which node holds the words."""
    try:
        yield
    except ValueError as error:
        raise type(error)(f"{node}, {error}") from None
