"""docs/reproducing.md, made of the heads of the recipes: `python recipes/page.py` writes it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from cost import BACKBONE_SPEED, DATA_SETS, DENOISER_SPEED, read_csv

from dreamteacher.teachers.published.known import KNOWN

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "reproducing.md"
TABLES = (
    "COCO, ResNet-50, Mask R-CNN",
    "COCO, ConvNeXt-B, Cascade Mask R-CNN",
    "ImageNet, fine-tuned",
    "ImageNet, frozen",
    "ADE20K, ResNet-50",
    "BDD100K, ImageNet pretraining",
    "BDD100K, in-domain",
    "Cityscapes, after BDD100K",
    "label-efficient",
    "generators, COCO",
    "generators, ADE20K",
    "ablations, BDD100K instances",
)
STATUSES = ("not run", "smaller-scale", "partial", "reproduced", "stale")
WITHOUT_SCRIPT = ("another method", "not implemented")
ROW, STEP = ("Table", "Row", "Paper"), ("Step",)
ALWAYS, SOMETIMES = ("Source", "Needs", "Cost", "Status"), ("Note", "Usage")

_INTRODUCTION = """\
# From a number in the paper to the script that would reproduce it

This page is generated from the heads of the scripts in [recipes/](../recipes) by `python recipes/page.py`. {done}

A recipe is a shell script that goes from the teacher to the number. It first runs the recipes that come before it, unless
their results are there, so two rows that begin with the same pretraining share it. An interrupted training resumes when the
script is started again. `DATA` is the folder of the data sets, each under its name below, as [data.md](data.md) describes
them; `RUNS` is the folder of the runs.

```text
DRY_RUN=1 bash recipes/{example}.sh                prints the commands and runs none
python recipes/check.py {example}                  checks settings, data and networks of every step, without weights
DATA=/data RUNS=/runs bash recipes/{example}.sh    runs them
bash recipes/label-efficient-convnext_base-mixed.sh cat         a row of several sets takes the set first
```

Settings at the end of the line go to the recipe's own command and win over those in the script. To change a step before it,
run that step's script first, as in `bash recipes/{before}.sh --epochs 1`. A whole script is

```text
{script}```

H100-hours are **estimates**: operations of the networks, counted, over speeds that are assumed and not measured:
{denoiser:g} TFLOP/s for teachers and {backbone:g} TFLOP/s for what is trained (`recipes/cost.py`). Reading images is not
counted. "In all" includes the steps before, each once. An A100 takes two to three times as long.
"""


def scripts() -> list[Path]:
    """The recipes, by name."""
    return sorted(path for path in HERE.glob("*.sh") if path.name != "steps.sh")


def read_head(script: Path) -> dict[str, str]:
    """The fields of a script's head: lines `# Key: value`, continued by lines that are indented further.

    Example:
        >>> read_head(HERE / "coco-resnet50-adm.sh")["Paper"]
        'box AP 44.1, mask AP 40.1'
    """
    fields: dict[str, str] = {}
    for line in script.read_text(encoding="utf-8").splitlines()[1:]:
        if not line.startswith("#"):
            break
        if found := re.fullmatch(r"# ([A-Z][a-z]+):\s+(.+)", line):
            key, fields[found[1]] = found[1], found[2]
        else:
            fields[key] += " " + line.removeprefix("#").strip()
    return fields


def needs(head: dict[str, str]) -> tuple[list[str], list[str]]:
    """Data sets and published teachers that a recipe and the steps before it read.

    Example:
        >>> needs({"Needs": "imagenet, coco; teacher adm-ffhq"})
        (['imagenet', 'coco'], ['adm-ffhq'])
    """
    data, _, teachers = (
        head["Needs"].rpartition("teacher ") if "teacher " in head["Needs"] else (head["Needs"], "", "")
    )
    return [name for name in data.removesuffix("; ").split(", ") if name], teachers.split(
        ", "
    ) if teachers else []


def page() -> str:
    """The whole page."""
    heads = {path.stem: read_head(path) for path in scripts()}
    example, before = "coco-resnet50-adm", "pretrain-imagenet-resnet50-adm"
    statuses = {head["Status"] for head in heads.values()}
    done = "**None of these runs was done**: they need the\npaper's data, its teachers' checkpoints and GPUs."
    parts = [
        _INTRODUCTION.format(
            done=done if statuses == {"not run"} else "", example=example, before=before,
            script=(HERE / f"{example}.sh").read_text(encoding="utf-8"),
            denoiser=DENOISER_SPEED / 1e12, backbone=BACKBONE_SPEED / 1e12,
        )
    ]  # fmt: skip
    others = read_csv("other_rows.csv")
    for table in TABLES:
        rows = [_row(name, head) for name, head in heads.items() if head.get("Table") == table]
        rows += [
            (r["paper"], r["row"], r["status"], "-", "-", "-", "-", r["note"]) for r in others if r["table"] == table
        ]  # fmt: skip
        names = (
            "paper",
            "what",
            "ours",
            "recipe",
            "cost",
            "data",
            "teacher to fetch",
            "what differs, or is not stated",
        )
        parts.append(f"## {table[0].upper()}{table[1:]}\n\n{_table(names, rows)}\n")
    steps = [_step(name, head) for name, head in heads.items() if "Step" in head]
    names = ("recipe", "what", "ours", "cost", "data", "teacher to fetch", "what differs, or is not stated")
    parts.append(f"## Teachers, interpreters and pretrainings\n\n{_table(names, steps)}\n")
    used = sorted({teacher for head in heads.values() for teacher in needs(head)[1]})
    teachers = [(f"`{t}`", KNOWN[t].what, f"{KNOWN[t].gigabytes:g} GB", KNOWN[t].licence) for t in used]
    names = ("`get-teacher`", "what", "download", "licence")
    parts.append(f"## Teachers to fetch\n\n{_table(names, teachers)}\n")
    parts.append(f"## Data sets\n\n{_table(('in DATA', 'what', 'images', 'terms'), _data_sets())}\n")
    parts.append(
        "Terms as published when this was written; what you train may be bound by them, and by the teacher's licence.\n"
    )
    return "\n".join(parts)


def _row(name: str, head: dict[str, str]) -> tuple[str, ...]:
    return (
        head["Paper"],
        head["Row"],
        head["Status"],
        _link(name),
        _cost(head),
        *_needs(head),
        head.get("Note", ""),
    )


def _step(name: str, head: dict[str, str]) -> tuple[str, ...]:
    return (_link(name), head["Step"], head["Status"], _cost(head), *_needs(head), head.get("Note", ""))


def _link(name: str) -> str:
    return f"[{name}](../recipes/{name}.sh)"


def _cost(head: dict[str, str]) -> str:
    """The cost without what the page says once for all."""
    return head["Cost"].removeprefix("about ").partition(" (an estimate")[0].replace(" H100-hours", "")


def _needs(head: dict[str, str]) -> tuple[str, str]:
    data, teachers = needs(head)
    return ", ".join(DATA_SETS[d]["title"] for d in data) or "-", ", ".join(f"`{t}`" for t in teachers) or "-"


def _data_sets() -> list[tuple[str, ...]]:
    rows = []
    for row in DATA_SETS.values():
        count = (
            f"{int(row['images']):,}"
            if row["images"]
            else f"{row['labelled']} labelled"
            if row["labelled"]
            else ""
        )
        rows.append((f"`{row['name']}`", row["title"], count, row["terms"]))
    return rows


def _table(names: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (names, ("---",) * len(names), *rows))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
