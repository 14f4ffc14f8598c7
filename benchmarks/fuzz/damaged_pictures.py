"""Damaged and hostile images: small pictures of every format and mode, broken in every way that files break."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from functools import cache

from PIL import Image, features

MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"), "JPEG": ("L", "RGB", "CMYK", "YCbCr"),
    "WEBP": ("RGB", "RGBA"), "TIFF": ("1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "LAB", "YCbCr"),
    "GIF": ("L", "P"), "BMP": ("1", "L", "P", "RGB", "RGBA"), "PPM": ("1", "L", "RGB", "I"),
    "JPEG2000": ("L", "RGB", "RGBA"), "AVIF": ("RGB", "RGBA"),
}  # fmt: skip
NEEDS = {"WEBP": "webp", "JPEG2000": "jpg_2000", "AVIF": "avif"}
TIFF_PACKED = (None, "tiff_deflate", "tiff_lzw", "packbits", "jpeg")
# Declared heights and widths: beyond every limit, thin, empty, and one below the limit of 178 megapixels.
SIZES = [
    (2**31 - 1, 2**31 - 1),
    (65535, 65535),
    (30000, 30000),
    (1, 2**31 - 1),
    (2**31 - 1, 1),
    (0, 9),
    (9, 0),
]
JUST_ALLOWED = (12000, 14000)
# Cases that are PNGs of zeros: a megabyte and less, which are decoded to 177 million pixels.
BOMBS = {5000: "RGBA", 5001: "I;16"}
BOMB_SIDE = 13300


def formats() -> list[str]:
    """The formats that this Pillow can write."""
    return [f for f in MODES if f not in NEEDS or features.check(NEEDS[f])]


def picture(rng: random.Random, mode: str, width: int, height: int) -> Image.Image:
    grey = Image.frombytes("L", (width, height), rng.randbytes(width * height))
    if mode == "I;16":
        return Image.frombytes("I;16", (width, height), rng.randbytes(2 * width * height))
    if mode in ("I", "F"):
        return grey.convert(mode)
    if mode == "LAB":
        return Image.frombytes("LAB", (width, height), rng.randbytes(3 * width * height))
    return grey.convert("RGB").convert(mode)


def encoded(rng: random.Random, kind: str, **more: object) -> bytes:
    """A sound file of this format, in a mode and size drawn by `rng`."""
    for _ in range(20):
        mode = rng.choice(MODES[kind])
        image = picture(rng, mode, rng.randrange(1, 48), rng.randrange(1, 48))
        if kind == "TIFF":
            more = {"compression": rng.choice(TIFF_PACKED)} | more
        file = io.BytesIO()
        try:
            image.save(file, format=kind, **more)
        except Exception:  # a mode or metadata that the writer does not take: it says so in many ways
            continue
        return file.getvalue()
    raise AssertionError(f"{kind} cannot be written")


@cache
def sound(kind: str, number: int) -> bytes:
    return encoded(random.Random(f"{kind} {number}"), kind)


# --- damage -------------------------------------------------------------------------------------------------


def truncated(rng: random.Random, kind: str, raw: bytes) -> bytes:
    return raw[: rng.randrange(len(raw))]


def flipped(rng: random.Random, kind: str, raw: bytes) -> bytes:
    """A few bits, anywhere."""
    changed = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 4, 16, 64))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def headed(rng: random.Random, kind: str, raw: bytes) -> bytes:
    """Bytes within the first 64 become others: sizes, offsets, counts, kinds."""
    changed = bytearray(raw)
    for _ in range(rng.randrange(1, 6)):
        place = rng.randrange(min(64, len(changed)))
        changed[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return bytes(changed)


def cut_out(rng: random.Random, kind: str, raw: bytes) -> bytes:
    """A part is missing, doubled, or replaced by noise."""
    start = rng.randrange(len(raw))
    stop = min(len(raw), start + rng.choice((1, 4, 16, 100)))
    middle = rng.choice((b"", 2 * raw[start:stop], rng.randbytes(stop - start), bytes(stop - start)))
    return raw[:start] + middle + raw[stop:]


def spliced(rng: random.Random, kind: str, raw: bytes) -> bytes:
    """The head of one file on the body of another, of this or another format."""
    other = sound(rng.choice(formats()), rng.randrange(20))
    return raw[: rng.randrange(1, len(raw) + 1)] + other[rng.randrange(len(other)) :]


def sized(rng: random.Random, kind: str, raw: bytes) -> bytes:
    """The declared size is another one, huge or empty."""
    height, width = JUST_ALLOWED if rng.random() < 0.02 else rng.choice(SIZES)
    changed = bytearray(raw)
    if kind == "PNG":
        changed[16:24] = struct.pack(">II", width, height)
        changed[29:33] = struct.pack(">I", zlib.crc32(changed[12:29]))
    elif kind == "BMP":
        sign = rng.choice((1, -1))
        changed[18:26] = struct.pack("<ii", width, sign * height)
    elif kind == "GIF":
        small = struct.pack("<HH", min(width, 65535), min(height, 65535))
        changed[6:10] = small
        at = changed.find(b"\x2c", 13)
        if at > 0 and len(changed) >= at + 9:
            changed[at + 5 : at + 9] = small
    elif kind == "JPEG":
        for marker in (b"\xff\xc0", b"\xff\xc2"):
            if (at := changed.find(marker)) > 0:
                changed[at + 5 : at + 9] = struct.pack(">HH", min(height, 65535), min(width, 65535))
    elif kind == "TIFF":
        for tag, value in ((256, width), (257, height)):
            if (at := changed.find(struct.pack("<H", tag) + b"\x04\x00")) < 0:
                at = changed.find(struct.pack("<H", tag) + b"\x03\x00")
            if at > 0:
                changed[at : at + 12] = struct.pack("<HHII", tag, 4, 1, value)
    elif kind == "PPM":
        body = raw.split(b"\n", 2)
        return raw[:2] + b"\n%d %d\n" % (width, height) + (body[2] if len(body) > 2 else b"")
    elif kind == "WEBP":
        changed[24:30] = b"\xff\x3f\xff\x3f\xff\xff"
    else:  # boxes: a size of 32 bits somewhere in the first 200 bytes
        at = rng.randrange(min(200, len(changed) - 8))
        changed[at : at + 8] = struct.pack(">II", height, width)
    return bytes(changed)


def annotated(rng: random.Random, kind: str, raw: bytes) -> bytes:
    """EXIF, colour profiles and texts that are garbage, or bombs."""
    garbage = rng.randbytes(rng.choice((0, 1, 7, 64, 3000)))
    head = rng.choice((b"Exif\0\0", b"Exif\0\0II*\0\x08\0\0\0", b"Exif\0\0MM\0*\0\0\0\x08", b""))
    if kind == "PNG" and rng.random() < 0.3:  # a text that inflates to 20 MB
        text = b"Comment\0\0" + zlib.compress(bytes(20_000_000) if rng.random() < 0.2 else garbage)
        chunk = struct.pack(">I", len(text)) + b"zTXt" + text
        return raw[:33] + chunk + struct.pack(">I", zlib.crc32(chunk[4:])) + raw[33:]
    if kind in ("PNG", "JPEG", "WEBP", "AVIF", "JPEG2000"):
        try:
            return encoded(rng, kind, exif=head + garbage, icc_profile=garbage or None)
        except AssertionError:
            return flipped(rng, kind, raw)
    if kind == "TIFF":
        exif = Image.Exif()
        for tag in (0x0112, 0x8769, 0x8825, 700, 34675, rng.randrange(65536)):
            exif[tag] = rng.choice((garbage, 2**31, 9, "x" * 999, (1, 2, 3)))
        try:
            return encoded(rng, kind, exif=exif)
        except AssertionError:
            return flipped(rng, kind, raw)
    return raw + garbage


def many_frames(rng: random.Random, kind: str, raw: bytes) -> bytes:
    """Up to 200 frames of several sizes, a few bits flipped."""
    if kind not in ("PNG", "GIF", "TIFF", "WEBP", "AVIF"):
        return flipped(rng, kind, raw)
    frames = [picture(rng, "RGB", 8, 8) for _ in range(rng.choice((2, 5, 20 if kind == "AVIF" else 200)))]
    file = io.BytesIO()
    frames[0].save(file, format=kind, save_all=True, append_images=frames[1:])
    return flipped(rng, kind, file.getvalue()) if rng.random() < 0.8 else file.getvalue()


def unharmed(rng: random.Random, kind: str, raw: bytes) -> bytes:
    return raw


def no_picture(rng: random.Random, kind: str, raw: bytes) -> bytes:
    """Noise, a text, a web page, nothing, or the first bytes alone."""
    noise = rng.randbytes(rng.randrange(2000))
    return rng.choice(
        (
            noise,
            b"",
            b"<html>404</html>",
            raw[: rng.randrange(12)] + noise,
            b"%!PS-Adobe-3.0 EPSF-3.0\n" + noise,
        )
    )


DAMAGE: dict[str, Callable[[random.Random, str, bytes], bytes]] = {
    "truncated": truncated, "bits flipped": flipped, "header": headed, "part missing or doubled": cut_out,
    "spliced": spliced, "declared size": sized, "metadata": annotated, "many frames": many_frames,
    "none": unharmed, "no picture": no_picture,
}  # fmt: skip


def bomb(mode: str, side: int) -> bytes:
    """A sound PNG of side x side zeros."""
    bits, colour, count = {"RGBA": (8, 6, 4), "I;16": (16, 0, 2)}[mode]
    packer, row = zlib.compressobj(1), bytes(1 + side * count)
    body = b"".join([packer.compress(row) for _ in range(side)] + [packer.flush()])
    head = struct.pack(">IIBBBBB", side, side, bits, colour, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", body), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c)) + name + c + struct.pack(">I", zlib.crc32(name + c)) for name, c in chunks
    )


def case(number: int, seed: int) -> tuple[str, str, bytes]:
    """Case `number`: its format, its damage, its bytes."""
    if number in BOMBS:
        return "PNG", "bomb", bomb(BOMBS[number], BOMB_SIDE)
    rng, kinds = random.Random(f"{seed} {number}"), formats()
    kind = kinds[number % len(kinds)]
    damage = list(DAMAGE)[number // len(kinds) % len(DAMAGE)]
    return kind, damage, DAMAGE[damage](rng, kind, sound(kind, rng.randrange(40)))
