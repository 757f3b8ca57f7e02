"""Images without content, and their files."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image


def noise(height: int, width: int) -> torch.Tensor:
    """An image uint8 [3, H, W]; every size has its own."""
    generator = torch.Generator().manual_seed(height + width)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def smooth_noise(height: int, width: int, brightest: int = 255) -> torch.Tensor:
    """An image uint8 [3, H, W] whose colors change slowly."""
    generator = torch.Generator().manual_seed(height * width)
    coarse = torch.rand(1, 3, 1 + height // 8, 1 + width // 8, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    return (brightest * fine[0]).to(torch.uint8)


def save(path: Path, image: torch.Tensor, **options: Any) -> Path:
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, **options)
    return path


def turned(orientation: int = 6) -> Image.Exif:
    """Metadata of a photograph that viewers turn: by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif
