"""Labelled images from masks, .npy files and COCO JSON: the right ids on the right images, or a short refusal."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from dreamteacher.data.images import BadImageError, Size, read_image, read_mask, scale_mask
from dreamteacher.data.labelled_set import LabelledSet
from dreamteacher.data.masks.reader import read_masks
from dreamteacher.data.npy import read_npy, read_npy_header
from tests.builders.pictures import noise, refused

SIZE = (24, 24)


def load_labelled(images: Path, masks: Path, size: Size, **options: Any) -> LabelledSet:
    return read_masks(images, masks, size, **options).load()


def ids_of(seed: int, height: int = 24, width: int = 24, classes: int = 3) -> Tensor:
    """Blocks of class ids, each class at least once."""
    coarse = torch.randint(0, classes, (4, 4), generator=torch.Generator().manual_seed(seed))
    coarse.view(-1)[:classes] = torch.arange(classes)
    return coarse.repeat_interleave(height // 4, 0).repeat_interleave(width // 4, 1)


def grey(ids: Tensor) -> Image.Image:
    return to_pil_image(ids.to(torch.uint8)[None])


def palette(ids: Tensor, colours: list[int]) -> Image.Image:
    mask = grey(ids)
    mask.putpalette(colours)
    return mask


def pictures(folder: Path, count: int = 4) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        noise(i).save(folder / f"{i}.png")
    return folder


def save_all(folder: Path, save: Callable[[int, Path], Any], count: int = 4) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        save(i, folder)
    return folder


def save_grey(i: int, folder: Path) -> None:
    grey(ids_of(i)).save(folder / f"{i}.png")


def expect(found: LabelledSet, ids: list[Tensor], **fields: Any) -> None:
    assert torch.equal(found.targets, torch.stack(ids))
    assert found.targets.dtype == torch.int64
    assert torch.equal(found.images, torch.stack([read_image_of(i) for i in range(len(ids))]))
    for key, value in fields.items():
        assert getattr(found, key) == value


def read_image_of(seed: int) -> Tensor:
    return torch.from_numpy(np.array(noise(seed))).permute(2, 0, 1)


# --- the same labels in every form --------------------------------------------------------------------------


def save_npy(i: int, folder: Path) -> None:
    np.save(folder / f"{i}.npy", ids_of(i).numpy().astype(np.uint8))


def save_palette(i: int, folder: Path) -> None:
    palette(ids_of(i), [9, 9, 9, 200, 0, 0, 0, 200, 0]).save(folder / f"{i}.png")


@pytest.mark.parametrize("form", [save_grey, save_palette, save_npy])
def test_folders(form: Callable[[int, Path], None], tmp_path: Path) -> None:
    images, masks = pictures(tmp_path / "images"), save_all(tmp_path / "masks", form)
    names = ("class 0", "class 1", "class 2")
    expect(load_labelled(images, masks, SIZE), [ids_of(i) for i in range(4)], classes=names)
    expect(load_labelled(images, masks, SIZE, classes=3), [ids_of(i) for i in range(4)], classes=names)
    named = load_labelled(images, masks, SIZE, names=("wall", "bed", "lamp"))
    assert (named.classes, named.unpaired) == (("wall", "bed", "lamp"), ())


def test_npy_beside_the_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_all(pictures(tmp_path / "train", 5), save_npy)
    found = load_labelled(folder, folder, SIZE, classes=3)
    expect(found, [ids_of(i) for i in range(4)], unpaired=(folder / "4.png",))
    assert "1 of 5 images have no mask and are left out: 4.png" in capsys.readouterr().err


def rectangles(seed: int) -> list[tuple[int, list[int]]]:
    """(category index, x0, y0, x1, y1): small ones first, so that the file's order alone would hide them."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for i in range(6):
        x, y = torch.randint(0, 12, (2,), generator=draw).tolist()
        found.append((i % 3, [x, y, x + 3 + i, y + 2 + i]))
    return found


def save_coco(folder: Path, names: dict[int, str], **change: Any) -> Path:
    numbers = list(names)
    annotations = []
    for i in range(4):
        for k, (x0, y0, x1, y1) in rectangles(i):
            segmentation = [[x0, y0, x1, y0, x1, y1, x0, y1]]
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": i,
                    "category_id": numbers[k],
                    "segmentation": segmentation,
                }
            )
    listed = [{"id": i, "file_name": f"{i}.png", "width": 24, "height": 24} for i in range(5)]
    data = {
        "images": listed,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in names.items()],
    }
    path = folder / "labels.json"
    path.write_text(json.dumps(data | change))
    return path


def painted(seed: int, ids: list[int], background: int) -> Tensor:
    out = torch.full((24, 24), background)
    boxes = rectangles(seed)
    order = sorted(
        range(6), key=lambda i: -(boxes[i][1][2] - boxes[i][1][0]) * (boxes[i][1][3] - boxes[i][1][1])
    )
    for i in order:
        k, (x0, y0, x1, y1) = boxes[i]
        out[y0:y1, x0:x1] = ids[k]
    return out


def test_coco(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = pictures(tmp_path / "images", 6)  # 4 has no annotations, 5 is not listed
    path = save_coco(tmp_path, {40: "lamp", 7: "bed", 12: "wall"})  # in id order: bed, wall, lamp

    def check(ids: list[int], ground: int, expected: tuple[str, ...], **options: Any) -> None:
        found = load_labelled(images, path, SIZE, **options)
        masks = [painted(i, ids, ground) for i in range(4)]
        expect(found, masks, classes=expected, unpaired=(images / "4.png", images / "5.png"))

    check([3, 1, 2], 0, ("background", "bed", "wall", "lamp"))
    assert "2 of 6 images have no mask" in capsys.readouterr().err
    check([3, 0, 2], 1, ("bed", "background", "wall", "lamp"), background=1)
    check([2, 0, 1], 255, ("bed", "wall", "lamp"), background=255)
    check([3, 1, 2], 0, ("background", "bed", "wall", "lamp"), ignore_index=0, classes=4)
    check([0, 2, 3], 1, ("lamp", "x", "bed", "wall"), background=1, names=("lamp", "x", "bed", "wall"))
    check([1, 1, 1], 0, ("background", "foreground"), binary=True)


def test_a_category_called_background_is_the_background(tmp_path: Path) -> None:
    images = pictures(tmp_path / "images", 4)
    path = save_coco(tmp_path, {5: "lamp", 3: "background", 9: "bed"}, images=None)
    data = json.loads(path.read_text())
    data["images"] = [{"id": i, "file_name": f"{i}.png", "width": 24, "height": 24} for i in range(4)]
    path.write_text(json.dumps(data))
    for options, ids, ground, names in (
        ({}, [1, 0, 2], 0, ("background", "lamp", "bed")),
        ({"background": 255}, [0, 255, 1], 255, ("lamp", "bed")),
        (
            {"background": 1, "names": ("bed", "background", "lamp")},
            [2, 1, 0],
            1,
            ("bed", "background", "lamp"),
        ),
    ):
        found = load_labelled(images, path, SIZE, **options)
        expect(found, [painted(i, ids, ground) for i in range(4)], classes=names)


def test_coco_objects_of_one_size_in_the_order_of_the_file(tmp_path: Path) -> None:
    images = pictures(tmp_path / "images", 1)
    boxes = [[2, 2, 12, 2, 12, 12, 2, 12], [7, 7, 17, 7, 17, 17, 7, 17]]
    annotations = [
        {"id": i, "image_id": 0, "category_id": i, "segmentation": [box]} for i, box in enumerate(boxes)
    ]
    listed = [{"id": 0, "file_name": "0.png", "width": 24, "height": 24}]
    path = save_coco(tmp_path, {0: "a", 1: "b", 2: "c"}, annotations=annotations, images=listed)
    mask = load_labelled(images, path, SIZE, absent_ok=True).targets[0]
    assert (mask[7:12, 7:12] == 2).all()
    assert mask[2, 2] == 1


def test_coco_is_scaled_as_its_pictures_are(tmp_path: Path) -> None:
    """An object that is drawn into the image: the mask lies on it after cropping to another aspect."""
    (tmp_path / "images").mkdir()
    ids = torch.zeros(40, 60, dtype=torch.int64)
    ids[10:30, 22:50] = 1
    grey(ids * 200).save(tmp_path / "images" / "0.png")
    box = [22, 10, 50, 10, 50, 30, 22, 30]
    path = save_coco(
        tmp_path,
        {1: "it", 2: "b", 3: "c"},
        annotations=[{"id": 1, "image_id": 0, "category_id": 1, "segmentation": [box]}],
        images=[{"id": 0, "file_name": "0.png", "width": 60, "height": 40}],
        categories=[{"id": 1, "name": "it"}],
    )
    found = load_labelled(tmp_path / "images", path, (20, 20))
    assert torch.equal(found.targets[0] == 1, found.images[0, 0] > 100)


@pytest.mark.parametrize("size", [(24, 24), (7, 33), (20, 31), (64, 40)])
def test_scaled_and_cropped_as_masks_always_were(size: tuple[int, int], tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for i in range(3):
        noise(i, 40, 60).save(tmp_path / "images" / f"{i}.png")
        grey(ids_of(i, 40, 60)).save(tmp_path / "masks" / f"{i}.png")
    folders = tmp_path / "images", tmp_path / "masks"
    two = load_labelled(*folders, size)
    assert torch.equal(two.targets, torch.stack([read_mask(folders[1] / f"{i}.png", size) for i in range(3)]))
    assert torch.equal(two.images[0], read_image(tmp_path / "images" / "0.png", size))
    assert torch.equal(scale_mask(ids_of(0, 40, 60), size), two.targets[0])


@pytest.mark.parametrize("values", [(0, 1), (0, 255), (0, 7)])
def test_binary(values: tuple[int, int], tmp_path: Path) -> None:
    images = pictures(tmp_path / "images")
    two = [ids_of(i, classes=2) for i in range(4)]
    for i in range(4):
        for folder in ("npy", "png"):
            (tmp_path / folder).mkdir(exist_ok=True)
        np.save(tmp_path / "npy" / f"{i}.npy", (two[i] * values[1]).numpy())
        grey(two[i] * values[1]).save(tmp_path / "png" / f"{i}.png")
    expect(
        load_labelled(images, tmp_path / "npy", SIZE, binary=True), two, classes=("background", "foreground")
    )
    named = {"binary": True, "names": ("ground", "lung")}
    if values != (0, 7):  # neither black and white nor 0 and 1: all dark
        expect(load_labelled(images, tmp_path / "png", SIZE, **named), two, classes=("ground", "lung"))
    else:
        refused(lambda: load_labelled(images, tmp_path / "png", SIZE, **named), "1 of 2 classes", "1 (lung)")
    refused(lambda: load_labelled(images, tmp_path / "png", SIZE, binary=True, classes=3), "2 classes, not 3")


# --- refusals -----------------------------------------------------------------------------------------------


def test_unknown_and_absent_ids(tmp_path: Path) -> None:
    images, masks = pictures(tmp_path / "images"), save_all(tmp_path / "masks", save_grey)

    def load(**options: Any) -> LabelledSet:
        return load_labelled(images, masks, SIZE, **options)

    refused(lambda: load(classes=2), "4 of 4 masks", "(0 to 1 are)", "0.png (2), 1.png (2)", "+1 more")
    refused(lambda: load(names=("a", "b")), "4 of 4 masks", "2.png (2)")
    assert len(load(classes=2, ignore_index=2).classes) == 2
    refused(
        lambda: load(classes=5), "2 of 5 classes occur in none of the 4 masks", "3 (class 3), 4 (class 4)"
    )
    refused(lambda: load(names=tuple("abcd")), "1 of 4 classes", "3 (d)")
    assert len(load(names=tuple("abcd"), absent_ok=True).classes) == 4
    refused(lambda: load(names=tuple("aba")), "twice: a")
    refused(lambda: load(names=tuple("abc"), classes=4), "4 classes, but 3 names")

    ids = ids_of(1)
    ids[0, 0], ids[0, 1], ids[0, 2] = 255, 9, 77
    grey(ids).save(masks / "1.png")
    refused(lambda: load(classes=3), "1 of 4 masks", "1.png (9, 77)", "255 is ignored")
    refused(load, "73 of 78 classes", "3 (class 3)", "without gaps")
    small = load_labelled(images, masks, (6, 6), absent_ok=True)  # a pixel that scaling loses is no class
    assert len(small.classes) == 3
    refused(lambda: load_labelled(images, masks, (6, 6), classes=3), "1.png (9, 77)")


def test_palettes_that_differ(tmp_path: Path) -> None:
    images, masks = pictures(tmp_path / "images"), tmp_path / "masks"
    masks.mkdir()
    common = [0, 0, 0, 255, 0, 0, 0, 255, 0]
    for i in range(4):
        palette(ids_of(i), common).save(masks / f"{i}.png")
    palette(ids_of(2), [*common, 0, 0, 255]).save(masks / "2.png")  # longer, but begins alike
    assert len(load_labelled(images, masks, SIZE).classes) == 3
    palette(ids_of(3), [0, 0, 0, 0, 255, 0, 255, 0, 0]).save(masks / "3.png")  # red and green exchanged
    refused(lambda: load_labelled(images, masks, SIZE), "1 of 4 palette masks", "another palette", ": 3.png.")
    palette(ids_of(1), [0, 0, 0, 0, 255, 0, 255, 0, 0]).save(masks / "1.png")
    palette(ids_of(0), [0, 0, 0, 0, 255, 0, 255, 0, 0]).save(masks / "0.png")
    refused(lambda: load_labelled(images, masks, SIZE), "1 of 4 palette masks", ": 2.png.")
    grey(ids_of(2)).save(masks / "2.png")
    assert len(load_labelled(images, masks, SIZE).classes) == 3


def test_masks_that_do_not_fit(tmp_path: Path) -> None:
    images, masks = pictures(tmp_path / "images"), save_all(tmp_path / "masks", save_grey)

    def load(folder: Path = masks) -> LabelledSet:
        return load_labelled(images, folder, SIZE)

    refused(lambda: load(images), "holds no .npy files")
    refused(lambda: load(tmp_path / "no"), "does not exist")
    refused(lambda: load(tmp_path / "no.json"), "no.json", "No such file")
    save_npy(0, masks)
    refused(load, "pictures and .npy files")
    (masks / "0.npy").unlink()
    grey(ids_of(1)).convert("RGB").save(masks / "1.png")
    refused(load, "1 of 4 masks", "1.png (PNG, RGB)")
    (masks / "1.png").unlink()
    grey(ids_of(1)).save(masks / "1.jpg")
    refused(load, "1.jpg (JPEG, L)")
    (masks / "1.jpg").unlink()
    grey(ids_of(1, 24, 48)).save(masks / "1.png")
    refused(load, "1.png 24 x 24 and its mask 48 x 24")
    (masks / "1.png").rename(masks / "z.png")
    refused(load, "1 of 4 masks", "no image", "z.png")

    other = save_all(tmp_path / "npy", save_npy)
    np.save(other / "2.npy", np.zeros((24, 12), np.uint8))
    refused(lambda: load(other), "1 of 4 masks", "2.png 24 x 24 and its mask 12 x 24")
    np.save(other / "2.npy", np.full((24, 24), -7))
    refused(lambda: load(other), "1 of 4 masks", "negative", "2.npy (-7)")
    (other / "2.npy").rename(other / "y.npy")
    refused(lambda: load(other), "1 of 4 masks", "no image", "y.npy")
    (other / "y.npy").unlink()
    (images / "0.png").write_bytes((images / "0.png").read_bytes()[:900])
    refused(lambda: load(other), "1 images or masks", "0.png (truncated)")


def test_coco_that_does_not_fit(tmp_path: Path) -> None:
    images = pictures(tmp_path / "images", 5)
    path = save_coco(tmp_path, {1: "a", 2: "b", 3: "c"})

    def load(**options: Any) -> LabelledSet:
        return load_labelled(images, path, SIZE, **options)

    refused(lambda: load(classes=3), "4 classes (background, a, b (+1 more)), not 3")
    refused(lambda: load(names=("background", "a", "c")), "1 of 3 categories", ": b.")
    refused(lambda: load(names=("a", "b", "c")), "id of the background (0)", ": a (0).")
    refused(lambda: load(background=9), "cannot be 9", "0 to 3")
    refused(lambda: load(ignore_index=2), "ignored (2)", "b (2)")
    refused(lambda: load(names=("0", "a", "b", "c", "d")), "1 of 5 classes", "4 (d)")
    save_coco(tmp_path, {1: "a", 2: "b", 3: "c"}, images=[{"id": 0, "file_name": "0.png", "width": 24}])
    refused(load, "1 without 'height'")


# --- npy ----------------------------------------------------------------------------------------------------

KINDS = ["|u1", "|i1", "<i2", ">i2", "<u2", ">u4", "<i4", "<i8", ">i8", "<u8", "|b1"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_npy_of_every_kind(kind: str, order: Any, version: tuple[int, int], tmp_path: Path) -> None:
    ids = np.array([[0, 1, 100], [7, 3, 2]]).astype(kind)
    path = tmp_path / "x.npy"
    with path.open("wb") as file:
        np.lib.format.write_array(file, np.asarray(ids, order=order), version)
    assert read_npy_header(path).size == (2, 3)
    assert read_npy(path).tolist() == ids.astype(np.int64).tolist()


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("bomb-went-off").write_text, ("x",))


def npy_bytes(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


GOOD = npy_bytes(np.zeros((4, 6), np.uint8))
NO_NPY: list[tuple[bytes, str]] = [
    (b"", "empty file"),
    (b"<html>404", "not a .npy file"),
    (pickle.dumps(Bomb()), "not a .npy file"),
    (npy_bytes(np.array([[Bomb()]], dtype=object)), "Python objects"),
    (npy_bytes(np.zeros((4, 6))), "floating-point numbers"),
    (npy_bytes(np.array([["ab"]])), "text"),
    (npy_bytes(np.zeros((4, 6), "M8[s]")), "other things"),
    (npy_bytes(np.zeros(4, [("a", "u1"), ("b", "u1")])), "other things"),
    (npy_bytes(np.zeros(24, np.uint8)), "1 dimensions (24)"),
    (npy_bytes(np.zeros((4, 6, 1), np.uint8)), "3 dimensions (4 x 6 x 1)"),
    (npy_bytes(np.uint8(3)), "0 dimensions"),
    (npy_bytes(np.zeros((0, 6), np.uint8)), "empty or too large"),
    (npy_bytes(np.full((2, 2), 2**31)), "more than 32 bits"),
    (npy_bytes(np.full((2, 2), -(2**63))), "more than 32 bits"),
    (npy_bytes(np.full((2, 2), 2**64 - 1, np.uint64)), "more than 32 bits"),
    (GOOD[:-1], "truncated"),
    (GOOD[:9], "not a .npy file"),
    (GOOD[:40], "header is damaged"),
    (GOOD + b"x", "1 bytes too many"),
    (GOOD.replace(b"(4, 6)", b"(9999999, 9999999)"), "truncated"),
    (GOOD[:6] + b"\x09" + GOOD[7:], "not a .npy file"),
    (GOOD[:8] + b"\xff\xff" + GOOD[10:], "header is damaged"),
    (GOOD.replace(b"False", b"Bomb()"), "header is damaged"),
]


@pytest.mark.parametrize(("content", "words"), NO_NPY)
def test_what_is_no_npy_of_ids(
    content: bytes, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "0.npy").write_bytes(content)
    images = pictures(tmp_path / "images", 1)
    refused(lambda: load_labelled(images, tmp_path / "m", SIZE), "0.npy", words)
    assert not (tmp_path / "bomb-went-off").exists()


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_npy_files(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Any bytes replaced by any: an error, or what numpy reads too."""
    kind = data.draw(st.sampled_from(["|u1", "<i2", ">i4", "<i8"]))
    content = npy_bytes(np.arange(24).reshape(4, 6).astype(kind))
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, min(len(content), start + 12)))
    change = data.draw(
        st.binary(max_size=12) | st.text("<>|=iufbO0123456789, ()'L", max_size=12).map(str.encode)
    )
    path = tmp_path_factory.getbasetemp() / "fuzzed.npy"
    path.write_bytes(content[:start] + change + content[end:])
    try:
        ids = read_npy(path)
    except BadImageError as error:
        reason = error.reason
    else:
        reason = "none"
        assert ids.numpy().tolist() == np.load(path, allow_pickle=False).astype(np.int64).tolist()
    assert reason.isprintable()


# --- image by image -----------------------------------------------------------------------------------------


def test_every_form_is_read_one_by_one_as_in_memory(tmp_path: Path) -> None:
    images = pictures(tmp_path / "images")
    forms: dict[str, tuple[Path, dict[str, Any]]] = {
        "grey": (save_all(tmp_path / "grey", save_grey), {}),
        "palette": (save_all(tmp_path / "palette", save_palette), {}),
        "npy": (save_all(tmp_path / "npy", save_npy), {}),
        "two": (save_all(tmp_path / "two", save_grey), {"binary": True, "absent_ok": True}),
        "npy two": (tmp_path / "npy", {"binary": True}),
    }
    listed = [{"id": i, "file_name": f"{i}.png", "width": 24, "height": 24} for i in range(4)]
    path = save_coco(tmp_path, {1: "a", 2: "b", 3: "c"}, images=listed)
    forms |= {"coco": (path, {}), "coco two": (path, {"binary": True})}
    for masks, options in forms.values():
        files, whole = read_masks(images, masks, **options), load_labelled(images, masks, SIZE, **options)
        assert (files.classes, len(files)) == (whole.classes, len(whole))
        again = pickle.loads(pickle.dumps(files))  # as the processes that read get it
        for i in range(4):
            image, ids = again.read(i)
            assert torch.equal(image, whole.images[i])
            assert torch.equal(ids, whole.targets[i])
        part = read_masks(images, masks, SIZE, **options).take(torch.tensor([2, 0]))
        assert torch.equal(part.load().targets, whole.targets[[2, 0]])
        assert torch.equal(part.read(0)[1], whole.targets[2])
        assert part.load().paths == (whole.paths[2], whole.paths[0])
        with pytest.raises(ValueError, match="no size"):
            files.load()


def test_streams_have_the_same_guards(tmp_path: Path) -> None:
    """What is refused in memory is refused image by image; the ids of one odd mask cost no memory."""
    images, masks = pictures(tmp_path / "images"), tmp_path / "masks"
    save_all(masks, save_palette)
    palette(ids_of(3), [0, 0, 0, 0, 255, 0, 255, 0, 0]).save(masks / "3.png")
    refused(lambda: read_masks(images, masks), "1 of 4 palette masks", ": 3.png.")
    other = save_all(tmp_path / "npy", save_npy)
    for value, words in (
        (9, "6 of 10 classes occur in none of the 4 masks"),
        (-7, "negative"),
        (2**31 - 1, "ids up to"),
    ):
        ids = ids_of(2)
        ids[0, 0] = value
        np.save(other / "2.npy", ids.numpy())
        refused(lambda: read_masks(images, other), words)
        refused(lambda: read_masks(images, other, SIZE), words)
    assert len(read_masks(images, other, absent_ok=True, ignore_index=2**31 - 1).classes) == 3
    refused(lambda: read_masks(images, other, classes=3), "1 of 4 masks", f"2.npy ({2**31 - 1})")
    refused(lambda: read_masks(images, other, classes=2**31), "too many")
