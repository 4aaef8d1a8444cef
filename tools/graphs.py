"""Graphs in API format, as a server takes them: a pair on the bundled model, for tools and tests."""

from __future__ import annotations

from typing import Any

Node = dict[str, Any]
Graph = dict[str, Node]

SETTINGS = {
    "seed": 1,
    "steps": 20,
    "cfg": 4.0,
    "sampler_name": "euler",
    "scheduler": "normal",
    "denoise": 1.0,
}


def node(kind: str, **inputs: Any) -> Node:
    return {"class_type": kind, "inputs": inputs}


def _start(source: str, target: str, side: int, items: int) -> Graph:
    return {
        "model": node("P2PDemoModel"),
        "prompts": node("P2PPromptPair", clip=["model", 1], source=source, target=target, mode="auto"),
        "tau": node(
            "P2PTauScheduler",
            cross_start=0.0,
            cross_end=0.8,
            self_start=0.0,
            self_end=0.4,
            fade=0.0,
            self_resolution=0.5,
            words="",
        ),
        "negative": node("CLIPTextEncode", clip=["model", 1], text=""),
        "latent": node("EmptyLatentImage", width=side, height=side, batch_size=items),
    }


def paired(source: str, target: str, side: int = 128, items: int = 1, **settings: Any) -> Graph:
    """A pair on Paired Sampler `sample`, its targets decoded by `decode`.

    side: of the images, pixels. items: pairs. settings: other than `SETTINGS`.
    """
    return {
        **_start(source, target, side, items),
        "sample": node(
            "P2PSampler",
            model=["model", 0],
            edit=["prompts", 0],
            tau=["tau", 0],
            negative=["negative", 0],
            latent=["latent", 0],
            **{**SETTINGS, **settings},
        ),
        "decode": node("VAEDecode", samples=["sample", 1], vae=["model", 2]),
    }


def stock(control: Node, source: str, target: str, side: int = 128, **settings: Any) -> Graph:
    """A pair on the stock KSampler `sample`, both branches decoded by `decode`.

    control: the node that makes the model and the positive conditioning, without the inputs model and edit.
    """
    wired = {"model": ["model", 0], "edit": ["prompts", 0], **control["inputs"]}
    return {
        **_start(source, target, side, 1),
        "control": node(control["class_type"], **wired),
        "pair": node("P2PPairedLatent", latent=["latent", 0], edit=["prompts", 0]),
        "sample": node(
            "KSampler",
            model=["control", 0],
            positive=["control", 1],
            negative=["negative", 0],
            latent_image=["pair", 0],
            **{**SETTINGS, **settings},
        ),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["model", 2]),
    }
