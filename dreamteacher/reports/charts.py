"""Pictures for the report, as text: SVG charts, images and feature maps as data URIs, and the page's style.

Charts are plain functions of numbers. Their colours are CSS variables, so that one picture serves a light and
a dark page; the series colours (after Okabe and Ito) keep apart for colour-blind readers on both.
"""

from __future__ import annotations

import base64
import html
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dreamteacher import __version__

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
    spans = [(statistics.mean(d.values), _deviation(d.values)) for d in dots]
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


def data_uri(image: Tensor, longest: int | None = None) -> str:
    """A PNG of an image (uint8 3 x H x W) as a data URI, shrunk so that no side is above `longest` pixels."""
    from torchvision.transforms.v2.functional import resize, to_pil_image

    height, width = image.shape[-2:]
    if longest is not None and max(height, width) > longest:
        ratio = longest / max(height, width)
        size = [max(1, round(height * ratio)), max(1, round(width * ratio))]
        image = resize(image, size, antialias=True)
    file = io.BytesIO()
    to_pil_image(image).save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


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


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _count(values: Sequence[float]) -> str:
    return f"{len(values)} seed{'s' if len(values) != 1 else ''}"


def page(title: str, body: str) -> str:
    """A whole HTML page of one file: no script, no network; `title` is escaped here, `body` is HTML."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style></head>\n<body><main>\n{body}\n"
        f"<footer>Written by dreamteacher {__version__}. This page needs no network.</footer>\n"
        "</main></body></html>\n"
    )


STYLE = """
:root{color-scheme:light dark;--page:#fafaf8;--card:#fff;--text:#1c1f24;--muted:#626a75;--line:#e4e4df;
--soft:#f1f1ec;--c0:#0072b2;--c1:#d55e00;--c2:#009070;--c3:#b0508c;--c4:#8a6d00;--c5:#6b7580}
@media (prefers-color-scheme:dark){:root{--page:#131519;--card:#1b1e24;--text:#e7e8ea;--muted:#9ba3ae;
--line:#2c3139;--soft:#23272e;--c0:#5ab4ec;--c1:#f2894c;--c2:#2fc49b;--c3:#e28fc0;--c4:#d8bf4e;--c5:#a5afba}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);font:16px/1.55 system-ui,-apple-system,"Segoe UI",
Roboto,"Helvetica Neue","Noto Sans","DejaVu Sans",sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1100px;margin:0 auto;padding:48px 24px 64px}
h1{font-size:30px;line-height:1.2;font-weight:650;letter-spacing:-.015em;margin:0 0 6px;
overflow-wrap:anywhere}
h1 .from{color:var(--muted);font-weight:400}
h2{font-size:20px;line-height:1.3;font-weight:650;letter-spacing:-.005em;margin:56px 0 14px}
h3{font-size:14px;font-weight:600;margin:0 0 8px}
h3 small{font-weight:400;font-size:12px;color:var(--muted);margin-left:8px}
p{margin:0 0 12px;max-width:72ch;overflow-wrap:anywhere}
.lead{color:var(--muted);margin:0 0 18px;font-size:15px}h2+.lead{margin-top:-8px}
.verdict{font-size:19px;line-height:1.5;margin:22px 0 26px;padding-left:16px;border-left:3px solid var(--c0);
max-width:66ch}
.note{color:var(--muted);border-left:3px solid var(--line);padding:2px 0 2px 14px;margin:14px 0;
font-size:15px}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
pre{font-size:13px;line-height:1.5;background:var(--card);border:1px solid var(--line);border-radius:10px;
padding:16px 18px;overflow-x:auto;margin:14px 0}
dl.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(46%,160px),1fr));gap:16px 24px;
margin:0;
padding:20px 22px;background:var(--card);border:1px solid var(--line);border-radius:10px}
dl.facts dt{color:var(--muted);font-size:13px}
dl.facts .wide{grid-column:1/-1}
dl.facts dd{margin:0;font-weight:500;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.grid2{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr));gap:18px;margin-top:16px}
h2+.grid2{margin-top:0}.caption{margin-left:0}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px 14px 12px;margin:0;
min-width:0;break-inside:avoid}
.card h3{padding:0 4px}
.card svg{display:block;width:100%;height:auto;font-size:11.5px}
.card svg text{fill:var(--muted);font-variant-numeric:tabular-nums}
figcaption,.caption{color:var(--muted);font-size:13px;line-height:1.45;margin:8px 4px 2px;max-width:80ch}
.grid{stroke:var(--line);stroke-width:1}
.plot{overflow:hidden}
polyline{fill:none;stroke:currentColor;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
.dot{fill:currentColor;fill-opacity:0}.dot.few,.dot:hover{fill-opacity:1}
.c0{color:var(--c0)}.c1{color:var(--c1)}.c2{color:var(--c2)}.c3{color:var(--c3)}.c4{color:var(--c4)}
.c5{color:var(--c5)}.other{color:var(--c5)}
.card svg .ours .name{fill:var(--text);font-weight:650}
.bar{stroke:currentColor;stroke-width:7;stroke-opacity:.28;stroke-linecap:round}
.ring{fill:var(--card);stroke:currentColor;stroke-width:1;stroke-opacity:.7}.mean{fill:currentColor}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;padding:0 4px;margin:-2px 0 8px;font-size:12.5px}
.legend{color:var(--muted)}
.key i{display:inline-block;width:14px;height:3px;border-radius:2px;background:currentColor;margin-right:6px;
vertical-align:middle}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch;margin:14px 0}
table{border-collapse:collapse;width:100%;font-size:15px;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:9px 14px;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:500}thead th{color:var(--muted);font-size:13px;vertical-align:bottom}
thead th.ours{color:var(--c0)}
th:first-child,td:first-child{text-align:left;padding-left:0;white-space:normal;min-width:150px}
td:last-child,th:last-child{padding-right:0}
td small,th small{color:var(--muted);font-weight:400;font-size:13px}
td b{font-weight:700}
table.settings{font-size:14px}
table.settings td,table.settings th{text-align:left;white-space:normal;
overflow-wrap:anywhere;padding:5px 14px 5px 0}
table.settings th{color:var(--muted);width:34%;min-width:110px}
details{margin:14px 0;border:1px solid var(--line);border-radius:10px;background:var(--card);padding:0 18px}
summary{cursor:pointer;padding:12px 0;font-weight:550;font-size:15px}
details[open]{padding-bottom:14px}
ul.files{margin:0;padding-left:18px;font-size:14px;overflow-wrap:anywhere}
.maps{display:grid;grid-template-columns:82px repeat(var(--n),minmax(58px,1fr));gap:4px;min-width:100%;
align-items:center}
.maps span{color:var(--muted);font-size:13px;position:sticky;left:0;background:var(--card);align-self:stretch;
display:flex;align-items:center;z-index:1}
.maps strong{grid-column:1/-1;position:sticky;left:0;width:fit-content;max-width:min(100%,78vw);
font-size:14px;font-weight:600;margin:16px 0 2px}
.maps strong small{font-weight:400;font-size:13px;color:var(--muted);margin-left:10px}
.maps img{display:block;width:100%;border-radius:4px;image-rendering:pixelated}
.maps img.photo{image-rendering:auto}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:12px}
.pairs figure{margin:0}.pairs img{width:50%;image-rendering:pixelated}
.sheet{width:fit-content;max-width:100%}
.sheet img{display:block;max-width:100%;width:680px;height:auto;border-radius:4px}
footer{margin-top:64px;padding-top:16px;border-top:1px solid var(--line);color:var(--muted);font-size:13px}
@media (max-width:600px){main{padding:28px 16px 48px}h1{font-size:25px}h2{margin-top:44px}
.verdict{font-size:17px}.maps{grid-template-columns:68px repeat(var(--n),minmax(50px,1fr))}}
@media print{:root{--page:#fff;--card:#fff;--text:#000;--muted:#444;--line:#ccc;--c0:#0072b2;--c1:#d55e00;
--c2:#009070;--c3:#b0508c;--c4:#8a6d00;--c5:#6b7580}main{padding:0;max-width:none}h2{break-after:avoid}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}tr,.maps img{break-inside:avoid}
.scroll{overflow:visible}pre{white-space:pre-wrap}}
"""
