"""The report is one whole page: every section, nothing from outside, no crash, and true pictures."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shutil
import statistics
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from dreamteacher.cli import main as cli
from dreamteacher.distill.config import PretrainConfig
from dreamteacher.distill.pretrain import pretrain
from dreamteacher.reports import charts
from dreamteacher.reports import maps as reports_maps
from dreamteacher.reports.charts import Dots, Scale, Series, chart_scales, dot_plot, line_chart, nice_ticks
from dreamteacher.reports.config import ReportConfig
from dreamteacher.reports.report import report, write_report
from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.page import data_uri
from dreamteacher.spec import FeatureSpec
from dreamteacher.teachers.diffusion.teacher import build_unet
from dreamteacher.teachers.registry import save_teacher
from dreamteacher.teachers.training.diffusion import PRESETS, network_spec

VOID = {"meta", "img", "br"}
SECTIONS = (
    "Results",
    "Training curves",
    "Feature maps",
    "Samples of the teacher",
    "Load the weights",
    "Settings",
)


class Page(HTMLParser):
    """Parses a page; fails on an unbalanced tag, on anything that would be fetched, and on scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.words: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe", "object", "base", "form"), tag
        values = dict(attrs)
        for key, value in attrs:
            assert not key.startswith("on"), key
            if key in ("src", "href", "srcset", "xlink:href", "poster", "data", "action"):
                assert value is not None
                assert value.startswith("data:image/png;base64,"), value[:60]
        if tag == "img":
            self.images.append(values)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["style"]:
            assert "url(" not in data
            assert "@import" not in data
            return
        if self.open[-1:] == ["h2"]:
            self.headings.append(data)
        self.words.append(data)


def rows_of(method: str, base: float, *, labels: int | None = 10, task: str = "segment-frozen") -> list[Any]:
    metric = "miou" if task.startswith("segment") else "accuracy"
    common = {"method": method, "student": "test_resnet", "task": task, "metric": metric, "labels": labels}
    return [{**common, "value": base + 0.01 * seed, "seed": seed, "seconds": 1.0} for seed in range(3)]


def write_rows(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def tiny_teacher(folder: Path) -> Path:
    """A U-Net of a few thousand weights with levels at strides 4 to 32, of 64 x 64 grey images."""
    small = replace(PRESETS["cpu-64"], patch=4, channels=(16, 16, 16, 16), attention=(), head=8, groups=4)
    spec = network_spec(small, (64, 64), 1, "linear")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        unet = build_unet(spec)
    folder.mkdir(parents=True, exist_ok=True)
    save_teacher(folder, unet.state_dict(), spec, {"name": "tiny", "licence": "CC0 & more"})
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of 6 steps, with its images and its teacher, and evaluation rows."""
    root = tmp_path_factory.mktemp("made")
    generator = torch.Generator().manual_seed(0)
    for i in range(12):
        place = root / "images" / ("a" if i % 2 else "b")
        place.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (3, 8, 8), generator=generator, dtype=torch.uint8)
        to_pil_image(pixels).resize((64, 64)).save(place / f"{i}.png")
    (root / "images" / "a" / "broken.png").write_text("no image")
    config = PretrainConfig(
        images=root / "images", out=root / "run", teacher=str(tiny_teacher(root / "teacher")), width=16,
        student="test_resnet", batch_size=4, epochs=2, warmup_epochs=0.5, log_every=1, probe_every=2,
        workers=0,
    )  # fmt: skip
    assert pretrain(config) == root / "run"
    Image.new("RGB", (40, 40), (10, 20, 30)).save(root / "teacher" / "samples.png")
    rows = rows_of("random init", 0.54) + rows_of("DreamTeacher", 0.70)
    rows += rows_of("random init", 0.80, labels=None, task="knn")[:1]
    rows += rows_of("DreamTeacher", 0.70, labels=None, task="knn")[:1]
    write_rows(root / "run" / "results.jsonl", rows)
    return root


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may damage."""
    return shutil.copytree(made / "run", tmp_path / "run")


def test_a_run_gives_every_section_and_no_note(
    made: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = report(ReportConfig(run=run, image_count=3))
    assert path == run / "report.html"
    assert str(path) in capsys.readouterr().out
    assert [p.name for p in run.glob("*.tmp")] == []
    page = Page(path.read_text())
    assert tuple(page.headings) == SECTIONS
    assert "Not shown" not in page.text
    for fact in ("test_resnet ← tiny", "64 × 64 px", "CC0 & more", "images seen 24", "skipped images 1"):
        assert fact in page.text
    for chart in ("Loss", "Whitened MSE", "Explained variance", "RankMe", "kNN", "Learning rate", "Speed"):
        assert chart in page.text
    assert "forward_intermediates" in page.text  # the snippet
    assert "broken.png" in page.text
    # 3 images, 4 levels of 3 rows, and one sheet of samples.
    assert len(page.images) == 3 + 4 * 3 * 3 + 1
    assert all(image["alt"] for image in page.images)
    assert (
        write_report(run, image_count=3).read_text() == path.read_text()
    )  # nothing in it is drawn by chance


def test_the_verdict_says_how_far_apart(run: Path) -> None:
    text = Page(write_report(run, image_count=0).read_text()).text.replace("\u00a0", " ")
    assert "DreamTeacher reaches 0.710 ± 0.010 mIoU against 0.550 ± 0.010 for random init" in text
    assert "(+16.0 deviations)" in text
    assert "best of all in 1 of 2 results" in text  # it also says where it is not


def test_given_rows_replace_those_of_the_file(run: Path) -> None:
    rows = rows_of("random init", 0.2) + rows_of("DreamTeacher", 0.3)
    rows += rows_of("DreamTeacher", 0.4)  # evaluated again: the later rows count
    page = Page(write_report(run, rows=rows, title="A & B", image_count=0).read_text())
    assert "0.410 ± 0.010" in page.text
    assert "0.310" not in page.text
    assert "A & B" in page.text
    assert "nearest neighbours" not in page.text


def test_the_table_has_mean_deviation_seeds_and_bold_best(tmp_path: Path) -> None:
    values = [0.61, 0.64, 0.71]
    rows = [{**row, "value": v} for row, v in zip(rows_of("DreamTeacher", 0), values, strict=True)]
    rows += rows_of("random init", 0.9)
    rows += [
        {"method": "random init", "task": "linear", "metric": "accuracy", "value": math.nan},
        {"method": 1},
    ]
    write_rows(tmp_path / "results.jsonl", rows)
    text = write_report(tmp_path).read_text()
    cell = f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"
    assert f"<td>{cell}</td>" in text
    assert "<td><b>0.910 ± 0.010</b></td><td>3</td>" in text
    page = Page(text)
    assert page.headings == ["Results"]
    assert "linear probe" not in page.text


def test_missing_pieces_become_notes(made: Path, run: Path) -> None:
    def damaged(change: Any, images: int = 0) -> str:
        copy = shutil.copytree(run, run.parent / "damaged")
        change(copy)
        text = Page(write_report(copy, image_count=images).read_text()).text
        shutil.rmtree(copy)
        return text

    def config(copy: Path, **changes: Any) -> None:
        facts = json.loads((copy / "config.json").read_text())
        facts["config"] |= changes
        (copy / "config.json").write_text(json.dumps(facts))

    assert "Not shown. " in damaged(lambda copy: config(copy, images="/no/such/folder"), 1)
    assert "There is no teacher" in damaged(lambda copy: config(copy, teacher="gone"), 1)
    assert "teacher" in damaged(lambda copy: config(copy, images=None))  # drawn on the teacher's own images
    odd = '{"data": {"size": 5}, "config": {"a": 1}}'
    assert "odd values" in damaged(lambda copy: (copy / "config.json").write_text(odd))
    unfinished = damaged(lambda copy: (copy / "backbone.safetensors").unlink(), 1)
    assert "(unfinished)" in unfinished
    assert "Not shown" not in unfinished  # the checkpoint serves
    garbage = b'\xff\xfe{"step": 1}\n'
    for name in ("metrics.jsonl", "timing.jsonl", "results.jsonl", "skipped.txt", "config.json"):
        damaged(lambda copy, name=name: (copy / name).unlink())
        damaged(lambda copy, name=name: (copy / name).write_bytes(garbage))
    damaged(lambda copy: (copy / "metrics.jsonl").write_text('[]\n3\n{"step": "x", "loss": 1}\n{"ste'))
    no_weights = damaged(lambda copy: [p.unlink() for p in copy.glob("*.safetensors")], 1)
    assert "no weights yet" in no_weights


def test_a_teacher_that_changed_is_not_shown_as_the_one_of_the_run(run: Path) -> None:
    facts = json.loads((run / "config.json").read_text())
    facts["teacher"]["sha256"] = "0" * 64
    (run / "config.json").write_text(json.dumps(facts))
    assert "no longer the one of this run" in Page(write_report(run, image_count=2).read_text()).text


def test_a_sample_sheet_is_preferred_to_new_samples(run: Path) -> None:
    page = Page(write_report(run, image_count=0).read_text())
    assert decoded(page.images[0]["src"]).getpixel((5, 5)) == (10, 20, 30)


def test_new_samples_are_made_where_they_are_cheap(
    made: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = shutil.copytree(made / "teacher", run.parent / "teacher")
    (teacher / "samples.png").unlink()
    facts = json.loads((run / "config.json").read_text())
    facts["config"]["teacher"] = str(teacher)
    (run / "config.json").write_text(json.dumps(facts))
    monkeypatch.setattr(reports_maps, "_SAMPLES", 3)
    monkeypatch.setattr(reports_maps, "_SAMPLING_STEPS", 2)
    page = Page(write_report(run, image_count=0).read_text())
    assert decoded(page.images[0]["src"]).size == (3 * 66 + 2, 68)
    assert "3 images that the teacher made" in page.text
    monkeypatch.setattr(reports_maps, "_PATIENCE", 0.0)
    assert "New samples would take" in Page(write_report(run, image_count=0).read_text()).text


def test_a_teachers_run(made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made / "teacher", tmp_path / "teacher")
    config = {"out": str(folder), "name": "bones", "batch_size": 8, "size": None, "licence": "mine"}
    (folder / "config.json").write_text(json.dumps({"verb": "train-teacher", "config": config}))
    steps = [{"step": s, "images_seen": 8 * s, "loss": 1 / s} for s in (50, 100)]
    steps.append({"step": 100, "images_seen": 800, "loss/t50": 0.25, "loss/t100": 0.125})
    write_rows(folder / "metrics.jsonl", steps)
    page = Page(write_report(folder).read_text())
    assert page.headings == ["Training curves", "Samples of the teacher", "Load the weights", "Settings"]
    text = page.text.replace("\u00a0", " ")
    assert "0.250 at t = 50, 0.125 at t = 100" in text
    assert "Loss at fixed timesteps" in text
    assert "64 × 64 px" in text
    assert len(page.images) == 1


def test_hostile_names_are_text(run: Path) -> None:
    evil = '<script>alert("x")</script>&"\''
    folder = run.parent / "<script>x"
    shutil.copytree(run, folder)
    facts = json.loads((folder / "config.json").read_text())
    facts["config"] |= {"student": evil, "teacher": evil, evil: evil}
    facts["teacher"] |= {"name": evil, "licence": evil}
    (folder / "config.json").write_text(json.dumps(facts))
    (folder / "skipped.txt").write_text(evil)
    rows = rows_of(evil, 0.5, task=evil) + rows_of("random init", 0.4, task=evil)
    rows += [{**row, "metric": evil, "labels": evil} for row in rows]
    write_rows(folder / "metrics.jsonl", [{"step": 1, f"mse/s4{evil}": 1.0, "r2/s4<b>": 0.5}])
    text = write_report(folder, rows=rows, title=None, image_count=2).read_text()
    page = Page(text)
    assert evil in page.text
    assert "<script" not in text


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No folder"):
        write_report(tmp_path / "none")
    with pytest.raises(UserError, match="holds no run"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["pretrain", "train-teacher"])
def test_a_finished_run_does_not_fail_for_its_report(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        cli.VERBS[verb].function.replace(":", "."), lambda config: config.out
    )  # a folder that holds no run
    assert cli.main([verb, "--images", "i", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        f"No report: '{tmp_path}' holds no run: neither config.json nor metrics.jsonl nor results.jsonl "
        "can be read."
    ]
    assert said.err == ""


# --- figures -----------------------------------------------------------------------------------------------


def test_points_of_a_chart_lie_where_they_should() -> None:
    series = [Series("a", [(0, 0.0), (10, 1.0), (20, 4.0)]), Series("b", [(0, 2.0), (20, math.nan)])]
    text = line_chart("T", series)
    lines = [
        [tuple(map(float, p.split(","))) for p in found.split()]
        for found in re.findall('points="(.*?)"', text)
    ]
    left, right = charts.LEFT, charts.WIDTH - charts.RIGHT
    bottom, top = charts.HEIGHT - charts.BOTTOM, charts.TOP
    height = bottom - top  # the axis runs from 0 to 4
    assert lines[0] == [
        (left, bottom),
        ((left + right) / 2, pytest.approx(bottom - height / 4, abs=0.06)),
        (right, top),
    ]
    assert lines[1] == [(left, pytest.approx(bottom - height / 2, abs=0.06))]
    assert "step 10: 1<" in text
    assert "nan" not in text
    assert line_chart("T", [Series("a", [(1, math.inf)])]) == ""


def test_log_and_floor() -> None:
    x, y, ticks = chart_scales([Series("a", [(0, 0.01), (1, 1.0)])], log=True)
    assert y.log
    assert (ticks[0], ticks[-1]) == (0.01, 1.0)
    assert y(0.1) == pytest.approx((y(0.01) + y(1.0)) / 2)
    assert not chart_scales([Series("a", [(0, 0.0), (1, 100.0)])], log=True)[1].log  # 0 has no logarithm
    assert chart_scales([Series("a", [(0, -50.0), (1, 0.9)])], floor=-1.0)[2][0] == -1.0
    assert x(0) < x(1)


@settings(max_examples=40, deadline=None)
@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_few_even_and_cover(low: float, span: float) -> None:
    if low + span == low or span < abs(low) * 1e-9:
        return
    ticks = nice_ticks(low, low + span)
    slack = span * 1e-6 + abs(low) * 1e-9
    assert 2 <= len(ticks) <= 7
    assert ticks[0] <= low + slack
    assert ticks[-1] >= low + span - slack
    gaps = [b - a for a, b in pairwise(ticks)]
    assert max(gaps) - min(gaps) <= 1e-6 * max(gaps) + abs(low) * 1e-9


def test_dots_rings_and_bars_lie_where_they_should() -> None:
    text = dot_plot("T", [Dots("DreamTeacher", [0.6, 0.8], True), Dots("<b>", [0.2])])
    ticks = nice_ticks(0.2, 0.7 + statistics.stdev([0.6, 0.8]), 5)
    scale = Scale(ticks[0], ticks[-1], 112.0, charts.WIDTH - 16)
    found = [(kind, float(x)) for kind, x in re.findall(r'circle class="(\w+)" cx="([\d.]+)"', text)]
    expected = [("ring", 0.6), ("ring", 0.8), ("mean", 0.7), ("mean", 0.2)]
    assert found == [(kind, pytest.approx(scale(v), abs=0.06)) for kind, v in expected]
    a, b = map(float, re.findall(r'class="bar" x1="([\d.]+)" x2="([\d.]+)"', text)[0])
    assert (a + b) / 2 == pytest.approx(scale(0.7), abs=0.06)
    assert (b - a) / 2 == pytest.approx(scale(0.1 * 2**0.5) - scale(0), abs=0.06)
    assert "<b>" not in text


@pytest.mark.parametrize("shape", [(2, 5, 8, 8), (2, 60, 4, 4), (1, 2, 4, 4), (2, 7, 1, 1)])
def test_basis_is_the_principal_components(shape: tuple[int, ...]) -> None:
    maps = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 3
    basis = charts.pca_basis(maps)
    x = maps.double().permute(0, 2, 3, 1).flatten(0, 2)
    _, values, rows = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    rank = min(3, int((values > 1e-9).sum()))
    for i in range(3):
        if i >= rank:
            assert not basis.axes[i].any()
            continue
        assert abs(float(basis.axes[i] @ rows[i])) == pytest.approx(1.0, abs=1e-6)
        assert basis.axes[i].max() == basis.axes[i].abs().max()  # the sign is settled
    again = charts.pca_basis(maps.flip(0))
    torch.testing.assert_close(again.axes, basis.axes, atol=1e-6, rtol=0)
    colours = charts.pca_colours(maps, basis)
    assert colours.shape == (shape[0], 3, *shape[2:])
    assert colours.dtype == torch.uint8


def test_constant_maps_are_grey() -> None:
    maps = torch.ones(2, 4, 3, 3)
    assert set(charts.pca_colours(maps, charts.pca_basis(maps)).flatten().tolist()) == {128}


def test_teacher_and_regressor_share_a_basis() -> None:
    """A regressor that equals the teacher gives the same pictures; one that is off gives others."""
    target = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    spec = FeatureSpec("s8", 6, 8)

    def sources(output: torch.Tensor) -> dict[str, str]:
        text = reports_maps._level(spec, target, output, target[:, :3])
        return {alt: src for src, alt in re.findall('src="(.*?)" alt="(.*?)"', text)}

    same, other = sources(target.clone()), sources(-target)
    for i in (1, 2):
        assert same[f"teacher, stride 8 {i}"] == same[f"regressor, stride 8 {i}"]
        assert same[f"teacher, stride 8 {i}"] == other[f"teacher, stride 8 {i}"]
        assert other[f"teacher, stride 8 {i}"] != other[f"regressor, stride 8 {i}"]
    assert len(same) == 6


def test_pictures_survive_the_way_into_the_page() -> None:
    image = torch.randint(0, 256, (3, 5, 7), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    picture = decoded(data_uri(image, 7))
    assert picture.size == (7, 5)
    assert picture.getpixel((6, 4)) == tuple(image[:, 4, 6].tolist())
    assert decoded(data_uri(image.repeat(1, 20, 20), 70)).size == (70, 50)


def decoded(uri: str | None) -> Image.Image:
    assert uri is not None
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))


def test_a_run_from_elsewhere_cannot_have_code_run(image_folder, tmp_path, monkeypatch):
    from dreamteacher.cli.main import main
    from tests.builders.teachers import build

    monkeypatch.chdir(tmp_path)
    name = build("module", tmp_path / "own")
    file = tmp_path / "own" / "own.py"
    file.write_text(file.read_text() + "\nfrom pathlib import Path\nPath('RAN').touch()\n")
    command = [
        "pretrain",
        "--teacher",
        name,
        "--dataset",
        "synthesized",
        "--samples",
        "8",
        "--batch-size",
        "8",
    ]
    command += ["--student", "test_resnet", "--width", "8", "--epochs", "1", "--warmup-epochs", "0"]
    assert main([*command, "--out", "run"]) == 0  # named by the user: it runs, and its maps are drawn
    assert "executes no code" not in Path("run/report.html").read_text()
    Path("RAN").unlink()
    assert main(["report", "--run", "run"]) == 0
    assert Path("run/report.html").read_text().count("executes no code") == 2
    assert not Path("RAN").exists()
    assert main(["report", "--run", "run", "--own-code"]) == 0
    assert Path("RAN").exists()
    assert "executes no code" not in Path("run/report.html").read_text()
