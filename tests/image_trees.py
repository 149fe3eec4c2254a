"""Small image folders for the tests of data sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """A smooth random RGB image uint8 [height, width, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.BICUBIC))


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def tree(
    root: Path, name: str = "own", classes: tuple[str, ...] = ("b", "a"), sizes=((40, 40),), count: int = 3
) -> Path:
    """An ImageFolder tree of PNG files; the image sizes (height, width) take turns."""
    seed = 0
    for split in ("train", "test"):
        for label in classes:
            for number in range(count):
                write(root / name / split / label / f"{number}.png", picture(seed, *sizes[seed % len(sizes)]))
                seed += 1
    return root


def on_disk(path: Path) -> torch.Tensor:
    """uint8 [3, h, w] of a file."""
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


def damage(folder: Path) -> None:
    """Truncate one image and replace another by text."""
    whole = (folder / "a" / "1.png").read_bytes()
    (folder / "a" / "1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "b" / "2.png").write_text("not a picture")
