"""Parts for a notebook: teachers, images and pictures of features, with plain values for arguments."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dreamteacher.data import image_set
from dreamteacher.data.pictures import Pictures, to_batch
from dreamteacher.face.arguments import called_from_python
from dreamteacher.models.student import Student
from dreamteacher.reports.charts import pca_basis, pca_colours
from dreamteacher.runtime.errors import UserError
from dreamteacher.spec import Noise
from dreamteacher.teachers import registry
from dreamteacher.teachers.base import Teacher


def load_teacher(
    name: str | os.PathLike[str],
    *,
    t: int | Sequence[int] = (),
    noise: Noise = "stochastic",
    blocks: int | Sequence[int] = (),
    psi: float = 1.0,
    device: torch.device | str = "cpu",
) -> Teacher:
    """A frozen teacher.

    Args:
        name: of `list_teachers`, a folder that `train_teacher` or `get_teacher` made, or FILE.py:FUNCTION.
        t: timesteps of a diffusion teacher; none: the one that its card recommends.
        noise: how a diffusion teacher noises images.
        blocks: decoder blocks of a diffusion U-Net whose outputs are the maps; none: the paper's levels.
        psi: truncation of a GAN's samples; 1: none.
        device: where it runs.

    Example:
        >>> teacher = load_teacher("chest-xray-64", t=50)
        >>> [tuple(m.shape) for m in teacher.features(Image.new("L", (100, 80)))]
        [(1, 64, 16, 16), (1, 128, 8, 8), (1, 128, 4, 4), (1, 128, 2, 2)]
    """
    with called_from_python():
        return registry.load_teacher(
            os.fspath(name),
            timesteps=_several(t),
            noise=noise,
            blocks=_several(blocks),
            psi=psi,
            device=device,
        )


def _several(values: int | Sequence[int]) -> tuple[int, ...]:
    return (values,) if isinstance(values, int) else tuple(values)


def list_teachers() -> list[str]:
    """Names of teachers: those that are here, then those that `get_teacher` fetches.

    Example:
        >>> list_teachers()[:2]
        ['chest-xray-64', 'chest-xray-gan-64']
    """
    from dreamteacher.teachers.published.known import KNOWN, fetched

    return list({**registry.EMBEDDED, **fetched(), **KNOWN})


def load_images(
    folder: str | os.PathLike[str], size: int | tuple[int, int], **settings: Any
) -> image_set.ImageSet:
    """Every readable image of a folder.

    Args:
        folder: searched recursively; subfolders are classes. Or LAYOUT:ROOT of a public data set.
        size: height and width that every image is brought to, or one number for both.
        settings: strict, cache_gb, workers and part of `data.image_set.load_images`.
    """
    with called_from_python():
        return image_set.load_images(
            Path(folder), (size, size) if isinstance(size, int) else size, **settings
        )


@torch.no_grad()
def show_features(
    network: Teacher | nn.Module,
    pictures: Pictures,
    *,
    size: int | tuple[int, int] | None = None,
    generator: torch.Generator | None = None,
) -> Image.Image:
    """A picture of features: a row for each picture, then each level's first three principal components as colours.

    The components of a level are those of all the pictures together, so that equal colours mean equal features.

    Args:
        network: a teacher, a student, or another module that gives maps of images in [0, 1].
        pictures: one or several paths, PIL pictures or tensors.
        size: height and width that they are brought to, or one number for both; None: a teacher's own, else 224.
        generator: source of a teacher's noise; None: a new one with seed 0.

    Example:
        >>> from dreamteacher.models.student import create_student
        >>> show_features(create_student("resnet18"), [Image.new("RGB", (64, 64))] * 2, size=64).size
        (328, 130)
    """
    with called_from_python():
        own = network.size if isinstance(network, Teacher) else (224, 224)
        height, width = (size, size) if isinstance(size, int) else size or own
        images = to_batch(pictures, (height, width))
        if isinstance(network, Teacher):
            maps: Sequence[Tensor] = network.features(images, size=(height, width), generator=generator)
        else:
            maps = _maps(network, images)
    columns = [(images * 255).round().to(torch.uint8)]
    for level in maps:
        colours = pca_colours(level.float(), pca_basis(level.float()))
        rows, across = torch.arange(height) * colours.shape[2] // height, torch.arange(width)
        columns.append(colours[:, :, rows][..., across * colours.shape[3] // width])
    return _sheet(columns)


def _maps(network: nn.Module, images: Tensor) -> Sequence[Tensor]:
    """The maps of a module that is no teacher, in evaluation mode, which it leaves as it was."""
    device = next(network.parameters(), torch.empty(0)).device
    was_training = network.training
    network.eval()
    try:
        maps = network(images.to(device))
    finally:
        network.train(was_training)
    if not isinstance(maps, list | tuple) or any(not isinstance(m, Tensor) or m.ndim != 4 for m in maps):
        raise UserError(
            f"{type(network).__name__} gives no list of maps N x C x H x W.",
            f"Give a teacher, or a {Student.__name__} (`create_student`).",
        )
    return maps


def _sheet(columns: Sequence[Tensor], gap: int = 2) -> Image.Image:
    """Columns of uint8 pictures N x 3 x H x W, with white between them."""
    n, _, height, width = columns[0].shape
    sheet = torch.full(
        (3, n * (height + gap) - gap, len(columns) * (width + gap) - gap), 255, dtype=torch.uint8
    )
    for i, column in enumerate(columns):
        for j, picture in enumerate(column):
            top, left = j * (height + gap), i * (width + gap)
            sheet[:, top : top + height, left : left + width] = picture
    pixels = sheet.permute(1, 2, 0).contiguous()
    return Image.frombytes("RGB", (pixels.shape[1], pixels.shape[0]), bytes(pixels.flatten().tolist()))
