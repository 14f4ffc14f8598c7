"""What each process of test_processes.py runs: several checks in one start, as importing torch takes long."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import json
import operator
import os
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from dreamteacher.cli import main as cli
from dreamteacher.data import batches as data_batches
from dreamteacher.distill import network, plan
from dreamteacher.distill import step as distill_step
from dreamteacher.distill.config import PretrainConfig
from dreamteacher.distill.dataset import FeatureBatch
from dreamteacher.distill.pretrain import pretrain
from dreamteacher.downstream.classification.config import FinetuneConfig
from dreamteacher.downstream.segmentation.config import SegmentConfig
from dreamteacher.models.regressor import FeatureRegressor
from dreamteacher.models.student import create_student
from dreamteacher.runtime.config import from_json
from dreamteacher.runtime.distributed.group import broadcast, join
from dreamteacher.runtime.distributed.world import ALONE, World, launched
from dreamteacher.runtime.run_folder import RunDir
from dreamteacher.teachers.diffusion.teacher import DiffusionTeacher
from dreamteacher.teachers.training import config as training_config
from dreamteacher.teachers.training import train
from dreamteacher.teachers.training.diffusion import DiffusionPreset
from dreamteacher.teachers.training.stylegan2 import StyleGan2Preset
from tests.builders.global_batch_norm import make_global
from tests.builders.steps import Stepper

# Strides 2 to 32 as in cpu-64, in a network that takes milliseconds.
TINY = DiffusionPreset(
    channels=(8, 8, 8, 8, 8), layers=1, attention=(4,), head=8, patch=2, groups=4, resample=False,
    dropout=0.0, size=(64, 64), batch_size=8, lr=1e-4, steps=3, ema=0.8, timestep=100,
)  # fmt: skip
TINY_GAN = StyleGan2Preset(
    channels=(16, 16, 16), z_dim=8, w_dim=8, mapping_layers=2, size=(16, 16), batch_size=8, lr=1e-3,
    gamma=0.3, half_life=100, ada_images=1000, steps=3,
)  # fmt: skip


def prepare(setitem: Callable[[Any, Any, Any], None]) -> None:
    """Tiny presets and few sampling steps, in the test's own process as in the started ones."""
    setitem(train.PRESETS, "cpu-64", TINY)
    setitem(train.PRESETS, "stylegan2-cpu-64", TINY_GAN)
    setitem(DiffusionTeacher.__init__.__kwdefaults__, "sampling_steps", 2)
    for config in (FinetuneConfig, SegmentConfig):  # of the demo, which has no setting for it
        setitem(config.__init__.__kwdefaults__, "steps", 2)


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Within: what is computed in float32 is computed in float64.

    There a run in one process and one in several can be compared after any number of steps. In float32 the order of
    a sum, which differs with the processor, moves a last bit, and training makes of it whatever it likes.
    """

    torch.set_default_dtype(torch.float64)
    try:
        with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def with_global_batch_norm() -> None:
    """In this process: runs on the CPU have BatchNorm over all processes, as they have it on GPUs."""
    network.convert_sync_batchnorm = make_global
    plan._check_batch_norm = lambda *_: None


def check_batch_norm(world: World) -> None:
    """Output, gradients and running moments equal nn.BatchNorm2d's on the whole batch, in float64."""
    generator = torch.Generator().manual_seed(0)
    x = 3 + 2 * torch.randn(8, 5, 6, 4, generator=generator, dtype=torch.float64)
    towards = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    for layout in (torch.contiguous_format, torch.channels_last):
        norms = [nn.Sequential(nn.BatchNorm2d(5, momentum=m), nn.ReLU()).double() for m in (0.1, 0.1)]
        for norm in norms:
            nn.init.uniform_(norm[0].weight, generator=torch.Generator().manual_seed(1))
        make_global(norms[1])
        assert type(norms[1][0]) is not nn.BatchNorm2d
        assert norms[0].state_dict().keys() == norms[1].state_dict().keys()
        whole = x.clone(memory_format=layout).requires_grad_()
        mine = x[world.rows].clone(memory_format=layout).requires_grad_()
        expected, came = norms[0](whole), norms[1](mine)
        (expected * towards).sum().backward()
        (came * towards[world.rows]).sum().backward()
        torch.testing.assert_close(came, expected[world.rows], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(mine.grad, whole.grad[world.rows], rtol=1e-12, atol=1e-12)
        for a, b in zip(norms[0].buffers(), norms[1].buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        for a, b in zip(norms[0].parameters(), norms[1].parameters(), strict=True):
            torch.distributed.all_reduce(b.grad)
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(norms[0].eval()(whole), norms[1].eval()(whole), rtol=1e-12, atol=1e-12)
    half = nn.Sequential(nn.BatchNorm2d(5))
    make_global(half)
    mine = x[world.rows].bfloat16().requires_grad_()
    came = half(mine)
    assert came.dtype == torch.bfloat16
    whole = x.bfloat16().float().requires_grad_()
    expected = nn.BatchNorm2d(5)(whole)
    torch.testing.assert_close(came.float(), expected[world.rows], rtol=1e-2, atol=1e-2)
    towards = (1 + whole.detach() / 2 + towards).bfloat16()  # so that both means of the backward pass count
    came.backward(towards[world.rows])
    expected.backward(towards.float())
    torch.testing.assert_close(mine.grad.float(), whole.grad[world.rows], rtol=2e-2, atol=2e-2)


def check_steps(world: World, base: PretrainConfig) -> None:
    """Gradients of three steps of two parts, and the weights after them, equal those of one process, in float64.

    The student is an EfficientNet: norms with activations, and layers that nothing trains.
    """
    generator = torch.Generator().manual_seed(0)
    config = dataclasses.replace(base, student="test_efficientnet", batch_size=16, accumulate=2, clip=0.0)
    found = []
    for who in (ALONE, world):
        student = create_student(config.student).double()
        student.mean, student.std = student.mean.double(), student.std.double()
        regressor = FeatureRegressor(student.specs, student.specs, width=8).double()
        torch.set_default_dtype(torch.float64)
        training = Stepper(config, student, regressor, 4, world=who)
        generator.manual_seed(0)
        parts: list[FeatureBatch] = []
        seen: dict[str, torch.Tensor | None] = {}
        for step in range(6):
            images = torch.rand(8, 3, 64, 64, generator=generator)
            maps = [torch.randn(s.shape(8, (64, 64)), generator=generator) for s in student.specs]
            parts.append(FeatureBatch(images[who.rows], [m[who.rows] for m in maps], 0.0, step))
        stream = iter(parts)
        for step in range(3):
            training.step(step, stream)
            for name, parameter in training.network.named_parameters():
                gradient = parameter.grad
                seen[f"gradient {step} {name}"] = None if gradient is None else gradient.clone()
        found.append(seen | {k: v.clone() for k, v in training.network.state_dict().items()})
        torch.set_default_dtype(torch.float32)
    alone, together = found
    assert alone.keys() == together.keys()
    assert any(g is None for g in alone.values())
    for key, expected in alone.items():
        other = together[key]
        assert (expected is None) == (other is None), key
        if expected is not None:
            torch.testing.assert_close(
                other, expected, rtol=1e-9, atol=1e-12, msg=lambda m, k=key: f"{k}: {m}"
            )


def main(job: dict) -> None:
    """Everything that two processes show when nothing goes wrong; the last act is an error."""
    torch.set_num_threads(1)
    prepare(operator.setitem)
    with_global_batch_norm()
    base = from_json(PretrainConfig, job["pretrain"])
    world = join("cpu")
    assert world == launched()
    assert world.ranks == 2
    check_batch_norm(world)
    for optimizer in ("adamw", "lamb"):
        check_steps(world, dataclasses.replace(base, optimizer=optimizer))
    root = base.out.parent

    def copies() -> str:
        for name, source in (("two-resumed", root / "two"), ("one-to-two", root / "one")):
            if not (root / name).exists():
                shutil.copytree(source, root / name)
                cut(root / name, job["at"])
        shutil.copytree(root / "two", root / "two-to-one")
        cut(root / "two-to-one", job["at"])
        return ""

    with in_float64():
        pretrain(dataclasses.replace(base, out=root / "two"))
        broadcast(copies)
        pretrain(dataclasses.replace(base, out=root / "two-resumed"))
        pretrain(dataclasses.replace(base, out=root / "one-to-two"))
        for teacher in job["teachers"]:
            config = from_json(training_config.TrainTeacherConfig, teacher)
            train.train_teacher(
                dataclasses.replace(config, out=config.out.with_name(config.out.name + "-two"))
            )
        pretrain(from_json(PretrainConfig, job["recipe"]))
    os.environ.pop("DREAMTEACHER_TRACEBACK", None)
    pretrain(from_json(PretrainConfig, job["first"]))
    assert cli.main(["demo", *job["demo"]]) == 0
    assert cli.main(["make-features", *job["features"]]) == 0
    sys.argv = ["run.py", *job["benchmark"]]
    runpy.run_path(job["script"], run_name="__main__")
    spoil(5)
    cli.main(["pretrain", *job["spoiled"]])
    raise AssertionError("the error should have ended this process")


def cut(run: Path, step: int) -> str:
    """Leaves of a finished run what one that was killed after the checkpoint of `step` would have left."""
    for path in run.glob("checkpoint-*"):
        if int(path.stem.split("-")[1]) > step:
            path.unlink()
    for name in ("backbone", "regressor"):
        (run / f"{name}.safetensors").unlink()
    return ""


def stumble(job: dict) -> None:
    """What happens to one process at a batch; of several events, each in a start of its own."""
    torch.set_num_threads(1)
    with_global_batch_norm()
    original, rank = data_batches.batches, launched().rank
    starts = Path(job["starts"]) / f"rank-{rank}"  # what torchrun counted at each start of this process
    before = len(starts.read_text()) if starts.exists() else 0
    with open(starts, "a") as file:
        file.write(os.environ.get("TORCHELASTIC_RESTART_COUNT", "-"))
    what, at = [*job["events"], (None, None)][before]

    def batches(*args, **kwargs):
        for batch in original(*args, **kwargs):
            if batch.step == at:
                happen(what, rank)
            yield batch

    data_batches.batches = batches
    with in_float64():
        sys.exit(cli.main(job["arguments"]))


def happen(what: str, rank: int) -> None:
    """Does to this process what the event means for its rank."""
    if what == "kill":
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(4)  # its own agent hears of it meanwhile, restarts it, and counts no restart
    if what == "signal" and rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    if what == "memory" and rank == 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
    if what == "full" and rank == 0:
        RunDir.append = full


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def spoil(call: int) -> None:
    """In one process of two, a loss is not a number."""
    original, calls = distill_step.batch_loss, itertools.count(1)

    def spoiled(*args: Any, **options: Any) -> Any:
        found = original(*args, **options)
        ruined = launched().rank == 1 and next(calls) == call
        return found._replace(mse=found.mse * float("nan")) if ruined else found

    distill_step.batch_loss = spoiled


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    stumble(given) if "events" in given else main(given)
