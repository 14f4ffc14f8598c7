"""The heads of Cascade Mask R-CNN, on torchvision's parts: three box heads, each fed with the boxes of the last."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference, maskrcnn_loss
from torchvision.ops import MultiScaleRoIAlign, batched_nms, clip_boxes_to_image, remove_small_boxes

from dreamteacher.data.images import Size

Maps: TypeAlias = dict[str, Tensor]
Boxes: TypeAlias = list[Tensor]

IOUS = (0.5, 0.6, 0.7)
# Scales of the regression targets: later stages correct smaller errors.
CODER_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
LOSS_WEIGHTS = (1.0, 0.5, 0.25)
_SMALLEST = 1e-2  # pixels: boxes below are left out


class BoxPredictor(nn.Module):
    """Class logits (with the background) from a vector, and deltas of one box for all classes."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(channels, classes)
        self.bbox_pred = nn.Linear(channels, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """N x channels -> logits N x classes, deltas N x 4."""
        return self.cls_score(x), self.bbox_pred(x)


def box_losses(logits: Tensor, deltas: Tensor, labels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy over all boxes; smooth L1 (beta 1/9) over those of objects, divided by the number of all.

    As torchvision's `fastrcnn_loss`, for class-agnostic deltas: logits are N x classes, deltas and their
    targets N x 4, labels N class ids (0 = background).
    """
    objects = (labels > 0).nonzero().flatten()
    regression = F.smooth_l1_loss(deltas[objects], targets[objects], beta=1 / 9, reduction="sum")
    return F.cross_entropy(logits, labels), regression / labels.numel()


class CascadeHeads(RoIHeads):
    """Three box heads in a row, trained at IoU 0.5, 0.6 and 0.7, and one mask head.

    While training the boxes of the first stage are sampled as in Mask R-CNN; the later stages get these boxes
    as the stage before has moved them, matched anew. The score of a box is the mean of the three stages'
    probabilities, its place that of the last. The mask head is trained on the boxes of the first stage.

    Source: Cai and Vasconcelos, arXiv 1712.00726 (weights of the losses: as in mmdetection; masks: one head
    instead of one per stage, as in detectron2).
    """

    def __init__(
        self,
        pool: MultiScaleRoIAlign,
        make_head: Callable[[], nn.Module],
        make_predictor: Callable[[], nn.Module],
        *,
        samples: int,
        detections: int,
        masks: tuple[MultiScaleRoIAlign, nn.Module, nn.Module],
    ) -> None:
        super().__init__(
            pool, None, None, IOUS[0], IOUS[0], samples, 0.25, CODER_WEIGHTS[0], 0.05, 0.5, detections, *masks
        )  # fmt: skip
        self.heads = nn.ModuleList([make_head() for _ in IOUS])
        self.predictors = nn.ModuleList([make_predictor() for _ in IOUS])
        self.coders = [BoxCoder(weights) for weights in CODER_WEIGHTS]
        self.matchers = [Matcher(iou, iou) for iou in IOUS]

    def forward(
        self,
        features: Maps,
        proposals: Boxes,
        image_shapes: list[Size],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Arguments and results as of torchvision's RoIHeads: losses while training, else detections."""
        if not self.training:
            result = self._detect(features, proposals, image_shapes)
            logits = self._mask_logits(features, [r["boxes"] for r in result], image_shapes)
            for each, masks in zip(
                result, maskrcnn_inference(logits, [r["labels"] for r in result]), strict=True
            ):
                each["masks"] = masks
            return result, {}
        assert targets is not None
        boxes, matched, labels, regression = self.select_training_samples(proposals, targets)
        positive = [(each > 0).nonzero().flatten() for each in labels]
        mask_boxes, mask_matched = (
            [each[index] for each, index in zip(part, positive, strict=True)] for part in (boxes, matched)
        )
        losses: dict[str, Tensor] = {}
        for stage, weight in enumerate(LOSS_WEIGHTS):
            if stage:
                _, labels, regression = self._rematched(stage, boxes, targets)
            logits, deltas = self._stage(stage, features, boxes, image_shapes)
            classifier, box = box_losses(logits, deltas, torch.cat(labels), torch.cat(regression))
            losses |= {f"loss_classifier_{stage}": weight * classifier, f"loss_box_reg_{stage}": weight * box}
            boxes = self._moved(stage, boxes, deltas, image_shapes)
        mask_logits = self._mask_logits(features, mask_boxes, image_shapes)
        truth, classes = [t["masks"] for t in targets], [t["labels"] for t in targets]
        losses["loss_mask"] = maskrcnn_loss(mask_logits, mask_boxes, truth, classes, mask_matched)
        return [], losses

    def _stage(self, stage: int, features: Maps, boxes: Boxes, shapes: list[Size]) -> tuple[Tensor, Tensor]:
        return self.predictors[stage](self.heads[stage](self.box_roi_pool(features, boxes, shapes)))

    def _mask_logits(self, features: Maps, boxes: Boxes, shapes: list[Size]) -> Tensor:
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, shapes)))

    def _rematched(
        self, stage: int, boxes: Boxes, targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Index of the object, label and deltas of boxes, at the IoU of a stage."""
        truth, classes = [t["boxes"] for t in targets], [t["labels"] for t in targets]
        self.proposal_matcher = self.matchers[stage]
        matched, labels = self.assign_targets_to_proposals(boxes, truth, classes)
        self.proposal_matcher = self.matchers[0]
        aims = [
            t[index] if len(t) else torch.zeros_like(b)
            for t, index, b in zip(truth, matched, boxes, strict=True)
        ]
        return matched, labels, self.coders[stage].encode(aims, boxes)

    @torch.no_grad()
    def _moved(self, stage: int, boxes: Boxes, deltas: Tensor, shapes: list[Size]) -> Boxes:
        """The boxes after a stage, cut at the border of their image; at least a hundredth of a pixel wide."""
        moved = self.coders[stage].decode_single(deltas, torch.cat(boxes))
        parts = moved.split([len(b) for b in boxes])
        cut = [clip_boxes_to_image(part, shape) for part, shape in zip(parts, shapes, strict=True)]
        return [torch.cat([b[:, :2], b[:, 2:].maximum(b[:, :2] + _SMALLEST)], dim=1) for b in cut]

    def _detect(self, features: Maps, boxes: Boxes, shapes: list[Size]) -> list[dict[str, Tensor]]:
        scores: Tensor | None = None
        for stage in range(len(IOUS)):
            logits, deltas = self._stage(stage, features, boxes, shapes)
            share = logits.softmax(1) / len(IOUS)
            scores = share if scores is None else scores + share
            if stage < len(IOUS) - 1:
                boxes = self._moved(stage, boxes, deltas, shapes)
        assert scores is not None
        counts = [len(b) for b in boxes]
        placed = self.coders[-1].decode_single(deltas, torch.cat(boxes))
        return [
            self._chosen(clip_boxes_to_image(b, shape), s)
            for b, s, shape in zip(placed.split(counts), scores.split(counts), shapes, strict=True)
        ]

    def _chosen(self, boxes: Tensor, scores: Tensor) -> dict[str, Tensor]:
        """The detections of one image, from boxes N x 4 and scores N x classes."""
        row, column = (scores[:, 1:] > self.score_thresh).nonzero(as_tuple=True)
        boxes, scores, labels = boxes[row], scores[row, column + 1], column + 1
        keep = remove_small_boxes(boxes, _SMALLEST)
        boxes, scores, labels = boxes[keep], scores[keep], labels[keep]
        keep = batched_nms(boxes, scores, labels, self.nms_thresh)[: self.detections_per_img]
        return {"boxes": boxes[keep], "labels": labels[keep], "scores": scores[keep]}
