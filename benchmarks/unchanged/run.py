"""Does a change of the code leave every number as it was, bit for bit?

About thirty updates of everything that trains, through the command line alone, on small pictures that are made for it:
`pretrain` from every kind of features, `train-interpreter`, `train-teacher`, `evaluate` on every task. Kept are the rows
of metrics.jsonl and results.jsonl, the learning rates and checksums of all gradients and weights after every update of
any optimizer, and checksums of all weights, stored features and labels that are written. Runs that are stopped and
resumed must also equal the run that nobody stopped.

    python benchmarks/unchanged/run.py --write benchmarks/unchanged/before.json --package OLD_CHECKOUT --before
    python benchmarks/unchanged/run.py --compare benchmarks/unchanged/before.json

--compare measures again and prints for each case "equal", or the first value that differs with both numbers; it exits
with 1 if anything differs. Equality to the bit holds on one kind of processor with one version of torch: it says so
where these differ, and then the old checkout is to be measured there as well. before.json is of version 0.1.0.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}  # before torch is imported

import numpy
import pictures
import PIL
import recorder
import safetensors
import timm
import torch
import torchvision.models.detection
import torchvision.transforms.v2
import tyro
from diffusers import UNet2DModel
from PIL import Image
from safetensors.numpy import load_file

HERE = Path(__file__).resolve().parent
PRELOADED = (tyro, UNet2DModel)  # here, and not once more for each command

# --- what has got another name since before.json was written -------------------------------------------------

# Verb -> a word of the commands below (a setting or a value) -> what it is now; "" for nothing.
WORDS: dict[str, dict[str, str]] = {
    "pretrain": {"--mode": "--distill", "--share": "--synthesized-fraction", "mixture": "both"},
    "evaluate": {
        "--segment.ignore-index": "--ignore-index",
        "--semantic.masks": "--semantic.mask-counts",
        "--readout.masks": "--readout.mask-counts",
        "--detect.images": "--detect.image-counts",
        "--panoptic.detect.images": "--panoptic.detect.image-counts",
    },
}
# A metric, task or file as it is called now -> as it was called.
NAMES: dict[str, str] = {}

# --- the cases -------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """Commands that run in order, and what is to be equal.

    Args:
        commands: `@data` is the folder of pictures, `@out` this case's own, `@NAME` that of another case.
        stops: "UPDATE SIGNAL" of each command that is stopped, "" for the others.
        like: the case whose metrics and weights these must be.
    """

    commands: tuple[str, ...]
    stops: tuple[str, ...] = ()
    like: str = ""


PRETRAIN = (
    "pretrain --student test_resnet --width 16 --batch-size 8 --epochs 5 --warmup-epochs 1 --log-every 1 "
    "--probe-every 15"
)
ENCODED = f"{PRETRAIN} --images @data/classes/train"
LABEL = "--label.epochs 10 --label.warmup-epochs 2 --label.width 16"
SCENES = "--images @data/scenes/train/images"
MASKS = f"{SCENES} --masks @data/scenes/train/classes"
TEST_MASKS = "--test-images @data/scenes/test/images --test-masks @data/scenes/test/classes"
CLASSES = "--train @data/classes/train --test @data/classes/test"
INTERPRETER = "train-interpreter --epochs 10 --warmup-epochs 2 --width 16 --look-every 5 --out @out"
TEACHER = "train-teacher --images @data/classes/train --steps 30 --batch-size 8 --size 32 32 --out @out"
FEATURES = "make-features --images @data/classes/train --channels 16 --fit 2000 --out @out/store"
STORED = f"{ENCODED} --features @out/store --out @out/run"
EVALUATE = "evaluate --student test_resnet --size 64 64 --seeds 0 --out @out"
DETECT = (
    "{0}.steps 30 {0}.batch-size 2 {0}.short-side 64 64 {0}.test-side 64 {0}.longest-side 96 {0}.width 16 "
    "{0}.fc 32 {0}.rois 16 {0}.anchors 32 {0}.proposals 32 {0}.anchor 6 {0}.layer-decay 0.8"
)
CROPS = "{0}.crops.short-side 64 {0}.crops.size 64 64"
SEMANTIC = (
    f"{EVALUATE} --tasks semantic {MASKS} {TEST_MASKS} --semantic.steps 30 --semantic.batch-size 4 "
    f"--semantic.width 16 --semantic.warmup 0.1 {CROPS.format('--semantic')}"
)
FULL = (
    f"{EVALUATE} {CLASSES} --tasks finetune-full --finetune-full.epochs 5 --finetune-full.batch-size 8 "
    "--finetune-full.warmup-epochs 1"
)

CASES: dict[str, Case] = {
    # Feature distillation, and what changes its step.
    "feature": Case((f"{ENCODED} --out @out",)),
    "feature-resnet18": Case((f"{ENCODED} --student resnet18 --width 32 --epochs 1 --out @out",)),
    "feature-vit": Case((f"{ENCODED} --student test_vit --epochs 2 --out @out",)),
    "feature-c-public-fixed": Case((
        f"{ENCODED} --whiten c --at-reduction public --at-weight 3 --noise fixed --t 50 200 --no-flip --epochs 2 --out @out",
    )),
    "feature-inversion": Case((f"{ENCODED} --noise inversion --teacher-batch 3 --epochs 0.5 --warmup-epochs 0 --out @out",)),
    "feature-ema": Case((f"{ENCODED} --ema 0.9 --out @out",)),
    "feature-accumulate": Case((f"{ENCODED} --accumulate 2 --out @out",)),
    "feature-lamb-clip": Case((f"{ENCODED} --optimizer lamb --clip 0.5 --out @out",)),
    "feature-streamed": Case((f"{ENCODED} --cache-gb 0 --epochs 2 --out @out",)),
    "feature-stopped": Case((f"{ENCODED} --out @out",) * 2, ("12 SIGTERM", ""), like="feature"),
    "feature-killed": Case(
        (f"{ENCODED} --ema 0.9 --save-every 8 --out @out",) * 2, ("21 SIGKILL", ""), like="feature-ema"
    ),
    # The teacher's own images.
    "synthesized": Case((
        f"{PRETRAIN} --teacher chest-xray-gan-64 --dataset synthesized --samples 48 --out @out",
    )),
    "mixture": Case((f"{ENCODED} --dataset mixture --share 0.25 --epochs 0.5 --warmup-epochs 0 --out @out",)),
    # Features from a disk.
    "stored-pca": Case((FEATURES, STORED)),
    "stored-random": Case((f"{FEATURES} --keep random --draws 1 --no-flip --whiten c",
                           f"{STORED} --whiten c --epochs 2")),
    "stored-whitened": Case((f"{FEATURES} --keep whitened --store float16 --draws 1", f"{STORED} --epochs 2")),
    "stored-raw": Case((f"{FEATURES} --keep all", STORED)),
    # Labels.
    "interpreter-masks": Case((f"{INTERPRETER} {MASKS} --labels 12",)),
    "interpreter-classes": Case((f"{INTERPRETER} --images @data/classes/train --labels 6",)),
    "interpreter-coco": Case((
        f"{INTERPRETER} {SCENES} --masks @data/scenes/train/instances.json --labels 12 --class-weights balanced "
        "--ema 0.9",
    )),
    "interpreter-npy": Case((
        f"{INTERPRETER} {SCENES} --masks @data/scenes/train/arrays --teacher-batch 3 --blocks 2 5 --t 50 200 "
        "--val-images @data/scenes/test/images --val-masks @data/scenes/test/arrays",
    )),
    "interpreter-stopped": Case((f"{INTERPRETER} {MASKS} --labels 12",) * 2, ("7 SIGTERM", ""),
                                like="interpreter-masks"),
    "label": Case((f"{ENCODED} --mode label --interpreter @interpreter-masks --out @out",)),
    "mixed": Case((
        f"{ENCODED} --mode mixed --labelled @data/scenes/train/images --masks @data/scenes/train/classes {LABEL} "
        "--out @out",
    )),
    "mixed-classes": Case((
        f"{ENCODED} --mode mixed --interpreter @interpreter-classes --tau 2 --label-weight 0.5 --out @out",
    )),
    "labels": Case((
        "make-labels --interpreter @interpreter-masks --images @data/scenes/test/images --soft --out @out/real",
        "make-labels --run @mixed --images @data/scenes/test/images --out @out/run",
        "make-labels --teacher chest-xray-gan-64 --samples 12 --out @out/samples",
    )),
    # Teachers of one's own.
    "teacher-diffusion": Case((TEACHER,)),
    "teacher-stylegan2": Case((f"{TEACHER} --preset stylegan2-cpu-64",)),
    "teacher-ada": Case((f"{TEACHER} --preset stylegan2-cpu-64 --ada 0.6 --gamma 1 --channels rgb --no-flip --steps 20",)),
    "teacher-stopped": Case((TEACHER,) * 2, ("12 SIGTERM", ""), like="teacher-diffusion"),
    "teacher-used": Case((f"{ENCODED} --teacher @teacher-diffusion --epochs 1 --out @out",)),
    # What a backbone is worth.
    "probes": Case((f"{EVALUATE} --init @feature {CLASSES} --tasks knn linear finetune --labels 4 8 --finetune.steps 30",)),
    "masks": Case((
        f"{EVALUATE} --init @mixed {MASKS} {TEST_MASKS} --tasks segment-frozen segment-finetune segment-linear "
        "distilled --mask-counts 6 --segment.steps 30 --segment.width 16",
        f"{EVALUATE}/neck --init @mixed {MASKS} --tasks segment-finetune --neck --mask-counts 6 --segment.steps 10 "
        "--segment.width 16",
        f"{EVALUATE}/classes --init @mixed-classes {CLASSES} --tasks distilled-classes",
    )),
    "linear-sgd": Case((
        f"{EVALUATE} {CLASSES} --tasks linear-sgd --linear-sgd.epochs 5 --linear-sgd.batch-size 8 "
        "--linear-sgd.weight-decay 0.0001 --linear-sgd.warmup-epochs 1",
    )),
    "finetune-full": Case((
        FULL,
        f"{FULL.replace('@out', '@out/convnext')} --finetune-full.preset convnext --finetune-full.ema 0.9 "
        "--finetune-full.accumulate 2 --finetune-full.layer-decay 0.8 --finetune-full.epochs 2",
    )),
    "semantic": Case((SEMANTIC,)),
    "semantic-adamw-slide": Case((
        f"{SEMANTIC} --semantic.optimizer adamw --semantic.lr 0.001 --semantic.test slide --semantic.steps 10 "
        "--semantic.norm --semantic.crops.short-side 80",
    )),
    "semantic-stopped": Case((SEMANTIC,) * 2, ("12 SIGTERM", ""), like="semantic"),
    "readout": Case((
        f"{EVALUATE} --tasks readout {MASKS} {TEST_MASKS} --readout.steps 30 --readout.batch-size 4 "
        f"--readout.masks 8 {CROPS.format('--readout')}",
    )),
    "detect": Case((
        f"{EVALUATE} --tasks detect {SCENES} --instances @data/scenes/train/instances.json --test-images "
        f"@data/scenes/test/images --test-instances @data/scenes/test/instances.json {DETECT.format('--detect')}",
    )),
    "detect-cascade": Case((
        f"{EVALUATE} --tasks detect-cascade {SCENES} --instances @data/scenes/train/instances "
        f"{DETECT.format('--detect')} --detect.optimizer sgd --detect.milestones 0.5 --detect.steps 10",
    )),
    "panoptic": Case((
        f"{EVALUATE} --tasks panoptic {SCENES} --masks @data/scenes/train/segments --segments "
        "@data/scenes/train/panoptic.json --panoptic.width 16 --panoptic.stuff-area 100 "
        f"{DETECT.format('--panoptic.detect')}",
    )),
}  # fmt: skip


def needed(names: list[str]) -> list[str]:
    """These cases and those whose folders they read, in order."""
    wanted = set(names)
    for name in reversed(CASES):
        if name in wanted:
            words = " ".join(CASES[name].commands).split()
            wanted |= {CASES[name].like} | {w[1:].split("/")[0] for w in words if w[0] == "@"}
    return [name for name in CASES if name in wanted]


# --- measuring -------------------------------------------------------------------------------------------------


def words_of(command: str, out: Path, folder: Path, before: bool) -> list[str]:
    """A command as words of a command line; the last of two equal settings stays."""
    verb, *rest = command.split()
    settings: dict[str, list[str]] = {}
    for word in rest:
        if word.startswith("--"):
            flag, settings[word] = word, []
        else:
            settings[flag].append(word)
    settings |= {"--device": ["cpu"], "--precision": ["float32"]}
    words = [word for flag, values in settings.items() for word in (flag, *values)]
    if not before:
        words = [w for word in words for w in WORDS.get(verb, {}).get(word, word).split()]
    places = {"data": folder / "data", "out": out, **{name: folder / name for name in CASES}}
    for i, word in enumerate(words):
        if word.startswith("@"):
            name, slash, below = word[1:].partition("/")
            words[i] = f"{places[name]}{slash}{below}"
    return [verb, *words]


def run_case(name: str, folder: Path, package: Path, before: bool) -> dict[str, Any]:
    """Runs the commands of a case; what they left.

    Raises:
        RuntimeError: a command ended otherwise than it should.
    """
    case, out = CASES[name], folder / name
    updates = folder / f"{name}.updates"
    cpu = 0.0
    for i, command in enumerate(case.commands):
        stop, log = case.stops[i] if case.stops else "", folder / f"{name}.log"
        words = words_of(command, out, folder, before)
        code, spent = recorder.run(words, package=package, folder=folder, log=log, updates=updates, stop=stop)
        cpu += spent
        number = getattr(signal, stop.split()[1]) if stop else 0
        if code != (-number if number == signal.SIGKILL else 128 + number if number else 0):
            raise RuntimeError(
                f"exit code {code} of: dreamteacher {' '.join(words)}\n{log.read_text()[-1500:]}"
            )
    lines = updates.read_text().splitlines() if updates.exists() else []
    return {
        "values": dict(sorted(values_of(out))),
        "updates": [[float(r) for r in line.split()[0].split(",")] + line.split()[1:] for line in lines],
        "files": dict(sorted(files_of(out))),
        "cpu_seconds": round(cpu, 1),
    }


def old_name(name: str) -> str:
    """A name as it was in before.json, `/` apart."""
    return "/".join(NAMES.get(part, part) for part in NAMES.get(name, name).split("/"))


def values_of(out: Path) -> Iterator[tuple[str, Any]]:
    """Columns of all metrics.jsonl (the losses whole, of others count, first, last and a checksum), and results."""
    for path in sorted(out.rglob("metrics.jsonl")):
        place = path.parent.relative_to(out).as_posix()
        columns: dict[str, list[tuple[int, float]]] = {}
        for line in path.read_text().splitlines():
            row = json.loads(line)
            step = row.pop("step")
            for key, value in row.items():
                columns.setdefault(old_name(key), []).append((step, value))
        for key, column in columns.items():
            numbers = [value for _, value in column]
            if key.split("/")[0] not in ("loss", "grad_norm", "loss_g", "loss_d"):
                numbers = [len(column), numbers[0], numbers[-1], hashed(repr(column).encode())]
            yield f"{place}: {key}", numbers
    for path in sorted(out.rglob("results.jsonl")):
        place = path.parent.relative_to(out).as_posix()
        for line in path.read_text().splitlines():
            row = json.loads(line)
            what = (old_name(row["task"]), row["labels"], row["seed"], old_name(row["metric"]))
            yield f"{place}: {' '.join(map(str, what))}", row["value"]


def files_of(out: Path) -> Iterator[tuple[str, list[str]]]:
    """Checksums of weights, stored features and pictures: [of names and values, of the values alone]."""
    for path in sorted(out.rglob("*")):
        name = old_name(path.relative_to(out).as_posix())
        if path.suffix == ".safetensors" and not path.name.startswith("checkpoint-"):
            tensors = load_file(path)
            values = {
                key: hashed(f"{t.dtype} {t.shape}".encode() + numpy.ascontiguousarray(t).tobytes())
                for key, t in tensors.items()
            }
            yield (
                name,
                [
                    hashed(repr(sorted(values.items())).encode()),
                    hashed(repr(sorted(values.values())).encode()),
                ],
            )
        elif path.suffix == ".png":
            with Image.open(path) as picture:
                content = f"{picture.mode} {picture.size}".encode() + picture.tobytes()
            yield name, [hashed(content)]
        elif path.suffix == ".npy":
            yield name, [hashed(path.read_bytes())]


def hashed(content: bytes) -> str:
    """A short sha256."""
    return hashlib.sha256(content).hexdigest()[:12]


def environment() -> dict[str, Any]:
    """What equality to the bit depends on."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    facts = dict(line.split(":", 1) for line in info.splitlines()[:40] if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    flags = [
        f
        for f in facts.get("flags", "").split()
        if f.startswith(("avx", "fma", "amx", "sse4", "bf16", "f16c"))
    ]
    return {
        "python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
        "timm": timm.__version__, "numpy": numpy.__version__, "pillow": PIL.__version__,
        "safetensors": safetensors.__version__, "machine": platform.machine(), "cpu": facts.get("model name", ""),
        "capability": torch.backends.cpu.get_cpu_capability(), "flags": " ".join(sorted(flags)),
        "limits": " ".join(f"{k}={os.environ[k]}" for k in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY") if k in os.environ),
    }  # fmt: skip


# --- comparing -------------------------------------------------------------------------------------------------


def differences(old: dict[str, Any], new: dict[str, Any], updates: bool = True) -> Iterator[str]:
    """What of `old` is not in `new`, in words: values, then updates, then files."""
    for key, value in old["values"].items():
        found = new["values"].get(key)
        if found is None:
            yield f"{key} is missing"
        elif repr(found) != repr(value):
            if isinstance(value, list) and isinstance(found, list):
                at = next(
                    (
                        i
                        for i, pair in enumerate(zip(value, found, strict=False))
                        if repr(pair[0]) != repr(pair[1])
                    ),
                    -1,
                )
                if at < 0:
                    yield f"{key}: {len(value)} values were, {len(found)} are"
                else:
                    yield f"{key}, number {at + 1}: {value[at]!r} was, {found[at]!r} is"
            else:
                yield f"{key}: {value!r} was, {found!r} is"
    if updates and old["updates"] != new["updates"]:
        pairs = zip(old["updates"], new["updates"], strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), -1)
        if at < 0:
            yield f"{len(old['updates'])} updates were, {len(new['updates'])} are"
        else:
            yield f"update {at + 1} (rates, gradients, weights): {old['updates'][at]} was, {new['updates'][at]} is"
    for key, sums in old["files"].items():
        found = new["files"].get(key)
        if found is None:
            yield f"{key} is missing"
        elif found[-1] != sums[-1]:
            yield f"{key}: {sums[-1]} was, {found[-1]} is"


def renamed(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Files whose tensors have the same values under other names, and values that are new."""
    found = [
        f"{k}: other names" for k, s in old["files"].items() if k in new["files"] and s != new["files"][k]
    ]
    return found + [f"{k}: new" for part in ("values", "files") for k in new[part] if k not in old[part]]


def compare(name: str, old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Prints what became of one case; whether it is equal."""
    found = list(differences(old, new))
    notes = [] if found else renamed(old, new)
    print(f"{name}: " + (f"{found[0]} (and {len(found) - 1} more)" if found else "equal"), flush=True)
    for note in notes[:5]:
        print(f"  {note}", flush=True)
    return not found


# --- as a command ----------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any] | None, float]]:
    """Each case with what it left (None: it failed, and why is printed) and its seconds."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pictures.write_all(folder / "data")
        done: dict[str, dict[str, Any]] = {}
        for name in needed(args.only or list(CASES)):
            begin = time.perf_counter()
            try:
                done[name] = run_case(name, folder, args.package.resolve(), args.before)
                like = CASES[name].like
                odd = list(differences(done[like], done[name], updates=False)) if like in done else []
                if odd:
                    raise RuntimeError(f"it was resumed and is not '{like}': {odd[0]}")
            except RuntimeError as error:
                print(f"{name}: FAILED: {error}", flush=True)
                yield name, None, time.perf_counter() - begin
            else:
                yield name, done[name], time.perf_counter() - begin


def write(path: Path, head: dict[str, Any], cases: dict[str, dict[str, Any]]) -> None:
    """One JSON file, with a line for each part of a case."""
    rows = []
    for name, found in sorted(cases.items(), key=lambda case: list(CASES).index(case[0])):
        parts = [f'  "{key}": {json.dumps(value)}' for key, value in found.items()]
        rows.append(f' "{name}": {{\n' + ",\n".join(parts) + "\n }")
    text = json.dumps(head, indent=1).removesuffix("\n}") + ',\n "cases": {\n' + ",\n".join(rows) + "\n}}\n"
    path.write_text(text)


def main() -> int:
    """Writes or compares; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", type=Path, help="JSON file to write what was measured to")
    parser.add_argument("--compare", type=Path, help="JSON file to compare what is measured with")
    parser.add_argument(
        "--only", nargs="+", metavar="CASE", choices=CASES, help="some cases, and those they need"
    )
    parser.add_argument("--package", type=Path, default=HERE.parent.parent, help="checkout to measure")
    parser.add_argument("--before", action="store_true", help="that checkout has the names of before")
    args = parser.parse_args()

    old = json.loads(args.compare.read_text()) if args.compare else None
    here, good, kept, seconds = environment(), True, {}, {}
    if args.write and args.only and args.write.exists():  # the other cases stay
        there = json.loads(args.write.read_text())
        if there["environment"] != here:
            parser.error(f"{args.write} is of another environment")
        kept, seconds = there["cases"], there["cpu_seconds"]
    if old:
        for key in (key for key in here if old["environment"].get(key) != here[key]):
            print(f"Other environment, bits may differ: {key}: {old['environment'].get(key)} -> {here[key]}")
    for name, found, spent in measure(args):
        seconds[name] = (found or {}).pop("cpu_seconds", 0.0)
        if found is None:
            good = False
            continue
        kept[name] = found
        if args.write:
            write(args.write, {"environment": here, "cpu_seconds": seconds}, kept)
        if old is None:
            print(f"{name}: {len(found['values'])} values, {len(found['updates'])} updates, "
                  f"{len(found['files'])} files, {spent:.0f} s, {seconds[name]:.1f} s of a CPU", flush=True)  # fmt: skip
        elif name in old["cases"]:
            # Through JSON, as what it is compared with.
            good &= compare(name, old["cases"][name], json.loads(json.dumps(found)))
        else:
            print(f"{name}: not in {args.compare}", flush=True)
    if old:
        for name in (name for name in old["cases"] if not args.only and name not in CASES):
            print(f"{name}: no such case any more")
            good = False
    print(
        f"{len(kept)} cases, {sum(seconds.values()):.0f} s of a CPU: {'all well' if good else 'NOT all well'}"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
