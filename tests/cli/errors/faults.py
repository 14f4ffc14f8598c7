"""What goes wrong around a command: a full disk, no network, a killed worker."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from dreamteacher.distill.dataset import PartStream
from dreamteacher.distill.step import Distillation
from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.lock import take_lock
from dreamteacher.runtime.run_folder import RunDir
from dreamteacher.teachers.training import diffusion
from dreamteacher.teachers.training import train as train_module
from tests.distill.test_faults import poison_loss, poison_teacher
from tests.teachers.training.test_train import TINY


def little_space(patch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")  # what shutil gives
    patch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 999 * 10**6, 10**6))


def without_s3(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(sys.modules, "s3fs", None)


def without_onnx(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(sys.modules, "onnx", None)


def without_a_network(patch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no network")

    patch.setattr("timm.models._builder.load_pretrained", fail)


def without_torchrun(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("WORLD_SIZE", "2")
    patch.setenv("RANK", "0")
    patch.delenv("MASTER_ADDR", raising=False)


def another_process_writes(patch: pytest.MonkeyPatch) -> None:
    """Another lock object on the file is as good as another process."""
    patch.setattr(another_process_writes, "lock", take_lock(Path("run/.lock")), raising=False)


def out_of_memory(patch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    patch.setattr(Distillation, "losses", fail)


def full_at_the_second_checkpoint(patch: pytest.MonkeyPatch) -> None:
    """What a file system says when it has no block left; `test_a_full_disk` has a real one."""
    write, count = checkpoint.save_file, [0]

    def save_file(*args: Any) -> None:
        count[0] += 1
        if count[0] == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(*args)

    patch.setattr(checkpoint, "save_file", save_file)


def a_bad_block(patch: pytest.MonkeyPatch) -> None:
    def append(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "new/run/metrics.jsonl")

    patch.setattr(RunDir, "append", append)


def a_worker_is_killed(patch: pytest.MonkeyPatch) -> None:
    of = PartStream.of

    def killing(self: PartStream, step: int) -> Any:
        for worker in multiprocessing.active_children() if step == 2 else ():
            worker.kill()
            worker.join()
        return of(self, step)

    patch.setattr(PartStream, "of", killing)


def nan_in_a_map(patch: pytest.MonkeyPatch) -> None:
    poison_teacher(patch, 1, 2)


def nan_loss(patch: pytest.MonkeyPatch) -> None:
    poison_loss(patch, 1)


def full_while_a_teacher_is_trained(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(train_module.PRESETS, "cpu-64", TINY)
    full_at_the_second_checkpoint(patch)


def nan_teacher_loss(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(train_module.PRESETS, "cpu-64", TINY)
    loss = diffusion.epsilon_loss
    patch.setattr(diffusion, "epsilon_loss", lambda *args: loss(*args) * float("nan"))
