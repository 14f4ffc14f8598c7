"""What a recipe would do, checked without weights: `python recipes/check.py NAME [SET] [--data FOLDER] [--runs FOLDER]`.

Settings are parsed, data are looked at by names and headers, networks are made without memory. Nothing is written.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from cost import Config, gpu_hours, hours, images_of, shape_of
from page import read_head, scripts

from dreamteacher.cli import main as cli
from dreamteacher.data.labelled import read_labelled
from dreamteacher.data.layouts import table as layouts
from dreamteacher.distill.config import PretrainConfig, TrainInterpreterConfig
from dreamteacher.distill.estimate import millions
from dreamteacher.downstream.config import EvaluateConfig
from dreamteacher.downstream.evaluate import check_config
from dreamteacher.downstream.presets import check_preset
from dreamteacher.models.regressor import FeatureRegressor
from dreamteacher.models.student import Student, create_student
from dreamteacher.runtime.errors import UserError, did_you_mean
from dreamteacher.spec import FeatureSpec
from dreamteacher.teachers.published.known import KNOWN, fetched
from dreamteacher.teachers.training.config import TrainTeacherConfig

SETS = ("bedroom", "ffhq", "cat", "horse")


def commands(
    script: Path, *arguments: str, data: Path = Path("data"), runs: Path = Path("runs")
) -> list[list[str]]:
    """The commands that a script runs, from the teacher to the number, each as [verb, word ...]; none is run.

    Raises:
        UserError: the script refuses its arguments.
    """
    places = {"DRY_RUN": "1", "DATA": str(data), "RUNS": str(runs)}
    done = subprocess.run(
        ["bash", str(script), *arguments], env={**os.environ, **places}, capture_output=True, text=True
    )  # fmt: skip
    if done.returncode:
        problem, _, way_out = done.stderr.strip().removeprefix("error: ").partition("\n")
        raise UserError(problem, way_out)
    return [shlex.split(line)[1:] for line in done.stdout.splitlines()]


def read_command(verb: str, *words: str) -> Config:
    """The config of a command, parsed as the command line does."""
    entry = cli.VERBS[verb]
    found: Config = cli.parse(cli.named(entry.config), verb, words, default=cli._preset(verb, words))
    return found


def takes_set(script: Path) -> bool:
    """Whether a script's first argument is one of `SETS`."""
    return "Usage" in read_head(script)


def cost_line(rows: Sequence[Sequence[Config]]) -> str:
    """What a head should say of the cost.

    Args:
        rows: the configs of the script; of one that takes a set, those of each of `SETS`.
    """
    own = _amounts([gpu_hours(row[-1]) for row in rows])
    whole = _amounts([sum(map(gpu_hours, row)) for row in rows])
    return f"about {whole} H100-hours in all{'' if own == whole else f', {own} of its own'} (an estimate, not measured)"


def _amounts(values: list[float]) -> str:
    found = [hours(value) for value in values]
    if len(set(found)) == 1:
        return found[0]
    return ", ".join(f"{value} ({name})" for value, name in zip(found, SETS, strict=True))


def check_recipe(script: Path, *arguments: str, data: Path, runs: Path) -> list[str]:
    """What each step of a recipe would do, once all of them are checked.

    Raises:
        UserError: settings or data are wrong.
    """
    here = fetched()
    lines = [f"check of {' '.join([script.stem, *arguments])}: nothing was run or written"]
    steps = commands(script, *arguments, data=data, runs=runs)
    for name in dict.fromkeys(words[1] for words in steps if words[0] == "get-teacher"):
        known = KNOWN[name]
        there = "is here" if name in here else f"{known.gigabytes:g} GB to fetch"
        lines.append(f"  {name}: {there}; {known.licence}")
    for config in (read_command(*words) for words in steps if words[0] != "get-teacher"):
        name = config.out.name if config.out else ""
        lines += [f"  {name}: {check(config)}", f"    about {hours(gpu_hours(config))} H100-hours"]
    return lines


def check(config: Config) -> str:
    """What one command would do.

    Raises:
        UserError: its settings or its data are wrong.
    """
    match config:
        case PretrainConfig():
            return f"{_networks(config)}, {_images(config.images)}"
        case TrainTeacherConfig():
            return f"{config.preset}, {_images(config.images)}"
        case TrainInterpreterConfig():
            size = shape_of(config.teacher).size
            labelled = read_labelled(config.images, config.masks, size, ignore_index=config.ignore_index)
            return f"{len(labelled.images)} labelled images of {len(labelled.classes)} classes"
        case EvaluateConfig():
            there = config.init in ("random", "imagenet") or Path(config.init).exists()
            tasks = check_config(config if there else dataclasses.replace(config, init="random", neck=False))
            check_preset(config)
            later = "" if there else f", once '{config.init}' is there"
            return f"{', '.join(tasks)} with {config.student} ({millions(_student(str(config.student)))} parameters){later}"


def _images(images: Path | None) -> str:
    if images is None:
        return "samples of the teacher"
    (count,) = layouts.check(images, "images", ("train",))
    published = images_of(images)
    return f"{count:,} images" + (f" (of {published:,} published)" if count != published else "")


def _networks(config: PretrainConfig) -> str:
    """Student and regressor, made without memory for the teacher's levels."""
    levels, student = shape_of(config.teacher).levels, _student(config.student)
    with torch.device("meta"):
        specs = [FeatureSpec(f"s{stride}", channels, stride) for stride, channels in levels.items()]
        regressor = FeatureRegressor(student.specs, specs, width=config.width)
    return f"{config.student} ({millions(student)}) and regressor ({millions(regressor)} parameters)"


@functools.cache
def _student(name: str) -> Student:
    """Without memory for its weights."""
    with torch.device("meta"):
        return create_student(name)


def find_script(name: str) -> Path:
    """A recipe by its name, or by the path of its script.

    Raises:
        UserError: there is none.
    """
    names = {path.stem: path for path in scripts()}
    if (stem := Path(name).stem) not in names:
        raise UserError(
            f"There is no recipe '{stem}'.{did_you_mean(stem, names)}", "docs/reproducing.md names them."
        )
    return names[stem]


def main(argv: list[str] | None = None) -> int:
    """Prints the check of one recipe; returns 2 for a user's error."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe", nargs="+", help="its name; of a label-efficient one also the set")
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("DATA", "data")), help="folder of the data sets"
    )
    parser.add_argument(
        "--runs", type=Path, default=Path(os.environ.get("RUNS", "runs")), help="folder of the runs"
    )
    asked = parser.parse_args(argv)
    try:
        name, *arguments = asked.recipe
        print("\n".join(check_recipe(find_script(name), *arguments, data=asked.data, runs=asked.runs)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
