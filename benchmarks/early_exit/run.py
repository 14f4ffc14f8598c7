"""How much does a diffusion teacher save by stopping after its last wanted decoder level?

Two things are timed in turn, again and again, in one process, on the same image, noise, network and precision (random
weights of the size of ADM-256 cost what trained ones cost):
  full  - how DDPM-seg takes features: the network's own forward, to its last layer, with hooks on four modules that
          collect their outputs
  early - what `pretrain` runs: `encode`, which stops after the map at stride 4
Both return the same four maps. The claim is the median over rounds of full / early, target 2.2. Beside it: the ratio
of multiply-accumulates that torch's counter finds, and the largest difference between the maps of both, target 0.0.

    python benchmarks/early_exit/run.py --out benchmarks/early_exit/early_exit.csv
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dreamteacher import __version__
from dreamteacher.runtime.distributed.device import autocast, pick_device, resolve_precision
from dreamteacher.teachers.diffusion.teacher import DiffusionSpec, DiffusionTeacher, build_unet, decoder_maps
from dreamteacher.teachers.training.diffusion import PRESETS, network_spec

BUSY = os.getloadavg()[0]  # of other processes: this one has just begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--preset", choices=list(PRESETS), default="adm-256")
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="none: the preset's")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()

    device = pick_device(args.device)
    spec = published(PRESETS[args.preset].size if args.size is None else tuple(args.size), args.preset)
    levels = sum(s.stride <= 32 for s in meta_teacher(spec).specs)
    full_gmacs, early_gmacs = gmacs(spec, args.batch_size)
    teacher = random_teacher(spec).to(device)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(args.batch_size, 3, *spec.size, generator=generator).to(device)
    t = torch.full((args.batch_size,), spec.timestep, device=device)

    def early() -> list[Tensor]:
        return teacher.encode(images, generator=torch.Generator(device).manual_seed(1))

    def full() -> list[Tensor]:
        return hooked(teacher, images, t, torch.Generator(device).manual_seed(1))

    with autocast(device, args.precision):
        difference = largest_difference(full(), early())  # which also warms both up
        times: dict[str, list[float]] = {"full": [], "early": []}
        for round_ in range(args.rounds):
            acts: list[tuple[str, Callable[[], object]]] = [("full", full), ("early", early)]
            for kind, act in acts if round_ % 2 == 0 else reversed(acts):
                begin = time.perf_counter()
                act()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times[kind].append(time.perf_counter() - begin)
            print(
                f"round {round_}: full {times['full'][-1]:.2f} s, early {times['early'][-1]:.2f} s",
                flush=True,
            )
    ratios = [f / e for f, e in zip(times["full"], times["early"], strict=True)]
    row = {
        "network": args.preset, "size": " ".join(map(str, spec.size)), "batch": args.batch_size,
        "parameters_m": f"{sum(p.numel() for p in teacher.parameters()) / 1e6:.1f}", "levels": levels,
        "full_s": f"{statistics.median(times['full']):.3f}",
        "early_s": f"{statistics.median(times['early']):.3f}",
        "speedup_median": f"{statistics.median(ratios):.4f}",
        "speedup_quartiles": " ".join(f"{q:.4f}" for q in statistics.quantiles(ratios, n=4)[::2]),
        "full_gmacs": f"{full_gmacs:.2f}", "early_gmacs": f"{early_gmacs:.2f}",
        "gmacs_ratio": f"{full_gmacs / early_gmacs:.4f}", "max_abs_difference": f"{difference}",
        "rounds": args.rounds, "device": f"{device} x {torch.get_num_threads()} threads",
        "precision": str(resolve_precision(device, args.precision)).removeprefix("torch."),
        "torch": torch.__version__, "version": __version__, "machine": platform.machine(),
        "load": f"{BUSY:.2f}",
        "command": "python benchmarks/early_exit/run.py " + " ".join(sys.argv[1:]),
    }  # fmt: skip
    for key, value in row.items():
        print(f"{key:20} {value}")
    if args.out:
        with open(args.out, "w", newline="") as file:
            writer = csv.DictWriter(file, row)
            writer.writeheader()
            writer.writerow(row)


def published(size: tuple[int, int], preset: str) -> DiffusionSpec:
    """The preset's network with a learned sigma, as the published checkpoints have it: twice the outputs."""
    spec = network_spec(PRESETS[preset], size, 3, "linear")
    return replace(spec, unet={**spec.unet, "out_channels": 2 * spec.unet["out_channels"]})


def meta_teacher(spec: DiffusionSpec) -> DiffusionTeacher:
    """The teacher without memory for its weights: shapes only."""
    with torch.device("meta"):
        return DiffusionTeacher(build_unet(spec), spec, name="meta", licence="-")


def gmacs(spec: DiffusionSpec, batch: int) -> tuple[float, float]:
    """Multiply-accumulates in 10^9 for a batch: of the full forward, and to the last wanted level."""
    teacher = meta_teacher(spec)
    height, width = (s // spec.patch for s in spec.size)
    x = torch.empty(batch, spec.unet["in_channels"], height, width, device="meta")
    t = torch.zeros(batch, device="meta")
    count = teacher._places[0][0] + 1  # the finest wanted level
    with torch.no_grad():
        with FlopCounterMode(display=False) as full:
            teacher.unet(x, t)
        with FlopCounterMode(display=False) as early:
            decoder_maps(teacher.unet, x, t, count)
    return full.get_total_flops() / 2e9, early.get_total_flops() / 2e9


def random_teacher(spec: DiffusionSpec) -> DiffusionTeacher:
    """A network whose weights keep activations near 1: uniform by fan-in, norms 1, biases 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        unet = build_unet(spec)
    unet.to_empty(device="cpu")
    with torch.no_grad():
        for name, p in unet.named_parameters():
            if p.ndim > 1:
                bound = (3 / p[0].numel()) ** 0.5
                p.uniform_(-bound, bound, generator=generator)
            else:
                p.fill_(1.0 if name.endswith("weight") else 0.0)
    return DiffusionTeacher(unet, spec, name="random", licence="-")


@torch.no_grad()
def hooked(teacher: DiffusionTeacher, images: Tensor, t: Tensor, generator: torch.Generator) -> list[Tensor]:
    """The teacher's levels, fine to coarse, collected by output hooks during the network's own whole forward."""
    caught: dict[int, Tensor] = {}
    hooks = []
    for (i,) in teacher._places:
        block = teacher.unet.up_blocks[i]
        attentions = getattr(block, "attentions", None)
        last = attentions[-1] if attentions else block.resnets[-1]
        hooks.append(last.register_forward_hook(lambda _m, _a, out, i=i: caught.__setitem__(i, out)))
    try:
        x, _ = teacher._noisy(images, generator)
        teacher.unet(x, t)
    finally:
        for hook in hooks:
            hook.remove()
    return [caught[i] for (i,) in teacher._places]


def largest_difference(theirs: list[Tensor], ours: list[Tensor]) -> float:
    assert all(bool(m.isfinite().all()) for m in theirs)
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    main()
