"""Transformers by family: which attention calls a forward makes, and where its text and image tokens lie.

Names only: a family is found by the class of the host's model, its blocks by their paths in the network, so
that nothing here needs a host that has them all. A new family is one entry of `FAMILIES` and one of the
tests'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import accumulate
from typing import Any, Literal

from torch import Tensor

from ..attention.joint import Tokens
from ..attention.taken import Layer

Part = Literal["registers", "text", "references", "image"]


@dataclass(frozen=True)
class Stage:
    """Blocks that run one after another.

    blocks: their path in the network; numbers index. calls: of each block, in order; "self?x_block.attn2"
    is one that only blocks with that attribute make. references: whether it runs only with reference
    images.
    """

    blocks: str
    calls: tuple[str, ...]
    references: bool = False


@dataclass(frozen=True)
class TextPart:
    """A part of the text: the argument of `apply_model` with its features, and their tokens' axis."""

    key: str = "c_crossattn"
    axis: int = 1


@dataclass(frozen=True)
class Family:
    """A kind of transformer.

    name: as users know it. models: classes in `comfy.model_base`. having: what the network must have, a path;
    entries with one stand before those without. stages: its attention calls. order: of the tokens in joint
    attention; empty where text is only read by cross-attention. texts: parts of the text, in the order of
    their tokens. patch: side of an image token in latent pixels; of frames it is 1.
    padding: the side on which prompts of unequal length are padded exactly; None where no padding is exact,
    and then unequal says why. front: tokens to which the host itself pads a prompt, on the left.
    multiple: the attribute with the multiple to which the network itself fills up text and image, each on its
    own. registers: number of learned tokens. module: the module whose attention function is called without
    the forward's options, and has to be given them.
    clearest: number of the network's attention calls -> blocks of the first stage in which words' maps are
    clearest, where they are known: the five best of Shin et al., ICCV 2025, in the authors' code.
    """

    name: str
    models: tuple[str, ...]
    stages: tuple[Stage, ...]
    order: tuple[Part, ...] = ()
    having: str | None = None
    texts: tuple[TextPart, ...] = (TextPart(),)
    patch: int = 2
    padding: Literal["end", "front"] | None = "end"
    unequal: str = ""
    pad_token: tuple[str, str] | None = None
    mean: str | None = None
    front: int = 0
    multiple: str | None = None
    registers: int = 0
    module: str | None = None
    clearest: Mapping[int, tuple[int, ...]] = field(default_factory=dict, hash=False)

    @property
    def joint(self) -> bool:
        return bool(self.order)

    def text_lengths(self, arguments: Mapping[str, Any]) -> tuple[int, ...]:
        """Tokens of each part of the text, from the arguments of `apply_model`; 0 for a part not given."""
        given = (arguments.get(part.key) for part in self.texts)
        return tuple(
            0 if x is None else x.shape[part.axis] for x, part in zip(given, self.texts, strict=True)
        )

    def grid(self, x: Tensor) -> tuple[int, int, int]:
        """Frames, rows and columns of the image's tokens, for latents (b, c, (frames,) rows, columns)."""
        frames = x.shape[2] if x.ndim == 5 else 1
        rows, columns = (math.ceil(side / self.patch) for side in x.shape[-2:])
        return frames, rows, columns

    def map_layers(self, layers: Sequence[Layer]) -> tuple[Layer, ...]:
        """The layers whose words' maps are read: in the clearest blocks, or the middle third of all.

        layers: of the whole network.
        """
        reading = tuple(layer for layer in layers if layer.kind in ("joint", "cross"))
        blocks = self.clearest.get(len(layers))
        if blocks is None:
            ends = len(reading) // 3
            return reading[ends : len(reading) - ends]
        return tuple(layer for layer in reading if layer.block[0] == 0 and layer.block[1] in blocks)

    def tokens(self, texts: Sequence[int], image: int, length: int, multiple: int = 1) -> Tokens:
        """Where the tokens of a joint call lie.

        texts: tokens of each part of the text. image: tokens of the image. length: of the call; what is
        left of it are reference images. multiple: the value of the attribute `multiple`.
        """
        fill = sum(texts) + -sum(texts) % multiple
        sizes = {"registers": self.registers, "text": fill, "image": image + -image % multiple}
        sizes["references"] = length - sum(sizes[part] for part in self.order if part != "references")
        ends = dict(zip(self.order, accumulate(sizes[part] for part in self.order), strict=True))
        begin = {part: end - sizes[part] for part, end in ends.items()}
        stops = [begin["text"] + stop for stop in accumulate(texts)]
        parts = tuple(slice(stop - size, stop) for stop, size in zip(stops, texts, strict=True))
        return Tokens(parts, slice(begin["image"], begin["image"] + image))


def family_of(model: Any) -> Family | None:
    """The family of one of the host's models (`comfy.model_base.BaseModel`), or None."""
    name = type(model).__name__
    for family in FAMILIES:
        if name in family.models and (family.having is None or at(model.diffusion_model, family.having)):
            return family
    return None


def layers_of(family: Family, network: Any, references: bool = False) -> tuple[Layer, ...]:
    """The attention calls of one forward, in order. references: whether it has reference images."""
    return tuple(
        Layer(kind, (n, block), family.patch)  # type: ignore[arg-type]
        for n, stage in enumerate(family.stages)
        if references or not stage.references
        for block, module in enumerate(at(network, stage.blocks))
        for kind, _, needs in (call.partition("?") for call in stage.calls)
        if not needs or at(module, needs)
    )


def at(module: Any, path: str) -> Any:
    """What stands at a path of attributes and numbers, or None."""

    def step(found: Any, name: str) -> Any:
        if name.isdigit():
            return found[int(name)] if found is not None and int(name) < len(found) else None
        return getattr(found, name, None)

    return reduce(step, path.split("."), module)


JOINT = ("joint",)
FLUX = (Stage("double_blocks", JOINT), Stage("single_blocks", JOINT))
REFINED = (
    Stage("context_refiner", ("text",)),
    Stage("noise_refiner", ("self",)),
    Stage("ref_image_refiner", ("reference",), references=True),
)
HUNYUAN = (Stage("txt_in.individual_token_refiner.blocks", ("text",)), *FLUX)
CROSS = (Stage("blocks", ("self", "cross")),)
TEXT_FIRST: tuple[Part, ...] = ("text", "image", "references")
SHIFTED = "The position of its image tokens depends on the length of the prompt, which is one for all rows."

FAMILIES = (
    Family(
        "SD3",
        ("SD3",),
        (Stage("joint_blocks", ("joint", "self?x_block.attn2")),),
        ("text", "image"),
        clearest={24: (7, 8, 5, 4, 9), 37: (7, 9, 8, 5, 10), 38: (18, 21, 20, 24, 16)},  # 3 M, 3.5 M, 3.5 L
    ),
    Family(
        "AuraFlow",
        ("AuraFlow",),
        (Stage("double_layers", JOINT), Stage("single_layers", JOINT)),
        ("registers", "text", "image"),
        registers=8,
    ),
    Family("Flux", ("Flux",), FLUX, TEXT_FIRST, clearest={57: (18, 17, 12, 14, 11)}),
    Family("Flux.2", ("Flux2",), FLUX, TEXT_FIRST, patch=1, front=512),
    Family("LongCat-Image", ("LongCatImage",), FLUX, TEXT_FIRST, padding="front"),
    Family("Chroma", ("Chroma",), FLUX, TEXT_FIRST),
    Family("Chroma Radiance", ("ChromaRadiance",), FLUX, TEXT_FIRST, patch=16),
    Family("Qwen-Image", ("QwenImage",), (Stage("transformer_blocks", JOINT),), TEXT_FIRST),
    Family("Mage-Flow", ("MageFlow",), (Stage("transformer_blocks", JOINT),), TEXT_FIRST, patch=1),
    Family(
        "HiDream-I1",
        ("HiDream",),
        (Stage("double_stream_blocks", JOINT), Stage("single_stream_blocks", JOINT)),
        ("image", "text"),
        texts=(TextPart(), *[TextPart("encoder_hidden_states_llama3", 2)] * 2),
    ),
    Family(
        "Z-Image",
        ("Lumina2",),
        (*REFINED[:2], Stage("layers", JOINT)),
        ("text", "image"),
        having="pad_tokens_multiple",
        pad_token=("cap_embedder", "cap_pad_token"),
        multiple="pad_tokens_multiple",
    ),
    Family(
        "Lumina 2",
        ("Lumina2",),
        (*REFINED[:2], Stage("layers", JOINT)),
        ("text", "image"),
        padding="front",
    ),
    Family(
        "OmniGen2",
        ("Omnigen2",),
        (*REFINED, Stage("layers", JOINT)),
        ("text", "references", "image"),
        padding=None,
        unequal=SHIFTED,
    ),
    Family(
        "Boogu-Image",
        ("Boogu",),
        (*REFINED, Stage("double_stream_layers", ("joint", "self")), Stage("single_stream_layers", JOINT)),
        ("text", "references", "image"),
        padding=None,
        unequal=SHIFTED,
    ),
    Family(
        "Hunyuan Image 2.1",
        ("HunyuanImage21",),
        HUNYUAN,
        ("image", "text"),
        having="double_blocks.0.flipped_img_txt",
        texts=(TextPart(), TextPart("txt_byt5")),
        mean="txt_in.c_embedder",
        patch=1,
    ),
    Family(
        "Hunyuan Image 2.1",
        ("HunyuanImage21",),
        HUNYUAN,
        ("text", "image"),
        texts=(TextPart(), TextPart("txt_byt5")),
        mean="txt_in.c_embedder",
        patch=1,
    ),
    Family("Ideogram 4", ("Ideogram4",), (Stage("layers", JOINT),), ("text", "image"), patch=1),
    Family(
        "Krea 2",
        ("Krea2",),
        (
            Stage("txtfusion.layerwise_blocks", ("features",)),
            Stage("txtfusion.refiner_blocks", ("text",)),
            Stage("blocks", JOINT),
        ),
        TEXT_FIRST,
    ),
    Family("Lens", ("Lens",), (Stage("transformer_blocks", JOINT),), ("image", "text"), patch=1),
    Family("JoyImage", ("JoyImage",), (Stage("double_blocks", JOINT),), ("image", "references", "text")),
    Family(
        "PixelDiT",
        ("PixelDiTT2I",),
        (Stage("patch_blocks", JOINT), Stage("pixel_blocks", ("self",))),
        ("text", "image"),
        patch=16,
    ),
    Family(
        "Ernie Image",
        ("ErnieImage",),
        (Stage("layers", JOINT),),
        ("image", "text"),
        patch=1,
        padding=None,
        unequal=SHIFTED,
        module="comfy.ldm.ernie.model",
    ),
    Family("PixArt", ("PixArt",), CROSS, module="comfy.ldm.pixart.blocks"),
    Family(
        "HunyuanDiT",
        ("HunyuanDiT",),
        CROSS,
        texts=(TextPart(), TextPart("encoder_hidden_states_t5")),
        module="comfy.ldm.hydit.attn_layers",
    ),
    Family("Cosmos Predict2", ("CosmosPredict2",), CROSS),
    Family("Anima", ("Anima",), CROSS),
    Family("Wan", ("WAN21", "WAN22"), CROSS),
    Family("LTXV", ("LTXV",), (Stage("transformer_blocks", ("self", "cross")),), patch=1),
    Family(
        "Kandinsky 5",
        ("Kandinsky5", "Kandinsky5Image"),
        (Stage("text_transformer_blocks", ("text",)), Stage("visual_transformer_blocks", ("self", "cross"))),
    ),
)
