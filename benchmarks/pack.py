"""Loads the pack and its host for a script outside of ComfyUI."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]


def load_pack(device: str | None = None) -> None:
    """Import the pack as `p2p` and the host that it finds, which then reads no command line of ours.

    device: "cpu" or "cuda", by default the GPU if there is one.
    """
    spec = importlib.util.spec_from_file_location(
        "p2p", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules["p2p"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    import torch
    from p2p.tools.env import import_host

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    import_host(*(["--cpu", "--use-pytorch-cross-attention"] if device == "cpu" else []))
