"""What can the demo model draw?  Seeded procedural scenes: spec, caption, picture, true masks.

A `Scene` says what is there, and so what its caption says; where it is, how large and which way it faces
comes from `Scene.layout` alone: scenes that share a layout differ only in what their captions differ in.
"""

from __future__ import annotations

import os
import random
import sys
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps

SIZE = 128
ANIMALS = {
    "cat": "\N{CAT}",
    "dog": "\N{DOG}",
    "elephant": "\N{ELEPHANT}",
    "penguin": "\N{PENGUIN}",
    "duck": "\N{DUCK}",
}
VEHICLES = {"bicycle": "\N{BICYCLE}", "car": "\N{AUTOMOBILE}", "boat": "\N{SAILBOAT}"}
THINGS = {
    "castle": "\N{EUROPEAN CASTLE}",
    "house": "\N{HOUSE BUILDING}",
    "tree": "\N{DECIDUOUS TREE}",
    "cake": "\N{BIRTHDAY CAKE}",
}
OBJECTS = {**ANIMALS, **VEHICLES, **THINGS}
COLORS = {
    "red": (225, 40, 40),
    "blue": (50, 95, 230),
    "green": (50, 175, 70),
    "yellow": (250, 210, 40),
    "purple": (150, 60, 200),
}
PLACES = {
    "beach": "on",
    "field": "in",
    "desert": "in",
    "forest": "in",
    "street": "on",
    "boulevard": "on",
    "mountain": "on",
}
SNOWY = ("field", "forest", "street", "boulevard", "mountain")
CROWDED = ("beach", "field", "street", "boulevard")
STYLES = {
    "drawing": "children drawing of",
    "watercolor": "watercolor of",
    "pixel": "pixel art of",
    "vintage": "vintage photo of",
    "photo": "photo of",
}
PERSON = "\N{STANDING PERSON}"
BLANK = (244, 244, 240)
FONTS = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto-emoji/NotoColorEmoji.ttf",
)


@dataclass(frozen=True)
class Scene:
    """What a picture shows.

    subject, partner: object words; `relation` is "riding" or "next to" and needs both.
    snow, crowd: strengths in 0..1; 0 leaves the word out of the caption.
    layout: seed of every position, size and flip.
    """

    subject: str | None = None
    subject_color: str | None = None
    relation: str | None = None
    partner: str | None = None
    partner_color: str | None = None
    place: str | None = None
    snow: float = 0.0
    crowd: float = 0.0
    night: bool = False
    style: str | None = None
    layout: int = 0
    article: bool = True

    def caption(self) -> str:
        """The caption in the demo's grammar, e.g. `a watercolor of a red castle on a snowy mountain`."""
        words = []
        if self.subject:
            words.append(_noun(self.subject, self.subject_color))
        if self.partner:
            words.append(f"{self.relation} {_noun(self.partner, self.partner_color)}")
        if self.place:
            adjectives = " ".join(a for a, on in (("crowded", self.crowd), ("snowy", self.snow)) if on)
            place = _noun(self.place, adjectives)
            words.append(f"{PLACES[self.place]} {place}" if self.subject else place)
        if self.night:
            words.append("at night")
        text = " ".join(words)
        if self.style:
            text = f"a {STYLES[self.style]} {text}"
        if not self.article:
            text = text.split(" ", 1)[1]
        return text


def _noun(word: str, adjective: str | None) -> str:
    phrase = f"{adjective} {word}" if adjective else word
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def vocabulary() -> list[str]:
    """Every word that a caption can hold, sorted."""
    text = " ".join([*OBJECTS, *COLORS, *PLACES, *PLACES.values(), *STYLES.values()])
    return sorted({*text.split(), "a", "an", "riding", "next", "to", "at", "night", "snowy", "crowded"})


def sample(seed: int) -> Scene:
    """A random scene; equal seeds give equal scenes."""
    r = random.Random(f"scene {seed}")
    color = {}
    subject = relation = partner = None
    u = r.random()
    if u < 0.54:
        subject = r.choice(list(OBJECTS))
    elif u < 0.78:
        subject, relation, partner = r.choice(list(ANIMALS)), "riding", r.choice(list(VEHICLES))
    elif u < 0.93:
        relation = "next to"
        subject, partner = r.sample(list(OBJECTS), 2)
    for role, there in (("subject", subject), ("partner", partner)):
        if there and r.random() < (0.2 if partner else 0.36):
            color[f"{role}_color"] = r.choice(list(COLORS))
    place = r.choice(list(PLACES)) if subject is None or r.random() < 0.74 else None
    snow = r.uniform(0.2, 1) if place in SNOWY and r.random() < 0.28 else 0.0
    crowd = r.uniform(0.2, 1) if place in CROWDED and not snow and r.random() < 0.32 else 0.0
    style = None
    if r.random() < 0.42:
        style = r.choice(["drawing", "drawing", "watercolor", "pixel", "vintage", "photo"])
    night = place is not None and style != "vintage" and r.random() < 0.12
    if style == "vintage":
        color = {}
    return Scene(
        subject,
        color.get("subject_color"),
        relation,
        partner,
        color.get("partner_color"),
        place,
        snow,
        crowd,
        night,
        style,
        r.randrange(1 << 30),
        r.random() < 0.8,
    )


def font_path() -> str:
    """Noto Color Emoji in its bitmap form, wherever this machine keeps it.

    Raises FileNotFoundError with what to install.
    """
    for path in (os.environ.get("P2P_EMOJI_FONT", ""), *FONTS):
        if path and os.path.exists(path):
            return path
    raise FileNotFoundError(
        "The demo scenes are drawn with Noto Color Emoji (its bitmap version), which was not found. "
        "Install it with `apt-get install fonts-noto-color-emoji`, or set P2P_EMOJI_FONT to the path of a "
        "NotoColorEmoji.ttf."
    )


@cache
def _emoji(char: str) -> Image.Image:
    font = ImageFont.truetype(font_path(), 109)
    image = Image.new("RGBA", (160, 160), (255, 255, 255, 0))
    ImageDraw.Draw(image).text((12, 12), char, font=font, embedded_color=True)
    return image.crop(image.getbbox())


@cache
def _tinted(char: str, color: str | None) -> Image.Image:
    """The emoji in one hue: its median brightness becomes the pure colour, lights and darks stay."""
    image = _emoji(char)
    if color is None:
        return image
    rgba = np.asarray(image).astype(np.float32)
    gray = rgba[..., :3] @ np.array([0.3, 0.55, 0.15], np.float32)
    dark, middle, light = np.percentile(gray[rgba[..., 3] > 128], [4, 45, 97])
    tone = np.interp(gray, [dark, max(middle, dark + 20), max(light, middle + 40)], [0.0, 0.6, 1.0])[
        ..., None
    ]
    pure = np.array(COLORS[color], np.float32)
    rgba[..., :3] = np.where(
        tone < 0.6, pure * (0.38 + 0.62 * tone / 0.6), pure + (255 - pure) * (tone - 0.6) * 1.1
    )
    return Image.fromarray(rgba.clip(0, 255).astype(np.uint8), "RGBA")


def _paste(
    layer: Image.Image, char: str, size: float, x: float, base: float, flip: bool, color: str | None = None
) -> None:
    """Draw an emoji, `size` long, centred at `x`, standing on `base`, kept inside the frame."""
    image = _tinted(char, color)
    scale = size / max(image.size)
    image = image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS
    )
    if flip:
        image = ImageOps.mirror(image)
    left = max(1, min(SIZE - 1 - image.width, round(x - image.width / 2)))
    top = max(1, min(SIZE - 1 - image.height, round(base - image.height)))
    layer.alpha_composite(image, (left, top))


def _sky(top: tuple[int, int, int], bottom: tuple[int, int, int]) -> Image.Image:
    t = np.linspace(0, 1, 2 * SIZE)[:, None, None]
    rows = np.array(top) * (1 - t) + np.array(bottom) * t
    return Image.fromarray(np.broadcast_to(rows, (2 * SIZE, 2 * SIZE, 3)).astype(np.uint8))


def _background(place: str | None, horizon: int, snow: float, r: random.Random) -> Image.Image:
    if place is None:
        return Image.new("RGB", (SIZE, SIZE), BLANK)
    skies = {
        "desert": ((250, 190, 110), (253, 230, 180)),
        "forest": ((150, 205, 190), (200, 230, 205)),
        "street": ((205, 212, 222), (228, 233, 238)),
    }
    top, bottom = skies.get(place, ((125, 195, 250), (210, 237, 253)))
    if snow:
        top, bottom = (
            (round(c + (p - c) * 0.8 * snow) for c, p in zip(s, (205, 215, 228), strict=True))
            for s in (top, bottom)
        )
    image = _sky(tuple(top), tuple(bottom))
    d = ImageDraw.Draw(image)
    n, h = 2 * SIZE, 2 * horizon

    def white(c: tuple[int, int, int], k: float) -> tuple[int, ...]:
        return tuple(round(v + (250 - v) * k * snow) for v in c)

    ground = {
        "beach": (242, 215, 150),
        "field": (115, 190, 70),
        "desert": (232, 172, 92),
        "forest": (75, 125, 62),
        "street": (105, 105, 112),
        "boulevard": (120, 180, 90),
        "mountain": (140, 165, 105),
    }[place]
    if place == "beach":
        d.rectangle([0, h - 32, n, h], fill=(30, 120, 205))
        x = r.choice([36, n - 36])
        d.ellipse([x - 22, 14, x + 22, 58], fill=(255, 222, 50))
    elif place == "desert":
        for x, w, up in ((r.randint(0, n), 170, 44), (r.randint(0, n), 130, 30)):
            d.ellipse([x - w, h - up, x + w, h + up], fill=(222, 150, 75))
    elif place == "field":
        x = r.randint(0, n)
        d.ellipse([x - 190, h - 26, x + 190, h + 60], fill=white((90, 165, 60), 0.7))
    elif place == "mountain":
        for x, up in ((r.randint(30, 100), r.randint(95, 130)), (r.randint(150, 230), r.randint(75, 120))):
            up = min(up, h - 8)
            cap = 0.26 + 0.62 * snow
            d.polygon([(x - 110, h), (x + 110, h), (x, h - up)], fill=(122, 112, 130))
            d.polygon(
                [(x - 110 * cap, h - up * (1 - cap)), (x + 110 * cap, h - up * (1 - cap)), (x, h - up)],
                fill=(248, 249, 253),
            )
    elif place == "street":
        x = r.randint(-30, 0)
        while x < n:
            w, up = r.randint(40, 62), r.randint(60, 125)
            d.rectangle(
                [x, h - up, x + w, h], fill=r.choice([(175, 115, 95), (150, 150, 168), (200, 170, 125)])
            )
            for wy in range(h - up + 10, h - 14, 26):
                for wx in range(x + 8, x + w - 12, 22):
                    d.rectangle([wx, wy, wx + 10, wy + 13], fill=(240, 235, 200))
            d.rectangle(
                [x, h - up - 7 * snow, x + w, h - up], fill=white((120, 120, 120), 1) if snow else None
            )
            x += w + 4
    d.rectangle([0, h, n, n], fill=white(ground, 0.95))
    if place == "forest":
        for i in range(7):
            x, up = i * 40 + r.randint(-8, 8), r.randint(80, 120)
            d.polygon(
                [(x - 28, h + 4), (x + 28, h + 4), (x, h - up)],
                fill=white((22, 98 + r.randint(-16, 16), 52), 0.6),
            )
    elif place == "street":
        d.rectangle([0, h, n, h + 8], fill=white((180, 180, 180), 0.9))
        for x in range(r.randint(-40, 0), n, 64):
            d.rectangle([x, 226, x + 34, 232], fill=(248, 248, 248))
    elif place == "boulevard":
        x = SIZE + r.randint(-14, 14)
        d.polygon([(x - 12, h), (x + 12, h), (n + 16, n), (-16, n)], fill=white((120, 118, 128), 0.8))
        for k in (0.25, 0.55, 0.9):
            y = h + (n - h) * k
            d.polygon(
                [(x - 6 * k, y), (x + 6 * k, y), (x + 10 * k, y + 34 * k), (x - 10 * k, y + 34 * k)],
                fill=(248, 248, 248),
            )
        for k in (0.16, 0.36, 0.66):
            for side in (-1, 1):
                tx, ty, s = x + side * (24 + 190 * k), h + 70 * k, 90 * k + 18
                d.rectangle([tx - s * 0.08, ty - s * 0.6, tx + s * 0.08, ty], fill=(110, 80, 60))
                d.ellipse(
                    [tx - s * 0.5, ty - s * 1.5, tx + s * 0.5, ty - s * 0.5], fill=white((60, 140, 60), 0.6)
                )
    return image.reduce(2)


def _objects(scene: Scene, horizon: int, r: random.Random) -> list[tuple[str, Image.Image]]:
    """[(word, RGBA layer)] from back to front."""
    flip, flip_partner = r.random() < 0.5, r.random() < 0.5
    u = [r.random() for _ in range(6)]
    layers = []

    def draw(word: str, size: float, x: float, base: float, mirrored: bool, color: str | None) -> None:
        layer = Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0))
        _paste(layer, OBJECTS[word], size, x, base, mirrored, color)
        layers.append((word, layer))

    if scene.relation == "riding":
        x, base, size = 50 + 28 * u[0], 112 + 12 * u[1], 86 + 14 * u[2]
        tall = _emoji(OBJECTS[scene.partner])
        height = size * tall.height / max(tall.size)
        seat = {"bicycle": 0.60, "car": 0.72, "boat": 0.12}[scene.partner]
        draw(scene.partner, size, x, base, flip_partner, scene.partner_color)
        draw(scene.subject, 60 + 8 * u[3], x - 4 + 8 * u[4], base - seat * height, flip, scene.subject_color)
    elif scene.partner:
        base, gap, x = min(122, horizon + 22 + 18 * u[0]), 58 + 6 * u[1], 31 + 6 * u[2]
        ends = (x, x + gap) if u[5] < 0.5 else (x + gap, x)
        draw(scene.partner, 58 + 8 * u[3], ends[1], base, flip_partner, scene.partner_color)
        draw(scene.subject, 58 + 8 * u[4], ends[0], base, flip, scene.subject_color)
    elif scene.subject:
        size = 86 + 22 * u[0]
        draw(
            scene.subject, size, 50 + 28 * u[1], min(124, horizon + 32 + 18 * u[2]), flip, scene.subject_color
        )
    return layers


def _crowd(image: Image.Image, scene: Scene, horizon: int, r: random.Random) -> None:
    people = [
        (
            r.uniform(6, 26),
            r.uniform(6, 122),
            r.random() < 0.5,
            r.choice([None, None, "red", "blue", "purple"]),
        )
        for _ in range(16)
    ]
    people = sorted(people[: round(2 + 14 * scene.crowd)])
    for down, x, flip, color in people:
        _paste(image, PERSON, 26 + 0.6 * down, x, horizon + down, flip, color)


def _wobble(pixels: np.ndarray, seed: str) -> np.ndarray:
    """Pixels `(SIZE, SIZE, ...)` moved by a hand's smooth trembling of about two pixels, read bilinearly."""
    noise = np.random.default_rng(random.Random(seed).randrange(1 << 30)).normal(0, 1.6, (2, 8, 8))
    shift = [
        np.asarray(Image.fromarray(n.astype(np.float32)).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        for n in noise
    ]
    y, x = np.mgrid[:SIZE, :SIZE] + np.stack(shift)
    y, x = y.clip(0, SIZE - 1.001), x.clip(0, SIZE - 1.001)
    top, left = y.astype(int), x.astype(int)
    down, right = (v.reshape(SIZE, SIZE, *[1] * (pixels.ndim - 2)) for v in (y - top, x - left))
    upper = pixels[top, left] * (1 - right) + pixels[top, left + 1] * right
    lower = pixels[top + 1, left] * (1 - right) + pixels[top + 1, left + 1] * right
    return upper * (1 - down) + lower * down


def _crayon(back: Image.Image, layers: list[tuple[str, Image.Image]], r: random.Random) -> Image.Image:
    """Thick dark outlines, flat colours, and a background hatched on white paper."""
    paper = Image.new("RGB", (SIZE, SIZE), (255, 254, 248))
    stroke = np.add.outer(np.arange(SIZE), np.arange(SIZE) * (1 if r.random() < 0.5 else -1))
    hatch = Image.fromarray(np.where(stroke % 8 < 5, 215, 90).astype(np.uint8))
    image = Image.composite(back, paper, hatch).convert("RGBA")
    for _, layer in layers:
        alpha = layer.getchannel("A")
        image.paste((45, 40, 70, 255), (0, 0), alpha.filter(ImageFilter.MaxFilter(7)))
        flat = layer.convert("RGB").filter(ImageFilter.ModeFilter(5)).convert("RGBA")
        flat.putalpha(alpha)
        image.alpha_composite(flat)
    return image


def _finish(image: Image.Image, scene: Scene, r: random.Random) -> Image.Image:
    if scene.style == "watercolor":
        soft = image.filter(ImageFilter.MedianFilter(5)).filter(ImageFilter.GaussianBlur(0.6))
        edge = ImageOps.autocontrast(ImageOps.grayscale(soft).filter(ImageFilter.FIND_EDGES))
        noise = np.random.default_rng(r.randrange(1 << 30))
        blot = np.asarray(
            Image.fromarray(noise.normal(0, 1, (8, 8)).astype(np.float32)).resize(
                (SIZE, SIZE), Image.Resampling.BICUBIC
            )
        )
        rim = np.asarray(
            Image.fromarray(noise.normal(0, 1, (16, 16)).astype(np.float32)).resize(
                (SIZE, SIZE), Image.Resampling.BICUBIC
            )
        )
        pixels = 255 - (255 - np.asarray(soft, np.float32)) * (0.85 + 0.15 * blot[..., None].clip(-1, 1))
        pixels -= 0.35 * np.asarray(edge, np.float32)[..., None]
        y, x = np.mgrid[:SIZE, :SIZE]
        near = np.minimum.reduce([x, y, SIZE - 1 - x, SIZE - 1 - y]) + 3 * rim
        keep = ((near - 6) / 3).clip(0, 1)[..., None]
        return Image.fromarray((pixels * keep + 250 * (1 - keep)).clip(0, 255).astype(np.uint8))
    if scene.style == "pixel":
        small = image.resize((SIZE // 4, SIZE // 4), Image.Resampling.BOX).quantize(24).convert("RGB")
        return small.resize((SIZE, SIZE), Image.Resampling.NEAREST)
    if scene.style == "vintage":
        gray = np.asarray(ImageOps.grayscale(image), np.float32)[..., None] / 255
        tone = 255 * (gray * np.array([0.94, 0.78, 0.56]) + np.array([0.06, 0.03, 0.01]))
        return Image.fromarray(tone.clip(0, 255).astype(np.uint8))
    return image


def draw(scene: Scene) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A scene's picture, uint8 `(SIZE, SIZE, 3)`, and each object's visible mask, bool `(SIZE, SIZE)`."""
    place, objects, decor = (
        random.Random(f"{part} {scene.layout}") for part in ("place", "objects", "decor")
    )
    horizon = place.randint(64, 82)
    back = _background(scene.place, horizon, scene.snow, place).convert("RGBA")
    if scene.crowd:
        _crowd(back, scene, horizon, random.Random(f"crowd {scene.layout}"))
    layers = _objects(scene, horizon, objects)
    if scene.style == "drawing":
        image = _crayon(back.convert("RGB"), layers, decor)
    else:
        image = back
        for _, layer in layers:
            image.alpha_composite(layer)
    d = ImageDraw.Draw(image)
    if scene.snow:
        flakes = [(decor.randint(0, SIZE), decor.randint(0, SIZE)) for _ in range(36)]
        for x, y in flakes[: round(36 * scene.snow)]:
            d.ellipse([x - 2, y - 2, x + 2, y + 2], fill=(255, 255, 255, 255))
    image = image.convert("RGB")
    if scene.night:
        image = Image.fromarray(
            (np.asarray(image, np.float32) * np.array([0.46, 0.5, 0.74])).astype(np.uint8)
        )
        d = ImageDraw.Draw(image)
        x = decor.choice([18, SIZE - 18])
        d.ellipse([x - 10, 6, x + 10, 26], fill=(250, 245, 205))
        for _ in range(8):
            x, y = decor.randint(2, SIZE - 2), decor.randint(2, 44)
            d.ellipse([x - 1, y - 1, x + 1, y + 1], fill=(250, 248, 215))
    image = _finish(image, scene, decor)
    pixels = np.asarray(image)
    masks = {}
    hidden = Image.new("L", (SIZE, SIZE), 0)
    for word, layer in reversed(layers):
        alpha = layer.getchannel("A")
        masks[word] = np.asarray(ImageChops.subtract(alpha, hidden)) > 127
        hidden = ImageChops.lighter(hidden, alpha)
    if scene.style == "drawing":
        pixels = _wobble(pixels, f"wobble {scene.layout}").round().astype(np.uint8)
        masks = {word: _wobble(mask, f"wobble {scene.layout}") > 0.5 for word, mask in masks.items()}
    return pixels, masks


if __name__ == "__main__":
    from drawing.grid import contact_sheet

    scenes = [sample(i) for i in range(64)]
    scenes += [replace(Scene("castle", place="mountain", layout=4), snow=s) for s in (0, 0.2, 0.6, 1)]
    scenes += [replace(Scene(place="boulevard", layout=5), crowd=s) for s in (0, 0.2, 0.6, 1)]
    images = [Image.fromarray(draw(s)[0]) for s in scenes]
    contact_sheet(images, [s.caption() for s in scenes], 12).save(sys.argv[1])
