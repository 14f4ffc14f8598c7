"""What `export` is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from dreamteacher.exports.formats import FORMATS

OTHER = "other"

if TYPE_CHECKING:
    FormatName: TypeAlias = str
else:
    FormatName = Literal[tuple(FORMATS)]  # so that the command line knows the names of the table


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Settings of `dreamteacher export`."""

    run: Path
    """Folder of a finished pretraining run."""
    out: Path | None = None
    """Folder to make; none: "export" inside the run folder."""
    overwrite: bool = False
    """Replace an earlier export that lies at `out`; a folder with anything else in it is never replaced."""
    format: FormatName = "timm"
    """Whose names the weights get; each format's card has the code that loads it. "hub" is timm's format with what
    the model hub asks of a card; "onnx" is a graph with the normalisation inside."""
    licence: str = OTHER
    """Of the weights, as the model hub calls it (only for the format hub); "other" points to the terms of the
    teacher and the images."""
    datasets: tuple[str, ...] = ()
    """The model hub's names of the images, where they lie there (only for the format hub)."""
