"""Builds the shared workflows in ComfyUI's own page and saves them as the page does.

    python -m tools.workflows [name ...]      writes workflows/NAME.json (thumbnails: python -m tools.demo)

A workflow is described below by its nodes, their links and the groups that they stand in; sizes and
placement follow from what the page says a node needs.
"""

from __future__ import annotations

import argparse
import json
import uuid
from dataclasses import asdict, dataclass, field
from typing import Any

from .browser import Editor, open_editor
from .env import ROOT
from .server import PACK, running_server

WORKFLOWS = ROOT / "workflows"

GAP = 40.0  # between nodes and between groups
TITLE = 30.0  # a node's title bar, which the page draws above its position
GROUP_TITLE = 50.0
NARROW = 200.0  # least width of a node where the page draws it without its canvas
LETTER = 14.0  # width of a letter in a group's title
PROMPT_SIZE = (400.0, 400.0)  # room for two prompts of twenty tags and their alignment below them
TARGET_SIZE = (400.0, 200.0)
NEGATIVE_SIZE = (400.0, 100.0)
PICTURE_WIDTH = 620.0
PICTURE_FRAME = 120.0  # height of a node that saves a picture, without the picture
CAPTION = 0.2  # height of a label in a grid, per picture
SAMPLER_SIZE = (300.0, 0.0)
ROWS = 20.0  # height by which many inputs are taller where the page draws nodes without its canvas
PREVIEW = 330.0  # height of the preview that a sampler shows while it runs

MODEL, CLIP, VAE, IMAGE = range(4)  # outputs of Load Demo Model, the first three of every model loader
SOURCE, TARGETS, MAPS, PAIRED = range(4)  # outputs of Paired Sampler, the first two also of Split Branches


@dataclass(frozen=True)
class Node:
    """`links` maps an input to (node, position of the output); `widgets` maps a widget to its value."""

    type: str
    links: dict[str, tuple[str, int]] = field(default_factory=dict)
    widgets: dict[str, Any] = field(default_factory=dict)
    title: str | None = None
    size: tuple[float, float] = (0.0, 0.0)  # at least
    room: float = 0.0  # height left free for what a run shows in the node


@dataclass(frozen=True)
class Group:
    """A titled frame around columns of nodes."""

    title: str
    columns: list[list[str]]
    color: str = "#3f789e"


@dataclass(frozen=True)
class Workflow:
    nodes: dict[str, Node]
    layout: list[list[Group]]  # columns of groups, from left to right


CHECKPOINT = """**Your own checkpoint**

1. Exchange *Load Demo Model* for *Load Checkpoint*: model, clip and vae go to the same places.
2. Write your prompt into *source*, copy it to *target* and change words.
3. Set the picture's size, steps and cfg; *batch_size* 1 first.

| | size | steps | cfg |
|---|---|---|---|
| SD1.5 | 512 | 30 | 7 |
| SD2 | 768 | 30 | 7 |
| SDXL | 1024 | 30 | 6 |
| anime SDXL | 1024 | 28 | 5 |
| Turbo | 512 | 4 | 1 |
| Lightning | 1024 | 8 | 1 |

Too little change: lower *cross_end* and *self_end*. Too much: raise them."""


def note(title: str, shows: str, attempt: str, own: str = CHECKPOINT) -> Node:
    text = f"## {title}\n\n{shows}\n\n**Try:** {attempt}\n\n{own}"
    return Node("MarkdownNote", widgets={"0": text}, title="About this workflow", size=(400.0, 650.0))


def prompts(source: str, target: str, mode: str = "auto") -> Node:
    return Node(
        "P2PPromptPair",
        {"clip": ("model", CLIP)},
        {"source": source, "target": target, "mode": mode},
        size=PROMPT_SIZE,
    )


def tau(cross_end: float = 0.8, self_end: float = 0.4, title: str | None = None, words: str = "") -> Node:
    windows = {"cross_end": cross_end, "self_end": self_end, "words": words}
    return Node("P2PTauScheduler", widgets=windows, title=title)


SETTINGS: dict[str, Any] = {"steps": 20, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal"}


def sampler(
    seed: int,
    edit: str = "prompts",
    schedule: str = "tau",
    title: str | None = None,
    denoise: float = 1.0,
    **optional: str,
) -> Node:
    return Node(
        "P2PSampler",
        {
            "model": ("model", MODEL),
            "edit": (edit, 0),
            "tau": (schedule, 0),
            "negative": ("negative", 0),
            "latent": ("latent", 0),
            **{name: (node, 0) for name, node in optional.items()},
        },
        {"seed": seed, "control_after_generate": "fixed", **SETTINGS, "denoise": denoise},
        title=title,
        size=SAMPLER_SIZE,
        room=PREVIEW,
    )


def common(batch: int) -> dict[str, Node]:
    """The nodes that every workflow starts with."""
    return {
        "model": Node("P2PDemoModel"),
        "negative": Node(
            "CLIPTextEncode", {"clip": ("model", CLIP)}, {"text": ""}, "Negative prompt", NEGATIVE_SIZE
        ),
        "latent": Node("EmptyLatentImage", widgets={"width": 128, "height": 128, "batch_size": batch}),
    }


def decoded(*latents: tuple[str, int]) -> tuple[dict[str, Node], dict[str, tuple[str, int]]]:
    """Latents decoded, each by a node of its own, and the links that lay them out in this order."""
    nodes = {
        f"decode{number}": Node("VAEDecode", {"samples": latent, "vae": ("model", VAE)})
        for number, latent in enumerate(latents, 1)
    }
    return nodes, grid_links(*((name, 0) for name in nodes))


def grid_links(*images: tuple[str, int]) -> dict[str, tuple[str, int]]:
    return {"images" if number == 1 else f"images_{number}": image for number, image in enumerate(images, 1)}


def ending(
    name: str, latents: list[tuple[str, int]], labels: list[str], columns: int, rows: int
) -> dict[str, Node]:
    """Latents decoded, laid out in order as a labelled grid and saved."""
    nodes, links = decoded(*latents)
    nodes["grid"] = Node("P2PComparisonGrid", links, {"labels": "\n".join(labels), "columns": columns})
    nodes["save"] = saved(name, columns, rows, bool(labels))
    return nodes


def saved(name: str, columns: int, rows: int, labels: bool) -> Node:
    """Saves a grid of square pictures, with room for it at the node's full width."""
    height = PICTURE_FRAME + PICTURE_WIDTH * rows * (1 + CAPTION * labels) / columns
    return Node(
        "SaveImage",
        {"images": ("grid", 0)},
        {"filename_prefix": f"{PACK}/{name}"},
        size=(PICTURE_WIDTH, round(height)),
    )


START = [Group("Read me", [["note"]], "#a1309b"), Group("Model", [["model", "latent", "negative"]])]


def word_swap() -> Workflow:
    """The paper's first edit, on the pack's own sampler."""
    nodes = {
        "note": note(
            "Word swap",
            "*bicycle* becomes *car*; the new word takes the old word's attention, so the cat and the place "
            "stay. Top: the source prompt. Bottom: the target prompt, from the same noise.",
            "other words in the target prompt; *cross_end* lower for more freedom, higher for more of the "
            "source.",
        ),
        **common(batch=3),
        "prompts": prompts("a cat riding a bicycle", "a cat riding a car"),
        "tau": tau(),
        "sample": sampler(seed=1),
        **ending("word_swap", [("sample", SOURCE), ("sample", TARGETS)], [], columns=3, rows=2),
        "save_targets": Node(
            "SaveImage",
            {"images": ("decode2", 0)},
            {"filename_prefix": f"{PACK}/word_swap_target"},
            size=(300.0, PICTURE_FRAME + 300.0),
        ),
    }
    return Workflow(
        nodes,
        [
            START,
            [Group("The edit", [["prompts", "tau"]], "#8A8")],
            [Group("Source and target together", [["sample", "decode1", "decode2"]], "#88A")],
            [
                Group("Source above, target below", [["grid", "save"]], "#b58b2a"),
                Group("The targets alone", [["save_targets"]], "#b58b2a"),
            ],
        ],
    )


def refinement() -> Workflow:
    """Words added in front; on the stock KSampler, to show that any sampler will do."""
    nodes = {
        "note": note(
            "Prompt refinement, on the stock KSampler",
            "Words are added in front: *children drawing of* is new, and *a castle* keeps its attention. "
            "*Attention Controller* patches the model, *Paired Latent* doubles the latent: any sampler then "
            "does the edit.",
            "*cross_end* and *self_end* lower: more drawing, less of this castle. Another sampler in "
            "*KSampler*.",
        ),
        **common(batch=3),
        "prompts": prompts("a castle", "children drawing of a castle", "refine"),
        "tau": tau(),
        "control": Node(
            "P2PAttentionController",
            {"model": ("model", MODEL), "edit": ("prompts", 0), "tau": ("tau", 0)},
        ),
        "pair": Node("P2PPairedLatent", {"latent": ("latent", 0), "edit": ("prompts", 0)}),
        "sample": Node(
            "KSampler",
            {
                "model": ("control", 0),
                "positive": ("control", 1),
                "negative": ("negative", 0),
                "latent_image": ("pair", 0),
            },
            {"seed": 1, "control_after_generate": "fixed", "denoise": 1.0, **SETTINGS},
            size=SAMPLER_SIZE,
            room=PREVIEW,
        ),
        "decode": Node("VAEDecode", {"samples": ("sample", 0), "vae": ("model", VAE)}),
        "split": Node("P2PSplitBranches", {"images": ("decode", 0), "edit": ("prompts", 0)}),
        "grid": Node(
            "P2PComparisonGrid", grid_links(("split", SOURCE), ("split", TARGETS)), {"columns": 3}
        ),
        "save": saved("refinement", columns=3, rows=2, labels=False),
    }
    return Workflow(
        nodes,
        [
            START,
            [Group("The edit", [["prompts", "tau"]], "#8A8")],
            [Group("Stock nodes, paired", [["control", "pair", "sample"]], "#88A")],
            [Group("Split the pairs", [["decode", "split"]], "#88A")],
            [Group("Source above, target below", [["grid", "save"]], "#b58b2a")],
        ],
    )


def reweighting() -> Workflow:
    """One word at four strengths; at c = 1 the picture is the source itself."""
    strengths = (-2, 0, 2)
    prompt = "a house on a snowy street"
    nodes = {
        "note": note(
            "Re-weighting a word",
            "The prompt stays as it is; the attention of *snowy* is multiplied by c, from -2 to 2. At c = 1 "
            "nothing changes, so that picture is the source. The scale acts while attention is injected, "
            "so *cross_end* is 1 here: the whole run.",
            "another word in *Token Reweight*, or values in between.",
        ),
        **common(batch=1),
        "prompts": prompts(prompt, prompt),
        "tau": tau(cross_end=1.0),
    }
    rows = []
    for c in strengths:
        nodes[f"reweight{c}"] = Node(
            "P2PTokenReweight",
            {"edit": ("prompts", 0)},
            {"words": "snowy", "scale": float(c), "target": 0},
            f"Token Reweight, c = {c}",
        )
        nodes[f"sample{c}"] = sampler(1, f"reweight{c}", title=f"Paired Sampler, c = {c}")
        rows.append(Group(f"snowy at c = {c}", [[f"reweight{c}"], [f"sample{c}"]], "#88A"))
    latents = [("sample-2", TARGETS), ("sample0", TARGETS), ("sample0", SOURCE), ("sample2", TARGETS)]
    nodes |= ending("reweighting", latents, ["c = -2", "c = 0", "c = 1 (source)", "c = 2"], columns=2, rows=2)
    return Workflow(
        nodes,
        [
            START,
            [Group("The edit", [["prompts", "tau"]], "#8A8")],
            rows,
            [Group("Decode", [["decode1", "decode2", "decode3", "decode4"]], "#88A")],
            [Group("From less snow to more", [["grid", "save"]], "#b58b2a")],
        ],
    )


def tau_sweep() -> Workflow:
    """How long the source's cross-attention is kept: the paper's figure of tau, in one run."""
    nodes = {
        "note": note(
            "tau: how long the source's attention is kept",
            "*tau Sweep* repeats the target at five values of *cross_end*, the part of the run in which the "
            "target uses the source's maps, as the targets of one run. At 0 the layout is the target's own; "
            "the higher, the more of the source's stays.",
            "*self_end* as the parameter: it keeps outlines. *scale*: a word's strength from -2 to 2. More "
            "values.",
        ),
        **common(batch=1),
        "prompts": prompts("a tree in a field", "a castle in a field"),
        "tau": tau(self_end=0.0),
        "sweep": Node(
            "P2PTauSweep",
            {"edit": ("prompts", 0), "tau": ("tau", 0)},
            {"count": 5, "parameter": "cross_end"},
        ),
        "sample": sampler(1, "sweep"),
        "labels": Node(
            "StringConcatenate", {"string_b": ("sweep", 1)}, {"string_a": "source", "delimiter": "\n"}
        ),
        "decode": Node("VAEDecode", {"samples": ("sample", PAIRED), "vae": ("model", VAE)}),
        "grid": Node(
            "P2PComparisonGrid", {"images": ("decode", 0), "labels": ("labels", 0)}, {"columns": 3}
        ),
        "save": saved("tau", columns=3, rows=2, labels=True),
    }
    return Workflow(
        nodes,
        [
            START,
            [Group("The edit", [["prompts", "tau"]], "#8A8")],
            [Group("One target at five values", [["sweep", "sample"]], "#88A")],
            [Group("Decode", [["labels", "decode"]], "#88A")],
            [Group("From free to faithful", [["grid", "save"]], "#b58b2a")],
        ],
    )


def word_windows() -> Workflow:
    """A window of its own for one word."""
    nodes = {
        "note": note(
            "A tau for a single word",
            "Both words are swapped, and all maps are kept to the end (*cross_end* is 1): the duck has to "
            "fit into the cat. Below, the line *duck: 0.4* lets that one word go after 40 % of the run; the "
            "car stays where the bicycle was.",
            "*car: 0.4* instead, or *duck: 0.2-0.6*; *fade* for a soft end.",
        ),
        **common(batch=3),
        "prompts": prompts("a cat riding a bicycle", "a duck riding a car"),
        "tau": tau(1.0, 0.1, "\u03c4 Scheduler, all words"),
        "tau_word": tau(1.0, 0.1, "\u03c4 Scheduler, duck: 0.4", "duck: 0.4"),
        "sample": sampler(1, title="Paired Sampler, all words"),
        "sample_word": sampler(1, schedule="tau_word", title="Paired Sampler, duck: 0.4"),
        **ending(
            "word_windows",
            [("sample", SOURCE), ("sample", TARGETS), ("sample_word", TARGETS)],
            [*["source"] * 3, *["all words to the end"] * 3, *["duck: 0.4"] * 3],
            columns=3,
            rows=3,
        ),
    }
    return Workflow(
        nodes,
        [
            START,
            [Group("The edit", [["prompts"]], "#8A8")],
            [
                Group("All words to the end", [["tau", "sample"]], "#88A"),
                Group("One word let go", [["tau_word", "sample_word"]], "#88A"),
            ],
            [Group("Decode", [["decode1", "decode2", "decode3"]], "#88A")],
            [Group("Source, all words, one word let go", [["grid", "save"]], "#b58b2a")],
        ],
    )


def several_targets() -> Workflow:
    """Four edits of one source in one run."""
    targets = (
        "a castle in a field at night",
        "children drawing of a castle in a field",
        "a house in a field",
    )
    nodes = {
        "note": note(
            "Several targets in one run",
            "*Add Target* adds edits of the same source. The source is sampled once: four edits cost five "
            "images and not eight. Targets that do not fit in memory together are computed in groups.",
            "*Token Reweight* on target 2 only, or one more *Add Target*.",
        ),
        **common(batch=1),
        "prompts": prompts("a castle in a field", "a castle in a desert"),
    }
    before = "prompts"
    for number, target in enumerate(targets, 2):
        nodes[f"target{number}"] = Node(
            "P2PAddTarget",
            {"clip": ("model", CLIP), "edit": (before, 0)},
            {"target": target, "mode": "auto"},
            f"Add Target {number}",
            size=TARGET_SIZE,
        )
        before = f"target{number}"
    nodes |= {
        "tau": tau(),
        "sample": sampler(1, before),
        **ending(
            "several_targets",
            [("sample", PAIRED)],
            ["source", "in a desert", "at night", "children drawing", "a house"],
            columns=3,
            rows=2,
        ),
    }
    return Workflow(
        nodes,
        [
            START,
            [Group("The edits", [["prompts", "tau"], [f"target{n}" for n in (2, 3, 4)]], "#8A8")],
            [Group("One source, four targets", [["sample", "decode1"]], "#88A")],
            [Group("Four edits", [["grid", "save"]], "#b58b2a")],
        ],
    )


def local_blend() -> Workflow:
    """An edit that reaches the whole picture, kept to one object."""
    decodes, links = decoded(("sample", PAIRED), ("sample_blend", TARGETS))
    nodes = {
        "note": note(
            "Local blend",
            "The target turns the whole picture into a drawing. *Local Blend* lets only the region of "
            "*castle* change; everything else stays the source's. The region comes from the word's own "
            "attention, so nothing has to be painted; it is the mask on the right.",
            "another *threshold*: lower takes in more; *exclude*; or your own mask.",
        ),
        **common(batch=1),
        "prompts": prompts("a castle in a field", "children drawing of a castle in a field"),
        "tau": tau(0.5, 0.2),
        "blend": Node(
            "P2PLocalBlend",
            widgets={"words": "castle", "source_words": "castle", "exclude": "", "threshold": 0.7},
            room=ROWS,
        ),
        "sample": sampler(3, title="Paired Sampler, without blend"),
        "sample_blend": sampler(3, title="Paired Sampler, with blend", blend="blend"),
        **decodes,
        "maps": Node(
            "P2PAttentionMaps",
            {"maps": ("sample_blend", MAPS), "samples": ("sample_blend", TARGETS)},
            {"words": "castle", "branch": 1},
            room=ROWS,
        ),
        "mask": Node("MaskToImage", {"mask": ("maps", 1)}),
        "grid": Node(
            "P2PComparisonGrid",
            {**links, "images_3": ("mask", 0)},
            {"labels": "source\nwithout blend\nwith blend\nits mask", "columns": 4},
        ),
        "save": saved("local_blend", columns=4, rows=1, labels=True),
    }
    return Workflow(
        nodes,
        [
            START,
            [Group("The edit", [["prompts", "tau", "blend"]], "#8A8")],
            [Group("Without and with blend", [["sample"], ["sample_blend"]], "#88A")],
            [Group("Decode", [["decode1", "decode2", "maps", "mask"]], "#88A")],
            [Group("The region that may change", [["grid", "save"]], "#b58b2a")],
        ],
    )


def attention_maps() -> Workflow:
    """Where each word looks, in the source and in the target."""
    nodes = {
        "note": note(
            "Attention maps",
            "Where the words looked while the pictures came to be, averaged over the run: the source above, "
            "the target below. *car* looks where *bicycle* did, because it took over its map.",
            "*start* and *end* on *Attention Maps*: early steps lay out, late ones refine. No words: all of "
            "them.",
        ),
        **common(batch=1),
        "prompts": prompts("a cat riding a bicycle", "a cat riding a car"),
        "tau": tau(),
        "sample": sampler(1),
    }
    for branch, (name, output, words) in enumerate(
        [("source", SOURCE, "cat, riding, bicycle"), ("target", TARGETS, "cat, riding, car")]
    ):
        nodes[f"decode_{name}"] = Node("VAEDecode", {"samples": ("sample", output), "vae": ("model", VAE)})
        nodes[f"maps_{name}"] = Node(
            "P2PAttentionMaps",
            {"maps": ("sample", MAPS), "samples": ("sample", output), "image": (f"decode_{name}", 0)},
            {"words": words, "branch": branch},
            f"Attention Maps, {name}",
            room=ROWS,
        )
    nodes |= {
        "grid": Node(
            "P2PComparisonGrid", grid_links(("maps_source", 0), ("maps_target", 0)), {"columns": 3}
        ),
        "save": saved("attention_maps", columns=3, rows=2, labels=True),
    }
    return Workflow(
        nodes,
        [
            START,
            [Group("The edit", [["prompts", "tau"]], "#8A8")],
            [Group("Source and target together", [["sample"]], "#88A")],
            [
                Group("The source's words", [["decode_source", "maps_source"]], "#88A"),
                Group("The target's words", [["decode_target", "maps_target"]], "#88A"),
            ],
            [Group("Source above, target below", [["grid", "save"]], "#b58b2a")],
        ],
    )


PHOTOGRAPH = "a castle on a mountain"  # what the demo's picture shows


def inverted(encode: Node) -> dict[str, Node]:
    """The picture that comes with the demo model, and its inversion under the prompt of `encode`."""
    return common(batch=1) | {
        "latent": Node("VAEEncode", {"pixels": ("model", IMAGE), "vae": ("model", VAE)}),
        "encode": encode,
        "invert": Node(
            "P2PInvert",
            {"model": ("model", MODEL), "positive": ("encode", 0), "latent": ("latent", 0)},
            {"steps": SETTINGS["steps"], "scheduler": SETTINGS["scheduler"]},
            room=PREVIEW,
        ),
    }


def picture_note(title: str, shows: str, attempt: str) -> Node:
    """A note for workflows that edit a picture."""
    own = (
        "**Your own picture:** *Load Image* instead of the demo's picture, what it shows as the source "
        "prompt, and 50 steps in *Invert Image* and in the sampler.\n\n"
    )
    return note(title, shows, attempt, own + CHECKPOINT)


PICTURE = [
    Group("Read me", [["note"]], "#a1309b"),
    Group("Model and picture", [["model", "negative", "latent"]]),
]


def photograph() -> Workflow:
    """A word swap on a picture that the model did not draw."""
    nodes = {
        "note": picture_note(
            "Edit a photograph",
            "*Invert Image* finds the path on which the picture comes from noise. The source stays on it, so "
            "it is the picture itself, and the target is edited from it: *castle* becomes *house*.",
            "another word in *target*; a *Local Blend* with the target's word keeps the rest of the picture.",
        ),
        **inverted(Node("CLIPTextEncode", {"clip": ("model", CLIP), "text": ("source", 0)})),
        "source": Node(
            "PrimitiveStringMultiline",
            widgets={"value": PHOTOGRAPH},
            title="Source prompt",
            size=NEGATIVE_SIZE,
        ),
        "prompts": Node(
            "P2PPromptPair",
            {"clip": ("model", CLIP), "source": ("source", 0)},
            {"source": PHOTOGRAPH, "target": "a house on a mountain", "mode": "auto"},
            size=PROMPT_SIZE,
        ),
        "tau": tau(),
        "sample": sampler(seed=1, trajectory="invert"),
        "decode": Node("VAEDecode", {"samples": ("sample", TARGETS), "vae": ("model", VAE)}),
        "grid": Node(
            "P2PComparisonGrid",
            grid_links(("model", IMAGE), ("decode", 0)),
            {"labels": "picture\nedited", "columns": 2},
        ),
        "save": saved("photograph", columns=2, rows=1, labels=True),
    }
    return Workflow(
        nodes,
        [
            PICTURE,
            [Group("Back to noise", [["source", "encode", "invert"]], "#88A")],
            [Group("The edit", [["prompts", "tau"]], "#8A8")],
            [Group("Picture and target together", [["sample", "decode"]], "#88A")],
            [Group("Before and after", [["grid", "save"]], "#b58b2a")],
        ],
    )


def plug_and_play() -> Workflow:
    """The structure of a picture under other prompts, on the stock KSampler."""
    nodes = {
        "note": picture_note(
            "Plug-and-Play features",
            "The targets take the picture's features and self-attention: its structure stays, and their "
            "prompts may say what they like. The source is denoised without a prompt, as published.",
            "*feature_end* and *attention_end* lower, for shapes that follow the target prompt more.",
        ),
        **inverted(
            Node(
                "CLIPTextEncode",
                {"clip": ("model", CLIP)},
                {"text": ""},
                "Source without a prompt",
                NEGATIVE_SIZE,
            )
        ),
        "prompts": prompts(PHOTOGRAPH, "children drawing of a castle on a mountain"),
        "more": Node(
            "P2PAddTarget",
            {"clip": ("model", CLIP), "edit": ("prompts", 0)},
            {"target": "a castle in a desert", "mode": "auto"},
            size=PROMPT_SIZE,
        ),
        "control": Node(
            "P2PFeatureInjection",
            {
                "model": ("model", MODEL),
                "edit": ("more", 0),
                "trajectory": ("invert", 0),
                "source_conditioning": ("encode", 0),
            },
        ),
        "pair": Node("P2PPairedLatent", {"latent": ("latent", 0), "edit": ("more", 0)}),
        "sample": Node(
            "KSampler",
            {
                "model": ("control", 0),
                "positive": ("control", 1),
                "negative": ("negative", 0),
                "latent_image": ("pair", 0),
            },
            {"seed": 1, "control_after_generate": "fixed", "denoise": 1.0, **SETTINGS},
            size=SAMPLER_SIZE,
            room=PREVIEW,
        ),
        "decode": Node("VAEDecode", {"samples": ("sample", 0), "vae": ("model", VAE)}),
        "grid": Node(
            "P2PComparisonGrid",
            {"images": ("decode", 0)},
            {"labels": "picture\nchildren drawing\nin a desert", "columns": 3},
        ),
        "save": saved("plug_and_play", columns=3, rows=1, labels=True),
    }
    return Workflow(
        nodes,
        [
            PICTURE,
            [Group("Back to noise", [["encode", "invert"]], "#88A")],
            [Group("The edits", [["prompts", "more"]], "#8A8")],
            [Group("Stock nodes, paired", [["control", "pair", "sample", "decode"]], "#88A")],
            [Group("Picture and targets", [["grid", "save"]], "#b58b2a")],
        ],
    )


def mutual_attention() -> Workflow:
    """A new pose with the old looks, beside Prompt-to-Prompt, which keeps the pose."""
    nodes = {
        "note": note(
            "Mutual self-attention: poses and shapes",
            "The cat is to ride a car. Prompt-to-Prompt keeps the source's shapes, so the cat stands where "
            "it stood. With *self_mode* mutual (MasaCtrl) the target lays itself out by its own prompt and "
            "takes its looks from the source. Rows: source, map mode, mutual mode.",
            "*self_start* higher on the mutual *tau Scheduler*: more freedom; *mutual_layer* 0: more of the "
            "source.",
        ),
        **common(batch=3),
        "prompts": prompts("a cat in a forest", "a cat riding a car in a forest"),
        "tau_map": tau(title="\u03c4 Scheduler, map mode"),
        "tau_mutual": Node(
            "P2PTauScheduler",
            widgets={"cross_end": 0.0, "self_start": 0.1, "self_end": 1.0, "self_mode": "mutual"},
            title="\u03c4 Scheduler, mutual mode",
        ),
        "map": sampler(0, schedule="tau_map", title="Paired Sampler, map mode"),
        "mutual": sampler(0, schedule="tau_mutual", title="Paired Sampler, mutual mode"),
        **ending(
            "mutual_attention",
            [("map", SOURCE), ("map", TARGETS), ("mutual", TARGETS)],
            [],
            columns=3,
            rows=3,
        ),
    }
    return Workflow(
        nodes,
        [
            START,
            [Group("The edit", [["prompts"]], "#8A8")],
            [
                Group("Prompt-to-Prompt", [["tau_map"], ["map"]], "#88A"),
                Group("Mutual self-attention", [["tau_mutual"], ["mutual"]], "#88A"),
            ],
            [Group("Decode", [["decode1", "decode2", "decode3"]], "#88A")],
            [Group("Source, map mode, mutual mode", [["grid", "save"]], "#b58b2a")],
        ],
    )


def second_pass() -> Workflow:
    """Hires fix: both branches go on, larger, from their own latents."""
    nodes = {
        "note": note(
            "A second pass (hires fix)",
            "*paired* of the first *Paired Sampler* is upscaled and goes on in a second one with the same "
            "edit, each picture from its own latent. Top: the source. Bottom: the target.",
            "*denoise* of the second sampler lower for less change, and *cross_end* of its *tau Scheduler* "
            "lower for more freedom.",
        ),
        **common(batch=2),
        "prompts": prompts("a castle in a forest", "a castle in a snowy forest"),
        "tau": tau(),
        "sample": sampler(seed=2),
        "upscale": Node(
            "LatentUpscaleBy",
            {"samples": ("sample", PAIRED)},
            {"upscale_method": "bicubic", "scale_by": 1.5},
        ),
        "tau2": tau(title="tau Scheduler, second pass"),
        "sample2": sampler(
            2, schedule="tau2", title="Paired Sampler, second pass", denoise=0.55, latent="upscale"
        ),
        **ending("second_pass", [("sample2", SOURCE), ("sample2", TARGETS)], [], columns=2, rows=2),
    }
    return Workflow(
        nodes,
        [
            START,
            [Group("The edit", [["prompts", "tau"]], "#8A8")],
            [Group("First pass", [["sample", "upscale"]], "#88A")],
            [Group("Second pass, larger", [["tau2", "sample2", "decode1", "decode2"]], "#88A")],
            [Group("Source above, target below", [["grid", "save"]], "#b58b2a")],
        ],
    )


def training_pairs() -> Workflow:
    """Edited pairs with their instructions, written as a set to train on."""
    nodes = {
        "note": note(
            "A training set of edited pairs",
            "*Save Pairs* writes each source and target as a PNG file, and their prompts and the instruction "
            "as a line of *metadata.jsonl* beside them. Every run adds to the set.",
            "*randomize* as the seed's *control after generate*, and more than one run at a time; other "
            "prompts, with an instruction for each.",
        ),
        **common(batch=2),
        "prompts": prompts("a cat riding a bicycle", "a cat riding a car"),
        "target2": Node(
            "P2PAddTarget",
            {"clip": ("model", CLIP), "edit": ("prompts", 0)},
            {"target": "a cat riding a bicycle at night", "mode": "auto"},
            "Add Target 2",
            size=TARGET_SIZE,
        ),
        "tau": tau(),
        "sample": sampler(1, "target2"),
        "sources": Node("VAEDecode", {"samples": ("sample", SOURCE), "vae": ("model", VAE)}),
        "targets": Node("VAEDecode", {"samples": ("sample", TARGETS), "vae": ("model", VAE)}),
        "save": Node(
            "P2PSavePairs",
            {"edit": ("target2", 0), "source": ("sources", 0), "targets": ("targets", 0)},
            {
                "filename_prefix": f"{PACK}/pairs/pair",
                "instruction": "turn the bicycle into a car\nmake it night",
            },
            size=(620.0, 180.0),
            room=600.0,
        ),
    }
    return Workflow(
        nodes,
        [
            START,
            [Group("The edits", [["prompts", "tau"], ["target2"]], "#8A8")],
            [Group("One source, two targets", [["sample", "sources", "targets"]], "#88A")],
            [Group("The training set", [["save"]], "#b58b2a")],
        ],
    )


CATALOGUE = {
    "word_swap": word_swap,
    "refinement": refinement,
    "reweighting": reweighting,
    "tau": tau_sweep,
    "word_windows": word_windows,
    "several_targets": several_targets,
    "local_blend": local_blend,
    "attention_maps": attention_maps,
    "photograph": photograph,
    "plug_and_play": plug_and_play,
    "mutual_attention": mutual_attention,
    "second_pass": second_pass,
    "training_pairs": training_pairs,
}

# Adds nodes with their widgets and links to an empty graph; returns the size that each node asks for.
BUILD = """([nodes, id]) => {
  const graph = window.app.graph;
  graph.clear();
  graph.id = id;
  const made = {};
  for (const [key, spec] of Object.entries(nodes)) {
    const node = made[key] = window.LiteGraph.createNode(spec.type);
    if (!node) throw new Error(`this ComfyUI has no node called ${spec.type}`);
    graph.add(node);
    if (spec.title) node.title = spec.title;
    for (const [name, value] of Object.entries(spec.widgets)) {
      const widget = node.widgets?.find((w) => w.name === name) ?? node.widgets?.[name];
      if (!widget) throw new Error(`node ${spec.type} has no widget ${name}`);
      widget.value = value;
    }
  }
  for (const [key, spec] of Object.entries(nodes))
    for (const [input, [from, output]] of Object.entries(spec.links)) {
      if (!made[from].outputs[output]) throw new Error(`node ${made[from].type} has no output ${output}`);
      if (made[key].findInputSlot(input) < 0) throw new Error(`node ${spec.type} has no input ${input}`);
      if (!made[from].connect(output, made[key], made[key].findInputSlot(input)))
        throw new Error(`output ${output} of ${made[from].type} does not fit ${spec.type}.${input}`);
    }
  return Object.fromEntries(Object.entries(made).map(([key, node]) => {
    const [width, height] = node.computeSize();
    const {size: [atLeast, high], room} = nodes[key];
    const size = [Math.max(width, node.size[0], atLeast), Math.max(height, high) + room];
    return [key, {id: node.id, size}];
  }));
}"""

PLACE = """([nodes, groups]) => {
  const graph = window.app.graph;
  for (const {id, pos, size} of Object.values(nodes)) {
    const node = graph.getNodeById(id);
    node.pos = pos;
    node.setSize(size);
  }
  for (const {title, color, pos, size} of groups) {
    const group = new window.LiteGraph.LGraphGroup(title);
    group.pos = pos;
    group.size = size;
    group.color = color;
    graph.add(group);
  }
  // The whole graph in view when it is opened, clear of the page's bars.
  const right = Math.max(...groups.map((g) => g.pos[0] + g.size[0]));
  const bottom = Math.max(...groups.map((g) => g.pos[1] + g.size[1]));
  const scale = Math.min(1450 / right, 750 / bottom);
  window.app.canvas.ds.scale = scale;
  window.app.canvas.ds.offset = [80 / scale, 130 / scale];
}"""


def place(workflow: Workflow, nodes: dict[str, Any]) -> list[dict[str, Any]]:
    """Gives every node a position, column by column, and returns the groups with theirs."""
    groups = []
    x = 0.0
    for stack in workflow.layout:
        y = 0.0
        stack_width = 0.0
        for group in stack:
            left, bottom = x + GAP / 2, 0.0
            for column in group.columns:
                top = y + GROUP_TITLE
                width = max(NARROW, *(nodes[key]["size"][0] for key in column))
                for key in column:
                    node = nodes[key]
                    node["size"][0] = width
                    node["pos"] = [left, top + TITLE]
                    top += TITLE + node["size"][1] + GAP / 2
                left += width + GAP
                bottom = max(bottom, top)
            width = max(left - GAP / 2 - x, LETTER * len(group.title))
            groups.append(
                {"title": group.title, "color": group.color, "pos": [x, y], "size": [width, bottom - y]}
            )
            stack_width = max(stack_width, width)
            y = bottom + GAP
        x += stack_width + GAP
    return groups


def build(editor: Editor, name: str) -> dict[str, Any]:
    workflow = CATALOGUE[name]()
    placed = {
        key for stack in workflow.layout for group in stack for column in group.columns for key in column
    }
    if placed != set(workflow.nodes):
        raise ValueError(f"workflow {name}: not laid out: {sorted(set(workflow.nodes) ^ placed)}")
    described = {key: asdict(node) for key, node in workflow.nodes.items()}
    identity = str(uuid.uuid5(uuid.NAMESPACE_OID, f"{PACK}/{name}"))  # the same file from every build
    nodes = editor.page.evaluate(BUILD, [described, identity])
    groups = place(workflow, nodes)
    editor.page.evaluate(PLACE, [nodes, groups])
    editor.load(editor.workflow(), name)  # so that opening and saving it again changes nothing
    return editor.workflow()


def main() -> None:
    parser = argparse.ArgumentParser(description="Build workflows/*.json in ComfyUI's own page.")
    parser.add_argument(
        "names", nargs="*", default=list(CATALOGUE), metavar="name", help=", ".join(CATALOGUE)
    )
    names = parser.parse_args().names
    with running_server(cpu=True) as server, open_editor(server) as editor:
        for name in names:
            path = WORKFLOWS / f"{name}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(build(editor, name), indent=2) + "\n")
            print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
