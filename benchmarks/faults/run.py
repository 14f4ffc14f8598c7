"""Are runs that are killed at random moments, and resumed, bitwise the runs that nobody killed?

Small runs of `pretrain`, `train-teacher` and `make-features` are killed (SIGKILL) again and again, each time resumed
by the same command, until they are through; then their folder is compared with that of an uninterrupted run: weights,
checkpoint, optimizer and metrics, every bit; of stored features every file. Half of the kills come at any moment of
a life, half while something is being saved. Each life is a fork of this process, which has imported everything and
computed nothing.

A row is a kill: its number, the verb, the run that it hit, how it was aimed, the step (of make-features: the shard)
at the kill, whether a save was under way, where the next life began, whether the run's result is the uninterrupted
one's, and temporary files that were left in the end.

    python benchmarks/faults/run.py --out benchmarks/faults/kills.csv
"""

from __future__ import annotations

import argparse
import csv
import json
import mmap
import os
import platform
import random
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors.torch import load_file

from dreamteacher import __version__
from dreamteacher.distill import config, pretrain
from dreamteacher.distill import config as distill_config
from dreamteacher.distill.dataset import PartStream
from dreamteacher.distill.store import make
from dreamteacher.distill.store import writer as store_writer
from dreamteacher.runtime import checkpoint
from dreamteacher.teachers.diffusion.teacher import DiffusionSpec, DiffusionTeacher, build_unet
from dreamteacher.teachers.registry import save_teacher
from dreamteacher.teachers.training import config as training_config
from dreamteacher.teachers.training import diffusion, train

LEVELS = 5
UNET = {
    "sample_size": [32, 32], "in_channels": 4, "out_channels": 4, "block_out_channels": [8] * LEVELS,
    "layers_per_block": 1, "down_block_types": ["DownBlock2D"] * (LEVELS - 1) + ["AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D"] + ["UpBlock2D"] * (LEVELS - 1), "attention_head_dim": 8,
    "norm_num_groups": 4, "attn_norm_num_groups": 4,
}  # fmt: skip
TINY = diffusion.DiffusionPreset(
    channels=(8,) * LEVELS, layers=1, attention=(4,), head=8, patch=2, groups=4, resample=False, dropout=0.0,
    size=(64, 64), batch_size=8, lr=4e-3, steps=40, ema=0.8, timestep=100,
)  # fmt: skip
KILLS_A_RUN = 5


class Verb(NamedTuple):
    """A command that is killed: `act(out)` runs it; `result(out)` is everything that it leaves, to be compared."""

    act: Callable[[Path], object]
    result: Callable[[Path], dict[str, Any]]


class Board:
    """What a child tells its parent at any moment, a kill included: memory that both share."""

    LAYOUT = struct.Struct("<4q")  # step, first step of this life, saves begun, whether one is under way

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, self.LAYOUT.size)
        self.clear()

    def clear(self) -> None:
        self.step, self.first, self.saves, self.saving = 0, -1, 0, 0
        self.write()

    def write(self) -> None:
        self.memory[:] = self.LAYOUT.pack(self.step, self.first, self.saves, self.saving)

    def read(self) -> Board:
        self.step, self.first, self.saves, self.saving = self.LAYOUT.unpack(self.memory[:])
        return self

    def begin(self, step: int) -> None:
        self.step, self.first = step, step if self.first < 0 else self.first
        self.write()

    @contextmanager
    def save(self) -> Any:
        self.saves, self.saving = self.saves + 1, 1
        self.write()
        yield
        self.saving = 0
        self.write()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(1)
    begin, draw, board, rows = time.perf_counter(), random.Random(args.seed), Board(), []
    with tempfile.TemporaryDirectory() as name:
        verbs = prepare(Path(name), args.images, args.steps)
        whole = {}
        for verb in verbs:
            started = time.perf_counter()
            out = Path(name, f"{verb}-whole")
            assert end(life(verbs[verb], out, board)) == 0, f"the uninterrupted {verb} failed"
            whole[verb] = verbs[verb].result(out), time.perf_counter() - started
            print(f"{verb}: {whole[verb][1]:.1f} s uninterrupted", flush=True)
        number = 0
        while len(rows) < args.kills:
            verb = ["pretrain", "make-features", "pretrain", "train-teacher"][number % 4]
            out = Path(name, f"{verb}-{number}")
            most = min(KILLS_A_RUN, args.kills - len(rows), -(-args.kills // 4))
            found = hit(verb, verbs[verb], out, board, draw, whole[verb][1], most)
            result = verbs[verb].result(out)
            left = [p for pattern in (".*tmp*", ".claims") for p in out.rglob(pattern)]
            for row in found:
                row |= {
                    "number": len(rows) + 1,
                    "run": number,
                    "equal": same(whole[verb][0], result),
                    "litter": len(left),
                }
                rows.append(row)
                print(", ".join(f"{k} {v}" for k, v in row.items()), flush=True)
            number += 1
    write(args.out, rows, time.perf_counter() - begin)
    assert all(row["equal"] and not row["litter"] for row in rows), (
        "a resumed run is not the uninterrupted one"
    )


def prepare(folder: Path, images: int, steps: int) -> dict[str, Verb]:
    """Images, a teacher with random weights, and the commands that use them."""
    (folder / "images").mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(images):
        pixels = torch.randint(0, 256, (64 * 64,), generator=generator, dtype=torch.uint8)
        Image.frombytes("L", (64, 64), bytes(pixels.tolist())).save(folder / "images" / f"{i}.png")
    (folder / "teacher").mkdir()
    torch.manual_seed(0)
    spec = DiffusionSpec(unet=UNET, patch=2, image_channels=1, size=(64, 64), timestep=100)
    card = {"name": "tiny", "licence": "CC0-1.0"}
    save_teacher(folder / "teacher", build_unet(spec).state_dict(), spec, card)
    train.PRESETS["cpu-64"] = TINY
    DiffusionTeacher.__init__.__kwdefaults__["sampling_steps"] = 2  # type: ignore[index]
    shared: dict[str, Any] = {"images": folder / "images", "device": "cpu", "precision": "float32"}
    teacher = str(folder / "teacher")

    def pretraining(out: Path) -> object:
        return pretrain.pretrain(config.PretrainConfig(
            **shared, out=out, teacher=teacher, student="test_resnet", width=8, batch_size=8, warmup_epochs=1,
            epochs=steps / (images // 8), log_every=3, save_every=4, probe_every=10, ema=0.9,
        ))  # fmt: skip

    def teaching(out: Path) -> object:
        return train.train_teacher(training_config.TrainTeacherConfig(
            **shared, out=out, steps=steps, save_every=4, sample_every=steps // 2, name="tiny",
        ))  # fmt: skip

    def features(out: Path) -> object:
        return make.make_features(distill_config.MakeFeaturesConfig(
            **shared, out=out, teacher=teacher, batch_size=4, shard_mb=0.2, keep="random", channels=8,
        ))  # fmt: skip

    def files(out: Path) -> dict[str, Any]:
        return {p.name: p.read_bytes() for p in out.iterdir() if p.is_file() and p.name != "config.json"}

    return {
        "pretrain": Verb(pretraining, lambda out: trained(out, ("backbone", "regressor"))),
        "train-teacher": Verb(teaching, lambda out: trained(out, ("teacher",))),
        "make-features": Verb(features, files),
    }


def trained(out: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """Checkpoint, weights and metrics of a run, as comparable values."""
    last = checkpoint.latest(out)
    assert last is not None
    tensors, meta = checkpoint.load(last)
    found: dict[str, Any] = {f"checkpoint/{k}": v for k, v in tensors.items()} | {"meta": meta}
    for name in names:
        found |= {f"{name}/{k}": v for k, v in load_file(out / f"{name}.safetensors").items()}
    return found | {"metrics": (out / "metrics.jsonl").read_bytes()}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    def equal(x: Any, y: Any) -> bool:
        return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y

    return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)


def life(verb: Verb, out: Path, board: Board) -> int:
    """Forks a process that runs the command; its number."""
    board.clear()
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        observe(board)
        verb.act(out)
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)


def observe(board: Board) -> None:
    """Makes the steps and saves of this process known on the board."""
    write_one, step_one = checkpoint.atomic_write, PartStream.of
    teach_one, shard_one = diffusion.DiffusionObjective.step, store_writer.Writer._write_shard

    def atomic_write(path: Path, write: Any) -> None:
        with board.save():
            write_one(path, write)

    def step(self: Any, index: int, *rest: Any) -> Any:
        board.begin(index)
        return step_one(self, index, *rest)

    def teach(self: Any, index: int, *rest: Any) -> Any:
        board.begin(index)
        return teach_one(self, index, *rest)

    def shard(self: Any, index: int, *rest: Any) -> None:
        board.begin(index)
        shard_one(self, index, *rest)

    checkpoint.atomic_write, PartStream.of = atomic_write, step  # type: ignore[method-assign]
    diffusion.DiffusionObjective.step = teach  # type: ignore[method-assign]
    store_writer.Writer._write_shard = shard  # type: ignore[method-assign]


def hit(
    name: str, verb: Verb, out: Path, board: Board, draw: random.Random, seconds: float, most: int
) -> list[dict[str, Any]]:
    """Runs a command to its end through at most so many kills; a row for each of them."""
    rows: list[dict[str, Any]] = []
    while True:
        child = life(verb, out, board)
        if len(rows) < most:
            aim = draw.choice(["any moment", "while saving"])
            wait(child, board, draw, aim, seconds)
        code = end(child)
        board.read()
        if rows:
            rows[-1]["resumed_from"] = board.first if board.first >= 0 else "killed before its first step"
        if code == 0:
            return rows
        assert code == -signal.SIGKILL, f"{name} ended with {code}"
        rows.append({"number": 0, "verb": name, "run": 0, "aimed": aim, "step": board.step})
        rows[-1] |= {"saving": bool(board.saving), "resumed_from": "", "equal": False, "litter": 0}


def wait(child: int, board: Board, draw: random.Random, aim: str, seconds: float) -> None:
    """Kills the child at any moment of the first half of a run, or in one of its next saves, or lets it end."""
    if aim == "any moment":
        time.sleep(draw.uniform(0.0, 0.5 * seconds))
    else:
        skipped, within = draw.randrange(1, 8), draw.uniform(0.0, 0.005)
        while not (board.read().saving and board.saves >= skipped):
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return
            time.sleep(0.0002)
        time.sleep(within)
    os.kill(child, signal.SIGKILL)  # it is not reaped yet: the number is still its own


def end(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def write(out: Path, rows: list[dict[str, Any]], seconds: float) -> None:
    with open(out, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    facts = {
        "command": "python benchmarks/faults/run.py " + " ".join(sys.argv[1:]), "kills": len(rows),
        "while_saving": sum(row["saving"] for row in rows), "equal": sum(row["equal"] for row in rows),
        "seconds": round(seconds), "dreamteacher": __version__, "torch": torch.__version__,
        "python": platform.python_version(), "machine": platform.machine(), "threads": torch.get_num_threads(),
    }  # fmt: skip
    out.with_name("environment.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(
        f"{facts['kills']} kills, {facts['while_saving']} while saving, {facts['equal']} equal, {seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
