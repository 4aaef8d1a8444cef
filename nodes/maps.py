"""Images of where words look."""

from __future__ import annotations

from comfy_api.latest import io
from einops import repeat
from torch import Tensor
from torch.nn.functional import interpolate

from ..drawing.heatmap import coverage, heatmaps
from ..sampling.maps import MapsHandle
from .types import CATEGORY, MapsIO, check_options

LAYERS = {"quarter": 4, "half": 2, "eighth": 8, "all": 0}
"""Names of the layers' resolutions, as fractions of the latent's sides -> downsampling, 0 for all."""


class AttentionMaps(io.ComfyNode):
    """Heat maps of words, and the final mask of a local blend."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="P2PAttentionMaps",
            display_name="Attention Maps",
            category=CATEGORY,
            description="Shows where each word of a prompt looked, and the mask of Local Blend.",
            inputs=[
                MapsIO.Input("maps", tooltip="From Attention Controller or Paired Sampler."),
                io.Latent.Input("samples", tooltip="What the sampler put out: its run's maps are shown."),
                io.String.Input(
                    "words",
                    default="",
                    tooltip="Words or phrases separated by commas; empty shows every word of the prompt.",
                ),
                io.Int.Input(
                    "branch",
                    default=0,
                    min=0,
                    max=64,
                    tooltip="Whose prompt: 0 for the source, 1 for the first target, and so on.",
                ),
                io.Image.Input(
                    "image", optional=True, tooltip="Pictures of that branch, to lay the heat maps over."
                ),
                io.Combo.Input(
                    "layers",
                    options=list(LAYERS),
                    default="quarter",
                    optional=True,
                    tooltip="Which layers to average, by their size as a fraction of the latent's sides.",
                ),
                io.Float.Input(
                    "start",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="First part of the run to average over, as a fraction of its steps, from 0 to 1.",
                ),
                io.Float.Input(
                    "end",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Where that part ends, from 0 to 1; start 0 and end 1 are the whole run.",
                ),
            ],
            outputs=[
                io.Image.Output("heatmaps", display_name="heat-maps"),
                io.Mask.Output("mask", display_name="mask"),
            ],
        )

    @classmethod
    def validate_inputs(cls, start: float | None = None, end: float | None = None) -> bool | str:
        if start is not None and end is not None and start >= end:
            return f"start is {start:g} and end is {end:g}; expected start below end."
        return True

    @classmethod
    def execute(
        cls,
        maps: MapsHandle,
        samples: dict,
        words: str,
        branch: int,
        image: Tensor | None = None,
        layers: str = "quarter",
        start: float = 0.0,
        end: float = 1.0,
    ) -> io.NodeOutput:
        check_options(layers=(layers, list(LAYERS)))
        run = maps.maps_of(samples["samples"])
        labels, phrases = run.phrases(branch, words)
        found = run.of(branch, phrases, run.layers(LAYERS[layers]), start, end)
        pairs, branches = found.shape[0], run.edit.branches
        under = None if image is None else images_of(image, pairs, branch, branches)
        size = tuple(side * run.pixels for side in run.size) if under is None else under.shape[1:3]
        large = interpolate(found, size, mode="bilinear", align_corners=False)
        blend = run.blend_of(branch)
        mask = coverage(large) if blend is None else interpolate(blend[:, None], size, mode="nearest")[:, 0]
        return io.NodeOutput(heatmaps(large, labels, under), mask)


def images_of(images: Tensor, pairs: int, branch: int, branches: int) -> Tensor:
    """The images of a branch, one for each pair: (pairs, height, width, channels).

    images: one for all pairs, one for each pair, or those of all branches or of all targets, pair by pair.
    As many as there are pairs are taken for this branch's own: branch 0 needs the source's, not the targets'.
    Raises ValueError for any other number of images.
    """
    rows = images.shape[0]
    if rows == pairs:
        return images
    if rows == 1:
        return repeat(images, "1 ... -> p ...", p=pairs)
    if rows == pairs * branches:
        return images[branch::branches]
    if rows == pairs * (branches - 1) and branch > 0:
        return images[branch - 1 :: branches - 1]
    raise ValueError(
        f"There are {rows} images for {pairs} pair{'s' if pairs > 1 else ''} of {branches} branches; "
        f"expected 1, {pairs} (this branch's), {pairs * branches} (all branches)"
        + (f" or {pairs * (branches - 1)} (all targets)." if branch else ".")
    )
