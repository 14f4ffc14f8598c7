"""Every error that a user can make, made for real; tests/golden/errors.md is what was printed.

`DREAMTEACHER_WRITE_DOCS=1 python -m pytest tests/cli/test_errors.py` writes the page anew.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import json
import multiprocessing
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dreamteacher.cli.main import main
from dreamteacher.data.images import read_image
from dreamteacher.distill.dataset import PartStream
from dreamteacher.distill.step import Distillation
from dreamteacher.reports import report
from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.run_folder import RunDir, read_rows, take_lock
from dreamteacher.teachers import registry
from dreamteacher.teachers.training import diffusion
from dreamteacher.teachers.training import train as train_module
from tests.distill.test_faults import poison_loss, poison_teacher
from tests.places import BENCHMARKS, GOLDEN, ROOT
from tests.teachers.stylegan2.test_teacher import tiny as tiny_gan
from tests.teachers.training.test_train import TINY

PAGE = GOLDEN / "errors.md"
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"
BASELINES = BENCHMARKS / "baselines" / "run.py"
SECRET = "dreamteacher-errors-code-ran"


def pretrain(*flags: str, **settings: str) -> list[str]:
    """A small pretraining of the folder `photos`, with other settings where a case names them."""
    base = {
        "images": "photos", "out": "new/run", "teacher": "teacher", "student": "test_resnet", "width": "8",
        "batch-size": "8", "epochs": "1", "warmup-epochs": "0", "device": "cpu", "precision": "float32",
    }  # fmt: skip
    return _command("pretrain", base, settings, flags)


def train(*flags: str, **settings: str) -> list[str]:
    """As `pretrain`, for train-teacher."""
    base = {"images": "photos", "out": "new/teacher", "steps": "2", "batch-size": "2", "device": "cpu"}
    return _command("train-teacher", base, settings, flags)


def classify(*flags: str, **settings: str) -> list[str]:
    """An evaluation on the classes of `photos`."""
    base = {"train": "photos", "test": "photos", "student": "test_resnet", "size": "64 64", "labels": "2"}
    return _command("evaluate", base | {"out": "new/results"}, settings, flags)


def segment(*flags: str, **settings: str) -> list[str]:
    """An evaluation on `masked` images with `masks`."""
    base = {
        "images": "masked",
        "masks": "masks",
        "student": "test_resnet",
        "size": "64 64",
        "mask-counts": "2",
    }
    return _command("evaluate", base | {"out": "new/results"}, settings, flags)


def streamed(task: str, *flags: str, **settings: str) -> list[str]:
    """`semantic` or `readout` on `masked` images with `masks`."""
    base = {"images": "masked", "masks": "masks", "student": "test_resnet", "tasks": task, "device": "cpu"}
    return _command("evaluate", base | {"out": "new/results"}, settings, flags)


def detect(*flags: str, **settings: str) -> list[str]:
    """A detector on the objects in `masked` images."""
    base = {
        "images": "masked",
        "instances": "labels/instances.json",
        "student": "test_resnet",
        "tasks": "detect",
    }
    return _command("evaluate", base | {"device": "cpu", "out": "new/results"}, settings, flags)


def panoptic(*flags: str, **settings: str) -> list[str]:
    """A panoptic FPN on `masked` images with `segments`."""
    base = {"images": "masked", "masks": "segments", "segments": "labels/segments.json", "tasks": "panoptic"}
    base |= {"student": "test_resnet", "device": "cpu", "out": "new/results"}
    return _command("evaluate", base, settings, flags)


def full(task: str, *flags: str, **settings: str) -> list[str]:
    """`linear-sgd` or `finetune-full` on the classes of `photos`."""
    return classify(*flags, **{"tasks": task, "labels": "", "device": "cpu", **settings})


def baseline(*flags: str, **settings: str) -> list[str]:
    """A compared method on the images of `photos`."""
    base = {"images": "photos", "out": "new/baseline", "student": "test_resnet", "device": "cpu"}
    base |= {"batch-size": "8", "images-seen": "16", "size": "64 64", "workers": "0"}
    return _command(str(BASELINES), base, settings, flags)


def get(*flags: str, **settings: str) -> list[str]:
    """get-teacher into a folder of this world."""
    return _command("get-teacher", {"out": "new/got"}, settings, flags)


def inspect(*flags: str, **settings: str) -> list[str]:
    """A small inspection of the folder `photos`."""
    base = {"images": "photos", "teacher": "teacher", "labels": "2", "out": "new/inspected", "t": "50"}
    return _command("inspect", base, settings, flags)


def interpret(*flags: str, **settings: str) -> list[str]:
    """An interpreter trained on `masked` images with `masks`."""
    base = {
        "images": "masked", "masks": "masks", "teacher": "teacher", "out": "new/interpreter", "epochs": "1",
        "warmup-epochs": "0", "width": "16", "device": "cpu",
    }  # fmt: skip
    return _command("train-interpreter", base, settings, flags)


def label(*flags: str, **settings: str) -> list[str]:
    """A folder of images labelled by an interpreter."""
    base = {"interpreter": "interpreter", "images": "photos", "out": "new/labels"}
    return _command("make-labels", base, settings, flags)


def _command(verb: str, base: dict[str, str], settings: dict[str, str], flags: tuple[str, ...]) -> list[str]:
    command = [verb]
    for name, value in (base | {k.replace("_", "-"): v for k, v in settings.items()}).items():
        command += [f"--{name}", *value.split()] if value else []
    return [*command, *flags]


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


class Lock:
    """That of the run in `run`, held until this is forgotten: another open file is as good as another process."""

    def __init__(self) -> None:
        self.file = os.open("run/.lock", os.O_RDWR)
        assert take_lock(self.file, Path("run"))

    def __del__(self) -> None:
        os.close(self.file)


def another_process_writes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(another_process_writes, "lock", Lock(), raising=False)


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


@dataclass(frozen=True, kw_only=True)
class Case:
    """What happened, in words; the command that makes it happen; words that must be printed.

    `kept` is False for the errors that come in the middle of a run, whose checkpoints stay.
    """

    what: str
    command: list[str]
    says: tuple[str, ...]
    patch: Callable[[pytest.MonkeyPatch], None] | None = None
    kept: bool = True


def case(what: str, command: list[str], *says: str, **more: Any) -> Case:
    return Case(what=what, command=command, says=says, **more)


SECTIONS: dict[str, list[Case]] = {
    "The command line": [
        case("An unknown verb", ["pretrian"], "Did you mean 'pretrain'?"),
        case(
            "An unknown setting", pretrain("--epoch", "3"), "'pretrain' has no setting --epoch. Did you mean"
        ),
        case("An unknown setting of a part", classify("--finetune.step", "3"), "'--finetune.steps'"),
        case("A setting is missing", ["pretrain", "--images", "photos"], "'pretrain' needs --out"),
        case(
            "A word where a number is wanted", pretrain(epochs="many"), "--epochs takes a number, not 'many'"
        ),
        case("A fraction where a whole number is wanted", pretrain(seed="1.5"), "whole number", "'1.5'"),
        case("One number where two are wanted", pretrain(size="64"), "--size takes INT INT, not '64'"),
        case("An unknown value", pretrain(whiten="chv"), "--whiten cannot be 'chv'. Did you mean 'chw'?"),
        case("An unknown preset", train(preset="cpu64"), "Did you mean 'cpu-64'?"),
        case("An unknown task", classify(tasks="knnn"), "Did you mean 'knn'?", "segment-frozen"),
        case("An unknown list", ["list", "student"], "'students'"),
        case("A name that no list has", ["list", "students", "--filter", "qqq"], "contains 'qqq'"),
        case("An unknown student", pretrain(student="resnet81"), "Did you mean 'resnet"),
        case(
            "A student without a pyramid of maps",
            pretrain(student="xcit_nano_12_p8_224"),
            "cannot be a student",
        ),
        case("An unknown teacher", pretrain(teacher="chest-xray-46"), "Did you mean 'chest-xray-64'?"),
        case("An unknown device", pretrain(device="warp"), "'warp'", "doctor"),
        case("A GPU that torch does not see", pretrain(device="cuda:99"), "'cuda:99'", "doctor"),
        case("A number out of its range", pretrain(lr="-1"), "--lr must be above 0"),
        case(
            "A timestep that the teacher does not have", pretrain(t="5000"), "Timestep 5000 is out of range"
        ),
        case("A batch that cannot be split so", pretrain(accumulate="3"), "does not divide"),
        case("LAMB on parts of weights", pretrain(optimizer="lamb", sharding="both"), "needs whole weights"),
        case("A teacher that sees fewer than no images", pretrain(teacher_batch="-1"), "below 0"),
        case(
            "A GPU that has no memory for two images at a time",
            pretrain(),
            "Step 1 runs out of memory in parts of 2 images",
            "--width",
            patch=out_of_memory,
            kept=False,
        ),
        case(
            "Several processes that torchrun did not start",
            pretrain(),
            "2 processes could not meet",
            patch=without_torchrun,
        ),
        case("Pretraining without images", pretrain(images=""), "--images FOLDER"),
        case("Evaluation without data", classify(train="", test=""), "nothing to evaluate on"),
    ],
    "Images": [
        case("A missing folder", pretrain(images="nowhere"), "'nowhere' does not exist"),
        case("A file instead of a folder", pretrain(images="notes.txt"), "'notes.txt' is a file"),
        case("An empty folder", pretrain(images="empty"), "No images in 'empty'"),
        case(
            "A folder whose files are all damaged", pretrain(images="damaged"), "3 of 3 images in 'damaged'"
        ),
        case("`--strict` and a corrupt file", pretrain("--strict", images="corrupt"), "1 of 17", "bad.png"),
        case("`--strict` and a truncated file", pretrain("--strict", images="truncated"), "(truncated)"),
        case("`--strict` and a file of no bytes", pretrain("--strict", images="zero"), "(empty file)"),
        case("`--strict` and a text named .jpg", pretrain("--strict", images="text"), "(not an image"),
        case("`--strict` and a huge image", pretrain("--strict", images="huge"), "60000 x 60000"),
        case("`--strict`, another verb", train("--strict", images="text"), "bad.jpg (not an image"),
        case("A batch larger than the set", pretrain(batch_size="64"), "A batch of 64", "16 readable images"),
        case("The same, another verb", train(batch_size="64"), "A batch of 64", "16 readable images"),
        case(
            "A size that the teacher cannot take", pretrain(size="60 64"), "multiples of 32", "--size 64 64"
        ),
        case("A size that the preset cannot take", train(size="64 72"), "multiples of 32"),
        case("A size that no student can take", classify(size="64 60"), "multiples of 32"),
    ],
    "Weights": [
        case("No such file", pretrain(init="weights/none.pth"), "weights/none.pth"),
        case(
            "ImageNet's weights without a network",
            pretrain(init="imagenet", student="resnet18"),
            "cannot be fetched",
            patch=without_a_network,
        ),
        case(
            "A safetensors file of something else",
            pretrain(init="weights/foreign.safetensors"),
            "does not fit",
        ),
        case("A truncated file", pretrain(init="weights/cut.safetensors"), "not a readable safetensors file"),
        case(
            "Weights of another architecture",
            pretrain(init="weights/other.safetensors"),
            "missing",
            "unexpected",
        ),
        case(
            "A run of another student",
            pretrain(init="run", student="test_efficientnet"),
            "holds a test_resnet",
        ),
        case(
            "A pickle with code in it", pretrain(init="weights/code.pth"), "more than tensors", "state_dict()"
        ),
        case("A run that has not finished", classify(init="unfinished"), "has not finished"),
        case("A folder without a teacher", pretrain(teacher="empty"), "holds no teacher"),
        case("Damaged weights of a teacher", pretrain(teacher="teacher-damaged"), "sha256 differs"),
        case("A damaged teacher.json", pretrain(teacher="teacher-card"), "teacher.json' cannot be read"),
        case(
            "A teacher.json of another network", pretrain(teacher="teacher-other"), "does not fit the network"
        ),
    ],
    "Teachers": [
        case(
            "A published teacher that is not here yet",
            pretrain(teacher="adm-imagenet-256"),
            "get-teacher adm-imagenet-256",
            "Without a network",
        ),
        case("An unknown published teacher", get("adm-imagnet-256"), "Did you mean 'adm-imagenet-256'?"),
        case(
            "Its file is not there", get("adm-imagenet-256", file="nowhere.pt"), "'nowhere.pt' does not exist"
        ),
        case(
            "Its file is damaged",
            get("adm-imagenet-256", file="weights/cut.safetensors"),
            "cannot be read as plain weights",
        ),
        case("Its file is another one", get("adm-lsun-cat", file="weights/foreign.safetensors"), "foreign"),
        case(
            "Its file is not the one that was meant",
            get("adm-lsun-cat", file="weights/foreign.safetensors", sha256="0" * 64),
            "sha256",
        ),
        case(
            "A StyleGAN2 pickle that would run a command",
            get("mine", kind="stylegan2", file="hostile.pkl"),
            "os.system",
        ),
        case(
            "An unknown flag of a published network",
            get("mine", like="adm-lsun-cat", settings="heads=4", file="weights/foreign.safetensors"),
            "heads",
        ),
        case("An IC-GAN without images of one's own", get("icgan-256"), "--bank-images"),
        case(
            "A GAN asked for the maps of images",
            pretrain(teacher="gan"),
            "cannot make a dataset that is encoded",
            "--dataset synthesized",
        ),
        case(
            "A GAN asked for another size",
            pretrain(teacher="gan", dataset="synthesized", size="32 32"),
            "images of 64 x 64",
        ),
        case(
            "Both kinds with no room for a kind",
            pretrain(dataset="both", synthesized_fraction="0.01"),
            "--synthesized-fraction",
        ),
        case("A file of one's own that is not there", pretrain(teacher="gone.py:teacher"), "gone.py"),
        case(
            "A function that it does not have", pretrain(teacher="own.py:techer"), "Did you mean 'teacher'?"
        ),
        case("A function that gives no teacher", pretrain(teacher="own.py:number"), "own.py"),
        case("A function that fails", pretrain(teacher="own.py:fails"), "own.py", "ZeroDivisionError"),
        case("Inspecting a GAN's maps of images", inspect(teacher="gan"), "its own samples are inspected"),
        case("More labels than a class has, inspecting", inspect(labels="8"), "too few for --labels 8"),
        case(
            "A setting of the other family",
            train("--schedule", "cosine", preset="stylegan2-cpu-64"),
            "a setting of diffusion teachers",
        ),
        case("The same, the other way round", train("--gamma", "1"), "a setting of StyleGAN2 teachers"),
    ],
    "The run folder": [
        case("It is a file", pretrain(out="notes.txt"), "'notes.txt' is a file, not a folder"),
        case("It lies below a file", pretrain(out="notes.txt/run"), "'notes.txt' is a file, not a folder"),
        case("It holds something else", pretrain(out="thesis"), "'thesis' is not empty and is no run folder"),
        case("The same, another verb", train(out="thesis"), "'thesis' is not empty and is no run folder"),
        case("It holds a run of another verb", train(out="run"), "holds a run of 'pretrain'"),
        case("Other settings than it was started with", pretrain(out="run", lr="1e-3"), "lr: 0.004 -> 0.001"),
        case("A foreign checkpoint in it", pretrain(out="run-foreign"), "not one that dreamteacher wrote"),
        case("A checkpoint of another network in it", pretrain(out="run-other"), "does not fit the network"),
        case("A checkpoint of another verb in it", pretrain(out="run-verb"), "checkpoint of 'train-teacher'"),
        case("All its checkpoints are damaged", pretrain(out="run-garbage"), "None of the checkpoints"),
        case(
            "Its one checkpoint was altered", pretrain(out="run-altered"), "has changed since it was written"
        ),
        case("Results into a file", classify(out="notes.txt"), "notes.txt"),
        case("The disk is too small, seen at the start", pretrain(), "1 MB free", patch=little_space),
        case("The same, another verb", train(), "1 MB free", patch=little_space),
        case(
            "The disk becomes full in the middle",
            pretrain(save_every="1"),
            "the disk is full",
            "resumes",
            patch=full_at_the_second_checkpoint,
            kept=False,
        ),
        case(
            "The same, another verb",
            train(save_every="1", steps="3"),
            "the disk is full",
            patch=full_while_a_teacher_is_trained,
            kept=False,
        ),
        case("A disk fails in the middle", pretrain(), "A disk fails", patch=a_bad_block, kept=False),
        case(
            "A process that decodes images is killed",
            pretrain(cache_gb="0", workers="1", epochs="4"),
            "has died",
            "resumes",
            patch=a_worker_is_killed,
            kept=False,
        ),
        case(
            "The teacher gives NaN",
            pretrain(),
            "The teacher's map s8 is not finite at step 2",
            patch=nan_in_a_map,
            kept=False,
        ),
        case(
            "The loss becomes NaN", pretrain(), "The loss is not finite at step 1", patch=nan_loss, kept=False
        ),
        case(
            "The same, another verb",
            train(),
            "The loss is not finite at step 1",
            patch=nan_teacher_loss,
            kept=False,
        ),
        case(
            "Another process is writing to it",
            pretrain(out="run", save_every="1"),
            "Another process is writing",
            patch=another_process_writes,
        ),
        case(
            "Export without its extra",
            ["export", "--run", "run", "--out", "new/export", "--format", "onnx"],
            "dreamteacher[onnx]",
            patch=without_onnx,
        ),
        case("Export of a missing run", ["export", "--run", "nowhere"], "No run folder at 'nowhere'"),
        case("Export of an unfinished run", ["export", "--run", "unfinished"], "has not finished"),
        case(
            "Export into another folder's files", ["export", "--run", "run", "--out", "thesis"], "thesis.txt"
        ),
        case("A report on nothing", ["report", "--run", "empty"], "'empty' holds no run"),
    ],
    "Labels and masks": [
        case("More labels than images", classify(labels="100"), "100 labels per class", "has 8 images"),
        case("A folder without classes", classify(train="masked"), "'masked' is not sorted into classes"),
        case(
            "Other classes to test on", classify(test="animals"), "Classes of 'photos' and 'animals' differ"
        ),
        case("More masks than there are", segment(mask_counts="100"), "100 labelled images", "2 to 4"),
        case("No masks given", segment(masks=""), "Give both --images and --masks"),
        case("A mask without an image", segment(masks="masks-alone"), "lonely.png"),
        case("A mask of another shape", segment(masks="masks-oblong"), "64 x 64 and its mask 32 x 64"),
        case("Masks in colours", segment(masks="masks-rgb"), "no class ids", "RGB"),
        case("Black and white masks as ids", segment(masks="masks-empty"), "at least two classes"),
    ],
    "The label branch": [
        case("A mask of another shape", interpret(masks="masks-oblong"), "64 x 64 and its mask 32 x 64"),
        case("A mask without an image", interpret(masks="masks-alone"), "lonely.png"),
        case("Masks in colours", interpret(masks="masks-rgb"), "no class ids", "RGB"),
        case("Palettes that differ", interpret(masks="masks-palettes"), "palette", "1.png"),
        case("Unknown classes", interpret("--class-count", "2", masks="masks-unknown"), "3.png (7)"),
        case(
            "Unknown classes in .npy files", interpret("--class-count", "2", masks="masks-npy"), "2.npy (9)"
        ),
        case("A .npy file that holds objects", interpret(masks="masks-npy-objects"), "0.npy"),
        case("A JSON file that is none", interpret(masks="labels/broken.json"), "broken.json"),
        case("A JSON file whose images are missing", interpret(masks="labels/missing.json"), "gone.png"),
        case("A JSON file of unknown categories", interpret(masks="labels/category.json"), "categor"),
        case("More labels than there are", interpret("--labels", "100"), "100 labelled images", "1 to 8"),
        case("No labels at all", interpret(masks=""), "not sorted into at least two subfolders"),
        case("A GAN's maps of images that it did not draw", interpret(teacher="gan"), "samples.json"),
        case("A block that the network does not have", interpret("--blocks", "3", "99"), "has 0 to 9"),
        case("Blocks of another family", interpret("--blocks", "1", teacher="gan"), "Leave out --blocks"),
        case("A mode without labels", pretrain(distill="mixed"), "--interpreter FOLDER"),
        case("Labels without a mode", pretrain(interpreter="interpreter"), "--distill mixed"),
        case(
            "An interpreter of another teacher",
            pretrain(distill="mixed", interpreter="interpreter", teacher="teacher-two"),
            "another teacher",
        ),
        case(
            "An interpreter of other timesteps",
            pretrain(distill="mixed", interpreter="interpreter", t="50 150"),
            "--t 100",
        ),
        case(
            "An unfinished interpreter",
            pretrain(distill="mixed", interpreter="empty"),
            "holds no finished interpreter",
        ),
        case(
            "Bad masks in the one command",
            pretrain(distill="mixed", labelled="masked", masks="masks-rgb"),
            "no class ids",
        ),
        case(
            "A neck of a run that has none",
            segment("--neck", init="weights/other.safetensors", student="test_efficientnet"),
            "regressor",
        ),
        case(
            "A label head of a run that has none", segment(tasks="distilled", init="run"), "head.safetensors"
        ),
        case("Nothing that labels", label(interpreter=""), "0 are given"),
        case(
            "Samples of a student",
            label(interpreter="", run="run", images="", samples="4"),
            "draws no samples",
        ),
        case("A teacher alone", label(interpreter="", teacher="gan"), "labels nothing"),
    ],
    "Detection, segmentation and classification at full size": [
        case("No instances given", detect(instances=""), "Give both --images and --instances"),
        case(
            "Instances that are not there", detect(instances="nowhere.json"), "no instances at 'nowhere.json'"
        ),
        case("Instances in colours", detect(instances="masks-rgb"), "instance PNGs", "number of each pixel"),
        case("PNGs that show no object", detect(instances="masks-empty"), "shows an object"),
        case(
            "Test instances of other categories",
            detect(test_images="masked", test_instances="labels/instances-other.json"),
            "instances differ",
        ),
        case("Test images without instances", detect(test_images="masked"), "Give --test-instances too"),
        case("More images than show an object", detect("--detect.image-counts", "100"), "100", "2 to 4"),
        case("Sides in falling order", detect("--detect.short-side", "96", "64"), "96 to 64"),
        case("No masks for `semantic`", streamed("semantic", masks=""), "Give both --images and --masks"),
        case("Masks in colours for it", streamed("semantic", masks="masks-rgb"), "no class ids"),
        case(
            "More masks than there are",
            streamed("semantic", "--semantic.mask-counts", "100"),
            "100 labelled images asked for",
        ),
        case("A share above 1", streamed("semantic", "--semantic.overlap", "1.5"), "overlap is 1.5"),
        case("Crops that no network fits", streamed("semantic", "--semantic.crops.size", "50", "64"), "50"),
        case("A stride that no level has", streamed("readout", "--readout.stride", "7"), "stride is 7"),
        case(
            "No room for checkpoints of a long training", streamed("readout"), "1 MB free", patch=little_space
        ),
        case("Time that runs backwards", streamed("readout", save_minutes="-1"), "save_minutes is -1"),
        case("No segments", panoptic(segments=""), "Give --images, --masks and --segments"),
        case("Segments that are none", panoptic(segments="labels/instances.json"), "panoptic format"),
        case("Segments whose PNGs are missing", panoptic(masks="masks-alone"), "cannot be used"),
        case("Segments without things", panoptic(), "classes of things and of stuff"),
        case("Classes without subfolders", full("linear-sgd", train="masked"), "is not sorted into classes"),
        case("A momentum of 1", full("linear-sgd", "--linear-sgd.momentum", "1"), "momentum is 1"),
        case(
            "A policy that timm does not know",
            full("finetune-full", "--finetune-full.rand-augment", "random"),
            "no augmentation policy 'random'",
        ),
        case(
            "Parts that a batch does not have",
            full("finetune-full", "--finetune-full.batch-size", "10", "--finetune-full.accumulate", "4"),
            "no 4 even parts",
        ),
        case(
            "Fewer images than parts",
            full("finetune-full", "--finetune-full.accumulate", "16"),
            "16 training images make no 16 even parts",
        ),
        case(
            "Stochastic depth that a network has not",
            full("finetune-full", student="ghostnet_050"),
            "no stochastic depth",
        ),
        case("A compared method without a whole batch", baseline(images_seen="4"), "make no batch of 8"),
        case(
            "Its batch is larger than the folder", baseline(batch_size="64", images_seen="64"), "16 readable"
        ),
        case("Its folder holds something else", baseline(out="thesis"), "is no run folder"),
    ],
    "Public data sets": [
        case(
            "A layout that does not exist", segment(images="ade2k:photos", masks=""), "Did you mean 'ade20k'?"
        ),
        case("A layout without a root", segment(images="ade20k:", masks=""), "names a layout and no root"),
        case(
            "A root that is not there", segment(images="cityscapes:nowhere", masks=""), "nowhere", "Expected"
        ),
        case("A root that lacks a part", classify(train="imagenet:photos", test=""), "as it is downloaded"),
        case("Masks beside a layout", segment(images="ade20k:photos"), "comes with its masks"),
        case("A layout without masks", segment(images="ffhq:photos", masks=""), "has no masks of classes"),
        case("One without panoptic segments", panoptic(images="ade20k:photos"), "has no panoptic segments"),
        case("A folder without shards", pretrain(images="shards:photos"), "No .tar files"),
        case("Compressed shards", pretrain(images="shards:shards-packed"), "are compressed"),
        case("A shard that is cut off", pretrain(images="shards:shards-cut"), "no whole tar file"),
        case("A shard that leads out of itself", pretrain(images="shards:shards-hostile"), "leads out of it"),
        case("A shard of links", pretrain(images="shards:shards-links"), "is a link"),
        case("Shards without images", pretrain(images="shards:shards-empty"), "No images"),
        case(
            "Shards of which some are missing",
            pretrain(images="shards:shards-empty/{0..4}.tar"),
            "4 of 5 shards",
        ),
        case("A brace that is not closed", pretrain(images="shards:s3://bucket/{0..9.tar"), "brace"),
        case("A range that runs backwards", pretrain(images="shards:s3://bucket/{9..0}.tar"), "backwards"),
        case(
            "A folder at an address",
            pretrain(images="shards:https://localhost/shards/"),
            "no address of a .tar",
        ),
        case(
            "A shard that is not there",
            pretrain(images="shards:memory://bucket/{0..1}.tar"),
            "There is no 'memory",
        ),
        case(
            "A store whose library is missing",
            pretrain(images="shards:s3://bucket/0.tar"),
            "dreamteacher[remote]",
            patch=without_s3,
        ),
    ],
    "Presets": [
        case("An unknown preset", classify(preset="imagenet-a1"), "Did you mean 'imagenet-a2'?"),
        case(
            "A preset of another task", classify(preset="imagenet-linear", tasks="knn"), "one of linear-sgd"
        ),
    ],
}
CASES = {(section, c.what): c for section, cases in SECTIONS.items() for c in cases}


# --- the world that the commands run in ------------------------------------------------------------------


def noise(seed: int, high: int = 256) -> Image.Image:
    """64 x 64 grey pixels from 0 to below `high`."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, high, (64 * 64,), generator=generator, dtype=torch.uint8)
    return Image.frombytes("L", (64, 64), bytes(pixels.tolist()))


def damaged(kind: str, good: bytes) -> bytes:
    """A file with one kind of damage."""
    match kind:
        case "corrupt":  # a flipped byte in the compressed pixels
            at = good.index(b"IDAT") + 4
            return good[:at] + bytes([good[at] ^ 0xFF]) + good[at + 1 :]
        case "truncated":
            return good[: len(good) // 2]
        case "zero":
            return b""
        case "text":
            return b"this is no picture\n"
    assert kind == "huge"  # a header that announces 3.6 gigapixels
    import struct
    import zlib

    header = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    end = b"".join(struct.pack(">I", 0) + t + struct.pack(">I", zlib.crc32(t)) for t in (b"IDAT", b"IEND"))
    return good[:8] + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + end


OWN = """
from dreamteacher.teachers.registry import load_teacher


def teacher():
    return load_teacher("teacher")


def number():
    return 7


def fails():
    return 1 / 0
"""


class Code:
    """Unpickling this runs a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {SECRET}",)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, image_folder: Path) -> Path:
    """Folders of every kind, good and bad. The commands run here and must leave it as it is."""
    root = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.chdir(root)
        patch.setattr(report, "write_report", lambda run, **_: run)  # it is not what is tested here
        _images(image_folder)
        _teachers(tiny_teacher)
        Path("notes.txt").write_text("notes")
        Path("thesis").mkdir()
        Path("thesis/thesis.txt").write_text("years of work")
        assert main(pretrain(out="run", save_every="1")) == 0
        assert main(interpret(out="interpreter")) == 0
        _runs()
        _weights()
    return root


def _images(source: Path) -> None:
    shutil.copytree(source, "photos")
    shutil.copytree(source, "animals")
    Path("animals/bright").rename("animals/cats")
    Path("empty").mkdir()
    Path("empty/readme.txt").write_text("nothing here")
    good = Path("photos/dark/0.png").read_bytes()
    Path("damaged").mkdir()
    for kind in ("corrupt", "truncated", "zero", "text", "huge"):
        shutil.copytree(source, kind)
        name = f"bad.{'jpg' if kind == 'text' else 'png'}"
        Path(kind, "dark", name).write_bytes(damaged(kind, good))
        if kind in ("truncated", "zero", "text"):
            Path("damaged", f"{kind}.png").write_bytes(damaged(kind, good))
    folders = ("masked", "masks", "masks-alone", "masks-oblong", "masks-rgb", "masks-empty")
    for folder in folders:
        Path(folder).mkdir()
    for i in range(8):
        noise(i).save(f"masked/{i}.png")
        mask = noise(100 + i, 2)
        for folder in folders[1:]:
            mask.save(f"{folder}/{i}.png")
        mask.convert("RGB").save(f"masks-rgb/{i}.png")
        Image.new("L", (64, 64)).save(f"masks-empty/{i}.png")
    _label_files()
    mask.save("masks-alone/lonely.png")
    mask.resize((32, 64)).save("masks-oblong/3.png")


def _label_files() -> None:
    """Masks that look right at first sight."""
    import numpy as np

    for kind in ("palettes", "unknown", "npy", "npy-objects"):
        Path(f"masks-{kind}").mkdir()
    for i in range(8):
        ids = noise(100 + i, 2)
        coloured = ids.copy()
        coloured.putpalette([0, 0, 0, 255 - i, i, 0])
        coloured.save(f"masks-palettes/{i}.png")
        (ids.point(lambda v: v * 7) if i == 3 else ids).save(f"masks-unknown/{i}.png")
        array = np.asarray(ids).astype(np.int64)
        np.save(f"masks-npy/{i}.npy", array * 9 if i == 2 else array)
        np.save(f"masks-npy-objects/{i}.npy", np.array([None, {}], dtype=object))
    Path("labels").mkdir()
    Path("labels/broken.json").write_text("{ not json")
    image = {"id": 1, "file_name": "0.png", "width": 64, "height": 64}
    box = {
        "id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "bbox": [4, 4, 20, 20], "area": 400,
        "segmentation": [[4, 4, 24, 4, 24, 24, 4, 24]],
    }  # fmt: skip
    good = {"images": [image], "annotations": [box], "categories": [{"id": 1, "name": "thing"}]}
    missing = good | {"images": [image | {"file_name": "gone.png"}]}
    Path("labels/missing.json").write_text(json.dumps(missing))
    category = good | {"annotations": [box | {"category_id": 5}]}
    Path("labels/category.json").write_text(json.dumps(category))
    images = [image | {"id": 1 + i, "file_name": f"{i}.png"} for i in range(8)]
    boxes = [box | {"id": 1 + i, "image_id": 1 + i} for i in range(8)]
    for name, thing in (("instances", "thing"), ("instances-other", "animal")):
        categories = [{"id": 1, "name": thing}]
        content = {"images": images, "annotations": boxes, "categories": categories}
        Path(f"labels/{name}.json").write_text(json.dumps(content))
    Path("segments").mkdir()
    segments = []
    for i in range(8):
        Image.new("RGB", (64, 64), (1, 0, 0)).save(f"segments/{i}.png")
        info = {"id": 1, "category_id": 1}
        segments.append({"image_id": 1 + i, "file_name": f"{i}.png", "segments_info": [info]})
    stuff = [{"id": 1, "name": "sky", "isthing": 0}, {"id": 2, "name": "ground", "isthing": 0}]
    content = {
        "images": images,
        "annotations": segments,
        "categories": stuff,
    }
    Path("labels/segments.json").write_text(json.dumps(content))
    _shards()


def _shards() -> None:
    """Folders of tar files, each with one thing wrong."""
    for kind in ("packed", "cut", "hostile", "links", "empty"):
        Path(f"shards-{kind}").mkdir()
        with tarfile.open(f"shards-{kind}/0.tar.gz" if kind == "packed" else f"shards-{kind}/0.tar",
                          "w:gz" if kind == "packed" else "w") as tar:  # fmt: skip
            if kind == "empty":
                tar.add("labels/broken.json", "0.txt")
            elif kind == "links":
                link = tarfile.TarInfo("0.png")
                link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(link)
            else:
                tar.add("photos/dark/0.png", "../../0.png" if kind == "hostile" else "0.png")
    whole = Path("shards-cut/0.tar").read_bytes()
    Path("shards-cut/0.tar").write_bytes(whole[:2000])


def _teachers(tiny: Path) -> None:
    for name in ("teacher", "teacher-damaged", "teacher-card", "teacher-other"):
        shutil.copytree(tiny, name)
    damaged_weights = bytearray(Path("teacher/teacher.safetensors").read_bytes())
    damaged_weights[-100] ^= 1
    Path("teacher-damaged/teacher.safetensors").write_bytes(damaged_weights)
    text = Path("teacher/teacher.json").read_text()
    Path("teacher-card/teacher.json").write_text(text[: len(text) // 2])
    card = registry.read_card(Path("teacher"))
    weights = {k: v + 1 for k, v in load_file("teacher/teacher.safetensors").items()}
    spec = registry.read_spec(Path("teacher"), card)
    Path("teacher-two").mkdir()
    registry.save_teacher(Path("teacher-two"), weights, spec, {"name": "two", "licence": "CC0-1.0"})
    Path("gan").mkdir()
    tiny_gan(Path("gan"))
    shutil.copyfile(GOLDEN / "hostile_os_system.pkl", "hostile.pkl")
    Path("own.py").write_text(OWN)
    Path("teacher-other/teacher.json").write_text(
        text.replace('"layers_per_block": 1', '"layers_per_block": 2')
    )


def _runs() -> None:
    for name in ("foreign", "other", "verb", "garbage", "altered"):
        shutil.copytree("run", f"run-{name}")
    newest = "checkpoint-00000002.safetensors"
    tensors, meta = checkpoint.load(Path("run", newest))
    save_file({"a": torch.zeros(3)}, Path("run-foreign", newest))
    fewer = {k: v for k, v in tensors.items() if "layer4" not in k}
    checkpoint.save(Path("run-other", newest), fewer, meta)
    checkpoint.save(Path("run-verb", newest), tensors, meta | {"kind": "train-teacher"})
    for path in Path("run-garbage").glob("checkpoint-*"):
        path.write_bytes(b"garbage")
    Path("run-altered/checkpoint-00000001.safetensors").unlink()
    altered = bytearray(Path("run", newest).read_bytes())
    altered[-100] ^= 1
    Path("run-altered", newest).write_bytes(altered)
    shutil.copytree("run", "unfinished")
    Path("unfinished/backbone.safetensors").unlink()


def _weights() -> None:
    Path("weights").mkdir()
    whole = Path("run/backbone.safetensors").read_bytes()
    Path("weights/cut.safetensors").write_bytes(whole[: len(whole) // 2])
    save_file({"a": torch.zeros(3)}, "weights/foreign.safetensors")
    from dreamteacher.models.student import create_student

    state = create_student("test_efficientnet").model.state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, "weights/other.safetensors")
    torch.save({"state_dict": {"a": torch.zeros(3)}, "optimizer": Code()}, "weights/code.pth")


def contents(root: Path) -> dict[str, str]:
    """Every file and folder with a digest of its bytes."""
    return {str(p.relative_to(root)): _digest(p) if p.is_file() else "folder" for p in root.rglob("*")}


def _digest(path: Path) -> str:
    stat = path.stat()
    return _digest_once(path, (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))


@functools.cache  # a file that nothing has touched is not read again
def _digest_once(path: Path, _state: tuple[int, ...]) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- what is printed -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    code: int | None
    out: str
    err: str
    before: dict[str, str]
    after: dict[str, str]


def run_command(command: list[str], patch: pytest.MonkeyPatch) -> int | None:
    """The exit code of `dreamteacher`, or of a script, run here; in a process of its own where it is one of several."""
    if "WORLD_SIZE" in os.environ:  # its error ends the process
        done = subprocess.run(
            [sys.executable, "-m", "dreamteacher", *command], capture_output=True, text=True
        )
        sys.stdout.write(done.stdout)
        sys.stderr.write(done.stderr)
        return done.returncode
    if not command[0].endswith(".py"):
        return main(command)
    patch.setattr(sys, "argv", command)
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture(scope="module")
def provoke(world: Path, tiny_teacher: Path) -> Callable[[Case], Outcome]:
    """Runs a case once, in the world, and keeps what came of it."""
    outcomes: dict[int, Outcome] = {}

    def run(c: Case) -> Outcome:
        if id(c) not in outcomes:
            out, err = io.StringIO(), io.StringIO()
            before = contents(world)
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(world)
                patch.delenv("DREAMTEACHER_TRACEBACK", raising=False)
                patch.setenv("DREAMTEACHER_CACHE", "cache")
                # The embedded teacher's name is all that is needed of it here.
                patch.setattr(registry, "EMBEDDED", {"chest-xray-64": tiny_teacher})
                if c.patch:
                    c.patch(patch)
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                    code = run_command(c.command, patch)
            outcomes[id(c)] = Outcome(code, out.getvalue(), err.getvalue(), before, contents(world))
            if not c.kept:
                shutil.rmtree(world / "new")
        return outcomes[id(c)]

    return run


@pytest.mark.parametrize("key", CASES, ids=lambda key: f"{key[0]}-{key[1]}".lower().replace(" ", "_"))
def test_error(key: tuple[str, str], provoke: Callable[[Case], Outcome]) -> None:
    c = CASES[key]
    it = provoke(c)
    assert it.code == 2, it
    lines = it.err.splitlines()
    assert it.err.startswith("error: "), it.err
    assert 2 <= len(lines) <= 3, it.err  # what is wrong, and what to do
    assert all(line.strip() for line in lines)
    assert all(len(line) < 400 for line in lines)
    assert "Traceback" not in it.out + it.err
    for words in c.says:
        assert words in it.err, it.err
    if c.kept:
        assert it.after == it.before  # nothing is made, nothing is touched
    assert not any(SECRET in name for name in it.after)  # no code of a file ran


def test_traceback_only_when_asked_for(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dreamteacher.runtime.errors import UserError

    monkeypatch.chdir(world)
    monkeypatch.setenv("DREAMTEACHER_TRACEBACK", "1")
    with pytest.raises(UserError, match="nowhere"):
        main(pretrain(images="nowhere"))


# --- a disk that is really full --------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MB, on which two checkpoints find room."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(place)]
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("only root can mount a small file system")
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this machine does not let root mount a file system: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk(
    world: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, 10**9))  # it filled up afterwards
    monkeypatch.setattr(report, "write_report", lambda run, **_: run)
    run = small_disk / "run"
    command = pretrain(out=str(run), epochs="4", save_every="1", keep_checkpoints="9")
    assert main(command) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert len(said.splitlines()) <= 3
    assert "the disk is full" in said
    assert str(run) in said
    assert not list(run.glob(".*.tmp"))
    earlier = checkpoint.latest(run)
    assert earlier is not None
    _, meta = checkpoint.load(earlier)
    assert 1 <= meta["step"] < 8
    # With space again, the same command goes on from there.
    subprocess.run(["mount", "-o", "remount,size=96m", str(small_disk)], check=True)
    assert main(command) == 0
    assert f"Resuming from step {meta['step']} of 8" in capsys.readouterr().out
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")][-1] == 8
    # Bitwise the run that had space from the start.
    assert main(pretrain(out=str(small_disk / "whole"), epochs="4", save_every="9")) == 0
    for name in ("backbone", "regressor"):
        assert torch.equal(
            *(_flat(small_disk / folder / f"{name}.safetensors") for folder in ("run", "whole"))
        )


def _flat(path: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    return torch.cat([v.flatten().double() for _, v in sorted(load_file(path).items())])


# --- what is no error ------------------------------------------------------------------------------------

ODD = {
    "16-bit grey": "scaled from 0..65535 to 0..255",
    "CMYK": "converted to RGB",
    "palette": "converted to RGB",
    "alpha": "what is transparent is seen on white",
    "EXIF rotation": "turned upright",
}


def odd_image(kind: str, path: Path) -> torch.Tensor:
    """Writes an image of 64 x 64; returns the pixels that must come out, uint8 3 x 64 x 64."""
    square = torch.arange(64 * 64, dtype=torch.int32).reshape(64, 64) * 16
    match kind:
        case "16-bit grey":
            Image.frombytes("I;16", (64, 64), bytes(_little_endian(square))).save(path)
            return (square.double() / 65535 * 255).round().to(torch.uint8).expand(3, 64, 64)
        case "CMYK":
            Image.new("CMYK", (64, 64), (255, 0, 0, 0)).save(path, format="TIFF")
            return torch.tensor([0, 255, 255], dtype=torch.uint8).view(3, 1, 1).expand(3, 64, 64)
        case "palette":
            image = Image.new("P", (64, 64), 1)
            image.putpalette([0, 0, 0, 250, 120, 10])
            image.save(path)
            return torch.tensor([250, 120, 10], dtype=torch.uint8).view(3, 1, 1).expand(3, 64, 64)
        case "alpha":
            Image.new("RGBA", (64, 64), (200, 0, 0, 0)).save(path)
            return torch.full((3, 64, 64), 255, dtype=torch.uint8)
    assert kind == "EXIF rotation"
    image = Image.new("L", (64, 64))
    image.paste(255, (0, 0, 64, 32))  # bright above
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: bright on the right
    image.save(path, exif=exif)
    upright = torch.zeros(3, 64, 64, dtype=torch.uint8)
    upright[:, :, 32:] = 255
    return upright


def _little_endian(values: torch.Tensor) -> Iterator[int]:
    for value in values.flatten().tolist():
        yield from value.to_bytes(2, "little")


@pytest.mark.parametrize("kind", ODD)
def test_odd_images_are_accepted(kind: str, tmp_path: Path) -> None:
    path = tmp_path / ("odd.tif" if kind == "CMYK" else "odd.png")
    expected = odd_image(kind, path)
    difference = read_image(path, (64, 64)).int() - expected.int()
    assert difference.abs().max() <= 1


def test_odd_images_train(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of them all, with --strict: a whole pretraining."""
    monkeypatch.chdir(world)
    monkeypatch.setattr(report, "write_report", lambda run, **_: run)
    folder = tmp_path / "odd"
    folder.mkdir()
    for i in range(8):
        for j, kind in enumerate(ODD):
            odd_image(kind, folder / f"{i}-{j}.{'tif' if kind == 'CMYK' else 'png'}")
    assert main(pretrain("--strict", images=str(folder), out=str(tmp_path / "run"))) == 0
    said = capsys.readouterr()
    assert "images 40 | skipped 0" in said.out
    assert said.err == ""


# --- the page --------------------------------------------------------------------------------------------


HEAD = """\
# What is said when something is wrong

This page is generated by `tests/cli/test_errors.py`, which makes every one of these mistakes and keeps what was
printed. Errors go to stderr in at most three lines, the exit code is 2, and nothing is left behind: the
output folder is not made, or stays as it was. `DREAMTEACHER_TRACEBACK=1` shows where an error arose.
"""
NO_ERROR = """\
## What is no error

Without `--strict`, damaged images are left out, counted, and listed in the run's `skipped.txt`. The following
are not damaged; they are accepted, with `--strict` too:

| image | how it is read |
| --- | --- |"""


OTHERS = {
    r"(Error while deserializing header).*?\)\.": r"\1 ...).",
    r"(JSONDecodeError) .*": r"\1 ...",
    r"\(damaged: .*?\)\.": "(damaged: ...).",
    r"(Device '.*' cannot be used:) .*": r"\1 ...",
    r"(cannot be fetched:) .*": r"\1 ...",
    r"(could not meet:) .*": r"\1 ...",
    r"None of \d+ students": "None of ... students",
}


def stable(text: str) -> str:
    """Without the words of other libraries, which change with their versions."""
    for pattern, replacement in OTHERS.items():
        text = re.sub(pattern, replacement, text)
    return text


def cell(text: str) -> str:
    """Lines as code in a table's cell."""
    fence = "``" if "`" in text else "`"
    pad = " " if "`" in text else ""
    return "<br>".join(f"{fence}{pad}{line}{pad}{fence}" for line in text.replace("|", "\\|").splitlines())


def test_page_is_what_was_printed(provoke: Callable[[Case], Outcome]) -> None:
    lines = [HEAD]
    for section, cases in SECTIONS.items():
        lines += [f"## {section}", "", "| what happened | what is printed |", "| --- | --- |"]
        lines += [f"| {c.what} | {cell(stable(provoke(c).err))} |" for c in cases]
        lines.append("")
    lines += [NO_ERROR, *(f"| {kind} | {how} |" for kind, how in ODD.items())]
    text = "\n".join(lines) + "\n"
    if os.environ.get("DREAMTEACHER_WRITE_DOCS"):
        PAGE.write_text(text)
    assert PAGE.is_file(), "DREAMTEACHER_WRITE_DOCS=1 writes it"
    assert PAGE.read_text() == text, (
        "tests/golden/errors.md is not what is printed: DREAMTEACHER_WRITE_DOCS=1 rewrites it"
    )


def test_troubleshooting_quotes_what_is_printed() -> None:
    """Fifteen sections; every message in them is one of the golden file, whole and to the letter."""
    text, golden = TROUBLESHOOTING.read_text(), PAGE.read_text()
    sections = text.split("\n## ")[1:]
    assert len(sections) == 15
    for section in sections:
        quoted = re.findall(r"^```text\n(error: .*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
        assert quoted, section
        for message in quoted:
            assert f"| {cell(message)} |" in golden, message
