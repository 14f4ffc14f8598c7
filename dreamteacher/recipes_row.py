"""What a recipe is, where its data and runs lie, and the command line of a config."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from dreamteacher.distill.config import PretrainConfig, TrainInterpreterConfig
from dreamteacher.downstream.config import EvaluateConfig
from dreamteacher.downstream.presets import preset_config
from dreamteacher.runtime.errors import UserError
from dreamteacher.teachers.training.config import TrainTeacherConfig

Config: TypeAlias = PretrainConfig | TrainTeacherConfig | TrainInterpreterConfig | EvaluateConfig
Status = Literal["not run", "not implemented"]
VERBS: dict[type, str] = {
    PretrainConfig: "pretrain",
    TrainTeacherConfig: "train-teacher",
    TrainInterpreterConfig: "train-interpreter",
    EvaluateConfig: "evaluate",
}


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set of the paper.

    Args:
        title: its name in words.
        images: training images of an epoch, as published (label-efficient sets: 0, they are not pretrained on).
        terms: of its use, as published when this was written.
        labels: labelled images that an interpreter is trained on.
    """

    title: str
    images: int
    terms: str
    labels: int = 0


_RESEARCH = "research only, non-commercial"
_LSUN = "none stated"
DATA: dict[str, DataSet] = {
    "imagenet": DataSet(title="ImageNet-1k", images=1_281_167, terms=_RESEARCH),
    "fgbg": DataSet(title="objects of ImageNet, as masks", images=0, terms="not stated by the paper"),
    "coco": DataSet(title="COCO 2017", images=118_287, terms="annotations CC BY 4.0, images Flickr's terms"),
    "ade20k": DataSet(title="ADE20K", images=20_210, terms=_RESEARCH),
    "bdd100k": DataSet(title="BDD100K", images=70_000, terms="education, research and not-for-profit"),
    "cityscapes": DataSet(title="Cityscapes", images=2_975, terms=_RESEARCH),
    "lsun/bedroom": DataSet(title="LSUN bedroom", images=3_033_042, terms=_LSUN),
    "lsun/cat": DataSet(title="LSUN cat", images=1_657_266, terms=_LSUN),
    "lsun/horse": DataSet(title="LSUN horse", images=2_000_340, terms=_LSUN),
    "ffhq": DataSet(title="FFHQ", images=70_000, terms="CC BY-NC-SA 4.0"),
    **{
        name: DataSet(title=f"DDPM-seg's {name}", images=0, terms="not stated", labels=labels)
        for name, labels in (("bedroom_28", 40), ("ffhq_34", 20), ("cat_15", 30), ("horse_21", 30))
    },
}


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where the data sets lie, each under its name, and where the runs go."""

    data: Path
    out: Path

    def at(self, name: str) -> Path:
        """A data set as LAYOUT:ROOT."""
        return Path(f"{name.split('/')[0]}:{self.data / name}")

    def run(self, recipe: str) -> Path:
        """The folder of a recipe's run."""
        return self.out / recipe


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A row of the paper's tables, or a step that several rows begin with.

    Args:
        name: on the command line.
        table: where in the paper the number stands, in words.
        what: one phrase.
        expected: (what is measured, the paper's number); none for a step that has none of its own.
        make: the config, for one's own places; None where we have no such thing.
        data: names in `DATA`.
        teacher: published teacher (`list teachers`) or preset of `train-teacher` that it runs or trains.
        needs: recipes that come before it.
        note: what is not as in the paper, or is not stated there.
    """

    name: str
    table: str
    what: str
    expected: tuple[tuple[str, float], ...] = ()
    make: Callable[[Places], Config] | None
    data: tuple[str, ...]
    teacher: str = ""
    needs: tuple[str, ...] = ()
    note: str = ""

    @property
    def status(self) -> Status:
        """None of them has been run at the paper's size."""
        return "not implemented" if self.make is None else "not run"

    def config(self, places: Places) -> Config:
        """The settings.

        Raises:
            UserError: we have no such thing.
        """
        if self.make is None:
            raise UserError(
                f"'{self.name}' is not implemented here: {self.note}.",
                "`dreamteacher list recipes` has others.",
            )
        return self.make(places)

    def numbers(self) -> str:
        """The paper's numbers in words."""
        return words(self.expected) or "-"


def words(expected: tuple[tuple[str, float], ...]) -> str:
    """Numbers as the paper prints them.

    Example:
        >>> words((("box AP", 40.0), ("mask AP", 36.5)))
        'box AP 40.0, mask AP 36.5'
    """
    return ", ".join(f"{what} {number:.1f}" for what, number in expected)


def command_line(config: Config) -> list[str]:
    """The words of the command that gives this config: what differs from the defaults, or from the preset's.

    Example:
        >>> command_line(preset_config("ade20k", init="imagenet", images=Path("ade20k:/data")))[1:]
        ['evaluate', '--preset', 'ade20k', '--init', 'imagenet', '--images', 'ade20k:/data']
    """
    base: Any = None
    if isinstance(config, EvaluateConfig) and config.preset is not None:
        base = dataclasses.replace(preset_config(config.preset), preset=None)
    flags = [word for flag in _flags(config, base, "--") for word in flag]
    return ["dreamteacher", VERBS[type(config)], *flags]


def _flags(config: Any, base: Any, prefix: str) -> Iterator[list[str]]:
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), field.name.replace("_", "-")
        if base is not None:
            before = getattr(base, field.name)
        elif field.default_factory is not dataclasses.MISSING:
            before = field.default_factory()
        else:
            before = field.default
        if value == before:
            continue
        if dataclasses.is_dataclass(value):
            yield from _flags(value, before, f"{prefix}{name}.")
        elif isinstance(value, bool):
            yield [f"{prefix}{'' if value else 'no-'}{name}"]
        else:
            values = value if isinstance(value, tuple) else (value,)
            yield [f"{prefix}{name}", *map(str, values)]


def shell(command: list[str]) -> str:
    """A command as a line of a shell script."""
    return shlex.join(command)
