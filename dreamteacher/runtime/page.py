"""The frame of every HTML page: style, header, pictures as data."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path

from torch import Tensor

from dreamteacher import __version__

STYLE = "\n" + Path(__file__).with_name("page.css").read_text("utf-8")


def data_uri(image: Tensor, longest: int | None = None) -> str:
    """A PNG of an image (uint8 3 x H x W) as a data URI, shrunk so that no side is above `longest` pixels."""
    from torchvision.transforms.v2.functional import resize, to_pil_image

    height, width = image.shape[-2:]
    if longest is not None and max(height, width) > longest:
        ratio = longest / max(height, width)
        size = [max(1, round(height * ratio)), max(1, round(width * ratio))]
        image = resize(image, size, antialias=True)
    file = io.BytesIO()
    to_pil_image(image).save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def page(title: str, body: str) -> str:
    """A whole HTML page of one file: no script, no network; `title` is escaped here, `body` is HTML."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style></head>\n<body><main>\n{body}\n"
        f"<footer>Written by dreamteacher {__version__}. This page needs no network.</footer>\n"
        "</main></body></html>\n"
    )
