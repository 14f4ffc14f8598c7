"""What the tests of detectors share."""

from __future__ import annotations

import pytest

from dreamteacher.models.student import Student, create_student


@pytest.fixture(scope="module")
def student() -> Student:
    return create_student("test_resnet", seed=0)
