"""Images from folders: damaged files are found and named, batches depend on nothing but seed and step."""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeAlias, TypeVar

import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from tqdm import tqdm

from dreamteacher.errors import UserError, shorten

Size: TypeAlias = tuple[int, int]  # height, width
T = TypeVar("T")
R = TypeVar("R")

# fmt: off
IMAGE_SUFFIXES = (
    ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg",
    ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
)
# fmt: on
# By content, whatever the suffix says; others are left out because their readers run other programs (EPS).
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
_MOST_PIXELS = 178_000_000
_MOST_TRIED = 1000
_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_PIL_STATE = threading.Lock()


class BadImage(NamedTuple):
    """A file that could not be read, and why, in one line of plain words."""

    path: Path
    reason: str


class BadImageError(Exception):
    """An image or mask that cannot be read; `.reason` says why in one line of plain words."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason


class Batch(NamedTuple):
    """float32 N x 3 x H x W in [0, 1], channels last; int64 N, the images' places in their set; the step."""

    images: Tensor
    index: Tensor  # type: ignore[assignment]  # a tuple's own `index` is not needed here
    step: int


def find_images(folder: Path) -> list[Path]:
    """All image files below `folder`, by suffix, in a fixed order; hidden files and folders are passed over.

    Links are followed, but never round in circles. Broken links are listed: reading them says what is wrong.

    Raises:
        UserError: the folder is missing, unreadable, no folder, or without images.
    """
    folder = Path(folder)
    if not folder.exists():
        raise UserError(f"The folder '{folder}' does not exist.", "Check the path.")
    if not folder.is_dir():
        raise UserError(f"'{folder}' is a file, not a folder.", "Give the folder that holds the images.")
    paths = list(_walk(folder, frozenset()))
    if not paths:
        raise UserError(f"No images in '{folder}' or below.", f"Looked for {' '.join(IMAGE_SUFFIXES)}")
    return paths


def _walk(folder: Path, above: frozenset[str]) -> Iterator[Path]:
    above |= {os.path.realpath(folder)}
    try:
        with os.scandir(folder) as found:
            entries = sorted((e for e in found if not e.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        raise UserError(
            f"The folder '{folder}' cannot be read: {error.strerror}.", "Mend its permissions."
        ) from None
    for entry in entries:
        if entry.is_dir():
            if os.path.realpath(entry.path) not in above:
                yield from _walk(folder / entry.name, above)
        elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES and (
            entry.is_file() or entry.is_symlink()  # neither pipes nor devices
        ):
            yield folder / entry.name


def folder_labels(folder: Path, paths: Sequence[Path]) -> tuple[Tensor | None, tuple[str, ...]]:
    """Class ids (int64 N) and names from the first folder below `folder`, names in sorted order.

    (None, ()) unless every image lies in such a folder and there are at least two of them.
    """
    parts = [path.relative_to(folder).parts for path in paths]
    classes = tuple(sorted({p[0] for p in parts}))
    if len(classes) < 2 or any(len(p) < 2 for p in parts):
        return None, ()
    ids = {name: i for i, name in enumerate(classes)}
    return torch.tensor([ids[p[0]] for p in parts]), classes


def read_image(path: Path, size: Size | None) -> Tensor:
    """One image as uint8 RGB 3 x H x W, upright, the first frame where there are several.

    Grey, palette, CMYK ... become RGB; 16-bit grey is scaled from the full 16-bit range; what is transparent
    is seen on white.

    Args:
        size: the image is scaled (bilinear, antialiased) to cover (height, width), and its centre is kept.
            None: as large as it is.

    Raises:
        BadImageError: it cannot be read.
    """
    image, turn, extent = _load(path, size)
    image = _eight_bits(path, image)
    if size is not None:
        image = _scale(image, extent, turn, size, Image.Resampling.BILINEAR)
    return pil_to_tensor(_turned(image, turn).convert("RGB"))


def read_mask(path: Path, size: Size | None, *, binary: bool = False) -> Tensor:
    """One mask as int64 H x W, nearest neighbour, cropped exactly as `read_image` crops.

    Args:
        size: (height, width); None: as large as it is.
        binary: False gives class ids: grey values or palette indices. True gives the brightness 0 to 255
            (the largest of red, green and blue, transparent is 0) of any kind of picture.

    Raises:
        BadImageError: it cannot be read, or has colours where class ids are wanted.
    """
    image, turn, extent = _load(path, None)
    if image.mode.startswith("I"):
        image = image.convert("I")
    if not binary and image.mode not in ("1", "L", "P", "I"):
        raise BadImageError(path, f"{image.mode} colours instead of class ids")
    if size is not None:
        image = _scale(image, extent, turn, size, Image.Resampling.NEAREST)
    if binary and image.mode not in ("1", "L", "I"):
        ground = Image.new("RGBA", image.size, "black")
        image = Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")
    values = pil_to_tensor(_turned(image, turn)).long().amax(0)
    return (values + 128) // 257 if binary and values.max() > 255 else values


def _cover_box(have: tuple[float, float], want: Size) -> tuple[float, float, float, float]:
    """The centred part (left, top, right, bottom) of an image of size `have` with the aspect of `want`.

    Example:
        >>> _cover_box((100, 60), (32, 32))
        (0, 20.0, 60, 80.0)
    """
    (h, w), (height, width) = have, want
    if w * height <= h * width:
        return 0, (h - w * height / width) / 2, w, (h + w * height / width) / 2
    return (w - h * width / height) / 2, 0, (w + h * width / height) / 2, h


def _scale(
    image: Image.Image, extent: tuple[float, float], turn: int, size: Size, how: Image.Resampling
) -> Image.Image:
    """Covers `size`, which is meant for the turned image, and keeps the centre."""
    height, width = _before_turn(size, turn)
    gap = 2.0 if how == Image.Resampling.BILINEAR else None
    return image.resize((width, height), how, box=_cover_box(extent, (height, width)), reducing_gap=gap)


def _before_turn(size: Size, turn: int) -> Size:
    return (size[1], size[0]) if turn > 4 else size


def _turned(image: Image.Image, turn: int) -> Image.Image:
    return image.transpose(_TURN[turn]) if turn in _TURN else image


@contextmanager
def _quiet_pil() -> Iterator[None]:
    # PIL warns about sizes and metadata that are checked here; its limit and Python's filters belong to all.
    with _PIL_STATE, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _open(path: Path, file: IO[bytes]) -> tuple[Image.Image, int]:
    """Reads the header; the image and its EXIF orientation (1 where that is read later, or not there)."""
    if os.fstat(file.fileno()).st_size == 0:
        raise BadImageError(path, "empty file")
    with _quiet_pil():
        Image.init()
        image = Image.open(file, formats=[f for f in _FORMATS if f in Image.OPEN])
        turn = _orientation(image) if image.format in ("JPEG", "MPO") else 1
    if image.width * image.height > _MOST_PIXELS:
        raise BadImageError(path, f"too large: {image.width} x {image.height} pixels")
    if image.mode in ("F", "LAB"):
        raise BadImageError(
            path, {"F": "floating-point values, whose range is not known", "LAB": "Lab colours"}[image.mode]
        )
    return image, turn


def _orientation(image: Image.Image) -> int:
    try:
        turn = int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged metadata fail in many ways and do not damage the picture
        return 1
    return turn if turn in _TURN else 1


def _load(path: Path, size: Size | None) -> tuple[Image.Image, int, tuple[float, float]]:
    """Decodes the first frame in the file's own mode; not yet turned; reduced, but never below twice `size`.

    Returns:
        The image, its EXIF orientation, and the height and width that it fills: those of the file at the
        reduced scale, where the last row and column may be covered in part.
    """
    try:
        with Path(path).open("rb") as file:
            image, turn = _open(path, file)
            extent: tuple[float, float] = (image.height, image.width)
            if size is not None:  # JPEG can be decoded at 1/2, 1/4, 1/8, which saves time
                height, width = _before_turn(size, turn)
                scale = 2 * max(height / image.height, width / image.width)
                drafted = image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
                if drafted is not None:
                    extent = (drafted[1][3], drafted[1][2])
            image.load()
            if image.format not in ("JPEG", "MPO"):  # known only now, and TIFF is turned already
                with _quiet_pil():
                    turn = _orientation(image)
                extent = (image.height, image.width)
    except BadImageError:
        raise
    except Exception as error:  # decoders of damaged files raise nearly everything
        raise BadImageError(path, _reason(error)) from error
    return image, turn, extent


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "missing file or broken link"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or its header is damaged"
    text = " ".join(str(error).split())
    if isinstance(error, EOFError) or "truncated" in text.lower():
        return "truncated"
    return f"damaged: {text or type(error).__name__}"


def _eight_bits(path: Path, image: Image.Image) -> Image.Image:
    """Mode L or RGB, transparency laid over white."""
    if image.mode.startswith("I"):
        values = pil_to_tensor(image.convert("I"))
        if values.min() < 0 or values.max() > 65535:
            raise BadImageError(path, "grey values outside 16 bits")
        return to_pil_image(((values + 128) // 257).to(torch.uint8))
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")
    return image if image.mode == "L" else image.convert("RGB")


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """The readable images of a folder, decoded in memory or on the way.

    Args:
        folder: where they lie.
        paths: N files, sorted.
        size: (height, width) of every image.
        labels: int64 N, or None when the folders name no classes.
        classes: class names in id order, or ().
        cache: uint8 N x 3 x H x W, or None: decoded when asked for.
        bad: files that could not be read. Without a cache this grows, in `get` and `batches`: a damaged file
            whose header was good is found only when its turn comes.
    """

    folder: Path
    paths: list[Path]
    size: Size
    labels: Tensor | None
    classes: tuple[str, ...]
    cache: Tensor | None
    bad: tuple[BadImage, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def get(self, indices: Tensor) -> Tensor:
        """The uint8 batch K x 3 x H x W of these indices (int64 K).

        An image found damaged only now gives way to the next readable one of its class, and is recorded.

        Raises:
            UserError: too many in a row cannot be read.
            IndexError: there are not so many.
        """
        if self.cache is not None:
            return self.cache[indices]
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(self):
            raise IndexError(f"indices {indices.min()} to {indices.max()} of {len(self)} images")
        parts = _in_threads(functools.partial(_decode, self), [[i] for i in indices.tolist()], 2)
        return torch.cat([self._record(part)[0] for part in parts])

    def _record(self, decoded: _Decoded) -> tuple[Tensor, Tensor]:
        known = {b.path for b in self.bad}
        new = tuple(b for b in dict.fromkeys(decoded.bad) if b.path not in known)
        if new:  # the one thing that changes: knowledge about the files, not what the set holds
            object.__setattr__(self, "bad", self.bad + new)
        if decoded.images is None:
            path, reason = decoded.bad[-1]
            raise UserError(
                f"'{path}' and {len(decoded.bad) - 1} images before it cannot be read ({reason}).",
                "Check that the disk is still there; the same command resumes from the last checkpoint.",
            )
        return decoded.images, decoded.index


@dataclass(frozen=True)
class _Decoded:
    images: Tensor | None
    index: Tensor
    bad: list[BadImage]


def _decode(images: ImageSet, indices: Sequence[int]) -> _Decoded:
    """Reads images, damaged ones replaced by the next readable of their class; None if there is none near."""
    found: list[Tensor] = []
    index: list[int] = []
    bad: list[BadImage] = []
    for i in indices:
        for j in _replacements(images, i):
            try:
                found.append(read_image(images.paths[j], images.size))
                index.append(j)
                break
            except BadImageError as error:
                bad.append(BadImage(images.paths[j], error.reason))
        else:
            return _Decoded(None, torch.tensor(index), bad)
    return _Decoded(torch.stack(found), torch.tensor(index), bad)


def _replacements(images: ImageSet, i: int) -> Iterator[int]:
    count = 0
    for j in itertools.chain(range(i, len(images)), range(i)):
        if images.labels is None or images.labels[j] == images.labels[i]:
            yield j
            count += 1
        if count == _MOST_TRIED:  # not damage any more: the disk is gone
            return


def _in_threads(function: Callable[[T], R], items: Sequence[T], workers: int, what: str = "") -> list[R]:
    """[function(x) for x in items] in threads; a long list with a name (`what`) shows a bar on a terminal."""
    quiet = not what or len(items) <= 2000 or not sys.stderr.isatty()
    results: list[R] = []
    with ThreadPoolExecutor(max(1, workers)) as pool, tqdm(total=len(items), desc=what, disable=quiet) as bar:
        for start in range(0, len(items), 256):  # in parts: a million futures would take a gigabyte
            results += pool.map(function, items[start : start + 256])
            bar.update(len(results) - bar.n)
    return results


def load_images(
    folder: Path, size: Size, *, strict: bool = False, cache_gb: float = 2.0, workers: int = 2
) -> ImageSet:
    """Every readable image below `folder`; the damaged ones are left out and kept in `.bad`.

    Args:
        size: (height, width) that every image is brought to.
        strict: refuse any damaged image.
        cache_gb: images that take at most this many 10^9 bytes, decoded, are decoded now and kept, so that
            every damaged file is known. Otherwise headers are checked now (with `strict`: everything).
        workers: threads.

    Raises:
        UserError: no folder, no images, none readable, or a damaged one with `strict`.
    """
    folder = Path(folder)
    if min(size) < 1:
        raise UserError(f"The size {size[0]} x {size[1]} is empty.", "Give height and width of at least 1.")
    paths = find_images(folder)
    fits = len(paths) * 3 * size[0] * size[1] <= cache_gb * 1e9
    cache = torch.empty(len(paths), 3, *size, dtype=torch.uint8) if fits else None

    def check(i: int) -> BadImage | None:
        try:
            if cache is not None:
                cache[i] = read_image(paths[i], size)
            elif strict:
                read_image(paths[i], size)
            else:
                _header(paths[i])
        except BadImageError as error:
            return BadImage(paths[i], error.reason)
        return None

    checked = _in_threads(check, range(len(paths)), workers, "reading images")
    bad = tuple(b for b in checked if b is not None)
    if len(bad) == len(paths) or (bad and strict):
        raise UserError(
            f"{len(bad)} of {len(paths)} images in '{folder}' cannot be read: {_some(folder, bad)}.",
            "Replace or remove them" + (", or leave out --strict." if len(bad) < len(paths) else "."),
        )
    good = [i for i, b in enumerate(checked) if b is None]
    if cache is not None and bad:
        for new, old in enumerate(good):  # in place: a copy would need the memory twice
            cache[new] = cache[old]
        cache = cache[: len(good)]
    kept = [paths[i] for i in good]
    labels, classes = folder_labels(folder, kept)
    return ImageSet(
        folder=folder, paths=kept, size=size, labels=labels, classes=classes, cache=cache, bad=bad
    )


def _some(folder: Path, bad: Sequence[BadImage]) -> str:
    return shorten(f"{_below(folder, b.path)} ({b.reason})" for b in bad)


def _below(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


class _Header(NamedTuple):
    """What is known before decoding: upright (height, width), and PIL's names of mode and format."""

    size: Size
    mode: str
    format: str


def _header(path: Path) -> _Header:
    try:
        with path.open("rb") as file:
            image, turn = _open(path, file)
            if "exif" in image.info and image.format not in ("JPEG", "MPO", "TIFF"):
                with _quiet_pil():
                    turn = _orientation(image)
    except BadImageError:
        raise
    except Exception as error:
        raise BadImageError(path, _reason(error)) from error
    return _Header(_before_turn((image.height, image.width), turn), image.mode, image.format or "")


def step_generator(seed: int, step: int, stream: str = "") -> torch.Generator:
    """The random numbers of one step, for one purpose: independent of every other (seed, step, stream)."""
    digest = hashlib.blake2b(f"{seed}/{step}/{stream}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@functools.lru_cache(maxsize=2)
def _epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=step_generator(seed, epoch, "order"))


def _batch_indices(count: int, *, batch_size: int, seed: int, step: int) -> Tensor:
    """int64 indices of a step (from 0): a new order in every epoch; its incomplete last batch is dropped."""
    epoch, part = divmod(step, count // batch_size)
    return _epoch_order(count, seed, epoch)[part * batch_size : (part + 1) * batch_size]


def flip_images(images: Tensor, flips: Tensor) -> Tensor:
    """Mirrors those images (N x C x H x W, left and right) whose entry in `flips` (bool N) is true."""
    return torch.where(flips.view(-1, 1, 1, 1), images.flip(-1), images)


def batches(
    images: ImageSet,
    *,
    batch_size: int,
    seed: int,
    first_step: int,
    last_step: int,
    flip: bool,
    workers: int = 0,
) -> Iterator[Batch]:
    """Batches of steps `first_step` to `last_step` - 1, over as many epochs as that takes.

    Step k is the same batch, bit for bit, wherever the iteration began, cached or streamed, with any number
    of workers. (Files with a good header and damaged pixels are the exception: a cache leaves them out from
    the start, which changes the order; a stream puts another image in their place.)

    Args:
        flip: mirror each image with probability 1/2.
        workers: processes that decode when the set has no cache; 0: this one.

    Raises:
        UserError: at once, when the batch is larger than the set.
    """
    if not 1 <= batch_size <= len(images):
        raise UserError(
            f"A batch of {batch_size} cannot be drawn from {len(images)} images.",
            f"Use a batch size of 1 to {len(images)}.",
        )
    steps = range(first_step, last_step)
    return _batches(images, batch_size, seed, steps, flip, workers)


def _batches(
    images: ImageSet, batch_size: int, seed: int, steps: range, flip: bool, workers: int
) -> Iterator[Batch]:
    stream: Iterable[_Decoded] = ()
    if images.cache is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        stream = DataLoader(
            _Steps(images, batch_size, seed), batch_size=None, sampler=steps, num_workers=min(workers, cores),
            collate_fn=_as_it_is, generator=torch.Generator(),
        )  # fmt: skip
    decoded = iter(stream)
    for step in steps:
        if images.cache is None:
            pixels, index = images._record(next(decoded))
        else:
            index = _batch_indices(len(images), batch_size=batch_size, seed=seed, step=step)
            pixels = images.get(index)
        if flip:
            flips = torch.rand(batch_size, generator=step_generator(seed, step, "flip")) < 0.5
            pixels = flip_images(pixels, flips)
        yield Batch(pixels.to(torch.float32, memory_format=torch.channels_last).div_(255), index, step)


class _Steps(Dataset[_Decoded]):
    """Item k is what step k shows: a loader that begins at any step needs no history."""

    def __init__(self, images: ImageSet, batch_size: int, seed: int) -> None:
        self.images, self.batch_size, self.seed = images, batch_size, seed

    def __getitem__(self, step: int) -> _Decoded:
        index = _batch_indices(len(self.images), batch_size=self.batch_size, seed=self.seed, step=step)
        return _decode(self.images, index.tolist())


def _as_it_is(decoded: Any) -> Any:
    return decoded


@dataclass(frozen=True, kw_only=True)
class SegmentationSet:
    """Images with masks, decoded in memory.

    Args:
        images: uint8 N x 3 x H x W.
        masks: int64 N x H x W, class ids and perhaps the id that is to be ignored.
        classes: number of classes.
        names: their names in id order.
        unpaired: images that had no mask and were left out.
    """

    images: Tensor
    masks: Tensor
    classes: int
    names: tuple[str, ...]
    unpaired: tuple[Path, ...] = ()


def load_segmentation(
    images_folder: Path, masks_folder: Path, size: Size, *, ignore_index: int = 255, binary: bool = False
) -> SegmentationSet:
    """Images and their masks, paired by their paths below the folders without suffix (a/1.jpg with a/1.png).

    Images without a mask are left out, which is said on stderr: labels are expected to be few.

    Args:
        size: (height, width) that images and masks are brought to, alike.
        ignore_index: id in the masks that is no class.
        binary: masks are black and white pictures of any kind: class 1 where brighter than 127 (or than 0 if
            no mask holds more than 1), class 0 elsewhere. Otherwise grey values or palette indices are ids.

    Raises:
        UserError: masks without an image, files that cannot be read, shapes that differ, coloured or JPEG
            masks where ids are wanted, fewer than two classes.
    """
    images_folder, masks_folder = Path(images_folder), Path(masks_folder)
    pairs, unpaired = _pairs(images_folder, masks_folder)
    _check_pairs(images_folder, masks_folder, pairs, binary)
    if unpaired:
        some = shorten(_below(images_folder, p) for p in unpaired)
        print(
            f"{len(unpaired)} of {len(pairs) + len(unpaired)} images have no mask and are left out: {some}",
            file=sys.stderr,
        )
    images = torch.empty(len(pairs), 3, *size, dtype=torch.uint8)
    masks = torch.empty(len(pairs), *size, dtype=torch.int64)

    def load(i: int) -> BadImage | None:
        try:
            images[i] = read_image(pairs[i][0], size)
            masks[i] = read_mask(pairs[i][1], size, binary=binary)
        except BadImageError as error:
            return BadImage(error.path, error.reason)
        return None

    _refuse_bad(_in_threads(load, range(len(pairs)), 2, "reading masks"), masks_folder)
    if binary:
        masks = (masks > (0 if masks.max() <= 1 else 127)).long()
        return SegmentationSet(
            images=images, masks=masks, classes=2, names=("background", "foreground"), unpaired=unpaired
        )
    classes = int(torch.where(masks == ignore_index, -1, masks).max()) + 1
    if classes < 2 or int(masks.min()) < 0:
        raise UserError(
            f"The masks in '{masks_folder}' hold the ids {shorten(map(str, masks.unique().tolist()))}; "
            f"{ignore_index} is ignored, and at least two classes from 0 are needed.",
            "If they are black and white pictures, load them as binary masks.",
        )
    names = tuple(f"class {i}" for i in range(classes))
    return SegmentationSet(images=images, masks=masks, classes=classes, names=names, unpaired=unpaired)


def _pairs(images_folder: Path, masks_folder: Path) -> tuple[list[tuple[Path, Path]], tuple[Path, ...]]:
    """(image, mask) in order, and the images without a mask."""
    by_name: list[dict[str, Path]] = []
    for folder in (images_folder, masks_folder):
        paths = find_images(folder)
        by_name.append({_below(folder, p.with_suffix("")): p for p in paths})
        if len(by_name[-1]) < len(paths):
            same = (_below(folder, p) for p in paths if by_name[-1][_below(folder, p.with_suffix(""))] != p)
            raise UserError(
                f"Files in '{folder}' differ in nothing but their suffix: {shorten(same)}.",
                "Keep one of each: images and masks are paired by name without suffix.",
            )
    images, masks = by_name
    alone = [_below(masks_folder, path) for name, path in masks.items() if name not in images]
    if alone:
        raise UserError(
            f"{len(alone)} of {len(masks)} masks in '{masks_folder}' have no image of the same name in "
            f"'{images_folder}': {shorten(alone)}.",
            "Name mask and image alike (a/1.png for a/1.jpg), or remove those masks.",
        )
    unpaired = tuple(path for name, path in images.items() if name not in masks)
    return [(path, masks[name]) for name, path in images.items() if name in masks], unpaired


def _check_pairs(
    images_folder: Path, masks_folder: Path, pairs: Sequence[tuple[Path, Path]], binary: bool
) -> None:
    """Everything that the headers tell, before anything is decoded."""

    def check(path: Path) -> _Header | BadImage:
        try:
            return _header(path)
        except BadImageError as error:
            return BadImage(path, error.reason)

    found = _in_threads(check, [path for pair in pairs for path in pair], 2, "checking masks")
    _refuse_bad(found, masks_folder)
    headers = [h for h in found if isinstance(h, _Header)]
    coloured, oblong = [], []
    for (image, mask), one, two in zip(pairs, headers[::2], headers[1::2], strict=True):
        (h, w), (height, width) = one.size, two.size
        if abs(h * width - w * height) > max(h, w, height, width):  # more than a pixel of rounding
            oblong.append(f"{_below(images_folder, image)} {w} x {h} and its mask {width} x {height}")
        if two.format in ("JPEG", "MPO") or not (two.mode in ("1", "L", "P") or two.mode.startswith("I")):
            coloured.append(f"{_below(masks_folder, mask)} ({two.format}, {two.mode})")
    if coloured and not binary:
        raise UserError(
            f"{len(coloured)} of {len(pairs)} masks in '{masks_folder}' have no class ids: "
            f"{shorten(coloured)}.",
            "Save ids as grey or palette PNG; or, if these are black and white, load them as binary masks.",
        )
    if oblong:
        raise UserError(
            f"{len(oblong)} of {len(pairs)} masks are not of their image's shape: {shorten(oblong)}.",
            "Mask and image must show the same part of the scene: width / height must be the same.",
        )


def _refuse_bad(found: Iterable[object], folder: Path) -> None:
    bad = [b for b in found if isinstance(b, BadImage)]
    if bad:
        raise UserError(
            f"{len(bad)} images or masks of '{folder}' cannot be read: "
            f"{shorten(f'{b.path} ({b.reason})' for b in bad)}.",
            "Replace or remove them.",
        )
