"""Pictures, damaged files and refusals that several test files share."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from dreamteacher.runtime.errors import UserError


def noise(seed: int, height: int = 24, width: int = 24) -> Image.Image:
    """A picture that no other seed gives and that compresses badly (so that a cut file lacks pixels)."""
    generator = torch.Generator().manual_seed(seed)
    return to_pil_image(torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8))


def fill(folder: Path, count: int, suffix: str = ".png", start: int = 0) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{start + i:04d}{suffix}" for i in range(count)]
    for i, path in enumerate(paths):
        noise(start + i).save(path)
    return paths


def cut(path: Path, part: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])


def png_header(path: Path, width: int, height: int) -> None:
    """A valid PNG header of any size, and no pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    crc = struct.pack(">I", zlib.crc32(chunk))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + crc + struct.pack(">I", 9) + b"IDAT"
    )


def refused(call: Callable[[], object], *parts: str) -> str:
    """The UserError of `call`: three lines at most, with these words."""
    with pytest.raises(UserError) as error:
        call()
    text = str(error.value)
    assert len(text.splitlines()) <= 3
    for part in parts:
        assert part in text
    return text


def pixels(image: Image.Image) -> Tensor:
    return (
        torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        .view(*image.size[::-1], 3)
        .permute(2, 0, 1)
    )


def zero_bytes(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("<html>404 Not Found</html>")


def no_header(path: Path) -> None:
    noise(1).save(path)
    path.write_bytes(path.read_bytes()[:20])


def half(path: Path) -> None:
    noise(1, 64, 64).save(path)
    cut(path, 0.5)


def flipped_bytes(path: Path) -> None:
    noise(1).save(path, format="PNG")
    content = bytearray(path.read_bytes())
    content[60:90] = bytes(30)
    path.write_bytes(content)


def huge(path: Path) -> None:
    png_header(path, 20000, 20000)


def floats(path: Path) -> None:
    Image.new("F", (8, 8), 0.5).save(path, format="TIFF")


def lab(path: Path) -> None:
    Image.new("LAB", (8, 8)).save(path, format="TIFF")


def deep_grey(path: Path) -> None:
    Image.new("I", (8, 8), 70000).save(path, format="TIFF")


def broken_link(path: Path) -> None:
    path.symlink_to(path.with_name("gone.png"))


DAMAGE: list[tuple[Callable[[Path], None], str, str]] = [
    (zero_bytes, ".png", "empty file"), (text, ".jpg", "not an image"), (no_header, ".png", "truncated"),
    (no_header, ".jpg", "not an image"), (half, ".jpg", "truncated"), (half, ".png", "truncated"),
    (half, ".bmp", "truncated"), (flipped_bytes, ".png", "damaged"),
    (huge, ".png", "too large: 20000 x 20000 pixels"), (floats, ".tif", "floating-point"),
    (lab, ".tif", "Lab colours"), (deep_grey, ".tif", "16 bits"), (broken_link, ".png", "broken link"),
]  # fmt: skip
