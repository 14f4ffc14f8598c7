"""The whole segmenter against segmentation-models-pytorch's UPerNet, with its weights."""

from __future__ import annotations

import pytest
import torch

from dreamteacher.downstream.segmentation.few_masks import (
    SegmentationHead,
    Segmenter,
    from_segmentation_models,
)
from dreamteacher.models.student import create_student
from tests.builders.pictures import refused
from tests.models.test_regressor import randomise

CLASSES, WIDTH = 5, 16


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
    head = SegmentationHead(student.specs, CLASSES, WIDTH, norm=True, align_corners=True)
    head.load_state_dict(from_segmentation_models(weights))
    ours = Segmenter(student, head).eval()
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = theirs((images - student.mean) / student.std)
        torch.testing.assert_close(ours(images), expected, rtol=1e-4, atol=1e-4)
        assert expected.std() > 0.1
        # What is ours by default differs in nothing but these two switches.
        head.align_corners = False
        assert not torch.allclose(ours(images), expected, atol=1e-2)


def test_the_switches_are_off_unless_asked_for() -> None:
    student = create_student("test_resnet")
    plain, normed = (SegmentationHead(student.specs, 3, 8, norm=norm) for norm in (False, True))
    assert not any("norms" in key for key in plain.state_dict())
    extra = set(normed.state_dict()) - set(plain.state_dict())
    assert extra == {f"norms.{i}.{kind}" for i in range(4) for kind in ("weight", "bias")}


def test_weights_of_another_network_are_refused() -> None:
    refused(lambda: from_segmentation_models({"decoder.blocks.0.weight": torch.zeros(1)}), "decoder.blocks.0")
