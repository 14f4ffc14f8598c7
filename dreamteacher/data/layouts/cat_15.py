"""DDPM-seg's cat_15: a few labelled cats of LSUN."""

from __future__ import annotations

from dreamteacher.data.layouts.ddpm_seg import few_labels

# fmt: off
_NAMES = (
    "background", "back", "belly", "chest", "leg", "paw", "head", "ear", "eye", "mouth", "tongue", "nose",
    "tail", "whiskers", "neck",
)
# fmt: on

LAYOUT = few_labels("cat_15", _NAMES, images=(30, 20))
