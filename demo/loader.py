"""How does the demo model become ComfyUI's own objects?  `load_demo_model()`: MODEL, CLIP, VAE from one file.

They are what the host's checkpoint loader would make: its U-Net, CLIP and VAE, its devices and dtypes.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.taesd.taesd
import torch
from safetensors import safe_open
from torch import Tensor

from .networks import AutoEncoder

WEIGHTS = Path(__file__).parent / "model.safetensors"
VOCABULARY_SIZE = 49408


class DemoLatent(comfy.latent_formats.LatentFormat):
    """Standardised latents: nothing to scale. The colour factors are for the host's live previews."""

    scale_factor = 1.0
    latent_channels = 4


class DemoConfig(comfy.supported_models_base.BASE):
    """A Stable Diffusion 1 model of another size that predicts v."""

    unet_extra_config: dict[str, Any] = {}
    latent_format = DemoLatent

    def model_type(self, state_dict: dict[str, Tensor], prefix: str = "") -> comfy.model_base.ModelType:
        return comfy.model_base.ModelType.V_PREDICTION


def read_weights(path: str | Path = WEIGHTS) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The file's tensors by part (`unet`, `text`, `vae`) and its metadata.

    Raises FileNotFoundError if the file is not there.
    """
    if not Path(path).exists():
        raise FileNotFoundError(
            f"The demo model's weights are missing: {path}. Reinstall the pack, or run `make train-demo`."
        )
    parts: dict[str, dict[str, Tensor]] = {"unet": {}, "text": {}, "vae": {}}
    with safe_open(str(path), "pt") as file:
        metadata = {k: json.loads(v) for k, v in file.metadata().items()}
        for key in file.keys():  # noqa: SIM118 - a safetensors file has no iterator
            part, name = key.split(".", 1)
            parts[part][name] = file.get_tensor(key)
    return parts, metadata


def _model(weights: dict[str, Tensor], metadata: dict[str, Any]) -> comfy.model_patcher.ModelPatcher:
    mm = comfy.model_management
    device, offload = mm.get_torch_device(), mm.unet_offload_device()
    config = DemoConfig(metadata["unet"])
    dtype = mm.unet_dtype(
        model_params=sum(w.numel() for w in weights.values()),
        supported_dtypes=list(config.supported_inference_dtypes),
        weight_dtype=torch.float16,
    )
    config.set_inference_dtype(dtype, mm.unet_manual_cast(dtype, device, config.supported_inference_dtypes))
    model = config.get_model(weights, "", device=offload)
    model.latent_format.latent_rgb_factors = metadata["preview"]["factors"]
    model.latent_format.latent_rgb_factors_bias = metadata["preview"]["bias"]
    missing, unexpected = model.diffusion_model.load_state_dict(weights, strict=False)
    if missing or unexpected:
        raise RuntimeError(
            f"The demo model does not fit this ComfyUI's U-Net: missing {missing}, unexpected {unexpected}."
        )
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=offload)


def _clip(weights: dict[str, Tensor], metadata: dict[str, Any]) -> comfy.sd.CLIP:
    class DemoClip(comfy.sd1_clip.SDClipModel):
        def __init__(
            self, device: Any = "cpu", dtype: Any = None, model_options: dict | None = None, **_: Any
        ) -> None:
            super().__init__(
                device=device,
                dtype=dtype,
                textmodel_json_config=dict(metadata["text"]),
                zero_out_masked=True,
                return_projected_pooled=False,
                model_options=model_options or {},
            )

    class DemoTextModel(comfy.sd1_clip.SD1ClipModel):
        def __init__(
            self, device: Any = "cpu", dtype: Any = None, model_options: dict | None = None, **_: Any
        ) -> None:
            super().__init__(
                device=device, dtype=dtype, model_options=model_options or {}, clip_model=DemoClip
            )

    class Target:
        params: dict[str, Any] = {}
        clip = DemoTextModel
        tokenizer = comfy.sd1_clip.SD1Tokenizer

    name = "text_model.embeddings.token_embedding.weight"
    weights = dict(weights)
    rows, tokens = weights[name], torch.tensor(metadata["tokens"])
    every = rows[tokens == -1].repeat(VOCABULARY_SIZE, 1)
    every[tokens[tokens >= 0]] = rows[tokens >= 0]
    weights[name] = every
    weights["text_projection.weight"] = torch.eye(rows.shape[1], dtype=rows.dtype)
    # Hosts that stream weights replace the tensors that they are given; these stay ours, as in older hosts.
    streams = "disable_dynamic" in inspect.signature(comfy.sd.CLIP.__init__).parameters
    clip = comfy.sd.CLIP(Target, **({"disable_dynamic": True} if streams else {}))
    missing, unexpected = clip.load_sd(weights)
    if missing or unexpected:
        raise RuntimeError(
            f"The demo model does not fit this ComfyUI's CLIP: missing {missing}, unexpected {unexpected}."
        )
    return clip


def _vae(weights: dict[str, Tensor]) -> comfy.sd.VAE:
    """The host's VAE object around our auto-encoder.

    The host picks the network by the weights it is given and has no entry for this one, so the object is made
    with the smallest that has the same scale and channels, and its network replaced.
    """
    mm = comfy.model_management
    vae = comfy.sd.VAE(sd=comfy.taesd.taesd.TAESD(latent_channels=4).state_dict())
    network = AutoEncoder()
    network.load_state_dict(weights)
    vae.first_stage_model = network.requires_grad_(False).eval().to(vae.vae_dtype)
    if hasattr(mm, "archive_model_dtypes"):
        mm.archive_model_dtypes(network)
    vae.patcher = comfy.model_patcher.ModelPatcher(
        network, load_device=vae.device, offload_device=mm.vae_offload_device()
    )
    vae.size = None
    vae.memory_used_encode = lambda shape, dtype: 400 * shape[2] * shape[3] * mm.dtype_size(dtype)
    vae.memory_used_decode = lambda shape, dtype: 400 * 64 * shape[2] * shape[3] * mm.dtype_size(dtype)
    return vae


def load_demo_model(
    path: str | Path = WEIGHTS,
) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """The bundled model as `(MODEL, CLIP, VAE)`: 128 px, SD1's tokenizer and noise schedule, v-prediction.

    Raises FileNotFoundError if the weights are not there, RuntimeError if they do not fit the host's classes.
    """
    parts, metadata = read_weights(path)
    model = _model(parts["unet"], metadata)
    if hasattr(model, "cached_patcher_init"):  # how later hosts load it once more, for another GPU
        model.cached_patcher_init = (load_demo_model, (path,), 0)
    return model, _clip(parts["text"], metadata), _vae(parts["vae"])
