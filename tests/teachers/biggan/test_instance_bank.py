"""The instance bank: ResNet-50 features from anybody's file equal torchvision's, normalised, in a fixed order."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import ResNet, resnet50
from torchvision.transforms.v2 import functional as T

from dreamteacher.data.image_set import load_images
from dreamteacher.runtime.config import from_json, to_json
from dreamteacher.teachers.biggan.instance_bank import (
    bank_images,
    bank_labels,
    build_bank,
    chosen,
    load_embedder,
)
from dreamteacher.teachers.biggan.teacher import BigGanSpec
from dreamteacher.teachers.registry import load_teacher, save_teacher
from dreamteacher.testing import check_teacher
from tests.builders.biggan import ALL_LEVELS, CARD, random_weights
from tests.builders.pictures import fill, refused


class Means(nn.Module):
    """A cheap embedder: mean colour of the four quarters, 12 numbers. Counts how it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        self.seen.append(x)
        return F.adaptive_avg_pool2d(x, 2).flatten(1)


@pytest.fixture(scope="module")
def reference() -> ResNet:
    """torchvision's ResNet-50 with random weights, statistics that are not trivial, and no classifier."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = resnet50()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    model.fc = nn.Identity()
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def swav(reference: ResNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its weights as SwAV publishes them."""
    state = {f"module.{k}": v for k, v in reference.state_dict().items()}
    state["module.projection_head.0.weight"] = torch.zeros(8, 2048)
    state["module.projection_head.1.num_batches_tracked"] = torch.tensor(3)
    state["module.prototypes.weight"] = torch.zeros(3, 8)
    path = tmp_path_factory.mktemp("swav") / "swav_800ep_pretrain.pth.tar"
    torch.save(state, path)
    return path


def test_bank_equals_torchvision(reference, swav, tmp_path):
    paths = fill(tmp_path / "images", 3)
    Image.open(paths[1]).resize((300, 260)).save(paths[1])  # an oblong one: its centre is taken
    state = torch.get_rng_state()
    bank = build_bank(tmp_path / "images", swav, batch_size=2)
    assert torch.equal(state, torch.get_rng_state())
    assert bank.shape == (3, 2048)
    assert bank.dtype == torch.float32
    assert (bank.norm(dim=1) - 1).abs().max() < 1e-6
    pixels = load_images(tmp_path / "images", (256, 256)).get(torch.arange(3))
    x = T.normalize(
        T.center_crop(pixels, [224, 224]).float() / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    )
    expected = F.normalize(reference(x), dim=1)
    assert (bank - expected).abs().max() < 1e-4
    assert (bank[0] - bank[1]).abs().max() > 1e-3  # and the images are told apart


def test_the_crop_is_the_usual_one(tmp_path):
    """Short side 256, centre 224, as torchvision's transforms do it, to the rounding of a grey value."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(1, 3, 8, 12, generator=generator)
    smooth = F.interpolate(noise, (450, 675), mode="bicubic").clamp(0, 1)  # 2:3, so that 256 x 384 is exact
    (tmp_path / "images").mkdir()
    T.to_pil_image(smooth[0]).save(tmp_path / "images" / "a.png")
    embedder = Means()
    build_bank(tmp_path / "images", embedder)
    image = Image.open(tmp_path / "images" / "a.png")
    usual = T.pil_to_tensor(T.center_crop(T.resize(image, [256]), [224, 224])).float() / 255
    usual = T.normalize(usual, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert embedder.seen[0].shape == (1, 3, 224, 224)
    assert (embedder.seen[0][0] - usual).abs().max() < 0.03


def test_weights_of_every_kind(reference, swav, tmp_path):
    own = {k: v for k, v in reference.state_dict().items() if not k.endswith("num_batches_tracked")}
    classifier = {"fc.weight": torch.zeros(10, 2048), "fc.bias": torch.zeros(10)}
    save_file({**own, **classifier}, tmp_path / "resnet50.safetensors")
    torch.save(
        {"state_dict": {f"encoder.{k}": v for k, v in own.items()} | {"queue": torch.zeros(2)}},
        tmp_path / "moco.pth",
    )
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = reference(x)
    for path in (swav, tmp_path / "resnet50.safetensors", tmp_path / "moco.pth"):
        embedder = load_embedder(path)
        assert not embedder.training
        assert (embedder(x) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_files_that_are_no_resnet50(reference, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(timm.create_model("resnet18").state_dict(), path)
    refused(lambda: load_embedder(path), "no ResNet-50", "torchvision's names")
    state = reference.state_dict()
    torch.save({f"{p}.{k}": v for k, v in state.items() if "layer4" in k for p in "qk"}, path)
    refused(lambda: load_embedder(path), "no ResNet-50", "2 tensors")
    torch.save({k: v for k, v in state.items() if "layer3" not in k}, path)
    refused(lambda: load_embedder(path), "missing", "layer3")
    path.write_bytes(b"PK")
    refused(lambda: load_embedder(path), "cannot be read")
    refused(lambda: load_embedder(tmp_path / "gone.pth"), "No weight file")
    refused(lambda: build_bank(tmp_path / "gone", Means()), "does not exist")


def test_limit_and_order(tmp_path):
    for name in ("cat", "dog"):
        fill(tmp_path / name, 5, start=10 if name == "dog" else 0)
    images = bank_images(tmp_path)
    whole = build_bank(images, Means(), batch_size=3)
    part = build_bank(images, Means(), limit=4)
    assert whole.shape == (10, 12)
    assert torch.equal(part, whole[[0, 2, 5, 7]])
    assert chosen(3, 10).tolist() == [0, 1, 2]
    assert bank_labels(images, 2).tolist() == [0] * 5 + [1] * 5
    assert bank_labels(images, 2, limit=4).tolist() == [0, 0, 1, 1]
    refused(lambda: bank_labels(images, 1000), "1000 classes", "2 class folders")
    refused(lambda: build_bank(images, Means(), limit=0), "limit of at least 1")


def test_sizes_and_embedders(tmp_path):
    fill(tmp_path / "images", 2)
    small = load_images(tmp_path / "images", (224, 224))
    embedder = Means()
    build_bank(small, embedder)
    assert embedder.training  # only put into evaluation mode for the time being
    assert embedder.seen[0].shape == (2, 3, 224, 224)
    refused(lambda: build_bank(load_images(tmp_path / "images", (64, 64)), Means()), "64 x 64")
    refused(lambda: build_bank(small, nn.Identity()), "(2, 3, 224, 224)", "2 x D")
    broken = nn.Sequential(nn.Flatten(), nn.Hardtanh(float("nan"), float("inf")))
    refused(lambda: build_bank(small, broken), "NaN")


def test_a_damaged_image_gives_way(tmp_path):
    paths = fill(tmp_path / "images", 4)
    whole = build_bank(tmp_path / "images", Means())
    paths[1].write_bytes(paths[1].read_bytes()[:200])  # its header is good, its pixels are not
    bank = build_bank(tmp_path / "images", Means())
    assert torch.equal(bank, whole[[0, 2, 2, 3]])


def test_a_teacher_with_a_bank_of_ones_own_images(tmp_path):
    for name in ("a", "b", "c"):
        fill(tmp_path / "images" / name, 2, start=ord(name))
    images = bank_images(tmp_path / "images")
    spec = from_json(BigGanSpec, {**to_json(ALL_LEVELS), "features": 12, "classes": 3, "class_width": 5})
    weights = {
        **random_weights(spec),
        "bank": build_bank(images, Means()),
        "bank_labels": bank_labels(images, spec.classes),
    }
    (tmp_path / "teacher").mkdir()
    save_teacher(tmp_path / "teacher", weights, spec, CARD, half=False)
    check_teacher(load_teacher(str(tmp_path / "teacher")))
