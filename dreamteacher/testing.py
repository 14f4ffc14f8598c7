"""Public checks of the contracts: run them on a teacher, student or task of your own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from dreamteacher.models.student import Student
from dreamteacher.runtime.distributed.world import ALONE, Draws, World
from dreamteacher.runtime.errors import UserError
from dreamteacher.teachers.base import Teacher
from dreamteacher.teachers.registry import family_of


def check_teacher(teacher: Teacher, *, batch: int = 2) -> None:
    """Proves that a teacher keeps its contract, on random images of its own size.

    Frozen and in evaluation mode whatever is asked; maps have the declared shapes, fine to coarse, are finite
    and carry no gradient; the generator decides every random number and the global state is left alone; half
    of a batch, drawn as one of two processes draws it, has the maps it has in the whole; an undeclared mode raises a
    UserError.

    Args:
        batch: images; an even number.

    Raises:
        AssertionError: saying which part of the contract is broken.

    Example:
        >>> from dreamteacher.teachers.registry import load_teacher
        >>> check_teacher(load_teacher("chest-xray-64"))
    """
    device = next(teacher.parameters()).device
    teacher.train()
    assert not any(m.training for m in teacher.modules()), "train() must leave a teacher in evaluation mode"
    assert not any(p.requires_grad for p in teacher.parameters()), "a teacher's parameters must be frozen"
    assert teacher.modes, "a teacher must declare what it can do"
    assert teacher.modes <= {"encode", "sample"}, f"unknown modes {set(teacher.modes)}"
    strides = [s.stride for s in teacher.specs]
    assert strides == sorted(set(strides)), f"levels must go fine to coarse, not {strides}"
    height, width = teacher.size
    images = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0)).to(device)

    def maps(mode: str, seed: int, world: World = ALONE) -> list[torch.Tensor]:
        generator = Draws(device, seed, world)
        some = images[world.rows]
        if mode == "encode":
            return teacher.encode(some, generator=generator)
        made, found = teacher.sample(len(some), generator=generator)
        assert made.shape == some.shape, f"samples must be {tuple(some.shape)}, not {tuple(made.shape)}"
        assert 0 <= float(made.min()) <= float(made.max()) <= 1, "samples must lie in [0, 1]"
        return [made, *found]

    for mode in ("encode", "sample"):
        if mode not in teacher.modes:
            try:
                maps(mode, 0)
            except UserError:
                continue
            raise AssertionError(f"{mode} is not declared, so it must raise a UserError")
        state = torch.get_rng_state()
        first, again = maps(mode, 1), maps(mode, 1)
        assert torch.equal(state, torch.get_rng_state()), f"{mode} must not draw from the global generator"
        assert all(map(torch.equal, first, again)), f"{mode} must be decided by its generator"
        for spec, m in zip(teacher.specs, first[-len(teacher.specs) :], strict=True):
            expected = spec.shape(batch, teacher.size)
            assert m.shape == expected, f"{mode}, {spec.name}: {tuple(m.shape)} instead of {expected}"
            assert bool(torch.isfinite(m).all()), f"{mode}, {spec.name}: not finite"
            assert not m.requires_grad, f"{mode}, {spec.name}: carries a gradient"
        half = World(1, 2)
        for all_, mine in zip(first, maps(mode, 1, half), strict=True):
            assert torch.allclose(all_[half.rows], mine, rtol=1e-2, atol=1e-3 * float(all_.abs().max())), (
                f"{mode}: half of a batch must draw its rows: use randn, rand, randint of dreamteacher.runtime.distributed.world"
            )


def tiny_teacher(family: str) -> Teacher:
    """A teacher of this family (see `teachers.registry.FAMILIES`) with a small network and seeded random weights.

    Raises:
        KeyError: for a family that is not known.

    Example:
        >>> tiny_teacher("stylegan2").modes
        frozenset({'sample'})
    """
    found = family_of(family)
    weights, spec = found.tiny()
    return found.load(weights, spec, Path("memory"), name=f"tiny-{family}", licence="CC0-1.0")


def check_student(student: Student, *, size: tuple[int, int] = (64, 96), batch: int = 2) -> None:
    """Proves that a student gives the declared maps, that all of its levels train, and that its keys are timm's.

    Raises:
        AssertionError: saying which part of the contract is broken.

    Example:
        >>> from dreamteacher.models.student import create_student
        >>> check_student(create_student("resnet18"))
    """
    device = next(student.parameters()).device
    images = torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)
    student.train()
    maps = student(images)
    for spec, m in zip(student.specs, maps, strict=True):
        expected = spec.shape(batch, size)
        assert m.shape == expected, f"{spec.name}: {tuple(m.shape)} instead of {expected}"
    sum(m.square().mean() for m in maps).backward()
    grads = [p.grad for p in student.parameters() if p.grad is not None]
    assert grads, "nothing has a gradient"
    assert all(bool(torch.isfinite(g).all()) for g in grads), "gradients are not finite"
    assert all(k.startswith("model.") for k in student.state_dict()), (
        "a student holds the timm model and no more"
    )
    student.zero_grad()


def check_task(task: Callable[[Student], Iterable[tuple[str, float]]], backbone: Student) -> None:
    """Proves that a downstream task yields named finite numbers and leaves the backbone bitwise as it was.

    Raises:
        AssertionError: saying which part of the contract is broken.
    """
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    mode = backbone.training
    results = list(task(backbone))
    assert results, "a task must yield at least one (metric, value)"
    for name, value in results:
        assert isinstance(name, str), f"a metric's name must be text, not {name!r}"
        assert isinstance(value, float), f"{name} must be a finite float, not {value!r}"
        assert math.isfinite(value), f"{name} must be a finite float, not {value!r}"
    changed = [k for k, v in backbone.state_dict().items() if not torch.equal(v, before[k])]
    assert not changed, f"the task changed the backbone: {changed[:3]}"
    assert backbone.training == mode, "the task left the backbone in another mode"
