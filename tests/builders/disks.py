"""Disks that are full."""

from __future__ import annotations

import contextlib
from pathlib import Path


def fill_disk(place: Path) -> Path:
    """Takes all space that is left on the disk of a folder, by one file."""
    with open(place / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    return place / "filler"
