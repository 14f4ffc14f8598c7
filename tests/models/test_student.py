"""Students: levels, normalisation, weights from everywhere, and errors that say what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dreamteacher.models.student import Student, create_student, read_weights, student_names
from dreamteacher.runtime.errors import UserError

FAMILIES = {
    "resnet18": (64, 128, 256, 512),
    "convnext_atto": (40, 80, 160, 320),
    "efficientnet_b0": (24, 40, 112, 320),
    "regnety_002": (24, 56, 152, 368),
    "mobilenetv3_small_050": (8, 16, 24, 288),
    "mobilevitv2_050": (64, 128, 192, 256),
}


def images(batch: int = 2, size: tuple[int, int] = (64, 96), seed: int = 0) -> Tensor:
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def contiguous(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.contiguous() for k, v in model.state_dict().items()}


def lines(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert len(text.splitlines()) <= 3
    return text


@pytest.mark.parametrize("name", FAMILIES)
def test_levels(name: str) -> None:
    student = create_student(name)
    assert student.training
    assert [(s.name, s.stride) for s in student.specs] == [("s4", 4), ("s8", 8), ("s16", 16), ("s32", 32)]
    assert tuple(s.channels for s in student.specs) == FAMILIES[name]
    student.eval()
    batch = images(size=(64, 128))
    with torch.no_grad():
        maps, pooled = student(batch), student.pooled(batch)
    assert [tuple(m.shape) for m in maps] == [s.shape(2, (64, 128)) for s in student.specs]
    assert pooled.shape == (2, student.features_channels)
    torch.testing.assert_close(pooled, maps[-1].mean((2, 3)))


def test_the_last_map_and_the_normalisation_are_timms() -> None:
    student = create_student("resnet18").eval()
    reference = timm.create_model("resnet18", num_classes=0).eval()
    reference.load_state_dict(student.model.state_dict(), strict=True)
    x = images()
    mean, std = (torch.tensor(reference.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        features = reference.forward_features((x - mean) / std)
        torch.testing.assert_close(student(x)[-1], features, rtol=1e-4, atol=1e-5)
    assert set(student.state_dict()) == {f"model.{k}" for k in reference.state_dict()}


def test_a_model_without_stride_4_keeps_the_others() -> None:
    assert [s.stride for s in create_student("csatv2").specs] == [8, 16, 32]


def test_maps_are_channels_last() -> None:
    student = create_student("resnet18")
    assert student.model.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in student(images()))


def test_random_weights_follow_the_seed_alone() -> None:
    state = torch.random.get_rng_state()
    one, again, other = (create_student("convnext_atto", seed=s).model.state_dict() for s in (3, 3, 4))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(one[k], again[k]) for k in one)
    assert not torch.equal(one["stem.0.weight"], other["stem.0.weight"])


def test_training_draws_no_random_numbers() -> None:
    student = create_student("fasternet_t0")  # timm gives it stochastic depth and dropout
    state = torch.random.get_rng_state()
    student(images())
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("suffix", "wrap"),
    [(".safetensors", None), (".pth", None), (".pth", "state_dict"), (".pth", "model"), (".pth", "module.")],
)
def test_weights_from_a_file(tmp_path: Path, suffix: str, wrap: str | None) -> None:
    source = create_student("resnet18", seed=5)
    state = contiguous(source.model)
    state |= {"fc.weight": torch.zeros(10, 512), "fc.bias": torch.zeros(10)}
    if wrap == "module.":
        state = {f"module.{k}": v for k, v in state.items()}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({wrap: state, "epoch": 3} if wrap in ("state_dict", "model") else state, path)
    else:
        save_file(state, path)
    loaded = create_student("resnet18", init=str(path)).model.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in source.model.state_dict().items())


def test_torchvision_names_and_half_precision(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.models.resnet18(num_classes=7).eval()
    # Published files are older than BatchNorm's step counters.
    state = {k: v.half() for k, v in theirs.state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "tv.safetensors")
    student = create_student("resnet18", init=str(tmp_path / "tv.safetensors")).eval()
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    theirs.load_state_dict(state, strict=False)
    theirs.fc = nn.Identity()
    x = images()
    with torch.no_grad():
        expected = theirs((x - student.mean) / student.std)
        torch.testing.assert_close(student.pooled(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("file", ["backbone.safetensors", "model.safetensors"])
def test_weights_from_a_folder(tmp_path: Path, file: str) -> None:
    source = create_student("convnext_atto", seed=5)
    save_file(contiguous(source.model), tmp_path / file, {"student": "convnext_atto"})
    loaded = create_student("convnext_atto", init=str(tmp_path)).model.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in source.model.state_dict().items())


def test_a_backbone_of_another_student_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "b.safetensors", {"student": "resnet50"})
    with pytest.raises(UserError) as error:
        create_student("resnet18", init=str(tmp_path / "b.safetensors"))
    assert "holds a resnet50, not a resnet18" in lines(error)


def test_foreign_weights_are_counted_and_named(tmp_path: Path) -> None:
    state = contiguous(create_student("resnet18").model)
    state["features.0.weight"] = state.pop("conv1.weight")
    state["bn1.weight"] = torch.ones(3)
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(UserError) as error:
        create_student("resnet18", init=str(tmp_path / "x.safetensors"))
    text = lines(error)
    for part in (
        "1 missing (conv1.weight)",
        "1 unexpected (features.0.weight)",
        "1 of another shape (bn1.weight)",
    ):
        assert part in text


def test_broken_weights_are_refused(tmp_path: Path) -> None:
    state = contiguous(create_student("convnext_atto").model)
    state["stem.0.weight"] = torch.full_like(state["stem.0.weight"], torch.nan)
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(UserError) as error:
        create_student("convnext_atto", init=str(tmp_path / "x.safetensors"))
    assert "NaN or infinity in 1 tensors (stem.0.weight)" in lines(error)


class Payload:
    """Unpickling it would create a file: the reader must not."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.target,)


def test_pickles_run_no_code_and_damaged_files_are_named(tmp_path: Path) -> None:
    torch.save({"state_dict": Payload(tmp_path / "ran")}, tmp_path / "bad.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "bad.pth").read_bytes()[:100])
    (tmp_path / "cut.safetensors").write_bytes(b"not safetensors")
    for name, part in (
        ("bad.pth", "cannot be read as plain weights"),
        ("cut.pth", "cannot be read as plain weights"),
        ("empty.pth", "holds no state dict"),
        ("cut.safetensors", "not a readable safetensors file"),
        ("absent.pth", "No weight file"),
    ):
        with pytest.raises(UserError) as error:
            read_weights(tmp_path / name)
        assert part in lines(error)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "init", "parts"),
    [
        ("resnet81", "random", ("no model 'resnet81'", "Did you mean 'resnet18'?", "convnext*")),
        ("xcit_nano_12_p8_224", "random", ("strides 8", "or is a plain ViT", "convnext*")),
        ("efficientvit_m0", "random", ("strides 16, 32, 64", "convnext*")),
        ("hiera_tiny_224", "random", ("takes no 64x128 image", "convnext*")),
        ("resnet18.no_such_tag", "random", ("Invalid pretrained tag", "Leave out the tag")),
        ("resnet18", "imagent", ("Did you mean 'imagenet'?",)),
        ("resnet18", "runs/none/backbone.safetensors", ("no such file or folder",)),
        ("test_resnet", "imagenet", ("cannot be fetched", "huggingface.co/timm/test_resnet", "as init")),
        ("resnet26t", "imagenet", ("cannot be fetched", "as init")),
        ("resnet50_mlp", "imagenet", ("no pretrained weights for 'resnet50_mlp'",)),
    ],
)
def test_errors(name: str, init: str, parts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("timm.models._builder.load_pretrained", offline)
    with pytest.raises(UserError) as error:
        create_student(name, init=init)
    text = lines(error)
    for part in parts:
        assert part in text


def test_an_unfinished_run_and_an_empty_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        create_student("resnet18", init=str(tmp_path))
    assert "holds neither" in lines(error)
    (tmp_path / "checkpoint-10.safetensors").touch()
    with pytest.raises(UserError) as error:
        create_student("resnet18", init=str(tmp_path))
    assert "has not finished" in lines(error)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError) as error:
        create_student("resnet18", init=str(tmp_path / "notes.txt"))
    assert "no weight file" in lines(error)


def test_imagenet_weights_come_from_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(model: nn.Module, **kwargs: object) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.25)

    monkeypatch.setattr("timm.models._builder.load_pretrained", fill)
    assert all((p == 0.25).all() for p in create_student("resnet18", init="imagenet").parameters())


def test_a_model_of_your_own_can_be_a_student() -> None:
    student = Student("mine", timm.create_model("resnet10t", num_classes=0))
    assert [s.channels for s in student.specs] == [64, 128, 256, 512]


def test_names() -> None:
    names = student_names()
    assert {"resnet18", "resnet50", "convnext_tiny", "efficientnet_b0", "regnety_004"} <= set(names)
    assert names == sorted(names)
    assert not any(name.startswith(("hiera", "xcit", "test_")) for name in names)


def test_a_run_and_an_export_say_which_network_they_are(tmp_path):
    from safetensors.torch import save_file

    from dreamteacher.models.student import is_ours, recorded_student

    student = create_student("test_resnet")
    state = {k: v.contiguous() for k, v in student.model.state_dict().items()}
    ours, foreign = tmp_path / "backbone.safetensors", tmp_path / "foreign.safetensors"
    save_file(state, ours, {"format": "dreamteacher-backbone", "student": "test_resnet"})
    save_file(state, foreign)
    assert recorded_student(str(tmp_path)) == recorded_student(str(ours)) == "test_resnet"
    assert is_ours(ours)
    assert not is_ours(foreign)
    for init in ("random", "imagenet", str(foreign)):
        with pytest.raises(UserError, match="--student"):
            recorded_student(init)
