"""A backbone as one ONNX file, run and compared before anybody gets it."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from timm.layers import Conv2dSame
from torch import Tensor

from dreamteacher import __version__
from dreamteacher.exports.config import ExportConfig
from dreamteacher.exports.format import Exported, Format
from dreamteacher.models.student import Student
from dreamteacher.runtime.errors import UserError, first_line

OPSET = 18
WAY_OUT = "Export another format; with other versions of torch and onnxruntime it may work."


def write_onnx(student: Student, file: Path) -> None:
    """One ONNX file: images in [0, 1] -> the maps, normalisation inside, any batch and size (a plain ViT: sides that its stride divides).

    What was written is run by onnxruntime on two sizes that the export did not see, and compared.

    Args:
        student: in any mode; it is exported in evaluation mode, and left in its own.
        file: to write; at most 2 GB, which is the format's limit for one file.

    Raises:
        UserError: when the extra is not installed, the network cannot be exported, or the file computes
            something else.
    """
    check_onnx()
    was_training = student.training
    student.eval()
    try:
        with torch.no_grad():
            _export(student, file)
            _check(student, file)
    finally:
        student.train(was_training)


def check_onnx() -> None:
    """Refuses an ONNX export without its libraries.

    Raises:
        UserError: naming the extra.
    """
    missing = [n for n in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(n) is None]
    if missing:
        raise UserError(
            f"The format onnx needs {', '.join(missing)}.", "Install it: pip install 'dreamteacher[onnx]'"
        )


def _export(student: Student, file: Path) -> None:
    try:
        # torch's exporter warns of its own internals, which nobody can mend.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                student,
                (torch.zeros(2, 3, 96, 128),),
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                output_names=[spec.name for spec in student.specs],
                dynamic_shapes=({0: "batch", 2: "height", 3: "width"},),
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise UserError(
            f"torch cannot export {student.name} to ONNX: {first_line(error)}.", WAY_OUT
        ) from error
    assert program is not None  # it is None for the older exporter alone
    program.model.producer_name, program.model.producer_version = "dreamteacher", __version__
    program.model.metadata_props["student"] = student.name
    program.save(file)


def _check(student: Student, file: Path) -> None:
    import onnxruntime

    generator = torch.Generator().manual_seed(0)
    height = 70 if student.grid is None else 2 * student.grid.stride  # a ViT's graph resizes no image
    for shape in ((1, 3, 64, 96), (3, 3, height, 64)):
        images = torch.rand(shape, generator=generator)
        try:
            session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
            found = session.run(None, {"images": images.numpy()})
        except Exception as error:  # onnxruntime's errors have no common base
            problem = f"onnxruntime cannot run the ONNX file of {student.name}: {first_line(error)}."
            raise UserError(problem, WAY_OUT) from error
        _compare(found, student(images))


def _compare(found: Iterable[Any], expected: Iterable[Tensor]) -> None:
    for theirs, ours in zip(map(torch.from_numpy, found), expected, strict=True):
        worst = float((ours - theirs).abs().max()) if ours.shape == theirs.shape else float("inf")
        if not worst <= 1e-3 * max(1.0, float(ours.abs().max())):
            problem = f"onnxruntime's maps differ from torch's by {worst:.2g}: the ONNX file would be wrong."
            raise UserError(problem, WAY_OUT)


def _make(student: Student, facts: Mapping[str, Any], config: ExportConfig) -> Exported:
    free = f"multiples of {student.grid.stride}" if student.grid else "all three free"
    outputs = "\n".join(
        f"| `{spec.name}` | batch x {spec.channels} x height/{spec.stride} x width/{spec.stride} |"
        for spec in student.specs
    )
    snippet = """import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])

images = np.random.default_rng(0).random((1, 3, 224, 224), dtype=np.float32)  # yours: RGB in [0, 1]
maps = session.run(None, {"images": images})
vectors = maps[-1].mean(axis=(2, 3))
print([m.shape for m in maps], vectors.shape)
"""
    notes = f"""Opset {OPSET}, float32, evaluation mode. The normalisation is part of the graph: give RGB in [0, 1].

| name | shape |
| --- | --- |
| `images` (input) | batch x 3 x height x width, {free} |
{outputs}"""
    return Exported(tensors={}, install="onnxruntime numpy", snippet=snippet, notes=notes, library="onnx")


FORMAT = Format(
    name="onnx",
    takes="networks whose padding does not depend on the image's size",
    # Padding that depends on the size (TensorFlow's) keeps torch's exporter busy for minutes and more.
    knows=lambda student: not any(isinstance(module, Conv2dSame) for module in student.modules()),
    make=_make,
    check=lambda config: check_onnx(),
    write=write_onnx,
    weights="model.onnx",
)
