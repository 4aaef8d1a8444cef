"""What is the demo model made of?  The auto-encoder, the U-Net's configuration, the text encoder.

The U-Net is the host's own `UNetModel` and the text encoder the host's own CLIP; `TextEncoder` here is the
same computation under the same parameter names for training: the host's adds in place and has no gradient.

Shapes: `b` batch, `t` text tokens, `c` context width, pictures `(b, 3, 8 h, 8 w)` in -1..1, latents
`(b, 4, h, w)`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

START, END, LENGTH = 49406, 49407, 77

TEXT_CONFIG = {
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": LENGTH,
    "eos_token_id": END,
}

UNET_CONFIG = {
    "image_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 64,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "num_heads": -1,
    "num_head_channels": 32,
    "use_spatial_transformer": True,
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": TEXT_CONFIG["hidden_size"],
    "use_linear_in_transformer": False,
    "legacy": False,
    "adm_in_channels": None,
}


class Residual(nn.Module):
    """x + conv(silu(conv(silu(x)))), the identity at the start."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(F.silu(x))))


def _upsample(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out * 4, 1), nn.PixelShuffle(2))


class AutoEncoder(nn.Module):
    """Pictures to latents of zero mean and unit variance and back, eight times smaller on a side.

    `encode` and `decode` are what the host's VAE object calls.
    """

    def __init__(self, latent: int = 4) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, 48, 3, padding=1),
            Residual(48),
            nn.Conv2d(48, 96, 3, 2, 1),
            Residual(96),
            nn.Conv2d(96, 128, 3, 2, 1),
            Residual(128),
            nn.SiLU(),
            nn.Conv2d(128, latent, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(latent, 160, 3, padding=1),
            Residual(160),
            Residual(160),
            Residual(160),
            _upsample(160, 96),
            Residual(96),
            Residual(96),
            _upsample(96, 48),
            Residual(48),
            Residual(48),
            nn.SiLU(),
            nn.Conv2d(48, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )
        self.register_buffer("shift", torch.zeros(1, latent, 1, 1))
        self.register_buffer("scale", torch.ones(1, latent, 1, 1))

    def raw(self, pictures: Tensor) -> Tensor:
        """Latents before standardisation, bounded to -3..3."""
        return torch.tanh(self.encoder(pictures) / 3) * 3

    def encode(self, pictures: Tensor) -> Tensor:
        """`(b, 3, 8 h, 8 w)` in -1..1 to `(b, 4, h, w)`."""
        return (self.raw(pictures) - self.shift) / self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """`(b, 4, h, w)` to `(b, 3, 8 h, 8 w)`, about -1..1."""
        return self.decoder(latents * self.scale + self.shift)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = (
            f(x).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(out.transpose(1, 2).reshape(b, t, c))


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(width)
        self.self_attn = _Attention(width, heads)
        self.layer_norm2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        h = self.mlp["fc1"](self.layer_norm2(x))
        return x + self.mlp["fc2"](h * torch.sigmoid(1.702 * h))


class TextEncoder(nn.Module):
    """A causal CLIP over the demo's vocabulary, with the parameter names of the host's `text_model`.

    Rows of the embedding: 0 the start token, 1 the end token, 2 every token that no caption holds, then the
    vocabulary.
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        c = TEXT_CONFIG
        width = c["hidden_size"]
        self.embeddings = nn.ModuleDict(
            {
                "token_embedding": nn.Embedding(rows, width),
                "position_embedding": nn.Embedding(LENGTH, width),
            }
        )
        self.encoder = nn.ModuleDict(
            {
                "layers": nn.ModuleList(
                    [
                        _Layer(width, c["num_attention_heads"], c["intermediate_size"])
                        for _ in range(c["num_hidden_layers"])
                    ]
                )
            }
        )
        self.final_layer_norm = nn.LayerNorm(width)
        nn.init.normal_(self.embeddings["token_embedding"].weight, 0, 0.5)
        nn.init.normal_(self.embeddings["position_embedding"].weight, 0, 0.1)
        for layer in self.encoder["layers"]:
            nn.init.normal_(layer.self_attn.out_proj.weight, 0, 0.02)
            nn.init.normal_(layer.mlp["fc2"].weight, 0, 0.01)

    def forward(self, rows: Tensor) -> Tensor:
        """Embedding rows `(b, t)` to states `(b, t, c)`, zero after the first end token as in the host."""
        x = (
            self.embeddings["token_embedding"](rows)
            + self.embeddings["position_embedding"].weight[: rows.shape[1]]
        )
        for layer in self.encoder["layers"]:
            x = layer(x)
        end = (rows == 1).int()
        return self.final_layer_norm(x) * ((end.cumsum(1) - end) == 0).unsqueeze(-1)
