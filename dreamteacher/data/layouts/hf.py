"""Data sets of Hugging Face, in a folder or by their name of the hub."""

from __future__ import annotations

from dreamteacher.data.layouts.layout import Layout
from dreamteacher.data.shards import table_images

LAYOUT = Layout(
    name="hf",
    what="a data set of Hugging Face",
    tree="what `save_to_disk` writes, or Parquet files; or the name of a data set of the hub",
    get="it by its name",
    images=lambda root, part: table_images(str(root)),
    parts=("train",),
)
