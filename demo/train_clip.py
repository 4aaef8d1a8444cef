"""How is the bundled CLIP trained?  `python -m demo.train_clip`: one seeded command that resumes.

A `CLIPModel` of transformers, small enough to ship, that knows the demo's scenes and their captions, in the
library's own folder format: `demo/clip`. Half of a batch are scenes, the other half the same scenes with one
thing changed, so that what a caption changes is what the pictures differ in. Training draws the scenes once,
keeps all its state every few minutes and goes on from it. `scores.json` beside the weights has the retrieval
accuracy on scenes that no training saw.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import replace
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from . import scenes
from .train import HERE, Stage, follow, rate_factor

SIDE, LENGTH = 64, 24
HELD_OUT = 4_000_000
MEAN, DEVIATION = [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]
TEXT = {
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": LENGTH,
}
VISION = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 16,
}
WIDTH, RATE = 64, 1.5e-3
SPECIAL = ["[PAD]", "[UNK]", "[START]", "[END]"]


def changed(scene: scenes.Scene, seed: int) -> scenes.Scene:
    """The scene with one thing of its caption changed, its layout kept."""
    r = random.Random(f"change {seed}")

    def other(values: Any, *taken: Any) -> Any:
        return r.choice([value for value in values if value not in taken])

    changes: list[dict[str, Any]] = []
    for role in ("subject", "partner"):
        old = getattr(scene, role)
        if old:
            (kind,) = (k for k in (scenes.ANIMALS, scenes.VEHICLES, scenes.THINGS) if old in k)
            changes.append({role: other(kind, scene.subject, scene.partner)})
            if scene.style != "vintage":
                color = getattr(scene, f"{role}_color")
                changes.append({f"{role}_color": other([None, *scenes.COLORS], color)})
    if not scene.snow and not scene.crowd and (scene.subject or scene.place):
        changes.append({"place": other(scenes.PLACES, scene.place)})
    if scene.place in scenes.SNOWY and not scene.crowd:
        changes.append({"snow": 0.0 if scene.snow else 0.7})
    if scene.place in scenes.CROWDED and not scene.snow:
        changes.append({"crowd": 0.0 if scene.crowd else 0.7})
    if not scene.subject_color and not scene.partner_color:
        changes.append({"style": other([None, *scenes.STYLES], scene.style)})
    return replace(scene, **r.choice(changes))


def scene_of(number: int, start: int = 0) -> scenes.Scene:
    """Scenes in pairs: an even number's is drawn at random, the odd number behind it is that one changed."""
    seed = start + number // 2
    scene = scenes.sample(seed)
    return changed(scene, seed) if number % 2 else scene


def _drawn(job: tuple[int, int]) -> np.ndarray:
    picture = Image.fromarray(scenes.draw(scene_of(*job))[0])
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def draw_scenes(path: Path, count: int, start: int) -> None:
    """`count` pictures, uint8 `(count, SIDE, SIDE, 3)`, written once."""
    if path.exists():
        return
    scenes.font_path()
    with Pool() as pool:
        drawn = pool.map(_drawn, [(number, start) for number in range(count)], chunksize=100)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.save(file, np.stack(drawn))
    part.rename(path)


def build_tokenizer() -> Any:
    """One token for each word of the demo's captions, in the library's own class."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: n for n, word in enumerate([*SPECIAL, *scenes.vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[START] $A [END]", special_tokens=[(name, ids[name]) for name in ("[START]", "[END]")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        bos_token="[START]",
        eos_token="[END]",
        model_max_length=LENGTH,
    )


def build_model(tokenizer: Any) -> Any:
    from transformers import CLIPConfig, CLIPModel

    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = CLIPConfig(
        text_config={**TEXT, **ids, "vocab_size": len(tokenizer)},
        vision_config=VISION,
        projection_dim=WIDTH,
    )
    return CLIPModel(config)


def to_pixels(batch: np.ndarray) -> Tensor:
    """uint8 `(b, h, w, 3)` to what the model's image processor makes of it, `(b, 3, h, w)`."""
    x = torch.from_numpy(np.array(batch)).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1)


def augmented(x: Tensor, g: torch.Generator) -> Tensor:
    """Moved by up to 3 px, mirrored, in other contrast, half of it blurred, with noise: as models draw."""
    b = len(x)
    u = torch.rand(b, 6, generator=g)
    flip = torch.where(u[:, 0] < 0.5, -1.0, 1.0)
    theta = torch.zeros(b, 2, 3)
    zoom = 1 + 0.1 * (u[:, 1] - 0.5)
    theta[:, 0, 0], theta[:, 1, 1] = flip * zoom, zoom
    theta[:, :, 2] = (u[:, 2:4] - 0.5) * 0.18
    x = F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), "bilinear", "border", False)
    x[b // 4 : b // 2] = F.avg_pool2d(F.pad(x[b // 4 : b // 2], (1, 1, 1, 1), "replicate"), 3, 1)
    x = x * (0.85 + 0.3 * u[:, 4, None, None, None]) + 0.3 * (u[:, 5, None, None, None] - 0.5)
    return x + 0.08 * torch.randn(x.shape, generator=g)


def meaning(caption: str) -> str:
    """A caption without its articles: captions of one meaning are no negatives of each other."""
    return " ".join(word for word in caption.split() if word not in ("a", "an"))


def contrast(images: Tensor, texts: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy (Radford et al. 2021), equal shares on all captions of one meaning.

    images, texts: (b, width) of length 1. same (b, b): whether two captions mean the same.
    """
    logits = scale * images @ texts.T
    wanted = same.float() / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, wanted) + F.cross_entropy(logits.T, wanted)) / 2


def embed(model: Any, tokens: dict[str, Tensor], pixels: Tensor) -> tuple[Tensor, Tensor]:
    """(images, texts), each (b, width) of length 1."""
    images = model.visual_projection(model.vision_model(pixels).pooler_output)
    texts = model.text_projection(model.text_model(**tokens).pooler_output)
    return F.normalize(images.float(), dim=-1), F.normalize(texts.float(), dim=-1)


def train(work: Path, count: int, total: int, batch: int, scale: float) -> Any:
    """The averaged weights after `total` steps of `batch` scenes and as many changed ones in halves."""
    torch.manual_seed(5)
    pool = np.load(work / "clip_scenes.npy", mmap_mode="r")
    captions = [scene_of(number).caption() for number in range(count)]
    tokenizer = build_tokenizer()
    tokens = tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
    tokens = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    known: dict[str, int] = {}
    group = torch.tensor([known.setdefault(meaning(caption), len(known)) for caption in captions])
    model, average = build_model(tokenizer), build_model(tokenizer)
    average.load_state_dict(model.state_dict())
    for one in (model, average):
        one.logit_scale.requires_grad_(False).fill_(np.log(scale))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, RATE, betas=(0.9, 0.98), weight_decay=0.05)

    def body(step: int, g: torch.Generator) -> dict[str, float]:
        first = torch.randint(count // 2, (batch // 2,), generator=g) * 2
        picks = torch.cat([first, first + 1])[torch.randperm(2 * len(first), generator=g)]
        pixels = augmented(to_pixels(pool[picks.numpy()]), g)
        images, texts = embed(model, {name: rows[picks] for name, rows in tokens.items()}, pixels)
        same = group[picks][:, None] == group[picks]
        loss = contrast(images, texts, model.logit_scale.exp(), same)
        loss.backward()
        optimizer.param_groups[0]["lr"] = RATE * rate_factor(step, total, 0.4)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        follow(average, model, step, 0.998)
        found = same[torch.arange(len(picks)), (images @ texts.T).argmax(1)]
        return {"loss": loss.item(), "found": found.float().mean().item()}

    parts = {"model": model, "average": average, "optimizer": optimizer}
    Stage("clip", work, total, 6, parts).run(body)
    return average, tokenizer


def retrieval(model: Any, tokenizer: Any, pool: np.ndarray, start: int) -> dict[str, Any]:
    """How often the right one of 100 different captions is nearest to a picture, and the reverse.

    A caption of the same meaning counts as the right one. `changed` is the share of pairs of a scene and its
    changed scene in which each of both pictures is nearer to its own caption than to the other's.
    """
    captions = [scene_of(number, start).caption() for number in range(len(pool))]
    tokens = tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        images, texts = embed(
            model, {name: tokens[name] for name in ("input_ids", "attention_mask")}, to_pixels(pool)
        )
    cosines = images @ texts.T
    own = cosines.diagonal().view(-1, 2)
    crossed = torch.stack([cosines.diagonal(1)[::2], cosines.diagonal(-1)[::2]], 1)
    groups = [meaning(caption) for caption in captions]
    by_text, by_image, asked = 0, 0, 0
    for at in range(0, len(pool) - 199, 200):
        block = list(dict.fromkeys(groups[at : at + 200]))[:100]
        rows = [at + groups[at : at + 200].index(name) for name in block]
        table = cosines[rows][:, rows]
        right = torch.arange(len(rows))
        by_text += int((table.argmax(1) == right).sum())
        by_image += int((table.argmax(0) == right).sum())
        asked += len(rows)
    return {
        "held_out_scenes": len(pool),
        "captions_to_choose_from": 100,
        "caption_of_picture": round(by_text / asked, 4),
        "picture_of_caption": round(by_image / asked, 4),
        "changed_pairs_told_apart": round(float((own > crossed).all(1).float().mean()), 4),
        "mean_cosine_of_own_caption": round(float(own.mean()), 3),
    }


def save(folder: Path, model: nn.Module, tokenizer: Any, scores: dict[str, Any]) -> None:
    """The folder that `CLIPModel.from_pretrained` and its image processor and tokenizer read, in float16."""
    from transformers import CLIPImageProcessor

    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(
        size={"height": SIDE, "width": SIDE}, do_center_crop=False, image_mean=MEAN, image_std=DEVIATION
    ).save_pretrained(folder)
    (folder / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=HERE / ".work")
    parser.add_argument("--out", type=Path, default=HERE / "clip")
    parser.add_argument("--scenes", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--scale", type=float, default=14.0, help="the inverse temperature")
    a = parser.parse_args(arguments)
    a.work.mkdir(parents=True, exist_ok=True)
    draw_scenes(a.work / "clip_held_out.npy", 2_000, HELD_OUT)
    draw_scenes(a.work / "clip_scenes.npy", a.scenes, 0)
    model, tokenizer = train(a.work, a.scenes, a.steps, a.batch, a.scale)
    scores = retrieval(model, tokenizer, np.load(a.work / "clip_held_out.npy"), HELD_OUT)
    save(a.out, model, tokenizer, scores)
    print(json.dumps(scores, indent=1))


if __name__ == "__main__":
    main()
