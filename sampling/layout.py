"""Where the prompts' tokens stand in the conditionings of a forward."""

from __future__ import annotations

from ..attention.edit import Edit
from ..attention.plan import Layout, Padded, Repeated
from .run import Call


def layout_of(edit: Edit, call: Call) -> Layout:
    """The layout of a forward with an own chunk: repeated prompts in U-Nets, padded ones in transformers."""
    family, length = call.run.family, call.length
    assert length is not None
    if family is None:
        return Repeated(edit, length)
    assert call.texts is not None
    front = bool(family.front) or family.padding == "front"
    return Padded(edit, [sum(parts) for parts in call.texts], length, front)
