"""Puts ComfyUI on sys.path, on the CPU, before a test module imports it. COMFYUI_PATH names another host."""

from __future__ import annotations

import sys
from typing import Any

import pytest
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


@pytest.fixture(scope="session")
def demo_model() -> tuple[Any, Any, Any]:
    """The bundled model as ordinary ComfyUI objects: (model, clip, vae)."""
    from p2p.demo.loader import load_demo_model

    return load_demo_model()
