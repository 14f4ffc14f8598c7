"""How the panoptic task trains."""

from __future__ import annotations

from dataclasses import dataclass, field

from dreamteacher.downstream.classification.config import check_numbers
from dreamteacher.downstream.detection.config import PRESETS as DETECT_PRESETS
from dreamteacher.downstream.detection.config import DetectConfig
from dreamteacher.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PanopticConfig:
    """How the Panoptic FPN is made, trained and merged."""

    detect: DetectConfig = field(default_factory=DetectConfig)
    """Its Mask R-CNN, and the training of all of it."""
    width: int = 128
    """Channels of the semantic branch, a multiple of 8."""
    instance_weight: float = 1.0
    """Of the losses of Mask R-CNN."""
    semantic_weight: float = 0.5
    """Of the cross-entropy of the semantic branch."""
    score: float = 0.5
    """Instances of a lower score are left out."""
    overlap: float = 0.5
    """An instance is left out when more than this share of it is taken by better ones."""
    stuff_area: int = 4096
    """A class of stuff is left out when it covers fewer pixels of the image."""

    def __post_init__(self) -> None:
        if self.width < 8 or self.width % 8:
            raise UserError(f"width is {self.width}.", "Give a multiple of 8.")
        check_numbers(self, least=("instance_weight", "semantic_weight", "stuff_area"))
        if not 0 <= self.score <= 1 or not 0 <= self.overlap <= 1:
            raise UserError(f"score {self.score}, overlap {self.overlap}.", "Give shares from 0 to 1.")


# BDD100K's 7,000 panoptic images for 36 epochs: ImageNet-supervised 22.4 PQ, DreamTeacher 21.8. Not run by us.
PRESETS = {"bdd100k-36": PanopticConfig(detect=DETECT_PRESETS["bdd100k-36"])}
