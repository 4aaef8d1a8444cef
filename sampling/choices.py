"""What the host offers and its user has set, read anew each time: other packs add to the lists."""

from __future__ import annotations

import comfy.samplers
from comfy.cli_args import args


def samplers() -> list[str]:
    """The names of the host's samplers."""
    return comfy.samplers.KSampler.SAMPLERS


def schedulers() -> list[str]:
    """The names of the host's schedulers."""
    return comfy.samplers.KSampler.SCHEDULERS


def writes_metadata() -> bool:
    """Whether saved images carry their prompt and workflow (`--disable-metadata`)."""
    return not args.disable_metadata
