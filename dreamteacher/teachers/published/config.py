"""What `get-teacher` is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from tyro.conf import Positional

from dreamteacher.teachers.registry import families_by_kind

if TYPE_CHECKING:
    Kind: TypeAlias = str
else:
    Kind = Literal[tuple(families_by_kind())]


@dataclass(frozen=True, kw_only=True)
class GetTeacherConfig:
    """Fetch a published teacher, or make one of a checkpoint of your own. `list teachers` names the published."""

    name: Positional[str] = ""
    """A published teacher's name or hub id; or a new name, for a checkpoint of your own (--file or --url)."""
    file: Path | None = None
    """The published file, archive or folder, already on this machine: nothing is downloaded."""
    like: str | None = None
    """For a checkpoint of your own: the published teacher whose kind and flags it shares."""
    kind: Kind | None = None
    """For a checkpoint of your own: which conversion reads it, where --like names none."""
    settings: tuple[str, ...] = ()
    """Flags as KEY=VALUE (JSON values; null takes a flag away), over those of the published teacher."""
    url: str | None = None
    """Download from here instead: an address (https://...) or a hub repository (OWNER/NAME)."""
    sha256: str | None = None
    """Hex digest that the file must have."""
    prompt: str = ""
    """Stable Diffusion: what its features are conditioned on; empty unless given."""
    vae: str = ""
    """Stable Diffusion: another autoencoder (taesd is nine times cheaper): a name, hub id, folder or file."""
    bank_images: Path | None = None
    """IC-GAN: folder of images of yours; it makes images like them."""
    embedder: Path | None = None
    """IC-GAN: weights of the ResNet-50 that describes them (SwAV's, which it was trained with)."""
    bank_size: int = 1000
    """IC-GAN: at most so many of the images."""
    size: tuple[int, int] | None = None
    """Height and width of its images in pixels, where the files leave them open."""
    licence: str | None = None
    """Of the weights, kept with them and shown at every run; for published ones it is known."""
    half: bool = False
    """Store float16: half the disk, and rounded."""
    out: Path | None = None
    """Folder to make; none: in the cache, where --teacher finds it by its name."""
    dry_run: bool = False
    """Only print what would be downloaded and made."""
