"""What a test may do with a backbone: nothing that stays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

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
