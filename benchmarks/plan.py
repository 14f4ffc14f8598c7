"""What a large pretraining takes: teacher passes, student steps, disk, nodes. Pure arithmetic for docs/scaling.md.

Measured or counted: GMACs (benchmarks/teachers, benchmarks/scaling), images a second on a CPU (benchmarks/teachers). Bytes
of a stored item follow from its layout (a test holds `item_bytes` to what `make-features` writes). Assumed: the rate of a
GPU. Facts of others: images of the data sets, the paper's epochs.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
# Operations a second of an H100 in a teacher and in a student's step: assumed, as in recipes/cost.py.
DENOISER_SPEED, BACKBONE_SPEED = 250e12, 75e12
GPUS_A_NODE = 8
SHARD_BYTES = 256e6  # `make-features --shard-mb`
DAY = 24.0

IMAGENET, BEDROOMS, CATS, BDD100K = 1_281_167, 3_033_042, 1_657_266, 70_000


class Source(NamedTuple):
    """A teacher as planned with: its name in the CSV, GMACs of an image, whether it encodes real images (then its maps
    can be kept) or draws its own, and images a second where that was measured."""

    name: str
    gmacs: float
    encodes: bool
    cpu_images_per_s: float | None


class Example(NamedTuple):
    """One pretraining: data, its images, pixels, teacher, student, epochs (the paper's), stored draws of an image."""

    data: str
    images: int
    size: tuple[int, int]
    teacher: Source
    student: str
    epochs: int
    draws: int = 2


class Stored(NamedTuple):
    """GPU-hours of making a store and of the student that reads it, bytes and shards of the store, bytes a second that
    one GPU reads, nodes that end in a day."""

    making: float
    student: float
    bytes: float
    shards: int
    read_bytes_per_s: float
    nodes: int


class Plan(NamedTuple):
    """GPU-hours with the teacher at every step, nodes that end in a day, and the same with a store, where there can be
    one."""

    online: float
    nodes: int
    stored: Stored | None


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def seconds(teacher: float, student: float) -> float:
    """GPU-seconds of so many GMACs of a teacher and of a student's steps."""
    return 2e9 * (teacher / DENOISER_SPEED + student / BACKBONE_SPEED)


def sources() -> dict[str, Source]:
    """Every teacher that has been counted, by name."""
    found = {}
    for r in rows(HERE / "teachers" / "teachers.csv"):
        speed = float(r["images_per_s"])
        found[r["network"]] = Source(r["network"], float(r["gmacs"]), r["mode"] == "encode", speed)
    for r in rows(HERE / "scaling" / "gmacs.csv"):
        if r["role"] == "teacher":
            encodes = not r["network"].startswith("StyleGAN2")
            found[r["network"]] = Source(r["network"], float(r["gmacs"]), encodes, None)
    return found


def step_gmacs(student: str, size: tuple[int, int]) -> float:
    """GMACs of an image in a training step of a student and its regressor: three times the forward (a test counts)."""
    for r in rows(HERE / "scaling" / "gmacs.csv"):
        if (r["network"], r["role"], r["size"]) == (student, "student", f"{size[0]} {size[1]}"):
            return 3 * float(r["gmacs"])
    raise KeyError(f"{student} at {size} is not in gmacs.csv: add it to benchmarks/scaling/count.py")


def item_bytes(size: tuple[int, int], kept: int = 63, strides: tuple[int, ...] = (4, 8, 16, 32)) -> int:
    """Bytes of one stored draw of one image as int8, with a scale for each channel, amplitude and residual; and 9 for
    its flip and seed."""
    at = 0
    for stride in strides:
        area = (size[0] // stride) * (size[1] // stride)
        for part in (4 * kept, 4, area, kept * area):
            at = -(-(at + part) // 4) * 4
    return -(-at // 8) * 8 + 9


def plan(e: Example) -> Plan:
    """The arithmetic: a teacher's pass and a student's step cost their GMACs, at the assumed rate."""
    images, step = e.images / 3600, step_gmacs(e.student, e.size)
    online = images * e.epochs * seconds(e.teacher.gmacs, step)
    stored = None
    if e.teacher.encodes:
        making, student = images * e.draws * seconds(e.teacher.gmacs, 0), images * e.epochs * seconds(0, step)
        each = item_bytes(e.size)
        stored = Stored(
            making=making,
            student=student,
            bytes=each * e.draws * e.images,
            shards=math.ceil(e.images / shard_images(each, e.draws)),
            read_bytes_per_s=each / seconds(0, step),
            nodes=nodes(making + student),
        )
    return Plan(online, nodes(online), stored)


def nodes(gpu_hours: float) -> int:
    """Nodes that do so much in a day."""
    return math.ceil(gpu_hours / (GPUS_A_NODE * DAY))


def shard_images(each: int, draws: int, group: int = 8) -> int:
    """Images in a shard, as `make-features` chooses: whole batches of the teacher, about `SHARD_BYTES`."""
    return group * max(1, round(SHARD_BYTES / ((each - 9) * draws * group)))


def examples() -> list[Example]:
    of = sources()
    whole, wide = (256, 256), (128, 256)
    return [
        Example("ImageNet", IMAGENET, whole, of["ADM-256"], "resnet50", 200),
        Example("ImageNet", IMAGENET, whole, of["ADM-256"], "convnext_base", 200),
        Example("ImageNet", IMAGENET, whole, of["Stable Diffusion 1.x, KL"], "resnet50", 200),
        Example("ImageNet", IMAGENET, whole, of["Stable Diffusion 1.x, TAESD"], "resnet50", 200),
        Example("ImageNet's size, drawn", IMAGENET, whole, of["StyleGAN2-256"], "resnet50", 200),
        Example("LSUN bedroom", BEDROOMS, whole, of["ADM-256"], "resnet101", 100),
        Example("LSUN cat", CATS, whole, of["ADM-256"], "resnet101", 100),
        Example("BDD100K", BDD100K, wide, of["ADM, BDD100K"], "resnet50", 600),
        Example("BDD100K's size, drawn", BDD100K, (512, 1024), of["StyleGAN2, BDD100K"], "resnet50", 600),
    ]  # fmt: skip


# --- as text ------------------------------------------------------------------------------------------------


def _hours(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def rate_text() -> str:
    return (
        f"**Assumed, not measured:** a GPU (H100) sustains {DENOISER_SPEED / 1e12:.0f} TFLOP/s in bf16 in a teacher and "
        f"{BACKBONE_SPEED / 1e12:.0f} in a student's step, as [the recipes](reproducing.md) take it. Every GPU-hour below "
        "is an estimate that rests on these two numbers, and is to be scaled by yours."
    )


def teachers_table() -> str:
    lines = ["| teacher | GMACs an image | images/s on a GPU, estimated | hours of ImageNet's images once, a GPU, estimated "
             "| images/s on two CPU threads, measured | days of the same there |"]  # fmt: skip
    lines.append("| --- " * 6 + "|")
    for s in sources().values():
        rate = 1 / seconds(s.gmacs, 0)
        cpu = s.cpu_images_per_s
        slow = ("", "") if cpu is None else (f"{cpu:.2f}", f"{IMAGENET / cpu / 86400:.0f}")
        lines.append(
            f"| {s.name} | {s.gmacs:.1f} | {rate:,.0f} | {_hours(IMAGENET / rate / 3600)} | {slow[0]} | {slow[1]} |"
        )
    return "\n".join(lines)


def students_table() -> str:
    lines = ["| student, with its regressor | pixels | GMACs forward | GMACs of a step | images/s on a GPU, estimated | "
             "of a step online with ADM-256 |"]  # fmt: skip
    lines.append("| --- " * 6 + "|")
    adm = sources()["ADM-256"].gmacs
    for r in rows(HERE / "scaling" / "gmacs.csv"):
        if r["role"] == "student":
            step = 3 * float(r["gmacs"])
            share = f"{seconds(0, step) / seconds(adm, step):.0%}" if r["size"] == "256 256" else ""
            lines.append(
                f"| {r['network']} | {r['size'].replace(' ', ' x ')} | {r['gmacs']} | {step:.1f} | "
                f"{1 / seconds(0, step):,.0f} | {share} |"
            )
    return "\n".join(lines)


def disk_table() -> str:
    lines = [
        "| data | images | pixels | bytes of an item | one draw | two draws (the default with flips) | shards |"
    ]
    lines.append("| --- " * 7 + "|")
    for data, images, size in (
        ("ImageNet", IMAGENET, (256, 256)), ("LSUN bedroom", BEDROOMS, (256, 256)), ("LSUN cat", CATS, (256, 256)),
        ("BDD100K", BDD100K, (128, 256)), ("BDD100K", BDD100K, (512, 1024)),
    ):  # fmt: skip
        each = item_bytes(size)
        lines.append(
            f"| {data} | {images:,} | {_size(size)} | {each:,} | {each * images / 1e9:,.0f} GB | "
            f"{2 * each * images / 1e9:,.0f} GB | {math.ceil(images / shard_images(each, 2)):,} |"
        )
    return "\n".join(lines)


def examples_table() -> str:
    lines = ["| data | teacher | student | epochs | online, GPU-h | store: making, GPU-h | and then the student, GPU-h | "
             "with a store | store, GB | read by each GPU, GB/s | nodes of 8 GPUs to end in a day, online / stored |"]  # fmt: skip
    lines.append("| --- " * 11 + "|")
    for e in examples():
        p, shown, count = plan(e), ["no store: it draws its images", "", "", "", ""], ""
        if p.stored is not None:
            part = (p.stored.making + p.stored.student) / p.online
            shown = [_hours(p.stored.making), _hours(p.stored.student), f"{part:.0%}", f"{p.stored.bytes / 1e9:,.0f}",
                     f"{p.stored.read_bytes_per_s / 1e9:.2f}"]  # fmt: skip
            count = f" / {p.stored.nodes}"
        lines.append(
            f"| {e.data}, {_size(e.size)} | {e.teacher.name} | {e.student} | {e.epochs} | {_hours(p.online)} | "
            f"{' | '.join(shown)} | {p.nodes}{count} |"
        )
    return "\n".join(lines)


def worked_text() -> str:
    """The first example, step by step."""
    e = examples()[0]
    p = plan(e)
    store = p.stored
    assert store is not None
    step, each, gpus = step_gmacs(e.student, e.size), item_bytes(e.size), GPUS_A_NODE
    return "\n".join([
        f"- Online: {e.images:,} images x {e.epochs} epochs x ({e.teacher.gmacs:.1f} GMACs of the teacher + {step:.1f} of a "
        f"step), at their rates: {p.online:,.0f} GPU-hours, {p.online / gpus / 24:.1f} days on {gpus} GPUs.",
        f"- The teacher is {seconds(e.teacher.gmacs, 0) / seconds(e.teacher.gmacs, step):.0%} of that.",
        f"- A store of {e.draws} draws: {store.making:,.1f} GPU-hours ({store.making / gpus:,.1f} hours on {gpus} GPUs, a "
        f"writer on each), {each:,} bytes x {e.draws} x {e.images:,} = {store.bytes / 1e9:,.0f} GB in {store.shards:,} shards.",
        f"- The student from it: {store.student:,.0f} GPU-hours, {store.student / gpus / 24:.1f} days on {gpus} GPUs; each "
        f"reads {store.read_bytes_per_s / 1e6:,.0f} MB/s, a node {gpus * store.read_bytes_per_s / 1e9:.1f} GB/s.",
        f"- Together {(store.making + store.student) / p.online:.1%} of online; every further student costs the last line "
        f"alone. A store costs {e.draws} passes of the teacher an image and online one an epoch, so it pays from epoch "
        f"{e.draws + 1} on, counted over all students.",
    ])  # fmt: skip


def decoding_text() -> str:
    """Processes that keep one GPU in images, from the measured rate of decoding."""
    path = HERE / "loading" / "loading.csv"
    found = {r["way"]: r for r in rows(path) if r["set"].startswith("JPEG")} if path.exists() else {}
    if "folder" not in found:
        return "Decoding: *not run* (benchmarks/loading)."
    step, adm = step_gmacs("resnet50", (256, 256)), sources()["ADM-256"].gmacs
    rate, needed = float(found["folder"]["images_per_s"]), 1 / seconds(0, step)
    return (
        f"Decoding: one process reads {rate:,.0f} images/s ({found['folder']['set']}, measured); a resnet50 that learns from "
        f"a store takes {needed:,.0f} images/s on a GPU (estimated), so {math.ceil(needed / rate)} processes for each GPU, or "
        "images scaled down once. Online with ADM-256 a GPU takes "
        f"{1 / seconds(adm, step):,.0f} images/s."
    )


TEXTS = {
    "scaling_rate": rate_text,
    "scaling_teachers": teachers_table,
    "scaling_students": students_table,
    "scaling_disk": disk_table,
    "scaling_examples": examples_table,
    "scaling_worked": worked_text,
    "scaling_decoding": decoding_text,
}
