"""Images that are unusual and no error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from dreamteacher.cli.main import main
from dreamteacher.data.images import read_image
from dreamteacher.reports import report
from tests.cli.errors.commands import pretrain

ODD = {
    "16-bit grey": "scaled from 0..65535 to 0..255",
    "CMYK": "converted to RGB",
    "palette": "converted to RGB",
    "alpha": "what is transparent is seen on white",
    "EXIF rotation": "turned upright",
}


def odd_image(kind: str, path: Path) -> torch.Tensor:
    """Writes an image of 64 x 64; returns the pixels that must come out, uint8 3 x 64 x 64."""
    square = torch.arange(64 * 64, dtype=torch.int32).reshape(64, 64) * 16
    match kind:
        case "16-bit grey":
            Image.frombytes("I;16", (64, 64), bytes(_little_endian(square))).save(path)
            return (square.double() / 65535 * 255).round().to(torch.uint8).expand(3, 64, 64)
        case "CMYK":
            Image.new("CMYK", (64, 64), (255, 0, 0, 0)).save(path, format="TIFF")
            return torch.tensor([0, 255, 255], dtype=torch.uint8).view(3, 1, 1).expand(3, 64, 64)
        case "palette":
            image = Image.new("P", (64, 64), 1)
            image.putpalette([0, 0, 0, 250, 120, 10])
            image.save(path)
            return torch.tensor([250, 120, 10], dtype=torch.uint8).view(3, 1, 1).expand(3, 64, 64)
        case "alpha":
            Image.new("RGBA", (64, 64), (200, 0, 0, 0)).save(path)
            return torch.full((3, 64, 64), 255, dtype=torch.uint8)
    assert kind == "EXIF rotation"
    image = Image.new("L", (64, 64))
    image.paste(255, (0, 0, 64, 32))  # bright above
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: bright on the right
    image.save(path, exif=exif)
    upright = torch.zeros(3, 64, 64, dtype=torch.uint8)
    upright[:, :, 32:] = 255
    return upright


def _little_endian(values: torch.Tensor) -> Iterator[int]:
    for value in values.flatten().tolist():
        yield from value.to_bytes(2, "little")


@pytest.mark.parametrize("kind", ODD)
def test_odd_images_are_accepted(kind: str, tmp_path: Path) -> None:
    path = tmp_path / ("odd.tif" if kind == "CMYK" else "odd.png")
    expected = odd_image(kind, path)
    difference = read_image(path, (64, 64)).int() - expected.int()
    assert difference.abs().max() <= 1


def test_odd_images_train(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of them all, with --strict: a whole pretraining."""
    monkeypatch.setattr(report, "write_report", lambda run, **_: run)
    folder = tmp_path / "odd"
    folder.mkdir()
    for i in range(8):
        for j, kind in enumerate(ODD):
            odd_image(kind, folder / f"{i}-{j}.{'tif' if kind == 'CMYK' else 'png'}")
    assert (
        main(pretrain("--strict", teacher=str(tiny_teacher), images=str(folder), out=str(tmp_path / "run")))
        == 0
    )
    said = capsys.readouterr()
    assert "images 40 | skipped 0" in said.out
    assert said.err == ""
