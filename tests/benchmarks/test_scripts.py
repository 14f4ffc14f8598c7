"""Benchmarks cannot rot: each script runs at tiny size, and the documents show what the CSV files hold."""

from __future__ import annotations

import argparse
import copy
import csv
import json
import math
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.run_folder import read_rows
from tests.places import BENCHMARKS


def run(script: Path, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    runpy.run_path(str(script), run_name="__main__")


@pytest.mark.slow
def test_step_benchmark_runs(tiny_teacher, tmp_path, monkeypatch, capsys):
    out = tmp_path / "step.csv"
    run(
        BENCHMARKS / "step" / "run.py", "--out", str(out), "--teacher", str(tiny_teacher), "--student",
        "test_resnet", "--batch-size", "4", "--width", "8", "--rounds", "3", "--steps", "1",
        monkeypatch=monkeypatch,
    )  # fmt: skip
    (row,) = csv.DictReader(out.read_text().splitlines())
    assert float(row["ratio_median"]) > 0.3
    assert float(row["step_ms"]) > float(row["teacher_ms"]) > 0
    assert "ratio_median" in capsys.readouterr().out


@pytest.mark.slow
def test_features_benchmark_runs(tiny_teacher, tmp_path, monkeypatch):
    out = tmp_path / "speed.csv"
    run(
        BENCHMARKS / "features" / "run.py", "speed", "--out", str(out), "--teacher", str(tiny_teacher),
        "--student", "test_resnet", "--batch-size", "4", "--width", "8", "--images", "8", "--rounds", "2",
        "--steps", "1", monkeypatch=monkeypatch,
    )  # fmt: skip
    (row,) = csv.DictReader(out.read_text().splitlines())
    assert float(row["speed_median"]) > 0.1
    assert float(row["stored_ms"]) > float(row["read_ms"]) > 0
    assert float(row["cold_items_per_s"]) > 0


@pytest.mark.slow
def test_early_exit_benchmark_runs(tmp_path, monkeypatch):
    out = tmp_path / "early.csv"
    run(
        BENCHMARKS / "early_exit" / "run.py", "--out", str(out), "--preset", "cpu-64", "--rounds", "2",
        "--device", "cpu", monkeypatch=monkeypatch,
    )  # fmt: skip
    (row,) = csv.DictReader(out.read_text().splitlines())
    assert float(row["max_abs_difference"]) == 0.0
    assert float(row["load"]) >= 0
    assert float(row["gmacs_ratio"]) == pytest.approx(1.4165, abs=1e-3)


@pytest.mark.slow
def test_accuracy_benchmark_runs(tiny_teacher, tmp_path, monkeypatch):
    from tests.test_docs import classes

    classes(tmp_path / "train", ("NORMAL", "PNEUMONIA"), 16)
    classes(tmp_path / "test", ("NORMAL", "PNEUMONIA"), 4, first=100)
    out = tmp_path / "accuracy.csv"
    script = BENCHMARKS / "features" / "accuracy.py"
    same = ["--work", str(tmp_path / "work"), "--images", str(tmp_path), "--teacher", str(tiny_teacher), "--student",
            "test_resnet", "--every", "2", "--epochs", "2", "--batch-size", "8", "--seeds", "0", "1", "--labels", "2",
            "--out", str(out), "--formats"]  # fmt: skip
    run(script, *same, "online", monkeypatch=monkeypatch)
    run(script, *same, "PCA 63 + energy, int8, 1 draw", monkeypatch=monkeypatch)
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert {(r["method"], r["draws"], r["images"], r["steps"]) for r in rows} == {
        ("online", "fresh", "16", "4"), ("PCA 63 + energy, int8, 1 draw", "1", "16", "4")
    }  # fmt: skip
    assert {(r["task"], r["labels"]) for r in rows} == {("knn", ""), ("linear", "2")}
    assert len(list((tmp_path / "work" / "images").rglob("*.png"))) == 16
    tables = runpy.run_path(str(BENCHMARKS / "tables.py"))
    assert "PCA 63 + energy, int8, 1 draw | 1 |" in tables["accuracy_table"](out)
    with pytest.raises(UserError, match=r"other settings: epochs: 2\.0 -> 3\.0"):
        run(script, *same, "online", "--epochs", "3", monkeypatch=monkeypatch)


def test_rows_of_other_settings_are_not_reused(tmp_path, monkeypatch):
    script = BENCHMARKS / "features" / "accuracy.py"
    found = runpy.run_path(str(script))
    row = {"method": "online", "value": 0.5, "torch": "9.9", "settings": {"epochs": 2.0, "seeds": [0, 1]}}
    path = tmp_path / "online.jsonl"
    assert not found["finished"](path, row["settings"])
    path.write_text(json.dumps(row) + "\n")
    assert found["finished"](path, row["settings"])
    with pytest.raises(UserError, match=r"seeds: \[0, 1\] -> \[0\]"):
        found["finished"](path, {"epochs": 2.0, "seeds": [0]})
    found["write"](tmp_path / "all.csv", tmp_path)
    (written,) = csv.DictReader((tmp_path / "all.csv").read_text().splitlines())
    assert (written["torch"], written["value"]) == ("9.9", "0.5")  # of then, not of now
    path.write_text(json.dumps({k: row[k] for k in ("method", "value")}) + "\n")
    with pytest.raises(UserError, match="they do not say which"):
        run(script, "--work", str(tmp_path), "--formats", "raw, float16", monkeypatch=monkeypatch)


def test_a_thinned_folder_holds_nothing_of_an_earlier_one(tmp_path):
    thinned = runpy.run_path(str(BENCHMARKS / "features" / "accuracy.py"))["thinned"]
    (tmp_path / "all" / "A").mkdir(parents=True)
    for i in range(8):
        (tmp_path / "all" / "A" / f"{i}.png").touch()
    for every, count in ((2, 4), (4, 2), (3, 3)):
        place = thinned(tmp_path / "all", tmp_path / "some", every)
        assert len(list(place.rglob("*.png"))) == count


@pytest.mark.slow
def test_start_up_benchmark_runs(image_folder, tmp_path, monkeypatch):
    from dreamteacher.cli import main as cli
    from dreamteacher.distill.config import PretrainConfig, steps_of

    out = tmp_path / "startup.csv"
    script = BENCHMARKS / "startup" / "run.py"
    run(
        script, "--out", str(out), "--images", str(image_folder), "--batch-size", "8", "--rounds", "1", "--only",
        "help", monkeypatch=monkeypatch,
    )  # fmt: skip
    torch_, help_ = csv.DictReader(out.read_text().splitlines())
    assert (torch_["what"], float(torch_["ratio_median"])) == ("import torch", 1.0)
    assert 0 < float(help_["seconds"]) < float(torch_["seconds"])
    assert 0 < float(help_["peak_mb"]) < float(torch_["peak_mb"])
    # Its longest command, whose start is too long for a test, is parsed.
    asked = argparse.Namespace(steps=4, batch_size=8, teacher="chest-xray-64", student="resnet18")
    command = runpy.run_path(str(script))["all_commands"](asked, image_folder, 16)["pretrain"]
    config = cli.parse(PretrainConfig, "pretrain", [*command[4:], "--out", str(tmp_path / "run")])
    assert steps_of(config, 16) == 4


@pytest.mark.slow
def test_loading_benchmark_runs(tmp_path, monkeypatch):
    out = tmp_path / "loading.csv"
    run(
        BENCHMARKS / "loading" / "run.py", "--out", str(out), "--images", "8", "--batch-size", "4", "--rounds", "2",
        "--batches", "3", "--png-size", "32", "--size", "64", monkeypatch=monkeypatch,
    )  # fmt: skip
    rows = list(csv.DictReader(out.read_text().splitlines()))
    ways = ["PIL alone", "folder", "folder, 2 processes", "tar shards", "cached"]
    assert [(r["set"], r["way"]) for r in rows] == [
        (kind, way) for kind in ("JPEG 360 x 480 -> 64 x 64", "PNG 32 x 32 -> 32 x 32") for way in ways
    ]
    assert all(float(r["images_per_s"]) > 0 for r in rows)
    assert float(rows[0]["ratio_median"]) == 1.0
    assert float(rows[4]["ratio_median"]) > 1.0  # nothing is decoded


@pytest.mark.slow
def test_interpreter_benchmark_runs(tmp_path, monkeypatch):
    out = tmp_path / "memory.csv"
    run(
        BENCHMARKS / "interpreter" / "run.py", "--out", str(out), "--preset", "cpu-64", "--size", "64", "--blocks",
        "1", "2", "3", "--images", "3", "--width", "16", monkeypatch=monkeypatch,
    )  # fmt: skip
    (row,) = csv.DictReader(out.read_text().splitlines())
    assert (row["images"], row["channels"]) == ("3", str(3 * 3 * 128))
    assert 0.1 < float(row["peak_gb"]) < 4


def test_committed_memory_is_of_the_whole_stack_and_below_4_gb():
    rows = list(csv.DictReader((BENCHMARKS / "interpreter" / "memory.csv").read_text().splitlines()))
    for row in rows:
        assert (row["channels"], row["size"]) == ("8448", "256 256")
        assert float(row["peak_gb"]) < 4
    assert max(int(row["images"]) for row in rows) == 50


def test_label_efficient_table_against_a_hand_calculation(tmp_path):
    tables = runpy.run_path(str(BENCHMARKS / "tables.py"))
    rows = ["method,count,seed,miou,seconds,cpu_seconds,peak_mb"]
    for method, values in (("scratch", (0.5, 0.6, 0.7)), ("mixed", (0.9, 0.8, 1.0))):
        rows += [f"{method},20,{i},{v},10,{20 + i},900" for i, v in enumerate(values)]
    (tmp_path / "results.csv").write_text("\n".join(rows) + "\n")
    table = tables["label_efficient_table"](tmp_path / "results.csv").splitlines()
    assert table[2] == "| from scratch | 0.600 ± 0.100 | +0.300 (+3.0 dev.) | 21 | 10 | 900 | 3 |"
    assert table[3] == "| DreamTeacher, mixed | **0.900 ± 0.100** |  | 21 | 10 | 900 | 3 |"


def test_accuracy_table_against_a_hand_calculation(tmp_path):
    tables = runpy.run_path(str(BENCHMARKS / "tables.py"))
    rows = ["method,draws,bytes,task,metric,labels,seed,value"]
    for method, values in (("online", (0.8, 0.9, 1.0)), ("near", (0.7, 0.9, 1.0)), ("far", (0.4, 0.5, 0.6))):
        rows += [f"{method},2,1000,knn,accuracy,,{i},{v}" for i, v in enumerate(values)]
        rows += [f"{method},2,1000,knn,auroc,,{i},0" for i in range(3)]  # not the headline
    (tmp_path / "accuracy.csv").write_text("\n".join(rows) + "\n")
    table = tables["accuracy_table"](tmp_path / "accuracy.csv").splitlines()
    assert table[3] == "| near | 2 | 1,000 | 0.867 ± 0.153 | -0.033 (-0.2 dev.) | yes |"
    assert table[4] == "| far | 2 | 1,000 | 0.500 ± 0.100 | -0.400 (-4.0 dev.) | no |"


def test_committed_accuracy_compares_like_with_like():
    rows = list(csv.DictReader((BENCHMARKS / "features" / "accuracy.csv").read_text().splitlines()))
    assert {"online", "PCA 63 + energy, int8"} <= {r["method"] for r in rows}
    assert (
        len({(r["images"], r["epochs"], r["steps"], r["student"], r["batch"], r["precision"]) for r in rows})
        == 1
    )
    for method in {r["method"] for r in rows}:
        for task, labels in (("knn", ""), ("linear", "10"), ("linear", "50")):
            seeds = {
                r["seed"] for r in rows if (r["method"], r["task"], r["labels"]) == (method, task, labels)
            }
            assert len(seeds) >= 3


def test_a_benchmark_that_was_not_run_says_so(tmp_path):
    tables = runpy.run_path(str(BENCHMARKS / "tables.py"))
    assert tables["unless_missing"](tables["speed_table"], tmp_path / "speed.csv").startswith("*not run*")
    assert tables["status"]({"load": "0.1"}, True) == "target reached"
    assert tables["status"]({"load": "3.0"}, False).startswith("target missed; to be repeated")
    assert tables["status"]({}) == "measured"


@pytest.mark.slow
def test_teachers_benchmark_runs(tmp_path, monkeypatch):
    out = tmp_path / "teachers.csv"
    run(
        BENCHMARKS / "teachers" / "run.py", "--out", str(out), "--networks", "VAE, TAESD", "--size", "32",
        "--rounds", "1", "--batch-size", "1", "--device", "cpu", monkeypatch=monkeypatch,
    )  # fmt: skip
    (row,) = csv.DictReader(out.read_text().splitlines())
    assert row["levels"] == "4:64 8:64"
    assert float(row["images_per_s"]) > 0
    assert float(row["kept_m"]) < float(row["parameters_m"])
    assert 0.1 < float(row["peak_gb"]) < 8


@pytest.mark.slow
def test_stylegan2_benchmark_runs(tmp_path, monkeypatch):
    from dreamteacher.downstream.classification.config import FinetuneConfig
    from dreamteacher.downstream.segmentation.config import SegmentConfig
    from tests.test_docs import classes, masked

    for config in (FinetuneConfig, SegmentConfig):
        monkeypatch.setitem(config.__init__.__kwdefaults__, "steps", 2)
    classes(tmp_path / "train", ("NORMAL", "PNEUMONIA"), 4)
    classes(tmp_path / "test", ("NORMAL", "PNEUMONIA"), 8, first=100)
    masked(tmp_path / "test" / "NORMAL", tmp_path / "masks" / "test" / "NORMAL", 8)
    run(
        BENCHMARKS / "stylegan2" / "run.py", "--teacher", "chest-xray-gan-64", "--images", str(tmp_path),
        "--out", str(tmp_path / "out"), "--seeds", "0", "--samples", "32", "--labels", "2", "--masks", "3",
        monkeypatch=monkeypatch,
    )  # fmt: skip
    rows = read_rows(tmp_path / "out" / "results.jsonl")
    assert {row["task"] for row in rows} == {
        "knn", "linear", "finetune", "segment-frozen", "segment-finetune"
    }  # fmt: skip
    assert {row["method"] for row in rows} == {"DreamTeacher, StyleGAN2"}
    facts = json.loads((tmp_path / "out" / "pretrain-0" / "config.json").read_text())
    assert facts["config"]["dataset"] == "synthesized"
    assert facts["teacher"]["name"] == "chest-xray-gan-64"


@pytest.mark.slow
def test_vit_benchmark_runs(tmp_path, monkeypatch):
    from dreamteacher.downstream.classification.config import FinetuneConfig
    from dreamteacher.downstream.segmentation.config import SegmentConfig
    from tests.test_docs import classes, masked

    for config in (FinetuneConfig, SegmentConfig):
        monkeypatch.setitem(config.__init__.__kwdefaults__, "steps", 2)
    classes(tmp_path / "train", ("NORMAL", "PNEUMONIA"), 24)
    classes(tmp_path / "test", ("NORMAL", "PNEUMONIA"), 8, first=100)
    masked(tmp_path / "test" / "NORMAL", tmp_path / "masks" / "test" / "NORMAL", 8)
    run(
        BENCHMARKS / "vit" / "run.py", "--images", str(tmp_path), "--out", str(tmp_path / "out"), "--seeds", "0",
        "--labels", "2", "--masks", "3", monkeypatch=monkeypatch,
    )  # fmt: skip
    rows = read_rows(tmp_path / "out" / "results.jsonl")
    tasks = {row["task"] for row in rows if row["method"] == "DreamTeacher"}
    assert tasks == {"knn", "linear", "finetune", "segment-frozen", "segment-finetune"}
    assert {row["method"] for row in rows if row["student"] == "vit_demo_patch8_token_64"} == {
        "random init, class token", "DreamTeacher, class token"
    }  # fmt: skip


@pytest.mark.slow
def test_unchanged_benchmark_runs_and_finds_a_changed_bit(tmp_path, monkeypatch):
    script, out = BENCHMARKS / "unchanged" / "run.py", tmp_path / "before.json"
    command = [sys.executable, str(script), "--only", "interpreter-masks"]
    done = subprocess.run([*command, "--write", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    before = json.loads(out.read_text())
    (case,) = before["cases"].values()
    assert len(case["updates"]) == len(case["values"][".: loss"]) == 30
    same = copy.deepcopy(case)
    monkeypatch.syspath_prepend(script.parent)
    compare = runpy.run_path(str(script))["compare"]
    assert compare("interpreter-masks", same, case)
    case["values"][".: loss"][6] = math.nextafter(case["values"][".: loss"][6], 9.0)
    out.write_text(json.dumps(before))
    done = subprocess.run([*command, "--compare", str(out)], capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    wrong, *_ = done.stdout.splitlines()
    assert wrong.startswith("interpreter-masks: .: loss, number 7: ")
    assert not compare("interpreter-masks", case, same)


def test_committed_numbers_are_of_every_case():
    names = re.findall(
        r'^    "([\w-]+)": Case\(', (BENCHMARKS / "unchanged" / "run.py").read_text(), re.MULTILINE
    )
    path = BENCHMARKS / "unchanged" / "before.json"
    assert list(json.loads(path.read_text())["cases"]) == names
    assert path.stat().st_size < 300_000


def test_demos_of_one_and_two_processes_side_by_side(tmp_path, monkeypatch):
    for name, score, loss in (("one", 0.8, 2.0), ("two", 0.9, 2.1)):
        folder = tmp_path / name / "pretrain-0"
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 10, "loss": loss}) + "\n")
        row = {"task": "knn", "metric": "accuracy", "labels": None, "seed": 0}
        rows = [row | {"method": m, "value": v} for m, v in (("random init", 0.5), ("DreamTeacher", score))]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / "results.jsonl").write_text(text)
    out = tmp_path / "demo.csv"
    script = BENCHMARKS / "distributed" / "demo.py"
    run(script, str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(out), monkeypatch=monkeypatch)
    found = list(csv.DictReader(out.read_text().splitlines()))
    assert [(r["method"], r["task"], float(r["value"])) for r in found] == [
        ("one process", "knn", 0.8), ("two processes", "knn", 0.9), ("two processes", "loss", 0.05),
    ]  # fmt: skip


def test_documents_show_what_the_benchmarks_hold(monkeypatch):
    with pytest.raises(SystemExit) as stop:
        run(BENCHMARKS / "tables.py", "--check", monkeypatch=monkeypatch)
    assert stop.value.code == 0


def test_results_table_against_a_hand_calculation(tmp_path):
    tables = runpy.run_path(str(BENCHMARKS / "tables.py"))
    path = tmp_path / "results.csv"
    rows = ["method,student,task,metric,value,labels,seed"]
    for method, values in (("random init", (0.5, 0.6, 0.7)), ("DreamTeacher", (0.8, 0.9, 1.0))):
        rows += [f"{method},r,linear,accuracy,{v},10,{i}" for i, v in enumerate(values)]
        rows += [f"{method},r,linear,auroc,0,10,{i}" for i in range(3)]  # not the headline
    path.write_text("\n".join(rows) + "\n")
    table = tables["results_table"](path).splitlines()
    assert len(table) == 3
    assert table[2] == (
        "| linear probe accuracy, frozen | 10 per class | 0.600 ± 0.100 | **0.900 ± 0.100** | +0.300 (+3.0 deviations) |"
    )


def test_transfer_table_against_a_hand_calculation(tmp_path):
    path = tmp_path / "results.csv"
    head = "method,student,task,metric,value,labels,seed,seconds,images_seen,status\n"
    values = {"random init": (0.1, 0.3), "SimCLR": (0.4, 0.44), "DreamTeacher": (0.5, 0.56)}
    lines = [
        f"{m},r,detect,{metric},{v},20,{s},1,0,smaller-scale\n"
        for m, pair in values.items()
        for s, v in enumerate(pair)
        for metric in ("box_ap", "ap50")
    ]
    lines.append("MoCo v2,r,detect,box_ap,0.9,20,0,1,0,smaller-scale\n")  # one seed: shown, not compared with
    path.write_text(head + "".join(lines) + "BYOL,r,,,,,0,,,not run: no lightly\n")
    line, why = runpy.run_path(str(BENCHMARKS / "tables.py"))["transfer_table"](path).splitlines()[2::2]
    # Deviations: sqrt(2)/10, 0.02 sqrt(2), 0.03 sqrt(2); 0.53 - 0.2 and 0.53 - 0.42 in the larger of both.
    assert line == (
        "| Mask R-CNN, box AP | 20 images | 0.200 ± 0.141 | 0.420 ± 0.028 | **0.530 ± 0.042** | 0.900 (one seed) | +0.330 (+2.3 dev.) | "
        "+0.110 (+2.6 dev.) | ahead | 2 | smaller-scale |"
    )
    assert why == "BYOL: not run: no lightly"


def test_vit_table_against_a_hand_calculation(tmp_path):
    tables = runpy.run_path(str(BENCHMARKS / "tables.py"))
    head = ["method,student,task,metric,value,labels,seed"]
    paths = []
    for name, methods in (
        ("demo", {"random init": (0.5, 0.6, 9), "DreamTeacher": (0.8, 0.9, 9)}),  # seed 2 is in one file only
        ("vit", {"random init": (0.5, 0.7), "DreamTeacher": (0.5, 0.6), "random init, class token": (0.1, 0.2),
                 "DreamTeacher, class token": (0.3, 0.4)}),
    ):  # fmt: skip
        paths.append(tmp_path / f"{name}.csv")
        lines = [
            f'"{m}",r,knn,accuracy,{v},,{i}' for m, values in methods.items() for i, v in enumerate(values)
        ]
        paths[-1].write_text("\n".join(head + lines) + "\n")
    table = tables["vit_table"](*paths).splitlines()
    assert table[2:] == [
        "| kNN accuracy, frozen | all | 0.550 ± 0.071 | 0.850 ± 0.071 | +0.300 (+4.2 dev.) "
        "| 0.600 ± 0.141 | 0.550 ± 0.071 | -0.050 (-0.4 dev.) |",
        "| kNN accuracy, frozen, class token | all |  |  |  | 0.150 ± 0.071 | 0.350 ± 0.071 | +0.200 (+2.8 dev.) |",
    ]


def test_committed_results_have_their_seeds_and_baselines():
    for name in ("demo", "camvid"):
        rows = list(csv.DictReader((BENCHMARKS / name / "results.csv").read_text().splitlines()))
        seeds = {(r["method"], r["task"]): set() for r in rows}
        for r in rows:
            seeds[r["method"], r["task"]].add(r["seed"])
        assert {m for m, _ in seeds} >= {"random init", "DreamTeacher"}
        assert all(len(s) >= 3 for (m, t), s in seeds.items() if t != "knn")
