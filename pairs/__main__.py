"""`python pairs ...`, from any folder: loads the pack that this folder belongs to under the name `p2p`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def load_pack() -> None:
    """The checkout has a folder `nodes` and the host a module `nodes`: the checkout stays off sys.path."""
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in (ROOT, ROOT / "pairs")]
    spec = importlib.util.spec_from_file_location(
        "p2p", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules["p2p"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


if __name__ == "__main__":
    load_pack()
    try:
        from p2p.pairs.command import main
    except ModuleNotFoundError as missing:
        sys.exit(f"pairs: {missing.name} is not installed: pip install -e '{ROOT}[pairs]', or `make env`.")
    main()
