"""What a run leaves, to be compared with what another leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.errors import UserError
from dreamteacher.teachers.training.config import TrainTeacherConfig
from dreamteacher.teachers.training.train import train_teacher


def left_by(run: Path, *weights: str) -> dict[str, object]:
    """The last checkpoint, these files of weights and the metrics, as comparable values.

    Tensors, not bytes: the order of a header's metadata is free.
    """
    last = checkpoint.latest(run)
    assert last is not None
    tensors, meta = checkpoint.load(last)
    found: dict[str, object] = {f"checkpoint/{k}": v for k, v in tensors.items()} | {"meta": meta}
    for name in weights:
        found |= {f"{name}/{k}": v for k, v in load_file(run / f"{name}.safetensors").items()}
    return found | {"metrics": (run / "metrics.jsonl").read_bytes()}


def assert_equal(a: dict[str, object], b: dict[str, object]) -> None:
    """Bitwise, key by key."""
    assert a.keys() == b.keys()
    for key, value in a.items():
        same = torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key]  # type: ignore[arg-type]
        assert same, key


def assert_refused(config: TrainTeacherConfig, words: str) -> None:
    """A teacher's training is refused in these words, before a folder is made."""
    with pytest.raises(UserError, match=words) as caught:
        train_teacher(config)
    assert len(str(caught.value).splitlines()) <= 3
    assert not config.out.exists()
