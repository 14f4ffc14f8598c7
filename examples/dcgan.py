"""A small GAN of one's own as the teacher: a DCGAN (Radford et al. 2016) that draws faces at 32 pixels.

At 32 pixels its maps lie at strides 8, 4 and 2, of which 8 and 4 can teach. Weights: a plain PyTorch state
dict, not part of this project; say where it is in DREAMTEACHER_DCGAN (default: FILE in the current folder).

    dreamteacher pretrain --teacher examples/dcgan.py:teacher --dataset synthesized \\
        --student resnet18 --out runs/small-faces
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from dreamteacher.runtime.errors import UserError
from dreamteacher.teachers.module import ModuleTeacher

FILE = "dcgan_celeba32_generator.pt"
LATENT = 100


def up(channels_in: int, channels_out: int) -> nn.Sequential:
    """Twice the size: transposed convolution, BatchNorm, LeakyReLU."""
    return nn.Sequential(
        nn.ConvTranspose2d(channels_in, channels_out, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.LeakyReLU(0.2),
    )


class Generator(nn.Module):
    """z (N x 100, uniform in [-1, 1]) -> RGB in [-1, 1], N x 3 x 32 x 32."""

    def __init__(self) -> None:
        super().__init__()
        self.generator_deconv = nn.Sequential(
            nn.Sequential(nn.ConvTranspose2d(LATENT, 256, 4, bias=False), nn.BatchNorm2d(256)),
            nn.Sequential(
                nn.Conv2d(256, 128, 3, padding=1, bias=False), nn.BatchNorm2d(128), nn.LeakyReLU(0.2)
            ),
            up(128, 64),
            up(64, 32),
            nn.Sequential(nn.ConvTranspose2d(32, 3, 4, stride=2, padding=1), nn.Tanh()),
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.generator_deconv(z[:, :, None, None])


def teacher() -> ModuleTeacher:
    """The teacher that `--teacher examples/dcgan.py:teacher` names.

    Raises:
        UserError: when the weights are not where DREAMTEACHER_DCGAN says.
    """
    path = Path(os.environ.get("DREAMTEACHER_DCGAN", FILE))
    if not path.is_file():
        raise UserError(
            f"The DCGAN's weights are not at '{path}'.", f"Set DREAMTEACHER_DCGAN to the path of {FILE}."
        )
    generator = Generator()
    generator.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return ModuleTeacher(
        generator,
        name="dcgan-celeba-32",
        licence="Apache-2.0 (trained on CelebA, whose terms are non-commercial)",
        size=(32, 32),
        levels={8: "generator_deconv.1", 4: "generator_deconv.2"},
        sample=lambda n, g: torch.rand(n, LATENT, generator=g, device=g.device) * 2 - 1,
        to_images=lambda out: (out + 1) / 2,
    )
