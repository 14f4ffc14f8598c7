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
import torch.nn.functional as F
from torch.distributed.nn.functional import all_gather

from dreamteacher.cli import main as cli
from dreamteacher.data import batches as data_batches
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


def normalised_over_all(world: World) -> Any:
    """Within: BatchNorm in training takes its moments over the images of all processes, as SyncBatchNorm on GPUs.

    So a run in two processes can be compared with one in one.
    """
    original = F.batch_norm

    def batch_norm(x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if not (options.get("training") or (len(args) > 4 and args[4])):
            return original(x, *args, **options)
        rows = torch.stack(all_gather(x), 1).flatten(0, 1)
        return original(rows, *args, **options)[world.rows]

    return mock.patch.object(F, "batch_norm", batch_norm)


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
            with contextlib.nullcontext() if who is ALONE else normalised_over_all(who):
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
    base = from_json(PretrainConfig, job["pretrain"])
    world = join("cpu")
    assert world == launched()
    assert world.ranks == 2
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

    with in_float64(), normalised_over_all(world):
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
    with normalised_over_all(world):
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
    with in_float64(), normalised_over_all(launched()):
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
