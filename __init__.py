"""Prompt-to-Prompt image editing for ComfyUI: change words, keep the picture."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():  # type: ignore[no-untyped-def]  # its type is the host's
    """ComfyUI calls this once to learn the pack's nodes and routes."""
    from .nodes import PromptToPromptExtension
    from .nodes.page import register

    register()
    return PromptToPromptExtension()
