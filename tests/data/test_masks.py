"""Masks of every kind: paired with their images, cropped like them, refused where they do not fit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from dreamteacher.data.images import Size, read_mask
from dreamteacher.data.labelled_set import LabelledSet
from dreamteacher.data.masks.reader import read_masks
from tests.builders.pictures import cut, noise, refused, zero_bytes


def load(images: Path, masks: Path, size: Size, **options: Any) -> LabelledSet:
    return read_masks(images, masks, size, absent_ok=True, **options).load()


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
def test_masks_stay_on_their_images(size: Size, scale: int, tmp_path: Path) -> None:
    found = load(*pair(tmp_path, range(4), scale=scale), size)
    assert found.images.shape == (4, 3, *size)
    assert found.targets.shape == (4, *size)
    assert found.targets.dtype == torch.int64
    assert found.classes == ("class 0", "class 1", "class 2")
    drawn = (found.images[:, 0].float() / 100).round().long()
    ids = found.targets.float()[:, None]
    pool = partial(torch.nn.functional.max_pool2d, kernel_size=3, stride=1, padding=1)
    inner = pool(ids) == -pool(-ids)  # away from edges, which the image's scaling blurs
    assert inner.float().mean() > 0.3
    assert (drawn == found.targets)[inner[:, 0]].all()
    shifted = found.targets.roll(4, -1)
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
    found = load(tmp_path / "images", tmp_path / "masks", (60, 40))
    assert torch.equal(found.targets[0], ids.rot90(-1))
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
    found = load(images, masks, (40, 60))
    assert torch.equal(
        found.targets, torch.stack([mask_of(s, 40, 60, 2 if kind == "1" else 3) for s in range(2)])
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
    found = load(tmp_path / "images", tmp_path / "masks", (32, 40), binary=True)
    assert torch.equal(found.targets, torch.stack(expected))
    assert found.classes == ("background", "foreground")


def test_the_ignored_id_is_no_class(tmp_path: Path) -> None:
    images, masks = pair(tmp_path, range(2))
    ids = mask_of(0, 40, 60)
    ids[:8] = 255
    grey(ids).save(masks / "a" / "0.png")
    found = load(images, masks, (40, 60))
    assert len(found.classes) == 3
    assert (found.targets[0, :8] == 255).all()
    assert len(load(images, masks, (40, 60), ignore_index=2).classes) == 256


def test_images_without_a_mask_are_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, masks = pair(tmp_path, range(5))
    (masks / "a" / "1.png").unlink()
    (masks / "a" / "3.png").unlink()
    found = load(images, masks, (40, 60))
    assert torch.equal(found.targets, torch.stack([mask_of(s, 40, 60) for s in (0, 2, 4)]))
    assert found.unpaired == (images / "a" / "1.png", images / "a" / "3.png")
    assert "2 of 5 images have no mask and are left out: a/1.png, a/3.png" in capsys.readouterr().err


def test_masks_that_do_not_fit(tmp_path: Path) -> None:
    images, masks = pair(tmp_path, range(4))

    def again() -> LabelledSet:
        return load(images, masks, (40, 60))

    (images / "a" / "2.png").rename(tmp_path / "away.png")
    refused(again, "1 of 4 masks", "no image", "a/2.png")
    (tmp_path / "away.png").rename(images / "a" / "2.png")

    noise(0).save(images / "a" / "2.jpg")
    refused(again, "suffix", "a/2")
    (images / "a" / "2.jpg").unlink()

    good = (masks / "a" / "1.png").read_bytes()
    grey(mask_of(1, 60, 40)).save(masks / "a" / "1.png")
    refused(again, "1 of 4", "a/1.png 60 x 40 and its mask 40 x 60")
    grey(mask_of(1, 40, 60)).convert("RGB").save(masks / "a" / "1.png")
    refused(again, "a/1.png (PNG, RGB)", "--binary-masks", "palette")
    (masks / "a" / "1.png").write_bytes(good)
    cut(masks / "a" / "1.png", 0.7)
    refused(again, "1 images or masks", "1.png (truncated)")
    zero_bytes(masks / "a" / "1.png")
    refused(again, "1.png (empty file)")
    (masks / "a" / "1.png").unlink()
    grey(mask_of(1, 40, 60)).save(masks / "a" / "1.jpg")
    refused(again, "a/1.jpg (JPEG, L)", "--binary-masks")
    refused(lambda: load(images, tmp_path / "no", (8, 8)), "does not exist")


def test_black_and_white_masks_taken_for_ids(tmp_path: Path) -> None:
    images, masks = pair(tmp_path, range(2))
    for seed in range(2):
        grey(mask_of(seed, 40, 60, classes=2) * 255).save(masks / "a" / f"{seed}.png")
    refused(lambda: load(images, masks, (40, 60)), "0, 255", "--binary-masks")
    assert len(load(images, masks, (40, 60), binary=True).classes) == 2


def test_a_pixel_of_rounding_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    noise(0, 101, 75).save(tmp_path / "images" / "x.png")
    grey(mask_of(0, 48, 40)[:, :38].repeat(2, 1)[:51]).save(tmp_path / "masks" / "x.png")
    assert len(load(tmp_path / "images", tmp_path / "masks", (8, 8)).classes) == 3
