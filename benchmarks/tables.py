"""Writes the benchmark tables into README.md and docs, between `<!-- table: NAME -->` and `<!-- end -->`.

python benchmarks/tables.py            # writes
python benchmarks/tables.py --check    # exits with 1 when a document is stale
"""

from __future__ import annotations

import csv
import re
import runpy
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from dreamteacher.downstream.tables import headline
from dreamteacher.downstream.task import find_task
from dreamteacher.metrics import mean_and_deviation, spread

HERE = Path(__file__).parent
PLAN = runpy.run_path(str(HERE / "plan.py"))
TASKS = {
    "knn": "kNN accuracy, frozen",
    "linear": "linear probe accuracy, frozen",
    "finetune": "fine-tuned accuracy",
    "linear-sgd": "linear probe accuracy by LARS, frozen",
    "finetune-full": "fine-tuned accuracy, published recipe",
    "segment-frozen": "segmentation mIoU, frozen backbone",
    "segment-linear": "segmentation mIoU, frozen, linear per pixel",
    "segment-finetune": "segmentation mIoU, fine-tuned",
    "detect": "Mask R-CNN, mask AP",
    "detect-cascade": "Cascade Mask R-CNN, mask AP",
}


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def results_table(*paths: Path) -> str:
    """Mean ± sample deviation over seeds, and what the last method has over the first, in units of the larger
    of all deviations."""
    values: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    methods: list[str] = []
    for row in (row for path in paths for row in rows(path)):
        if row["metric"] == headline(row["task"]):
            values[row["task"], row["labels"], row["method"]].append(float(row["value"]))
            if row["method"] not in methods:
                methods.append(row["method"])
    lines = [f"| | labels | {' | '.join(methods)} | difference |", "| --- " * (len(methods) + 3) + "|"]
    for task, labels in dict.fromkeys((t, n) for t, n, _ in values):
        cells = [values[task, labels, m] for m in methods]
        means, spreads = zip(*map(mean_and_deviation, cells), strict=True)
        shown = [spread(c) for c in cells]
        shown[means.index(max(means))] = f"**{shown[means.index(max(means))]}**"
        amount = (
            "all" if labels in ("", "None") else f"{labels} {find_task(task).unit.removeprefix('labels ')}"
        )
        gain = means[-1] - means[0]
        apart = f"{gain / max(spreads):+.1f} deviations" if max(spreads) else ""
        lines.append(f"| {TASKS[task]} | {amount} | {' | '.join(shown)} | {gain:+.3f} ({apart}) |")
    return "\n".join(lines)


def vit_table(demo: Path, vit: Path) -> str:
    """A ResNet-18 beside a ViT on the same seeds: mean ± sample deviation of each without and with pretraining, and
    what pretraining adds, in units of the larger of the two deviations."""
    values: dict[tuple[str, str, str, str], list[float]] = defaultdict(list)
    own = rows(vit)
    seeds = {row["seed"] for row in own}
    for network, found in (("ResNet-18", rows(demo)), ("ViT", own)):
        for row in found:
            if row["seed"] in seeds and row["metric"] == headline(row["task"]):
                method, _, token = row["method"].partition(", ")
                values[network + token, row["task"], row["labels"], method].append(float(row["value"]))
    parts = [f"{n}, {m} | pretraining adds" if m == "DreamTeacher" else f"{n}, {m}" for n in ("ResNet-18", "ViT")
             for m in ("random init", "DreamTeacher")]  # fmt: skip
    lines = [f"| | labels | {' | '.join(parts)} |", "| --- " * 8 + "|"]
    for token, task, labels in dict.fromkeys(
        (n.removeprefix("ViT"), t, x) for n, t, x, _ in values if n[:1] == "V"
    ):
        cells = []
        for network in ("ResNet-18", "ViT"):
            pair = [values[network + token, task, labels, m] for m in ("random init", "DreamTeacher")]
            if not all(pair):
                cells += ["", "", ""]
                continue
            (a, b), spreads = zip(*map(mean_and_deviation, pair), strict=True)
            shown = [spread(p) for p in pair]
            cells += [*shown, f"{b - a:+.3f} ({(b - a) / max(spreads):+.1f} dev.)"]
        amount = (
            "all" if labels in ("", "None") else f"{labels} {find_task(task).unit.removeprefix('labels ')}"
        )
        name = TASKS[task] + (f", {token}" if token else "")
        lines.append(f"| {name} | {amount} | {' | '.join(cells)} |")
    return "\n".join(lines)


def step_table(path: Path) -> str:
    lines = [
        "| student | batch | teacher, ms | student + regressor, ms | step, ms | step / parts | device | status |"
    ]
    lines.append("| --- " * 8 + "|")
    for r in rows(path):
        lines.append(
            f"| {r['student']} | {r['batch']} | {r['teacher_ms']} | {r['student_ms']} | {r['step_ms']} | "
            f"**{r['ratio_median']}** ({r['ratio_quartiles'].replace(' ', ' to ')}) | {r['device']}, {r['precision']} "
            f"| {status(r, float(r['ratio_median']) <= 1.03)} |"
        )
    return "\n".join(lines)


def early_exit_table(path: Path) -> str:
    lines = [
        "| network | full forward, s | four levels, s | speed-up | GMACs | largest difference | device | status |"
    ]
    lines.append("| --- " * 8 + "|")
    for r in rows(path):
        reached = float(r["speedup_median"]) >= 2.2 and float(r["max_abs_difference"]) == 0
        told = status(r, reached) if "load" in r else "stale: no hooks in the timed forward"
        lines.append(
            f"| {r['network']} at {r['size'].replace(' ', ' x ')}, batch {r['batch']} | {r['full_s']} | {r['early_s']} "
            f"| **{r['speedup_median']}** ({r['speedup_quartiles'].replace(' ', ' to ')}) | {r['full_gmacs']} -> "
            f"{r['early_gmacs']} | {r['max_abs_difference']} | {r['device']}, {r['precision']} | {told} |"
        )
    return "\n".join(lines)


def teachers_table(path: Path) -> str:
    lines = ["| teacher | mode | size | levels (stride: channels) | GMACs | images/s | peak memory, GB |"]
    lines.append("| --- " * 7 + "|")
    for r in rows(path):
        levels = r["levels"].replace(":", ": ").replace(" ", ", ").replace(":, ", ": ")
        lines.append(
            f"| {r['network']} | {r['mode']} | {r['size'].replace(' ', ' x ')} | {levels} | {r['gmacs']} | "
            f"{float(r['images_per_s']):.2f} | {r['peak_gb']} |"
        )
    return "\n".join(lines)


SELF_SUPERVISED = ("SimCLR", "MoCo v2", "BYOL", "DenseCL", "DDeP")
TRANSFER_METRICS = {
    "detect": {"box_ap": "Mask R-CNN, box AP", "mask_ap": "Mask R-CNN, mask AP"},
    "segment-frozen": {"miou": "UPerNet mIoU, frozen backbone"},
    "segment-finetune": {"miou": "UPerNet mIoU, fine-tuned"},
}


def transfer_table(path: Path) -> str:
    """Each method's mean ± sample deviation over seeds; how far DreamTeacher lies ahead of random init and of the best
    other self-supervised method, in units of the larger of the two deviations; and whether that says anything."""
    values: dict[tuple[str, str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    missing = {}
    for r in rows(path):
        if r["status"].startswith("not run"):
            missing[r["method"]] = r["status"]
        elif r["metric"] in (metrics := TRANSFER_METRICS.get(r["task"], {"accuracy": TASKS[r["task"]]})):
            values[r["task"], metrics[r["metric"]], r["labels"]][r["method"]].append(float(r["value"]))
    methods = list(dict.fromkeys(m for found in values.values() for m in found))
    head = ["", "labels", *methods, "over random", "over the best other", "says", "seeds", "status"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for (task, name, labels), found in values.items():
        stats = {m: mean_and_deviation(v) for m, v in found.items() if len(v) > 1}
        best = max(stats, key=lambda m: stats[m][0])
        cells = [
            spread(found[m]) if m in stats
            else f"{found[m][0]:.3f} (one seed)" if m in found
            else "not run"
            for m in methods
        ]  # fmt: skip
        cells[methods.index(best)] = f"**{cells[methods.index(best)]}**"
        other = max((m for m in stats if m in SELF_SUPERVISED), key=lambda m: stats[m][0], default=None)
        gains = [_ahead(stats, m) for m in ("random init", other)]
        unit = "per class" if task in ("linear", "finetune") else "images"
        amount = "all" if labels in ("", "None") else f"{labels} {unit}"
        apart = gains[1][1] if other else gains[0][1]
        says = "ahead" if apart >= 2 else "behind" if apart <= -2 else "too little to tell"
        shown = [f"{g:+.3f} ({d:+.1f} dev.)" for g, d in gains]
        seeds = max(len(v) for v in found.values())
        lines.append(
            f"| {name} | {amount} | {' | '.join([*cells, *shown, says, str(seeds), 'smaller-scale'])} |"
        )
    return "\n".join([*lines, *(f"\n{m}: {why}" for m, why in missing.items())])


def _ahead(stats: dict[str, tuple[float, float]], method: str | None) -> tuple[float, float]:
    """DreamTeacher's mean less a method's, and that in deviations."""
    if method not in stats or "DreamTeacher" not in stats:
        return float("nan"), float("nan")
    (ours, own), (theirs, other) = stats["DreamTeacher"], stats[method]
    return ours - theirs, (ours - theirs) / max(own, other, 1e-9)


METHODS = {
    "scratch": "from scratch",
    "imagenet": "ImageNet-supervised",
    "ddpm-seg": "DDPM-seg (runs the teacher)",
    "dataset-ddpm": "DatasetDDPM",
    "interpreter": "interpreter (runs the teacher)",
    "feature": "DreamTeacher, feature",
    "label": "DreamTeacher, label",
    "label-distilled": "DreamTeacher, label, as distilled",
    "mixed": "DreamTeacher, mixed",
    "mixed-distilled": "DreamTeacher, mixed, as distilled",
}


def label_efficient_table(path: Path) -> str:
    """mIoU of each method at each number of labels: mean ± sample deviation over seeds; what it cost; and how far
    mixed lies ahead of it, in units of the larger of the two deviations."""
    groups: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    for r in rows(path):
        groups[r["method"], r["count"]].append(r)
    counts = sorted({count for _, count in groups}, key=int)
    lines = ["| method | " + " | ".join(f"{c} labels | mixed is ahead by" for c in counts)
             + " | CPU-s | s | peak, MB | seeds |"]  # fmt: skip
    lines.append("| --- " * (5 + 2 * len(counts)) + "|")
    best = {c: max((m for m, n in groups if n == c), key=lambda m: _miou(groups[m, c])[0]) for c in counts}
    for method in (m for m in METHODS if any((m, c) in groups for c in counts)):
        cells, seen = [], [r for c in counts for r in groups.get((method, c), [])]
        for c in counts:
            mean, deviation = _miou(groups[method, c])
            text = f"{mean:.3f} ± {deviation:.3f}"
            cells.append(f"**{text}**" if best[c] == method else text)
            ours, own = _miou(groups["mixed", c])
            larger = max(deviation, own)
            cells.append(
                "" if method == "mixed" else f"{ours - mean:+.3f} ({(ours - mean) / larger:+.1f} dev.)"
            )
        cost = [statistics.median(float(r[k]) for r in seen) for k in ("cpu_seconds", "seconds", "peak_mb")]
        seeds = len({r["seed"] for r in seen})
        lines.append(
            f"| {METHODS[method]} | {' | '.join(cells)} | {' | '.join(f'{v:.0f}' for v in cost)} | {seeds} |"
        )
    return "\n".join(lines)


def _miou(group: list[dict[str, str]]) -> tuple[float, float]:
    return mean_and_deviation([float(r["miou"]) for r in group])


def interpreter_table(path: Path) -> str:
    lines = [
        "| network | channels | labelled images | the whole stack, GB | peak of the process, GB | of it weights, GB | s | device |"
    ]
    lines.append("| --- " * 8 + "|")
    for r in rows(path):
        lines.append(
            f"| {r['network']} at {r['size'].replace(' ', ' x ')} | {r['channels']} | {r['images']} | {r['whole_stack_gb']} "
            f"| **{r['peak_gb']}** | {r['weights_gb']} | {r['seconds']} | {r['device']} |"
        )
    return "\n".join(lines)


def status(row: dict[str, str], reached: bool | None = None, *, quiet: float = 0.5) -> str:
    """Reached or missed, where there is a target; and whether the machine was busy with other work (load at the start)."""
    words = [] if reached is None else ["target reached" if reached else "target missed"]
    if float(row.get("load") or 0) > quiet:
        words.append(f"to be repeated: other work on the machine (load {row['load']})")
    return "; ".join(words) or "measured"


def speed_table(path: Path) -> str:
    lines = ["| maps of | student | batch | student alone, ms | with a store, ms | speed kept | a batch read alone, ms | "
             "items/s, disk's cache dropped | device | status |"]  # fmt: skip
    lines.append("| --- " * 10 + "|")
    for r in rows(path):
        lines.append(
            f"| {r['teacher']}, {r['size'].replace(' ', ' x ')} | {r['student']} | {r['batch']} | {r['student_ms']} | "
            f"{r['stored_ms']} | **{r['speed_median']}** ({r['speed_quartiles'].replace(' ', ' to ')}) | {r['read_ms']} | "
            f"{r['cold_items_per_s']} | {r['device']}, {r['precision']} | {status(r, float(r['speed_median']) >= 0.95)} |"
        )
    return "\n".join(lines)


def bytes_table(path: Path) -> str:
    lines = [
        "| format | bytes an image and draw | MB | ImageNet, one draw, GB | status |",
        "| --- " * 5 + "|",
    ]
    for r in rows(path):
        told = status(r | {"load": "0"}, float(r["mb_an_image"]) <= 0.35 if r["format"] == DEFAULT else None)
        lines.append(
            f"| {r['format']} | {int(r['bytes_an_image']):,} | {r['mb_an_image']} | {r['imagenet_gb']} | {told} |"
        )
    return "\n".join(lines)


DEFAULT = "PCA 63 + energy, int8"  # what `make-features` does unless asked


def accuracy_table(path: Path) -> str:
    """Mean ± sample deviation over seeds of each format, and its difference to online (without flips: to online without
    flips) in units of the larger of the two deviations."""
    values: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    facts: dict[str, dict[str, str]] = {}
    for r in rows(path):
        if r["metric"] == "accuracy":
            values[r["method"], r["task"], r["labels"]].append(float(r["value"]))
            facts[r["method"]] = r
    tasks = list(dict.fromkeys((task, labels) for _, task, labels in values))
    named = [f"{TASKS[task].split(',')[0]}{f', {n} per class' if n else ''}" for task, n in tasks]
    lines = [
        f"| targets | draws | bytes | {' | '.join(f'{n} | to online' for n in named)} | within a deviation |"
    ]
    lines.append("| --- " * (4 + 2 * len(tasks)) + "|")
    for method, r in facts.items():
        cells, worst = [], 0.0
        base = "online, no flips" if "no flips" in method and "online, no flips" in facts else "online"
        for task in tasks:
            mean, deviation = mean_and_deviation(values[method, *task])
            cells.append(f"{mean:.3f} ± {deviation:.3f}")
            if method.startswith("online"):
                cells.append("")
                continue
            theirs, their_deviation = mean_and_deviation(values[base, *task])
            apart = (mean - theirs) / max(deviation, their_deviation, 1e-9)
            worst = min(worst, apart)
            cells.append(f"{mean - theirs:+.3f} ({apart:+.1f} dev.)")
        kept = "" if method.startswith("online") else "yes" if worst >= -1 else "no"
        size = f"{int(r['bytes']):,}" if int(r["bytes"]) else ""
        lines.append(f"| {method} | {r['draws']} | {size} | {' | '.join(cells)} | {kept} |")
    return "\n".join(lines)


def startup_table(path: Path) -> str:
    lines = ["| | seconds | x `import torch` | CPU-s | peak memory, MB | status |", "| --- " * 6 + "|"]
    for r in rows(path):
        lines.append(
            f"| {r['what']} | {r['seconds']} | **{r['ratio_median']}** ({r['ratio_range'].replace(' ', ' to ')}) | "
            f"{r['cpu_s']} | {r['peak_mb']} | {status(r)} |"
        )
    return "\n".join(lines)


def loading_table(path: Path) -> str:
    lines = ["| images | way | images/s | x PIL alone | status |", "| --- " * 5 + "|"]
    for r in rows(path):
        lines.append(
            f"| {r['set']} | {r['way']} | {r['images_per_s']} | **{r['ratio_median']}** "
            f"({r['ratio_range'].replace(' ', ' to ')}) | {status(r)} |"
        )
    return "\n".join(lines)


def unless_missing(make: Callable[[Path], str], path: Path) -> str:
    """The table, or that its benchmark was not run."""
    return (
        make(path) if path.exists() else f"*not run* (benchmarks/{path.parent.name}/{path.name} is not there)"
    )


def distributed_table(path: Path) -> str:
    lines = ["| student | teacher | images of each | alone, ms | at once, ms | together, ms | exchange, ms | speed kept | "
             "without waiting | with local BatchNorm | status |", "| --- " * 11 + "|"]  # fmt: skip
    for r in rows(path):
        spread = r["apart_over_together_quartiles"].replace(" ", " to ")
        lines.append(
            f"| {r['student']} | {r['teacher']} | {r['images_per_process']} | {r['alone_ms']} | {r['apart_ms']} | "
            f"{r['together_ms']} | {r['exchange_ms']} | **{r['apart_over_together']}** ({spread}) | "
            f"{r['apart_over_exchanged']} | {r['apart_over_local']} | "
            f"{status(r, float(r['apart_over_together']) >= 0.95, quiet=0.7)} |"  # its own three processes have begun
        )
    return "\n".join(lines)


def gpu_speed_table(folder: Path) -> str:
    """What `speed.py` wrote; its configurations that no CSV has are *not run*."""
    lines = [
        "| teacher | images a step | torch.compile | images/s | peak memory, GB | 10^12 FLOP/s | of the matrix rate | status |"
    ]
    lines.append("| --- " * 8 + "|")
    path = folder / "speed.csv"
    found = {(r["teacher"], r["batch"], r["compile"]): r for r in (rows(path) if path.exists() else [])}
    wanted = runpy.run_path(str(folder / "configurations.py"))["CONFIGURATIONS"]
    for teacher, batch, compile in wanted:
        r = found.get((teacher, str(batch), compile), {"status": "*not run*"})
        if r["status"] == "measured":
            status = f"{r['device']}, {r['precision']}"
            cells = [r["images_per_s"], r["peak_gb"], r["tflops"], f"**{float(r['share']):.0%}**"]
        else:
            status, cells = r["status"], [""] * 4
        lines.append(f"| {teacher} | {batch} | {compile} | {' | '.join(cells)} | {status} |")
    return "\n".join(lines)


def gpu_train_table(path: Path) -> str:
    if path.exists():
        return results_table(path)
    lines = ["| | labels | random init | DreamTeacher | difference |", "| --- " * 5 + "|"]
    return "\n".join([*lines, *(f"| {TASKS[task]} | | | | *not run* |" for task in ("knn", "linear"))])


TABLES = {
    "demo": lambda: results_table(HERE / "demo" / "results.csv"),
    "vit": lambda: vit_table(HERE / "demo" / "results.csv", HERE / "vit" / "results.csv"),
    "step": lambda: step_table(HERE / "step" / "step.csv"),
    "early_exit": lambda: early_exit_table(HERE / "early_exit" / "early_exit.csv"),
    "teachers": lambda: teachers_table(HERE / "teachers" / "teachers.csv"),
    "stylegan2": lambda: results_table(HERE / "demo" / "results.csv", HERE / "stylegan2" / "results.csv"),
    "label_efficient_lungs": lambda: label_efficient_table(HERE / "label_efficient" / "lungs.csv"),
    "label_efficient_camvid": lambda: label_efficient_table(HERE / "label_efficient" / "camvid.csv"),
    "interpreter": lambda: interpreter_table(HERE / "interpreter" / "memory.csv"),
    "transfer_cifar10": lambda: transfer_table(HERE / "transfer" / "cifar10.csv"),
    "transfer_dsb2018": lambda: transfer_table(HERE / "transfer" / "dsb2018.csv"),
    "transfer_camvid": lambda: transfer_table(HERE / "transfer" / "camvid.csv"),
    "camvid": lambda: results_table(HERE / "camvid" / "results.csv"),
    "features_speed": lambda: unless_missing(speed_table, HERE / "features" / "speed.csv"),
    "features_bytes": lambda: unless_missing(bytes_table, HERE / "features" / "bytes.csv"),
    "features_accuracy": lambda: unless_missing(accuracy_table, HERE / "features" / "accuracy.csv"),
    "startup": lambda: unless_missing(startup_table, HERE / "startup" / "startup.csv"),
    "loading": lambda: unless_missing(loading_table, HERE / "loading" / "loading.csv"),
    "distributed": lambda: unless_missing(distributed_table, HERE / "distributed" / "distributed.csv"),
    "distributed_demo": lambda: unless_missing(results_table, HERE / "distributed" / "demo.csv"),
    **PLAN["TEXTS"],
    "gpu_speed": lambda: gpu_speed_table(HERE / "gpu"),
    "gpu_train": lambda: gpu_train_table(HERE / "gpu" / "results.csv"),
}


def render(text: str) -> str:
    """The document with every table made anew."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> int:
    stale = []
    top = HERE.parent
    for path in [top / "README.md", top / "dev" / "LOG.md", *sorted((top / "docs").glob("*.md"))]:
        old = path.read_text()
        new = render(old)
        if new != old:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(new)
    print(f"stale: {', '.join(stale)}" if stale else "all tables are current")
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
