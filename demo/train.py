"""How is the demo model trained?  `COMFYUI_PATH=... python -m demo.train`: one seeded command that resumes.

Stages: scenes, vae, latents, unet, decoder, export. Each keeps its output under the work directory and is
skipped if it is already there; the long ones save all their state every few minutes and go on from it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import scenes
from .networks import END, LENGTH, START, TEXT_CONFIG, UNET_CONFIG, AutoEncoder, TextEncoder

HERE = Path(__file__).parent
HELD_OUT = 1_000_000
EMPTY, UNKNOWN = [0, 1], 2


def host() -> None:
    """Make `comfy` importable on the CPU from `COMFYUI_PATH`."""
    path = os.environ.get("COMFYUI_PATH")
    if not path or not os.path.isdir(os.path.join(path, "comfy")):
        raise SystemExit(
            "Set COMFYUI_PATH to a ComfyUI folder: the demo's U-Net and tokenizer are the host's own."
        )
    if path not in sys.path:
        sys.path.insert(0, path)
    import comfy.cli_args

    comfy.cli_args.args.cpu = True


def _chunk(job: tuple[int, int]) -> np.ndarray:
    start, count = job
    return np.stack([scenes.draw(scenes.sample(i))[0] for i in range(start, start + count)])


def draw_scenes(path: Path, count: int, start: int = 0) -> None:
    """`count` pictures of the scenes numbered from `start`, uint8 `(count, 128, 128, 3)`."""
    scenes.font_path()
    part = path.with_suffix(".part")
    out = np.lib.format.open_memmap(part, "w+", np.uint8, (count, scenes.SIZE, scenes.SIZE, 3))
    size = 250
    jobs = [(start + i, min(size, count - i)) for i in range(0, count, size)]
    with Pool() as pool:
        for (first, number), pictures in zip(jobs, pool.imap(_chunk, jobs), strict=True):
            out[first - start : first - start + number] = pictures
    out.flush()
    part.rename(path)


def pictures(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r")


def to_tensor(batch: np.ndarray) -> Tensor:
    """uint8 `(b, h, w, 3)` to float `(b, 3, h, w)` in -1..1."""
    return torch.from_numpy(np.array(batch)).permute(0, 3, 1, 2).float() / 127.5 - 1


class Optimizer:
    """Muon for matrices and kernels (reshaped to matrices), AdamW for the rest, one rate factor for both.

    `torch.optim.Muon` takes 2-D parameters only, so it gets a kernel as a view `(out, in * k * k)`.
    """

    def __init__(
        self, named: list[tuple[str, nn.Parameter]], rate: float, plain: tuple[str, ...] = ()
    ) -> None:
        matrix = [p for n, p in named if p.ndim >= 2 and not any(part in n for part in plain)]
        chosen = {id(p) for p in matrix}
        self.rest = [p for _, p in named if id(p) not in chosen]
        self.pairs = [(p, nn.Parameter(p.data.view(p.shape[0], -1))) for p in matrix]
        self.rates = (rate, rate / 2)
        self.parts = [
            torch.optim.Muon(
                [v for _, v in self.pairs], rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(self.rest, rate / 2, betas=(0.9, 0.99), weight_decay=1e-4),
        ]

    def step(self, factor: float) -> None:
        """One update at `factor` times the base rates; gradients are clipped to norm 1 and cleared."""
        nn.utils.clip_grad_norm_([p for p, _ in self.pairs] + self.rest, 1.0)
        for p, view in self.pairs:
            view.grad = p.grad.view_as(view)
        for part, rate in zip(self.parts, self.rates, strict=True):
            part.param_groups[0]["lr"] = rate * factor
            part.step()
        for p in [*(p for pair in self.pairs for p in pair), *self.rest]:
            p.grad = None

    def state_dict(self) -> list[dict]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def rate_factor(step: int, total: int, flat: float, warmup: int = 100) -> float:
    """Linear warm-up, constant for the share `flat` of the steps, then a cosine down to 2 %."""
    done = step / total
    fall = 1.0 if done < flat else 0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * (done - flat) / (1 - flat)))
    return min(1.0, (step + 1) / warmup) * fall


class Threads:
    """Other busy processes make every parallel region wait; then fewer threads are faster."""

    def __init__(self, period: float = 6.0) -> None:
        self.period, self.all = period, torch.get_num_threads()
        self.last = self._read()

    def _read(self) -> tuple[float, float, float]:
        fields = [int(v) for v in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return (
            time.time(),
            (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK"),
            sum(os.times()[:2]),
        )

    def adapt(self) -> None:
        """Once in a period, set torch's threads to what other processes leave free."""
        if not os.path.exists("/proc/stat") or time.time() - self.last[0] < self.period:
            return
        now = self._read()
        wall, busy, own = (b - a for a, b in zip(self.last, now, strict=True))
        self.last = now
        free = max(1, self.all - round((busy - own) / wall))
        if free != torch.get_num_threads():
            torch.set_num_threads(free)


class Stage:
    """A training loop's state on disk: what to save, when, and going on from it exactly.

    Every random choice of a step comes from `generator(step)`, so the state has no generator in it.
    """

    def __init__(
        self, name: str, work: Path, total: int, seed: int, parts: dict, every: float = 180.0
    ) -> None:
        self.name, self.path, self.total, self.seed, self.parts, self.every = (
            name,
            work / f"{name}.state",
            total,
            seed,
            parts,
            every,
        )
        self.threads = Threads()

    def generator(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed << 32) + step)

    def save(self, step: int) -> None:
        state = {name: part.state_dict() for name, part in self.parts.items()}
        part = self.path.with_suffix(".part")
        torch.save({"step": step, **state}, part)
        part.replace(self.path)

    def run(
        self,
        body: Callable[[int, torch.Generator], dict[str, float]],
        after: Callable[[int], None] | None = None,
        stop: int | None = None,
    ) -> None:
        """Call `body(step, generator)` for each step not yet done and print the means of its figures."""
        first = 0
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            first = state.pop("step")
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
        saved = logged = time.time()
        figures: list[dict[str, float]] = []
        end = self.total if stop is None else min(stop, self.total)
        for step in range(first, end):
            figures.append(body(step, self.generator(step)))
            self.threads.adapt()
            if (step + 1) % 100 == 0:
                means = {k: sum(f[k] for f in figures) / len(figures) for k in figures[0]}
                text = " ".join(f"{k} {v:.4f}" for k, v in means.items())
                speed = (time.time() - logged) / len(figures)
                print(
                    f"{self.name} {step + 1}/{self.total} {text} {speed:.3f} s/step "
                    f"{torch.get_num_threads()} threads {time.strftime('%H:%M:%S')}",
                    flush=True,
                )
                figures, logged = [], time.time()
            if time.time() - saved > self.every or step + 1 == end:
                self.save(step + 1)
                saved = time.time()
                if after:
                    after(step + 1)


def follow(average: nn.Module, model: nn.Module, step: int, longest: float) -> None:
    """Exponential moving average of the weights, quicker at the start."""
    decay = min(longest, (step + 1) / (step + 15))
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def _edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def _edge_loss(a: Tensor, b: Tensor) -> Tensor:
    return sum((p - q).abs().mean() for p, q in zip(_edges(a), _edges(b), strict=True))


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in -1..1, over the whole batch."""
    return -10 * math.log10((a.clamp(-1, 1) - b).square().mean().item() / 4)


def rebuilt_psnr(vae: AutoEncoder, pictures: Tensor) -> float:
    """PSNR of pictures in -1..1 after encoding and decoding."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return psnr(vae.decode(vae.encode(pictures)).float(), pictures)


def train_vae(work: Path, total: int, batch: int = 16, stop: int | None = None) -> AutoEncoder:
    """Encoder and decoder together: pixels, edges, and noise on the latents so that they stay smooth."""
    torch.manual_seed(1)
    pool, held = pictures(work / "scenes.npy"), to_tensor(pictures(work / "held_out.npy")[:256])
    model, average = AutoEncoder(), AutoEncoder()
    average.load_state_dict(model.state_dict())
    optimizer = Optimizer(list(model.named_parameters()), 3e-3)

    def body(step: int, g: torch.Generator) -> dict[str, float]:
        picks = torch.randint(len(pool), (batch,), generator=g).sort().values.numpy()
        x = to_tensor(pool[picks])
        with torch.autocast("cpu", torch.bfloat16):
            z = model.raw(x).float()
            y = model.decoder(z + 0.12 * torch.randn(z.shape, generator=g)).float()
        square = (y - x).square().mean()
        loss = (y - x).abs().mean() + square + 0.5 * _edge_loss(y, x) + 1e-3 * z.square().mean()
        loss.backward()
        optimizer.step(rate_factor(step, total, 0.5, 50))
        follow(average, model, step, 0.995)
        return {"loss": loss.item(), "psnr": -10 * math.log10(square.item() / 4)}

    def after(step: int) -> None:
        print(f"vae held-out PSNR {rebuilt_psnr(average, held):.2f} dB", flush=True)

    parts = {"model": model, "average": average, "optimizer": optimizer}
    Stage("vae", work, total, 1, parts).run(body, after, stop)
    average.shift.zero_()
    average.scale.fill_(1)
    with torch.no_grad():
        z = torch.cat([average.raw(to_tensor(pool[i : i + 64])) for i in range(0, min(2048, len(pool)), 64)])
        average.shift.copy_(z.mean((0, 2, 3), keepdim=True))
        average.scale.copy_(z.std((0, 2, 3), keepdim=True))
    return average


def encode_pool(work: Path, vae: AutoEncoder, count: int) -> None:
    """The latents of `count` scenes, float16 `(count, 4, 16, 16)`, kept with the tokens of its caption."""
    pool = pictures(work / "scenes.npy")[:count]
    latents = torch.empty(len(pool), 4, scenes.SIZE // 8, scenes.SIZE // 8, dtype=torch.float16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for i in range(0, len(pool), 100):
            latents[i : i + 100] = vae.encode(to_tensor(pool[i : i + 100])).half()
    torch.save(
        {"latents": latents, "captions": [scenes.sample(i).caption() for i in range(len(pool))]},
        work / "latents.part",
    )
    (work / "latents.part").rename(work / "latents.pt")


class Vocabulary:
    """Captions to rows of `TextEncoder`: the host's tokens, renumbered."""

    def __init__(self) -> None:
        from comfy.sd1_clip import SDTokenizer

        self.tokenizer = SDTokenizer(embedding_directory=None)
        ids = sorted({t for word in scenes.vocabulary() for t in self._tokens(word)})
        self.ids = [START, END, -1, *ids]
        self.row = {token: i for i, token in enumerate(self.ids)}

    def _tokens(self, text: str) -> list[int]:
        tokens = [t[0] for t in self.tokenizer.tokenize_with_weights(text)[0]]
        return tokens[1 : tokens.index(END)]

    def rows(self, caption: str) -> list[int]:
        return [0, *(self.row.get(t, UNKNOWN) for t in self._tokens(caption)), 1]


def build_unet() -> nn.Module:
    """The host's U-Net, initialised as in its reference code: each residual branch starts at zero."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    unet = UNetModel(
        **UNET_CONFIG, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init
    )
    for name, p in unet.named_parameters():
        if p.ndim == 2:
            nn.init.normal_(p, 0, p.shape[1] ** -0.5)
        elif p.ndim > 2:
            nn.init.kaiming_uniform_(p, a=1.0)
        else:
            nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)
    for module in unet.modules():
        if type(module).__name__ == "ResBlock":
            nn.init.zeros_(module.out_layers[3].weight)
        elif type(module).__name__ == "SpatialTransformer":
            nn.init.zeros_(module.proj_out.weight)
    nn.init.zeros_(unet.out[2].weight)
    return unet


def _attention(q: Tensor, k: Tensor, v: Tensor, heads: int, *_: object, **__: object) -> Tensor:
    """Plain attention `(b, n, h d)`, the fastest here with its gradient.

    A context shorter than the host's 77 stands for one padded with zeros: zero keys have logit 0 and carry
    nothing, so one column of log(number of them) takes their place in the softmax.
    """
    b, n, _ = q.shape
    q, k, v = (
        x.view(b, x.shape[1], heads, -1).transpose(1, 2).reshape(b * heads, x.shape[1], -1) for x in (q, k, v)
    )
    logits = torch.bmm(q * q.shape[-1] ** -0.5, k.transpose(1, 2))
    t = k.shape[1]
    if t < LENGTH and t != n:
        logits = F.pad(logits, (0, 1), value=math.log(LENGTH - t))
    weights = logits.softmax(-1)[..., :t]
    return torch.bmm(weights.to(v.dtype), v).view(b, heads, n, -1).transpose(1, 2).reshape(b, n, -1)


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """The host's U-Net with `_attention`: what the host picks for a CPU is made for inference."""
    from comfy.ldm.modules import attention

    original, attention.optimized_attention = attention.optimized_attention, _attention
    try:
        yield
    finally:
        attention.optimized_attention = original


def signal_share() -> Tensor:
    """The cumulative product of 1 - beta over Stable Diffusion's scaled-linear schedule, `(1000,)`."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


def train_unet(
    work: Path, total: int, vae: AutoEncoder, batch: int = 32, compiled: bool = True, stop: int | None = None
) -> tuple[nn.Module, Vocabulary, int]:
    """Text encoder and U-Net together on cached latents: v-prediction, stratified t, 12 % empty captions.

    6 % of the captions get a word or two that the vocabulary lacks, so that those do no harm later.
    """
    torch.manual_seed(2)
    cache = torch.load(work / "latents.pt", weights_only=True)
    latents, words = cache["latents"], Vocabulary()
    memo: dict[str, list[int]] = {c: words.rows(c) for c in set(cache["captions"])}
    captions = [memo[c] for c in cache["captions"]]
    length = max(len(c) for c in captions) + 2
    share, preview = signal_share(), preview_factors(work)
    model = nn.ModuleDict({"unet": build_unet(), "text": TextEncoder(len(words.ids))})
    average = nn.ModuleDict({"unet": build_unet(), "text": TextEncoder(len(words.ids))})
    average.load_state_dict(model.state_dict())
    plain = ("embedding", "time_embed", "input_blocks.0.", "unet.out.")
    optimizer = Optimizer(list(model.named_parameters()), 2e-3, plain)
    unet = torch.compile(model["unet"]) if compiled else model["unet"]

    def rows(picks: list[int], g: torch.Generator) -> Tensor:
        out = torch.ones(len(picks), length, dtype=torch.long)
        for i, (pick, u) in enumerate(
            zip(picks, torch.rand(len(picks), 3, generator=g).tolist(), strict=True)
        ):
            caption = captions[pick]
            if u[0] < 0.12:
                caption = EMPTY
            elif u[0] < 0.18:
                extra = 1 + round(u[1])
                at = 1 + int(u[2] * (len(caption) - 1))
                caption = caption[:at] + [UNKNOWN] * extra + caption[at:]
            out[i, : len(caption)] = torch.tensor(caption)
        return out

    def body(step: int, g: torch.Generator) -> dict[str, float]:
        picks = torch.randint(len(captions), (batch,), generator=g)
        z = latents[picks].float()
        context = rows(picks.tolist(), g)
        t = (torch.arange(batch) + torch.rand(batch, generator=g)) / batch * 1000
        t = t.long().clamp(0, 999)
        a = share[t].view(-1, 1, 1, 1)
        noise = torch.randn(z.shape, generator=g)
        x, v = a.sqrt() * z + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * z
        with torch.autocast("cpu", torch.bfloat16):
            out = unet(x, t.float(), context=model["text"](context))
        error = (out.float() - v).square().mean((1, 2, 3))
        loss = error.mean()
        loss.backward()
        optimizer.step(rate_factor(step, total, 0.5))
        follow(average, model, step, 0.999)
        early, late = error[t < 500].mean().item(), error[t >= 500].mean().item()
        return {"loss": loss.item(), "t<500": early, "t>=500": late}

    def after(step: int) -> None:
        export(work / "snapshot.safetensors", average, vae, words, length, step, preview)

    parts = {"model": model, "average": average, "optimizer": optimizer}
    with differentiable_attention():
        Stage("unet", work, total, 2, parts).run(body, after, stop)
    return average, words, length


def preview_factors(work: Path) -> dict[str, list]:
    """The linear map from latents to colours in -1..1 that the host's live previews use, by least squares."""
    cache = torch.load(work / "latents.pt", weights_only=True)
    pool = to_tensor(pictures(work / "scenes.npy")[:512])
    z = cache["latents"][:512].float().permute(0, 2, 3, 1).reshape(-1, 4)
    colors = F.avg_pool2d(pool, 8).permute(0, 2, 3, 1).reshape(-1, 3)
    solution = torch.linalg.lstsq(F.pad(z, (0, 1), value=1.0), colors).solution
    rounded = [[round(v, 4) for v in row] for row in solution.tolist()]
    return {"factors": rounded[:4], "bias": rounded[4]}


def tune_decoder(work: Path, total: int, vae: AutoEncoder, batch: int = 16) -> AutoEncoder:
    """The decoder alone on the cached latents: pixels and edges at two scales, for sharpness."""
    pool, held = pictures(work / "scenes.npy"), to_tensor(pictures(work / "held_out.npy")[:256])
    latents = torch.load(work / "latents.pt", weights_only=True)["latents"]
    model, average = AutoEncoder(), AutoEncoder()
    model.load_state_dict(vae.state_dict())
    average.load_state_dict(vae.state_dict())
    model.encoder.requires_grad_(False)
    optimizer = Optimizer(list(model.decoder.named_parameters()), 2e-3)

    def body(step: int, g: torch.Generator) -> dict[str, float]:
        picks = torch.randint(len(latents), (batch,), generator=g).sort().values
        x, z = to_tensor(pool[picks.numpy()]), latents[picks].float()
        with torch.autocast("cpu", torch.bfloat16):
            y = model.decode(z + 0.06 * torch.randn(z.shape, generator=g)).float()
        error = (y - x).abs().mean() + (y - x).square().mean()
        loss = error + _edge_loss(y, x) + 0.5 * _edge_loss(F.avg_pool2d(y, 2), F.avg_pool2d(x, 2))
        loss.backward()
        optimizer.step(rate_factor(step, total, 0.4, 50))
        follow(average, model, step, 0.998)
        return {"loss": loss.item(), "psnr": psnr(y.detach(), x)}

    def after(step: int) -> None:
        print(f"decoder held-out PSNR {rebuilt_psnr(average, held):.2f} dB", flush=True)

    parts = {"model": model, "average": average, "optimizer": optimizer}
    Stage("decoder", work, total, 4, parts).run(body, after)
    return average


def export(
    path: Path,
    model: nn.ModuleDict,
    vae: AutoEncoder,
    words: Vocabulary,
    length: int,
    step: int,
    preview: dict[str, list],
) -> None:
    """All weights in one float16 file; positions that no caption reached get the mean of those that did."""
    from safetensors.torch import save_file

    tensors = {f"vae.{k}": v for k, v in vae.state_dict().items()}
    tensors |= {f"unet.{k}": v for k, v in model["unet"].state_dict().items()}
    tensors |= {f"text.text_model.{k}": v for k, v in model["text"].state_dict().items()}
    positions = tensors["text.text_model.embeddings.position_embedding.weight"].clone()
    positions[length:] = positions[1:length].mean(0)
    tensors["text.text_model.embeddings.position_embedding.weight"] = positions
    metadata = {
        "unet": json.dumps(UNET_CONFIG),
        "text": json.dumps(TEXT_CONFIG),
        "tokens": json.dumps(words.ids),
        "steps": str(step),
        "preview": json.dumps(preview),
    }
    part = path.with_suffix(".part")
    save_file({k: v.detach().half().contiguous() for k, v in tensors.items()}, part, metadata)
    part.replace(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=HERE / ".work")
    parser.add_argument("--out", type=Path, default=HERE / "model.safetensors")
    parser.add_argument("--scenes", type=int, default=45_000)
    parser.add_argument("--vae-steps", type=int, default=1_500)
    parser.add_argument("--unet-steps", type=int, default=5_900)
    parser.add_argument("--decoder-steps", type=int, default=1_200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--eager", action="store_true", help="do not compile the U-Net")
    parser.add_argument(
        "--until", choices=("scenes", "vae", "latents", "unet", "decoder", "export"), default="export"
    )
    a = parser.parse_args(arguments)
    compiled = not a.eager and bool(shutil.which("g++"))  # compiling makes a step a third faster
    host()
    a.work.mkdir(parents=True, exist_ok=True)

    if not (a.work / "held_out.npy").exists():
        draw_scenes(a.work / "held_out.npy", 1024, HELD_OUT)
    if not (a.work / "scenes.npy").exists():
        draw_scenes(a.work / "scenes.npy", a.scenes)
    if a.until == "scenes":
        return
    vae = AutoEncoder().requires_grad_(False)
    if not (a.work / "vae.pt").exists():
        torch.save(train_vae(a.work, a.vae_steps).state_dict(), a.work / "vae.pt")
    vae.load_state_dict(torch.load(a.work / "vae.pt", weights_only=True))
    if a.until == "vae":
        return
    if not (a.work / "latents.pt").exists():
        encode_pool(a.work, vae, a.scenes)
    if a.until == "latents":
        return
    model, words, length = train_unet(a.work, a.unet_steps, vae, a.batch, compiled)
    if a.until == "unet":
        return
    if not (a.work / "decoder.pt").exists():
        torch.save(tune_decoder(a.work, a.decoder_steps, vae).state_dict(), a.work / "decoder.pt")
    vae.load_state_dict(torch.load(a.work / "decoder.pt", weights_only=True))
    if a.until == "decoder":
        return
    export(a.out, model, vae, words, length, a.unet_steps, preview_factors(a.work))


if __name__ == "__main__":
    main()
