"""The table of export formats: one line each, in the order in which they are listed.

A line is `"name": "module:OBJECT"`; the object is a `dreamteacher.exports.format.Format`. A module is imported when
its format is looked at, so that this table costs nothing.
"""

from __future__ import annotations

FORMATS: dict[str, str] = {
    "timm": "dreamteacher.exports.timm:FORMAT",
    "torchvision": "dreamteacher.exports.torchvision:FORMAT",
    "smp": "dreamteacher.exports.smp:FORMAT",
    "onnx": "dreamteacher.exports.onnx:FORMAT",
    "hub": "dreamteacher.exports.hub:FORMAT",
}
