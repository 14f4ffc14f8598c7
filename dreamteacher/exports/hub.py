"""timm's format with what the model hub wants of a card: a licence by its identifier, the library, tags, the data's identifiers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dreamteacher.exports.card import terms_of
from dreamteacher.exports.config import OTHER, ExportConfig
from dreamteacher.exports.format import Exported, Format
from dreamteacher.exports.timm import FORMAT as TIMM
from dreamteacher.exports.timm import make_timm
from dreamteacher.models.student import Student
from dreamteacher.runtime.errors import UserError, did_you_mean, shorten

# The hub's identifiers (huggingface.co/docs/hub/repositories-licenses), without those of single models.
LICENCES = (
    "afl-3.0", "agpl-3.0", "apache-2.0", "artistic-2.0", "bigcode-openrail-m", "bigscience-openrail-m", "bsd",
    "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "bsl-1.0", "c-uda", "cc", "cc-by-2.0", "cc-by-3.0",
    "cc-by-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0",
    "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0",
    "cc0-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "cdla-sharing-1.0", "creativeml-openrail-m", "gpl",
    "gpl-2.0", "gpl-3.0", "isc", "lgpl", "lgpl-2.1", "lgpl-3.0", "mit", "mpl-2.0", "odbl", "odc-by", "openrail",
    "openrail++", "pddl", "unlicense", "wtfpl", "zlib", OTHER,
)  # fmt: skip
LICENCE_FILE = "LICENSE.md"
_DATASET = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def check_hub(licence: str, datasets: Sequence[str]) -> None:
    """Refuses what the hub would refuse at the upload.

    Args:
        licence: the hub's identifier.
        datasets: the hub's identifiers, "owner/name" or "name".

    Raises:
        UserError: for an unknown licence, or what cannot be a dataset's identifier.
    """
    if licence not in LICENCES:
        raise UserError(
            f"The model hub knows no licence '{licence}'.{did_you_mean(licence.lower(), LICENCES)}",
            "Give its identifier (apache-2.0, cc-by-nc-4.0 ...), or 'other'.",
        )
    wrong = [name for name in datasets if not _DATASET.fullmatch(name) or ".." in name or "--" in name]
    if wrong:
        raise UserError(
            f"No dataset of the model hub is called {shorten(map(repr, wrong))}.",
            "Give identifiers, owner/name; a folder of yours is in the card already.",
        )


def front_matter(licence: str, datasets: Sequence[str]) -> str:
    """The YAML block on top of the card; every list as the hub's own editor writes it.

    Example:
        >>> print(front_matter("mit", ["me/birds"]))
        ---
        license: mit
        library_name: timm
        pipeline_tag: image-feature-extraction
        tags:
        - timm
        - image-feature-extraction
        - self-supervised-learning
        - dreamteacher
        datasets:
        - "me/birds"
        ---
        <BLANKLINE>
    """
    lines = [f"license: {licence}"]
    if licence == OTHER:
        lines += ["license_name: terms-of-teacher-and-images", f"license_link: {LICENCE_FILE}"]
    lines += ["library_name: timm", "pipeline_tag: image-feature-extraction", "tags:"]
    tags = ("timm", "image-feature-extraction", "self-supervised-learning", "dreamteacher")
    lines += [f"- {tag}" for tag in tags]
    if datasets:
        # In quotes: a dataset may be called "null" or "1e3", which YAML would read as something else.
        lines += ["datasets:", *(f"- {json.dumps(name)}" for name in datasets)]
    return "\n".join(["---", *lines, "---", ""])


def licence_text(teacher: str, teachers_licence: str, images: str) -> str:
    """The text of LICENSE.md, which "other" refers to: whose terms there are.

    Args:
        teacher: its name, or "not recorded".
        teachers_licence: its name, or "not recorded".
        images: what the run recorded of them.
    """
    return f"""# Terms of these weights

Whoever trained these weights has not put them under one of the standard licences. What may bind a user:

- the licence of the teacher whose features were distilled ({teacher}): {teachers_licence};
- the terms of the images ({images}).

The uploader can replace this file, and `license:` in README.md, by a licence of their own.
"""


def _make(student: Student, facts: Mapping[str, Any], config: ExportConfig) -> Exported:
    made = make_timm(student, facts, config)
    notes = f"""{made.notes}
Once this folder lies on the model hub, `timm.create_model("hf-hub:OWNER/NAME", pretrained=True)` loads it from
there."""
    terms = {LICENCE_FILE: licence_text(*terms_of(facts))} if config.licence == OTHER else {}
    front = front_matter(config.licence, config.datasets)
    return replace(made, notes=notes, front=front, files={**made.files, **terms})


FORMAT = Format(
    name="hub",
    make=_make,
    check=lambda config: check_hub(config.licence, config.datasets),
    files=(*TIMM.files, LICENCE_FILE),
)
