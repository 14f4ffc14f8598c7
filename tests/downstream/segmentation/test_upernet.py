"""The whole segmenter against segmentation-models-pytorch's UPerNet, with its weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dreamteacher.downstream.segmentation.few_masks import SegmentationHead, Segmenter
from dreamteacher.models.student import create_student
from tests.models.test_regressor import randomise

CLASSES, WIDTH = 5, 16


def from_segmentation_models(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a `SegmentationHead` with `norm` from that of their UPerNet of depth 5."""
    names = {"decoder.psp.out_conv": "neck.ppm.bottleneck", "decoder.fusion_block": "head.fuse"}
    names |= {f"decoder.psp.blocks.{i}.1": f"neck.ppm.branches.{i}.1" for i in range(4)}
    names |= {f"decoder.feature_norms.{i}": f"norms.{i}" for i in range(4)}
    for i in range(3):  # theirs go from coarse to fine
        names[f"decoder.fpn_lateral_blocks.{2 - i}.conv_norm_relu"] = f"neck.laterals.{i}"
        names[f"decoder.fpn_conv_blocks.{2 - i}"] = f"neck.outputs.{i}"
    names["segmentation_head.0"] = "head.classify"
    found = {}
    for key, value in weights.items():
        if not key.startswith("encoder."):
            (place,) = (theirs for theirs in names if key.startswith(f"{theirs}."))
            found[names[place] + key.removeprefix(place)] = value
    return found


@pytest.mark.parametrize(
    ("name", "size"), [("test_resnet", (64, 96)), ("test_convnext", (64, 96)), ("test_resnet", (96, 160))]
)
def test_outputs_equal_upernet_of_segmentation_models(name: str, size: tuple[int, int]) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    # Depth 5 gives the levels at strides 4 to 32; with 4 the coarsest stage of a ConvNeXt would be missing.
    theirs = smp.UPerNet(
        f"tu-{name}", encoder_depth=5, encoder_weights=None, decoder_channels=WIDTH, classes=CLASSES
    ).eval()
    randomise(theirs.decoder, 1)
    randomise(theirs.segmentation_head, 2)
    weights = theirs.state_dict()
    student = create_student(name)
    # timm's features_only wrapper, which they use, flattens "stages.0" to "stages_0".
    flat = {key.replace("stages.", "stages_").replace("stem.", "stem_"): key for key in student.state_dict()}
    encoder = {key.removeprefix("encoder."): value for key, value in weights.items() if "encoder" in key}
    used = {flat.get(key, key): value for key, value in encoder.items()}
    missing, unexpected = student.load_state_dict(used, strict=False)
    assert not unexpected
    assert all("norm" in key for key in missing)  # after the last map: no part of the features
    head = SegmentationHead(student.specs, CLASSES, WIDTH, norm=True)
    head.load_state_dict(from_segmentation_models(weights))
    ours = Segmenter(student, head).eval()
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = theirs((images - student.mean) / student.std)
        logits = head.head(head.neck([norm(m) for norm, m in zip(head.norms, student(images), strict=True)]))
        found = F.interpolate(logits, size, mode="bilinear", align_corners=True)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert expected.std() > 0.1
        # Ours differs in nothing but the last resize.
        assert torch.equal(ours(images), F.interpolate(logits, size, mode="bilinear"))


def test_the_switch_is_off_unless_asked_for() -> None:
    student = create_student("test_resnet")
    plain, normed = (SegmentationHead(student.specs, 3, 8, norm=norm) for norm in (False, True))
    assert not any("norms" in key for key in plain.state_dict())
    extra = set(normed.state_dict()) - set(plain.state_dict())
    assert extra == {f"norms.{i}.{kind}" for i in range(4) for kind in ("weight", "bias")}
