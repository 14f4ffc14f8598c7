"""Features on disk: exact or within the stated bounds, whole or absent, of these images and this teacher, or refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dreamteacher.data import batches as data_batches
from dreamteacher.data import image_set, seeds
from dreamteacher.distill import dataset
from dreamteacher.distill.config import MakeFeaturesConfig
from dreamteacher.distill.store import make, writer
from dreamteacher.distill.store.files import MANIFEST, claim, shard_name
from dreamteacher.distill.store.items import (
    Level,
    StorePlan,
    flips_of,
    layout,
    pack,
    part,
    principal_basis,
    project,
    random_basis,
    unpack,
)
from dreamteacher.distill.store.reader import FeatureStore
from dreamteacher.losses import feature_loss, projected_loss, whiten
from dreamteacher.runtime import run_folder
from dreamteacher.runtime.signals import signals_handled
from dreamteacher.teachers.registry import fingerprint, load_teacher
from tests.builders.disks import fill_disk
from tests.builders.pictures import refused
from tests.places import ROOT

CPU = torch.device("cpu")
ECHO = """
import torch
from dreamteacher.spec import FeatureSpec
from dreamteacher.teachers.base import Teacher


class Echo(Teacher):
    name, family, licence, size, multiple = "echo", "test", "-", (32, 32), 8
    specs = (FeatureSpec("s4", 3, 4), FeatureSpec("s8", 6, 8))
    modes = frozenset({"encode"})

    def __init__(self, noise):
        super().__init__()
        self.level = noise
        self.register_buffer("weight", torch.ones(1))
        self.freeze()

    def encode(self, images, *, generator):
        noise = self.level * torch.randn(images.shape, generator=generator)
        small = [torch.nn.functional.avg_pool2d(images + noise, k) for k in (4, 8)]
        return [small[0], torch.cat([small[1], 3 * small[1].square()], 1)]


def teacher():
    return Echo(0.01)


def silent():
    return Echo(0.0)
"""


def write_images(folder: Path, count: int, side: int = 32) -> Path:
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        pixels = torch.randint(0, 256, (side * side * 3,), generator=generator, dtype=torch.uint8)
        Image.frombytes("RGB", (side, side), bytes(pixels.tolist())).save(folder / f"{i:02d}.bmp")
    return folder


def asked_in(folder: Path) -> MakeFeaturesConfig:
    """13 images, batches of 2, shards of 4 images, an instant teacher whose maps show their image."""
    (folder / "echo.py").write_text(ECHO)
    return MakeFeaturesConfig(
        images=write_images(folder / "images", 13), out=folder / "out", batch_size=2,
        teacher=f"{folder / 'echo.py'}:teacher", device="cpu", precision="float32", shard_mb=0.003, channels=4,
    )  # fmt: skip


@pytest.fixture
def asked(tmp_path: Path) -> MakeFeaturesConfig:
    return asked_in(tmp_path)


def made(config: MakeFeaturesConfig) -> FeatureStore:
    assert make.make_features(config) == config.out
    return FeatureStore(config.out)


def files(folder: Path) -> dict[str, bytes]:
    """Everything a finished store is, but the config: it holds the name of the folder."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "config.json"}


def images_of(config: MakeFeaturesConfig, size: tuple[int, int] = (32, 32)) -> image_set.ImageSet:
    return image_set.load_images(config.images, size)


def live(
    store: FeatureStore, teacher: str, images: image_set.ImageSet, place: int, draw: int, **asked: Any
) -> list[Tensor]:
    """Maps of one draw of one image, from what its shard recorded alone: seed, flips, and the batch it was in."""
    plan = store.plan
    group = range(place // plan.group * plan.group, min(plan.images, (place // plan.group + 1) * plan.group))
    shard = store.shard(place // plan.shard_images)
    inputs = []
    for i in group:
        image = images.get(torch.tensor([i]))[0].float() / 255
        inputs.append(image.flip(2) if shard.flip[i % plan.shard_images, draw] else image)
    seed = int(shard.noise_seed[place % plan.shard_images, draw])
    maps = load_teacher(teacher, **asked).encode(
        torch.stack(inputs).contiguous(memory_format=torch.channels_last),
        generator=torch.Generator().manual_seed(seed),
    )
    return [m[place - group.start] for m in maps]


def plan_of(levels: tuple[Level, ...], **other: Any) -> StorePlan:
    fields: dict[str, Any] = {
        "what": "maps", "teacher": "t", "family": "f", "licence": "-", "sha256": "0", "t": (), "blocks": (), "noise": "none",
        "device": "cpu", "precision": "float32", "deterministic": False, "size": (256, 256), "images": 10,
        "images_sha256": "0", "seed": 0, "flip": True, "draws": 1, "group": 2, "shard_images": 4, "keep": "pca",
        "whiten": "chw", "levels": levels,
    }  # fmt: skip
    return StorePlan(**(fields | other))


# --- what is stored -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_raw_maps_come_back_bit_for_bit(image_folder, tiny_teacher, tmp_path):
    config = MakeFeaturesConfig(
        images=image_folder, out=tmp_path / "out", teacher=str(tiny_teacher), keep="all", batch_size=4, draws=3,
        shard_mb=0.1, device="cpu", precision="float32",
    )  # fmt: skip
    store, images = made(config), images_of(config, (64, 64))
    assert store.plan.shards > 1
    for place, draw in [(0, 0), (5, 2), (15, 1)]:
        rows, flips = store.rows(torch.tensor([place]), torch.tensor([draw]))
        kept = unpack(store.plan, rows)
        assert kept.residuals is None
        assert bool(flips[0]) == bool(flips_of(store.plan, place, place + 1)[0, draw])
        for m, truth in zip(kept.maps, live(store, str(tiny_teacher), images, place, draw), strict=True):
            assert torch.equal(m[0], truth.half().float())
    assert store.verify(load_teacher(str(tiny_teacher)), fingerprint(str(tiny_teacher)), images, CPU) < 1e-3
    other = load_teacher(str(tiny_teacher), timesteps=(400,))
    refused(lambda: store.verify(other, fingerprint(str(tiny_teacher)), images, CPU), "differ by", "rounding")


@pytest.mark.parametrize("keep", ["pca", "random", "whitened"])
@pytest.mark.parametrize("storage", ["int8", "float16", "float32"])
@pytest.mark.parametrize("axes", ["c", "chw"])
def test_errors_stay_within_the_bounds_of_the_storage(keep, storage, axes):
    kept = 20 if keep == "whitened" else 6
    level = Level(name="s4", channels=20, stride=4, height=5, width=7, kept=kept, storage=storage)
    plan = plan_of((level,), keep=keep, whiten=axes)
    generator = torch.Generator().manual_seed(1)
    maps = torch.randn(3, 20, 5, 7, generator=generator) * torch.rand(20, 1, 1, generator=generator) * 9 + 2
    basis = None if keep == "whitened" else random_basis(6, 20, 0)
    fields, size = layout(plan)
    rows = pack(plan, [basis], [maps])
    assert rows.shape == (3, size)
    found = unpack(plan, rows)
    exact = maps.double().numpy()
    over = (1,) if axes == "c" else (1, 2, 3)
    w = (exact - exact.mean(over, keepdims=True)) / np.sqrt(exact.var(over, keepdims=True) + 1e-5)
    b = np.eye(20) if basis is None else basis.double().numpy()
    c = np.stack([np.tensordot(b, image, 1) for image in w])
    error = np.abs(found.maps[0].double().numpy() - c)
    if storage == "int8":
        scale = part(rows, fields[0]["scale"]).double().numpy()
        np.testing.assert_allclose(scale, np.abs(c).max((2, 3)) / 127, rtol=1e-4)
        assert (error <= scale[..., None, None] * 0.5001 + 1e-5).all()
    else:
        assert (error <= np.abs(c) * (2.0**-11 if storage == "float16" else 1e-6) + 1e-5).all()
    q = (exact**2).sum(1)
    q /= q.max((1, 2), keepdims=True)
    step = {"int8": 0.5 / 255, "float16": 2.0**-11, "float32": 1e-6}[storage]
    assert (np.abs(found.energies[0].double().numpy() - q) <= 2.01 * np.sqrt(q) * step + step**2 + 1e-6).all()
    lost = ((w**2).sum((1, 2, 3)) - (c**2).sum((1, 2, 3))) / w[0].size if keep == "pca" else np.zeros(3)
    np.testing.assert_allclose(found.residuals[:, 0].double().numpy(), lost, atol=1e-5)


def test_an_item_of_adm_is_as_small_as_promised():
    shapes = ((512, 4), (512, 8), (1024, 16), (1024, 32))
    levels = tuple(
        Level(name=f"s{s}", channels=c, stride=s, height=256 // s, width=256 // s, kept=63, storage="int8")
        for c, s in shapes
    )
    plan = plan_of(levels)
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(1, v.channels, v.height, v.width, generator=generator) for v in levels]
    rows = pack(plan, [random_basis(63, v.channels, 0) for v in levels], maps)
    assert rows.shape[1] + 9 <= 350_000  # 9: the draw's seed and flip
    raw = replace(
        plan, keep="all", levels=tuple(replace(v, kept=v.channels, storage="float16") for v in levels)
    )
    assert layout(raw)[1] == 2 * 2_949_120


def test_maps_that_the_storage_cannot_hold_are_refused():
    level = Level(name="s4", channels=2, stride=4, height=2, width=2, kept=2, storage="float16")
    big = torch.full((1, 2, 2, 2), 1e6)
    refused(lambda: pack(plan_of((level,), keep="all"), [None], [big]), "beyond float16", "--keep whitened")
    refused(lambda: pack(plan_of((level,), keep="whitened"), [None], [big / 0]), "not finite")
    pack(plan_of((level,), keep="whitened"), [None], [big])
    dead = unpack(
        plan_of((level,), keep="whitened"), pack(plan_of((level,), keep="whitened"), [None], [big * 0])
    )
    assert float(dead.maps[0].abs().max()) == float(dead.energies[0].max()) == 0


# --- the loss in a subspace ---------------------------------------------------------------------------------


def test_principal_basis_keeps_as_much_as_a_singular_value_decomposition():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 12, dtype=torch.float64, generator=generator) * torch.linspace(1, 4, 12) + 1
    basis = principal_basis(x.T @ x, 5).double()
    torch.testing.assert_close(basis @ basis.T, torch.eye(5, dtype=torch.float64), atol=1e-6, rtol=0)
    singular = np.linalg.svd(x.numpy(), compute_uv=False)
    np.testing.assert_allclose(float((x @ basis.T).square().sum()), (singular[:5] ** 2).sum(), rtol=1e-6)
    assert bool((basis.gather(1, basis.abs().argmax(1, keepdim=True)) > 0).all())
    again = random_basis(5, 12, 3)
    torch.testing.assert_close(again @ again.T, torch.eye(5), atol=1e-6, rtol=0)
    assert torch.equal(again, random_basis(5, 12, 3))
    assert not torch.equal(again, random_basis(5, 12, 4))


@pytest.mark.parametrize("axes", ["c", "chw"])
@pytest.mark.parametrize("reduction", ["distance", "public"])
def test_projected_loss_is_the_whole_loss_of_the_map_that_the_coefficients_stand_for(axes, reduction):
    generator = torch.Generator().manual_seed(0)
    shapes = ((20, 6, 8, 5), (9, 9, 4, 3))
    teacher, student, bases, targets, energies, residuals = [], [], [], [], [], []
    for channels, kept, height, width in shapes:
        m = torch.randn(4, channels, height, width, dtype=torch.float64, generator=generator) * 3 + 1
        k = torch.randn(4, kept, height, width, dtype=torch.float64, generator=generator)
        basis = torch.linalg.qr(torch.randn(channels, kept, dtype=torch.float64, generator=generator))[0].T
        plan = plan_of((), whiten=axes)
        c, residual = project(plan, basis, m)
        teacher.append(m)
        student.append(k.requires_grad_())
        bases.append(basis)
        targets.append(c)
        energies.append(m.square().sum(1) * torch.rand(4, 1, 1, dtype=torch.float64, generator=generator))
        residuals.append(residual)
    ours = projected_loss(
        student, targets, energies, torch.stack(residuals, 1), factors=[6 / 20, 1.0], at_reduction=reduction
    )
    meant = [torch.einsum("kc,nkhw->nchw", b, k) for b, k in zip(bases, student, strict=True)]
    whole = feature_loss(meant, teacher, axes=axes, at_reduction=reduction)
    for a, b in zip(ours, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(ours.total, student), torch.autograd.grad(whole.total, student), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    zero = projected_loss(
        [k * 0 for k in student], targets, energies, torch.stack(residuals, 1), factors=[0.3, 1.0]
    )
    assert zero.mse.tolist() == pytest.approx([1, 1], abs=1e-4)  # as online, whatever is kept


def test_mean_square_over_random_subspaces_is_that_of_the_whole_map():
    generator = torch.Generator().manual_seed(0)
    difference = torch.randn(40, 16, dtype=torch.float64, generator=generator)
    squares = [(difference @ random_basis(4, 16, i).double().T).square().mean() for i in range(400)]
    assert float(torch.stack(squares).mean()) == pytest.approx(float(difference.square().mean()), rel=0.02)
    level = Level(name="s4", channels=16, stride=4, height=4, width=4, kept=4, storage="int8")
    assert plan_of((level,), keep="random").factors == (1.0,)
    assert plan_of((level,), keep="pca").factors == (0.25,)


# --- batches ------------------------------------------------------------------------------------------------


def stream(store: FeatureStore, config: MakeFeaturesConfig, first: int = 0, last: int = 12, **other: Any):
    return list(
        dataset.stored(
            store,
            images_of(config),
            batch_size=4,
            first_step=first,
            last_step=last,
            seed=5,
            device=CPU,
            **other,
        )
    )


def test_batches_belong_together_resume_and_show_every_draw(asked):
    store = made(replace(asked, keep="all", draws=4))
    batches = stream(store, asked)
    assert [b.step for b in batches] == list(range(12))
    for batch in batches:
        seen = torch.nn.functional.avg_pool2d(batch.images, 4)
        near = (batch.maps[0] - seen).flatten(1).abs().amax(1)
        far = (batch.maps[0].flip(3) - seen).flatten(1).abs().amax(1)
        assert bool((near < 0.03).all())  # the noise of the teacher
        assert bool((far > 0.1).all())
        order = data_batches.batch_indices(13, batch_size=4, seed=5, step=batch.step)
        rows, _ = store.rows(order, store.draws_of(order, batch.step // 3, 5))  # 3 batches an epoch
        assert all(map(torch.equal, batch.maps, unpack(store.plan, rows).maps))
    for a, b in zip(batches[5:], stream(store, asked, first=5), strict=True):
        assert torch.equal(a.images, b.images)
        assert all(map(torch.equal, a.maps, b.maps))
    flips = torch.cat([store.shard(i).flip for i in range(store.plan.shards)])
    assert flips.sum(1).tolist() == [2] * 13  # half of the draws of every image
    places = torch.arange(13)
    draws = torch.stack([store.draws_of(places, epoch, 5) for epoch in range(4)])
    assert draws.sort(0).values.T.tolist() == [[0, 1, 2, 3]] * 13
    assert len(set(draws[0].tolist())) > 1
    assert not torch.equal(draws[0], store.draws_of(places, 0, 6))


def test_a_stored_batch_has_the_loss_of_the_live_one(asked):
    store = made(replace(asked, store=("float32",)))
    assert store.plan.levels[1].kept == 3  # of 6 channels: something is lost
    batch = stream(store, asked)[2]
    images = images_of(asked)
    places = {p.read_bytes(): i for i, p in enumerate(images.paths)}
    assert len(places) == 13
    order = data_batches.batch_indices(13, batch_size=4, seed=5, step=2)
    draws = store.draws_of(order, 0, 5)
    maps = [live(store, asked.teacher, images, int(i), int(k)) for i, k in zip(order, draws, strict=True)]
    teacher = [torch.stack(level).double() for level in zip(*maps, strict=True)]
    generator = torch.Generator().manual_seed(0)
    student = [torch.randn(m.shape, generator=generator) for m in batch.maps]
    ours = dataset.batch_loss(student, batch, axes="chw", at_weight=10.0, at_reduction="distance")
    meant = [
        torch.einsum("kc,nkhw->nchw", b.double(), k.double())
        for b, k in zip(store.bases, student, strict=True)
    ]
    for a, b in zip(ours, feature_loss(meant, teacher), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
    raw = dataset.FeatureBatch(batch.images, teacher, 0.0, 0)
    assert torch.equal(
        dataset.batch_loss(meant, raw, axes="c", at_weight=1.0, at_reduction="public").total,
        feature_loss(meant, teacher, axes="c", at_weight=1.0, at_reduction="public").total,
    )
    assert torch.equal(raw.target(0, "c"), whiten(teacher[0], "c"))
    assert batch.target(0, "c") is batch.maps[0]


def test_a_part_of_the_images_is_enough(asked, tmp_path):
    store = made(replace(asked, keep="all"))
    few = tmp_path / "few"
    few.mkdir()
    for name in ("03", "04", "07", "12"):
        shutil.copy(asked.images / f"{name}.bmp", few)
    images = image_set.load_images(few, (32, 32))
    assert store.places(images).tolist() == [3, 4, 7, 12]
    assert store.verify(load_teacher(asked.teacher), fingerprint(asked.teacher), images, CPU) is not None
    (batch,) = dataset.stored(store, images, batch_size=4, first_step=0, last_step=1, seed=0, device=CPU)
    seen = torch.nn.functional.avg_pool2d(batch.images, 4)
    assert float((batch.maps[0] - seen).abs().max()) < 0.03


def test_latents_alone_are_exact(tmp_path):
    from tests.builders.teachers import build

    build("stable-diffusion", tmp_path / "sd")
    config = MakeFeaturesConfig(
        images=write_images(tmp_path / "images", 3, 64), out=tmp_path / "out", teacher=str(tmp_path / "sd"),
        what="latents", batch_size=3, device="cpu", precision="float32",
    )  # fmt: skip
    refused(lambda: make.make_features(replace(config, draws=3)), "would be copies", "--draws 2")
    store, teacher = made(config), load_teacher(config.teacher, timesteps=(30,))
    images = images_of(config, (64, 64))
    assert store.plan.deterministic
    assert store.plan.draws == 2
    assert store.verify(teacher, fingerprint(config.teacher), images, CPU) == 0.0
    (batch,) = dataset.stored(
        store, images, batch_size=3, first_step=0, last_step=1, seed=7, device=CPU, teacher=teacher,
        precision="float32",
    )  # fmt: skip
    generator = seeds.device_generator(7, 0, "teacher", CPU)
    for stored, fresh in zip(batch.maps, teacher.encode(batch.images, generator=generator), strict=True):
        torch.testing.assert_close(stored, fresh, rtol=1e-4, atol=1e-4)
    assert batch.kept is None
    wrong = replace(config, teacher="chest-xray-64", out=tmp_path / "none")
    refused(lambda: make.make_features(wrong), "has no latents", "--what maps")
    assert not (tmp_path / "none").exists()


# --- interrupted, crowded, damaged --------------------------------------------------------------------------

CROWD = """
import json, os, random, signal, sys, time
from pathlib import Path
from dreamteacher.runtime.config import from_json
from dreamteacher.distill.store import make as m, writer as w
import torch

torch.set_num_threads(1)
w._POLL = 0.01
asked = json.loads(sys.argv[1])
pack = w.pack
w.pack = lambda *a: (time.sleep(0.02), pack(*a))[1]


def start(out):
    child = os.fork()
    if child:
        return child
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        m.make_features(from_json(m.MakeFeaturesConfig, asked | {"out": str(out)}))
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)


def end(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


base = Path(asked["out"])
begin = time.perf_counter()
assert end(start(base / "whole")) == 0
seconds = time.perf_counter() - begin
draw, kills = random.Random(0), 0
for turn in range(5):
    child = start(base / "killed")
    time.sleep(seconds * draw.uniform(0.05, 0.15 + 0.15 * turn))
    os.kill(child, signal.SIGKILL)
    kills += end(child) == -signal.SIGKILL and not (base / "killed" / "features.json").exists()
assert end(start(base / "killed")) == 0
both = [start(base / "two") for _ in range(3)]
time.sleep(seconds * 0.3)
os.kill(both[0], signal.SIGKILL)
assert [end(child) for child in both[1:]] == [0, 0]
end(both[0])
print(kills)
"""


@pytest.mark.slow
def test_killed_and_crowded_writers_leave_what_one_leaves(asked, tmp_path):
    values = {k: v for k, v in json.loads(json.dumps(vars(asked), default=str)).items() if v is not None}
    done = subprocess.run(
        [sys.executable, "-c", CROWD, json.dumps(values | {"out": str(tmp_path / "stores")})],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 1, "no child was killed before it had finished"
    whole = files(tmp_path / "stores" / "whole")
    assert sum(name.endswith(".safetensors") for name in whole) == 4 + 1
    for name in ("killed", "two"):
        assert files(tmp_path / "stores" / name) == whole
        FeatureStore(tmp_path / "stores" / name)


def test_a_claim_is_for_one_and_ends_with_its_holder(tmp_path):
    with claim(tmp_path, "shard") as mine:
        assert mine
        with claim(tmp_path, "shard") as second:
            assert not second
        with claim(tmp_path, "other") as other:
            assert other
    with claim(tmp_path, "shard") as mine:
        assert mine


def test_a_full_disk_leaves_a_store_that_resumes(asked, monkeypatch):
    made(replace(asked, out=asked.out.with_name("whole")))
    write, calls = Path.write_bytes, []

    def full(path, content):
        calls.append(path)
        if len(calls) == 4:  # the basis, two shards, and part of the third
            write(path, content[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    refused(lambda: make.make_features(asked), "the disk is full", "it resumes")
    assert sorted(p.name for p in asked.out.glob("shard-*.safetensors")) == [shard_name(0), shard_name(1)]
    assert not list(asked.out.glob(".*.tmp"))
    refused(lambda: FeatureStore(asked.out), "no finished features", "2 shards are there", "same")
    monkeypatch.setattr(Path, "write_bytes", write)
    encoded, noise = [], writer.noise_seed
    monkeypatch.setattr(writer, "noise_seed", lambda *a: encoded.append(a[1]) or noise(*a))
    made(asked)
    assert files(asked.out) == files(asked.out.with_name("whole"))
    assert min(encoded) == 4  # the shards that were finished are not made again


def test_a_disk_that_is_really_full_leaves_a_store_that_resumes(asked, small_disk, monkeypatch):
    made(replace(asked, out=asked.out.with_name("whole")))
    asked, pack = replace(asked, out=small_disk / "out"), make.pack

    def filling(*args):
        if len(list(asked.out.glob("shard-*.safetensors"))) == 2:
            fill_disk(small_disk)
        return pack(*args)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "pack", filling)
        refused(lambda: make.make_features(asked), "the disk is full", "it resumes")
    assert sorted(p.name for p in asked.out.glob("shard-*.safetensors")) == [shard_name(0), shard_name(1)]
    assert not list(asked.out.glob(".*.tmp"))
    (small_disk / "filler").unlink()
    made(asked)
    assert files(asked.out) == files(asked.out.parent.parent / "whole")


def test_a_shard_whose_checksum_was_not_yet_written_is_made_again(asked):
    made(asked)
    whole = files(asked.out)
    for name in (MANIFEST, f"{shard_name(2)}.sha256"):
        (asked.out / name).unlink()
    made(asked)
    assert files(asked.out) == whole


def test_space_is_checked_and_a_dry_run_writes_nothing(asked, monkeypatch, capsys):
    assert make.make_features(replace(asked, dry_run=True)) is None
    assert "nothing was written" in capsys.readouterr().out
    free = SimpleNamespace(free=1_000, total=1, used=1)
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda _: free)
    refused(lambda: make.make_features(asked), "needs", "MB free")
    assert not asked.out.exists()
    monkeypatch.undo()
    store = made(asked)
    told = make.estimate_bytes(store.plan, 13)
    taken = sum(p.stat().st_size for p in asked.out.iterdir())
    small = sum(p.stat().st_size for p in asked.out.iterdir() if not p.name.startswith("shard"))
    assert taken <= told <= taken + 70_000
    assert small < 66_000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_keep_finished_shards(asked, number, monkeypatch, capsys):
    original = writer.pack

    def signalled(plan, bases, maps):
        if len(list(asked.out.glob("shard-*.safetensors"))) == 2 and not stopped:
            stopped.append(number)
            os.kill(os.getpid(), number)
        return original(plan, bases, maps)

    stopped: list[int] = []
    monkeypatch.setattr(writer, "pack", signalled)
    with signals_handled(), pytest.raises(SystemExit) as stop:
        make.make_features(asked)
    assert stop.value.code == 128 + number
    assert "The same command resumes" in capsys.readouterr().out
    made(asked)
    assert make.make_features(asked) == asked.out
    assert "complete, and every checksum holds" in capsys.readouterr().out


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [truncate, alter, remove])
@pytest.mark.parametrize(
    "name", [shard_name(0), shard_name(3), "basis.safetensors", "images.jsonl", MANIFEST]
)
def test_damaged_files_are_named(asked, damage, name):
    made(asked)
    whole = files(asked.out)
    damage(asked.out / name)
    refused(lambda: FeatureStore(asked.out), name)
    if name.startswith(("shard", "images")):  # and mended, as the error says
        (asked.out / name).unlink(missing_ok=True)
        made(asked)
        assert files(asked.out) == whole


def test_an_image_that_changed_and_another_teacher_are_refused(asked, tmp_path):
    store = made(asked)
    teacher, told = load_teacher(asked.teacher), fingerprint(asked.teacher)
    images = images_of(asked)
    worst = store.verify(teacher, told, images, CPU, samples=13)
    assert worst is not None
    assert worst < 0.02
    refused(lambda: store.verify(teacher, "f" * 64, images, CPU), "are of the teacher 'echo'", "--teacher")
    silent = asked.teacher.replace(":teacher", ":silent")
    assert fingerprint(silent) == told  # one file: only the live check can tell
    refused(lambda: store.verify(load_teacher(silent), told, images, CPU, samples=13), "differ by")
    refused(lambda: store.places(images_of(asked, (64, 64))), "32 x 32 pixels, not 64 x 64", "--size 32 32")
    alter(asked.images / "05.bmp")  # one bit of one pixel: too little to see, and to matter
    store.verify(teacher, told, images_of(asked), CPU, samples=13)
    shutil.copy(asked.images / "06.bmp", asked.images / "05.bmp")  # as long as it was
    refused(lambda: store.verify(teacher, told, images_of(asked), CPU, samples=13), "05.bmp", "differ by")
    (asked.images / "new.bmp").write_bytes((asked.images / "06.bmp").read_bytes())
    refused(lambda: store.places(images_of(asked)), "no features of 1 of 14 images", "new.bmp")
    refused(lambda: make.make_features(asked), "begun with other settings, images or teacher", "images")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, ("begun with other settings", "seed: 0 -> 1")),
        ({"keep": "all"}, ("begun with other settings", "keep")),
        ({"store": ("int8",) * 3}, ("3 kinds for 2 levels",)),
        ({"store": ("int8",), "keep": "all"}, ("not stored as int8", "--keep whitened")),
        ({"channels": 1}, ("leaves no coefficient",)),
        ({"draws": 0}, ("--draws must be above 0",)),
        ({"size": (30, 32)}, ("multiples of 8",)),
        ({"what": "latents"}, ("has no latents",)),
    ],
)
def test_what_cannot_be_is_refused_before_a_byte_is_written(asked, change, words):
    made(asked)
    before = files(asked.out)
    refused(lambda: make.make_features(replace(asked, **change)), *words)
    assert files(asked.out) == before


def test_copies_are_refused(asked):
    silent = replace(asked, teacher=asked.teacher.replace(":teacher", ":silent"))
    refused(lambda: make.make_features(replace(silent, draws=2, flip=False)), "copies", "--draws 1")
    store = made(replace(silent, flip=False))
    assert store.plan.draws == 1
    assert store.plan.deterministic
    assert (
        store.verify(load_teacher(silent.teacher), fingerprint(silent.teacher), images_of(asked), CPU) < 0.02
    )


def test_a_large_store_is_hashed_in_part_and_elsewhere_noise_cannot_be_drawn(asked):
    made(asked)
    alter(asked.out / shard_name(1))
    FeatureStore(asked.out, hash_gb=0)
    store = FeatureStore(asked.out, hash_gb=0)
    assert store.verify(
        load_teacher(asked.teacher), fingerprint(asked.teacher), images_of(asked), torch.device("meta")
    ) is None  # fmt: skip
