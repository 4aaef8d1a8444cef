"""What is measured: U-Nets of ComfyUI at their real widths with random weights, and the bundled one."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Model:
    """patcher: a ComfyUI MODEL. width: of its text tokens. pooled: of the pooled text that it takes, or 0.

    tokens: of its text, or 0 for as many as the bundled model's.
    """

    patcher: Any
    width: int
    pooled: int
    tokens: int = 0

    def conditioning(self, conditioning: list) -> list:
        """A CONDITIONING of as many rows with random values of this model's width.

        Equal ones give equal ones.
        """
        import torch

        def random(cond: Any) -> list:
            seed = torch.Generator().manual_seed(zlib.crc32(cond.cpu().numpy().tobytes()))
            pooled = torch.randn(cond.shape[0], self.pooled, generator=seed) if self.pooled else None
            tokens = self.tokens or cond.shape[1]
            return [torch.randn(cond.shape[0], tokens, self.width, generator=seed), {"pooled_output": pooled}]

        return [random(cond) for cond, _ in conditioning]

    def edit(self, edit: Any) -> Any:
        """The edit with such conditionings."""
        source, *targets = (
            replace(
                branch,
                prompt=replace(branch.prompt, conditioning=self.conditioning(branch.prompt.conditioning)),
            )
            for branch in (edit.source, *edit.targets)
        )
        return replace(edit, source=source, targets=tuple(targets))


SD15: dict[str, Any] = {
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "num_heads": 8,
    "num_head_channels": -1,
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "context_dim": 768,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
}
SDXL: dict[str, Any] = {
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "num_heads": -1,
    "num_head_channels": 64,
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
    "context_dim": 2048,
    "use_linear_in_transformer": True,
    "adm_in_channels": 2816,
    "num_classes": "sequential",
}
COMMON: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_temporal_attention": False,
}


def random_model(name: str, dtype: Any = None) -> Model:
    """SD1.5 or SDXL, random. dtype: of the weights; by default `dtype_of` the device."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    layout, kind = {
        "SD1.5": (SD15, comfy.supported_models.SD15),
        "SDXL": (SDXL, comfy.supported_models.SDXL),
    }[name]
    config = kind({**COMMON, **layout})
    device = comfy.model_management.get_torch_device()
    config.set_inference_dtype(dtype or dtype_of(device), None)
    model = config.get_model({}, "", device=device)
    for name, parameter in model.diffusion_model.named_parameters():
        fill(name, parameter)
    patcher = comfy.model_patcher.ModelPatcher(model, device, comfy.model_management.unet_offload_device())
    return Model(patcher, layout["context_dim"], 1280 if layout["adm_in_channels"] else 0)


def fill(name: str, parameter: Any) -> None:
    """Norms are 1, biases 0, and matrices keep the size of what they multiply."""
    import torch

    if parameter.ndim < 2:
        torch.nn.init.constant_(parameter, float(name.endswith(("weight", "scale"))))
    else:
        torch.nn.init.normal_(parameter, std=0.6 * parameter[0].numel() ** -0.5)


def bundled_model(dtype: Any = None) -> tuple[Model, Any]:
    """The bundled model and its text encoder. dtype: of its weights; the host's choice by default."""
    from unittest.mock import patch

    import comfy.model_management
    from p2p.demo.loader import load_demo_model

    host = comfy.model_management
    if dtype is None:
        model, clip, _ = load_demo_model()
    else:
        with (
            patch.object(host, "unet_dtype", lambda *_, **__: dtype),
            patch.object(host, "unet_manual_cast", lambda *_, **__: None),
        ):
            model, clip, _ = load_demo_model()
    return Model(model, 128, 0), clip


def dtype_of(device: Any) -> Any:
    """float16 on a GPU, bfloat16 on a processor that multiplies it, else float32."""
    import torch

    if device.type != "cpu":
        return torch.float16
    return torch.bfloat16 if has_bfloat16() else torch.float32


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself."""
    from pathlib import Path

    info = Path("/proc/cpuinfo")
    return info.exists() and "bf16" in info.read_text()
