"""Plain vision transformers of timm: one map of tokens at one stride, at any image size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

# timm modules whose networks are made for one image size, and take any with a setting that changes no weight.
PLAIN_MODULES = ("deit", "eva", "vision_transformer", "vision_transformer_hybrid")
SWIN_MODULES = ("swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr")


class Grid(NamedTuple):
    """How a plain ViT cuts an image into tokens.

    Args:
        patch: pixels per side of a token that the network was made for.
        stride: pixels of the given image per side of a token: the power of two that is nearest to `patch`.
    """

    patch: int
    stride: int


def size_settings(name: str) -> dict[str, Any]:
    """The settings of `timm.create_model` with which a network takes images of any size; most need none.

    Example:
        >>> size_settings("vit_tiny_patch16_224"), size_settings("resnet18")
        ({'dynamic_img_size': True}, {})
    """
    from timm.models import is_model_in_modules

    if is_model_in_modules(name, PLAIN_MODULES):
        return {"dynamic_img_size": True}
    return {"strict_img_size": False} if is_model_in_modules(name, SWIN_MODULES) else {}


def rebuilt_with(name: str, model: Any) -> dict[str, Any]:
    """The settings with which timm makes a network like `model`, whatever its default image size: see `size_settings`.

    Position embeddings and windows have a size of their own, which timm would else take from its defaults.
    """
    settings: dict[str, Any] = {**size_settings(name)}
    if settings and model.patch_embed.img_size is not None:
        settings["img_size"] = list(model.patch_embed.img_size)
    return settings


def grid_of(model: nn.Module) -> Grid | None:
    """How a plain ViT sees an image; None for every other network (one with several levels, or other tokens)."""
    from timm.models import Eva, VisionTransformer

    if not isinstance(model, VisionTransformer | Eva):
        return None
    info: Any = model.feature_info
    levels: Sequence[Mapping[str, Any]] = list(info)
    reductions = {level["reduction"] for level in levels}
    if len(reductions) != 1:
        return None
    (patch,) = reductions
    return Grid(int(patch), 2 ** round(math.log2(patch)))


def fitting(size: tuple[int, int], grid: Grid | None) -> tuple[int, int]:
    """(height, width) of `size` as `fit` makes it.

    Example:
        >>> fitting((224, 60), Grid(14, 16)), fitting((224, 64), Grid(16, 16))
        ((196, 56), (224, 64))
    """
    if grid is None:
        return size
    height, width = (-(-side // grid.stride) * grid.patch for side in size)
    return height, width


def fit(x: Tensor, grid: Grid | None) -> Tensor:
    """Images N x 3 x H x W at the size of which a plain ViT makes ceil(H / stride) x ceil(W / stride) tokens.

    They are as they were where patch and stride are the same and divide both sides; else they are resized
    (bilinear, antialiased), so that a token of 14 pixels covers 16 of the image, and no border is cut or padded.
    """
    size = (x.shape[-2], x.shape[-1])
    wanted = fitting(size, grid)
    if wanted == size:
        return x
    return F.interpolate(x, size=wanted, mode="bilinear", align_corners=False, antialias=True)


def pooled_tokens(model: Any, x: Tensor) -> Tensor:
    """Normalised images that fit -> N x C, pooled as timm's classifier of this network would see them.

    That is the class token, the mean of the patches, or attention pooling, by the model's `global_pool`; a
    model without one gives the mean of the patches.
    """
    tokens = model.forward_features(x)
    if not model.global_pool:
        return tokens[:, model.num_prefix_tokens :].mean(1)
    return model.forward_head(tokens, pre_logits=True)
