"""Images of every kind, damage of every kind, sizes and crops."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from dreamteacher.data import images
from dreamteacher.data.images import (
    BadImageError,
    Size,
    _cover_box,
    _load,
    find_images,
    read_header,
    read_image,
    read_mask,
)
from tests.builders.pictures import DAMAGE, fill, noise, pixels, png_header, refused
from tests.places import ROOT

RED, BLUE = (255, 0, 0), (0, 0, 255)


def halves(mode: str, left: Any, right: Any) -> Image.Image:
    image = Image.new(mode, (16, 8), left)
    image.paste(right, (8, 0, 16, 8))
    return image


def colours(image: Tensor) -> tuple[list[int], list[int]]:
    """The colour of the left and of the right half, each of which must be of one colour."""
    w = image.shape[-1] // 2
    for half in (image[..., : w - 1], image[..., w + 1 :]):
        assert (half.flatten(1).amax(1).int() - half.flatten(1).amin(1).int()).max() <= 8, "not one colour"
    return image[:, 2, 1].tolist(), image[:, 2, -2].tolist()


# --- finding ------------------------------------------------------------------------------------------------


def test_find_images_is_recursive_sorted_and_skips_what_is_hidden_or_no_image(tmp_path: Path) -> None:
    wanted = ["a/1.JPG", "a/b/2.tiff", "a.png", "c d/3.webp"]
    unwanted = [".hidden.png", "a/._1.jpg", ".cache/4.png", "notes.txt", "a/png", "5.png.part"]
    for name in wanted + unwanted:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for ever
    found = find_images(tmp_path)
    assert [p.relative_to(tmp_path).as_posix() for p in found] == wanted


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    fill(tmp_path / "real", 2)
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "back").symlink_to(folder)
    (folder / "self").symlink_to(folder)
    assert [p.name for p in find_images(folder)] == ["0000.png", "0001.png"]


def test_folders_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(lambda: find_images(tmp_path / "no"), "does not exist")
    (tmp_path / "file.png").touch()
    refused(lambda: find_images(tmp_path / "file.png"), "is a file")
    (tmp_path / "empty" / "deep").mkdir(parents=True)
    refused(lambda: find_images(tmp_path / "empty"), "No images", ".png")

    def scandir(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", scandir)
    refused(lambda: find_images(tmp_path), "Permission denied")


# --- reading every kind of image ----------------------------------------------------------------------------


def palette(transparent: int | None = None) -> tuple[Image.Image, dict[str, Any]]:
    image = halves("P", 3, 7)
    image.putpalette([0] * 9 + [255, 0, 0] + [0] * 9 + [0, 0, 255])
    return image, {} if transparent is None else {"transparency": transparent}


WHITE, BLACK = [255] * 3, [0] * 3
KINDS: dict[str, tuple[Image.Image, str, dict[str, Any], list[int], list[int]]] = {
    "rgb": (halves("RGB", RED, BLUE), ".png", {}, [255, 0, 0], [0, 0, 255]),
    "grey": (halves("L", 10, 200), ".png", {}, [10] * 3, [200] * 3),
    "bilevel": (halves("1", 0, 1), ".png", {}, BLACK, WHITE),
    "palette": (palette()[0], ".png", {}, [255, 0, 0], [0, 0, 255]),
    "palette gif": (palette()[0], ".gif", {}, [255, 0, 0], [0, 0, 255]),
    "transparent palette": (*(palette(7)[0], ".png", palette(7)[1]), [255, 0, 0], WHITE),
    "palette, alpha bytes": (palette()[0], ".png", {"transparency": b"\xff" * 7 + b"\0"}, [255, 0, 0], WHITE),
    "grey with a transparent value": (halves("L", 10, 200), ".png", {"transparency": 10}, WHITE, [200] * 3),
    "rgba": (halves("RGBA", (*RED, 255), (*BLUE, 0)), ".png", {}, [255, 0, 0], WHITE),
    "half transparent": (halves("RGBA", (*RED, 128), (*BLUE, 255)), ".png", {}, [255, 127, 127], [0, 0, 255]),
    "grey and alpha": (halves("LA", (40, 255), (40, 0)), ".png", {}, [40] * 3, WHITE),
    "16-bit": (halves("I", 257 * 20, 65535).convert("I;16"), ".png", {}, [20] * 3, WHITE),
    "16-bit, rounded": (halves("I", 128, 129).convert("I;16"), ".png", {}, BLACK, [1] * 3),
    "16-bit tiff": (halves("I", 257 * 20, 65535).convert("I;16"), ".tif", {}, [20] * 3, WHITE),
    "16-bit in 32": (halves("I", 257 * 20, 65535), ".tif", {}, [20] * 3, WHITE),
    "cmyk": (halves("CMYK", (0, 255, 255, 0), (255, 255, 0, 0)), ".tif", {}, [255, 0, 0], [0, 0, 255]),
    "webp": (halves("RGBA", (*RED, 255), (*BLUE, 0)), ".webp", {"lossless": True}, [255, 0, 0], WHITE),
    "bmp": (halves("RGB", RED, BLUE), ".bmp", {}, [255, 0, 0], [0, 0, 255]),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_images(kind: str, tmp_path: Path) -> None:
    image, suffix, options, left, right = KINDS[kind]
    path = tmp_path / f"x{suffix}"
    image.save(path, **options)
    whole = read_image(path, None)
    assert whole.dtype == torch.uint8
    assert whole.shape == (3, 8, 16)
    assert colours(whole) == (left, right)
    assert colours(read_image(path, (16, 32))) == (left, right)


def test_a_cmyk_jpeg(tmp_path: Path) -> None:
    halves("CMYK", (0, 255, 255, 0), (255, 255, 0, 0)).save(tmp_path / "x.jpg", quality=100)
    left, right = colours(read_image(tmp_path / "x.jpg", None))
    assert torch.allclose(torch.tensor([left, right]).float(), torch.tensor([RED, BLUE]).float(), atol=6)


def test_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), c) for c in (RED, BLUE)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "x.gif", None)[:, 0, 0].tolist() == [255, 0, 0]


def test_a_wrong_suffix_does_no_harm(tmp_path: Path) -> None:
    noise(0).save(tmp_path / "x.png")
    (tmp_path / "x.png").rename(tmp_path / "x.jpg")
    assert torch.equal(read_image(tmp_path / "x.jpg", None), pixels(noise(0)))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_rotation(turn: int, suffix: str, tmp_path: Path) -> None:
    image = Image.new("RGB", (160, 96), (128, 128, 128))
    image.paste(RED, (0, 0, 80, 48))
    image.paste(BLUE, (80, 48, 160, 96))
    exif = Image.Exif()
    exif[0x0112] = turn
    path = tmp_path / f"x{suffix}"
    image.save(path, exif=exif)
    marked = image.copy()
    marked.getexif()[0x0112] = turn
    expected = pixels(ImageOps.exif_transpose(marked))
    found = read_image(path, None)
    assert found.shape == expected.shape
    assert (found.float() - expected.float()).abs().mean() < 3
    assert read_header(path).size == tuple(expected.shape[1:])
    # Much smaller (a JPEG is then decoded at a fraction): corners stay where they are.
    height, width = (20, 12) if turn > 4 else (12, 20)
    small, corners = read_image(path, (height, width)).float(), expected[:, 8::80, 8::80].float()
    assert (small[:, 1 :: height - 3, 1 :: width - 3] - corners[:, [0, -1]][:, :, [0, -1]]).abs().max() < 12


def test_damaged_metadata_do_not_damage_the_picture(tmp_path: Path) -> None:
    noise(0).save(tmp_path / "x.png", exif=b"Exif\0\0II*\0\xff\xff\xff\x7fgarbage")
    noise(0).save(tmp_path / "x.jpg", quality=100, exif=b"Exif\0\0II*\0\xff\xff\xff\x7fgarbage")
    assert torch.equal(read_image(tmp_path / "x.png", None), pixels(noise(0)))
    assert read_image(tmp_path / "x.jpg", (24, 24)).shape == (3, 24, 24)


# --- size and crop ------------------------------------------------------------------------------------------

sides = st.integers(1, 5000)


@given(st.tuples(sides, sides), st.tuples(sides, sides))
@settings(max_examples=200, deadline=None)
def test_the_box_is_the_largest_centred_one_of_the_wanted_aspect(have: Size, want: Size) -> None:
    left, top, right, bottom = _cover_box(have, want)
    assert 0 <= left < right <= have[1]
    assert 0 <= top < bottom <= have[0]
    assert right - left == have[1] or bottom - top == have[0]  # it touches two sides
    assert left + right == pytest.approx(have[1])
    assert top + bottom == pytest.approx(have[0])
    assert (right - left) * want[0] == pytest.approx((bottom - top) * want[1], rel=1e-6)


@pytest.mark.parametrize("upright", [False, True])
def test_the_centre_is_kept(upright: bool, tmp_path: Path) -> None:
    image = Image.new("RGB", (90, 30), RED)
    image.paste((0, 255, 0), (30, 0, 60, 30))
    (image.transpose(Image.Transpose.ROTATE_90) if upright else image).save(tmp_path / "x.png")
    found = read_image(tmp_path / "x.png", (30, 30))
    assert (found == torch.tensor([0, 255, 0]).view(3, 1, 1)).all()


def test_scaling_down_averages(tmp_path: Path) -> None:
    board = torch.zeros(3, 64, 64, dtype=torch.uint8)
    board[:, ::2, ::2] = board[:, 1::2, 1::2] = 200
    to_pil_image(board).save(tmp_path / "x.png")
    assert (read_image(tmp_path / "x.png", (8, 8)).float() - 100).abs().max() <= 8


@pytest.mark.parametrize("shape", [(1, 300), (300, 1), (1, 1), (3, 2)])
def test_odd_shapes(shape: Size, tmp_path: Path) -> None:
    noise(0, *shape).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png", (16, 8)).shape == (3, 16, 8)


@pytest.mark.parametrize("turn", [1, 3, 6])
def test_a_large_jpeg_is_decoded_small_and_looks_the_same(turn: int, tmp_path: Path) -> None:
    # 1/8 of the sides is not whole: a shift by part of a pixel would show on these slopes
    image = noise(0, 9, 12).resize((1209, 905), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = turn
    image.save(tmp_path / "x.jpg", quality=95, subsampling=0, exif=exif)
    image.save(tmp_path / "x.png", exif=exif, compress_level=1)
    size = (64, 40) if turn == 6 else (40, 64)
    decoded = _load(tmp_path / "x.jpg", size)[0]
    assert 128 <= decoded.width < 300
    fast, slow = (read_image(tmp_path / f"x.{s}", size).float() for s in ("jpg", "png"))
    assert (fast - slow).abs().mean() < 1
    assert (fast - slow).abs().max() < 8


# --- damage -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("damage", "suffix", "reason"), DAMAGE)
def test_damage_is_named(damage: Callable[[Path], None], suffix: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    damage(path)
    with pytest.raises(BadImageError) as error:
        read_image(path, (16, 16))
    assert reason in error.value.reason
    assert len(error.value.reason.splitlines()) == 1
    assert str(path) in str(error.value)


def test_a_large_image_below_the_limit_gives_no_warning(tmp_path: Path) -> None:
    png_header(tmp_path / "x.png", 13000, 13000)  # PIL warns above 89 million pixels
    limit = Image.MAX_IMAGE_PIXELS
    assert read_header(tmp_path / "x.png").size == (13000, 13000)
    png_header(tmp_path / "x.png", 178_000_001, 1)
    with pytest.raises(BadImageError, match="too large: 178000001 x 1"):
        read_header(tmp_path / "x.png")
    assert limit == Image.MAX_IMAGE_PIXELS


PEAK = """
import os, resource, sys
from pathlib import Path
from dreamteacher.data.images import read_image
for path in map(Path, sys.argv[1:]):
    for size in ((64, 48), None):
        if not os.fork():
            begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            read_image(path, size)
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - begin, flush=True)
            os._exit(0)
        os.wait()
"""


def test_small_files_of_large_images_need_little_memory(tmp_path: Path) -> None:
    """About 9 bytes of a pixel: at the limit of 178 megapixels 1.5 GB, and not 3."""
    side = 4000
    for mode in ("RGBA", "I;16"):
        path = tmp_path / f"{mode}.png"
        Image.new(mode, (side, side)).save(path)
        assert path.stat().st_size < 70_000
    told = subprocess.run(
        [sys.executable, "-c", PEAK, *sorted(map(str, tmp_path.iterdir()))], capture_output=True, text=True,
        check=True, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    peaks = [int(line) * 1024 / side**2 for line in told.stdout.split()]
    assert len(peaks) == 4
    assert max(peaks) < 12, peaks


def test_decoders_that_need_more_have_a_limit_of_their_own(tmp_path: Path) -> None:
    with Image.new("RGB", (9500, 9500)) as image:  # a kilobyte, which libwebp decodes in 1.4 GB
        image.save(tmp_path / "x.webp", lossless=True, method=0)
    with pytest.raises(BadImageError, match="too large: 9500 x 9500"):
        read_image(tmp_path / "x.webp", (8, 8))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "I;16", "P", "1"])
def test_strips_change_nothing(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = noise(0, 33, 50)
    image = (
        Image.frombytes("I;16", (50, 33), bytes(range(220)) * 15) if mode == "I;16" else image.convert(mode)
    )
    if mode in ("RGBA", "LA"):
        image.putalpha(noise(1, 33, 50).convert("L"))
    image.save(tmp_path / "x.png", transparency=3 if mode == "P" else None)

    def found() -> list[Tensor]:
        read = [read_image(tmp_path / "x.png", size) for size in (None, (20, 16))]
        return [*read, read_mask(tmp_path / "x.png", (20, 16), binary=True)]

    whole = found()
    for pixels_ in (1, 120, 1000):
        monkeypatch.setattr(images, "_STRIP", pixels_)
        assert all(torch.equal(a, b) for a, b in zip(whole, found(), strict=True))


def test_what_pil_would_warn_of_is_no_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    Image.new("1", (10000, 10000), 1).save(tmp_path / "large.png")  # 100 million pixels
    assert read_header(tmp_path / "large.png").size == (10000, 10000)
    assert (read_mask(tmp_path / "large.png", (8, 8)) > 0).all()
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0\x12\x01"  # ends within its first entry
    for suffix in ("jpg", "png", "webp"):
        noise(0).save(tmp_path / f"x.{suffix}", exif=exif)
        read_header(tmp_path / f"x.{suffix}")
        read_image(tmp_path / f"x.{suffix}", None)
    assert [str(w.message) for w in recwarn] == []
