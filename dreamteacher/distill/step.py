"""What one step of a pretraining computes: the losses by name, their total, and the line of the log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dreamteacher import metrics
from dreamteacher.data import image_set
from dreamteacher.data.images import to_float
from dreamteacher.distill.config import PretrainConfig
from dreamteacher.distill.dataset import FeatureBatch, Part, batch_loss
from dreamteacher.distill.network import DistillationNetwork
from dreamteacher.losses import FeatureLoss, label_distillation
from dreamteacher.models.interpreter import Interpreter
from dreamteacher.models.regressor import resize
from dreamteacher.runtime.compile import compiled
from dreamteacher.runtime.distributed.device import autocast
from dreamteacher.runtime.distributed.group import all_reduce_mean
from dreamteacher.runtime.meter import Means


class Seen(NamedTuple):
    """What the loss terms of a part of a batch see.

    Args:
        batch: images and the teacher's maps; maps: the student's, () where only labels are distilled.
        feature: eq. 1 and 2 of them, None without maps.
        logits, soft: of the student's head and of the interpreter, None where no labels are distilled.
    """

    config: PretrainConfig
    batch: FeatureBatch
    maps: Sequence[Tensor]
    feature: FeatureLoss | None
    logits: Tensor | None
    soft: Tensor | None


class Term(NamedTuple):
    """A term of the loss.

    Args:
        weight: of the term in the total; None: it is measured only.
        value: a scalar, or one value per level (L,), whose mean over the levels counts; None where it has no meaning.
    """

    weight: Callable[[PretrainConfig], float | None]
    value: Callable[[Seen], Tensor | None]


def _label(seen: Seen, logits: Tensor | None) -> Tensor | None:
    """Eq. 5 of these logits against the soft labels; of the labels themselves it is their entropy."""
    if logits is None or seen.soft is None:
        return None
    return label_distillation(logits, seen.soft, tau=seen.config.tau)


# Source: eq. 3 (feature), eq. 5 (label), eq. 6 (mixed): L_mix = L_feat + 1.0 L_ld.
TERMS: dict[str, Term] = {
    "mse": Term(lambda c: 1.0, lambda seen: None if seen.feature is None else seen.feature.mse),
    "at": Term(lambda c: c.at_weight, lambda seen: None if seen.feature is None else seen.feature.at),
    "label": Term(lambda c: c.label_weight if c.distill == "mixed" else 1.0, lambda s: _label(s, s.logits)),
    "entropy": Term(lambda c: None, lambda s: _label(s, s.soft)),  # below which "label" cannot fall
}


def loss_weights(config: PretrainConfig) -> dict[str, float]:
    """The weight of each term that counts in the total."""
    weights = {name: term.weight(config) for name, term in TERMS.items()}
    return {name: weight for name, weight in weights.items() if weight is not None}


class Distillation:
    """Network, teacher's labels and loss terms: a part of a batch -> its losses by name.

    Args:
        network: what is trained; spread: the same, as it is called: replicated over processes, or itself.
        interpreter: labels the teacher's maps; frozen, and no part of what is trained.
        levels: names of the teacher's maps, fine to coarse.
    """

    def __init__(
        self, config: PretrainConfig, network: DistillationNetwork, levels: Sequence[str], *,
        spread: nn.Module | None = None, interpreter: Interpreter | None = None,
    ) -> None:  # fmt: skip
        self.config, self.network, self.levels, self.interpreter = config, network, levels, interpreter
        self.spread: nn.Module = network if spread is None else spread
        self.device = next(network.parameters()).device
        self.forward: Callable[..., Any] = self.spread
        self.batch_loss = batch_loss

    def compile(self) -> None:
        """Has what follows compiled, as `compiled` says: the networks, and their losses."""
        strict = self.config.compile == "on"
        self.forward = compiled(self.spread, strict=strict)
        self.batch_loss = compiled(batch_loss, strict=strict)

    def losses(self, part: Part) -> dict[str, Tensor]:
        """The terms by name, "label" or "mse/s4"; the part keeps the student's maps (none in label mode)."""
        c, batch = self.config, part.batch
        assert batch is not None
        feature = logits = soft = None
        with autocast(self.device, c.precision):
            sizes = [(m.shape[-2], m.shape[-1]) for m in batch.maps]
            maps, logits = self.forward(batch.images, sizes)
            if self.interpreter is not None:
                with torch.no_grad():
                    soft = self.interpreter(batch.maps).float()
        if maps:
            same = batch._replace(waited=0.0, step=0)  # or every step would be compiled anew
            feature = self.batch_loss(
                maps, same, axes=c.whiten, at_weight=c.at_weight, at_reduction=c.at_reduction
            )
        if logits is not None and soft is not None and soft.ndim == 4:
            logits = resize(logits, (soft.shape[-2], soft.shape[-1]))
        part.maps = maps
        seen = Seen(c, batch, maps, feature, logits, soft)
        found: dict[str, Tensor] = {}
        for name, term in TERMS.items():
            value = term.value(seen)
            if value is not None and value.ndim:
                found |= {f"{name}/{level}": v for level, v in zip(self.levels, value.unbind(), strict=True)}
            elif value is not None:
                found[name] = value
        return found

    def watched(self, part: Part) -> dict[str, Tensor]:
        """Scalars that are finite if the teacher's maps are."""
        assert part.batch is not None
        maps = zip(self.levels, part.batch.maps, strict=True)
        return {f"teacher's map {level}": m.detach().sum(dtype=torch.float32) for level, m in maps}

    def advice(self, name: str) -> str:
        """What to do when something watched is not finite."""
        if "teacher" in name:
            return "Look at the images of that step, and use --precision float32 or another --t."
        return f"Lower --lr (now {self.config.lr:g}), set --clip 1, or use --precision float32."

    def row(self, part: Part, means: Means, **facts: float) -> dict[str, float]:
        """The numbers of a line of the log: means since the last one; R2 and cosine of this part against its targets.

        Args:
            facts: further numbers, after the loss.
        """
        row = {"loss": means["loss"], "grad_norm": means["grad_norm"], **facts}
        for name in (name for name in means if "/" not in name and name not in (*row, "entropy")):
            row[name] = means[name]
            if name == "label":
                row["label_kl"] = means.difference("label", "entropy")
        weights = loss_weights(self.config)
        for i, level in enumerate(self.levels if part.maps else ()):
            terms = [name for name in TERMS if f"{name}/{level}" in means]
            row |= {f"{name}/{level}": means[f"{name}/{level}"] for name in terms}
            row[f"loss/{level}"] = sum(weights.get(n, 0.0) * row[f"{n}/{level}"] for n in terms)
            assert part.batch is not None
            target = part.batch.target(i, self.config.whiten)
            row[f"r2/{level}"] = metrics.r2(part.maps[i], target, all_reduce_mean)
            row[f"cosine/{level}"] = metrics.cosine(part.maps[i], target, all_reduce_mean)
        return row


@torch.no_grad()
def probe(
    network: DistillationNetwork, images: image_set.ImageSet | None, config: PretrainConfig, most: int = 1024
) -> dict[str, float]:
    """RankMe of the backbone's pooled features on up to `most` images; kNN (leave one out) with labels."""
    if images is None:
        return {}
    network.student.eval()
    device = next(network.parameters()).device
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:most]
    features = []
    for part in order.split(128):
        with autocast(device, config.precision):
            features.append(network.pooled(to_float(images.get(part).to(device))).float().cpu())
    x = torch.cat(features)
    row = {"rankme": metrics.rankme(x)}
    if images.labels is not None:
        labels = images.labels[order]
        scores = metrics.knn_predict(x, labels, classes=len(images.classes))
        row["knn"] = metrics.accuracy(scores.argmax(1), labels)
    return row
