"""The actors that make images: one loads ComfyUI and a checkpoint, one draws flat images without a model."""

from __future__ import annotations

import io
import time
from typing import Any

import numpy as np
from PIL import Image

from .store import Store, image_names

DEMO = "demo"


class StandIn:
    """Draws flat images of each try's id, to try a table, a cluster or a disk at no cost.

    seconds: what a unit takes.
    """

    def __init__(self, address: str, seconds: float = 0.0):
        self.store, self.seconds = Store(address), seconds

    def make(self, unit: dict[str, Any]) -> None:
        for name in missing(self.store, unit):
            time.sleep(self.seconds / len(unit["ids"]))
            for file, letters in zip(image_names(name), (name[:6], name[6:12]), strict=False):
                color = tuple(bytes.fromhex(letters))
                save_image(self.store, file, np.full((unit["height"], unit["width"], 3), color, np.uint8))


class ComfySampler:
    """Samples units with the pack's own `sample_pairs`. Loads ComfyUI and the checkpoint once.

    checkpoint: a file that ComfyUI's checkpoint loader reads, or "demo" for the bundled model. threads: of
    the processor. Raises ValueError for a checkpoint without model, CLIP or VAE.
    """

    def __init__(self, address: str, checkpoint: str, threads: int):
        import torch

        from ..tools.env import import_host

        torch.set_num_threads(threads)
        torch.backends.cudnn.deterministic = True
        import_host(*([] if torch.cuda.is_available() else ["--cpu", "--use-pytorch-cross-attention"]))
        import comfy.samplers
        import comfy.utils

        comfy.utils.set_progress_bar_enabled(False)
        self.store, self.choices = Store(address), comfy.samplers.KSampler
        with torch.inference_mode():
            if checkpoint == DEMO:
                from ..demo.loader import load_demo_model

                parts = load_demo_model()
            else:
                parts = load_checkpoint(checkpoint)
        if any(part is None for part in parts):
            raise ValueError(f"{checkpoint} has no {', '.join(absent(parts))}; expected a whole checkpoint")
        self.model, self.clip, self.vae = parts

    def make(self, unit: dict[str, Any]) -> None:
        """Raises ValueError for a row that cannot be sampled, such as one with a blend word of no prompt."""
        import torch

        for name, known in (("sampler", self.choices.SAMPLERS), ("scheduler", self.choices.SCHEDULERS)):
            if unit[name] not in known:
                raise RuntimeError(f"{name} is {unit[name]!r}; this ComfyUI has {', '.join(known)}")
        if missing(self.store, unit):
            with torch.inference_mode():
                self._sample(unit)

    def _sample(self, unit: dict[str, Any]) -> None:
        """All tries of a unit, those too whose files are there: in other company their bits could differ."""
        import torch

        from ..attention.blend import read_blend
        from ..attention.schedule import TauSchedule, Window
        from ..sampling.encode import start_edit
        from ..sampling.sampler import sample_pairs

        edit = start_edit(self.clip, unit["original_prompt"], unit["edited_prompt"], "auto")
        tau = TauSchedule(
            Window(0.0, unit["cross_end"]),
            Window(0.0, unit["self_end"]),
            self_resolution=unit["self_resolution"],
            self_mode=unit["self_mode"],
        )
        words, source_words = unit["blend_words"], unit["blend_source_words"]
        blend = read_blend(words, source_words, "", 0.3, 0.2) if words or source_words else None
        negative = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(unit["negative"]))
        latent = {"samples": torch.zeros(unit["batch"], 4, unit["height"] // 8, unit["width"] // 8)}
        source, targets, *_ = sample_pairs(
            self.model,
            edit,
            tau,
            negative=negative,
            latent=latent,
            seed=unit["seed"],
            steps=unit["steps"],
            cfg=unit["cfg"],
            sampler_name=unit["sampler"],
            scheduler=unit["scheduler"],
            denoise=1.0,
            blend=blend,
        )
        before, after = source["samples"], targets["samples"]
        images = [self._decode(rows) for rows in (before, after)]
        for n, name in enumerate(unit["ids"]):
            files = image_names(name)
            if blend is not None:  # outside of its mask a blend puts the source's latent back, bit for bit
                save_image(self.store, files[2], (before[n] != after[n]).any(0).cpu().numpy())
            for file, rows in zip(files, images, strict=False):
                save_image(self.store, file, rows[n])

    def _decode(self, latents: Any) -> np.ndarray:
        images = self.vae.decode(latents).float().cpu().numpy()
        return np.clip(255.0 * images, 0, 255).astype(np.uint8)


def load_checkpoint(file: str) -> Any:
    """Model, CLIP and VAE, as ComfyUI loads them. Raises ValueError for a file that it cannot load."""
    import comfy.sd

    try:
        return comfy.sd.load_checkpoint_guess_config(file)[:3]
    except Exception as error:  # the libraries' own, of many kinds
        raise ValueError(f"{file} is no checkpoint that ComfyUI can load: {error}") from error


def absent(parts: Any) -> list[str]:
    names = ("model", "CLIP", "VAE")
    return [name for name, part in zip(names, parts, strict=True) if part is None]


def missing(store: Store, unit: dict[str, Any]) -> list[str]:
    """The tries of a unit whose target, the last file that is written, is not there."""
    return [name for name in unit["ids"] if not store.exists(image_names(name)[1])]


def save_image(store: Store, name: str, pixels: np.ndarray) -> None:
    """A PNG file; a mask with one bit a pixel."""
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG", compress_level=4)
    store.commit(name, data.getvalue())
