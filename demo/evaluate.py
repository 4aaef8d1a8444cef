"""How good is the demo model?  `COMFYUI_PATH=... python -m demo.evaluate`: `scores.json` and `samples.jpg`.

- agreement: a classifier trained on the scene generator names what is on pictures that the model drew
  through the host's own sampling path; agreement with the caption counts.
- localisation: drawn scenes are encoded, noised to the middle of the schedule and given to the U-Net with
  their caption; each object word's cross-attention map is compared with the object's true mask.
- reconstruction: PSNR of the auto-encoder, through the host's VAE object, on scenes that no training saw.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from . import scenes
from .train import HELD_OUT, HERE, host, psnr, to_tensor

OBJECTS, COLORS = list(scenes.OBJECTS), ["plain", *scenes.COLORS]
PLACES, STYLES = ["none", *scenes.PLACES], ["plain", *(s for s in scenes.STYLES if s != "photo")]
CLASSIFIER_SEED, EVALUATION_SEED = 2_000_000, 3_000_000
SETTINGS = {"steps": 20, "cfg": 4.0, "sampler": "euler", "scheduler": "normal"}
THRESHOLDS = (0.3, 0.4, 0.5)


class Classifier(nn.Module):
    """Pictures `(b, 3, 128, 128)` to logits: objects, place, the only object's colour, style."""

    def __init__(self) -> None:
        super().__init__()
        widths = [12, 32, 64, 128, 192]
        layers: list[nn.Module] = [nn.PixelUnshuffle(2)]
        for a, b in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(a, b, 3, 2 if a > 12 else 1, 1), nn.BatchNorm2d(b), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Conv2d(192, 192, 3, 1, 1), nn.BatchNorm2d(192), nn.ReLU())
        self.heads = nn.ModuleList([nn.Linear(384, len(n)) for n in (OBJECTS, PLACES, COLORS, STYLES)])

    def forward(self, pictures: Tensor) -> list[Tensor]:
        h = self.body(pictures)
        h = torch.cat([h.mean((2, 3)), h.amax((2, 3))], 1)
        return [head(h) for head in self.heads]


def _labels(scene: scenes.Scene) -> list[int]:
    """Two object numbers (or -1), the place, the colour (-1 unless one object is there), the style."""
    names = [OBJECTS.index(o) if o else -1 for o in (scene.subject, scene.partner)]
    color = COLORS.index(scene.subject_color or "plain") if scene.subject and not scene.partner else -1
    if scene.style == "vintage":
        color = -1
    style = scene.style if scene.style in STYLES else "plain"
    return [*names, PLACES.index(scene.place or "none"), color, STYLES.index(style)]


def _drawn(seed: int) -> tuple[np.ndarray, list[int]]:
    scene = scenes.sample(seed)
    return scenes.draw(scene)[0], _labels(scene)


def _draw_labelled(start: int, count: int) -> tuple[Tensor, Tensor]:
    with Pool() as pool:
        drawn = pool.map(_drawn, range(start, start + count), chunksize=100)
    return torch.from_numpy(np.stack([d[0] for d in drawn])), torch.tensor([d[1] for d in drawn])


def count_agreement(outputs: list[Tensor], labels: Tensor) -> dict[str, list[int]]:
    """[right, asked] of objects, places, colours and styles.

    outputs: the classifier's logits for `b` pictures. labels: `(b, 5)` as `_labels` gives them. An object
    counts as right if it is among the strongest one or two, as many as the caption has; places, colours and
    styles if strongest.
    """
    objects, places, colors, styles = outputs
    score = {"objects": [0, 0], "places": [0, 0], "colors": [0, 0], "styles": [0, 0]}
    for i, (a, b, place, color, style) in enumerate(labels.tolist()):
        named = [o for o in (a, b) if o >= 0]
        if named:
            found = objects[i].topk(len(named)).indices.tolist()
            score["objects"][0] += sum(o in found for o in named)
            score["objects"][1] += len(named)
        asked = [
            ("places", places, place, place > 0),
            ("colors", colors, color, color > 0),
            ("styles", styles, style, style > 0),
        ]
        for name, logits, want, counts in asked:
            if counts:
                score[name][0] += int(logits[i].argmax().item() == want)
                score[name][1] += 1
    return score


def train_classifier(path: Path, count: int = 14_000, epochs: int = 5) -> Classifier:
    """The classifier of `path`, or a new one: trained on scenes blurred and noised a little."""
    model = Classifier()
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    torch.manual_seed(3)
    pool, labels = _draw_labelled(CLASSIFIER_SEED, count)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.02)
    steps = epochs * count // 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for step in range(steps):
        picks = torch.randint(count, (64,))
        x = to_tensor(pool[picks].numpy())
        if step % 2:
            x = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
        x = (x * (0.9 + 0.2 * torch.rand(64, 1, 1, 1)) + 0.04 * torch.randn(x.shape)).clamp(-1, 1)
        y = labels[picks]
        with torch.autocast("cpu", torch.bfloat16):
            objects, places, colors, styles = (o.float() for o in model(x))
        present = torch.zeros(64, len(OBJECTS) + 1)
        present[torch.arange(64)[:, None], y[:, :2]] = 1
        loss = F.binary_cross_entropy_with_logits(objects, present[:, :-1]) * 4 + F.cross_entropy(
            places, y[:, 2]
        )
        loss = loss + F.cross_entropy(colors, y[:, 3], ignore_index=-1) + F.cross_entropy(styles, y[:, 4])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"classifier {step}/{steps} loss {loss.item():.3f}", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return model.eval()


def sample_pictures(demo: tuple, captions: list[str], seed: int, batch: int = 16) -> np.ndarray:
    """Pictures `(b, 128, 128, 3)` uint8 of the captions, by the host's sampler with `SETTINGS`."""
    import comfy.sample

    model, clip, vae = demo
    encode = lambda text: clip.encode_from_tokens_scheduled(clip.tokenize(text))  # noqa: E731
    negative, out = encode(""), []
    noise = comfy.sample.prepare_noise(torch.zeros(len(captions), 4, 16, 16), seed)
    for i in range(0, len(captions), batch):
        group = captions[i : i + batch]
        positive = [encode(c)[0] for c in group]
        context = [[torch.cat([p[0] for p in positive]), positive[0][1]]]
        latent = comfy.sample.sample(
            model,
            noise[i : i + batch],
            SETTINGS["steps"],
            SETTINGS["cfg"],
            SETTINGS["sampler"],
            SETTINGS["scheduler"],
            context,
            negative,
            torch.zeros(len(group), 4, 16, 16),
            disable_pbar=True,
            seed=seed,
        )
        out.append(vae.decode(latent))
    return (torch.cat(out) * 255).round().byte().numpy()


def attention_maps(
    demo: tuple, pictures: Tensor, caption: str, steps: tuple[int, ...] = (350, 500, 650)
) -> Tensor:
    """Cross-attention of noised pictures, `(b, t, 16, 16)`: the mean over heads, layers and noise levels.

    pictures: `(b, 128, 128, 3)` in 0..1.
    """
    model, clip, vae = demo
    z = vae.encode(pictures)
    context = clip.encode_from_tokens_scheduled(clip.tokenize(caption))[0][0].expand(len(z), -1, -1)
    kept: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
        b, n, c = q.shape
        q, k, v = (x.view(b, -1, options["n_heads"], options["dim_head"]).transpose(1, 2) for x in (q, k, v))
        weights = (q @ k.transpose(-1, -2) * options["dim_head"] ** -0.5).softmax(-1)
        if n == z.shape[-1] * z.shape[-2]:
            kept.append(weights.mean(1))
        return (weights @ v).transpose(1, 2).reshape(b, n, c)

    unet = model.model.diffusion_model
    blocks = set()
    for name, module in unet.named_modules():
        if type(module).__name__ == "SpatialTransformer":
            part, number = name.split(".")[:2]
            blocks.add(
                ("middle", 0) if part == "middle_block" else (part.removesuffix("_blocks"), int(number))
            )
    options = {"patches_replace": {"attn2": dict.fromkeys(blocks, attend)}}
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    for step in steps:
        sigma = model.model.model_sampling.sigma(torch.tensor([float(step)]))
        model.model.apply_model(
            z + sigma.view(-1, 1, 1, 1) * noise,
            sigma.expand(len(z)),
            c_crossattn=context,
            transformer_options=options,
        )
    maps = torch.stack(kept).mean(0)
    return maps.transpose(1, 2).reshape(len(z), -1, *z.shape[-2:])


def localisation(demo: tuple, count: int = 120) -> dict[str, float]:
    """Mean IoU per threshold of object words' maps and true masks, over single and riding scenes.

    A map is enlarged to the picture and cut at a fraction of its maximum.
    """
    overlaps: dict[float, list[float]] = {t: [] for t in THRESHOLDS}
    seed = HELD_OUT
    done = 0
    while done < count:
        scene = scenes.sample(seed)
        seed += 1
        if scene.subject is None or scene.relation == "next to":
            continue
        done += 1
        picture, masks = scenes.draw(scene)
        caption = scene.caption()
        maps = attention_maps(demo, torch.tensor(picture)[None] / 255.0, caption)[0]
        for word, mask in masks.items():
            m = maps[1 + caption.split().index(word)]
            m = F.interpolate(m[None, None], mask.shape, mode="bicubic")[0, 0].numpy()
            for t in THRESHOLDS:
                inside = m > t * m.max()
                overlaps[t].append((inside & mask).sum() / (inside | mask).sum())
    return {str(t): round(float(np.mean(v)), 3) for t, v in overlaps.items()}


SHEET = [
    "a cat riding a bicycle",
    "a dog riding a bicycle",
    "a cat riding a car on a beach",
    "an elephant riding a boat",
    "a castle on a mountain",
    "a castle on a snowy mountain",
    "children drawing of a castle",
    "a watercolor of a castle",
    "a house in a field",
    "a pixel art of a house in a field",
    "a vintage photo of a house in a field",
    "a house in a field at night",
    "a penguin in a desert",
    "a duck on a beach",
    "a blue elephant in a forest",
    "a dog in a field",
    "a red car on a street",
    "a yellow car on a boulevard",
    "a purple bicycle on a boulevard",
    "a boat on a beach",
    "a cat next to a cake",
    "a tree next to a house in a field",
    "a green cat in a field",
    "a cake on a street",
    "a beach",
    "a crowded beach",
    "a boulevard",
    "a crowded boulevard",
    "a snowy forest",
    "a snowy street",
    "a tree in a field",
    "a snowy mountain",
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=HERE / ".work")
    parser.add_argument("--weights", type=Path, default=HERE / "model.safetensors")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--samples", type=int, default=240)
    parser.add_argument("--sheet-only", action="store_true")
    a = parser.parse_args()
    host()
    from drawing.grid import contact_sheet

    from .loader import load_demo_model

    demo = load_demo_model(a.weights)
    with torch.inference_mode():
        drawn = sample_pictures(demo, SHEET, 1)
        contact_sheet([*map(Image.fromarray, drawn)], SHEET, 8).save(a.out / "samples.jpg", quality=88)
        if a.sheet_only:
            return
    classifier = train_classifier(a.work / "classifier.pt")
    with torch.inference_mode():
        held, labels = _draw_labelled(HELD_OUT, 1000)

        def agreement(pictures: Tensor, labels: Tensor) -> dict[str, list[int]]:
            outputs = [classifier(to_tensor(p.numpy())) for p in pictures.split(50)]
            return count_agreement([torch.cat(o) for o in zip(*outputs, strict=True)], labels)

        def share(score: dict[str, list[int]]) -> dict[str, float]:
            return {k: round(right / max(1, asked), 3) for k, (right, asked) in score.items()}

        accuracy = share(agreement(held, labels))
        decoded = torch.cat([demo[2].decode(demo[2].encode(p / 255.0)) for p in held[:512].split(32)])
        rebuilt = (decoded * 255).round().byte()
        quality = psnr(decoded * 2 - 1, held[:512] / 127.5 - 1)
        accuracy_rebuilt = share(agreement(rebuilt, labels[:512]))

        asked = [s for s in (scenes.sample(EVALUATION_SEED + i) for i in range(4 * a.samples)) if s.subject][
            : a.samples
        ]
        made = torch.from_numpy(sample_pictures(demo, [s.caption() for s in asked], 7))
        wanted = torch.tensor([_labels(s) for s in asked])
        counts = agreement(made, wanted)
        kinds = {}
        for kind in (None, "riding", "next to"):
            rows = torch.tensor([i for i, s in enumerate(asked) if s.relation == kind])
            kinds[kind or "single"] = share(agreement(made[rows], wanted[rows]))["objects"]
        scores = {
            "weights_sha256": hashlib.sha256(a.weights.read_bytes()).hexdigest(),
            "settings": SETTINGS,
            "samples": len(asked),
            "agreement": share(counts),
            "asked": {k: n for k, (_, n) in counts.items()},
            "objects_by_kind": kinds,
            "classifier_accuracy": accuracy,
            "classifier_accuracy_rebuilt": accuracy_rebuilt,
            "map_iou_by_threshold": localisation(demo),
            "vae_psnr_db": round(quality, 2),
        }
    (a.out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    print(json.dumps(scores, indent=2))


if __name__ == "__main__":
    main()
