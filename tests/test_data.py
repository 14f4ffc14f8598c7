"""Images of every kind, damage of every kind, batches that depend on seed and step alone, masks that fit."""

from __future__ import annotations

import os
import random
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from dreamteacher import data
from dreamteacher.data import BadImage, BadImageError, ImageSet, batches, load_images, read_image, read_mask
from dreamteacher.errors import UserError

RED, BLUE = (255, 0, 0), (0, 0, 255)


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


def refused(call: Callable[[], object], *parts: str) -> str:
    """The UserError of `call`: three lines at most, with these words."""
    with pytest.raises(UserError) as error:
        call()
    text = str(error.value)
    assert len(text.splitlines()) <= 3
    for part in parts:
        assert part in text
    return text


# --- finding ------------------------------------------------------------------------------------------------


def test_find_images_is_recursive_sorted_and_skips_what_is_hidden_or_no_image(tmp_path: Path) -> None:
    wanted = ["a/1.JPG", "a/b/2.tiff", "a.png", "c d/3.webp"]
    unwanted = [".hidden.png", "a/._1.jpg", ".cache/4.png", "notes.txt", "a/png", "5.png.part"]
    for name in wanted + unwanted:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for ever
    found = data.find_images(tmp_path)
    assert [p.relative_to(tmp_path).as_posix() for p in found] == wanted


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    fill(tmp_path / "real", 2)
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "back").symlink_to(folder)
    (folder / "self").symlink_to(folder)
    assert [p.name for p in data.find_images(folder)] == ["0000.png", "0001.png"]


def test_folders_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(lambda: data.find_images(tmp_path / "no"), "does not exist")
    (tmp_path / "file.png").touch()
    refused(lambda: data.find_images(tmp_path / "file.png"), "is a file")
    (tmp_path / "empty" / "deep").mkdir(parents=True)
    refused(lambda: data.find_images(tmp_path / "empty"), "No images", ".png")

    def scandir(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", scandir)
    refused(lambda: data.find_images(tmp_path), "Permission denied")


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


def pixels(image: Image.Image) -> Tensor:
    return (
        torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        .view(*image.size[::-1], 3)
        .permute(2, 0, 1)
    )


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
    assert data._header(path).size == tuple(expected.shape[1:])
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
def test_the_box_is_the_largest_centred_one_of_the_wanted_aspect(have: data.Size, want: data.Size) -> None:
    left, top, right, bottom = data._cover_box(have, want)
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
def test_odd_shapes(shape: data.Size, tmp_path: Path) -> None:
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
    decoded = data._load(tmp_path / "x.jpg", size)[0]
    assert 128 <= decoded.width < 300
    fast, slow = (read_image(tmp_path / f"x.{s}", size).float() for s in ("jpg", "png"))
    assert (fast - slow).abs().mean() < 1
    assert (fast - slow).abs().max() < 8


# --- damage -------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("damage", "suffix", "reason"), DAMAGE)
def test_damage_is_named(damage: Callable[[Path], None], suffix: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    damage(path)
    with pytest.raises(BadImageError) as error:
        read_image(path, (16, 16))
    assert reason in error.value.reason
    assert len(error.value.reason.splitlines()) == 1
    assert str(path) in str(error.value)


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, locked = fill(tmp_path, 2)
    opened = Path.open

    def deny(path: Path, *args: Any, **options: Any) -> Any:
        if path == locked:
            raise PermissionError(13, "Permission denied")
        return opened(path, *args, **options)

    monkeypatch.setattr(Path, "open", deny)
    images = load_images(tmp_path, (8, 8))
    assert images.paths == [good]
    assert images.bad == (BadImage(locked, "no permission to read it"),)


def test_a_large_image_below_the_limit_gives_no_warning(tmp_path: Path) -> None:
    png_header(tmp_path / "x.png", 13000, 13000)  # PIL warns above 89 million pixels
    limit = Image.MAX_IMAGE_PIXELS
    assert data._header(tmp_path / "x.png").size == (13000, 13000)
    png_header(tmp_path / "x.png", 178_000_001, 1)
    with pytest.raises(BadImageError, match="too large: 178000001 x 1"):
        data._header(tmp_path / "x.png")
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.fixture(scope="module")
def wrecked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path], list[Path]]:
    """200 good images and 30 damaged ones, mixed."""
    folder = tmp_path_factory.mktemp("wrecked")
    good = fill(folder, 200)
    bad = []
    for i in range(30):
        damage, suffix, _ = DAMAGE[i % len(DAMAGE)]
        bad.append(folder / f"{7 * i:04d}-bad{suffix}")
        damage(bad[-1])
    return folder, good, bad


def test_200_good_and_30_damaged(wrecked: tuple[Path, list[Path], list[Path]]) -> None:
    folder, good, bad = wrecked
    images = load_images(folder, (24, 24))
    assert images.paths == good
    assert len(images) == 200
    assert sorted(b.path for b in images.bad) == sorted(bad)
    assert images.cache is not None
    for i in (0, 3, 117, 199):  # every image sits where its path says
        assert torch.equal(images.cache[i], pixels(noise(i)))


@pytest.mark.parametrize("cache_gb", [2.0, 0.0])
def test_strict_refuses(cache_gb: float, wrecked: tuple[Path, list[Path], list[Path]]) -> None:
    folder = wrecked[0]
    error = refused(
        lambda: load_images(folder, (24, 24), strict=True, cache_gb=cache_gb),
        "30 of 230", "0000-bad.png (empty file)", "0014-bad.png (truncated)", "(+27 more)",
    )  # fmt: skip
    assert "0021-bad" not in error


def test_strict_accepts_a_sound_folder(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    assert len(load_images(tmp_path, (8, 8), strict=True)) == 3


@pytest.mark.parametrize("cache_gb", [2.0, 0.0])
def test_all_damaged(cache_gb: float, tmp_path: Path) -> None:
    for i in range(4):
        text(tmp_path / f"{i}.jpg")
    refused(lambda: load_images(tmp_path, (8, 8), cache_gb=cache_gb), "4 of 4", "0.jpg", "(+1 more)")


def test_an_empty_size_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    refused(lambda: load_images(tmp_path, (0, 8)), "0 x 8")


def test_the_cache_is_used_when_it_fits(tmp_path: Path) -> None:
    fill(tmp_path, 4)
    exact = 4 * 3 * 10 * 10 / 1e9
    assert load_images(tmp_path, (10, 10), cache_gb=exact).cache is not None
    assert load_images(tmp_path, (10, 10), cache_gb=exact - 1e-9).cache is None


# --- labels -------------------------------------------------------------------------------------------------


def test_labels_are_the_first_folders(tmp_path: Path) -> None:
    fill(tmp_path / "dog" / "deep", 2)
    fill(tmp_path / "cat", 3)
    images = load_images(tmp_path, (8, 8))
    assert images.classes == ("cat", "dog")
    assert images.labels is not None
    assert images.labels.tolist() == [0, 0, 0, 1, 1]
    assert images.labels.dtype == torch.int64
    assert load_images(tmp_path / "cat", (8, 8)).labels is None  # no folders
    assert load_images(tmp_path / "dog", (8, 8)).labels is None  # one folder
    fill(tmp_path, 1)
    assert load_images(tmp_path, (8, 8)).classes == ()  # one image lies in no folder


# --- batches ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageSet, ImageSet]:
    """The same 22 images: cached, streamed."""
    folder = tmp_path_factory.mktemp("sets")
    fill(folder / "a", 12)
    fill(folder / "b", 10, ".jpg", start=12)
    return load_images(folder, (16, 16)), load_images(folder, (16, 16), cache_gb=0)


def run(images: ImageSet, first: int = 0, last: int = 12, **options: Any) -> list[data.Batch]:
    options = {"batch_size": 5, "seed": 3, "flip": True} | options
    return list(batches(images, first_step=first, last_step=last, **options))


def same(a: list[data.Batch], b: list[data.Batch]) -> bool:
    return len(a) == len(b) and all(
        x.step == y.step and torch.equal(x.images, y.images) and torch.equal(x.index, y.index)
        for x, y in zip(a, b, strict=True)
    )


def test_batches_are_floats_of_the_images(sets: tuple[ImageSet, ImageSet]) -> None:
    cached, _ = sets
    assert cached.cache is not None
    for batch in run(cached, flip=False):
        assert batch.images.dtype == torch.float32
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(batch.images, cached.cache[batch.index].float() / 255)
    assert [b.step for b in run(cached, 4, 9)] == [4, 5, 6, 7, 8]
    assert run(cached, 4, 4) == []


@given(first=st.integers(0, 12), seed=st.integers(0, 3))
@settings(max_examples=15, deadline=None)
def test_step_k_is_the_same_from_any_start(sets: tuple[ImageSet, ImageSet], first: int, seed: int) -> None:
    whole = run(sets[0], seed=seed)
    assert same(run(sets[0], first, seed=seed), whole[first:])
    assert same(run(sets[1], first, seed=seed), whole[first:])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers: int, sets: tuple[ImageSet, ImageSet]) -> None:
    cached, streamed = sets
    assert same(run(streamed, 3, workers=workers), run(cached, 3))
    assert torch.equal(streamed.get(torch.tensor([20, 3])), cached.get(torch.tensor([20, 3])))


def test_seeds_and_epochs_differ(sets: tuple[ImageSet, ImageSet]) -> None:
    assert not torch.equal(run(sets[0], seed=0)[0].index, run(sets[0], seed=1)[0].index)
    epochs = run(sets[0], flip=False)
    assert not torch.equal(epochs[0].index, epochs[4].index)


@given(count=st.integers(1, 40), batch_size=st.integers(1, 40), seed=st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_an_epoch_shows_each_image_once(count: int, batch_size: int, seed: int) -> None:
    batch_size = min(batch_size, count)
    steps = count // batch_size
    for epoch in range(2):
        index = torch.cat([
            data._batch_indices(count, batch_size=batch_size, seed=seed, step=s)
            for s in range(epoch * steps, (epoch + 1) * steps)
        ])  # fmt: skip
        assert len(index) == len(index.unique()) == steps * batch_size
        assert index.min() >= 0
        assert index.max() < count


def test_half_of_the_images_are_mirrored() -> None:
    ramp = torch.arange(8, dtype=torch.uint8).expand(40, 3, 8, 8).contiguous()
    images = ImageSet(
        folder=Path(), paths=[Path(str(i)) for i in range(40)], size=(8, 8), labels=None, classes=(),
        cache=ramp, bad=(),
    )  # fmt: skip
    shown = torch.cat([b.images for b in run(images, 0, 100, batch_size=20)]) * 255
    mirrored = (shown == ramp[:1].flip(-1)).flatten(1).all(1)
    straight = (shown == ramp[:1]).flatten(1).all(1)
    assert (mirrored ^ straight).all()
    assert 0.46 < mirrored.float().mean() < 0.54  # 2000 draws: 3.6 standard deviations
    assert not torch.equal(mirrored[:20], mirrored[20:40])
    assert all((b.images[..., 0] == 0).all() for b in run(images, flip=False))


def test_a_batch_that_does_not_fit_is_refused_at_once(sets: tuple[ImageSet, ImageSet]) -> None:
    for size in (23, 0):
        draw = partial(batches, sets[0], seed=0, first_step=0, last_step=1, flip=False)
        refused(partial(draw, batch_size=size), str(size), "22")


@pytest.mark.parametrize("workers", [0, 1])
def test_no_global_random_state_is_touched(workers: int, sets: tuple[ImageSet, ImageSet]) -> None:
    before, python = torch.get_rng_state(), random.getstate()
    for images in sets:
        run(images, 0, 3, workers=workers)
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python


def test_step_generators_are_reproducible_and_independent() -> None:
    keys = [(seed, step, s) for seed in range(3) for step in range(30) for s in ("", "flip", "order")]
    draws = {k: torch.rand(4, generator=data.step_generator(*k)) for k in keys}
    assert len({tuple(d.tolist()) for d in draws.values()}) == len(keys)
    assert torch.equal(draws[1, 7, "flip"], torch.rand(4, generator=data.step_generator(1, 7, "flip")))
    many = torch.stack([torch.rand(500, generator=data.step_generator(0, s)) for s in range(20)])
    assert (torch.corrcoef(many) - torch.eye(20)).abs().max() < 0.2


# --- damage that only streaming finds -----------------------------------------------------------------------


@pytest.fixture
def cut_stream(tmp_path: Path) -> tuple[ImageSet, list[Path]]:
    """Two classes of six; bodies of three files are damaged, one of them the last of its class."""
    fill(tmp_path / "a", 6)
    fill(tmp_path / "b", 6, start=6)
    bad = [tmp_path / "a" / "0002.png", tmp_path / "a" / "0005.png", tmp_path / "b" / "0006.png"]
    for path in bad:
        cut(path, 0.8)
    images = load_images(tmp_path, (24, 24), cache_gb=0)
    assert len(images) == 12
    assert images.bad == ()  # headers are fine
    return images, bad


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_met_while_streaming(workers: int, cut_stream: tuple[ImageSet, list[Path]]) -> None:
    images, bad = cut_stream
    replaced = {2: 3, 5: 0, 6: 7}  # the next readable one of the same class
    plain = [data._batch_indices(12, batch_size=4, seed=0, step=s) for s in range(6)]
    found = run(images, 0, 6, batch_size=4, seed=0, flip=False, workers=workers)
    for batch, index in zip(found, plain, strict=True):
        assert batch.index.tolist() == [replaced.get(i, i) for i in index.tolist()]
        for shown, i in zip(batch.images, batch.index.tolist(), strict=True):
            assert torch.equal(shown, pixels(noise(i)).float() / 255)
    assert sorted(b.path for b in images.bad) == bad  # each once, in two epochs
    assert all(b.reason == "truncated" for b in images.bad)
    assert same(run(images, 2, 6, batch_size=4, seed=0, flip=False, workers=workers), found[2:])


def test_damage_met_by_get(cut_stream: tuple[ImageSet, list[Path]]) -> None:
    images, bad = cut_stream
    found = images.get(torch.tensor([5, 1]))
    assert torch.equal(found, torch.stack([pixels(noise(0)), pixels(noise(1))]))
    assert images.bad == (BadImage(bad[1], "truncated"),)
    with pytest.raises(IndexError):
        images.get(torch.tensor([12]))
    with pytest.raises(UserError):
        load_images(images.folder, (24, 24), cache_gb=0, strict=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_that_goes_away(workers: int, tmp_path: Path) -> None:
    paths = fill(tmp_path, 4)
    images = load_images(tmp_path, (8, 8), cache_gb=0)
    for path in paths:
        path.unlink()
    refused(lambda: run(images, batch_size=2, workers=workers), "cannot be read", "missing file")


# --- masks --------------------------------------------------------------------------------------------------


def mask_of(seed: int, height: int, width: int, classes: int = 3) -> Tensor:
    """A few blobs of class ids with straight edges."""
    ids = torch.randint(0, classes, (4, 5), generator=torch.Generator().manual_seed(seed))
    ids[0, 0], ids[-1, -1] = classes - 1, 0
    return ids.repeat_interleave(height // 4, 0).repeat_interleave(width // 5, 1)


def grey(ids: Tensor) -> Image.Image:
    return to_pil_image(ids.to(torch.uint8)[None])


def pair(
    tmp_path: Path, seeds: range, height: int = 40, width: int = 60, scale: int = 1
) -> tuple[Path, Path]:
    """Images whose grey value is 100 times the mask's id, in a/, and the masks."""
    images, masks = tmp_path / "images", tmp_path / "masks"
    for seed in seeds:
        for folder, times, part in ((images, 100, 1), (masks, 1, scale)):
            (folder / "a").mkdir(parents=True, exist_ok=True)
            grey(mask_of(seed, height // part, width // part) * times).save(folder / "a" / f"{seed}.png")
    return images, masks


@pytest.mark.parametrize("size", [(20, 20), (24, 32), (40, 60), (64, 40)])
@pytest.mark.parametrize("scale", [1, 2])
def test_masks_stay_on_their_images(size: data.Size, scale: int, tmp_path: Path) -> None:
    found = data.load_segmentation(*pair(tmp_path, range(4), scale=scale), size)
    assert found.images.shape == (4, 3, *size)
    assert found.masks.shape == (4, *size)
    assert found.masks.dtype == torch.int64
    assert (found.classes, found.names) == (3, ("class 0", "class 1", "class 2"))
    drawn = (found.images[:, 0].float() / 100).round().long()
    ids = found.masks.float()[:, None]
    pool = partial(torch.nn.functional.max_pool2d, kernel_size=3, stride=1, padding=1)
    inner = pool(ids) == -pool(-ids)  # away from edges, which the image's scaling blurs
    assert inner.float().mean() > 0.3
    assert (drawn == found.masks)[inner[:, 0]].all()
    shifted = found.masks.roll(4, -1)
    assert not (drawn == shifted)[inner[:, 0]].all()


def test_only_nearest_keeps_ids(tmp_path: Path) -> None:
    grey(torch.tensor([[0, 200]])).save(tmp_path / "x.png")
    assert read_mask(tmp_path / "x.png", (7, 33)).unique().tolist() == [0, 200]
    assert torch.equal(read_mask(tmp_path / "x.png", None), torch.tensor([[0, 200]]))


def test_a_turned_image_and_its_turned_mask(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    ids = mask_of(0, 40, 60)
    for folder, content in (("images", ids * 100), ("masks", ids)):
        (tmp_path / folder).mkdir()
        grey(content).save(tmp_path / folder / "x.png", exif=exif)
    found = data.load_segmentation(tmp_path / "images", tmp_path / "masks", (60, 40))
    assert torch.equal(found.masks[0], ids.rot90(-1))
    assert torch.equal(found.images[0, 0].long(), ids.rot90(-1) * 100)


@pytest.mark.parametrize("kind", ["L", "P", "I;16", "1"])
def test_modes_of_masks(kind: str, tmp_path: Path) -> None:
    images, masks = pair(tmp_path, range(2))
    for seed in range(2):
        ids = mask_of(seed, 40, 60, classes=2 if kind == "1" else 3)
        mask = grey(ids)
        if kind == "P":
            mask = mask.copy()
            mask.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0])
            assert mask.mode == "P"
        elif kind == "1":
            mask = grey(ids * 255).convert("1")
        elif kind == "I;16":
            mask = mask.convert("I").convert("I;16")
        mask.save(masks / "a" / f"{seed}.png")
        with Image.open(masks / "a" / f"{seed}.png") as written:
            assert written.mode == kind
    found = data.load_segmentation(images, masks, (40, 60))
    assert torch.equal(
        found.masks, torch.stack([mask_of(s, 40, 60, 2 if kind == "1" else 3) for s in range(2)])
    )


BINARY: dict[str, tuple[Callable[[Tensor], Image.Image], str]] = {
    "0 and 255": (lambda m: grey(m * 255), ".png"),
    "0 and 1": (grey, ".png"),
    "bilevel": (lambda m: grey(m * 255).convert("1"), ".png"),
    "rgb": (lambda m: grey(m * 255).convert("RGB"), ".png"),
    "red on black": (lambda m: Image.merge("RGB", [grey(m * 255), grey(m * 0), grey(m * 0)]), ".png"),
    "jpeg": (lambda m: grey(m * 255), ".jpg"),
    "rgb jpeg": (lambda m: grey(m * 255).convert("RGB"), ".jpg"),
    "transparent": (lambda m: Image.merge("LA", [grey(m * 0 + 255), grey(m * 255)]), ".png"),
    "16-bit": (lambda m: grey(m * 255).convert("I").point(lambda i: i * 257).convert("I;16"), ".png"),
}


@pytest.mark.parametrize("kind", BINARY)
def test_binary_masks(kind: str, tmp_path: Path) -> None:
    make, suffix = BINARY[kind]
    expected = []
    for seed in range(3):
        ids = mask_of(seed, 32, 40, classes=2) * (seed > 0)  # the first one is empty
        for folder in ("images", "masks"):
            (tmp_path / folder).mkdir(exist_ok=True)
        noise(seed, 32, 40).save(tmp_path / "images" / f"{seed}.jpg")
        make(ids).save(tmp_path / "masks" / f"{seed}{suffix}")
        expected.append(ids)
    found = data.load_segmentation(tmp_path / "images", tmp_path / "masks", (32, 40), binary=True)
    assert torch.equal(found.masks, torch.stack(expected))
    assert (found.classes, found.names) == (2, ("background", "foreground"))


def test_the_ignored_id_is_no_class(tmp_path: Path) -> None:
    images, masks = pair(tmp_path, range(2))
    ids = mask_of(0, 40, 60)
    ids[:8] = 255
    grey(ids).save(masks / "a" / "0.png")
    found = data.load_segmentation(images, masks, (40, 60))
    assert found.classes == 3
    assert (found.masks[0, :8] == 255).all()
    assert data.load_segmentation(images, masks, (40, 60), ignore_index=2).classes == 256


def test_images_without_a_mask_are_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, masks = pair(tmp_path, range(5))
    (masks / "a" / "1.png").unlink()
    (masks / "a" / "3.png").unlink()
    found = data.load_segmentation(images, masks, (40, 60))
    assert torch.equal(found.masks, torch.stack([mask_of(s, 40, 60) for s in (0, 2, 4)]))
    assert found.unpaired == (images / "a" / "1.png", images / "a" / "3.png")
    assert "2 of 5 images have no mask and are left out: a/1.png, a/3.png" in capsys.readouterr().err


def test_masks_that_do_not_fit(tmp_path: Path) -> None:
    images, masks = pair(tmp_path, range(4))

    def load(**options: Any) -> data.SegmentationSet:
        return data.load_segmentation(images, masks, (40, 60), **options)

    (images / "a" / "2.png").rename(tmp_path / "away.png")
    refused(load, "1 of 4 masks", "no image", "a/2.png")
    (tmp_path / "away.png").rename(images / "a" / "2.png")

    noise(0).save(images / "a" / "2.jpg")
    refused(load, "suffix", "a/2")
    (images / "a" / "2.jpg").unlink()

    good = (masks / "a" / "1.png").read_bytes()
    grey(mask_of(1, 60, 40)).save(masks / "a" / "1.png")
    refused(load, "1 of 4", "a/1.png 60 x 40 and its mask 40 x 60")
    grey(mask_of(1, 40, 60)).convert("RGB").save(masks / "a" / "1.png")
    refused(load, "a/1.png (PNG, RGB)", "binary masks", "palette")
    (masks / "a" / "1.png").write_bytes(good)
    cut(masks / "a" / "1.png", 0.7)
    refused(load, "1 images or masks", "1.png (truncated)")
    zero_bytes(masks / "a" / "1.png")
    refused(load, "1.png (empty file)")
    (masks / "a" / "1.png").unlink()
    grey(mask_of(1, 40, 60)).save(masks / "a" / "1.jpg")
    refused(load, "a/1.jpg (JPEG, L)", "binary masks")
    refused(lambda: data.load_segmentation(images, tmp_path / "no", (8, 8)), "does not exist")


def test_black_and_white_masks_taken_for_ids(tmp_path: Path) -> None:
    images, masks = pair(tmp_path, range(2))
    for seed in range(2):
        grey(mask_of(seed, 40, 60, classes=2) * 255).save(masks / "a" / f"{seed}.png")
    refused(lambda: data.load_segmentation(images, masks, (40, 60)), "0, 255", "binary masks")
    assert data.load_segmentation(images, masks, (40, 60), binary=True).classes == 2


def test_a_pixel_of_rounding_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    noise(0, 101, 75).save(tmp_path / "images" / "x.png")
    grey(mask_of(0, 48, 40)[:, :38].repeat(2, 1)[:51]).save(tmp_path / "masks" / "x.png")
    assert data.load_segmentation(tmp_path / "images", tmp_path / "masks", (8, 8)).classes == 3
