"""The GPU benchmarks run end to end on a CPU at tiny size, and their tables say what was not run."""

from __future__ import annotations

import argparse
import csv
import json
import runpy
import subprocess
import time
from pathlib import Path

import pytest
import torch

from dreamteacher.runtime import compile as runtime_compile
from dreamteacher.teachers.diffusion.teacher import DiffusionTeacher
from tests.benchmarks.test_scripts import BENCHMARKS, run
from tests.test_docs import classes

GPU = BENCHMARKS / "gpu"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's compiler
@pytest.mark.slow
def test_speed_runs(tmp_path, monkeypatch, capsys):
    out = tmp_path / "speed.csv"
    monkeypatch.setattr(runtime_compile, "BACKEND", "aot_eager")  # put back after it
    run(GPU / "speed.py", "--tiny", "--out", str(out), monkeypatch=monkeypatch)
    encoded, sampled = csv.DictReader(out.read_text().splitlines())
    assert (encoded["teacher"], encoded["mode"], encoded["compile"]) == ("VAE, TAESD", "encode", "on")
    assert (sampled["teacher"], sampled["mode"], sampled["compile"]) == ("StyleGAN2-256", "sample", "off")
    for row in (encoded, sampled):
        assert row["status"] == "measured"
        rate = 2e-3 * float(row["gmacs"]) * float(row["images_per_s"])
        assert rate == pytest.approx(float(row["tflops"]), rel=0.05)
        assert rate / float(row["matmul_tflops"]) == pytest.approx(float(row["share"]), rel=0.1, abs=1e-3)
    out.write_text(out.read_text().replace("measured", "failed: no compiler", 1))
    before = out.read_text().splitlines()[2]
    run(GPU / "speed.py", "--tiny", "--out", str(out), monkeypatch=monkeypatch)
    assert out.read_text().splitlines()[2] == before  # kept; what failed is measured again, in its place
    assert next(csv.DictReader(out.read_text().splitlines()))["status"] == "measured"
    assert capsys.readouterr().out.splitlines()[-1] == "0 rows are left."
    arguments = "--tiny", "--one", "VAE, TAESD", "5", "off"
    capsys.readouterr()
    run(GPU / "speed.py", *arguments, monkeypatch=monkeypatch)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["gmacs"] == encoded["gmacs"]

    def broken(graph, inputs):
        raise RuntimeError("no compiler found")

    monkeypatch.setattr(runtime_compile, "BACKEND", broken)
    speed = runpy.run_path(str(GPU / "speed.py"))
    args = argparse.Namespace(size=32, student="test_resnet", width=8, precision="float32", device="cpu")
    status = speed["measure"]("VAE, TAESD", 2, "on", args)["status"]
    assert status.startswith("failed: torch.compile fails here")
    assert "no compiler found" in status


def test_speed_stops_in_time_and_goes_on(tmp_path, monkeypatch, capsys):
    """Processes that take four minutes each, one that never ends, one that breaks: three commands."""
    clock, begun = [0.0], []
    wanted = runpy.run_path(str(GPU / "configurations.py"))["CONFIGURATIONS"]

    def process(command, *, capture_output, text, timeout):
        one = tuple(command[command.index("--one") + 1 :][:3])
        begun.append(one)
        needs = 10**6 if one == names[1] else 240.0
        clock[0] += min(needs, timeout)
        if needs > timeout:
            raise subprocess.TimeoutExpired(command, timeout)
        if one == names[2]:
            return subprocess.CompletedProcess(command, 1, "", "Traceback\nMemoryError: all of it")
        row = {"teacher": one[0], "batch": one[1], "compile": one[2], "status": "measured", "step_ms": "1"}
        return subprocess.CompletedProcess(command, 0, f"noise\n{json.dumps(row)}\n", "")

    names = [(teacher, str(batch), compile) for teacher, batch, compile in wanted[:4]]
    monkeypatch.setattr(subprocess, "run", process)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    out = tmp_path / "speed.csv"
    for expected in ([0, 1], [1], [2, 3, 4]):
        begun.clear()
        start = clock[0]
        run(GPU / "speed.py", "--out", str(out), monkeypatch=monkeypatch)
        assert clock[0] - start <= 600
        assert begun == [(t, str(b), c) for t, b, c in wanted][expected[0] : expected[-1] + 1]
    assert capsys.readouterr().out.splitlines()[-1] == "9 rows are left. Run the same command again."
    statuses = [row["status"] for row in csv.DictReader(out.read_text().splitlines())]
    assert statuses == [
        "measured", "failed: no end in 9.5 minutes", "failed: MemoryError: all of it", "measured",
    ]  # fmt: skip


@pytest.mark.slow
def test_train_runs(tmp_path, monkeypatch):
    monkeypatch.setitem(DiffusionTeacher.__init__.__kwdefaults__, "sampling_steps", 2)
    classes(tmp_path / "train", ("cat", "dog"), 8)
    classes(tmp_path / "test", ("cat", "dog"), 4, first=100)
    run(
        GPU / "train.py", "--tiny", "--train", str(tmp_path / "train"), "--test", str(tmp_path / "test"),
        "--out", str(tmp_path / "out"), "--csv", str(tmp_path), monkeypatch=monkeypatch,
    )  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert {(r["method"], r["task"]) for r in rows} == {
        (method, task) for method in ("random init", "DreamTeacher") for task in ("knn", "linear")
    }
    facts = json.loads((tmp_path / "environment.json").read_text())
    assert "2 steps of 8" in facts["note"]
    assert facts["command"].startswith("python benchmarks/gpu/train.py --tiny")
    table = runpy.run_path(str(BENCHMARKS / "tables.py"))["gpu_train_table"](tmp_path / "results.csv")
    assert "| kNN accuracy, frozen | all |" in table


def test_a_slow_teacher_gets_fewer_steps_and_says_so(tmp_path, monkeypatch, capsys):
    """Steps of a second, two minutes: 120 of them, unless a training was begun with others."""
    clock = [0.0]

    class Slow:
        def __init__(self, *_):
            pass

        def step(self, step, images):
            clock[0] += 1.0
            return {"loss": torch.zeros(())}

    script = runpy.run_path(str(GPU / "train.py"))
    steps = script["teacher_steps"]
    monkeypatch.setitem(steps.__globals__, "DiffusionObjective", Slow)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    args = argparse.Namespace(
        out=tmp_path, preset="cpu-64", device="cpu", size=64, batch_size=2, teacher_steps=1500, teacher_minutes=2.0
    )  # fmt: skip
    assert steps(args) == 120
    assert "A step takes 1000 ms: 120 of the 1500 steps fit in 2 minutes." in capsys.readouterr().out
    args.teacher_minutes = 60
    assert steps(args) == 1500
    assert capsys.readouterr().out == ""
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text('{"config": {"steps": 77}}')
    assert steps(args) == 77


def test_the_table_shows_what_was_measured_and_what_was_not(tmp_path):
    tables = runpy.run_path(str(BENCHMARKS / "tables.py"))
    (tmp_path / "configurations.py").write_text(
        'CONFIGURATIONS = [("A", 8, "off"), ("B", 4, "on"), ("C", 2, "on")]\n'
    )
    lines = tables["gpu_speed_table"](tmp_path).splitlines()
    assert [line.split(" | ")[-1] for line in lines[2:]] == ["*not run* |"] * 3
    assert tables["gpu_train_table"](tmp_path / "results.csv").count("*not run*") == 2
    columns = "teacher,batch,compile,status,images_per_s,peak_gb,tflops,share,device,precision"
    (tmp_path / "speed.csv").write_text(
        f"{columns}\nA,8,off,measured,100.0,12.00,321,0.4501,H100,bfloat16\nB,4,on,out of memory,,,,,,\n"
    )
    lines = tables["gpu_speed_table"](tmp_path).splitlines()
    assert lines[2] == "| A | 8 | off | 100.0 | 12.00 | 321 | **45%** | H100, bfloat16 |"
    assert lines[3].endswith("| out of memory |")
    assert lines[4].endswith("| *not run* |")


def test_each_configuration_names_a_network():
    wanted = runpy.run_path(str(GPU / "configurations.py"))["CONFIGURATIONS"]
    networks = runpy.run_path(str(Path(BENCHMARKS) / "teachers" / "run.py"))["NETWORKS"]
    assert {teacher for teacher, _, _ in wanted} <= set(networks)
    assert len(set(wanted)) == len(wanted)
