"""Prompt-to-Prompt image editing for ComfyUI: change words, keep the picture."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():  # type: ignore[no-untyped-def]  # its type is the host's
    """ComfyUI calls this once to learn the pack's nodes."""
    from .nodes import PromptToPromptExtension

    return PromptToPromptExtension()
