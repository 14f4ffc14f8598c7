"""Plain ViTs as students: one map of tokens, four levels by the simple pyramid, native timm weights to take away."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from dreamteacher.distill.config import PretrainConfig
from dreamteacher.distill.pretrain import pretrain
from dreamteacher.downstream.classification.finetune_full import TimmClassifier, layer_groups, recipe_of
from dreamteacher.downstream.config import EvaluateConfig
from dreamteacher.downstream.detection import train
from dreamteacher.downstream.detection.config import DetectConfig
from dreamteacher.downstream.detection.model import build_detector
from dreamteacher.downstream.evaluate import evaluate
from dreamteacher.downstream.segmentation.few_masks import SegmentationHead
from dreamteacher.downstream.segmentation.semantic import ReadoutHead
from dreamteacher.exports.config import ExportConfig
from dreamteacher.exports.timm import load_snippet
from dreamteacher.exports.write import write_export
from dreamteacher.models.distilled import load_distilled, neck_weights
from dreamteacher.models.plain_vit import SWIN_MODULES, size_settings
from dreamteacher.models.pyramid import SimplePyramid
from dreamteacher.models.regressor import FeatureRegressor, Neck
from dreamteacher.models.student import Student, create_student, student_names
from dreamteacher.runtime import checkpoint, optim
from dreamteacher.runtime.errors import UserError
from dreamteacher.spec import FeatureSpec
from dreamteacher.testing import check_student

# timm's name: (stride of a token, pixels of the image per side of the map's images, prefix tokens, pooling).
NETWORKS = {
    "vit_tiny_patch16_224": (16, 16, 1, "token"),
    "vit_small_patch8_224": (8, 8, 1, "token"),
    "vit_small_patch14_reg4_dinov2": (16, 14, 5, "token"),
    "vit_little_patch16_reg1_gap_256": (16, 16, 1, "avg"),
    "deit_tiny_distilled_patch16_224": (16, 16, 2, "token"),
    "eva02_tiny_patch14_224": (16, 14, 1, "avg"),
    "vit_small_patch16_dinov3": (16, 16, 5, "avg"),
    "vit_base_patch16_siglip_224": (16, 16, 0, "map"),
}


def small(name: str, **settings: object) -> Student:
    """A shallow, narrow network of this kind, as its own timm model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        extra: dict[str, object] = {"embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 0}
        if "siglip" in name or "eva" in name:
            extra["mlp_ratio"] = 2.0
        return Student(name, timm.create_model(name, **size_settings(name), **extra, **settings)).eval()


def images(size: tuple[int, int] = (64, 96), batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", list(NETWORKS))
@torch.no_grad()
def test_the_map_is_timms_tokens(name: str) -> None:
    """Bitwise: forward_features of the same network, put into a map one by one."""
    stride, patch, prefix, pool = NETWORKS[name]
    student = small(name)
    assert student.specs == (FeatureSpec(f"s{stride}", 48, stride),)
    assert student.features_channels == 48
    assert student.model.num_prefix_tokens == prefix
    assert student.model.global_pool == pool
    x = images()
    (got,) = student(x)
    rows, columns = 64 // stride, 96 // stride
    normalised = (x - student.mean) / student.std
    if patch != stride:
        wanted = (rows * patch, columns * patch)
        normalised = F.interpolate(normalised, size=wanted, mode="bilinear", antialias=True)
    tokens = student.model.forward_features(normalised)
    assert tokens.shape == (2, prefix + rows * columns, 48)
    expected = torch.empty(2, 48, rows, columns)
    for i in range(rows):
        for j in range(columns):
            expected[:, :, i, j] = tokens[:, prefix + i * columns + j]
    assert torch.equal(got, expected)
    pooled = student.pooled(x)
    assert pooled.shape == (2, 48)
    if pool == "token" and "distilled" not in name:
        assert torch.equal(pooled, tokens[:, 0])
    elif pool == "avg":
        torch.testing.assert_close(pooled, student.model.fc_norm(expected.mean((2, 3))))
    with torch.enable_grad():
        check_student(student)


@torch.no_grad()
def test_a_hybrid_has_one_map_of_stride_32() -> None:
    student = create_student("vit_tiny_r_s16_p8_224").eval()
    assert [(s.name, s.channels) for s in student.specs] == [("s32", 192)]
    assert student(images())[0].shape == (2, 192, 2, 3)


@torch.no_grad()
def test_any_size_is_taken_without_cutting_a_border() -> None:
    student = create_student("test_vit").eval()
    x = images((70, 100))
    larger = F.interpolate((x - student.mean) / student.std, size=(80, 112), mode="bilinear", antialias=True)
    tokens = student.model.forward_features(larger)[:, 1:]
    assert torch.equal(student(x)[0].flatten(2).mT, tokens)
    assert [m.shape[-2:] for m in SimplePyramid(student.specs)(student(x))] == [
        (20, 28), (10, 14), (5, 7), (3, 4)
    ]  # fmt: skip


def deconvolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """2x2, stride 2, by loops: each position of the input gives four of the output."""
    n, _, height, width = x.shape
    out = torch.empty(n, weight.shape[1], 2 * height, 2 * width, dtype=x.dtype)
    for i in range(height):
        for j in range(width):
            for a in range(2):
                for b in range(2):
                    out[:, :, 2 * i + a, 2 * j + b] = x[:, :, i, j] @ weight[:, :, a, b] + bias
    return out


@torch.no_grad()
def test_the_pyramid_is_vitdets() -> None:
    """Against loops in float64, with a LayerNorm and a GELU written out."""
    pyramid = SimplePyramid([FeatureSpec("s16", 8, 16)]).double()
    norm = pyramid.branches[0][1]
    norm.weight.copy_(torch.linspace(0.5, 2, 4))
    norm.bias.copy_(torch.linspace(-1, 1, 4))
    x = torch.randn(2, 8, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, _, _, second = pyramid.branches[0]
    middle = deconvolution(x, first.weight, first.bias)
    middle = (middle - middle.mean(1, keepdim=True)) / (
        middle.var(1, keepdim=True, correction=0) + 1e-6
    ).sqrt()
    middle = middle * norm.weight[:, None, None] + norm.bias[:, None, None]
    middle = middle * 0.5 * (1 + torch.erf(middle / math.sqrt(2)))
    (only,) = pyramid.branches[1]
    pooled = torch.stack(
        [x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].amax((2, 3)) for i in range(2) for j in range(2)], -1
    )
    expected = [
        deconvolution(middle, second.weight, second.bias),
        deconvolution(x, only.weight, only.bias),
        x,
        pooled.view(2, 8, 2, 2),
    ]
    for got, right in zip(pyramid([x]), expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-12)
    assert pyramid.specs == tuple(FeatureSpec(f"s{s}", c, s) for s, c in ((4, 2), (8, 4), (16, 8), (32, 8)))


@pytest.mark.parametrize(
    ("stride", "channels"), [(4, (64,) * 4), (8, (32, 64, 64, 64)), (32, (8, 16, 32, 64))]
)
def test_a_pyramid_from_other_strides(stride: int, channels: tuple[int, ...]) -> None:
    pyramid = SimplePyramid([FeatureSpec(f"s{stride}", 64, stride)])
    assert tuple(s.channels for s in pyramid.specs) == channels
    maps = pyramid([torch.zeros(2, 64, 64 // stride, 96 // stride)])
    assert [tuple(m.shape) for m in maps] == [s.shape(2, (64, 96)) for s in pyramid.specs]


def test_other_students_pass_the_pyramid_as_they_are() -> None:
    specs = create_student("test_resnet").specs
    neck, maps = Neck(specs, 8), [torch.rand(s.shape(2, (64, 96))) for s in specs]
    assert neck.specs == specs
    assert all(a is b for a, b in zip(neck.pyramid(maps), maps, strict=True))
    assert not [k for k in neck.state_dict() if k.startswith("pyramid")]
    with pytest.raises(ValueError, match="takes 4 levels, got 1"):
        neck(maps[:1])


def test_every_level_of_a_regressor_learns_through_the_tokens() -> None:
    student = create_student("test_vit")
    teacher = [FeatureSpec(f"s{s}", 5, s) for s in (4, 8, 16, 32)]
    regressor = FeatureRegressor(student.specs, teacher, width=8)
    maps = regressor(student(images()))
    assert [tuple(m.shape) for m in maps] == [s.shape(2, (64, 96)) for s in teacher]
    sum(m.square().mean() for m in maps).backward()
    for module in (student, regressor):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            assert bool(parameter.grad.isfinite().all()), name
    again = FeatureRegressor(student.specs, teacher, width=8)
    assert all(
        torch.equal(v, again.state_dict()[k]) for k, v in regressor.state_dict().items() if "pyramid" in k
    )


# --- weight decay -------------------------------------------------------------------------------------------


def test_position_embeddings_and_tokens_do_not_decay() -> None:
    student = small("vit_small_patch14_reg4_dinov2").train()
    head = Neck(student.specs, 8)
    decayed, no_decay = optim.parameter_groups(
        [torch.nn.ModuleDict({"student": student, "head": head})], 0.05
    )
    names = {id(p): n for n, p in [*student.named_parameters(), *head.named_parameters()]}
    free = {names[id(p)] for p in no_decay["params"]}  # type: ignore[attr-defined]
    assert {f"model.{n}" for n in ("pos_embed", "cls_token", "reg_token")} <= free
    heavy = {names[id(p)] for p in decayed["params"]}  # type: ignore[attr-defined]
    assert "model.blocks.0.attn.qkv.weight" in heavy
    assert "pyramid.branches.0.0.weight" in heavy
    assert free | heavy == set(names.values())
    assert not [n for n in heavy if n.endswith("bias") or "norm" in n]


def test_layer_decay_by_blocks() -> None:
    student = create_student("test_vit")
    depth = len(student.model.blocks)
    depths = optim.layer_depths(student.model)
    assert depths["pos_embed"] == depths["patch_embed.proj.weight"] == 0
    assert [depths[f"blocks.{i}.attn.qkv.weight"] for i in range(depth)] == list(range(1, depth + 1))
    assert depths["norm.weight"] == depth
    groups = optim.layer_decay_groups(student.model, 0.05, 0.5)
    found = {id(p): g for g in groups for p in g["params"]}  # type: ignore[attr-defined]
    assert found[id(student.model.pos_embed)]["weight_decay"] == 0
    assert found[id(student.model.pos_embed)]["factor"] == 0.5 ** (depth + 1)
    assert found[id(student.model.blocks[-1].attn.qkv.weight)]["factor"] == 0.5


def test_full_finetuning_takes_timms_groups_and_head() -> None:
    from dreamteacher.downstream.classification.config import FinetuneFullConfig

    student = create_student("test_vit", seed=3)
    model = TimmClassifier(student, 7, drop_path=0.1)
    recipe = dataclasses.replace(recipe_of(FinetuneFullConfig()), layer_decay=0.5, weight_decay=0.1)
    groups = layer_groups(model.model, recipe)
    found = {id(p): g for g in groups for p in g["params"]}
    depth = len(student.model.blocks)
    scales = [found[id(b.attn.qkv.weight)]["lr_scale"] for b in model.model.blocks]
    assert scales == pytest.approx([0.5 ** (depth - i) for i in range(depth)])
    assert found[id(model.model.head.weight)]["lr_scale"] == 1
    assert found[id(model.model.cls_token)] == found[id(model.model.pos_embed)]
    assert found[id(model.model.pos_embed)]["weight_decay"] == 0
    student.eval()
    model.eval()
    x = images((70, 100))
    with torch.no_grad():
        torch.testing.assert_close(model(x), model.model.head(student.pooled(x)))


# --- heads --------------------------------------------------------------------------------------------------


def test_heads_make_a_pyramid_of_their_own() -> None:
    student = create_student("test_vit")
    head = SegmentationHead(student.specs, 3, 8, norm=True)
    assert head(student(images()), (64, 96)).shape == (2, 3, 64, 96)
    assert ReadoutHead(student.specs, 3, -1)(student(images()), (64, 96)).shape == (2, 3, 64, 96)
    config = DetectConfig(width=8, fc=8)
    model = build_detector(student, config, classes=1, cascade=False)
    maps = model.backbone(images())
    assert {k: m.shape[-1] for k, m in maps.items()} == {"s4": 24, "s8": 12, "s16": 6, "s32": 3, "pool": 2}
    batch, _ = model.transform([torch.zeros(3, 50, 70)])
    assert batch.tensors.shape[-2:] == (64, 96)
    every = [id(p) for group in train.build_groups(model, config) for p in group["params"]]
    assert sorted(every) == sorted(id(p) for p in model.parameters())


# --- end to end ---------------------------------------------------------------------------------------------


@pytest.fixture
def config(image_folder: Path, tiny_teacher: Path, tmp_path: Path) -> PretrainConfig:
    return PretrainConfig(
        images=image_folder, out=tmp_path / "run", teacher=str(tiny_teacher), student="test_vit", width=8,
        batch_size=8, epochs=2, warmup_epochs=0, lr=1e-3, device="cpu", precision="float32", log_every=1,
        save_every=1, keep_checkpoints=9, probe_every=0,
    )  # fmt: skip


def test_pretrain_resume_export_evaluate(config: PretrainConfig, tmp_path: Path, image_folder: Path) -> None:
    whole = pretrain(dataclasses.replace(config, out=tmp_path / "whole"))
    assert whole is not None
    pretrain(config)
    names = ("backbone.safetensors", "regressor.safetensors")
    for path in [checkpoint.checkpoint_path(config.out, s) for s in (3, 4)] + [config.out / n for n in names]:
        path.unlink()
    pretrain(config)  # from step 2
    for name in names:
        ours, theirs = load_file(config.out / name), load_file(whole / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(v, theirs[k]) for k, v in ours.items())
    assert (config.out / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()

    # The backbone alone is taken away, under timm's names; the pyramid stays with the neck.
    plain = timm.create_model("test_vit", num_classes=0)
    before = {k: v.clone() for k, v in plain.state_dict().items()}
    weights = load_file(whole / "backbone.safetensors")
    plain.load_state_dict(weights, strict=True)
    assert not torch.equal(before["blocks.0.attn.qkv.weight"], weights["blocks.0.attn.qkv.weight"])
    assert "pyramid.branches.0.0.weight" in neck_weights(whole)
    head = SegmentationHead(create_student("test_vit").specs, 2, 8)
    head.neck.load_state_dict(neck_weights(whole), strict=True)

    folder = write_export(ExportConfig(run=whole))
    exported = json.loads((folder / "config.json").read_text())
    assert exported["pretrained_cfg"]["input_size"] == [3, 64, 64]
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    student = create_student("test_vit", init=str(whole)).eval()
    x = images()
    with torch.no_grad():
        normalised = (x - student.mean) / student.std
        kept = student.model.state_dict()
        assert all(torch.equal(v, kept[k]) for k, v in loaded.state_dict().items())
        # The same weights, but not always the same bits: a matrix product may depend on where its factors lie.
        near = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(
            loaded.forward_features(normalised), student.model.forward_features(normalised), **near
        )
        scope: dict[str, object] = {}
        exec(
            load_snippet(folder, "test_vit").replace("torch.rand(1, 3, 224, 224)", "given"),
            {"given": x},
            scope,
        )
        torch.testing.assert_close(scope["maps"][0], student(x)[0], **near)  # type: ignore[index]
        torch.testing.assert_close(scope["vectors"], student.pooled(x), **near)

    masks = tmp_path / "masks"
    write_masks(masks, image_folder)
    rows = evaluate(
        EvaluateConfig(
            student="test_vit", init=str(whole), train=image_folder, test=image_folder, images=image_folder,
            masks=masks, size=(64, 64), labels=(2,), mask_counts=(4,), seeds=(0,), device="cpu", neck=True,
            tasks=("knn", "linear", "segment-linear", "segment-frozen", "segment-finetune"),
        ),
        log=lambda _: None,
    )  # fmt: skip
    found = {row["task"]: row["value"] for row in rows if row["metric"] in ("accuracy", "miou")}
    assert len(found) == 5
    assert found["knn"] >= 0.8  # bright and dark are easy
    assert all(0 <= v <= 1 for v in found.values())


def write_masks(folder: Path, pictures: Path) -> None:
    """Masks of two classes for every picture: its left and its right half."""
    from PIL import Image

    for path in pictures.rglob("*.png"):
        mask = Image.new("L", (64, 64), 0)
        mask.paste(1, (32, 0, 64, 64))
        target = folder / path.relative_to(pictures)
        target.parent.mkdir(parents=True, exist_ok=True)
        mask.save(target)


def test_a_mixed_run_keeps_its_pyramid(config: PretrainConfig, tmp_path: Path, image_folder: Path) -> None:
    masks = tmp_path / "masks"
    write_masks(masks, image_folder)
    label = dataclasses.replace(config.label, epochs=1, warmup_epochs=0, width=8)
    config = dataclasses.replace(
        config, distill="mixed", labelled=image_folder, masks=masks, label=label, epochs=1
    )
    run = pretrain(config)
    assert run is not None
    model = load_distilled(run)
    stored = load_file(run / "regressor.safetensors")
    for name, value in model.neck.pyramid.state_dict().items():
        assert torch.equal(value, stored[f"neck.pyramid.{name}"])
    with torch.no_grad():
        assert model(images()).shape == (2, 2, 64, 96)


@pytest.mark.slow
def test_onnx_takes_sides_that_the_stride_divides(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from dreamteacher.exports.onnx import write_onnx

    student, file = create_student("test_vit").eval(), tmp_path / "model.onnx"
    write_onnx(student, file)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    x = images((80, 48), batch=3)
    (found,) = session.run(None, {"images": x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), student(x)[0], rtol=1e-3, atol=1e-4)


# --- networks with windows ----------------------------------------------------------------------------------


@torch.no_grad()
def test_swin_takes_any_size_and_its_maps_have_channels_first() -> None:
    """Against timm's own pyramid of the same network, whose maps have channels last, in float64."""
    name = "swin_tiny_patch4_window7_224"
    settings = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_classes": 0}
    model = timm.create_model(name, **settings, **size_settings(name)).eval()
    student = Student(name, model).eval().double()
    assert [(s.stride, s.channels) for s in student.specs] == [(4, 24), (8, 48), (16, 96), (32, 192)]
    plain = timm.create_model(name, **settings)
    plain.load_state_dict(model.state_dict(), strict=True)  # the setting changes no weight
    theirs = timm.create_model(
        name, features_only=True, embed_dim=24, depths=(1, 1, 1, 1), **size_settings(name)
    )
    assert theirs.eval().double().output_fmt == "NHWC"
    renamed = {k.replace("layers.", "layers_"): v for k, v in model.state_dict().items()}
    theirs.load_state_dict({k: v for k, v in renamed.items() if k in theirs.state_dict()}, strict=True)
    x = images().double()
    expected = theirs((x - student.mean) / student.std)
    for ours, right in zip(student(x), expected, strict=True):
        torch.testing.assert_close(ours, right.permute(0, 3, 1, 2), rtol=1e-10, atol=1e-10)
    with torch.enable_grad():
        check_student(student.float())


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("hiera_tiny_224", "takes no 64x128 image"),
        ("xcit_nano_12_p8_224", "its maps have strides 8"),
        ("vit_relpos_small_patch16_224", "its maps have strides 16"),
        ("maxvit_pico_rw_256", "takes no 64x128 image"),
    ],
)
def test_networks_that_are_bound_to_one_size_are_refused(name: str, part: str) -> None:
    with pytest.raises(UserError) as error:
        create_student(name)
    assert part in str(error.value)
    assert "or is a plain ViT" in str(error.value)
    assert len(str(error.value).splitlines()) <= 3


def test_they_are_listed() -> None:
    names = set(student_names())
    assert {"vit_tiny_patch16_224", "vit_small_patch14_dinov2", "swin_tiny_patch4_window7_224"} <= names
    swins = {name for module in SWIN_MODULES for name in timm.list_models(module=module)}
    assert all(size_settings(name) == {"strict_img_size": False} for name in swins)
