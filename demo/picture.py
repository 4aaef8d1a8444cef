"""Which picture do the workflows edit?  `python -m demo.picture` draws it: `picture.png`.

A scene of the generator with a layout that no training saw, so a real picture to the model: it never drew it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

PICTURE = Path(__file__).parent / "picture.png"
LAYOUT = 5_000_004
CAPTION = "a castle on a mountain"


def load_picture() -> Tensor:
    """The picture as the host's IMAGE, (1, 128, 128, 3), values 0 to 1."""
    with Image.open(PICTURE) as picture:
        return torch.from_numpy(np.asarray(picture.convert("RGB"), np.float32) / 255.0)[None]


def main() -> None:
    from .scenes import Scene, draw

    scene = Scene(subject="castle", place="mountain", layout=LAYOUT)
    assert scene.caption() == CAPTION
    Image.fromarray(draw(scene)[0]).save(PICTURE, optimize=True)
    print(PICTURE)


if __name__ == "__main__":
    main()
