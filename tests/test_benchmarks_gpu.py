"""The GPU benchmarks run end to end on a CPU at tiny size, and their tables say what was not run."""

from __future__ import annotations

import csv
import json
import runpy
from pathlib import Path

import pytest
from test_benchmarks import BENCHMARKS, run
from test_docs import classes

from dreamteacher import compiled
from dreamteacher.teachers.diffusion import DiffusionTeacher

GPU = BENCHMARKS / "gpu"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's compiler
@pytest.mark.slow
def test_speed_runs(tmp_path, monkeypatch, capsys):
    out = tmp_path / "speed.csv"
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")  # put back after it
    run(GPU / "speed.py", "--tiny", "--out", str(out), monkeypatch=monkeypatch)
    encoded, sampled = csv.DictReader(out.read_text().splitlines())
    assert (encoded["teacher"], encoded["mode"], encoded["compile"]) == ("VAE, TAESD", "encode", "on")
    assert (sampled["teacher"], sampled["mode"], sampled["compile"]) == ("StyleGAN2-256", "sample", "off")
    for row in (encoded, sampled):
        assert row["status"] == "measured"
        rate = 2e-3 * float(row["gmacs"]) * float(row["images_per_s"])
        assert rate == pytest.approx(float(row["tflops"]), rel=0.05)
        assert rate / float(row["matmul_tflops"]) == pytest.approx(float(row["share"]), rel=0.1, abs=1e-3)
    arguments = "--tiny", "--one", "VAE, TAESD", "2", "off"
    capsys.readouterr()
    run(GPU / "speed.py", *arguments, monkeypatch=monkeypatch)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["gmacs"] == encoded["gmacs"]


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
