"""The instances that an instance-conditional GAN is told of: ResNet-50 features of the user's own images."""

from __future__ import annotations

import sys
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from tqdm import tqdm

from dreamteacher.data.image_set import ImageSet, load_images
from dreamteacher.data.images import to_float
from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.distributed.device import autocast
from dreamteacher.runtime.errors import UserError, shorten
from dreamteacher.runtime.settings import Precision
from dreamteacher.teachers.biggan.convert import read_tensors

_RESIZED, _CROP = 256, 224  # pixels: the usual evaluation of ImageNet networks
_HEADS = ("fc.", "projection_head.", "prototypes.")


def bank_images(folder: Path) -> ImageSet:
    """The images of a folder at 256 x 256 (short side scaled, centre kept), decoded only when they are used.

    Raises:
        UserError: no folder, or no readable image in it.
    """
    return load_images(folder, (_RESIZED, _RESIZED), cache_gb=0)


def load_embedder(path: Path) -> nn.Module:
    """A ResNet-50 without its classifier: normalised images N x 3 x H x W -> pooled features N x 2048.

    Args:
        path: weights with torchvision's names (timm's are the same), .pth or .safetensors, under any prefix
            ("module." in SwAV's); classifiers, projection heads and prototypes are left out.

    Raises:
        UserError: the file cannot be read, or holds no ResNet-50.
    """
    tensors, last = read_tensors(path), "layer4.2.conv3.weight"
    ends = [k for k in tensors if k == last or k.endswith(f".{last}")]
    if len(ends) != 1 or tensors[ends[0]].shape != (2048, 512, 1, 1):
        raise UserError(
            f"'{path}' holds no ResNet-50 with 2048 features ({len(ends)} tensors '{last}'; it has "
            f"{shorten(tensors, 2)}).",
            "Give the weights of one ResNet-50 with torchvision's names: SwAV's, torchvision's or timm's.",
        )
    prefix = ends[0].removesuffix(last)
    own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    with torch.random.fork_rng(devices=[]):  # first weights are drawn before these replace them
        model = timm.create_model("resnet50", pretrained=False, num_classes=0)
    counters = {k: v for k, v in model.state_dict().items() if k.endswith("num_batches_tracked")}
    checkpoint.load_exactly(
        model, {**counters, **{k: v for k, v in own.items() if not k.startswith(_HEADS)}}, path
    )
    return model.requires_grad_(False).eval()


@torch.no_grad()
def build_bank(
    images: ImageSet | Path,
    embedder: nn.Module | Path,
    *,
    limit: int = 10_000,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    precision: Precision = "float32",
) -> Tensor:
    """L2-normalised features of at most `limit` images, spread evenly over their order: float32 K x D.

    Args:
        images: a folder, or what `bank_images` gives (or a set at 224 x 224, taken as it is).
        embedder: weights for `load_embedder`, or a network of one's own: ImageNet-normalised
            N x 3 x 224 x 224 -> N x D. It is put into evaluation mode for the time being, and on `device`.

    Raises:
        UserError: nothing readable, images of another size, or an embedder that gives no finite N x D.

    Source: Casanova et al. 2021 (IC-GAN), sec. 3: neighbourhoods of L2-normalised self-supervised ResNet-50
    features. Images: short side 256, centre 224, ImageNet's mean and deviation.
    """
    device = torch.device(device)
    found = images if isinstance(images, ImageSet) else bank_images(images)
    if found.size not in ((_RESIZED, _RESIZED), (_CROP, _CROP)):
        raise UserError(
            f"An instance bank takes images at 256 x 256 or 224 x 224, not {found.size[0]} x {found.size[1]}.",
            "Give the folder, or what bank_images(folder) returns.",
        )
    model = (embedder if isinstance(embedder, nn.Module) else load_embedder(embedder)).to(device)
    was_training = model.training
    model.eval()
    parts = []
    try:
        for indices in tqdm(
            chosen(len(found), limit).split(batch_size), "instance bank", disable=not sys.stderr.isatty()
        ):
            with autocast(device, precision):
                features = model(_normalised(found.get(indices).to(device)))
            parts.append(_checked(features, len(indices)))
    finally:
        model.train(was_training)
    return torch.cat(parts)


def chosen(count: int, limit: int) -> Tensor:
    """int64 places of at most `limit` of `count` images, evenly spread.

    Raises:
        UserError: for a limit below 1.

    Example:
        >>> chosen(10, 4).tolist()
        [0, 2, 5, 7]
    """
    if limit < 1:
        raise UserError(f"A bank of {limit} instances is empty.", "Give a limit of at least 1.")
    kept = min(count, limit)
    return torch.arange(kept) * count // kept


def bank_labels(images: ImageSet, classes: int, *, limit: int = 10_000) -> Tensor:
    """Class ids (int64 K) of the images that `build_bank` takes: the places of their folders in sorted order.

    Args:
        classes: how many the network was trained with. There must be a folder for each, since a part of them
            would get other numbers than in training.

    Raises:
        UserError: the folder has another number of classes.
    """
    if images.labels is None or len(images.classes) != classes:
        raise UserError(
            f"The network is told of {classes} classes; '{images.folder}' has {len(images.classes)} class folders.",
            "Give images in one folder per class, named so that they sort as the training classes did.",
        )
    return images.labels[chosen(len(images), limit)]


def _normalised(pixels: Tensor) -> Tensor:
    """uint8 N x 3 x H x W -> the centre 224 x 224 in ImageNet's units."""
    low = (pixels.shape[-1] - _CROP) // 2
    x = to_float(pixels[..., low : low + _CROP, low : low + _CROP])
    mean, std = (
        torch.tensor(v, device=x.device).view(3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


def _checked(features: Tensor, count: int) -> Tensor:
    if features.dim() != 2 or len(features) != count or not bool(torch.isfinite(features).all()):
        raise UserError(
            f"The embedder gives {tuple(features.shape)} for {count} images, not finite features {count} x D.",
            "Give a network that ends in pooled features, without NaN or infinity in its weights.",
        )
    return F.normalize(features.float(), dim=1).cpu()
