"""Prompt-to-Prompt image editing for ComfyUI: change words, keep the picture."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """ComfyUI calls this once to learn the pack's nodes."""
    from .nodes import PromptToPromptExtension

    return PromptToPromptExtension()
