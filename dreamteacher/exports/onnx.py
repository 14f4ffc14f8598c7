"""A backbone as one ONNX file, run and compared before anybody gets it."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamteacher import __version__
from dreamteacher.models.student import Student
from dreamteacher.runtime.errors import UserError

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
        raise UserError(f"torch cannot export {student.name} to ONNX: {_first(error)}.", WAY_OUT) from error
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
            problem = f"onnxruntime cannot run the ONNX file of {student.name}: {_first(error)}."
            raise UserError(problem, WAY_OUT) from error
        _compare(found, student(images))


def _compare(found: Iterable[Any], expected: Iterable[Tensor]) -> None:
    for theirs, ours in zip(map(torch.from_numpy, found), expected, strict=True):
        worst = float((ours - theirs).abs().max()) if ours.shape == theirs.shape else float("inf")
        if not worst <= 1e-3 * max(1.0, float(ours.abs().max())):
            problem = f"onnxruntime's maps differ from torch's by {worst:.2g}: the ONNX file would be wrong."
            raise UserError(problem, WAY_OUT)


def _first(error: Exception) -> str:
    """What another library said, on one line."""
    return (next(iter(str(error).splitlines()), "") or type(error).__name__)[:120].rstrip(". ")
