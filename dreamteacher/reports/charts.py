"""Pictures for the report, as text: SVG charts, images and feature maps as data URIs, and the page's style.

Charts are plain functions of numbers. Their colours are CSS variables, so that one picture serves a light and
a dark page; the series colours (after Okabe and Ito) keep apart for colour-blind readers on both.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dreamteacher.metrics import mean_and_deviation

# Drawn for cards about 340 px wide, so that text on a page is as large as written here.
WIDTH, HEIGHT = 340.0, 210.0
LEFT, RIGHT, TOP, BOTTOM = 44.0, 10.0, 8.0, 24.0
COLOURS = 6
_MOST_DRAWN, _MOST_HOVER = 800, 60


class Series(NamedTuple):
    """One line of a chart: its name in the legend, and its points in order of x."""

    name: str
    points: Sequence[tuple[float, float]]


class Dots(NamedTuple):
    """One method in a dot plot: its value for every seed; `ours` is drawn in the accent colour."""

    name: str
    values: Sequence[float]
    ours: bool = False


@dataclass(frozen=True)
class Scale:
    """Values in [low, high] -> pixels from `start` to `end`, linear or logarithmic.

    Example:
        >>> Scale(0.0, 10.0, 100.0, 200.0)(2.5)
        125.0
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, 1e-300))
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) that cover [low, high]; the ends lie on or outside it.

    Example:
        >>> nice_ticks(0.13, 0.92)
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if not high > low:
        pad = abs(low) * 0.1 or 0.5
        low, high = low - pad, low + pad
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for step in (power * m for m in (1, 2, 5, 10, 20)):
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first < most:
            break
    digits = max(0, 1 - math.floor(math.log10(step)))
    return [round(i * step, digits) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Numbers 1, 2, 5 times powers of ten that cover [low, high] (both above 0), thinned to at most 7."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [s * 10.0**p for p in powers for s in steps]
        first = max(i for i, t in enumerate(ticks) if t <= low * (1 + 1e-9))
        last = min(i for i, t in enumerate(ticks) if t >= high * (1 - 1e-9))
        ticks = ticks[first : last + 1] if last > first else ticks[first : first + 2]
        if len(ticks) <= 7:
            break
    return ticks


def number(value: float, digits: int = 4) -> str:
    """A number as a reader wants it: "0.004", "4e-5", "12k", "1.5M".

    Example:
        >>> [number(v) for v in (0.004, 4e-5, 12000, 1_500_000, 3)]
        ['0.004', '4e-5', '12k', '1.5M', '3']
    """
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.{digits}g}{unit}"
    text = f"{value:.{digits}g}"
    if "e" in text:
        head, power = text.split("e")
        text = f"{head}e{int(power)}"
    return text


def chart_scales(
    series: Sequence[Series], *, floor: float | None = None, log: bool = False
) -> tuple[Scale, Scale, list[float]]:
    """The x scale, the y scale and the y ticks of `line_chart`.

    Args:
        floor: lowest value worth showing: what lies below is cut off.
        log: a logarithmic y axis, if all values are above 0 and they span more than a factor of 20.
    """
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points]
    low, high = min(ys), max(ys)
    if floor is not None:
        low, high = max(low, floor), max(high, floor)
    log = log and low > 0 and high / low > 20
    ticks = log_ticks(low, high) if log else nice_ticks(low, high)
    first, last = min(xs), max(xs)
    if first == last:
        first, last = first - 1, last + 1
    return (
        Scale(first, last, LEFT, WIDTH - RIGHT),
        Scale(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP, log),
        ticks,
    )


def line_chart(
    title: str, series: Sequence[Series], caption: str = "", *, floor: float | None = None, log: bool = False
) -> str:
    """A figure with a title, a legend, one line per series over steps, values on hovering, and a caption.

    Args:
        series: points (step, value); those that are not finite are left out. With none left the result is "".
        caption: what one sees, as plain text (all texts are escaped here).
        floor: see `chart_scales`; log: too.
    """
    clean = [Series(s.name, [p for p in s.points if math.isfinite(p[1])]) for s in series]
    clean = [s for s in clean if s.points]
    if not clean:
        return ""
    sx, sy, ticks = chart_scales(clean, floor=floor, log=log)
    parts = []
    for tick in ticks:
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{sy(tick):.1f}" y2="{sy(tick):.1f}"/>'
        )
        parts.append(f'<text x="{LEFT - 6}" y="{sy(tick) + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    inner = [t for t in nice_ticks(sx.low, sx.high, 7) if sx.low <= t <= sx.high]
    parts += [
        f'<text x="{sx(t):.1f}" y="{HEIGHT - 7}" text-anchor="middle">{number(t)}</text>' for t in inner
    ]
    # A nested viewport cuts off what a floor leaves outside, without an id that a page could hold twice.
    x, y, width, height = LEFT - 4, TOP - 4, WIDTH - LEFT + 4, HEIGHT - BOTTOM - TOP + 8
    box = f'x="{x}" y="{y}" width="{width}" height="{height}" viewBox="{x} {y} {width} {height}"'
    parts.append(f'<svg class="plot" {box}>')
    for i, s in enumerate(clean):
        drawn = _thin(s.points, _MOST_DRAWN)
        path = " ".join(f"{sx(a):.1f},{sy(b):.1f}" for a, b in drawn)
        parts.append(f'<g class="c{i % COLOURS}"><polyline points="{path}"/>')
        few = " few" if len(s.points) <= 16 else ""
        label = f"{s.name}, " if len(clean) > 1 else ""
        for a, b in _thin(s.points, _MOST_HOVER):
            about = html.escape(f"{label}step {a:,.0f}: {b:.4g}")
            at = f'cx="{sx(a):.1f}" cy="{sy(b):.1f}"'
            parts.append(f'<circle class="dot{few}" {at} r="3.2"><title>{about}</title></circle>')
        parts.append("</g>")
    parts.append("</svg>")
    scale = "<small>log scale</small>" if sy.log else ""
    head = f"<h3>{html.escape(title)}{scale}</h3>" + (
        _legend([s.name for s in clean]) if len(clean) > 1 else ""
    )
    return _figure(head, "".join(parts), HEIGHT, title, caption)


def dot_plot(title: str, dots: Sequence[Dots], caption: str = "") -> str:
    """A figure with one line per method: a ring per seed, a dot at the mean, a bar of ± one sample deviation.

    Args:
        dots: methods from top to bottom, each with at least one finite value.
    """
    left, row = 112.0, 26.0
    height = TOP + row * len(dots) + BOTTOM
    every = [v for d in dots for v in d.values]
    spans = [mean_and_deviation(d.values) for d in dots]
    every += [m + sign * s for m, s in spans for sign in (-1, 1)]
    ticks = nice_ticks(min(every), max(every), 5)
    sx = Scale(ticks[0], ticks[-1], left, WIDTH - 16)
    bottom = height - BOTTOM
    parts = []
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{sx(tick):.1f}" x2="{sx(tick):.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{sx(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{number(tick)}</text>')
    for i, (d, (mean, deviation)) in enumerate(zip(dots, spans, strict=True)):
        y = TOP + row * (i + 0.5)
        name = d.name if len(d.name) <= 17 else d.name[:16] + "…"
        spread = f" ± {deviation:.3f}" if len(d.values) > 1 else ""
        about = html.escape(f"{d.name}: {mean:.3f}{spread}, {_count(d.values)}")
        parts.append(f'<g class="{"c0 ours" if d.ours else "other"}"><title>{about}</title>')
        parts.append(
            f'<text class="name" x="{left - 10}" y="{y + 4}" text-anchor="end">{html.escape(name)}</text>'
        )
        if deviation:
            a, b = sx(mean - deviation), sx(mean + deviation)
            parts.append(f'<line class="bar" x1="{a:.1f}" x2="{b:.1f}" y1="{y}" y2="{y}"/>')
        if len(d.values) > 1:
            parts += [f'<circle class="ring" cx="{sx(v):.1f}" cy="{y}" r="3"/>' for v in d.values]
        parts.append(f'<circle class="mean" cx="{sx(mean):.1f}" cy="{y}" r="4.5"/></g>')
    return _figure(f"<h3>{html.escape(title)}</h3>", "".join(parts), height, title, caption)


class Basis(NamedTuple):
    """Three directions in feature space and the range of values along each that becomes 0 to 255.

    Args:
        mean: (C,); axes: (3, C), orthonormal, zero where the maps vary in fewer directions; low, high: (3,).
    """

    mean: Tensor
    axes: Tensor
    low: Tensor
    high: Tensor


def pca_basis(maps: Tensor) -> Basis:
    """The three directions of largest variance over all positions of maps (N x C x H x W), float64.

    The range along each runs from its 2nd to its 98th percentile. The largest entry of every direction is
    positive, so that the same maps always give the same colours.
    """
    x = maps.detach().double().cpu().permute(0, 2, 3, 1).flatten(0, 2)
    mean = x.mean(0)
    x = x - mean
    # The eigenvectors of the smaller of the two Gram matrices give the right singular vectors.
    if x.shape[0] >= x.shape[1]:
        values, vectors = torch.linalg.eigh(x.T @ x)
        axes = vectors.T.flip(0)[:3]
    else:
        values, vectors = torch.linalg.eigh(x @ x.T)
        axes = torch.nn.functional.normalize(vectors.T.flip(0)[:3] @ x, dim=1)
    values = values.flip(0)[:3]
    axes = axes * (values > 1e-9 * values[0].clamp_min(1e-300)).unsqueeze(1)
    axes = torch.cat([axes, axes.new_zeros(3 - len(axes), axes.shape[1])])
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    axes = torch.where(largest < 0, -axes, axes)
    low, high = torch.quantile(x @ axes.T, torch.tensor([0.02, 0.98], dtype=x.dtype), dim=0)
    return Basis(mean, axes, low, high)


def pca_colours(maps: Tensor, basis: Basis) -> Tensor:
    """Maps N x C x H x W as colours in a basis: uint8 N x 3 x H x W; one without range is mid-grey."""
    x = maps.detach().double().cpu().permute(0, 2, 3, 1) - basis.mean
    span = basis.high - basis.low
    shares = (x @ basis.axes.T - basis.low) / span.clamp_min(1e-300)
    shares = torch.where(span > 0, shares, torch.full_like(shares, 0.5))
    return (shares.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 3, 1, 2)


def _legend(names: Sequence[str]) -> str:
    """A key per series; what the names have in common ("stride 4", "stride 8") is said once, before them."""
    heads = {name.rpartition(" ")[0] for name in names}
    common = heads.pop() if len(heads) == 1 else ""
    keys = (
        f'<span class="key c{i % COLOURS}"><i></i>{html.escape(name.removeprefix(common).strip())}</span>'
        for i, name in enumerate(names)
    )
    return f'<div class="legend">{html.escape(common)} {"".join(keys)}</div>'


def _figure(head: str, drawing: str, height: float, title: str, caption: str) -> str:
    label = html.escape(title, quote=True)
    picture = f'<svg viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-label="{label}">{drawing}</svg>'
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="card">{head}{picture}{below}</figure>'


def _thin(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most `most` points at even distances, the first and the last among them."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def _count(values: Sequence[float]) -> str:
    return f"{len(values)} seed{'s' if len(values) != 1 else ''}"
