"""How well a pair shows its edit: CLIP's similarities as published, and what changed, by sides of a mask."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from .store import Store, image_names

DIGITS = 4


class Clip:
    """A CLIP or SigLIP of the `transformers` library.

    name: a folder, or a name on the hub. Raises OSError or ValueError, as the library does, if there is none.
    """

    def __init__(self, name: str):
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModel.from_pretrained(name, dtype=torch.float32).eval().to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.process = AutoImageProcessor.from_pretrained(name)
        self.length = self.model.config.text_config.max_position_embeddings
        self.text = lru_cache(1024)(self._text)

    def _text(self, text: str) -> Tensor:
        """(width,) of length 1. A prompt that is too long is cut, as in the published code."""
        siglip = "siglip" in self.model.config.model_type  # was trained on padded texts
        tokens = self.tokenizer(
            [text],
            padding="max_length" if siglip else True,
            max_length=self.length,
            truncation=True,
            return_tensors="pt",
        )
        names = ("input_ids",) if siglip else ("input_ids", "attention_mask")
        found = self.model.get_text_features(**{name: tokens[name].to(self.model.device) for name in names})
        return F.normalize(_features(found), dim=-1)[0].cpu()

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """(images, width), each of length 1."""
        pixels = self.process(images=list(images), return_tensors="pt")["pixel_values"]
        found = self.model.get_image_features(pixel_values=pixels.to(self.model.device))
        return F.normalize(_features(found), dim=-1).cpu()


def _features(found: Any) -> Tensor:
    """Later versions of the library wrap the embedding."""
    return (found if isinstance(found, Tensor) else found.pooler_output).float()


def similarities(images: Tensor, texts: Tensor) -> dict[str, float]:
    """Cosines of a pair: clip_sim_0 and _1 of each image with its prompt, clip_sim_image of both, and

        clip_sim_dir = cos(I_1 - I_0, T_1 - T_0)

    images I, texts T: (2, width) of length 1, source and target. 0 where the prompts are the same.
    Source: Gal et al. 2022 (direction); Brooks et al. 2023, section 3.1.2.
    """
    own = F.cosine_similarity(images, texts)
    direction = F.cosine_similarity(images[1] - images[0], texts[1] - texts[0], dim=0)
    between = F.cosine_similarity(images[0], images[1], dim=0)
    values = {
        "clip_sim_0": own[0],
        "clip_sim_1": own[1],
        "clip_sim_dir": direction,
        "clip_sim_image": between,
    }
    return {name: round(float(value), DIGITS) for name, value in values.items()}


def ssim_map(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Structural similarity of each pixel in windows of 11 px, mean of the channels, (height, width).

    a, b: (height, width, 3), 0 to 1. Source: Wang et al. 2004, equation 13.
    """
    from kornia.metrics import ssim

    x, y = (torch.from_numpy(v).permute(2, 0, 1)[None] for v in (a, b))
    return ssim(x, y, 11)[0].mean(0).numpy()


def changes(source: np.ndarray, target: np.ndarray, mask: np.ndarray | None) -> dict[str, float | None]:
    """SSIM of the pair; with a mask also SSIM and mean absolute difference (0 to 1) on both its sides.

    source, target: (height, width, 3), 0 to 1. mask: bool (height, width), where the target may differ. A
    side without pixels is None.
    """
    maps, distance = ssim_map(source, target), np.abs(source - target).mean(2)
    found: dict[str, float | None] = {"ssim": round(float(maps.mean()), DIGITS)}
    if mask is None:
        return found
    for side, where in (("inside", mask), ("outside", ~mask)):
        for name, values in (("ssim", maps), ("distance", distance)):
            found[f"{name}_{side}"] = round(float(values[where].mean()), DIGITS) if where.any() else None
    return found


class Scorer:
    """An actor that scores pairs from their files. clip: None for no CLIP."""

    def __init__(self, address: str, clip: str | None):
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        self.store = Store(address)
        self.clip = Clip(clip) if clip else None

    def score(self, name: str, original_prompt: str, edited_prompt: str) -> dict[str, float | None]:
        """All scores of a try. One pair at a time: the same numbers in whatever company it comes."""
        source, target, mask = (self._image(file) for file in image_names(name))
        assert source is not None and target is not None
        region = None if mask is None else np.asarray(mask.convert("L").resize(source.size, 0)) > 127
        pixels = [np.asarray(image, np.float64) / 255 for image in (source, target)]
        found = changes(*pixels, region)
        if self.clip is not None:
            texts = torch.stack([self.clip.text(original_prompt), self.clip.text(edited_prompt)])
            found |= similarities(self.clip.images([source, target]), texts)
        return found

    def _image(self, name: str) -> Image.Image | None:
        try:
            image = Image.open(io.BytesIO(self.store.read(name)))
        except FileNotFoundError:
            return None
        return image if name.endswith("_mask.png") else image.convert("RGB")


def check_clip(name: str) -> None:
    """Raise ValueError, in one line, unless the library finds a model of two towers under the name."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name)
    except Exception as error:  # the library's errors are many and long
        reason = str(error).splitlines()[0]
        where = "folder" if Path(name).exists() else "folder or name on the hub"
        raise ValueError(f"no CLIP in the {where} {name}: {reason}") from None
    if not hasattr(config, "text_config") or not hasattr(config, "vision_config"):
        raise ValueError(f"{name} is a {config.model_type}, no CLIP or SigLIP")
