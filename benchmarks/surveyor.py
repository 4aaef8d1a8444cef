"""Where the objects of a picture are, and how much snow and crowd: read by a network of the benchmarks' own.

It learns from the demo's scene generator, which knows the masks and the strengths of its scenes, and never
sees the attention of the model that is measured. `demo/evaluate.py` has the classifier of objects, places,
colours and styles.
"""

from __future__ import annotations

from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
import torch
from p2p.demo import scenes
from torch import Tensor, nn
from torch.nn import functional as F

OBJECTS = list(scenes.OBJECTS)
STRENGTHS = ("snow", "crowd")
FIRST, HELD_OUT = 7_000_000, 7_500_000
GRID = 32
RARE = torch.tensor(8.0)
"""Weight of an object's pixels against all others, which are many more."""
PRESENT = 0.1
"""Half of the least strength that a scene can have."""


class Surveyor(nn.Module):
    """Pictures (b, 3, 128, 128) in -1..1 -> logits of objects' masks (b, 12, 32, 32), strengths (b, 2)."""

    def __init__(self) -> None:
        super().__init__()

        def layer(into: int, out: int, stride: int = 1) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(into, out, 3, stride, 1), nn.BatchNorm2d(out), nn.ReLU())

        self.fine = nn.Sequential(nn.PixelUnshuffle(2), layer(12, 16), layer(16, 48, 2))
        self.coarse = nn.Sequential(layer(48, 96, 2), layer(96, 96), layer(96, 96, 2), layer(96, 96))
        self.masks = nn.Sequential(layer(48 + 96, 48), nn.Conv2d(48, len(OBJECTS), 1))
        self.strengths = nn.Linear(2 * (48 + 96), len(STRENGTHS))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.fine(pictures)
        coarse = self.coarse(fine)
        both = torch.cat([fine, F.interpolate(coarse, fine.shape[-2:], mode="bilinear")], 1)
        pooled = torch.cat([both.mean((2, 3)), both.amax((2, 3))], 1)
        return self.masks(both), self.strengths(pooled)


def survey(network: Surveyor, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Masks (b, objects, height, width) bool, strengths (b, 2). pictures: (b, height, width, 3) in 0..1."""
    masks, strengths = network(pictures.permute(0, 3, 1, 2) * 2 - 1)
    masks = F.interpolate(masks.float(), pictures.shape[1:3], mode="bilinear", align_corners=False)
    return masks > 0, strengths.float()


def trained(path: Path, count: int = 6_000, epochs: int = 9) -> Surveyor:
    """The surveyor of `path`, or a new one."""
    network = Surveyor()
    if path.exists():
        network.load_state_dict(torch.load(path, weights_only=True))
        return network.eval()
    torch.manual_seed(5)
    pictures, masks, strengths = _draw(FIRST, count)
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=0.02)
    steps = epochs * count // 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for step in range(steps):
        picks = torch.randint(count, (64,))
        x = pictures[picks].permute(0, 3, 1, 2) / 127.5 - 1
        if step % 2:  # as soft as what a VAE gives back
            x = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
        x = (x * (0.9 + 0.2 * torch.rand(64, 1, 1, 1)) + 0.04 * torch.randn(x.shape)).clamp(-1, 1)
        with torch.autocast("cpu", torch.bfloat16):
            found, strong = network(x)
        loss = F.binary_cross_entropy_with_logits(found.float(), masks[picks] / 255.0, pos_weight=RARE)
        loss = loss + 4 * F.mse_loss(strong.float(), strengths[picks])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"surveyor {step}/{steps} loss {loss.item():.3f}", flush=True)
    torch.save(network.state_dict(), path)
    return network.eval()


def accuracy(network: Surveyor, count: int = 500) -> dict[str, float]:
    """On unseen scenes: overlap (IoU) of the masks, errors of strengths, presence told right."""
    pictures, masks, strengths = _draw(HELD_OUT, count)
    overlaps, errors, right = [], [], []
    for part in torch.arange(count).split(50):
        found, strong = survey(network, pictures[part] / 255.0)
        true = F.interpolate(masks[part].float(), found.shape[-2:], mode="bilinear") > 127
        there = true.any(-1).any(-1)
        overlap = (found & true).sum((2, 3)) / (found | true).sum((2, 3)).clamp(min=1)
        overlaps.append(overlap[there])
        errors.append((strong.clamp(0, 1) - strengths[part]).abs())
        right.append((strong > PRESENT) == (strengths[part] > 0))
    error, told = (torch.cat(x).double().mean(0).tolist() for x in (errors, right))
    result = {"objects_iou": float(torch.cat(overlaps).mean())}
    for n, name in enumerate(STRENGTHS):
        result |= {f"{name}_error": error[n], f"{name}_told": told[n]}
    return {name: round(value, 3) for name, value in result.items()}


def _draw(first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (count, 128, 128, 3), masks (count, objects, 32, 32), both uint8, and strengths (count, 2)."""
    with Pool() as pool:
        drawn: list[Any] = pool.map(_drawn, range(first, first + count), chunksize=100)
    pictures, masks, strengths = (np.stack(column) for column in zip(*drawn, strict=True))
    return torch.from_numpy(pictures), torch.from_numpy(masks), torch.from_numpy(strengths)


def _drawn(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scene = scenes.sample(seed)
    picture, masks = scenes.draw(scene)
    side = picture.shape[0] // GRID
    table = np.zeros((len(OBJECTS), GRID, GRID), np.uint8)
    for word, mask in masks.items():
        cells = mask.reshape(GRID, side, GRID, side).mean((1, 3))
        table[OBJECTS.index(word)] = (cells * 255).round()
    return picture, table, np.array([scene.snow, scene.crowd], np.float32)
