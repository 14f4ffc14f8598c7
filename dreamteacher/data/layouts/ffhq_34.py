"""DDPM-seg's ffhq_34: a few labelled faces of FFHQ."""

from __future__ import annotations

from dreamteacher.data.layouts.ddpm_seg import few_labels

# fmt: off
_NAMES = (
    "background", "head", "cheek", "chin", "ear", "ear helix", "ear lobule", "eye bottom lid",
    "eyelashes", "iris", "pupil", "sclera", "tear duct", "eye top lid", "eyebrow", "forehead", "frown",
    "hair", "sideburns", "jaw", "moustache", "inferior lip", "oral commissure", "superior lip", "teeth",
    "neck", "nose", "ala of nose", "nose bridge", "nose tip", "nostril", "philtrum", "temple", "wrinkles",
)
# fmt: on

LAYOUT = few_labels("ffhq_34", _NAMES, images=(20, 20))
