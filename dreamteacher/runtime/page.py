"""The frame of every HTML page: style, header, pictures as data."""

from __future__ import annotations

import base64
import html
import io

from torch import Tensor

from dreamteacher import __version__


def data_uri(image: Tensor, longest: int | None = None) -> str:
    """A PNG of an image (uint8 3 x H x W) as a data URI, shrunk so that no side is above `longest` pixels."""
    from torchvision.transforms.v2.functional import resize, to_pil_image

    height, width = image.shape[-2:]
    if longest is not None and max(height, width) > longest:
        ratio = longest / max(height, width)
        size = [max(1, round(height * ratio)), max(1, round(width * ratio))]
        image = resize(image, size, antialias=True)
    file = io.BytesIO()
    to_pil_image(image).save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


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
