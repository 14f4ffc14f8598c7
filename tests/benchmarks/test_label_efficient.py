"""The compared methods of benchmarks/label_efficient: DDPM-seg, DatasetDDPM, DatasetGAN, their protocol."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from dreamteacher.data.labelled_set import LabelledSet
from dreamteacher.downstream.classification.finetune import shuffled_batches
from dreamteacher.models.student import create_student
from dreamteacher.teachers.diffusion.teacher import DiffusionTeacher, alphas_cumprod, build_unet, noised
from dreamteacher.teachers.diffusion.walk import decoder_outputs
from dreamteacher.teachers.registry import load_teacher
from tests.builders.pictures import noise, refused
from tests.builders.pixel_features import features_of
from tests.places import BENCHMARKS

FOLDER = BENCHMARKS / "label_efficient"
sys.path.insert(0, str(FOLDER))

import dataset_ddpm  # noqa: E402
import ddpm_seg  # noqa: E402
import protocol  # noqa: E402
import run  # noqa: E402
from ddpm_seg import PixelConfig, PixelEnsemble  # noqa: E402


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- features ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (32, 96)])
def test_reading_pixels_is_enlarging_the_maps(tiny_teacher, size):
    """Against the teacher's own whole features, whatever the shape."""
    config = PixelConfig(timesteps=(50, 250))
    teacher = load_teacher(str(tiny_teacher), timesteps=config.timesteps, noise="fixed")
    image = torch.rand(3, *size, generator=generator())
    blocks = ddpm_seg.analogous_blocks(teacher)
    whole = features_of(teacher, image[None], blocks=blocks, generator=generator())[0]
    maps = ddpm_seg.block_maps(teacher, image, config)
    assert max(m[0].numel() for m in maps) < size[0] * size[1]
    pixels = torch.arange(size[0] * size[1])
    read = ddpm_seg.read_pixels(maps, size, pixels)
    torch.testing.assert_close(read, whole.flatten(1).T, rtol=0, atol=1e-5 * float(whole.abs().max()))
    some = pixels[torch.randperm(len(pixels), generator=generator())[:50]]
    assert torch.equal(ddpm_seg.read_pixels(maps, size, some), read[some])
    other = ddpm_seg.read_pixels(ddpm_seg.block_maps(teacher, image, config, noise_seed=1), size, some)
    assert (other - read[some]).abs().max() > 0.01


@pytest.mark.parametrize("which", ["analogous", "literal"])
def test_golden_features(which):
    from tests.teachers.diffusion.test_adm import golden, network

    values, _, _ = golden("ddpm_seg_features")
    unet, spec = network("adm_legacy")
    steps = torch.tensor((50, 150, 250))
    x = noised(values["in.x0"], alphas_cumprod(spec.schedule)[steps], values["in.noise"])
    blocks = tuple(values[f"in.{which}.blocks"].tolist())
    outputs = decoder_outputs(unet, x, steps, blocks)
    row, column = values["in.positions"].T
    read = ddpm_seg.read_pixels([m[k] for k in range(3) for m in outputs], (64, 64), row * 64 + column)
    torch.testing.assert_close(read, values[f"out.{which}.features"], rtol=0, atol=5e-4)
    if which == "analogous":
        teacher = DiffusionTeacher(unet, spec, name="golden", licence="-")
        assert ddpm_seg.analogous_blocks(teacher) == blocks


@pytest.mark.parametrize(
    ("levels", "layers", "patch", "blocks"),
    [(6, 2, 1, (5, 6, 7, 8, 12)), (4, 1, 1, (1, 4)), (3, 1, 4, (1, 2, 3, 4))],
    ids=["as ADM-256, published", "no stride 16", "finest at stride 4"],
)
def test_blocks_of_other_networks(tiny_spec, levels, layers, patch, blocks):
    unet = {
        **tiny_spec.unet,
        "in_channels": patch * patch,
        "out_channels": patch * patch,
        "block_out_channels": [8] * levels,
        "layers_per_block": layers,
        "down_block_types": ["DownBlock2D"] * levels,
        "up_block_types": ["UpBlock2D"] * levels,
    }
    spec = replace(tiny_spec, unet=unet, patch=patch)
    teacher = DiffusionTeacher(build_unet(spec), spec, name="other", licence="-")
    if levels == 4:  # strides 8, 4, 2, 1: all of the first level and the first block at stride 2
        blocks = (0, 1, 4)
    assert ddpm_seg.analogous_blocks(teacher) == blocks


def index_maps(count: int, height: int, width: int) -> list[list[Tensor]]:
    """Maps as large as the image whose value at a pixel says which image and pixel it is."""
    pixel = torch.arange(height * width, dtype=torch.float32).view(1, height, width)
    return [[torch.cat([pixel, torch.full_like(pixel, float(i))])] for i in range(count)]


@pytest.mark.parametrize("rows", [None, 10])
def test_rows_are_the_labelled_pixels(rows, capsys):
    masks = torch.randint(0, 3, (3, 6, 8), generator=generator())
    masks[0, :2] = 255
    budget = 2.0 if rows is None else rows * 2 * 4 / 1e9
    config = PixelConfig(budget_gb=budget, smallest=0)
    x, y = ddpm_seg.collect(index_maps(3, 6, 8), masks, config, classes=3, ignore_index=255, seed=1)
    labelled = int((masks != 255).sum())
    assert len(x) == len(y) == (rows or labelled)
    where = (x[:, 1] * 48 + x[:, 0]).round().long()
    assert len(where.unique()) == len(where)
    assert torch.equal(masks.flatten()[where], y)
    said = capsys.readouterr().err
    assert (f"{rows} of {labelled}" in said) if rows else not said
    again, _ = ddpm_seg.collect(index_maps(3, 6, 8), masks, config, classes=3, ignore_index=255, seed=2)
    assert torch.equal(again, x) == (rows is None)
    half = replace(config, half=True, budget_gb=budget / 2)
    assert len(
        ddpm_seg.collect(index_maps(3, 6, 8), masks, half, classes=3, ignore_index=255, seed=1)[0]
    ) == len(x)


def test_classes_of_few_pixels_are_not_learned():
    """20 pixels of 256 x 256 are 1.25 of 64 x 64: one pixel goes, two stay."""
    masks = torch.zeros(2, 64, 64, dtype=torch.int64)
    masks[0, 0, 0], masks[0, 1, :2], masks[1, 0, :2], masks[1, 5, 5] = 1, 2, 1, 255
    kept = ddpm_seg.without_small(masks, classes=3, ignore_index=255, smallest=20)
    expected = masks.clone()
    expected[0, 0, 0] = 255
    assert torch.equal(kept, expected)
    assert torch.equal(ddpm_seg.without_small(masks, classes=3, ignore_index=255, smallest=0), masks)


def test_without_classes_there_is_nothing_to_learn():
    masks = torch.full((1, 4, 4), 255)
    refused(
        lambda: ddpm_seg.collect([], masks, PixelConfig(), classes=2, ignore_index=255, seed=0), "0 pixels of"
    )


# --- the ensemble ------------------------------------------------------------------------------------------------


def one_by_one(ensemble: PixelEnsemble) -> list[nn.Sequential]:
    """The classifiers as ordinary modules with the same weights, in training mode."""
    found = []
    for m in range(ensemble.members):
        layers: list[nn.Module] = []
        for i, (weight, bias) in enumerate(zip(ensemble.weights, ensemble.biases, strict=True)):
            linear = nn.Linear(*weight.shape[1:])
            linear.weight.data, linear.bias.data = weight[m].detach().T.clone(), bias[m, 0].detach().clone()
            layers += [linear, nn.ReLU(), nn.BatchNorm1d(weight.shape[2])] if i < 2 else [linear]
        found.append(nn.Sequential(*layers))
    return found


@pytest.mark.parametrize("classes", [3, 30])
def test_training_together_is_training_one_by_one(classes):
    """Early stop included: some stop, each at its own step."""
    config = PixelConfig(members=4, batch_size=16, epochs=8, settle=2, patience=3)
    y = torch.arange(100) % classes
    x = torch.randn(100, 6, generator=generator()) + F.one_hot(y % 6, 6) * 2
    together = ddpm_seg.train_ensemble(x, y, config, classes=classes, seed=5)
    from dreamteacher.data.seeds import step_generator

    stops = []
    for m, model in enumerate(one_by_one(PixelEnsemble(6, classes, 4, 5))):
        steps, settled = 8 * math.ceil(100 / 16), 2 * math.ceil(100 / 16)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        batches = shuffled_batches(100, 16, steps, step_generator(5, m, "pixel batches"))
        lowest, waited, step = math.inf, 0, -1
        for step, index in enumerate(batches):
            loss = F.cross_entropy(model(x[index]), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step >= settled:
                waited = 0 if loss.item() < lowest else waited + 1
                lowest = min(lowest, loss.item())
                if waited > 3:
                    break
        stops.append(step)
        expected = model.eval()(x)
        torch.testing.assert_close(together(x.expand(4, -1, -1))[m], expected, rtol=1e-3, atol=1e-4)
    assert min(stops) < steps - 1
    assert len(set(stops)) > 1


def test_the_published_sizes():
    def widths(classes: int) -> list[tuple[int, ...]]:
        return [tuple(w.shape) for w in PixelEnsemble(5, classes, 2, 0).weights]

    assert widths(29) == [(2, 5, 128), (2, 128, 32), (2, 32, 29)]
    assert widths(34) == [(2, 5, 256), (2, 256, 128), (2, 128, 34)]
    first = PixelEnsemble(400, 2, 2, 0).weights[0]
    assert float(first.detach().std()) == pytest.approx(0.02, rel=0.02)
    assert not torch.equal(first[0], first[1])


def test_an_ensemble_learns_what_can_be_separated():
    """Three classes of pixels whose features differ by their sign pattern, in maps half as large as the image."""
    masks = (
        torch.randint(0, 3, (4, 8, 8), generator=generator()).repeat_interleave(2, 1).repeat_interleave(2, 2)
    )
    maps = [[F.one_hot(mask[::2, ::2], 3).permute(2, 0, 1).float()] for mask in masks]
    inner = masks.clone()  # between two cells the features are mixed: not labelled
    centres = [[m[0].repeat_interleave(2, 1).repeat_interleave(2, 2)] for m in maps]
    config = PixelConfig(members=3, batch_size=32, epochs=6)
    x, y = ddpm_seg.collect(centres, inner, config, classes=3, ignore_index=255, seed=0)
    ensemble = ddpm_seg.train_ensemble(x, y, config, classes=3, seed=0)
    assert not ensemble.training
    for one, mask in zip(centres, masks, strict=True):
        found, uncertainty = ddpm_seg.predict(ensemble, one, (16, 16))
        assert torch.equal(found, mask)
        assert 0 <= uncertainty < 0.05


def test_prediction_is_the_vote_over_whole_features():
    """The first layer runs on small maps; the vote and the divergence against float64 loops over whole features."""
    ensemble = PixelEnsemble(7, 4, 5, 3).eval().requires_grad_(False)
    for weight in ensemble.weights:
        weight.mul_(30)
    maps = [torch.randn(c, h, w, generator=generator(c)) for c, h, w in ((3, 4, 6), (2, 8, 12), (2, 4, 6))]
    size = (16, 24)
    found, uncertainty = ddpm_seg.predict(ensemble, maps, size)
    large = [F.interpolate(m[None], size, mode="bilinear", align_corners=False)[0] for m in maps]
    x = torch.cat(large).flatten(1).T
    logits = ensemble(x.expand(5, -1, -1)).double()
    divergences = []
    for k in range(len(x)):
        votes = logits[:, k].argmax(1).tolist()
        most = max(votes.count(c) for c in range(4))
        assert int(found.flatten()[k]) == min(c for c in range(4) if votes.count(c) == most)
        p = logits[:, k].softmax(1)
        mean = p.mean(0)
        divergences.append(float(-(mean * mean.log()).sum() + (p * p.log()).sum(1).mean()))
    assert uncertainty == pytest.approx(sum(sorted(divergences)[-38:]) / 38, rel=1e-4)
    assert len(found.unique()) == 4


@pytest.mark.parametrize(
    "wrong",
    [{"members": 0}, {"epochs": 0}, {"timesteps": ()}, {"batch_size": 1}, {"lr": 0.0}, {"budget_gb": 0.0}],
)
def test_settings_that_cannot_be(wrong):
    refused(lambda: PixelConfig(**wrong), "Give")


def test_a_gan_has_no_noise_levels():
    gan = load_teacher("chest-xray-gan-64")
    images, masks = torch.zeros(2, 3, 64, 64, dtype=torch.uint8), torch.zeros(2, 64, 64, dtype=torch.int64)
    refused(
        lambda: ddpm_seg.ddpm_seg(gan, images, masks, PixelConfig(), classes=2, ignore_index=255, seed=0),
        "stylegan2", "diffusion teacher",
    )  # fmt: skip


# --- labelled samples ----------------------------------------------------------------------------------------------


def test_the_most_uncertain_are_dropped():
    uncertainty = torch.tensor([0.3, 0.1, 0.9, 0.2, 0.8, 0.0, 0.5, 0.4, 0.6, 0.7])
    samples = dataset_ddpm.LabelledSamples(
        images=torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 2, 2),
        masks=torch.arange(10).view(10, 1, 1).expand(10, 2, 2),
        uncertainty=uncertainty,
    )
    kept = dataset_ddpm.keep_certain(samples, 0.25)
    assert kept.images[:, 0, 0, 0].tolist() == kept.masks[:, 0, 0].tolist() == [0, 1, 3, 5, 6, 7, 8, 9]
    assert len(dataset_ddpm.keep_certain(samples, 0.0).masks) == 10


def test_a_gan_labels_its_samples():
    """Masks of four samples (bright or dark, which its maps know) make masks of new ones."""
    gan = load_teacher("chest-xray-gan-64")
    shown = dataset_ddpm.images_to_annotate(gan, 4, seed=3)
    assert shown.shape == (4, 3, 64, 64)
    drawn = (shown[:, 0] > 110).long()
    config = PixelConfig(members=2, batch_size=256, epochs=6)
    ensemble = dataset_ddpm.train_on_samples(gan, drawn, config, classes=2, ignore_index=255, seed=3)
    settings = dataset_ddpm.SamplesConfig(samples=5, drop=0.2)
    made = dataset_ddpm.dataset_gan(gan, ensemble, settings, first=4, seed=3)
    assert made.images.shape == (4, 3, 64, 64)
    truth = (made.images[:, 0] > 110).long()
    assert 0.1 < float(truth.float().mean()) < 0.9
    assert float((made.masks == truth).float().mean()) > 0.85
    assert not any(torch.equal(a, b) for a in made.images for b in shown)


@pytest.mark.parametrize("wrong", [{"samples": 1}, {"drop": 1.0}, {"batch_size": 0}])
def test_samples_that_cannot_be(wrong):
    refused(lambda: dataset_ddpm.SamplesConfig(**wrong), "Give at least 2")


# --- protocol ------------------------------------------------------------------------------------------------------


def write_published(root: Path, name: str) -> Path:
    """A miniature of the published layout: images of 8 x 8, masks of 16 x 16 with every fourth row ignored."""
    facts = protocol.PUBLISHED[name]
    for part, count in (("train", facts.train), ("test", facts.test)):
        folder = root / name / "real" / part
        folder.mkdir(parents=True)
        for i in range(count):
            noise(i + 1000 * (part == "test"), 8, 8).save(folder / f"{i:03d}.png")
            mask = torch.randint(0, facts.classes, (16, 16), generator=generator(i)).to(torch.uint8)
            mask[::4] = facts.ignore
            np.save(folder / f"{i:03d}.npy", mask.numpy())
    return root


@pytest.mark.parametrize("name", protocol.PUBLISHED)
def test_the_published_layout(tmp_path, name):
    facts = protocol.PUBLISHED[name]
    root = write_published(tmp_path, name)
    bench = protocol.published_benchmark(name, root, size=(16, 16))
    assert (len(bench.pool.images), len(bench.test.images)) == (facts.train, facts.test)
    assert len(bench.scored) == int(name.split("_")[1])
    for i in (0, 7):
        raw = np.load(root / name / "real" / "train" / f"{i:03d}.npy")
        assert torch.equal(bench.pool.targets[i], torch.from_numpy(raw.astype(np.int64)))
        assert not torch.equal(bench.pool.images[i], bench.test.images[i])


def test_splits_mix_train_and_test(tmp_path):
    root = write_published(tmp_path, "cat_15")
    first, again, second = (
        protocol.published_benchmark("cat_15", root, split=k, size=(8, 8)) for k in (1, 1, 2)
    )
    whole = protocol.published_benchmark("cat_15", root, size=(8, 8))

    def pictures(*sets: LabelledSet) -> list[bytes]:
        return [bytes(image.flatten().tolist()) for s in sets for image in s.images]

    assert pictures(first.pool, first.test) == pictures(again.pool, again.test)
    assert pictures(first.test) != pictures(second.test)
    assert (len(first.pool.images), len(first.test.images)) == (30, 20)
    assert sorted(pictures(first.pool, first.test)) == sorted(pictures(whole.pool, whole.test))
    assert set(pictures(first.test)) - set(pictures(whole.test))


def break_folder(root: Path) -> None:
    (root / "test").rename(root / "tests")


def break_count(root: Path) -> None:
    (root / "train" / "029.png").unlink()


def break_mask(root: Path) -> None:
    (root / "test" / "003.npy").unlink()


def break_shape(root: Path) -> None:
    np.save(root / "train" / "004.npy", np.zeros((8, 16), np.uint8))


def break_ids(root: Path) -> None:
    np.save(root / "train" / "004.npy", np.full((8, 8), 77, np.uint8))


def break_float(root: Path) -> None:
    np.save(root / "train" / "004.npy", np.full((16, 16), 0.5))


def break_pickle(root: Path) -> None:
    np.save(root / "train" / "004.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)


def break_bytes(root: Path) -> None:
    (root / "train" / "004.npy").write_bytes(b"")


def break_image(root: Path) -> None:
    (root / "train" / "004.png").write_bytes(b"no image")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (break_folder, ("missing", "20 images")),
        (break_count, ("29 of 30 images",)),
        (break_mask, ("without a .npy mask: 003.png",)),
        (break_shape, ("004.png 8 x 8 and its mask 16 x 8",)),
        (break_ids, ("004.npy (77)", "0 to 14", "255 is ignored")),
        (break_float, ("004.npy", "floating")),
        (break_pickle, ("004.npy", "whole numbers")),
        (break_bytes, ("004.npy", "empty file")),
        (break_image, ("004.png", "cannot be read")),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_missing_is_said(tmp_path, damage, words):
    root = write_published(tmp_path, "cat_15")
    damage(root / "cat_15" / "real")
    refused(lambda: protocol.published_benchmark("cat_15", root, size=(8, 8)), *words)


def test_sets_need_their_data(tmp_path):
    refused(lambda: protocol.load_benchmark("cat_15"), "--data-root")
    refused(lambda: protocol.load_benchmark("camvid"), "--data-root")
    refused(lambda: protocol.load_benchmark("dogs", root=tmp_path), "bedroom_28")


@pytest.mark.parametrize("ignore", [0, 255])
def test_both_readings_of_the_score(ignore):
    """Against plain loops over pixels; a class that nobody has is 0 in one and left out in the other."""
    draw = generator(4)
    target = torch.randint(0, 4, (3, 6, 6), generator=draw)
    target[:, 0] = ignore
    predicted = torch.where(torch.rand(3, 6, 6, generator=draw) < 0.6, target, 2).clamp(max=3)
    nothing = LabelledSet(images=torch.empty(0), targets=torch.empty(0), classes=("",) * 5)
    bench = protocol.Benchmark(
        name="x", classes=5, ignore=ignore, size=(6, 6), unlabelled=None, pool=nothing, test=nothing
    )
    found = protocol.score(zip(predicted.split(1), target.split(1), strict=True), bench)
    ours, published = [], []
    for c in range(5):
        if c == ignore:
            continue
        pairs = list(zip(predicted.flatten().tolist(), target.flatten().tolist(), strict=True))
        hits = sum(p == c and t == c for p, t in pairs)
        either = sum(p == c or t == c for p, t in pairs)
        either_kept = sum((p == c or t == c) and t != ignore for p, t in pairs)
        published.append(hits / max(either, 1))
        if either_kept:
            ours.append(hits / either_kept)
            assert found.iou[c] == pytest.approx(hits / either_kept)
        else:
            assert math.isnan(found.iou[c])
    assert found.miou == pytest.approx(sum(ours) / len(ours))
    assert found.miou_published == pytest.approx(sum(published) / len(published))
    assert found.miou_published < found.miou
    assert list(found.iou) == [c for c in range(5) if c != ignore]


# --- run.py ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def xrays(tmp_path_factory) -> Path:
    """The demo's folders with eight masks: a bright square somewhere."""
    from tests.test_docs import classes, masked

    root = tmp_path_factory.mktemp("xrays")
    classes(root / "train", ("NORMAL", "PNEUMONIA"), 2)
    masked(root / "test" / "NORMAL", root / "masks" / "test" / "NORMAL", 8)
    return root


def arguments(xrays: Path, out: Path, *more: str) -> list[str]:
    return [
        "--data", "lungs", "--data-root", str(xrays), "--out", str(out), "--student", "test_resnet",
        "--device", "cpu", "--counts", "3", "--seeds", "0", *more,
    ]  # fmt: skip


@pytest.mark.slow
def test_the_comparison_runs(xrays, tiny_teacher, tmp_path, monkeypatch):
    """The first method in its own process; the others in this one, for speed."""
    weights, out = tmp_path / "weights.safetensors", tmp_path / "out"
    state = create_student("test_resnet", seed=9).model.state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, weights)
    settings = [
        "--teacher", str(tiny_teacher), "--imagenet", str(weights), "--steps", "2",
        "--pixel-members", "2", "--pixel-epochs", "1", "--samples", "3", "--sampling-steps", "2",
    ]  # fmt: skip
    first = arguments(xrays, out, *settings, "--methods", "scratch")
    done = subprocess.run([sys.executable, FOLDER / "run.py", *first], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before = (out / "results.csv").read_text()
    asked = []

    def here(command: list[str], **_: object) -> SimpleNamespace:
        asked.append(command[-3])
        with monkeypatch.context() as context:
            context.setattr(sys, "argv", command[1:])
            run.main()
        return SimpleNamespace(returncode=0)

    methods = ["scratch", "imagenet", "ddpm-seg", "dataset-ddpm"]
    monkeypatch.setattr(run.subprocess, "run", here)
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments(xrays, out, *settings, "--methods", *methods)])
    run.main()
    assert asked == methods[1:]  # what is there is not computed again
    text = (out / "results.csv").read_text()
    assert text.startswith(before)
    rows = list(csv.DictReader(text.splitlines()))
    assert [(r["method"], r["count"], r["seed"], r["data"]) for r in rows] == [
        (m, "3", "0", "lungs") for m in methods
    ]
    for row in rows:
        assert 0 <= float(row["miou_published"]) <= float(row["miou"]) <= 1
        assert [part.split(":")[0] for part in row["iou"].split()] == ["0", "1"]
        assert float(row["peak_mb"]) >= float(row["data_mb"]) > 50
    assert {p.name for p in out.iterdir()} == {"results.csv", "settings.json"}
    run.main()
    assert asked == methods[1:]

    monkeypatch.setattr(sys, "argv", [*sys.argv, "--steps", "3"])
    refused(run.main, "steps 2, now 3", "another --out")
    assert (out / "results.csv").read_text() == text


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--methods", "scratch", "--counts", "5"), ("5 labelled images asked for", "to 4 can be drawn")),
        (("--methods", "ddpm-seg", "--teacher", "chest-xray-46"), ("chest-xray-64",)),
        (("--methods", "imagenet", "--imagenet", "nowhere.safetensors"), ("nowhere.safetensors",)),
        (("--methods", "scratch", "--steps", "0"), ("steps is 0",)),
        (("--methods", "ddpm-seg", "--pixel-batch", "1"), ("batch_size is 1",)),
    ],
    ids=["count", "teacher", "weights", "steps", "pixels"],
)
def test_a_wrong_comparison_makes_no_folder(xrays, tmp_path, monkeypatch, more, words):
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments(xrays, out, *more)])
    refused(run.main, *words)
    assert not out.exists()
