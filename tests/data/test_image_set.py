"""Folders with damaged files, labels, batches from seed and step alone, damage that only streaming meets."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dreamteacher.data import batches as data_batches
from dreamteacher.data import image_set, seeds
from dreamteacher.data.batches import batches
from dreamteacher.data.image_set import ImageSet, load_images
from dreamteacher.data.images import BadImage
from dreamteacher.runtime.errors import UserError
from tests.builders.pictures import DAMAGE, cut, fill, noise, pixels, refused, text

# --- damaged files in a folder ------------------------------------------------------------------------------


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, locked = fill(tmp_path, 2)
    opened = Path.open

    def deny(path: Path, *args: Any, **options: Any) -> Any:
        if path == locked:
            raise PermissionError(13, "Permission denied")
        return opened(path, *args, **options)

    monkeypatch.setattr(Path, "open", deny)
    images = load_images(tmp_path, (8, 8))
    assert images.paths == [good]
    assert images.bad == (BadImage(locked, "no permission to read it"),)


@pytest.fixture(scope="module")
def wrecked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path], list[Path]]:
    """200 good images and 30 damaged ones, mixed."""
    folder = tmp_path_factory.mktemp("wrecked")
    good = fill(folder, 200)
    bad = []
    for i in range(30):
        damage, suffix, _ = DAMAGE[i % len(DAMAGE)]
        bad.append(folder / f"{7 * i:04d}-bad{suffix}")
        damage(bad[-1])
    return folder, good, bad


def test_200_good_and_30_damaged(wrecked: tuple[Path, list[Path], list[Path]]) -> None:
    folder, good, bad = wrecked
    images = load_images(folder, (24, 24))
    assert images.paths == good
    assert len(images) == 200
    assert sorted(b.path for b in images.bad) == sorted(bad)
    assert images.cache is not None
    for i in (0, 3, 117, 199):  # every image sits where its path says
        assert torch.equal(images.cache[i], pixels(noise(i)))


@pytest.mark.parametrize("cache_gb", [2.0, 0.0])
def test_strict_refuses(cache_gb: float, wrecked: tuple[Path, list[Path], list[Path]]) -> None:
    folder = wrecked[0]
    error = refused(
        lambda: load_images(folder, (24, 24), strict=True, cache_gb=cache_gb),
        "30 of 230", "0000-bad.png (empty file)", "0014-bad.png (truncated)", "(+27 more)",
    )  # fmt: skip
    assert "0021-bad" not in error


def test_strict_accepts_a_sound_folder(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    assert len(load_images(tmp_path, (8, 8), strict=True)) == 3


@pytest.mark.parametrize("cache_gb", [2.0, 0.0])
def test_all_damaged(cache_gb: float, tmp_path: Path) -> None:
    for i in range(4):
        text(tmp_path / f"{i}.jpg")
    refused(lambda: load_images(tmp_path, (8, 8), cache_gb=cache_gb), "4 of 4", "0.jpg", "(+1 more)")


def test_an_empty_size_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    refused(lambda: load_images(tmp_path, (0, 8)), "0 x 8")


def test_the_cache_is_used_when_it_fits(tmp_path: Path) -> None:
    fill(tmp_path, 4)
    exact = 4 * 3 * 10 * 10 / 1e9
    assert load_images(tmp_path, (10, 10), cache_gb=exact).cache is not None
    assert load_images(tmp_path, (10, 10), cache_gb=exact - 1e-9).cache is None


# --- labels -------------------------------------------------------------------------------------------------


def test_labels_are_the_first_folders(tmp_path: Path) -> None:
    fill(tmp_path / "dog" / "deep", 2)
    fill(tmp_path / "cat", 3)
    images = load_images(tmp_path, (8, 8))
    assert images.classes == ("cat", "dog")
    assert images.labels is not None
    assert images.labels.tolist() == [0, 0, 0, 1, 1]
    assert images.labels.dtype == torch.int64
    assert load_images(tmp_path / "cat", (8, 8)).labels is None  # no folders
    assert load_images(tmp_path / "dog", (8, 8)).labels is None  # one folder
    fill(tmp_path, 1)
    assert load_images(tmp_path, (8, 8)).classes == ()  # one image lies in no folder


# --- batches ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageSet, ImageSet]:
    """The same 22 images: cached, streamed."""
    folder = tmp_path_factory.mktemp("sets")
    fill(folder / "a", 12)
    fill(folder / "b", 10, ".jpg", start=12)
    return load_images(folder, (16, 16)), load_images(folder, (16, 16), cache_gb=0)


def run(images: ImageSet, first: int = 0, last: int = 12, **options: Any) -> list[data_batches.Batch]:
    options = {"batch_size": 5, "seed": 3, "flip": True} | options
    return list(batches(images, first_step=first, last_step=last, **options))


def same(a: list[data_batches.Batch], b: list[data_batches.Batch]) -> bool:
    return len(a) == len(b) and all(
        x.step == y.step and torch.equal(x.images, y.images) and torch.equal(x.index, y.index)
        for x, y in zip(a, b, strict=True)
    )


def test_batches_are_floats_of_the_images(sets: tuple[ImageSet, ImageSet]) -> None:
    cached, _ = sets
    assert cached.cache is not None
    for batch in run(cached, flip=False):
        assert batch.images.dtype == torch.float32
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(batch.images, cached.cache[batch.index].float() / 255)
    assert [b.step for b in run(cached, 4, 9)] == [4, 5, 6, 7, 8]
    assert run(cached, 4, 4) == []


@given(first=st.integers(0, 12), seed=st.integers(0, 3))
@settings(max_examples=15, deadline=None)
def test_step_k_is_the_same_from_any_start(sets: tuple[ImageSet, ImageSet], first: int, seed: int) -> None:
    whole = run(sets[0], seed=seed)
    assert same(run(sets[0], first, seed=seed), whole[first:])
    assert same(run(sets[1], first, seed=seed), whole[first:])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers: int, sets: tuple[ImageSet, ImageSet]) -> None:
    cached, streamed = sets
    assert same(run(streamed, 3, workers=workers), run(cached, 3))
    assert torch.equal(streamed.get(torch.tensor([20, 3])), cached.get(torch.tensor([20, 3])))


def test_seeds_and_epochs_differ(sets: tuple[ImageSet, ImageSet]) -> None:
    assert not torch.equal(run(sets[0], seed=0)[0].index, run(sets[0], seed=1)[0].index)
    epochs = run(sets[0], flip=False)
    assert not torch.equal(epochs[0].index, epochs[4].index)


@given(count=st.integers(1, 40), batch_size=st.integers(1, 40), seed=st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_an_epoch_shows_each_image_once(count: int, batch_size: int, seed: int) -> None:
    batch_size = min(batch_size, count)
    steps = count // batch_size
    for epoch in range(2):
        index = torch.cat([
            data_batches.batch_indices(count, batch_size=batch_size, seed=seed, step=s)
            for s in range(epoch * steps, (epoch + 1) * steps)
        ])  # fmt: skip
        assert len(index) == len(index.unique()) == steps * batch_size
        assert index.min() >= 0
        assert index.max() < count


def test_half_of_the_images_are_mirrored() -> None:
    ramp = torch.arange(8, dtype=torch.uint8).expand(40, 3, 8, 8).contiguous()
    images = ImageSet(
        folder=Path(), paths=[Path(str(i)) for i in range(40)], size=(8, 8), labels=None, classes=(),
        cache=ramp, bad=(),
    )  # fmt: skip
    shown = torch.cat([b.images for b in run(images, 0, 100, batch_size=20)]) * 255
    mirrored = (shown == ramp[:1].flip(-1)).flatten(1).all(1)
    straight = (shown == ramp[:1]).flatten(1).all(1)
    assert (mirrored ^ straight).all()
    assert 0.46 < mirrored.float().mean() < 0.54  # 2000 draws: 3.6 standard deviations
    assert not torch.equal(mirrored[:20], mirrored[20:40])
    assert all((b.images[..., 0] == 0).all() for b in run(images, flip=False))


def test_a_batch_that_does_not_fit_is_refused_at_once(sets: tuple[ImageSet, ImageSet]) -> None:
    for size in (23, 0):
        draw = partial(batches, sets[0], seed=0, first_step=0, last_step=1, flip=False)
        refused(partial(draw, batch_size=size), str(size), "22")


@pytest.mark.parametrize("workers", [0, 1])
def test_no_global_random_state_is_touched(workers: int, sets: tuple[ImageSet, ImageSet]) -> None:
    before, python = torch.get_rng_state(), random.getstate()
    for images in sets:
        run(images, 0, 3, workers=workers)
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python


def test_step_generators_are_reproducible_and_independent() -> None:
    keys = [(seed, step, s) for seed in range(3) for step in range(30) for s in ("", "flip", "order")]
    draws = {k: torch.rand(4, generator=seeds.step_generator(*k)) for k in keys}
    assert len({tuple(d.tolist()) for d in draws.values()}) == len(keys)
    assert torch.equal(draws[1, 7, "flip"], torch.rand(4, generator=seeds.step_generator(1, 7, "flip")))
    many = torch.stack([torch.rand(500, generator=seeds.step_generator(0, s)) for s in range(20)])
    assert (torch.corrcoef(many) - torch.eye(20)).abs().max() < 0.2


# --- damage that only streaming finds -----------------------------------------------------------------------


@pytest.fixture
def cut_stream(tmp_path: Path) -> tuple[ImageSet, list[Path]]:
    """Two classes of six; bodies of three files are damaged, one of them the last of its class."""
    fill(tmp_path / "a", 6)
    fill(tmp_path / "b", 6, start=6)
    bad = [tmp_path / "a" / "0002.png", tmp_path / "a" / "0005.png", tmp_path / "b" / "0006.png"]
    for path in bad:
        cut(path, 0.8)
    images = load_images(tmp_path, (24, 24), cache_gb=0)
    assert len(images) == 12
    assert images.bad == ()  # headers are fine
    return images, bad


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_met_while_streaming(workers: int, cut_stream: tuple[ImageSet, list[Path]]) -> None:
    images, bad = cut_stream
    replaced = {2: 3, 5: 0, 6: 7}  # the next readable one of the same class
    plain = [data_batches.batch_indices(12, batch_size=4, seed=0, step=s) for s in range(6)]
    found = run(images, 0, 6, batch_size=4, seed=0, flip=False, workers=workers)
    for batch, index in zip(found, plain, strict=True):
        assert batch.index.tolist() == [replaced.get(i, i) for i in index.tolist()]
        for shown, i in zip(batch.images, batch.index.tolist(), strict=True):
            assert torch.equal(shown, pixels(noise(i)).float() / 255)
    assert sorted(b.path for b in images.bad) == bad  # each once, in two epochs
    assert all(b.reason == "truncated" for b in images.bad)
    assert same(run(images, 2, 6, batch_size=4, seed=0, flip=False, workers=workers), found[2:])


def test_damage_met_by_get(cut_stream: tuple[ImageSet, list[Path]]) -> None:
    images, bad = cut_stream
    found = images.get(torch.tensor([5, 1]))
    assert torch.equal(found, torch.stack([pixels(noise(0)), pixels(noise(1))]))
    assert images.bad == (BadImage(bad[1], "truncated"),)
    with pytest.raises(IndexError):
        images.get(torch.tensor([12]))
    with pytest.raises(UserError):
        load_images(images.folder, (24, 24), cache_gb=0, strict=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_damaged_only_image_of_its_class(workers: int, tmp_path: Path) -> None:
    """Training goes on with any other, under that one's label; where labels are already known, it is refused."""
    fill(tmp_path / "a", 3)
    (alone,) = fill(tmp_path / "b", 1, start=3)
    cut(alone, 0.8)
    images = load_images(tmp_path, (24, 24), cache_gb=0)
    found = run(images, 0, 2, batch_size=2, seed=0, flip=False, workers=workers)
    shown = torch.cat([batch.index for batch in found])
    assert sorted(shown.tolist()) == [0, 0, 1, 2]
    for image, i in zip(torch.cat([batch.images for batch in found]), shown.tolist(), strict=True):
        assert torch.equal(image, pixels(noise(i)).float() / 255)
    assert images.bad == (BadImage(alone, "truncated"),)
    said = refused(lambda: images.get(torch.tensor([3])), str(alone), "(truncated)", "Remove or replace it")
    assert "the disk" not in said


@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_that_goes_away(workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = fill(tmp_path, 4)
    images = load_images(tmp_path, (8, 8), cache_gb=0)
    for path in paths:
        path.unlink()
    said = refused(lambda: run(images, batch_size=2, workers=workers), "cannot be read", "missing file")
    assert "the disk" not in said
    monkeypatch.setattr(image_set, "_MOST_TRIED", 4)
    refused(
        lambda: run(images, batch_size=2, workers=workers), "3 images before it", "the disk is still there"
    )
