"""How well a pair shows its edit: CLIP's similarities as published, and what changed, by sides of a mask."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .store import Store, image_names

DIGITS = 4
DEMO = "demo"
BUNDLED_CLIP = Path(__file__).resolve().parent.parent / "demo" / "clip"


class Clip:
    """A CLIP or SigLIP of the `transformers` library.

    name: a folder, a name on the hub, or "demo" for the bundled one. Raises OSError or ValueError, as the
    library does, if there is none.
    """

    def __init__(self, name: str):
        import torch
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        name = str(BUNDLED_CLIP) if name == DEMO else name
        torch.set_num_threads(1)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModel.from_pretrained(name, dtype=torch.float32).eval().to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.process = AutoImageProcessor.from_pretrained(name)
        self.length = self.model.config.text_config.max_position_embeddings
        self.text = lru_cache(1024)(self._text)
        self.inference = torch.inference_mode

    def _text(self, text: str) -> np.ndarray:
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
        given = {name: tokens[name].to(self.model.device) for name in names}
        with self.inference():  # here, because an actor's calls come from other threads than its making
            return _unit(self.model.get_text_features(**given))[0]

    def images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """(images, width), each of length 1."""
        pixels = self.process(images=list(images), return_tensors="pt")["pixel_values"]
        with self.inference():
            return _unit(self.model.get_image_features(pixel_values=pixels.to(self.model.device)))


def _unit(found: Any) -> np.ndarray:
    """Embeddings of length 1; later versions of the library wrap them."""
    rows = getattr(found, "pooler_output", found).double().cpu().numpy()
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """0 where one of them is zero."""
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / length if length else 0.0


def similarities(images: np.ndarray, texts: np.ndarray) -> dict[str, float]:
    """Cosines of a pair: clip_sim_0 and _1 of each image with its prompt, clip_sim_image of both, and

        clip_sim_dir = cos(I_1 - I_0, T_1 - T_0)

    images I, texts T: (2, width) of length 1, source and target. The direction is 0 for equal prompts.
    Source: Gal et al. 2022 (direction); Brooks et al. 2023, section 3.1.2.
    """
    values = {
        "clip_sim_0": cosine(images[0], texts[0]),
        "clip_sim_1": cosine(images[1], texts[1]),
        "clip_sim_dir": cosine(images[1] - images[0], texts[1] - texts[0]),
        "clip_sim_image": cosine(images[0], images[1]),
    }
    return {name: round(value, DIGITS) for name, value in values.items()}


def ssim_map(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Structural similarity of each pixel in windows of 11 px, mean of the channels, (height, width).

        ((2 m_a m_b + C_1) (2 s_ab + C_2)) / ((m_a^2 + m_b^2 + C_1) (s_a^2 + s_b^2 + C_2))

    a, b: (height, width, 3), 0 to 1. Gaussian windows of deviation 1.5 px; C_1 = 0.01^2, C_2 = 0.03^2.
    Source: Wang et al. 2004, equation 13.
    """
    from scipy.ndimage import gaussian_filter

    def mean(values: np.ndarray) -> np.ndarray:
        return gaussian_filter(values, (1.5, 1.5, 0), mode="mirror", radius=(5, 5, 0))

    ma, mb = mean(a), mean(b)
    va, vb, both = mean(a * a) - ma * ma, mean(b * b) - mb * mb, mean(a * b) - ma * mb
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * ma * mb + c1) * (2 * both + c2)
    return (top / ((ma * ma + mb * mb + c1) * (va + vb + c2))).mean(2)


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
        self.store = Store(address)
        self.clip = Clip(clip) if clip else None

    def score(self, name: str, original_prompt: str, edited_prompt: str) -> dict[str, float | None]:
        """All scores of a try. One pair at a time: the same numbers in whatever company it comes."""
        source, target, mask = (self._image(file) for file in image_names(name))
        assert source is not None and target is not None
        region = None if mask is None else np.asarray(mask.convert("L").resize(source.size, 0)) > 127
        pixels = [np.asarray(image, np.float64) / 255 for image in (source, target)]
        found = changes(pixels[0], pixels[1], region)
        if self.clip is not None:
            texts = np.stack([self.clip.text(original_prompt), self.clip.text(edited_prompt)])
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
