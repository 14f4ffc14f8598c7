"""`inspect`: scores against plain loops, a planted best (t, level) is found, the page and the table hold it."""

from __future__ import annotations

import csv
import math

import pytest
import torch
from PIL import Image

from dreamteacher.cli import main as cli
from dreamteacher.reports import inspect
from dreamteacher.reports.config import InspectConfig
from dreamteacher.reports.inspect import inspect_teacher, spearman
from dreamteacher.reports.inspect_scores import halves, pixel_probe, pixels_at, recognition
from dreamteacher.runtime.errors import UserError

SEED = torch.Generator().manual_seed(0)


def test_recognition_against_a_loop():
    a, b = torch.randn(20, 5, generator=SEED), torch.randn(20, 5, generator=SEED)
    b = a + 0.7 * b
    x, y = ((m.double() - m.double().mean(0)) / m.double().std(0, unbiased=False) for m in (a, b))
    total = 0.0
    for i in range(20):
        cosines = [float(x[i] @ y[j] / (x[i].norm() * y[j].norm())) for j in range(20)]
        total += 1 / sum(c >= cosines[i] for c in cosines)
    assert recognition(a, b) == pytest.approx(total / 20)
    assert recognition(a, a) == 1.0
    noise = [
        recognition(torch.randn(50, 8, generator=SEED), torch.randn(50, 8, generator=SEED)) for _ in range(40)
    ]
    assert sum(noise) / 40 == pytest.approx(sum(1 / k for k in range(1, 51)) / 50, rel=0.15)  # chance
    assert recognition(torch.ones(4, 3), torch.ones(4, 3)) == 0.25  # collapsed: all tie, nobody is found


def test_halves_and_pixels():
    maps = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).view(2, 3, 4, 6)
    (left, right), (top, bottom) = halves(maps)
    assert torch.equal(left + right, 2 * maps.mean((2, 3)))
    assert torch.equal(right - left, torch.full((2, 3), 3.0))
    assert torch.equal(bottom - top, torch.full((2, 3), 12.0))
    assert len(halves(maps[..., :1, :])) == 1
    # The centre of every cell reads the cell itself.
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    centres = torch.stack([(rows + 0.5) / 4, (columns + 0.5) / 6], dim=2).view(1, 24, 2).expand(2, -1, -1)
    torch.testing.assert_close(pixels_at(maps, centres), maps.flatten(2).transpose(1, 2), rtol=0, atol=1e-4)


def test_pixel_probe_reads_what_is_linear_and_ignores_what_is_to_be_ignored():
    y = torch.randint(3, (12, 40), generator=SEED)
    x = torch.nn.functional.one_hot(y, 3).float() @ torch.randn(3, 7, generator=SEED)
    assert pixel_probe(x, y, labels=4, classes=3) == 1.0
    y[:, :10] = 255
    assert pixel_probe(x, y, labels=4, classes=3) == 1.0
    noise = torch.randn(x.shape, generator=SEED)
    assert pixel_probe(noise, y, labels=4, classes=3) < 0.5


def test_spearman_against_ranks():
    assert spearman([1, 2, 3], [2, 9, 30]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 1, 2], [5, 5, 5]) == 0.0
    x, y = torch.randperm(9, generator=SEED).tolist(), list(range(9))
    expected = 1 - 6 * sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / (9 * 80)
    assert spearman(x, y) == pytest.approx(expected)


@pytest.fixture
def planted(monkeypatch):
    """A teacher whose maps know the image at t = 100, stride 8, and are noise elsewhere."""
    from dreamteacher.spec import FeatureSpec
    from tests.distill.test_dataset import Echo

    class Planted(Echo):
        timesteps = (50, 100)
        specs = (FeatureSpec("s4", 6, 4), FeatureSpec("s8", 6, 8))

        def encode(self, images, *, generator):
            found = []
            for spec in self.specs:
                shape = (len(images), 3, images.shape[-2] // spec.stride, images.shape[-1] // spec.stride)
                noise = [torch.randn(shape, generator=generator) for _ in range(2)]
                if spec.name == "s8":
                    noise[1] = torch.nn.functional.avg_pool2d(images, 8) + 1e-4 * noise[1]
                found.append(torch.cat(noise, dim=1))
            return found

    monkeypatch.setattr(inspect, "load_teacher", lambda *args, **kwargs: Planted())


@pytest.mark.parametrize("kind", ["none", "classes", "masks", "samples"])
def test_a_planted_best_is_found(kind, planted, image_folder, tmp_path, capsys):
    images, masks = tmp_path / "images", tmp_path / "masks"
    images.mkdir()
    masks.mkdir()
    for i in range(16):
        picture = Image.new("L", (64, 64), 60 + 5 * i)
        picture.paste(250, (8 + i, 8, 40 + i, 48))
        picture.save(images / f"{i}.png")
        picture.point(lambda v: 255 * (v == 250)).save(masks / f"{i}.png")
    config = InspectConfig(
        images={"classes": image_folder, "samples": None}.get(kind, images), out=tmp_path / "out", count=16,
        masks=masks if kind == "masks" else None, binary_masks=kind == "masks", labels=4, batch_size=5,
        show=3, device="cpu", precision="float32",
    )  # fmt: skip
    rows = inspect_teacher(config)
    if kind != "samples":
        assert (rows[0].t, rows[0].level) == (100, "s8")
        assert max(rows, key=lambda row: row.score) == rows[0]
        assert rows[0].views > 0.4  # chance is 0.21
    else:
        assert all(row.views is None for row in rows)
    assert (rows[0].probe is None) == (kind in ("none", "samples"))
    if kind in ("classes", "masks"):
        assert rows[0].probe > 0.7
        assert rows[0].probe > rows[1].probe
    with open(tmp_path / "out" / "ranking.csv") as file:
        table = list(csv.DictReader(file))
    assert [(int(r["t"]), r["level"]) for r in table] == [(row.t, row.level) for row in rows]
    assert sorted(int(r["rank_without_labels"]) for r in table) == [1, 2, 3, 4]
    text = (tmp_path / "out" / "index.html").read_text()
    assert text.count("<img") == 3 * (1 + 4)  # the images, and a row of maps for each t and level
    said = capsys.readouterr().out
    assert "stride 8 at t = 100" in said or kind == "samples"
    assert "://" not in text


def test_the_embedded_kind_of_teacher_from_the_command_line(tiny_teacher, image_folder, tmp_path):
    command = ["inspect", "--teacher", str(tiny_teacher), "--images", str(image_folder), "--labels", "2"]
    assert cli.main([*command, "--out", str(tmp_path / "out"), "--t", "20", "200", "--show", "2"]) == 0
    with open(tmp_path / "out" / "ranking.csv") as file:
        table = list(csv.DictReader(file))
    assert {(int(r["t"]), r["level"]) for r in table} == {
        (t, s) for t in (20, 200) for s in ("s4", "s8", "s16", "s32")
    }
    assert all(math.isfinite(float(r["views"])) for r in table)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"teacher": "chest-xray-46"}, "Did you mean"),
        ({"labels": 9}, "too few for --labels 9"),
        ({"count": 4}, "at least 8"),
        ({"size": (60, 64)}, "multiples of"),
        ({"images": "nowhere"}, "nowhere"),
        ({"t": (5000,)}, "out of range"),
    ],
)
def test_bad_requests_leave_nothing(change, words, tiny_teacher, image_folder, tmp_path):
    settings = {"teacher": str(tiny_teacher), "images": image_folder, "out": tmp_path / "out", "labels": 2}
    with pytest.raises(UserError, match=words) as caught:
        inspect_teacher(InspectConfig(**(settings | change)))
    assert len(str(caught.value).splitlines()) <= 3
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "steps"), [("stable-diffusion", 2), ("vae", 1), ("module", 1), ("clean", 1)]
)
def test_teachers_with_and_without_timesteps(kind, steps, image_folder, tmp_path):
    from tests.builders.teachers import build

    name = build("stable-diffusion" if kind == "clean" else kind, tmp_path / "teacher")
    if kind == "clean":  # it was trained at one timestep alone: that one is kept
        card = tmp_path / "teacher" / "teacher.json"
        card.write_text(card.read_text().replace('"clean": false', '"clean": true'))
    images = [] if kind == "module" else ["--images", str(image_folder), "--labels", "2"]
    command = [
        "inspect",
        "--teacher",
        name,
        "--out",
        str(tmp_path / "out"),
        "--t",
        "50",
        "200",
        "--count",
        "16",
    ]
    assert cli.main([*command, *images]) == 0
    with open(tmp_path / "out" / "ranking.csv") as file:
        table = list(csv.DictReader(file))
    assert len(table) == steps * len({row["level"] for row in table})
    assert len({row["t"] for row in table}) == steps
