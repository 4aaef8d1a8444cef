"""Puts ComfyUI on sys.path, on the CPU, before a test module imports it. COMFYUI_PATH names another host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from p2p.tools.env import import_host

try:
    import_host("--cpu")
except FileNotFoundError as missing:
    raise pytest.UsageError(str(missing)) from None
torch.set_num_threads(1)  # several threads on a busy machine are many times slower than one


@pytest.fixture(autouse=True)
def as_the_host_runs_nodes() -> Iterator[None]:
    """The host executes nodes without gradients."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def demo_model() -> tuple[Any, Any, Any]:
    """The bundled model as ordinary ComfyUI objects: (model, clip, vae)."""
    from p2p.demo.loader import load_demo_model

    return load_demo_model()


@pytest.fixture(scope="session")
def studio(demo_model: tuple[Any, Any, Any]) -> Any:
    """The bundled model with helpers for sampling runs."""
    from p2p.tests.host.runs import Studio

    with torch.inference_mode():
        return Studio(*demo_model[:2])
