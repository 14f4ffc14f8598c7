"""The kinds of feature datasets, and which teachers have them."""

from __future__ import annotations

from dreamteacher.distill.config import DatasetKind
from dreamteacher.runtime.errors import UserError
from dreamteacher.teachers.base import Teacher

MODES = {"encoded": {"encode"}, "synthesized": {"sample"}, "both": {"encode", "sample"}}


def check_mode(teacher: Teacher, kind: DatasetKind, size: tuple[int, int]) -> None:
    """Raises UserError when the teacher cannot serve this kind of dataset, or not at this size in pixels."""
    if not MODES[kind] <= teacher.modes:
        able = [f"--dataset {other}" for other, modes in MODES.items() if modes <= teacher.modes]
        raise UserError(
            f"The teacher '{teacher.name}' ({teacher.family}) cannot make a dataset that is {_WORDS[kind]}.",
            f"Use {' or '.join(able)}.",
        )
    if "sample" in MODES[kind] and size != teacher.size:
        height, width = teacher.size
        raise UserError(
            f"The teacher '{teacher.name}' makes images of {height} x {width}, not {size[0]} x {size[1]}.",
            "Leave out --size" + (", or use --dataset encoded." if "encode" in teacher.modes else "."),
        )
    teacher.check_size(*size)


_WORDS = {"encoded": "encoded", "synthesized": "synthesized", "both": "encoded and synthesized"}
