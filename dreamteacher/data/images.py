"""One image file: found, decoded to upright RGB or class ids of a wanted size, or what is wrong with it."""

from __future__ import annotations

import abc
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple, TypeAlias, TypeVar

import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from dreamteacher.runtime.errors import UserError

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
# These decoders hold 16, 12 and 25 bytes of a pixel, and all that is done with others 8: 1.5 GB at most.
_MOST_PIXELS = {"WEBP": 90_000_000, "AVIF": 120_000_000, "JPEG2000": 60_000_000}
_MOST_PIXELS_ELSE = 178_000_000
_STRIP = 1 << 20  # pixels of an image that are converted at a time
_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_PIL_STATE = threading.Lock()


class Packed(abc.ABC):
    """An image that is no file of its own but lies in a larger one; it can be read wherever a path can."""

    __slots__ = ()

    @abc.abstractmethod
    def open(self, mode: str = "rb") -> IO[bytes]:
        """The image's bytes, and no others; the file can be moved about in."""

    @abc.abstractmethod
    def relative_to(self, folder: Path) -> PurePosixPath:
        """Its name as seen from a folder that the larger file lies in, for messages."""


ImageFile: TypeAlias = Path | Packed


class BadImage(NamedTuple):
    """A file that could not be read, and why, in one line of plain words."""

    path: ImageFile
    reason: str


class BadImageError(Exception):
    """An image or mask that cannot be read; `.reason` says why in one line of plain words."""

    def __init__(self, path: ImageFile, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason


def find_images(folder: Path, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> list[Path]:
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
    paths = list(_walk(folder, frozenset(), suffixes))
    if not paths:
        raise UserError(f"No images in '{folder}' or below.", f"Looked for {' '.join(suffixes)}")
    return paths


def _walk(folder: Path, above: frozenset[str], suffixes: Sequence[str]) -> Iterator[Path]:
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
                yield from _walk(folder / entry.name, above, suffixes)
        elif os.path.splitext(entry.name)[1].lower() in suffixes and (
            entry.is_file() or entry.is_symlink()  # neither pipes nor devices
        ):
            yield folder / entry.name


def below(folder: Path, path: ImageFile) -> str:
    """The path as seen from the folder, with forward slashes: a/1.png."""
    return path.relative_to(folder).as_posix()


def read_image(path: ImageFile, size: Size | None) -> Tensor:
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
    image = _turned(image, turn)
    return _pixels(image if image.mode == "RGB" else image.convert("RGB"))


def from_pil(image: Image.Image, size: Size | None) -> Tensor:
    """An open picture as `read_image` gives the one in a file: uint8 RGB 3 x H x W, upright, transparency on white.

    Args:
        size: (height, width) that it covers, its centre kept; None: as large as it is.

    Raises:
        BadImageError: values whose range is not known.

    Example:
        >>> from_pil(Image.new("L", (64, 32), 255), (16, 16)).shape
        torch.Size([3, 16, 16])
    """
    place = Path(str(getattr(image, "filename", "") or "picture"))
    if image.mode in ("F", "LAB"):
        raise BadImageError(place, f"mode {image.mode}, whose values are no grey or RGB")
    turn, extent = _orientation(image), (image.height, image.width)
    image = _eight_bits(place, image)
    if size is not None:
        image = _scale(image, extent, turn, size, Image.Resampling.BILINEAR)
    image = _turned(image, turn)
    return _pixels(image if image.mode == "RGB" else image.convert("RGB"))


def read_mask(path: ImageFile, size: Size | None, *, binary: bool = False) -> Tensor:
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
    image = _turned(image, turn)
    if binary and image.mode not in ("1", "L", "I"):
        image = _by_strips(image, "RGB", lambda strip: _laid_over(strip, "black"))
    values = _pixels(image).amax(0).long()
    return (values + 128) // 257 if binary and values.max() > 255 else values


def scale_mask(ids: Tensor, size: Size) -> Tensor:
    """Class ids H x W (within 32 bits), brought to `size` by nearest neighbour, cropped as `read_image` crops.

    By PIL, as `read_mask` does it: it adds up its steps, so that where a place lies between two pixels it may take
    the other one than `nearest`.

    Example:
        >>> scale_mask(torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]]), (2, 2)).tolist()
        [[1, 2], [5, 6]]
    """
    image = Image.fromarray(ids.to(torch.int32).contiguous().numpy())
    height, width = ids.shape
    return _pixels(_scale(image, (height, width), 1, size, Image.Resampling.NEAREST))[0].long()


def nearest(have: int, whole: int, first: int = 0, count: int | None = None) -> Tensor:
    """The pixels, of `have` along a side, that are nearest to those of the side scaled to `whole`.

    Args:
        have: pixels along the side.
        whole: pixels along the scaled side.
        first: of the scaled side, where the part that is wanted begins.
        count: its length; None: all that is left.

    Example:
        >>> nearest(4, 2).tolist(), nearest(2, 4, 1, 2).tolist()
        ([1, 3], [0, 1])
    """
    places = torch.arange(whole - first if count is None else count, dtype=torch.float64) + first
    return ((places + 0.5) * have / whole).long().clamp(max=have - 1)


def read_channels(path: ImageFile) -> Tensor:
    """The values of a picture as they are in the file, uint8 C x H x W: for label maps in RGB or RGBA.

    Raises:
        BadImageError: it cannot be read, or is neither RGB nor RGBA.
    """
    image, turn, _ = _load(path, None)
    if image.mode not in ("RGB", "RGBA"):
        raise BadImageError(path, f"{image.mode} instead of RGB or RGBA")
    return _pixels(_turned(image, turn))


def _pixels(image: Image.Image) -> Tensor:
    """The values of a picture, C x H x W: int32 of mode I, else uint8; mode 1 gives 0 and 1, P its indices."""
    kind = torch.int32 if image.mode == "I" else torch.uint8
    values = torch.empty(image.height, image.width, len(image.getbands()), dtype=kind)
    for top, strip in _strips(image):
        found = torch.frombuffer(
            bytearray((strip.convert("L") if strip.mode == "1" else strip).tobytes()), dtype=kind
        )
        values[top : top + strip.height] = found.view(strip.height, strip.width, -1)
    return (values // 255 if image.mode == "1" else values).permute(2, 0, 1)


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


class Header(NamedTuple):
    """What is known before decoding: upright (height, width), PIL's names of mode and format, the palette."""

    size: Size
    mode: str
    format: str
    palette: bytes = b""


def read_header(path: ImageFile) -> Header:
    """Size, mode and format of an image or mask, without decoding it.

    Raises:
        BadImageError: its header cannot be read.
    """
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
    palette = bytes(image.palette.palette) if image.mode == "P" and image.palette is not None else b""
    return Header(_before_turn((image.height, image.width), turn), image.mode, image.format or "", palette)


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


def _open(path: ImageFile, file: IO[bytes]) -> tuple[Image.Image, int]:
    """Reads the header; the image and its EXIF orientation (1 where that is read later, or not there)."""
    if not file.read(1):
        raise BadImageError(path, "empty file")
    file.seek(0)
    with _quiet_pil():
        Image.init()
        image = Image.open(file, formats=[f for f in _FORMATS if f in Image.OPEN])
        turn = _orientation(image) if image.format in ("JPEG", "MPO") else 1
    if image.width * image.height > _MOST_PIXELS.get(image.format or "", _MOST_PIXELS_ELSE):
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


def _load(path: ImageFile, size: Size | None) -> tuple[Image.Image, int, tuple[float, float]]:
    """Decodes the first frame in the file's own mode; not yet turned; reduced, but never below twice `size`.

    Returns:
        The image, its EXIF orientation, and the height and width that it fills: those of the file at the
        reduced scale, where the last row and column may be covered in part.
    """
    try:
        with path.open("rb") as file:
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


def _eight_bits(path: ImageFile, image: Image.Image) -> Image.Image:
    """Mode L or RGB, transparency laid over white.

    Raises:
        BadImageError: values outside 16 bits.
    """
    if image.mode.startswith("I"):
        return _by_strips(image, "L", lambda strip: _from_16_bits(path, strip))
    if image.has_transparency_data:
        return _by_strips(image, "RGB", lambda strip: _laid_over(strip, "white"))
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def _from_16_bits(path: ImageFile, image: Image.Image) -> Image.Image:
    values = _pixels(image.convert("I"))
    if values.min() < 0 or values.max() > 65535:
        raise BadImageError(path, "grey values outside 16 bits")
    return Image.fromarray(((values[0] + 128) // 257).to(torch.uint8).numpy())


def _laid_over(image: Image.Image, colour: str) -> Image.Image:
    ground = Image.new("RGBA", image.size, colour)
    return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")


def _by_strips(image: Image.Image, mode: str, work: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """`work(image)`, which changes each pixel for itself and gives this mode; its copies are of a strip at a time."""
    if image.width * image.height <= _STRIP:
        return work(image)
    whole = Image.new(mode, image.size)
    for top, strip in _strips(image):
        whole.paste(work(strip), (0, top))
    return whole


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Parts of some rows and all columns, each with the number of its first row; a small image is one."""
    rows = max(1, _STRIP // image.width)
    if rows >= image.height:
        yield 0, image
        return
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def to_float(pixels: Tensor, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:
    """uint8 pixels as floats (torch's default: float32) in [0, 1], where they are; floats stay as they are.

    Args:
        pixels: of any shape.
        memory_format: of the result; `torch.channels_last` is what convolutions are quickest with.

    Example:
        >>> to_float(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist()
        [0.0, 0.20000000298023224, 1.0]
    """
    if pixels.is_floating_point():
        return pixels
    return pixels.to(torch.get_default_dtype(), memory_format=memory_format).div_(255)
