"""Several processes: the same draws, losses, gradients and weights as one; resumption; kills; errors told once.

Processes are started by torchrun, three times in all, on gloo; `worker.py` is what they run.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dreamteacher.cli import main as cli
from dreamteacher.cli.config import DemoConfig
from dreamteacher.cli.demo import demo_recipe
from dreamteacher.data import batches as data_batches
from dreamteacher.data import image_set
from dreamteacher.distill import dataset
from dreamteacher.distill.config import PretrainConfig
from dreamteacher.distill.pretrain import pretrain
from dreamteacher.distill.store.reader import FeatureStore
from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.config import to_json
from dreamteacher.runtime.distributed.world import (
    ALONE,
    Draws,
    World,
    check_batch,
    launched,
    rand,
    randint,
    randn,
)
from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.run_folder import read_rows
from dreamteacher.teachers.in_parts import InParts
from dreamteacher.teachers.module import ModuleTeacher
from dreamteacher.teachers.registry import load_teacher
from dreamteacher.teachers.training.augment import augment
from dreamteacher.teachers.training.config import TrainTeacherConfig
from dreamteacher.teachers.training.train import PRESETS, train_teacher
from tests.places import ROOT
from tests.runtime.distributed import worker

HALVES = (World(0, 2), World(1, 2))


def together(halves: list[torch.Tensor]) -> torch.Tensor:
    """The whole batch from the rows of each process."""
    return torch.stack(halves, 1).flatten(0, 1)


# --- draws and streams, without other processes ------------------------------------------------------------


@pytest.mark.parametrize("draw", [randn, rand, lambda *a: randint(1000, *a)])
def test_rows_of_a_draw_are_those_of_the_whole_batch(draw):
    whole = [draw((6, 3), Draws("cpu", 5)), draw((6,), Draws("cpu", 6))]
    for ranks in (2, 3):
        for rank in range(ranks):
            world = World(rank, ranks)
            assert torch.equal(draw((6 // ranks, 3), Draws("cpu", 5, world)), whole[0][world.rows])
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(draw((6, 3), generator), whole[0])


def streams(kind: str, teacher: Any, images: image_set.ImageSet, world: World) -> list[dataset.FeatureBatch]:
    common = {"seed": 3, "device": torch.device("cpu"), "precision": "float32", "world": world}
    if kind == "synthesized":
        made = dataset.synthesized(teacher, batch_size=4, first_step=1, last_step=3, **common)
        return list(made)
    real = 2 if kind == "both" else 4
    batches = data_batches.batches(
        images, batch_size=real, seed=3, first_step=1, last_step=3, flip=True, world=world
    )
    if kind == "both":
        return list(dataset.both(teacher, batches, made=2, **common))
    return list(dataset.encoded(teacher, batches, **common))


@pytest.mark.parametrize("kind", ["encoded", "synthesized", "both", "streamed"])
def test_processes_see_their_rows_of_the_one_process_batch(kind, image_folder, tiny_teacher, monkeypatch):
    """The same images, mirrored alike, with the same noise."""
    worker.prepare(monkeypatch.setitem)
    teacher = load_teacher(str(tiny_teacher), timesteps=(100, 50))
    images = image_set.load_images(image_folder, (64, 64), cache_gb=0 if kind == "streamed" else 1)
    whole, first, second = (streams(kind, teacher, images, s) for s in (ALONE, *HALVES))
    assert len(whole) == 2
    for a, b, c in zip(whole, first, second, strict=True):
        if kind == "both":  # each process has its real images first
            b, c = ([t.chunk(2) for t in (x.images, *x.maps)] for x in (b, c))
            mixed = [
                torch.cat([together([x[0], y[0]]), together([x[1], y[1]])]) for x, y in zip(b, c, strict=True)
            ]
        else:
            mixed = [together(list(x)) for x in zip((b.images, *b.maps), (c.images, *c.maps), strict=True)]
        for i, (came, expected) in enumerate(zip(mixed, (a.images, *a.maps), strict=True)):
            if i == 0 and kind in ("encoded", "streamed"):
                assert torch.equal(came, expected)
            torch.testing.assert_close(came, expected, rtol=1e-3, atol=1e-4)  # rounding, of other batch sizes


def test_functions_of_the_user_that_draw_with_torch_see_the_whole_batch():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, stride=4, padding=1))
    teacher = ModuleTeacher(
        net, name="mine", size=(16, 16), levels={4: "0"}, to_images=lambda x: x.new_zeros(len(x), 3, 16, 16),
        encode=lambda x, g: x + torch.randn(x.shape, generator=g),
        sample=lambda n, g: torch.randn(n, 3, 16, 16, generator=g),
    )  # fmt: skip
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    whole = teacher.encode(images, generator=Draws("cpu", 1))[0]
    halves = [teacher.encode(images[s.rows], generator=Draws("cpu", 1, s))[0] for s in HALVES]
    torch.testing.assert_close(together(halves), whole)
    made = teacher.sample(4, generator=Draws("cpu", 2))[1][0]
    torch.testing.assert_close(
        together([teacher.sample(2, generator=Draws("cpu", 2, s))[1][0] for s in HALVES]), made
    )


@pytest.mark.parametrize("family", ["diffusion", "module"])
def test_a_process_whose_teacher_sees_parts_draws_its_rows_of_the_whole_batch(family, tiny_teacher):
    if family == "diffusion":
        teacher, size = load_teacher(str(tiny_teacher), timesteps=(100, 50)), 64
    else:
        net, size = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, stride=4, padding=1)), 16
        teacher = ModuleTeacher(
            net, name="mine", size=(16, 16), levels={4: "0"}, encode=lambda x, g: x + torch.randn(x.shape, generator=g)
        )  # fmt: skip
    images = torch.rand(6, 3, size, size, generator=torch.Generator().manual_seed(0))
    for world in HALVES:
        mine = images[world.rows]
        whole = teacher.encode(mine, generator=Draws("cpu", 1, world))
        other = teacher.encode(mine, generator=Draws("cpu", 2, world))
        parts = InParts(teacher, 2).encode(mine, generator=Draws("cpu", 1, world))
        for a, b, c in zip(whole, parts, other, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(c, a, rtol=1e-2, atol=1e-3)  # the noise is seen


def test_augmentation_disturbs_the_same_images_alike():
    images, p = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(0.7)
    whole = augment(images, p, Draws("cpu", 3))
    halves = [augment(images[s.rows], p, Draws("cpu", 3, s)) for s in HALVES]
    torch.testing.assert_close(together(halves), whole)
    assert not torch.equal(whole, images)


# --- what is refused ---------------------------------------------------------------------------------------


def test_what_processes_cannot_share_is_refused(monkeypatch):
    check_batch("a batch", 6, World(0, 3))
    with pytest.raises(UserError, match="3 processes cannot share"):
        check_batch("a batch", 8, World(0, 3))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert launched() == World(1, 2)
    with pytest.raises(UserError, match="runs in one process, and 2 were started"):
        cli.run("evaluate", [])


# --- several checks in one start ---------------------------------------------------------------------------


def torchrun(*arguments: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone", *arguments,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=500)


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DREAMTEACHER_TIMEOUT": "120", **more}


def config_of(images: Path, teacher: Path, out: Path) -> PretrainConfig:
    return PretrainConfig(
        images=images, out=out, teacher=str(teacher), student="test_resnet", width=8, batch_size=8, epochs=4,
        warmup_epochs=2, lr=1e-5, device="cpu", precision="float32", log_every=1, save_every=1, probe_every=4,
        keep_checkpoints=100, accumulate=2, ema=0.9, clip=1.0,
    )  # fmt: skip


def losses(run: Path) -> list[dict[str, Any]]:
    return [row for row in read_rows(run / "metrics.jsonl") if "loss" in row or "loss/g" in row]


# For runs in float64, whose rounding is 1e-16. Weights differ by 2e-15 after eight steps; at the demo's learning rate,
# where each step makes it about ten times larger, by 1e-11 after four. An error of one part in a million still shows.
SAME = 1e-8


def assert_near(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Each tensor within SAME of its norm."""
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert value.shape == b[key].shape, key
        assert value.dtype == b[key].dtype, key
        distance = float((value.double() - b[key].double()).norm())
        assert distance <= SAME * max(1.0, float(value.double().norm())), (key, distance)


def assert_same_run(one: Path, other: Path) -> None:
    """Every logged number, weights, averages and the optimizer's moments, of runs in float64."""
    rows, others = losses(one), losses(other)
    assert len(rows) == len(others) > 0
    for a, b in zip(rows, others, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert b[key] == pytest.approx(value, rel=SAME, abs=SAME), (key, a["step"])
    states = [whole_run(run) for run in (one, other)]
    assert torch.float64 in {v.dtype for v in states[0].values()}
    assert_near(*states)


def assert_equal(one: Path, other: Path) -> None:
    """Everything in the last checkpoint, bit for bit."""
    assert_same_tensors(whole_run(one), whole_run(other))


def assert_same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]), key


def whole_run(run: Path) -> dict[str, torch.Tensor]:
    last = checkpoint.latest(run)
    assert last is not None
    return checkpoint.load(last)[0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, image_folder: Path, tiny_teacher: Path):
    """One process here, then two of torchrun: the same pretraining and trainings of teachers."""
    root = tmp_path_factory.mktemp("many")
    config = config_of(image_folder, tiny_teacher, root / "one")
    with worker.in_float64():
        pretrain(config)
    teachers = []
    for preset, more in (("cpu-64", {}), ("stylegan2-cpu-64", {"ada": 0.6})):
        teacher = TrainTeacherConfig(
            images=image_folder, out=root / preset, preset=preset, device="cpu", precision="float32", **more
        )
        with pytest.MonkeyPatch.context() as patch, worker.in_float64():
            worker.prepare(patch.setitem)
            train_teacher(teacher)
        teachers.append(to_json(teacher))
    xrays = root / "xrays"
    for part in ("train", "test"):
        for name, new in (("bright", "NORMAL"), ("dark", "PNEUMONIA")):
            shutil.copytree(image_folder / name, xrays / part / new)
            for path in list((xrays / part / new).iterdir()):
                shutil.copy(path, path.with_name(f"again-{path.name}"))
    masks = xrays / "masks" / "test" / "NORMAL"
    masks.mkdir(parents=True)
    for path in (xrays / "test" / "NORMAL").iterdir():
        with Image.open(path) as image:
            mask = Image.new("L", image.size)
        mask.paste(255, (0, 0, mask.width // 2, mask.height))
        mask.save((masks / path.name).with_suffix(".png"))
    demo = ["--images", str(xrays), "--out", str(root / "demo"), "--teacher", str(tiny_teacher)]
    demo += ["--student", "test_resnet", "--epochs", "1", "--seeds", "0", "--labels", "2"]
    demo += ["--mask-counts", "4"]
    settings = DemoConfig(out=root, teacher=str(tiny_teacher), student="test_resnet", epochs=4)
    recipe = dataclasses.replace(
        demo_recipe(settings, xrays / "train", 0), out=root / "recipe", device="cpu", precision="float32", log_every=1
    )  # fmt: skip
    with worker.in_float64():
        pretrain(recipe)
    # As users have it, in float32:
    first = dataclasses.replace(recipe, out=root / "first", epochs=1, warmup_epochs=0)
    pretrain(first)
    recipe, first = (dataclasses.replace(c, out=root / f"{c.out.name}-two") for c in (recipe, first))
    benchmark = [
        "--out",
        str(root / "distributed.csv"),
        "--teacher",
        str(tiny_teacher),
        "--student",
        "test_resnet",
    ]
    benchmark += ["--batch-size", "4", "--width", "8", "--rounds", "2", "--steps", "1", "--device", "cpu"]
    features = [
        "--images",
        str(image_folder),
        "--teacher",
        str(tiny_teacher),
        "--out",
        str(root / "features"),
    ]
    features += ["--keep", "random", "--channels", "4", "--shard-mb", "0.01", "--device", "cpu"]
    job = {
        "features": features, "pretrain": to_json(config), "recipe": to_json(recipe), "first": to_json(first),
        "spoiled": flags(dataclasses.replace(config, out=root / "spoiled")),
        "teachers": teachers, "demo": demo, "at": 4, "benchmark": benchmark,
        "script": str(ROOT / "benchmarks" / "distributed" / "run.py"),
    }  # fmt: skip
    done = torchrun(worker.__file__, json.dumps(job))
    (root / "said.txt").write_text(done.stdout + done.stderr)
    assert (root / "demo" / "report.html").exists(), done.stdout[-2000:] + done.stderr[-6000:]
    return root, done


@pytest.mark.slow
def test_two_processes_do_what_one_does(runs):
    root, _ = runs
    assert_same_run(root / "one", root / "two")
    for name in ("backbone", "regressor"):
        assert_near(*(load_file(root / r / f"{name}.safetensors") for r in ("one", "two")))


@pytest.mark.slow
def test_two_processes_resume_bitwise(runs):
    root, _ = runs
    assert_equal(root / "two", root / "two-resumed")
    assert (root / "two" / "metrics.jsonl").read_bytes() == (
        root / "two-resumed" / "metrics.jsonl"
    ).read_bytes()


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(runs, image_folder, tiny_teacher):
    root, _ = runs
    with worker.in_float64():
        pretrain(config_of(image_folder, tiny_teacher, root / "two-to-one"))
    for name in ("two-to-one", "one-to-two"):
        assert_same_run(root / "one", root / name)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["cpu-64", "stylegan2-cpu-64"])
def test_two_processes_train_the_same_teacher(runs, preset):
    root, _ = runs
    assert preset in PRESETS
    assert_same_run(root / preset, root / f"{preset}-two")
    files = [load_file(root / name / "teacher.safetensors") for name in (preset, f"{preset}-two")]
    assert_near(files[0], files[1])


@pytest.mark.slow
def test_the_benchmark_runs(runs):
    root, _ = runs
    (row,) = csv.DictReader((root / "distributed.csv").read_text().splitlines())
    assert row["processes"] == "2"
    assert float(row["apart_over_together"]) > 0
    assert all(float(row[f"{kind}_ms"]) > 0 for kind in ("alone", "apart", "together", "local"))


@pytest.mark.slow
def test_two_processes_write_one_store(runs):
    root, _ = runs
    store = FeatureStore(root / "features")  # every checksum is compared
    assert store.plan.images == 16
    assert store.plan.shards > 1


@pytest.mark.slow
def test_the_demo_in_two_processes_is_that_of_one(runs):
    root, _ = runs
    assert_same_run(root / "recipe", root / "recipe-two")
    assert len(losses(root / "recipe")) == 4
    rows = read_rows(root / "demo" / "results.jsonl")
    tasks = ("knn", "linear", "finetune", "segment-frozen", "segment-finetune")
    assert {(row["method"], row["task"]) for row in rows} == {
        (method, task) for method in ("random init", "DreamTeacher") for task in tasks
    }


@pytest.mark.slow
def test_the_first_loss_in_float32_is_that_of_one_process(runs):
    """Before any update, so that nothing grows: rounding of 6e-8, a hundredfold for the depth of both networks."""
    root, _ = runs
    (one, two) = (losses(root / name)[0] for name in ("first", "first-two"))
    assert one["step"] == two["step"] == 1
    for key in (key for key in one if key.startswith(("loss", "mse/", "at/"))):
        assert two[key] == pytest.approx(one[key], rel=6e-6), key
    states = [whole_run(root / name) for name in ("first", "first-two")]
    assert {k: v.dtype for k, v in states[0].items()} == {k: v.dtype for k, v in states[1].items()}
    assert torch.float64 not in {v.dtype for v in states[0].values()}


@pytest.mark.slow
def test_an_error_is_told_once_and_ends_all_with_2(runs):
    root, done = runs
    said = done.stdout + done.stderr
    (told,) = re.findall("^error: (.*)", said, re.MULTILINE)
    assert told == "The loss is not finite at step 3."
    assert checkpoint.latest(root / "spoiled") == checkpoint.checkpoint_path(root / "spoiled", 2)
    assert "exitcode  : 2" in said
    assert "AssertionError" not in said
    assert done.stdout.count("make-features ") == 1  # on the command line the first process alone prints
    assert done.stdout.count("evaluate DreamTeacher") == 1


# --- one of them stops -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_machines_go_on_after_a_kill_and_a_full_disk(runs, image_folder, tiny_teacher, tmp_path):
    """An agent of torchrun for each process, as on two machines; they restart both after each of these.

    After the kill their counts of restarts differ: the agent whose own process lives hears of it from the other one.
    """
    root, _ = runs
    config = config_of(image_folder, tiny_teacher, tmp_path / "run")
    job = {
        "events": [("kill", 5), ("full", 9)],
        "starts": str(tmp_path),
        "arguments": ["pretrain", *flags(config)],
    }
    agent = [
        "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}",
    ]  # fmt: skip
    codes, out, errors = both([*agent, worker.__file__, json.dumps(job)], {}, {})
    assert codes == [0, 0], errors
    counts = [(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)]
    assert [len(c) for c in counts] == [3, 3]
    assert (counts[0][1], counts[1][1]) == ("0", "1")
    assert re.findall("Resuming from step (.*) of 8", out) == ["2", "4"]
    lost, full = re.findall("^error: (.*)", errors, re.MULTILINE)
    assert lost.startswith("Another of the 2 processes has stopped or cannot be reached: ")
    assert "Connection closed by peer" in lost
    assert full.startswith("The disk is full")
    assert_equal(root / "two", config.out)


@pytest.mark.slow
def test_a_process_out_of_memory_stops_all_and_says_what_goes_on(image_folder, tiny_teacher, tmp_path):
    config = config_of(image_folder, tiny_teacher, tmp_path / "run")
    job = {"events": [("memory", 9)], "starts": str(tmp_path), "arguments": ["pretrain", *flags(config)]}
    done = torchrun(worker.__file__, json.dumps(job))
    said = done.stdout + done.stderr
    assert done.returncode, said
    (told,) = re.findall("^error: (.*)", said, re.MULTILINE)
    assert told.startswith("Step 5 runs out of memory: CUDA out of memory")
    assert "Use --accumulate 4 (BatchNorm sees smaller parts; the run goes on)" in said
    assert checkpoint.latest(config.out) == checkpoint.checkpoint_path(config.out, 4)
    rows = read_rows(config.out / "metrics.jsonl")
    pretrain(dataclasses.replace(config, accumulate=4))  # here in one process
    assert read_rows(config.out / "metrics.jsonl")[: len(rows)] == rows
    assert checkpoint.latest(config.out) == checkpoint.checkpoint_path(config.out, 8)


@pytest.mark.slow
def test_a_signal_to_one_process_saves_once_and_ends_all(runs, image_folder, tiny_teacher, tmp_path):
    """Started without torchrun, so that their exit codes are seen."""
    root, _ = runs
    config = config_of(image_folder, tiny_teacher, tmp_path / "run")
    job = {"events": [("signal", 9)], "starts": str(tmp_path), "arguments": ["pretrain", *flags(config)]}
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    each = [group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    codes, out, errors = both([worker.__file__, json.dumps(job)], *each)
    assert codes == [128 + signal.SIGTERM] * 2, errors
    assert "error: " not in errors
    (step,) = re.findall("Stopped at step (.*) of 8: saved", out)
    assert 5 <= int(step) < 8
    last = checkpoint.latest(config.out)
    assert last == checkpoint.checkpoint_path(config.out, int(step))
    expected = checkpoint.load(root / "two" / last.name)[0]
    assert_same_tensors(checkpoint.load(last)[0], expected)


def both(arguments: list[str], *each: dict[str, str]) -> tuple[list[int], str, str]:
    """Python, started twice at once; exit codes, and what both wrote to stdout and stderr."""
    started = [
        subprocess.Popen(
            [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment(**more),
        )
        for more in each
    ]  # fmt: skip
    with ThreadPoolExecutor() as pool:
        said = list(pool.map(lambda process: process.communicate(timeout=300), started))
    out, errors = ("".join(texts) for texts in zip(*said, strict=True))
    return [process.returncode for process in started], out, errors


def flags(config: PretrainConfig) -> list[str]:
    """The settings of a config that are not the defaults, as on the command line."""
    found = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name != "label" and value != field.default:
            found += [f"--{field.name.replace('_', '-')}", str(value)]
    return found


@pytest.mark.slow
def test_the_slurm_script_runs(image_folder, tiny_teacher, tmp_path):
    """With stand-ins for SLURM's two programs, one machine and one process."""
    for name, text in (("srun", SRUN), ("scontrol", "echo 127.0.0.1"), ("torchrun", TORCHRUN)):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    script, config = ROOT / "examples" / "slurm.sh", config_of(image_folder, tiny_teacher, tmp_path / "run")
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    slurm = {
        "SLURM_JOB_NODELIST": "here",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_ID": "7",
        "SLURM_CPUS_PER_TASK": "1",
    }
    env = environment(PATH=f"{tmp_path}:{os.environ['PATH']}", PORT=free_port(), **slurm)
    settings = flags(dataclasses.replace(config, epochs=1, warmup_epochs=0))
    done = subprocess.run(["bash", script, *settings], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "told srun: 1 CPUs, 110 s" in done.stdout
    assert (config.out / "report.html").exists()


SRUN = 'echo "told srun: $SRUN_CPUS_PER_TASK CPUs, $TORCH_ELASTIC_SHUTDOWN_TIMEOUT s"; exec "$@"'
TORCHRUN = f'exec "{sys.executable}" -m torch.distributed.run "$@"'


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])
