"""The public checks accept what keeps the contract and name what breaks it."""

from __future__ import annotations

import pytest
import torch

from dreamteacher.models.student import create_student
from dreamteacher.runtime.distributed.world import randn
from dreamteacher.spec import FeatureSpec
from dreamteacher.teachers.base import Teacher
from dreamteacher.teachers.registry import load_teacher
from dreamteacher.testing import check_student, check_task, check_teacher


def test_embedded_teacher_and_students_keep_their_contracts(tiny_teacher):
    check_teacher(load_teacher(str(tiny_teacher)))
    check_teacher(load_teacher(str(tiny_teacher), timesteps=(50, 150), noise="fixed"))
    for name in ("test_resnet", "test_convnext"):
        check_student(create_student(name))


class Broken(Teacher):
    """An encoder of one level, broken in the way asked for."""

    name, family, licence, size, multiple = "broken", "test", "-", (32, 32), 4
    modes = frozenset({"encode"})

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault
        self.specs = (FeatureSpec("s4", 3, 4),)
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.freeze()
        if fault == "trainable":
            self.weight.requires_grad_(True)

    def train(self, mode: bool = True):
        return torch.nn.Module.train(self, mode) if self.fault == "train mode" else super().train(mode)

    def encode(self, images, *, generator):
        x = torch.nn.functional.avg_pool2d(images, 2 if self.fault == "stride" else 4)
        if self.fault == "global noise":
            x = x + torch.randn_like(x)
        if self.fault == "infinite":
            x = x / 0
        if self.fault == "draws of its own":
            return [x + torch.randn(x.shape, generator=generator)]
        return [x + randn(x.shape, generator)]

    def sample(self, n, *, generator):
        if self.fault == "undeclared":
            return torch.rand(n, 3, 32, 32), [torch.rand(n, 3, 8, 8)]
        return super().sample(n, generator=generator)


def test_a_good_teacher_passes():
    check_teacher(Broken("none"))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("trainable", "frozen"),
        ("train mode", "evaluation mode"),
        ("stride", "instead of"),
        ("global noise", "global generator"),
        ("infinite", "not finite"),
        ("draws of its own", "half of a batch must draw its rows"),
        ("undeclared", "not declared"),
    ],
)
def test_each_fault_is_named(fault, words):
    with pytest.raises(AssertionError, match=words):
        check_teacher(Broken(fault))


def test_task_check():
    student = create_student("test_resnet")
    check_task(lambda s: [("loss", 0.5)], student)
    with pytest.raises(AssertionError, match="at least one"):
        check_task(lambda s: [], student)
    with pytest.raises(AssertionError, match="finite float"):
        check_task(lambda s: [("loss", float("nan"))], student)

    def spoils(s):
        s(torch.rand(2, 3, 64, 64))  # in training mode: BatchNorm statistics move
        yield "loss", 1.0

    student.train()
    with pytest.raises(AssertionError, match="changed the backbone"):
        check_task(spoils, student)
