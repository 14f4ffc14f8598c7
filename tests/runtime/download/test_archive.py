"""Archives that mean harm: only the wanted regular files come out, and nothing lies outside."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from dreamteacher.runtime.download.archive import extract, is_archive
from dreamteacher.runtime.errors import UserError
from tests.runtime.download.test_http import CONTENT, names, refusal

# --- archives -----------------------------------------------------------------------------------------------

WANTED = ["*G_ema*.pth"]


def tarball(path: Path, members: dict[str, bytes], *others: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for info in others:
            archive.addfile(info)
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def link(name: str, to: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.tar.gz", True), ("a.TGZ", True), ("a.zip", True), ("a.tar", True), ("swav.pth.tar", False),
        ("G.pth", False), ("ffhq.pkl", False),
    ],
)  # fmt: skip
def test_archives_by_name(name: str, expected: bool) -> None:
    assert is_archive(Path(name)) == expected


@pytest.mark.parametrize("kind", ["tar.gz", "tar", "zip"])
def test_only_wanted_files_are_written(kind: str, tmp_path: Path) -> None:
    members = {"run/G_ema_best.pth": CONTENT, "run/D.pth": b"d", "run/log.txt": b"log"}
    make = zipped if kind == "zip" else tarball
    archive = make(tmp_path / f"a.{kind}", members)
    found = extract(archive, tmp_path / "out", WANTED)
    assert found == [tmp_path / "out" / "run" / "G_ema_best.pth"]
    assert found[0].read_bytes() == CONTENT
    assert names(tmp_path) == [archive.name, "out/run/G_ema_best.pth"]


def test_a_tar_that_ends_in_a_zip_is_a_tar(tmp_path: Path) -> None:
    """PyTorch's files are zips: where one ends an uncompressed tar, both readers would take it."""
    inner = zipped(tmp_path / "G_ema.pth", {"data.pkl": b"weights"}).read_bytes()
    archive = tarball(tmp_path / "a.tar", {"G_ema.pth": inner})
    raw = archive.read_bytes()
    archive.write_bytes(raw[: 512 + -(-len(inner) // 512) * 512])
    assert extract(archive, tmp_path / "out", WANTED)[0].read_bytes() == inner


@pytest.mark.parametrize("kind", ["tar.gz", "zip"])
@pytest.mark.parametrize(
    "name", ["../G_ema.pth", "/G_ema.pth", "a/../../G_ema.pth", "C:/G_ema.pth", "..\\G_ema.pth"]
)
def test_a_name_that_leads_out_refuses_the_archive(kind: str, name: str, tmp_path: Path) -> None:
    make = zipped if kind == "zip" else tarball
    archive = make(tmp_path / f"a.{kind}", {"good/G_ema.pth": b"good", name: b"bad"})
    with pytest.raises(UserError, match="leads out of its folder") as error:
        extract(archive, tmp_path / "in" / "out", WANTED)
    refusal(error)
    assert names(tmp_path) == [archive.name]


@pytest.mark.parametrize(
    "other",
    [
        link("G_ema.pth", "/etc/passwd"),
        link("G_ema.pth", "../../secret", tarfile.LNKTYPE),
        link("G_ema.pth", "", tarfile.CHRTYPE),
        link("G_ema.pth", "", tarfile.FIFOTYPE),
        link("G_ema.pth", "", tarfile.DIRTYPE),
    ],
    ids=["symbolic link", "hard link", "device", "pipe", "folder"],
)
def test_nothing_but_regular_files_is_written(other: tarfile.TarInfo, tmp_path: Path) -> None:
    archive = tarball(tmp_path / "a.tar.gz", {"log.txt": b"log"}, other)
    with pytest.raises(UserError, match="holds no file"):
        extract(archive, tmp_path / "out", WANTED)
    assert names(tmp_path) == ["a.tar.gz"]


def test_a_link_as_folder_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    archive = tarball(tmp_path / "a.tar.gz", {"run/G_ema.pth": b"x"}, link("run", str(tmp_path / "victim")))
    extract(archive, tmp_path / "out", WANTED)
    assert names(tmp_path) == ["a.tar.gz", "out/run/G_ema.pth"]
    assert not (tmp_path / "out" / "run").is_symlink()


def test_a_symbolic_link_in_a_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        info = zipfile.ZipInfo("G_ema.pth")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(UserError, match="holds no file"):
        extract(tmp_path / "a.zip", tmp_path / "out", WANTED)


def damage(raw: bytes, how: str) -> bytes:
    if how == "encrypted":  # the flag in the local head and in the directory
        changed = bytearray(raw)
        changed[6] |= 1
        changed[raw.index(b"PK\x01\x02") + 8] |= 1
        return bytes(changed)
    return {"truncated": raw[: len(raw) // 2], "text": b"<html>not found</html>", "empty": b""}[how]


@pytest.mark.parametrize(
    ("kind", "how"),
    [(k, h) for k in ("tar.gz", "tar", "zip") for h in ("truncated", "text", "empty")]
    + [("zip", "encrypted")],
)
def test_damaged_archives(kind: str, how: str, tmp_path: Path) -> None:
    make = zipped if kind == "zip" else tarball
    archive = make(tmp_path / f"a.{kind}", {"G_ema.pth": CONTENT})
    archive.write_bytes(damage(archive.read_bytes(), how))
    with pytest.raises(UserError, match="cannot be taken apart") as error:
        extract(archive, tmp_path / "out", WANTED)
    refusal(error)
    assert names(tmp_path) == [archive.name]


def test_a_file_that_occurs_twice(tmp_path: Path) -> None:
    first, again = tarfile.TarInfo("G_ema.pth"), {"./G_ema.pth": b"x"}
    with pytest.raises(UserError, match="occurs twice"):
        extract(tarball(tmp_path / "a.tar", again, first), tmp_path / "out", WANTED)
