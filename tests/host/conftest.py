"""Puts ComfyUI on sys.path, on the CPU, before a test module imports it. COMFYUI_PATH names another host."""

from __future__ import annotations

import inspect
import re
import textwrap
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


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of every forward of the U-Net."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    rows: list[int] = []
    forward = UNetModel._forward

    def counting(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        rows.append(x.shape[0])
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(UNetModel, "_forward", counting)
    return rows


@pytest.fixture
def nothing_kept() -> Iterator[None]:
    """No source run is kept before a test, or after it."""
    from p2p.sampling.reuse import CACHE

    CACHE.clear()
    yield
    CACHE.clear()


@pytest.fixture
def later_textual_inversions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's tokenizers as of ComfyUI 0.38: names follow any white space, and end at "<" and "[".

    There, looking one up gives three values instead of two.
    """
    from comfy import sd1_clip

    read = textwrap.dedent(inspect.getsource(sd1_clip.SDTokenizer.tokenize_with_weights))
    look_up = sd1_clip.SDTokenizer._try_get_embedding
    if "embed, embedding_name, leftover" in read:
        return
    for now, later in (
        ("embed, leftover =", "embed, embedding_name, leftover ="),
        ("re.split(' {0}|\\n{0}'.format(self.embedding_identifier)", "re.split('(?<=\\\\s)embedding:'"),
    ):
        assert now in read
        read = read.replace(now, later)
    made: dict[str, Any] = {}
    exec(read, vars(sd1_clip), made)

    def look_up_later(self: Any, rest: str) -> tuple:
        name = re.split(r"[\s<\[]", rest, maxsplit=1)[0]
        embed, left = look_up(self, f"{name} {rest.removeprefix(name)}")
        return embed, name, left

    monkeypatch.setattr(sd1_clip.SDTokenizer, "tokenize_with_weights", made["tokenize_with_weights"])
    monkeypatch.setattr(sd1_clip.SDTokenizer, "_try_get_embedding", look_up_later)
