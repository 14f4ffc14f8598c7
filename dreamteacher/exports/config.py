"""What `export` is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dreamteacher.exports.hub import OTHER


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Settings of `dreamteacher export`.

    Args:
        run: folder of a finished pretraining run.
        out: folder to make; None is "export" inside the run folder.
        overwrite: replace an earlier export that lies at `out`.
        format: whose names the weights get; each format's card has the code that loads it. "hub" is timm's
            format with what the model hub asks of a card; "onnx" is a graph with the normalisation inside.
        licence: of the weights, as the model hub calls it (only for the format hub); "other" points to the
            terms of the teacher and the images.
        datasets: the model hub's names of the images, where they lie there (only for the format hub).
    """

    run: Path
    out: Path | None = None
    overwrite: bool = False
    format: Format = "timm"
    licence: str = OTHER
    datasets: tuple[str, ...] = ()


Format = Literal["timm", "torchvision", "detectron2", "mmdetection", "smp", "onnx", "hub"]
