"""Puts ComfyUI on sys.path, on the CPU, before a test module imports it. COMFYUI_PATH names another host."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from p2p.tools.env import find_host, is_host


def import_host() -> None:
    host = find_host()
    if not is_host(host):
        raise pytest.UsageError(f"no ComfyUI in {host}: run `make env` first, or set COMFYUI_PATH")
    sys.path.insert(0, str(host))
    argv, sys.argv = sys.argv, [sys.argv[0], "--cpu"]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args  # noqa: F401  (reads sys.argv as it is imported)
    finally:
        sys.argv = argv


import_host()
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
