"""Pretraining by other methods, to compare with: the same backbone, the same images, as many of them seen.

    python benchmarks/baselines/run.py --method simclr --images photos --out runs/simclr --images-seen 200000
    dreamteacher evaluate --init runs/simclr --method SimCLR --train ... --test ...

Methods: simclr (arXiv 2002.05709), mocov2 (2003.04297), byol (2006.07733), densecl (2011.09157), with the losses and
heads of lightly (pip install 'dreamteacher[baselines]'); and ddep (2205.11423), which predicts the noise of an image.
`images-seen` counts images, not views: a step of the first four passes each image through the backbone twice.
One process, no resumption; the result is backbone.safetensors under timm's names.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
import tyro
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import v2
from tqdm import tqdm

from dreamteacher import __version__
from dreamteacher.data.image_set import ImageSet, load_images
from dreamteacher.data.loader import load_ahead
from dreamteacher.data.seeds import step_generator
from dreamteacher.models.regressor import FeatureRegressor
from dreamteacher.models.student import Student, create_student
from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.config import to_json
from dreamteacher.runtime.distributed.device import autocast, pick_device, seeded
from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.optim import lr_at, parameter_groups, set_lr
from dreamteacher.runtime.run_folder import RunDir
from dreamteacher.runtime.settings import OnDevice
from dreamteacher.spec import FeatureSpec

MethodName = Literal["simclr", "mocov2", "byol", "densecl", "ddep"]


class Settings(NamedTuple):
    """Of a method: peak learning rate for 128 images, weight decay, temperature, momentum of the target network.

    The learning rate and decay of the contrastive methods are those of lightly's own benchmarks on small images
    (SGD, 0.06, 5e-4); temperatures and momenta are the methods' own.
    """

    lr: float
    weight_decay: float
    temperature: float = 0.0
    ema: float = 0.0


SETTINGS: dict[str, Settings] = {
    "simclr": Settings(0.06, 5e-4, temperature=0.5),
    "mocov2": Settings(0.06, 5e-4, temperature=0.2, ema=0.999),
    "byol": Settings(0.06, 5e-4, ema=0.996),
    "densecl": Settings(0.06, 5e-4, temperature=0.2, ema=0.999),
    "ddep": Settings(5e-4, 0.05),  # AdamW
}


@dataclass(frozen=True, kw_only=True)
class BaselineConfig(OnDevice):
    """Pretrain a backbone by a method to compare with."""

    images: Path
    """Folder of images, searched recursively; labels are not looked at."""
    out: Path
    """Folder that is made."""
    method: MethodName = "simclr"
    """Which method."""
    student: str = "resnet18"
    """timm name of the backbone."""
    init: str = "random"
    """random, imagenet or weights to start from."""
    images_seen: int = 100_000
    """Images in all steps together, views counted once."""
    batch_size: int = 256
    """Images in a step."""
    size: tuple[int, int] = (224, 224)
    """Height and width in pixels."""
    lr: float | None = None
    """Peak learning rate; none: the method's, scaled linearly with the batch."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises."""
    temperature: float | None = None
    """Of the contrastive losses; none: the method's."""
    ema: float | None = None
    """Momentum of the target network; none: the method's. Short runs want a smaller one."""
    queue: int = 4096
    """Negatives that mocov2 and densecl keep."""
    noise: float = 0.22
    """Deviation of ddep's noise, for pixels in [-1, 1] (0.22, scaled: as in bwconrad/decoder-denoising, src/model.py)."""
    width: int = 256
    """Channels of ddep's decoder."""
    seed: int = 0
    """Seeds weights, order, augmentation and noise."""
    workers: int = 2
    """Processes that augment."""
    cache_gb: float = 2.0
    """Images are kept decoded up to this size."""


# --- the methods: views of N images -> a loss ----------------------------------------------------------------


def lightly_parts() -> Any:
    """lightly's losses and heads.

    Raises:
        UserError: it is not installed.
    """
    try:
        from lightly import loss
        from lightly.models.modules import heads
        from lightly.models.utils import select_most_similar, update_momentum
    except ImportError:
        raise UserError("The baselines need lightly.", "pip install 'dreamteacher[baselines]'") from None

    class Parts(NamedTuple):
        loss: Any
        heads: Any
        select_most_similar: Any
        update_momentum: Any

    return Parts(loss, heads, select_most_similar, update_momentum)


def target_of(module: nn.Module) -> nn.Module:
    """A copy without gradients."""
    return copy.deepcopy(module).requires_grad_(False)


class SimClr(nn.Module):
    """Two views of one image attract, all others of the batch repel."""

    def __init__(self, student: Student, config: BaselineConfig) -> None:
        super().__init__()
        parts, channels = lightly_parts(), student.features_channels
        self.student = student
        self.head = parts.heads.SimCLRProjectionHead(channels, channels, 128)
        self.loss = parts.loss.NTXentLoss(setting(config, "temperature"))

    def forward(self, views: list[Tensor], step: int, total: int) -> Tensor:
        a, b = (self.head(self.student.pooled(view)) for view in views)
        return self.loss(a.float(), b.float())


class MoCo(nn.Module):
    """As SimClr, against a queue of keys from a slowly moving copy."""

    def __init__(self, student: Student, config: BaselineConfig) -> None:
        super().__init__()
        self.parts, channels = lightly_parts(), student.features_channels
        self.student, self.momentum = student, setting(config, "ema")
        self.head = self.parts.heads.MoCoProjectionHead(channels, channels, 128)
        self.target, self.target_head = target_of(student), target_of(self.head)
        self.loss = self.parts.loss.NTXentLoss(setting(config, "temperature"), (config.queue, 128))

    def forward(self, views: list[Tensor], step: int, total: int) -> Tensor:
        self.parts.update_momentum(self.student, self.target, self.momentum)
        self.parts.update_momentum(self.head, self.target_head, self.momentum)
        query = self.head(self.student.pooled(views[0]))
        with torch.no_grad():
            key = self.target_head(self.target.pooled(views[1]))
        return self.loss(query.float(), key.float())


class DenseCl(nn.Module):
    """MoCo, and the same for every position and the most similar one of the other view, half and half."""

    def __init__(self, student: Student, config: BaselineConfig) -> None:
        super().__init__()
        self.parts, channels = lightly_parts(), student.features_channels
        head = self.parts.heads.DenseCLProjectionHead
        self.student, self.momentum = student, setting(config, "ema")
        self.heads = nn.ModuleList(head(channels, channels, 128) for _ in range(2))  # image, positions
        self.target, self.target_heads = target_of(student), target_of(self.heads)
        temperature, bank = setting(config, "temperature"), (config.queue, 128)
        self.losses = nn.ModuleList(self.parts.loss.NTXentLoss(temperature, bank) for _ in range(2))

    def forward(self, views: list[Tensor], step: int, total: int) -> Tensor:
        self.parts.update_momentum(self.student, self.target, self.momentum)
        self.parts.update_momentum(self.heads, self.target_heads, self.momentum)
        maps, image, places = self.seen(self.student, self.heads, views[0])
        with torch.no_grad():
            key_maps, key_image, key_places = self.seen(self.target, self.target_heads, views[1])
            key_places = self.parts.select_most_similar(maps.detach(), key_maps, key_places)
        whole = self.losses[0](image, key_image)
        dense = self.losses[1](places.flatten(0, 1), key_places.flatten(0, 1))
        return 0.5 * whole + 0.5 * dense

    @staticmethod
    def seen(student: Any, heads: Any, view: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The last map as N x positions x C, and its projections: N x 128 and N x positions x 128."""
        maps = student(view)[-1].flatten(2).transpose(1, 2)
        return maps.float(), heads[0](maps.mean(1)).float(), heads[1](maps).float()


class Byol(nn.Module):
    """Each view predicts the projection of the other by a slowly moving copy; nothing repels."""

    def __init__(self, student: Student, config: BaselineConfig) -> None:
        super().__init__()
        self.parts = lightly_parts()
        self.student, self.momentum = student, setting(config, "ema")
        self.head = self.parts.heads.BYOLProjectionHead(student.features_channels)
        self.predict = self.parts.heads.BYOLPredictionHead()
        self.target, self.target_head = target_of(student), target_of(self.head)
        self.loss = self.parts.loss.NegativeCosineSimilarity()

    def forward(self, views: list[Tensor], step: int, total: int) -> Tensor:
        momentum = rising(self.momentum, step, total)
        self.parts.update_momentum(self.student, self.target, momentum)
        self.parts.update_momentum(self.head, self.target_head, momentum)
        a, b = (self.predict(self.head(self.student.pooled(view))).float() for view in views)
        with torch.no_grad():
            to_a, to_b = (self.target_head(self.target.pooled(view)).float() for view in reversed(views))
        return 0.5 * (self.loss(a, to_a) + self.loss(b, to_b))


def rising(start: float, step: int, total: int) -> float:
    """BYOL's momentum: a half cosine from `start` up to 1."""
    return 1 - (1 - start) * (math.cos(math.pi * step / total) + 1) / 2


class Ddep(nn.Module):
    """Predicts the noise in an image, at one noise level, through the neck that DreamTeacher trains with."""

    def __init__(self, student: Student, config: BaselineConfig) -> None:
        super().__init__()
        self.student, self.noise, self.seed = student, config.noise, config.seed
        self.stride = student.specs[0].stride
        spec = FeatureSpec("noise", 3 * self.stride**2, self.stride)
        self.decoder = FeatureRegressor(student.specs, [spec], width=config.width, seed=config.seed)

    def forward(self, views: list[Tensor], step: int, total: int) -> Tensor:
        (x,) = views
        noise = torch.randn(x.shape, generator=step_generator(self.seed, step, "ddep")).to(x.device)
        noisy = (2 * x - 1 + self.noise * noise) / math.sqrt(1 + self.noise**2)
        (found,) = self.decoder(self.student((noisy + 1) / 2))
        return F.mse_loss(F.pixel_shuffle(found, self.stride).float(), noise)


METHODS: dict[str, Callable[[Student, BaselineConfig], nn.Module]] = {
    "simclr": SimClr, "mocov2": MoCo, "byol": Byol, "densecl": DenseCl, "ddep": Ddep,
}  # fmt: skip


def setting(config: BaselineConfig, name: str) -> float:
    """What the config sets, or the method's own."""
    given = getattr(config, name)
    return getattr(SETTINGS[config.method], name) if given is None else given


# --- what is shown -------------------------------------------------------------------------------------------


def view_transform(size: tuple[int, int], method: str) -> v2.Compose:
    """SimCLR's and MoCo v2's augmentation of one uint8 image; for ddep crop and mirror only."""
    steps: list[nn.Module] = [
        v2.RandomResizedCrop(size, scale=(0.2, 1.0), antialias=True),
        v2.RandomHorizontalFlip(),
    ]
    if method != "ddep":
        steps += [
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
        ]
        if min(size) >= 64:  # as the methods' authors do, small images are not blurred
            kernel = min(size) // 20 * 2 + 1  # a tenth of the side, odd
            steps.append(v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], p=0.5))
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True)])


class Steps(Dataset[list[Tensor]]):
    """Item k is what step k shows, a list of views N x 3 x H x W: the same with any number of workers.

    The order of the images is that of `dreamteacher pretrain` with the same seed and batch size.
    """

    def __init__(self, images: ImageSet, config: BaselineConfig) -> None:
        self.images, self.batch, self.seed = images, config.batch_size, config.seed
        self.transform = view_transform(config.size, config.method)
        self.views = 1 if config.method == "ddep" else 2
        self.known: tuple[int, Tensor] = -1, torch.empty(0)

    def __getitem__(self, step: int) -> list[Tensor]:
        epoch, part = divmod(step, len(self.images) // self.batch)
        if self.known[0] != epoch:
            order = torch.randperm(len(self.images), generator=step_generator(self.seed, epoch, "order"))
            self.known = epoch, order
        pixels = self.images.get(self.known[1][part * self.batch : (part + 1) * self.batch])
        with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's global generator
            drawn = step_generator(self.seed, step, "views").initial_seed()
            torch.default_generator.manual_seed(drawn)
            return [torch.stack([self.transform(image) for image in pixels]) for _ in range(self.views)]


# --- the run -------------------------------------------------------------------------------------------------


def pretrain_baseline(config: BaselineConfig) -> Path:
    """Trains and writes config.json, metrics.jsonl and backbone.safetensors; returns the folder.

    Raises:
        UserError: for wrong settings, before anything is made; or a loss that is not finite.
    """
    check(config)
    device = pick_device(config.device)
    resolved = {"verb": "baseline", "version": __version__, "config": to_json(config)}
    RunDir.check(config.out, resolved)
    if (config.out / "backbone.safetensors").exists():
        print(f"'{config.out}' is finished.")
        return config.out
    student = create_student(config.student, init=config.init, seed=config.seed)
    images = load_images(config.images, config.size, cache_gb=config.cache_gb, workers=config.workers)
    if config.batch_size > len(images):
        raise UserError(
            f"A batch of {config.batch_size} is more than the {len(images)} readable images.",
            "Lower --batch-size, or add images.",
        )
    with seeded(config.seed, device):
        model = METHODS[config.method](student, config).to(device)
        run = RunDir(config.out)
        run.open(resolved)
        facts = train(model, images, config, device, run)
    about = {"format": "baseline-backbone", "student": student.name, "method": config.method}
    about |= {"seed": str(config.seed)} | {key: str(value) for key, value in facts.items()}
    state = {k: v.detach().cpu().contiguous() for k, v in student.model.state_dict().items()}
    path = config.out / "backbone.safetensors"
    checkpoint.atomic_write(path, lambda temporary: save_file(state, temporary, about))
    run.close()
    return config.out


def train(
    model: nn.Module, images: ImageSet, config: BaselineConfig, device: torch.device, run: RunDir
) -> dict[str, Any]:
    """All steps; returns images_seen and seconds."""
    total = max(1, config.images_seen // config.batch_size)
    own = SETTINGS[config.method]
    peak = own.lr * config.batch_size / 128 if config.lr is None else config.lr
    groups = parameter_groups([model], own.weight_decay)
    optimizer: torch.optim.Optimizer
    if config.method == "ddep":
        optimizer = torch.optim.AdamW(groups, lr=peak)
    else:
        optimizer = torch.optim.SGD(groups, lr=peak, momentum=0.9)
    loader = load_ahead(Steps(images, config), range(total), config.workers)
    model.train()
    start, every = time.perf_counter(), max(1, total // 100)
    for step, views in enumerate(tqdm(loader, config.method, total, disable=None)):
        views = [view.to(device, memory_format=torch.channels_last) for view in views]
        with autocast(device, config.precision):
            loss = model(views, step, total)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        set_lr(optimizer, lr_at(step, total=total, warmup=round(config.warmup * total), peak=peak))
        optimizer.step()
        if step % every == 0 or step == total - 1:
            value = float(loss.detach())
            if not math.isfinite(value):
                raise UserError(f"The loss is not finite at step {step}.", "Lower --lr.")
            seen = (step + 1) * config.batch_size
            run.append("metrics.jsonl", {"step": step + 1, "images_seen": seen, "loss": value})
    return {"images_seen": total * config.batch_size, "seconds": round(time.perf_counter() - start, 1)}


def check(config: BaselineConfig) -> None:
    """Raises UserError for settings that nothing can be trained with."""
    if config.method not in METHODS:
        raise UserError(f"There is no method '{config.method}'.", f"Methods: {', '.join(METHODS)}.")
    if config.batch_size < 2 or config.images_seen < config.batch_size:
        raise UserError(
            f"{config.images_seen} images make no batch of {config.batch_size} (at least 2).",
            "Raise --images-seen, or lower --batch-size.",
        )
    if config.method != "ddep":
        lightly_parts()
    if not 0 <= setting(config, "ema") <= 1 or min(config.queue, config.width, config.noise) <= 0:
        raise UserError("ema is no share, or queue, width or noise is not above 0.", "Give others.")


def main() -> None:
    config = tyro.cli(BaselineConfig, description=__doc__)
    try:
        folder = pretrain_baseline(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(
        json.dumps({"backbone": str(folder), "next": f"dreamteacher evaluate --init {folder} --method ..."})
    )


if __name__ == "__main__":
    main()
