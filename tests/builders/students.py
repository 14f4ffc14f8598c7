"""What a test may do with a backbone: nothing that stays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from dreamteacher.downstream.config import EvaluateConfig
from dreamteacher.downstream.task import Bench, find_task
from dreamteacher.models.student import Student


@contextmanager
def left_alone(student: Student) -> Iterator[None]:
    """What happens within must leave the backbone bitwise as it was, and torch's generator alone."""
    student.train()
    before = {key: value.clone() for key, value in student.state_dict().items()}
    state = torch.get_rng_state()
    yield
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def noted_losses(patch: pytest.MonkeyPatch, module: Any) -> list[float]:
    """The loss of each step that `module` trains from now on."""
    losses: list[float] = []
    real = module.run_steps

    def run_steps(modules: Any, optimizer: Any, losses_at: Any, *others: Any, **settings: Any) -> None:
        def noted(step: int) -> Iterator[torch.Tensor]:
            losses.append(0.0)
            for loss in losses_at(step):
                losses[-1] += float(loss.detach())
                yield loss

        real(modules, optimizer, noted, *others, **settings)

    patch.setattr(module, "run_steps", run_steps)
    return losses


def run_task(
    name: str, student: Student, data: Any, budget: int | None = None, *, seed: int = 0, **settings: Any
) -> dict[str, float]:
    """The metrics of a task on data in memory."""
    task = find_task(name)
    config = EvaluateConfig(**{"device": "cpu", "precision": "float32", "workers": 0, **settings})
    return dict(task.run(Bench(student, config, {task.group.name: data}, task=task), budget, seed))
