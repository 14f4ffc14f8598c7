"""DDPM-seg's bedroom_28: a few labelled bedrooms of LSUN."""

from __future__ import annotations

from dreamteacher.data.layouts.ddpm_seg import few_labels

# fmt: off
_NAMES = (
    "bed", "bed footboard", "bed headboard", "bed side rail", "carpet", "ceiling",
    "chandelier or fan blade", "curtain", "cushion", "floor", "table, nightstand or dresser",
    "top of table", "picture or mirror", "pillow", "lamp column", "lamp shade", "wall", "window",
    "curtain rod", "window frame", "chair", "picture frame", "plinth", "door or door frame", "pouf",
    "wardrobe", "plant", "things on table",
)
# fmt: on

LAYOUT = few_labels("bedroom_28", _NAMES, images=(40, 20), background_counts=False)
