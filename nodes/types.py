"""The values that travel between this pack's nodes."""

from comfy_api.latest import io

CATEGORY = "prompt-to-prompt"

EditIO = io.Custom("P2P_EDIT")
TauIO = io.Custom("P2P_TAU")
