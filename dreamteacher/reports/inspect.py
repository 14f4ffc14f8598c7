"""`inspect`: which timestep and which level of a teacher to learn from, as a page of maps and a ranking.

Per timestep and level: the maps as colours beside the images, a score that needs no label, and, when the
images have classes or masks, a small probe on the maps themselves.
"""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from dreamteacher import metrics
from dreamteacher.data import image_set, seeds
from dreamteacher.data.draws import draw_labels
from dreamteacher.data.images import to_float
from dreamteacher.data.masks.reader import read_masks
from dreamteacher.downstream.classification.probes import linear
from dreamteacher.reports.charts import pca_basis, pca_colours
from dreamteacher.reports.config import InspectConfig
from dreamteacher.reports.inspect_scores import halves, pixel_probe, pixels_at, recognition, standardised
from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.distributed.device import autocast, pick_device
from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.page import data_uri, page
from dreamteacher.runtime.progress import Progress
from dreamteacher.teachers.base import Teacher
from dreamteacher.teachers.registry import is_python, load_teacher, read_card, teacher_folder

_POSITIONS = 48  # of each image, for the probe of masks


@dataclass(frozen=True, kw_only=True)
class Row:
    """One (timestep, level): its scores. `t` is None for a teacher without timesteps.

    Args:
        views: how well pooled maps of two views (fresh noise, and mirrored) of an image find each other.
        halves: how well the pooled halves of an image's map find each other.
        rankme: effective rank of the pooled maps (for information: it does not rank).
        probe: accuracy (classes) or mIoU (masks) of a linear probe; None without labels.
    """

    t: int | None
    level: str
    stride: int
    channels: int
    views: float | None
    halves: float
    rankme: float
    probe: float | None

    @property
    def score(self) -> float:
        """What ranks without labels: `views` where the teacher can encode, else `halves`."""
        return self.halves if self.views is None else self.views


class Images(NamedTuple):
    """uint8 N x 3 x H x W, with class ids (N) or masks (N x H x W) where there are any, and their names."""

    pixels: Tensor
    classes: Tensor | None = None
    masks: Tensor | None = None
    names: tuple[str, ...] = ()


@torch.no_grad()
def inspect_teacher(config: InspectConfig) -> list[Row]:
    """Writes out/index.html and out/ranking.csv; returns the rows, best first.

    Raises:
        UserError: for unknown teachers, folders without images, masks that do not fit; before anything runs.
    """
    device = pick_device(config.device)
    _check_numbers(config)
    teacher = _load(config)
    size = config.size or teacher.size
    teacher.check_size(*size)
    images = _images(config, teacher, size)
    teacher.to(device)
    rows, pictures = _Scores(config, teacher, images).run(device)
    rows.sort(key=lambda row: row.probe if row.probe is not None else row.score, reverse=True)
    config.out.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text(config.out / "ranking.csv", ranking_csv(rows))
    body = _header(config, teacher, images, rows) + _table(rows, images) + pictures
    checkpoint.write_text(config.out / "index.html", page(f"{teacher.name}: which t, which level", body))
    print(_verdict(rows, images))
    print(f"Page: {config.out / 'index.html'}   ranking: {config.out / 'ranking.csv'}")
    return rows


def _check_numbers(config: InspectConfig) -> None:
    if config.count < 8 or config.labels < 1:
        raise UserError("--count must be at least 8 and --labels at least 1.", "Give larger numbers.")
    if not config.t:
        raise UserError("--t needs at least one timestep.", "For example --t 50 100 250.")
    if config.out.exists() and not config.out.is_dir():
        raise UserError(f"'{config.out}' is a file.", "Choose another --out.")


def _load(config: InspectConfig) -> Teacher:
    """The teacher at all timesteps at once, if it has them; one that knows a single one keeps it."""
    timed = False
    if not is_python(config.teacher):
        network = read_card(teacher_folder(config.teacher))["network"]
        timed = "timestep" in network and not network.get("clean")
    t = config.t if timed else ()
    return load_teacher(config.teacher, timesteps=t, noise=config.noise, psi=config.psi)


def _images(config: InspectConfig, teacher: Teacher, size: tuple[int, int]) -> Images:
    if config.images is None:
        if "sample" not in teacher.modes or config.masks is not None:
            raise UserError(f"Images are needed to inspect '{teacher.name}'.", "Give --images FOLDER.")
        return Images(torch.empty(0, 3, *teacher.size, dtype=torch.uint8))
    if "encode" not in teacher.modes:
        raise UserError(
            f"The teacher '{teacher.name}' ({teacher.family}) cannot encode images.",
            "Leave out --images: its own samples are inspected.",
        )
    generator = seeds.step_generator(config.seed, 0, "inspect")
    if config.masks is not None:
        found = read_masks(
            config.images, config.masks, size, binary=config.binary_masks, absent_ok=True
        ).load()
        pick = torch.randperm(len(found.images), generator=generator)[: config.count]
        if len(pick) <= config.labels:
            raise UserError(
                f"{len(pick)} images with masks leave none to score beside --labels {config.labels}.",
                "Give a smaller --labels.",
            )
        return Images(found.images[pick], masks=found.targets[pick], names=found.classes)
    folder = image_set.load_images(config.images, size)
    pick = torch.randperm(len(folder), generator=generator)[: config.count]
    classes = folder.labels[pick] if folder.labels is not None else None
    if classes is not None:
        fewest = int(torch.bincount(classes, minlength=len(folder.classes)).min())
        if fewest <= config.labels:
            raise UserError(
                f"A class has {fewest} of the {len(pick)} images: too few for --labels {config.labels}.",
                "Give a smaller --labels or a larger --count.",
            )
    return Images(folder.get(pick), classes=classes, names=folder.classes)


class _Scores:
    """Pooled maps, halves and drawn pixels of every (t, level), gathered over batches."""

    def __init__(self, config: InspectConfig, teacher: Teacher, images: Images) -> None:
        self.config, self.teacher, self.images = config, teacher, images
        self.steps: tuple[int | None, ...] = teacher.timesteps or (None,)
        self.keys = [(t, i) for t in range(len(self.steps)) for i in range(len(teacher.specs))]

    def run(self, device: torch.device) -> tuple[list[Row], str]:
        """Every row, and the pictures as HTML."""
        first = self._gather(device, "view", mirror=False)
        second = self._gather(device, "mirrored", mirror=True) if len(self.images.pixels) else None
        rows = []
        for key in self.keys:
            spec, t = self.teacher.specs[key[1]], self.steps[key[0]]
            one = first.pooled[key]
            rows.append(
                Row(
                    t=t, level=spec.name, stride=spec.stride, channels=one.shape[1],
                    views=None if second is None else recognition(one, second.pooled[key]),
                    halves=sum(recognition(a, b) for a, b in first.halves[key]) / len(first.halves[key])
                    if first.halves[key] else 0.0,
                    rankme=metrics.rankme(standardised(one)),
                    probe=self._probe(one, first.pixels[key]),
                )
            )  # fmt: skip
        return rows, _pictures(self, first)

    def _batches(self, mirror: bool, device: torch.device) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """(images float, maps) per batch; samples where there are no images."""
        config = self.config
        generator = torch.Generator(device).manual_seed(
            seeds.step_generator(config.seed, int(mirror), "inspect-noise").initial_seed()
        )
        count = len(self.images.pixels) or config.count
        progress = Progress(count, 0, 1, "inspect")
        for begin in range(0, count, config.batch_size):
            n = min(config.batch_size, count - begin)
            with autocast(device, config.precision):
                if len(self.images.pixels):
                    x = to_float(self.images.pixels[begin : begin + n].to(device))
                    maps = self.teacher.encode(x.flip(-1) if mirror else x, generator=generator)
                else:
                    x, maps = self.teacher.sample(n, generator=generator)
            progress.update(begin + n, "")
            yield x, [m.float() for m in maps]
        progress.close()

    def _gather(self, device: torch.device, what: str, *, mirror: bool) -> _Gathered:
        found = _Gathered(self.keys)
        masks, done = self.images.masks, 0
        positions: Tensor | None = None
        for x, maps in self._batches(mirror, device):
            if masks is not None and not mirror:
                generator = seeds.step_generator(self.config.seed, done, "inspect-positions")
                positions = torch.rand(len(x), _POSITIONS, 2, generator=generator)
            for i, m in enumerate(maps):
                for t, part in enumerate(m.chunk(len(self.steps), dim=1)):
                    drawn = part[: max(0, self.config.show - done)] if not mirror else part[:0]
                    found.add((t, i), part, drawn, positions)
            if not mirror and done < self.config.show:
                found.shown.append(x[: self.config.show - done].cpu())
            if positions is not None and masks is not None:
                rows, columns = (positions * torch.tensor(masks.shape[-2:])).long().unbind(2)
                here = torch.arange(done, done + len(x)).unsqueeze(1)
                found.truth.append(masks[here, rows, columns])
            done += len(x)
        found.close()
        return found

    def _probe(self, pooled: Tensor, pixels: tuple[Tensor, Tensor] | None) -> float | None:
        """Accuracy or mIoU of a linear map on few labels, scored on the other images."""
        labels, seed = self.config.labels, self.config.seed
        if pixels is not None:
            return pixel_probe(*pixels, labels=labels, classes=len(self.images.names))
        y = self.images.classes
        if y is None:
            return None
        drawn = draw_labels(y, labels, classes=len(self.images.names), seed=seed)
        rest = torch.ones(len(y), dtype=torch.bool)
        rest[drawn] = False
        found = linear(
            pooled[drawn], y[drawn], pooled[rest], y[rest], classes=len(self.images.names), labels=labels,
            seed=seed,
        )  # fmt: skip
        return dict(found)["accuracy"]


class _Gathered:
    """What is kept of the maps of all images: little of each."""

    def __init__(self, keys: Sequence[tuple[int, int]]) -> None:
        self._pooled: dict[tuple[int, int], list[Tensor]] = {key: [] for key in keys}
        self._halves: dict[tuple[int, int], list[list[tuple[Tensor, Tensor]]]] = {key: [] for key in keys}
        self._drawn: dict[tuple[int, int], list[Tensor]] = {key: [] for key in keys}
        self._pixels: dict[tuple[int, int], list[Tensor]] = {key: [] for key in keys}
        self.shown: list[Tensor] = []
        self.truth: list[Tensor] = []

    def add(self, key: tuple[int, int], maps: Tensor, drawn: Tensor, positions: Tensor | None) -> None:
        """Keeps pooled maps, pooled halves, the maps that are drawn, and the pixels of a probe."""
        self._pooled[key].append(maps.mean((2, 3)).cpu())
        self._halves[key].append([(a.cpu(), b.cpu()) for a, b in halves(maps)])
        if len(drawn):
            self._drawn[key].append(drawn.cpu())
        if positions is not None:
            self._pixels[key].append(pixels_at(maps, positions.to(maps.device)).cpu())

    def close(self) -> None:
        """Joins the batches."""
        truth = torch.cat(self.truth) if self.truth else None
        self.pooled = {key: torch.cat(parts) for key, parts in self._pooled.items()}
        self.halves = {
            key: [
                (torch.cat([p[i][0] for p in parts]), torch.cat([p[i][1] for p in parts]))
                for i in range(len(parts[0]))
            ]
            for key, parts in self._halves.items()
        }
        self.drawn = {key: torch.cat(parts) for key, parts in self._drawn.items() if parts}
        self.pixels = {
            key: None if truth is None else (torch.cat(parts), truth) for key, parts in self._pixels.items()
        }


# --- the page ----------------------------------------------------------------------------------------------


def ranking_csv(rows: Sequence[Row]) -> str:
    """The rows as CSV text, best first, with their rank without labels."""
    by_score = sorted(rows, key=lambda row: row.score, reverse=True)
    text = io.StringIO()
    names = [field.name for field in fields(Row)]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["rank", "rank_without_labels", *names])
    for rank, row in enumerate(rows, 1):
        values = [getattr(row, name) for name in names]
        cells = ["" if v is None else f"{v:.4f}" if isinstance(v, float) else v for v in values]
        writer.writerow([rank, by_score.index(row) + 1, *cells])
    return text.getvalue()


def _name(row: Row) -> str:
    return f"stride {row.stride}" + (f" at t = {row.t}" if row.t is not None else "")


def _verdict(rows: Sequence[Row], images: Images) -> str:
    """One sentence for the screen and the top of the page."""
    best = rows[0]
    if best.probe is not None:
        what = "mIoU" if images.masks is not None else "accuracy"
        text = f"Best by the probe: {_name(best)} ({what} {best.probe:.3f})."
    else:
        text = f"Best without labels: {_name(best)} (score {best.score:.3f})."
    if best.t is not None:
        means: dict[int, list[float]] = {}
        for row in rows:
            assert row.t is not None
            means.setdefault(row.t, []).append(row.probe if row.probe is not None else row.score)
        t = max(means, key=lambda t: sum(means[t]) / len(means[t]))
        text += f" Best timestep over all levels: pretrain with --t {t}."
    if best.probe is not None and len(rows) > 2:
        agreement = spearman([r.score for r in rows], [r.probe or 0.0 for r in rows])
        text += f" Rank correlation of the label-free score with the probe: {agreement:+.2f}."
    return text


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation (ties share the mean of their ranks); 0 where one side is constant.

    Example:
        >>> round(spearman([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0]), 2)
        0.8
    """
    x, y = (_ranks(torch.tensor(list(v), dtype=torch.float64)) for v in (a, b))
    x, y = x - x.mean(), y - y.mean()
    norm = float(x.norm() * y.norm())
    return float(x @ y) / norm if norm else 0.0


def _ranks(x: Tensor) -> Tensor:
    below = (x.unsqueeze(0) < x.unsqueeze(1)).sum(1).double()
    equal = (x.unsqueeze(0) == x.unsqueeze(1)).sum(1).double()
    return below + (equal - 1) / 2


def _header(config: InspectConfig, teacher: Teacher, images: Images, rows: Sequence[Row]) -> str:
    count = len(images.pixels)
    source = (
        f"{count} images of {html.escape(str(config.images))}"
        if count
        else f"{config.count} of its own samples"
    )
    levels = ", ".join(f"{s.stride}: {s.channels}" for s in teacher.specs)
    return (
        f"<h1>{html.escape(teacher.name)}: which t, which level</h1>"
        f'<p class="lead">{html.escape(teacher.family)} · licence: {html.escape(teacher.licence)} · levels (stride: '
        f"channels of all timesteps) {levels} · {source}</p>"
        f'<p class="verdict">{html.escape(_verdict(rows, images))}</p>'
    )


def _table(rows: Sequence[Row], images: Images) -> str:
    probe = (
        ""
        if rows[0].probe is None
        else "mIoU of a probe"
        if images.masks is not None
        else "accuracy of a probe"
    )
    heads = ["", "views", "halves", "RankMe", *([probe] if probe else [])]
    lines = []
    for row in rows:
        cells = [
            "-" if row.views is None else f"{row.views:.3f}", f"{row.halves:.3f}", f"{row.rankme:.1f}",
            *([f"<b>{row.probe:.3f}</b>"] if row.probe is not None else []),
        ]  # fmt: skip
        lines.append(f"<tr><td>{_name(row)} <small>{row.channels} channels</small></td>")
        lines.append("".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{h}</th>" for h in heads)
    return (
        "<section><h2>Ranking</h2>"
        '<p class="lead">Views: how surely the pooled maps of an image and of its mirror image, under fresh noise, '
        "find each other among all images; halves: the same for the two halves of one map; 1 is perfect. RankMe is "
        "shown because it is often looked at: it grows with noise and does not rank.</p>"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
        "</section>"
    )


def _pictures(scores: _Scores, found: _Gathered) -> str:
    """Per level: the images, and below them the maps of every timestep as colours of their own basis."""
    shown = (torch.cat(found.shown) * 255).round().to(torch.uint8)
    cells = _strip("image", shown, "photo")
    for i, spec in enumerate(scores.teacher.specs):
        cells += f"<strong>stride {spec.stride}</strong>"
        for t, step in enumerate(scores.steps):
            maps = found.drawn[t, i]
            cells += _strip("" if step is None else f"t = {step}", pca_colours(maps, pca_basis(maps)), "map")
    return (
        "<section><h2>Maps</h2>"
        '<p class="lead">The first three principal components of the maps of a row as red, green and blue.</p>'
        f'<div class="card scroll"><div class="maps" style="--n:{len(shown)}">{cells}</div></div></section>'
    )


def _strip(label: str, images: Tensor, kind: str) -> str:
    pictures = (
        f'<img class="{kind}" src="{data_uri(image, 256)}" alt="{label} {i + 1}">'
        for i, image in enumerate(images)
    )
    return f"<span>{label}</span>{''.join(pictures)}\n"
