"""The values that travel between this pack's nodes."""

from collections.abc import Sequence

from comfy_api.latest import io

CATEGORY = "prompt-to-prompt"

EditIO = io.Custom("P2P_EDIT")
TauIO = io.Custom("P2P_TAU")


def check_options(**choices: tuple[str | None, Sequence[str]]) -> bool | str:
    """Validation's answer for combos: name -> (value, options); some hosts do not compare them themselves.

    None stands for a value that is linked and not known yet.
    """
    for name, (value, options) in choices.items():
        if value is not None and value not in options:
            return f"{name} is {value!r}; expected one of {', '.join(options)}."
    return True
