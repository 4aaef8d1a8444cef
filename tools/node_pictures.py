"""Draws the pictures of the nodes' help pages: each node in a graph, and what its values do to a picture.

    python -m tools.node_pictures [node ...]

Pictures land in web/docs/pictures: NODE.png is a photograph of ComfyUI's page, NODE-INPUT.jpg shows what the
bundled model draws at low, default and high values.
"""

from __future__ import annotations

import argparse
import copy
import io
from dataclasses import dataclass, field
from typing import Any

import requests
from PIL import Image

from drawing.grid import contact_sheet

from .browser import Editor, open_editor
from .env import ROOT
from .graphs import Graph, Node, node, paired, stock
from .server import Server, ServerError, failure, running_server

PICTURES = ROOT / "web" / "docs" / "pictures"
COLORS = 96  # of a page's picture; it has few
MARGIN = 16  # px
CELL = 192  # px, one picture of an effect

SOURCE, TARGET = "a cat riding a bicycle", "a cat riding a car"


@dataclass(frozen=True)
class Scene:
    """A node among its neighbours: (type, output, input) before it, (output, type, input) after it."""

    before: tuple[tuple[str, int, str], ...] = ()
    after: tuple[tuple[int, str, str], ...] = ()
    widgets: dict[str, Any] = field(default_factory=dict)
    size: tuple[int, int] = (380, 0)  # px, at least


MODEL = ("P2PDemoModel", 0, "model")
EDIT = ("P2PPromptPair", 0, "edit")
TAU = ("P2PTauScheduler", 0, "tau")
SAMPLER = (0, "P2PSampler", "edit")
SCENES = {
    "P2PPromptPair": Scene(
        (("P2PDemoModel", 1, "clip"),),
        (SAMPLER,),
        {"source": "a cat riding a bicycle", "target": "a dog riding a red bicycle at night"},
        (440, 380),
    ),
    "P2PAddTarget": Scene(
        (EDIT, ("P2PDemoModel", 1, "clip")), (SAMPLER,), {"target": "a cat riding a bus"}, (400, 330)
    ),
    "P2PTokenReweight": Scene((EDIT,), (SAMPLER,), {"words": "snowy", "scale": 2.0}),
    "P2PTauScheduler": Scene(
        (), ((0, "P2PSampler", "tau"),), {"words": "hat: 0.6\nred hair: 0.2-0.9", "fade": 0.1}, (400, 510)
    ),
    "P2PTauSweep": Scene(
        (EDIT, TAU), (SAMPLER, (1, "P2PComparisonGrid", "labels")), {"count": 5, "parameter": "cross_end"}
    ),
    "P2PLocalBlend": Scene(
        (("LoadImage", 1, "mask"),),
        ((0, "P2PSampler", "blend"),),
        {"words": "car", "source_words": "bicycle"},
    ),
    "P2PAttentionController": Scene(
        (MODEL, EDIT, TAU), ((0, "KSampler", "model"), (1, "KSampler", "positive"))
    ),
    "P2PPairedLatent": Scene(
        (("EmptyLatentImage", 0, "latent"), EDIT), ((0, "KSampler", "latent_image"),), {}, (280, 0)
    ),
    "P2PSampler": Scene(
        (
            MODEL,
            EDIT,
            TAU,
            ("CLIPTextEncode", 0, "negative"),
            ("EmptyLatentImage", 0, "latent"),
        ),
        ((1, "VAEDecode", "samples"),),
    ),
    "P2PSplitBranches": Scene(
        (("VAEDecode", 0, "images"), EDIT), ((1, "PreviewImage", "images"),), {}, (280, 0)
    ),
    "P2PAttentionMaps": Scene(
        (("P2PSampler", 2, "maps"), ("P2PSampler", 0, "samples")),
        ((0, "PreviewImage", "images"),),
        {"words": "cat, bicycle"},
    ),
    "P2PInvert": Scene(
        (MODEL, ("CLIPTextEncode", 0, "positive"), ("VAEEncode", 0, "latent")),
        ((0, "P2PSampler", "trajectory"),),
    ),
    "P2PFeatureInjection": Scene(
        (MODEL, EDIT, ("P2PInvert", 0, "trajectory")), ((0, "KSampler", "model"), (1, "KSampler", "positive"))
    ),
    "P2PComparisonGrid": Scene(
        (("VAEDecode", 0, "images"),), ((0, "SaveImage", "images"),), {"labels": "source\ntarget"}, (340, 200)
    ),
    "P2PSavePairs": Scene(
        (EDIT, ("P2PSplitBranches", 0, "source"), ("P2PSplitBranches", 1, "targets")),
        (),
        {"instruction": "turn the bicycle into a car"},
        (380, 220),
    ),
    "P2PDemoModel": Scene(
        (),
        ((0, "P2PSampler", "model"), (1, "P2PPromptPair", "clip"), (2, "VAEDecode", "vae")),
        {},
        (260, 0),
    ),
}

# Puts a scene on the page, neighbours folded to their titles; returns where the node is once it was drawn.
SHOW = """([type, scene]) => {
  const graph = window.app.graph;
  graph.clear();
  const add = (type, x, y) => {
    const node = window.LiteGraph.createNode(type);
    node.pos = [x, y];
    graph.add(node);
    return node;
  };
  const main = add(type, 260, 0);
  for (const [name, value] of Object.entries(scene.widgets))
    main.widgets.find((widget) => widget.name === name).value = value;
  const computed = main.computeSize();
  main.setSize([Math.max(scene.size[0], computed[0]), Math.max(scene.size[1], computed[1])]);
  const known = new Map();
  const neighbour = (type, x, y) => {
    const key = `${type} ${x}`;
    if (!known.has(key)) {
      const node = add(type, x, y);
      for (const widget of node.widgets ?? [])
        if (scene.prompts[widget.name] && type === 'P2PPromptPair') widget.value = scene.prompts[widget.name];
      known.set(key, node);
    }
    return known.get(key);
  };
  const right = 260 + main.size[0] + 60;
  const step = 44;
  const slot = (node, name) => node.inputs.findIndex((input) => input.name === name);
  scene.before.forEach(([type, output, input], n) =>
    neighbour(type, 0, 20 + step * n).connect(output, main, slot(main, input)));
  scene.after.forEach(([output, type, input], n) => {
    const node = neighbour(type, right, 20 + step * n);
    main.connect(output, node, slot(node, input));
  });
  for (const node of known.values()) node.flags.collapsed = true;
  window.app.canvas.ds.scale = 1;
  window.app.canvas.ds.offset = [140, 190];
  window.app.canvas.deselectAll?.();
  window.app.canvas.setDirty(true, true);
}"""
FRAME = """() => {
  const boxes = window.app.graph.nodes.map((node) => node.getBounding());
  const edge = (pick, n) => pick(...boxes.map((box) => box[n]));
  const [x, y] = [edge(Math.min, 0), edge(Math.min, 1)];
  const right = Math.max(...boxes.map((box) => box[0] + box[2]));
  const bottom = Math.max(...boxes.map((box) => box[1] + box[3]));
  const corner = window.app.canvas.canvas.getBoundingClientRect();
  const { offset } = window.app.canvas.ds;
  return { x: corner.x + x + offset[0], y: corner.y + y + offset[1], width: right - x, height: bottom - y };
}"""


def photograph(editor: Editor, node: str, scene: Scene) -> None:
    """NODE.png: the node in a graph, as the page shows it."""
    described = {
        "before": scene.before,
        "after": scene.after,
        "widgets": scene.widgets,
        "size": scene.size,
        "prompts": {"source": SOURCE, "target": TARGET},
    }
    editor.page.evaluate(SHOW, [node, described])
    editor.page.wait_for_timeout(1500)  # the pictures in nodes ask the server
    frame = editor.page.evaluate(FRAME)
    content = editor.page.screenshot(
        clip={
            "x": frame["x"] - MARGIN,
            "y": frame["y"] - MARGIN,
            "width": frame["width"] + 2 * MARGIN,
            "height": frame["height"] + 2 * MARGIN,
        }
    )
    image = Image.open(io.BytesIO(content)).convert("RGB")
    image.quantize(COLORS, dither=Image.Dither.NONE).save(PICTURES / f"{node}.png", optimize=True)


def saved(decoded: list[Any], name: str) -> Node:
    return node("SaveImage", images=decoded, filename_prefix=name)


def base(source: str = SOURCE, target: str = TARGET) -> Graph:
    """The graph whose values the effects vary."""
    return {
        **paired(source, target),
        "save": saved(["decode", 0], "effect"),
        "decode_source": node("VAEDecode", samples=["sample", 0], vae=["model", 2]),
        "save_source": saved(["decode_source", 0], "source"),
    }


def reweight() -> Graph:
    prompt = "a house on a snowy street"
    graph = base(prompt, prompt)
    graph["weight"] = node("P2PTokenReweight", edit=["prompts", 0], words="snowy", scale=1.0, target=0)
    graph["tau"]["inputs"]["cross_end"] = 1.0
    graph["sample"]["inputs"]["edit"] = ["weight", 0]
    return graph


def outlines() -> Graph:
    graph = base("a tree in a field", "a castle in a field")
    graph["tau"]["inputs"]["cross_end"] = 0.2
    return graph


def blend() -> Graph:
    graph = base("a tree in a field", "a castle in a field")
    graph["blend"] = node(
        "P2PLocalBlend", words="castle", source_words="tree", exclude="", threshold=0.3, start=0.2
    )
    graph["tau"]["inputs"] |= {"cross_end": 0.4, "self_end": 0.2}
    graph["sample"]["inputs"]["blend"] = ["blend", 0]
    return graph


def features() -> Graph:
    return {
        **stock(node("P2PFeatureInjection", feature_end=0.8, attention_end=0.5), SOURCE, TARGET),
        "split": node("P2PSplitBranches", images=["decode", 0], edit=["prompts", 0]),
        "save": saved(["split", 1], "effect"),
        "save_source": saved(["split", 0], "source"),
    }


@dataclass(frozen=True)
class Effect:
    """What an input of a node in a graph does at several values."""

    graph: Graph
    node: str
    input: str
    values: tuple[Any, ...]


EFFECTS = {
    "P2PPromptPair": (Effect(base(), "prompts", "mode", ("swap", "refine")),),
    "P2PTauScheduler": (
        Effect(base(), "tau", "cross_end", (0.0, 0.4, 0.8, 1.0)),
        Effect(outlines(), "tau", "self_end", (0.0, 0.4, 0.8, 1.0)),
    ),
    "P2PTokenReweight": (Effect(reweight(), "weight", "scale", (-2.0, 0.0, 1.0, 2.0)),),
    "P2PLocalBlend": (Effect(blend(), "blend", "threshold", (0.1, 0.3, 0.6, 0.85)),),
    "P2PFeatureInjection": (Effect(features(), "control", "feature_end", (0.0, 0.4, 0.8)),),
}


def run(server: Server, graph: Graph) -> dict[str, Image.Image]:
    """The first picture of each node that saved some."""
    answer = server.queue(graph).json()
    if "prompt_id" not in answer:
        raise ServerError(f"the server did not take the graph: {answer}")
    entry = server.wait(answer["prompt_id"])
    if message := failure(entry):
        raise ServerError(message)
    found: dict[str, Image.Image] = {}
    for saver, content in server.images(entry):
        found.setdefault(saver, Image.open(io.BytesIO(content)).convert("RGB"))
    return found


def draw_effect(server: Server, node: str, effect: Effect) -> None:
    """NODE-INPUT.jpg: the source, and the target at each value."""
    cells: list[tuple[str, Image.Image]] = []
    for value in effect.values:
        graph = copy.deepcopy(effect.graph)
        graph[effect.node]["inputs"][effect.input] = value
        graph["save"]["inputs"]["filename_prefix"] = f"{node}-{effect.input}-{value}"
        pictures = run(server, graph)
        if "save_source" in pictures and not cells:
            cells.append(("source", pictures["save_source"]))
        cells.append((f"{effect.input} {value}", pictures["save"]))
    labels = [label for label, _ in cells]
    images = [image.resize((CELL, CELL), Image.Resampling.LANCZOS) for _, image in cells]
    sheet = contact_sheet(images, labels, len(cells))
    sheet.save(PICTURES / f"{node}-{effect.input}.jpg", quality=85)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the pictures of the nodes' help pages.")
    parser.add_argument("nodes", nargs="*", default=list(SCENES), metavar="node")
    nodes = parser.parse_args().nodes
    PICTURES.mkdir(parents=True, exist_ok=True)
    with running_server() as server:
        requests.post(
            f"{server.url}/settings", json={"Comfy.NodeBadge.NodeSourceBadgeMode": "None"}, timeout=30
        ).raise_for_status()
        with open_editor(server) as editor:
            for node in nodes:
                photograph(editor, node, SCENES[node])
        for node in nodes:
            for effect in EFFECTS.get(node, ()):
                draw_effect(server, node, effect)
    print(f"wrote {sum(1 for _ in PICTURES.iterdir())} pictures to {PICTURES.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
