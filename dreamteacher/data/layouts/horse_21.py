"""DDPM-seg's horse_21: a few labelled horses of LSUN."""

from __future__ import annotations

from dreamteacher.data.layouts.ddpm_seg import few_labels

# fmt: off
_NAMES = (
    "background", "person", "back", "barrel", "bridle", "chest", "ear", "eye", "forelock", "head", "hoof",
    "leg", "mane", "muzzle", "neck", "nostril", "tail", "thigh", "saddle", "shoulder", "leg protection",
)
# fmt: on

LAYOUT = few_labels("horse_21", _NAMES, images=(30, 30))
