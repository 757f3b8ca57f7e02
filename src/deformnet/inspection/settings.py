"""Settings of `deformnet inspect`; importing them is cheap."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What a report analyzes."""

    split: str = "val"
    """Split to analyze."""
    baseline: Path | None = None
    """Run folder of the same network without deformable layers, for comparison."""
    images: int | None = None
    """Number of images to analyze, from the start of the split; None analyzes all."""
    objects: tuple[str, ...] = ()
    """For label maps: classes whose connected regions count as objects; all others are background.
    By default, all classes except stuff such as sky, road and building."""
    device: str | None = None
    """Device, such as cpu or cuda:1; None uses a GPU if there is one."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """What the interactive page shows, and where it is served."""

    baseline: Path | None = None
    """Run folder of the same network without deformable layers, for comparison."""
    data: Path | None = None
    """Data set folder to use instead of IMAGE; its ground truth is shown."""
    split: str = "val"
    """Split of the data set."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 makes the page accessible from other machines."""
    port: int | None = None
    """Port to listen on; None picks a free one."""
    open: bool = False
    """Open the page in a browser."""
    device: str | None = None
    """Device, such as cpu or cuda:1; None uses a GPU if there is one."""
