"""A module of one's own as the teacher: a progressive GAN (Karras et al. 2018) that draws faces at 128 pixels.

Weights: a safetensors file of a generator trained on CelebA, in the layout that `Generator` below has. They
are not part of this project; say where they are in DREAMTEACHER_PROGAN (default: FILE in the current folder).

    python examples/progressive_gan.py --out docs/images/faces.jpg
    dreamteacher pretrain --teacher examples/progressive_gan.py:teacher --dataset synthesized \\
        --student resnet18 --out runs/faces
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import make_grid

from dreamteacher.runtime.errors import UserError
from dreamteacher.teachers.module import ModuleTeacher

FILE = "progan128_celeba_fp16.safetensors"
LATENT = 512


def pixel_norm(x: Tensor) -> Tensor:
    """Each position's vector divided by its root mean square over channels."""
    return x / torch.sqrt(x.square().mean(1, keepdim=True) + 1e-8)


class Block(nn.Module):
    """Two convolutions, each with LeakyReLU and pixel norm; the map is enlarged x2 first unless it is the first."""

    def __init__(self, channels_in: int, channels_out: int, *, first: bool = False) -> None:
        super().__init__()
        self.first = first
        kernel, padding = (4, 3) if first else (3, 1)  # 1 x 1 padded by 3: the first kernel gives 4 x 4
        self.conv0 = nn.Conv2d(channels_in, channels_out, kernel, padding=padding)
        self.conv1 = nn.Conv2d(channels_out, channels_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if not self.first:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        x = pixel_norm(F.leaky_relu(self.conv0(x), 0.2))
        return pixel_norm(F.leaky_relu(self.conv1(x), 0.2))


class Generator(nn.Module):
    """z (N x 512, normal) -> RGB about [0, 1], N x 3 x 128 x 128; block k works at 4 * 2^k pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.block0 = Block(LATENT, 512, first=True)
        self.block1 = Block(512, 512)
        self.block2 = Block(512, 512)
        self.block3 = Block(512, 512)
        self.block4 = Block(512, 256)
        self.block5 = Block(256, 128)
        self.to_rgb = nn.Conv2d(128, 3, 1)

    def forward(self, z: Tensor) -> Tensor:
        x = pixel_norm(z)[:, :, None, None]
        for block in (self.block0, self.block1, self.block2, self.block3, self.block4, self.block5):
            x = block(x)
        return self.to_rgb(x)


def teacher() -> ModuleTeacher:
    """The teacher that `--teacher examples/progressive_gan.py:teacher` names.

    Raises:
        UserError: when the weights are not where DREAMTEACHER_PROGAN says.
    """
    path = Path(os.environ.get("DREAMTEACHER_PROGAN", FILE))
    if not path.is_file():
        raise UserError(
            f"The progressive GAN's weights are not at '{path}'.",
            f"Set DREAMTEACHER_PROGAN to the path of {FILE}.",
        )
    generator = Generator()
    generator.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return ModuleTeacher(
        generator,
        name="progan-celeba-128",
        licence="Apache-2.0 (trained on CelebA, whose terms are non-commercial)",
        size=(128, 128),
        levels={32: "block0", 16: "block1", 8: "block2", 4: "block3"},
        sample=lambda n, g: torch.randn(n, LATENT, generator=g, device=g.device),
        # As published. It cuts about 4 values in 10, hence the hard contrasts.
        to_images=lambda out: out.clamp(0, 1),
    )


def main() -> None:
    """Writes a sheet of samples."""
    parser = argparse.ArgumentParser(description="Draws a sheet of faces.")
    parser.add_argument("--out", type=Path, required=True, help="picture to write (.jpg or .png)")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--columns", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    images, _ = teacher().sample(args.rows * args.columns, generator=torch.Generator().manual_seed(args.seed))
    sheet = make_grid(images, nrow=args.columns, padding=2, pad_value=1.0)
    to_pil_image(sheet).save(args.out, quality=88, optimize=True)
    print(f"{args.out}: {args.rows} x {args.columns} samples, seed {args.seed}")


if __name__ == "__main__":
    main()
