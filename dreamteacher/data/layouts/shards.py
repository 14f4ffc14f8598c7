"""Tar files in WebDataset's format, in place of a data set."""

from __future__ import annotations

from dreamteacher.data.layouts.layout import Layout
from dreamteacher.data.shards import tar_images

LAYOUT = Layout(
    name="shards",
    what="shards of images",
    tree="uncompressed *.tar files, or their addresses",
    get="them from where the data set is released in WebDataset's format",
    images=lambda root, part: tar_images(root),
    parts=("train",),
)
