"""What docs/scaling.md plans with: its arithmetic by hand, its counts counted again, its commands parsed."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dreamteacher.cli import main as cli
from dreamteacher.distill.store.items import Level, StorePlan, layout
from dreamteacher.teachers.published.known import KNOWN
from tests.places import ROOT

PLAN = SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks" / "plan.py")))


def stored_plan(size: tuple[int, int], kept: int) -> StorePlan:
    levels = tuple(
        Level(name=f"s{s}", channels=512, stride=s, height=size[0] // s, width=size[1] // s, kept=kept, storage="int8")
        for s in (4, 8, 16, 32)
    )  # fmt: skip
    return StorePlan(
        what="maps", teacher="t", family="f", licence="-", sha256="", t=(), blocks=(), noise="stochastic", device="cpu",
        precision="float32", deterministic=False, size=size, images=8, images_sha256="", seed=0, flip=True, draws=2,
        group=8, shard_images=8, keep="pca", whiten="chw", levels=levels,
    )  # fmt: skip


@pytest.mark.parametrize(("size", "kept"), [((256, 256), 63), ((128, 256), 63), ((64, 96), 31)])
def test_planned_bytes_are_those_of_the_store(size: tuple[int, int], kept: int) -> None:
    assert PLAN.item_bytes(size, kept) == layout(stored_plan(size, kept))[1] + 9


def test_an_item_of_256_pixels_is_what_was_asked_for() -> None:
    assert PLAN.item_bytes((256, 256)) <= 350_000


def test_a_plan_against_a_hand_calculation(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = runpy.run_path(str(ROOT / "benchmarks" / "plan.py"))
    names = plan["plan"].__globals__
    for name in ("DENOISER_SPEED", "BACKBONE_SPEED"):
        monkeypatch.setitem(names, name, 2e12)  # two operations each: 1000 GMACs a second
    monkeypatch.setitem(names, "step_gmacs", lambda student, size: 10.0)
    teacher = plan["Source"]("t", 90.0, True, None)
    e = plan["Example"]("d", 3_600_000, (256, 256), teacher, "s", 20)
    found = plan["plan"](e)
    # An epoch of students is 3.6e6 x 10 / 1000 s = 10 h, a pass of the teacher over all images 90 h.
    assert found.online == pytest.approx(20 * (10 + 90))
    assert found.stored.making == pytest.approx(2 * 90)
    assert found.stored.student == pytest.approx(20 * 10)
    assert found.stored.read_bytes_per_s == pytest.approx(100 * plan["item_bytes"]((256, 256)))
    assert (found.nodes, found.stored.nodes) == (11, 2)  # 8 GPUs do 192 h in a day
    assert found.stored.bytes == plan["item_bytes"]((256, 256)) * 2 * 3_600_000
    drawn = plan["plan"](e._replace(teacher=teacher._replace(encodes=False)))
    assert drawn.stored is None
    assert drawn.online == found.online


def test_seconds_are_operations_over_the_assumed_speeds() -> None:
    # 250 and 75 TFLOP/s: 125 and 37.5 TMAC/s.
    assert PLAN.seconds(125_000, 0) == pytest.approx(1)
    assert PLAN.seconds(125_000, 37_500) == pytest.approx(2)


def test_a_shard_is_about_as_large_as_asked_for() -> None:
    for size in ((256, 256), (128, 256), (512, 1024)):
        each = PLAN.item_bytes(size)
        images = PLAN.shard_images(each, 2)
        assert images % 8 == 0
        assert abs(images * 2 * each / PLAN.SHARD_BYTES - 1) <= 8 * each / PLAN.SHARD_BYTES + 0.01


@pytest.mark.slow
def test_counts_are_counted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = runpy.run_path(str(ROOT / "benchmarks" / "scaling" / "count.py"))
    rows = PLAN.rows(ROOT / "benchmarks" / "scaling" / "gmacs.csv")
    kept = {(r["network"], r["size"]): r for r in rows}
    forward = count["student_gmacs"]("resnet50", (128, 256))
    assert kept["resnet50", "128 256"]["gmacs"] == f"{forward:.1f}"
    assert forward > 5.3 / 2  # the backbone alone
    step = count["student_gmacs"]("resnet50", (128, 256), backward=True)
    assert 2.95 * forward < step < 3.0 * forward  # nothing is asked for with respect to the images
    spec = count["StyleGan2Spec"](size=(512, 1024), channels=(512, 512, 512, 512, 512, 256, 128, 64))
    assert float(kept["StyleGAN2, BDD100K", "512 1024"]["gmacs"]) == pytest.approx(
        count["measure"]("stylegan2", spec).needed, abs=0.1
    )


def test_measured_teachers_cost_what_the_table_of_teachers_says() -> None:
    of = PLAN.sources()
    assert of["ADM-256"].gmacs == pytest.approx(
        KNOWN["adm-imagenet-256-uncond"].shape.gmacs_levels, rel=0.002
    )
    assert of["Stable Diffusion 1.x, KL"].gmacs == pytest.approx(
        KNOWN["sd-1.5"].shape.gmacs_levels, rel=0.002
    )


def commands(text: str) -> list[list[str]]:
    blocks = re.findall(r"^```text\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("dreamteacher ")]


def test_commands_that_are_too_large_to_run_are_at_least_right() -> None:
    found = commands((ROOT / "docs" / "scaling.md").read_text())
    assert len(found) >= 3
    for verb, *rest in found:
        config: Any = cli.named(cli.VERBS[verb].config)
        cli.parse(config, verb, rest)
        assert not {w for w in rest if w.startswith("adm")} - set(KNOWN)


def test_prose_states_no_figure_of_its_own() -> None:
    """Figures stand in generated blocks only, but for what names a thing."""
    text = (ROOT / "docs" / "scaling.md").read_text()
    text = re.sub(r"<!-- table: \w+ -->\n.*?<!-- end -->|```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
    text = text[: text.index("## Several GPUs, several machines")]
    for name in (
        "ADM-256",
        "ResNet-50",
        "StyleGAN2",
        "int8",
        "63 principal",
        "64 channels",
        "4, 8, 16 and 32",
    ):
        text = text.replace(name, "")
    assert re.findall(r"\d+", text) == []
