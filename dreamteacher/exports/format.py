"""What an export format is: one object at the end of its module, found by one line of `formats.FORMATS`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from dreamteacher.exports.config import ExportConfig
from dreamteacher.exports.formats import FORMATS
from dreamteacher.models.student import Student, normalisation
from dreamteacher.runtime.errors import UserError, did_you_mean

WEIGHTS = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A backbone in the form of a library.

    Args:
        tensors: weights under that library's names; none where `Format.write` makes the file.
        install: what to install to run the snippet, as arguments of pip.
        snippet: Python that loads the files from its working directory; complete.
        notes: what a reader has to know besides: Markdown.
        library: the library's name in the model hub's metadata, if it has one.
        front: the YAML block on top of the card; none: the library and tags.
        files: what lies beside the weights and the card: name -> text.
    """

    tensors: Mapping[str, Tensor]
    install: str
    snippet: str
    notes: str
    library: str | None = None
    front: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)


def every_network(student: Student) -> bool:
    """For a format that takes whatever is a student."""
    return True


def no_condition(config: ExportConfig) -> None:
    """For a format that any settings fit and that needs no library."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """Whose names the weights of an export get, and what its card says of them.

    Args:
        name: as in the table and in `export --format`.
        takes: the networks that it knows, in words.
        knows: whether it has the network of a student.
        make: (student, what its run recorded, settings of the export) -> the export. Tensors may be shared with the
            student. It is asked only for a network that the format knows.
        check: raises UserError for what is wrong with the settings, or missing here, before anything is read.
        write: (student, file) -> writes the file of weights, for a format whose weights are no named tensors.
        weights: the name of that file.
        files: names of the files beside weights and card, so that an earlier export is known as one.
    """

    name: str
    make: Callable[[Student, Mapping[str, Any], ExportConfig], Exported]
    takes: str = "any student"
    knows: Callable[[Student], bool] = every_network
    check: Callable[[ExportConfig], None] = no_condition
    write: Callable[[Student, Path], None] | None = None
    weights: str = WEIGHTS
    files: tuple[str, ...] = ()


def find_format(name: str) -> Format:
    """The format of that name.

    Raises:
        UserError: with the closest name and all of them.
    """
    if name not in FORMATS:
        raise UserError(
            f"There is no format '{name}'.{did_you_mean(name, FORMATS)}", f"Formats: {', '.join(FORMATS)}."
        )
    module, _, place = FORMATS[name].partition(":")
    found: Format = getattr(importlib.import_module(module), place)
    return found


def formats_for(student: Student) -> list[str]:
    """The formats that know a student's network.

    Example:
        >>> from dreamteacher.models.student import create_student
        >>> formats_for(create_student("mobilenetv3_small_100"))
        ['timm', 'smp', 'onnx', 'hub']
    """
    return [name for name in FORMATS if find_format(name).knows(student)]


def check_knows(format: Format, student: Student) -> None:
    """Refuses a network that the format's library does not have.

    Raises:
        UserError: naming the formats that do.
    """
    if not format.knows(student):
        raise UserError(
            f"The format {format.name} has no {student.name}: it takes {format.takes}.",
            f"Formats that know it: {', '.join(formats_for(student))}.",
        )


def architecture(student: Student) -> str:
    """A student's name without the tag of its pretrained weights."""
    return student.name.split(".", 1)[0]


def state_of(student: Student) -> dict[str, Tensor]:
    """The weights under timm's names, shared."""
    return {k: v.detach() for k, v in student.model.state_dict().items()}


def image_lines(student: Student) -> str:
    """The lines that the snippets share: images, mean and deviation."""
    mean, std = normalisation(student.model)
    return f"""images = torch.rand(1, 3, 224, 224)  # yours: RGB in [0, 1]
mean = torch.tensor({list(mean)}).view(3, 1, 1)
std = torch.tensor({list(std)}).view(3, 1, 1)
"""
