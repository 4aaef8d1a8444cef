"""Writes docs/compatibility.md from the tests of other nodes: python tests/compatibility.py"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

if __name__ == "__main__":
    from conftest import load_pack  # beside this file

    load_pack()
    from p2p.tools.env import import_host

    import_host("--cpu")

PAGE = Path(__file__).resolve().parent.parent / "docs" / "compatibility.md"

INTRODUCTION = """\
# Beside other nodes

What this pack does next to other nodes. Every line is a test (`tests/host/test_compose*.py`, and on tiny
transformers with random weights `tests/host/test_transformers_beside.py`) that runs ComfyUI's own node, or a
small stand-in for a pack that patches models in the same way; this page is written from these tests by
`python tests/compatibility.py`.

| column | a tick says that beside this node |
| --- | --- |
| same prompt | a target with the source's own prompt gives the source's picture |
| tau empty | with nothing injected, source and target are the pictures of plain runs with this node |
| source | an edit does not change a bit of the source |
| acts | the node does what it does without this pack; so does the edit, in every line |
| order | it may stand before or after *Attention Controller*, with the same result |
| Paired Sampler | it works on the inputs of *Paired Sampler* too, with the same result |

A dash: it does not apply. Where it does not hold, the note says why.

Values that belong to the items of a batch (masks, ControlNet images, prompts of several rows) go to pairs:
pair number 2 gets the second one on all of its branches. Only the controller's own positive is edited:
negatives, other prompts on areas or masks, and extra passes of guidance nodes run untouched.

ControlNets, T2I-Adapters, GLIGEN's boxes, inpainting and reference images and *FluxGuidance* go on the
negative of *Paired Sampler*; source and targets take them from there.
"""


def page() -> str:
    """The text of docs/compatibility.md."""
    from p2p.tests.host.beside import ENTRIES, KINDS, LAWS, TRANSFORMERS

    for name in ("compose", "compose_attention", "compose_runs", "transformers_beside"):
        importlib.import_module(f"p2p.tests.host.test_{name}")
    parts = [INTRODUCTION]
    for kind in (*KINDS, TRANSFORMERS):
        entries = sorted((e for e in ENTRIES.values() if e.kind == kind), key=lambda e: e.name.lower())
        parts.append(f"## {kind}\n")
        parts.append(f"| node or pack | tested with | {' | '.join(LAWS)} | note |")
        parts.append("| --- |" + " --- |" * (len(LAWS) + 2))
        for entry in (e for e in entries if not e.error):
            marks = {law: "no" for law in entry.fails} | {law: "\u2713" for law in entry.holds}
            cells = [entry.name, entry.origin, *(marks.get(law, "-") for law in LAWS), entry.note]
            parts.append(f"| {' | '.join(cells)} |")
        parts.append("")
        if refused := [entry for entry in entries if entry.error]:
            parts.append("What cannot work, and says so:\n")
            parts += [
                f"- **{entry.name}** ({entry.origin}). {entry.note}".rstrip(". ") + "." for entry in refused
            ]
            parts.append("")
    return "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE, file=sys.stderr)
