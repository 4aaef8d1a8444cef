"""Loads the pack under the name `p2p`, whatever its folder is called, and starts what the tests share.

The checkout has a folder `nodes` and the host a module `nodes`, so the checkout must not be on sys.path.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads are slow on a busy machine
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]


def load_pack() -> None:
    if "p2p" in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(
        "p2p", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["p2p"] = module
    spec.loader.exec_module(module)


load_pack()


@pytest.fixture(scope="session")
def server() -> Iterator[Any]:
    """A real ComfyUI server in a process of its own, on the CPU: this pack, and a pack of the tests."""
    from p2p.tools.server import running_server

    with running_server(
        cpu=True, more_packs={"models_pack": ROOT / "tests" / "server" / "models_pack"}
    ) as running:
        yield running
