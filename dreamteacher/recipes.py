"""Every row of the paper's tables as a recipe: its settings, its expected number, its cost. None was run by us.

`recipe NAME` prints the commands as a shell script, from the teacher to the number; `--dry-run` checks them against
the data. `docs/reproducing.md` is made of the same table.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tyro.conf import Positional

from dreamteacher.data.labelled import read_labelled
from dreamteacher.data.layouts import table as layouts_table
from dreamteacher.distill.config import PretrainConfig, TrainInterpreterConfig
from dreamteacher.distill.estimate import millions
from dreamteacher.downstream.config import EvaluateConfig
from dreamteacher.downstream.evaluate import check_config
from dreamteacher.downstream.presets import check_preset
from dreamteacher.models.regressor import FeatureRegressor
from dreamteacher.models.student import Student, create_student
from dreamteacher.recipes_cost import gpu_hours, shape_of
from dreamteacher.recipes_downstream import downstream_recipes
from dreamteacher.recipes_pretraining import pretraining_recipes
from dreamteacher.recipes_row import DATA, Config, Places, Recipe, command_line, shell, words
from dreamteacher.runtime.errors import UserError, did_you_mean
from dreamteacher.spec import FeatureSpec
from dreamteacher.teachers.known import KNOWN, SWAV, fetched
from dreamteacher.teachers.training.config import TrainTeacherConfig

RECIPES: dict[str, Recipe] = {r.name: r for r in (*pretraining_recipes(), *downstream_recipes())}


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """Print the commands that reproduce a number of the paper, as a shell script; nothing is run."""

    name: Positional[str] = ""
    """A name of `list recipes`."""
    data: Path = field(default=Path("data"))
    """Folder of the data sets, each under its name (imagenet, coco, bdd100k, lsun/cat ...), as docs/data.md describes."""
    out: Path = field(default=Path("runs"))
    """Folder of the runs, each under the name of its recipe."""
    dry_run: bool = False
    """Check settings, data and networks of every step instead, without weights, and print what each costs."""


def find_recipe(name: str) -> Recipe:
    """A recipe by its name.

    Raises:
        UserError: there is none.
    """
    if not name:
        raise UserError("'recipe' needs a name.", "`dreamteacher list recipes` names them.")
    if name not in RECIPES:
        raise UserError(
            f"There is no recipe '{name}'.{did_you_mean(name, RECIPES)}",
            "`dreamteacher list recipes` names them.",
        )
    return RECIPES[name]


def steps(recipe: Recipe) -> list[Recipe]:
    """What comes before a recipe, in order, and itself.

    Example:
        >>> [step.name for step in steps(RECIPES["bdd100k-panoptic-resnet50-adm"])][:2]
        ['teacher-adm-bdd100k', 'pretrain-bdd100k-resnet50-adm']
    """
    found: dict[str, Recipe] = {}
    for name in recipe.needs:
        found |= {step.name: step for step in steps(RECIPES[name])}
    return [*found.values(), recipe]


def published(recipe: Recipe) -> list[str]:
    """The published teachers that a recipe and its steps run."""
    return list(dict.fromkeys(step.teacher for step in steps(recipe) if step.teacher in KNOWN))


def get_teacher(name: str, places: Places) -> list[str]:
    """The command that fetches a published teacher."""
    command = ["dreamteacher", "get-teacher", name]
    if KNOWN[name].bank:
        command += ["--bank-images", str(places.data / "imagenet" / "train"), "--embedder", Path(SWAV).name]
    return command


def print_recipe(config: RecipeConfig) -> None:
    """Prints a recipe's commands, or what a dry run of them finds.

    Raises:
        UserError: no such recipe, one that is not implemented, or data that are missing.
    """
    recipe, places = find_recipe(config.name), Places(data=config.data, out=config.out)
    print("\n".join(dry_run(recipe, places) if config.dry_run else script(recipe, places)))


def script(recipe: Recipe, places: Places) -> list[str]:
    """The lines of a shell script: what is known as comments, then one command a step.

    Raises:
        UserError: the recipe is not implemented.
    """
    recipe.config(places)
    total = sum(gpu_hours(step) for step in steps(recipe))
    lines = [
        f"# {recipe.name}: {recipe.table}; {recipe.what}",
        f"# paper: {recipe.numbers()}; ours: {recipe.status}",
        f"# about {hours(total)} H100-hours in all (an estimate); the same command resumes a training",
        *(f"# {step.name}: {step.note}" for step in steps(recipe) if step.note),
    ]
    for name in published(recipe):
        known = KNOWN[name]
        lines += [f"# {name}: {known.gigabytes:g} GB, licence: {known.licence}"]
        if known.bank:
            lines += [f"# its bank needs SwAV's ResNet-50, {SWAV}"]
        lines += [shell(get_teacher(name, places))]
    return [*lines, *(shell(command_line(step.config(places))) for step in steps(recipe))]


def hours(value: float) -> str:
    """GPU-hours with two digits that mean something.

    Example:
        >>> hours(1234.5), hours(0.0123), hours(12.3)
        ('1,200', '0.012', '12')
    """
    return f"{float(f'{value:.2g}'):,.10g}"


def recipe_lines() -> list[str]:
    """The lines of `list recipes`: ours, then the numbers of other methods."""
    from dreamteacher.recipes_downstream import BESIDE

    rows = [("recipe", "table", "what", "paper's number", "H100-hours (all steps)", "status")]
    for r in RECIPES.values():
        cost = "-"
        if r.make is not None:
            cost = f"{hours(gpu_hours(r))} ({hours(sum(map(gpu_hours, steps(r))))})"
        rows.append((r.name, r.table, r.what, r.numbers(), cost, r.status))
    for table, method, expected in BESIDE:
        numbers = words(expected)
        rows.append(("-", table, method, numbers, "-", "stands beside"))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return [
        "  ".join([*(f"{c:{w}}" for c, w in zip(row[:-1], widths, strict=True)), row[-1]]) for row in rows
    ]


# --- dry runs -----------------------------------------------------------------------------------------------


def dry_run(recipe: Recipe, places: Places) -> list[str]:
    """What each step would do, once all of them are checked: data by names and headers, networks without weights.

    Raises:
        UserError: see `print_recipe`.
    """
    here = fetched()
    lines = [f"dry run of {recipe.name}: nothing was run or written"]
    for name in published(recipe):
        known = KNOWN[name]
        lines.append(
            f"  {name}: {'is here' if name in here else f'{known.gigabytes:g} GB to fetch'}; {known.licence}"
        )
    for step in steps(recipe):
        config = step.config(places)
        lines += [f"  {step.name}: {_check(step, config)}", f"    about {hours(gpu_hours(step))} H100-hours"]
    return lines


def _check(step: Recipe, config: Config) -> str:
    match config:
        case PretrainConfig():
            return f"{_networks(step, config)}, {_images(step, config.images)}"
        case TrainTeacherConfig():
            return f"{config.preset}, {_images(step, config.images)}"
        case TrainInterpreterConfig():
            size = shape_of(step.teacher).size
            labelled = read_labelled(config.images, config.masks, size, ignore_index=config.ignore_index)
            return f"{len(labelled.images)} labelled images of {len(labelled.classes)} classes"
        case EvaluateConfig():
            there = config.init in ("random", "imagenet") or Path(config.init).exists()
            tasks = check_config(config if there else dataclasses.replace(config, init="random", neck=False))
            check_preset(config)
            student = _student(str(config.student))
            later = "" if there else f", once '{config.init}' is there"
            return f"{', '.join(tasks)} with {config.student} ({millions(student)} parameters){later}"


def _images(step: Recipe, images: Path | None) -> str:
    if images is None:
        return "samples of the teacher"
    (count,) = layouts_table.check(images, "images", ("train",))
    expected = DATA[step.data[0]].images
    return f"{count:,} images" + (f" (of {expected:,} published)" if count != expected else "")


def _networks(step: Recipe, config: PretrainConfig) -> str:
    """Student and regressor, made without memory for the teacher's levels."""
    levels, student = shape_of(step.teacher).levels, _student(config.student)
    with torch.device("meta"):
        specs = [FeatureSpec(f"s{stride}", channels, stride) for stride, channels in levels.items()]
        regressor = FeatureRegressor(student.specs, specs, width=config.width)
    return f"{config.student} ({millions(student)}) and regressor ({millions(regressor)} parameters)"


@functools.cache
def _student(name: str) -> Student:
    """Without memory for its weights."""
    with torch.device("meta"):
        return create_student(name)
