"""Images a second and peak memory of every family of teachers, at a common size, as pretraining runs them.

Published widths with random weights: neither speed nor memory depends on what they are. Each network runs in a
process of its own, so that its peak memory is its own; the first pass is not timed. Where a network has one
size of its own, that is the size (column `size`).

    python benchmarks/teachers/run.py --out benchmarks/teachers/teachers.csv
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dreamteacher import __version__
from dreamteacher.runtime.distributed.device import autocast, pick_device, resolve_precision
from dreamteacher.teachers.base import Teacher
from dreamteacher.teachers.biggan import teacher as big
from dreamteacher.teachers.diffusion.teacher import DiffusionSpec, DiffusionTeacher, build_unet
from dreamteacher.teachers.stable_diffusion.teacher import (
    StableDiffusionSpec,
    StableDiffusionTeacher,
    build_network,
)
from dreamteacher.teachers.stylegan2.teacher import Generator, StyleGan2Spec, StyleGan2Teacher
from dreamteacher.teachers.training.diffusion import PRESETS, network_spec
from dreamteacher.teachers.vae import CLASSES, VaeSpec, VaeTeacher

KL_F8: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4,
}  # fmt: skip
SD_1: dict[str, Any] = {
    "in_channels": 4, "out_channels": 4, "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "cross_attention_dim": 768, "attention_head_dim": 8,
}  # fmt: skip


def random_weights(module: nn.Module) -> nn.Module:
    """Memory for a network that was built on the meta device: uniform by fan-in, scales 1, the rest 0.

    A million numbers are drawn and repeated: drawing them all would take seconds.
    """
    drawn = torch.rand(2**20, generator=torch.Generator().manual_seed(0)) * 2 - 1
    module.to_empty(device="cpu")
    with torch.no_grad():
        for name, p in [*module.named_parameters(), *module.named_buffers()]:
            if p.ndim > 1:
                bound = (3 / p[0].numel()) ** 0.5
                for part in p.view(-1).split(len(drawn)):
                    torch.mul(drawn[: len(part)], bound, out=part)
            else:
                p.fill_(float(name.endswith(("weight", "scale", "var"))))
    return module


def adm(size: int) -> Teacher:
    spec = network_spec(PRESETS["adm-256"], (size, size), 3, "linear")
    with torch.device("meta"):
        unet = build_unet(spec)
    return DiffusionTeacher(random_weights(unet), spec, name="adm-256", licence="-")


def ddpm(size: int) -> Teacher:
    plain, attention = ["DownBlock2D"] * 4, ["UpBlock2D"] * 4
    spec = DiffusionSpec(
        unet={
            "in_channels": 3, "out_channels": 3, "block_out_channels": [128, 128, 256, 256, 512, 512],
            "layers_per_block": 2, "down_block_types": [*plain, "AttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "AttnUpBlock2D", *attention], "attention_head_dim": None,
        },
        size=(size, size),
    )  # fmt: skip
    with torch.device("meta"):
        unet = build_unet(spec)
    return DiffusionTeacher(random_weights(unet), spec, name="ddpm-256", licence="-")


def stylegan2(size: int) -> Teacher:
    widths = (512, 512, 512, 512, 256, 128, 64)  # of 4, 8 ... 256 px, as published for 256 px
    spec = StyleGan2Spec(size=(size, size), channels=widths[: size.bit_length() - 2])
    with torch.random.fork_rng(devices=[]):
        generator = Generator(spec)
    return StyleGan2Teacher(generator, name="stylegan2", licence="-")


def biggan(channels: tuple[int, ...], attention: int, features: int) -> Teacher:
    spec = big.BigGanSpec(
        channels=channels, attention=(attention,), latent=20 if features == 0 else 17, features=features,
        feature_width=512 if features else 0, classes=0 if features else 1, class_width=0 if features else 128,
    )  # fmt: skip
    with torch.device("meta"):
        network = big.build_network(spec)
    bank = torch.nn.functional.normalize(torch.rand(16, features), dim=1) if features else None
    return big.BigGanTeacher(random_weights(network), name="biggan", licence="-", bank=bank)


def vae(kind: str, config: dict[str, Any], size: int) -> Teacher:
    with torch.device("meta"):
        network = CLASSES[kind](**config)
    spec = VaeSpec(kind=kind, config=config, size=(size, size))
    return VaeTeacher(random_weights(network), spec, name=f"vae-{kind}", licence="-")


def stable_diffusion(kind: Literal["kl", "tiny"], size: int) -> Teacher:
    spec = StableDiffusionSpec(
        unet=SD_1, vae=KL_F8 if kind == "kl" else {}, vae_kind=kind, size=(size, size),
        scaling_factor=0.18215 if kind == "kl" else 1.0,
    )  # fmt: skip
    with torch.device("meta"):
        network = build_network(spec)
    return StableDiffusionTeacher(random_weights(network), spec, name=f"sd-{kind}", licence="-")


NETWORKS: dict[str, tuple[str, Callable[[int], Teacher]]] = {
    "ADM-256": ("encode", adm),
    "DDPM-256": ("encode", ddpm),
    "Stable Diffusion 1.x, KL": ("encode", lambda size: stable_diffusion("kl", size)),
    "Stable Diffusion 1.x, TAESD": ("encode", lambda size: stable_diffusion("tiny", size)),
    "StyleGAN2-256": ("sample", stylegan2),
    "IC-GAN-256": ("sample", lambda size: biggan((1536, 1536, 768, 768, 384, 192, 96), 3, 2048)),
    "BigBiGAN-128": ("sample", lambda size: biggan((1536, 1536, 768, 384, 192, 96), 3, 0)),
    "VAE, KL-f8": ("encode", lambda size: vae("kl", KL_F8, size)),
    "VAE, TAESD": ("encode", lambda size: vae("tiny", {}, size)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--one", help="measure this network in this process and print a line of JSON")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args)))
        return
    rows = []
    for name in args.networks:
        command = [sys.executable, __file__, "--one", name, "--size", str(args.size), "--batch-size"]
        command += [str(args.batch_size), "--rounds", str(args.rounds), "--precision", args.precision]
        done = subprocess.run([*command, "--device", args.device], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    if args.out:
        with open(args.out, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row: what pretraining does with this teacher, timed pass by pass, and the peak of this process."""
    mode, make = NETWORKS[name]
    device = pick_device(args.device)
    teacher = make(args.size)
    whole = sum(p.numel() for p in teacher.parameters())
    teacher.keep_only(mode)
    teacher.to(device)
    images = torch.rand(args.batch_size, 3, *teacher.size, generator=torch.Generator().manual_seed(0)).to(
        device
    )
    generator = torch.Generator(device).manual_seed(0)

    def act() -> None:
        with torch.no_grad(), autocast(device, args.precision):
            if mode == "encode":
                teacher.encode(images, generator=generator)
            else:
                teacher.sample(args.batch_size, generator=generator)
        if device.type == "cuda":
            torch.cuda.synchronize()

    with FlopCounterMode(display=False) as counter:
        act()
    seconds = []
    for _ in range(args.rounds):
        begin = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    images_per_s = args.batch_size / statistics.median(seconds)
    gmacs = counter.get_total_flops() / 2e9 / args.batch_size
    return {
        "network": name, "family": teacher.family, "mode": mode, "size": " ".join(map(str, teacher.size)),
        "levels": " ".join(f"{s.stride}:{s.channels}" for s in teacher.specs),
        "parameters_m": f"{whole / 1e6:.1f}",
        "kept_m": f"{sum(p.numel() for p in teacher.parameters()) / 1e6:.1f}",
        "gmacs": f"{gmacs:.1f}", "batch": args.batch_size, "images_per_s": f"{images_per_s:.3f}",
        "gmacs_per_s": f"{gmacs * images_per_s:.0f}", "peak_gb": f"{peak / 1e9:.2f}", "rounds": args.rounds,
        "device": f"{device} x {torch.get_num_threads()} threads",
        "precision": str(resolve_precision(device, args.precision)).removeprefix("torch."),
        "torch": torch.__version__, "version": __version__, "machine": platform.machine(),
    }  # fmt: skip


if __name__ == "__main__":
    main()
