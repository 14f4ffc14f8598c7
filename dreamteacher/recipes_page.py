"""docs/reproducing.md, made of the recipes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dreamteacher.recipes import RECIPES, find_recipe, hours, published, script, steps
from dreamteacher.recipes_cost import BACKBONE_SPEED, DENOISER_SPEED, gpu_hours
from dreamteacher.recipes_downstream import BESIDE
from dreamteacher.recipes_row import DATA, Places, Recipe, words
from dreamteacher.teachers.known import KNOWN

_HEAD = """\
# From a number in the paper to the command that would reproduce it

This page is generated from `recipes.py` by `tests/test_recipes.py`. **None of these runs was done**: they need the
paper's data, its teachers' checkpoints and GPUs. `dreamteacher list recipes` prints the same rows.

A recipe is a shell script: `dreamteacher recipe NAME` prints it, from the teacher to the number, and a shell runs it.
The data sets lie in one folder under their names (`--data`), as [data.md](data.md) describes each; LSUN's categories are
lsun/bedroom, lsun/cat and lsun/horse. A setting that is added at the end of a line wins, so a run can be cut down
(`--epochs 1`). Two recipes that begin with the same pretraining share it, for its folder is the same.

```bash
dreamteacher list recipes --filter panoptic
dreamteacher recipe {example}
```

The second prints

```text
{script}
```

H100-hours are **estimates**: operations of the networks, counted, over speeds that are assumed and not measured:
{denoiser:g} TFLOP/s for teachers and {backbone:g} TFLOP/s for what is trained. Reading images is not counted. "In all"
includes the steps before, each once. An A100 takes two to three times as long.
"""


def page() -> str:
    """The whole page."""
    example, places = "coco-resnet50-adm", Places(data=Path("data"), out=Path("runs"))
    text = "\n".join(script(find_recipe(example), places))
    speeds = {"denoiser": DENOISER_SPEED / 1e12, "backbone": BACKBONE_SPEED / 1e12}
    parts = [_HEAD.format(example=example, script=text, **speeds)]
    for table in dict.fromkeys(r.table for r in RECIPES.values() if r.expected):
        parts.append(f"## {table[0].upper() + table[1:]}\n\n{_numbers(table)}\n")
    rows = [_step(r) for r in RECIPES.values() if not r.expected]
    head = (
        "recipe",
        "what",
        "data",
        "teacher",
        "after",
        "hours of its own",
        "what differs, or is not stated",
    )
    parts.append("## Teachers, interpreters and pretrainings\n\n" + _table(head, rows) + "\n")
    used = dict.fromkeys(name for r in RECIPES.values() for name in published(r))
    teachers = [
        (f"`{name}`", KNOWN[name].what, f"{KNOWN[name].gigabytes:g} GB", KNOWN[name].licence) for name in used
    ]
    parts.append(
        "## Teachers to fetch\n\n" + _table(("`get-teacher`", "what", "download", "licence"), teachers) + "\n"
    )
    parts.append("## Data sets\n\n" + _table(("under --data", "what", "images", "terms"), [
        (f"`{name}`", d.title, f"{d.images:,}" if d.images else f"{d.labels} labelled" if d.labels else "", d.terms)
        for name, d in DATA.items()
    ]) + "\n\nTerms as published when this was written; what you train may be bound by them, and by the teacher's licence.\n")  # fmt: skip
    return "\n".join(parts)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _numbers(table: str) -> str:
    """A table of the paper: our recipes, then other methods."""
    head = ("paper", "what", "ours", "recipe", "H100-hours, in all", "data", "teacher to fetch", "what differs, or is not stated")  # fmt: skip
    rows: list[tuple[str, ...]] = []
    for r in (r for r in RECIPES.values() if r.table == table):
        cost = "-" if r.make is None else hours(sum(map(gpu_hours, steps(r))))
        name = f"`{r.name}`" if r.make is not None else "-"
        titles = dict.fromkeys(DATA[d].title for step in steps(r) for d in step.data)
        rows.append((r.numbers(), r.what, r.status, name, cost, ", ".join(titles), _teachers(r), r.note))
    for b in (b for b in BESIDE if b.table == table):
        rows.append((words(b.expected), b.method, *("-",) * 5, "another method: the paper's number"))
    return _table(head, rows)


def _teachers(recipe: Recipe) -> str:
    return ", ".join(f"`{name}`" for name in published(recipe)) or "-"


def _step(r: Recipe) -> tuple[str, ...]:
    after = ", ".join(f"`{name}`" for name in r.needs) or "-"
    return (f"`{r.name}`", r.what, DATA[r.data[0]].title, _teachers(r), after, hours(gpu_hours(r)), r.note)
