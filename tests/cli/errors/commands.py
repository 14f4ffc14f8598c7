"""Commands that work in the world of these tests, with other settings where a case names them."""

from __future__ import annotations

from tests.places import BENCHMARKS

BASELINES = BENCHMARKS / "baselines" / "run.py"


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
