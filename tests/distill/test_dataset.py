"""Feature datasets: encoded, synthesized and both kinds come through one interface, repeat, and resume."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dreamteacher.data import batches as data_batches
from dreamteacher.data import image_set
from dreamteacher.distill import dataset, kinds
from dreamteacher.distill.config import PretrainConfig
from dreamteacher.distill.pretrain import pretrain
from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.run_folder import read_rows
from dreamteacher.spec import FeatureSpec
from dreamteacher.teachers.base import Teacher
from dreamteacher.teachers.registry import load_teacher

CPU = torch.device("cpu")


class Echo(Teacher):
    """Maps are the image, averaged: what a map belongs to can be seen. Samples are brighter than 1/2."""

    name, family, licence, size, multiple = "echo", "test", "-", (64, 64), 4
    modes = frozenset({"encode", "sample"})
    specs = (FeatureSpec("s4", 3, 4),)

    def __init__(self, modes=("encode", "sample")) -> None:
        super().__init__()
        self.modes = frozenset(modes)
        self.freeze()

    def encode(self, images, *, generator):
        return [torch.nn.functional.avg_pool2d(images, 4)]

    def sample(self, n, *, generator):
        images = 0.5 + torch.rand(n, 3, *self.size, generator=generator) / 2
        return images, self.encode(images, generator=generator)


def stream(kind: str, folder, first: int = 0):
    images = image_set.load_images(folder, (64, 64))
    common = {"seed": 3, "device": CPU, "precision": "float32"}
    if kind == "synthesized":
        return dataset.synthesized(Echo(), batch_size=6, first_step=first, last_step=4, **common)
    made = dataset.synthesized_part(6, 1 / 3) if kind == "both" else 0
    batches = data_batches.batches(
        images, batch_size=6 - made, seed=3, first_step=first, last_step=4, flip=True
    )
    if kind == "encoded":
        return dataset.encoded(Echo(), batches, **common)
    return dataset.both(Echo(), batches, made=made, **common)


@pytest.mark.parametrize("kind", ["encoded", "synthesized", "both"])
def test_maps_belong_to_the_images_and_a_resumed_stream_repeats(kind, image_folder):
    whole, rest = list(stream(kind, image_folder)), list(stream(kind, image_folder, first=2))
    assert [b.step for b in whole] == [0, 1, 2, 3]
    for batch in whole:
        assert batch.images.shape == (6, 3, 64, 64)
        torch.testing.assert_close(batch.maps[0], torch.nn.functional.avg_pool2d(batch.images, 4))
    for a, b in zip(whole[2:], rest, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.maps[0], b.maps[0])
    assert not torch.equal(whole[0].images, whole[1].images)


def test_a_batch_of_both_holds_its_fraction_of_samples(image_folder):
    for batch in stream("both", image_folder):
        grey = (batch.images[:, 0] == batch.images[:, 1]).flatten(1).all(1)  # the folder's images are grey
        assert grey.tolist() == [True] * 4 + [False] * 2
    real = [b.images[:4] for b in stream("both", image_folder)]
    alone = data_batches.batches(
        image_set.load_images(image_folder, (64, 64)),
        batch_size=4,
        seed=3,
        first_step=0,
        last_step=4,
        flip=True,
    )
    assert all(torch.equal(a, b.images) for a, b in zip(real, alone, strict=True))


@pytest.mark.parametrize(
    ("modes", "kind", "size", "words"),
    [
        (("encode",), "synthesized", (64, 64), "Use --dataset encoded."),
        (("sample",), "encoded", (64, 64), "Use --dataset synthesized."),
        (("sample",), "both", (64, 64), "encoded and synthesized.*\nUse --dataset synthesized"),
        (("sample",), "synthesized", (64, 96), "images of 64 x 64, not 64 x 96"),
        (("encode", "sample"), "both", (32, 32), "or use --dataset encoded"),
        (("encode",), "encoded", (62, 64), "multiples of 4"),
    ],
)
def test_what_a_teacher_cannot_serve_is_refused(modes, kind, size, words):
    with pytest.raises(UserError, match=words):
        kinds.check_mode(Echo(modes), kind, size)
    kinds.check_mode(Echo(("encode", "sample")), kind, (64, 64))


def test_a_share_that_leaves_nothing_is_refused():
    assert dataset.synthesized_part(8, 0.25) == 2
    for fraction in (0.0, 0.01, 0.99, 1.0):
        with pytest.raises(UserError, match="--synthesized-fraction"):
            dataset.synthesized_part(8, fraction)


@pytest.mark.slow
def test_a_student_learns_from_both(image_folder, tiny_teacher, tmp_path, monkeypatch):
    monkeypatch.setitem(type(load_teacher(str(tiny_teacher))).__init__.__kwdefaults__, "sampling_steps", 2)
    config = PretrainConfig(
        images=image_folder, out=tmp_path / "run", teacher=str(tiny_teacher), student="test_resnet", width=8,
        batch_size=8, epochs=4, warmup_epochs=1, lr=2e-3, device="cpu", precision="float32", log_every=1,
        dataset="both", synthesized_fraction=0.25, probe_every=0,
    )  # fmt: skip
    pretrain(config)
    rows = read_rows(config.out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[-1]["loss"] < rows[0]["loss"]
    with pytest.raises(UserError, match="--synthesized-fraction 0 of a batch of 8"):
        pretrain(dataclasses.replace(config, synthesized_fraction=0.0, out=tmp_path / "none"))
    assert not (tmp_path / "none").exists()
