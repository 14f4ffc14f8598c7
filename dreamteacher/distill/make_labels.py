"""`make-labels`: a labelled dataset on disk, of real images or of a teacher's own samples, made by a trained model.

The DatasetGAN way: draw a few samples, annotate them, train an interpreter on them, and let it label as many new
samples as wanted. Or label a folder of real images, by an interpreter or by the student that was distilled from it.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from dreamteacher import __version__
from dreamteacher.data import image_set
from dreamteacher.data.images import below, to_float
from dreamteacher.data.labelled import SAMPLES
from dreamteacher.data.seeds import device_generator, step_generator
from dreamteacher.distill.config import MakeLabelsConfig
from dreamteacher.distill.train_interpreter import sample_maps
from dreamteacher.models.distilled import Distilled, load_distilled
from dreamteacher.models.interpreter import Interpreter, load_interpreter
from dreamteacher.models.regressor import resize
from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.config import changed_keys, describe, to_json
from dreamteacher.runtime.distributed.device import autocast, pick_device
from dreamteacher.runtime.errors import UserError, shorten
from dreamteacher.runtime.page import data_uri, page
from dreamteacher.runtime.progress import Progress
from dreamteacher.runtime.run_folder import RunDir, read_rows
from dreamteacher.runtime.signals import Signals
from dreamteacher.teachers.base import Teacher
from dreamteacher.teachers.registry import fingerprint, load_teacher

_SHOWN = 64
# Of the first classes; later ones are darker shades. Okabe and Ito's, which the colour-blind tell apart.
_COLOURS = (
    (0, 0, 0), (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0),
    (204, 121, 167), (255, 255, 255), (150, 150, 150),
)  # fmt: skip


class _Labeller(NamedTuple):
    """What labels, and what it needs: `read` turns (images, maps) into probabilities, N x K (x h x w)."""

    classes: tuple[str, ...]
    pooled: bool
    size: tuple[int, int]
    read: Callable[[Tensor, list[Tensor]], Tensor] | None
    teacher: Teacher | None
    facts: dict[str, Any]


def make_labels(config: MakeLabelsConfig) -> Path:
    """Writes the dataset; returns its folder.

    out/images (as the model saw them), out/masks (palette PNGs of class ids), out/soft, out/labels.jsonl (one row
    an image: confidence, share of each class, or its label), out/index.html (the first images with their labels).

    Raises:
        UserError: for settings that do not go together or models that do not fit, before a folder is made.
        SystemExit: 128 + n after SIGINT or SIGTERM; the same command goes on.
    """
    device = pick_device(config.device)
    labeller = _labeller(config)
    size = config.size or labeller.size
    if labeller.teacher is not None:
        labeller.teacher.check_size(*size)
        labeller.teacher.to(device)
    batches = _Batches(config, labeller, size, device)
    resolved = {
        "verb": "make-labels", "version": __version__, "config": to_json(config), "model": labeller.facts,
        "classes": list(labeller.classes),
    }  # fmt: skip
    RunDir.check(config.out, resolved, needed_bytes=len(batches) * 4 * size[0] * size[1])
    _check_same(config)
    print(describe("make-labels", {
        **labeller.facts, "classes": len(labeller.classes), "images": len(batches), "size": size,
        "device": device, "out": config.out,
    }), flush=True)  # fmt: skip
    with contextlib.closing(RunDir(config.out)) as run, Signals() as signals:
        run.open(resolved)
        (run.path / "images").mkdir(exist_ok=True)
        for part in run.path.iterdir():
            checkpoint.sweep(part)
        done = {row["name"] for row in read_rows(run.path / "labels.jsonl")}
        progress = Progress(len(batches), 0, 1, "make-labels")
        if batches.seeds is not None:
            checkpoint.write_text(
                run.path / "images" / SAMPLES, json.dumps(batches.manifest(), indent=1) + "\n"
            )
        for names, images, maps in batches(done):
            for row in _write(run.path, names, images, maps, labeller, config):
                run.append("labels.jsonl", row)
            done |= set(names)
            progress.update(len(done), "")
            if signals.number:
                raise SystemExit(128 + signals.number)
        progress.close()
        checkpoint.write_text(run.path / "index.html", _sheet(run.path, labeller))
    print(f"{len(batches)} images in '{config.out}'; look at {config.out / 'index.html'}")
    if labeller.read is None:
        print(f"Annotate them, then: dreamteacher train-interpreter --images {config.out / 'images'} --masks MASKS "
              f"--teacher {config.teacher} --out INTERPRETER")  # fmt: skip
    return config.out


def _labeller(config: MakeLabelsConfig) -> _Labeller:
    named = [n for n in ("interpreter", "run", "teacher") if getattr(config, n) is not None]
    if len(named) != 1:
        raise UserError(
            f"One of --interpreter, --run and --teacher must say what labels; {len(named)} are given.",
            "An interpreter or a run labels; a teacher alone draws samples to annotate.",
        )
    if (config.images is None) == (config.samples is None):
        raise UserError("Either --images or --samples must be given.", "Give one of the two.")
    if (config.samples is not None and config.samples < 1) or config.batch_size < 1:
        raise UserError("--samples and --batch-size must be at least 1.", "Give a larger number.")
    if config.run is not None:
        if config.samples is not None:
            raise UserError("A run's student draws no samples.", "Give --images, or an --interpreter.")
        model = load_distilled(config.run).to(pick_device(config.device))
        recorded = (RunDir(config.run).config() or {}).get("data", {}).get("size") or (224, 224)
        size = (int(recorded[0]), int(recorded[1]))
        return _Labeller(
            model.classes, model.pooled, size, _by_student(model), None, {"run": str(config.run)}
        )
    if config.teacher is not None:
        if config.samples is None:
            raise UserError(
                "A teacher alone labels nothing.", "Give --samples, or an --interpreter for --images."
            )
        teacher = load_teacher(config.teacher, psi=config.psi)
        _check_can(teacher, "sample")
        return _Labeller((), False, teacher.size, None, teacher, {"teacher": teacher.name})
    assert config.interpreter is not None
    interpreter, spec = load_interpreter(config.interpreter)
    teacher = load_teacher(
        spec.teacher, timesteps=spec.t, noise=spec.noise, blocks=spec.blocks, psi=spec.psi  # type: ignore[arg-type]
    )  # fmt: skip
    spec.check_reads(teacher.specs, fingerprint(spec.teacher))
    if len(spec.classes) > 256:
        raise UserError(f"Masks hold at most 256 classes, not {len(spec.classes)}.", "Use fewer classes.")
    _check_can(teacher, "sample" if config.samples else "encode")
    facts = {"interpreter": str(config.interpreter), "teacher": teacher.name, "licence": teacher.licence}
    return _Labeller(
        spec.classes, spec.pooled, spec.size, _by_interpreter(interpreter.to(pick_device(config.device))), teacher,
        facts,
    )  # fmt: skip


def _by_student(model: Distilled) -> Callable[[Tensor, list[Tensor]], Tensor]:
    return lambda images, _maps: model(images).softmax(1)


def _by_interpreter(interpreter: Interpreter) -> Callable[[Tensor, list[Tensor]], Tensor]:
    return lambda _images, maps: interpreter(maps).float().softmax(1)


def _check_can(teacher: Teacher, mode: str) -> None:
    if mode not in teacher.modes:
        able = "--samples" if "sample" in teacher.modes else "--images"
        raise UserError(
            f"The teacher '{teacher.name}' ({teacher.family}) cannot {mode} images.", f"Use {able}."
        )


def _check_same(config: MakeLabelsConfig) -> None:
    """Labels of other settings are never mixed with these."""
    old = RunDir(config.out).config()
    if old is None or not (config.out / "labels.jsonl").exists():
        return
    changes = changed_keys(old.get("config", {}), json.loads(json.dumps(to_json(config))))
    changes = [c for c in changes if c.split(":")[0] not in ("out", "device", "batch_size")]
    if changes:
        raise UserError(
            f"'{config.out}' was begun with other settings: {shorten(changes)}.",
            "Give the old settings to go on, or another --out.",
        )


class _Batches:
    """Batches of (names, images float in [0, 1], maps of the teacher if there is one) that are still to be done."""

    def __init__(
        self, config: MakeLabelsConfig, labeller: _Labeller, size: tuple[int, int], device: torch.device
    ) -> None:
        self.config, self.labeller, self.size, self.device = config, labeller, size, device
        self.images: image_set.ImageSet | None = None
        self.seeds: Tensor | None = (
            None  # of samples that must be drawn again: the teacher cannot encode them
        )
        if config.images is not None:
            self.images = image_set.load_images(config.images, size, cache_gb=0.0)
            self.names = [below(self.images.folder, p.with_suffix(".png")) for p in self.images.files]
            twice = [name for name, count in Counter(self.names).items() if count > 1]
            if twice:
                raise UserError(
                    f"Files in '{config.images}' differ in nothing but their suffix: {shorten(twice)}.",
                    "Keep one of each: what is written is named after them.",
                )
            return
        assert config.samples is not None
        assert labeller.teacher is not None
        if size != labeller.teacher.size:
            raise UserError("Samples have the teacher's own size.", "Leave out --size.")
        self.names = [f"{i:06d}.png" for i in range(config.samples)]
        if "encode" not in labeller.teacher.modes:
            seeds = [step_generator(config.seed, i, "sample").initial_seed() for i in range(config.samples)]
            self.seeds = torch.tensor(seeds)

    def __len__(self) -> int:
        return len(self.names)

    def manifest(self) -> dict[str, Any]:
        """Whose samples these are, and the seed of each."""
        assert self.seeds is not None
        assert self.labeller.teacher is not None
        return {
            "teacher": self.labeller.teacher.name, "psi": self.config.psi,
            "seeds": dict(zip(self.names, self.seeds.tolist(), strict=True)),
        }  # fmt: skip

    @torch.no_grad()
    def __call__(self, done: set[str]) -> Iterator[tuple[list[str], Tensor, list[Tensor]]]:
        for part, index in enumerate(torch.arange(len(self)).split(self.config.batch_size)):
            names = [self.names[i] for i in index.tolist()]
            if done.issuperset(names):
                continue
            generator = device_generator(self.config.seed, part, "make-labels", self.device)
            with autocast(self.device, self.config.precision):
                images, maps = self._one(index, generator)
            yield names, images.float(), maps

    def _one(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, list[Tensor]]:
        teacher = self.labeller.teacher
        if self.images is not None:
            images = self.images.get(index).to(self.device)
            images = to_float(images, torch.channels_last)
            return images, teacher.encode(images, generator=generator) if teacher else []
        assert teacher is not None
        if self.seeds is not None:
            return sample_maps(teacher, self.seeds[index], self.device)
        return teacher.sample(len(index), generator=generator)


@torch.no_grad()
def _write(
    folder: Path,
    names: list[str],
    images: Tensor,
    maps: list[Tensor],
    labeller: _Labeller,
    config: MakeLabelsConfig,
) -> Iterator[dict[str, Any]]:
    """Writes the files of a batch; yields the row of each image once its files are whole."""
    probabilities = None
    if labeller.read is not None:
        with autocast(images.device, config.precision):
            probabilities = labeller.read(images, maps).float().cpu()
    pixels = (images * 255).round().to(torch.uint8).cpu()
    for i, name in enumerate(names):
        picture = to_pil_image(pixels[i])
        _save(folder / "images" / name, partial(picture.save, format="PNG"))
        row: dict[str, Any] = {"name": name}
        if probabilities is not None:
            row |= _write_labels(
                folder, name, probabilities[i], (pixels.shape[-2], pixels.shape[-1]), labeller, config
            )
        yield row


def _write_labels(
    folder: Path, name: str, p: Tensor, size: tuple[int, int], labeller: _Labeller, config: MakeLabelsConfig
) -> dict[str, Any]:
    if config.soft:
        kept = {"probabilities": (p * 255).round().to(torch.uint8).contiguous()}
        about = {"classes": json.dumps(labeller.classes)}
        file = (folder / "soft" / name).with_suffix(".safetensors")
        _save(file, lambda path: save_file(kept, path, about))
    if labeller.pooled:
        return {"label": labeller.classes[int(p.argmax())], "confidence": round(float(p.max()), 4)}
    large = resize(p[None], size)[0]
    confidence, ids = large.max(0)
    mask = to_pil_image(ids.to(torch.uint8)[None])
    mask.putpalette(palette(len(labeller.classes)))
    _save(folder / "masks" / name, partial(mask.save, format="PNG"))
    counts = torch.bincount(ids.flatten(), minlength=len(labeller.classes)).double() / ids.numel()
    shares = {c: round(v, 4) for c, v in zip(labeller.classes, counts.tolist(), strict=True) if v}
    return {"confidence": round(float(confidence.mean()), 4), "shares": shares}


def _save(path: Path, write: Callable[[Path], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.atomic_write(path, write)


def palette(classes: int) -> list[int]:
    """Red, green and blue of each class, one after the other: the same for the same number of classes."""
    colours = [_COLOURS[i % len(_COLOURS)] for i in range(classes)]
    shades = [1.0 - 0.25 * (i // len(_COLOURS) % 4) for i in range(classes)]
    return [round(v * shade) for colour, shade in zip(colours, shades, strict=True) for v in colour]


def _sheet(folder: Path, labeller: _Labeller) -> str:
    """The contact sheet: the first images, their labels, and what the whole dataset holds."""
    rows = read_rows(folder / "labels.jsonl")
    cells = []
    for row in rows[:_SHOWN]:
        image = pil_to_tensor(Image.open(folder / "images" / row["name"]).convert("RGB"))
        cell = f'<img class="photo" src="{data_uri(image, 128)}" alt="{row["name"]}">'
        if "shares" in row:
            mask = pil_to_tensor(Image.open(folder / "masks" / row["name"]).convert("RGB"))
            cell += f'<img class="map" src="{data_uri(mask, 128)}" alt="mask of {row["name"]}">'
        words = row.get("label", "")
        sure = f"{row['confidence']:.2f}" if "confidence" in row else ""
        cells.append(f"<figure>{cell}<figcaption>{words} {sure}</figcaption></figure>")
    lines = [f"{len(rows)} images"]
    if rows and "confidence" in rows[0]:
        lines.append(f"mean confidence {sum(r['confidence'] for r in rows) / len(rows):.3f}")
    for c in labeller.classes:
        if labeller.pooled:
            lines.append(f"{c}: {sum(r.get('label') == c for r in rows)} images")
        else:
            lines.append(
                f"{c}: {sum(r['shares'].get(c, 0.0) for r in rows) / max(1, len(rows)):.1%} of the pixels"
            )
    facts = " · ".join(lines)
    return page(
        "Labels", f'<h1>Labels</h1><p class="lead">{facts}</p><section><div class="pairs">{"".join(cells)}</div></section>'
    )  # fmt: skip
