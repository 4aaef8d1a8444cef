"""Puts ComfyUI on sys.path, on the GPU, before a test module imports it. P2P_DEVICE=cpu: without a GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from p2p.tools.env import import_host

ON_CPU = os.environ.get("P2P_DEVICE") == "cpu"
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
try:
    import_host(*([] if torch.cuda.is_available() and not ON_CPU else ["--cpu"]))
except FileNotFoundError as missing:
    raise pytest.UsageError(str(missing)) from None

MODELS = ["float32 bundled"] if ON_CPU else [
    f"{dtype} {name}" for name in ("bundled", "SD1.5", "SDXL") for dtype in ("float16", "bfloat16")
]


@pytest.fixture(autouse=True)
def as_the_host_runs_nodes() -> Iterator[None]:
    """The host executes nodes without gradients."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def clip() -> Any:
    """The bundled model's text encoder, for every model: it says which tokens a word has."""
    import comfy.model_management
    from models import bundled_model

    if not ON_CPU and comfy.model_management.get_torch_device().type != "cuda":
        pytest.skip("no GPU found: nothing to test")
    with torch.inference_mode():
        return bundled_model()[1]


@pytest.fixture(scope="session", params=MODELS)
def lab(request: pytest.FixtureRequest, clip: Any) -> Iterator[Any]:
    """A model in half precision, of real layout and width: SD1.5's and SDXL's with random weights."""
    import comfy.model_management
    from models import bundled_model, random_model
    from p2p.tests.gpu.lab import Lab

    dtype, name = request.param.split()
    number = getattr(torch, dtype)
    with torch.inference_mode():
        model = bundled_model(number)[0] if name == "bundled" else random_model(name, number)
        yield Lab(model, clip, number)
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
