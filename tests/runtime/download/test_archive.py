"""Archives that mean harm: only the wanted regular files come out, and nothing lies outside."""

from __future__ import annotations

import gzip
import io
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from dreamteacher.runtime.download import archive as download_archive
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
    found = extract(archive, tmp_path / "out", WANTED, most=10**6)
    assert found == [tmp_path / "out" / "run" / "G_ema_best.pth"]
    assert found[0].read_bytes() == CONTENT
    assert names(tmp_path) == [archive.name, "out/run/G_ema_best.pth"]


def test_a_tar_that_ends_in_a_zip_is_a_tar(tmp_path: Path) -> None:
    """PyTorch's files are zips: where one ends an uncompressed tar, both readers would take it."""
    inner = zipped(tmp_path / "G_ema.pth", {"data.pkl": b"weights"}).read_bytes()
    archive = tarball(tmp_path / "a.tar", {"G_ema.pth": inner})
    raw = archive.read_bytes()
    archive.write_bytes(raw[: 512 + -(-len(inner) // 512) * 512])
    assert extract(archive, tmp_path / "out", WANTED, most=10**6)[0].read_bytes() == inner


@pytest.mark.parametrize("kind", ["tar.gz", "zip"])
@pytest.mark.parametrize(
    "name", ["../G_ema.pth", "/G_ema.pth", "a/../../G_ema.pth", "C:/G_ema.pth", "..\\G_ema.pth"]
)
def test_a_name_that_leads_out_refuses_the_archive(kind: str, name: str, tmp_path: Path) -> None:
    make = zipped if kind == "zip" else tarball
    archive = make(tmp_path / f"a.{kind}", {"good/G_ema.pth": b"good", name: b"bad"})
    with pytest.raises(UserError, match="leads out of its folder") as error:
        extract(archive, tmp_path / "in" / "out", WANTED, most=10**6)
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
        extract(archive, tmp_path / "out", WANTED, most=10**6)
    assert names(tmp_path) == ["a.tar.gz"]


def test_a_link_as_folder_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    archive = tarball(tmp_path / "a.tar.gz", {"run/G_ema.pth": b"x"}, link("run", str(tmp_path / "victim")))
    extract(archive, tmp_path / "out", WANTED, most=10**6)
    assert names(tmp_path) == ["a.tar.gz", "out/run/G_ema.pth"]
    assert not (tmp_path / "out" / "run").is_symlink()


def test_a_symbolic_link_in_a_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        info = zipfile.ZipInfo("G_ema.pth")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(UserError, match="holds no file"):
        extract(tmp_path / "a.zip", tmp_path / "out", WANTED, most=10**6)


@pytest.mark.parametrize("kind", ["tar.gz", "zip"])
def test_bombs_are_refused_by_what_they_declare(kind: str, tmp_path: Path) -> None:
    make = zipped if kind == "zip" else tarball
    archive = make(tmp_path / f"a.{kind}", {"log.txt": bytes(3_000_000), "G_ema.pth": b"x"})
    assert archive.stat().st_size < 10_000
    with pytest.raises(UserError, match="declares more than"):
        extract(archive, tmp_path / "out", WANTED, most=2_000_000)
    assert names(tmp_path) == [archive.name]


def header_bombs(count: int) -> dict[str, bytes]:
    """Uncompressed tar files whose headers have `count` bytes of zeros or more, or an end that is none."""

    def head(kind: bytes, size: int, name: str = "x") -> bytes:
        info = tarfile.TarInfo(name)
        info.type, info.size = kind, size
        return info.tobuf(tarfile.GNU_FORMAT)

    def note(*texts: bytes) -> bytes:
        record = b"".join(b"%d %s\n" % (len(text) + 4, text) for text in texts)
        return head(tarfile.XHDTYPE, len(record)) + record.ljust(512, b"\0")

    gaps = bytearray(head(tarfile.GNUTYPE_SPARSE, 0))
    gaps[482] = 1  # more gaps follow
    gaps[148:156] = b" " * 8
    gaps[148:156] = b"%06o\0 " % sum(gaps)
    keys = b"".join(b"%d %06d=\n" % (len("10 000000=") + 1, i) for i in range(count // 11))
    common = head(tarfile.XGLTYPE, 512) + keys[:512]
    member = head(tarfile.REGTYPE, 0)
    return {
        **{kind: head(kind.encode(), count) + bytes(count) for kind in "LKxgX"},
        "a chain": (head(tarfile.GNUTYPE_LONGNAME, 512) + bytes(512)) * (count // 1024),
        "notes for all": (common + member) * (count // 1536),
        "old gaps": bytes(gaps) + bytes([1] * 512) * (count // 512),
        "new gaps": note(b"GNU.sparse.major=1", b"GNU.sparse.minor=0")
        + member
        + b"%d\n" % count
        + b"0\n" * (count // 2),
        "a negative name": member + head(tarfile.GNUTYPE_LONGNAME, -1024) + bytes(count),
        "back for ever": member * 4 + head(tarfile.REGTYPE, -1024) + bytes(1024),
        "back by a note": member * 4 + note(b"size=-2048") + member + bytes(1024),
    }


COUNT = 2_000_000


@pytest.mark.parametrize("name", header_bombs(0))
def test_bombs_in_headers(name: str, tmp_path: Path) -> None:
    """tarfile reads them whole before it shows a member: 10 MB packed would take 10 GB."""
    archive = tmp_path / "a.tar.gz"
    archive.write_bytes(gzip.compress(header_bombs(COUNT)[name] + bytes(1024), 1))
    tracemalloc.start()
    try:
        with pytest.raises(
            UserError, match=r"cannot be taken apart: (more than 65536|a member decl|.*--sparse)"
        ):
            extract(archive, tmp_path / "out", WANTED, most=10**9)
        assert tracemalloc.get_traced_memory()[1] < COUNT / 4
    finally:
        tracemalloc.stop()
    assert names(tmp_path) == [archive.name]


def test_too_many_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_archive, "MOST_MEMBERS", 2)
    archive = tarball(tmp_path / "a.tar.gz", {f"{i}.txt": b"" for i in range(3)})
    with pytest.raises(UserError, match="or 2 files"):
        extract(archive, tmp_path / "out", WANTED, most=10**6)


@pytest.mark.parametrize(("size", "says"), [(3, "larger than it declares"), (9, "ends early")])
def test_a_member_that_lies_about_its_size(size: int, says: str, tmp_path: Path) -> None:
    member = download_archive._Member("G_ema.pth", size, True, io.BytesIO)
    with pytest.raises(ValueError, match=says), open(tmp_path / "file", "wb") as file:
        download_archive._copy(io.BytesIO(b"5 bytes"[:5]), file, member, tmp_path)


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
        extract(archive, tmp_path / "out", WANTED, most=10**6)
    refusal(error)
    assert names(tmp_path) == [archive.name]


def test_a_file_that_occurs_twice(tmp_path: Path) -> None:
    first, again = tarfile.TarInfo("G_ema.pth"), {"./G_ema.pth": b"x"}
    with pytest.raises(UserError, match="occurs twice"):
        extract(tarball(tmp_path / "a.tar", again, first), tmp_path / "out", WANTED, most=10**6)
