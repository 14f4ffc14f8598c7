"""How does this package bear damaged and hostile files? Counts, by kind: read, refused, and what must not happen.

`images`: generated pictures of every format, broken in every way (damaged_pictures.py), through the reader that pretraining
uses. `files`: checkpoints, weights, manifests, shards and archives (damaged_files.py), with pickles that would make a canary
and names that lead out of their folder. Each case runs in a child process with a limit of time and memory. A defect is
an exception that is none of ours, wrong content (bytes and pixels of what is undamaged are compared, and all that has a
checksum), a crash, a hang, code of a file that ran, or a file outside of the target's folder.

    python benchmarks/fuzz/run.py images --count 10000 --out benchmarks/fuzz/images.csv
    python benchmarks/fuzz/run.py files --count 10000 --out benchmarks/fuzz/files.csv
"""

from __future__ import annotations

import argparse
import csv
import json
import mmap
import os
import platform
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import damaged_files
import damaged_pictures
import PIL
import safetensors
import torch
from PIL import Image

from dreamteacher import __version__
from dreamteacher.data.images import BadImageError, read_header, read_image, read_mask
from dreamteacher.runtime.errors import UserError

SECONDS, GIGABYTES = 20, 2  # of a case; of address space beyond what the imports take
GOOD = ("read", "refused")
BAD = ("wrong", "crashed", "hung", "touched")
Case = Callable[[int], tuple[str, str]]  # a number -> (row of the table, outcome)


class Hang(BaseException):
    """A case took too long."""


def image_case(folder: Path, seed: int) -> Case:
    """Reads picture after picture; an outcome that is no word of GOOD says what went wrong."""
    path = folder / "picture"

    def run(number: int) -> tuple[str, str]:
        kind, damage, content = damaged_pictures.case(number, seed)
        path.write_bytes(content)
        try:
            outcome = _read_picture(path, number)
        except BadImageError as error:
            short = len(error.reason.splitlines()) == 1 and len(error.reason) < 300
            outcome = "refused" if short else f"wrong: {error.reason[:80]}"
        if damage in ("none", "bomb"):
            if outcome == "refused" and kind not in ("TIFF", "PPM"):  # some of whose modes are
                outcome = "wrong: a sound picture is refused"
            elif (
                damage == "none"
                and outcome == "read"
                and not torch.equal(read_image(path, None), _pixels(path))
            ):
                outcome = "wrong: other pixels"
        return f"{kind}, {damage}", outcome

    return run


def _pixels(path: Path) -> torch.Tensor:
    """What Pillow alone makes of a sound picture, pixel by pixel: uint8 3 x H x W."""
    with Image.open(path) as image:
        width, height = image.size
        if image.mode.startswith("I"):
            values = struct.unpack(f"={width * height}i", image.convert("I").tobytes())
            grey = bytearray(int(v / 257 + 0.5) for v in values)
            return torch.frombuffer(grey, dtype=torch.uint8).view(1, height, width).expand(3, -1, -1)
        ground = Image.new("RGBA", image.size, "white")
        ground.alpha_composite(image.convert("RGBA"))
        colours = bytearray(ground.convert("RGB").tobytes())
        return torch.frombuffer(colours, dtype=torch.uint8).view(height, width, 3).permute(2, 0, 1)


def _read_picture(path: Path, number: int) -> str:
    header = read_header(path)
    small = header.size[0] * header.size[1] < 10**6
    image = read_image(path, None if small and number % 3 == 0 else (32, 48))
    if image.dtype != torch.uint8 or image.shape[0] != 3 or (number % 3 and image.shape[1:] != (32, 48)):
        return f"wrong: {image.dtype} {tuple(image.shape)}"
    if number % 5 == 0 and small:
        read_mask(path, (32, 48), binary=True)
    return "read"


def file_case(folder: Path, seed: int, kind: str) -> Case:
    """Damages and reads file after file of one kind."""
    (folder / kind).mkdir()
    box = damaged_files.Sandbox(folder / kind)
    read = damaged_files.KINDS[kind](box)

    def run(number: int) -> tuple[str, str]:
        try:
            outcome = "read" if read(random.Random(f"{seed} {kind} {number}")) else "wrong: other content"
        except UserError as error:
            outcome = "refused" if len(str(error).splitlines()) <= 3 else "wrong: a long message"
        return kind, "touched: outside" if box.touched() else outcome

    return run


@contextmanager
def limited() -> Iterator[None]:
    """At most so many seconds, then Hang."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise Hang

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def one(case: Case, number: int) -> tuple[str, str, float]:
    """Row, outcome and seconds of a case: whatever it raises becomes an outcome."""
    begin = time.perf_counter()
    try:
        with limited():
            row, outcome = case(number)
    except Hang:
        row, outcome = "?", "hung"
    except Exception as error:
        row, outcome = "?", f"wrong: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return row, outcome, time.perf_counter() - begin


def in_child(case: Case, numbers: range, log: Path) -> list[list]:
    """Runs cases in forks with a limit of memory; one that dies costs its case, and the next goes on behind it."""
    at, found = mmap.mmap(-1, 8), []
    start = numbers.start
    while start < numbers.stop:
        child = os.fork()
        if not child:
            _limit_memory()
            with open(log, "w") as file:
                for number in range(start, numbers.stop):
                    at[:] = struct.pack("<q", number)
                    done = one(case, number)
                    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                    file.write(json.dumps([number, *done, peak]) + "\n")
                    file.flush()
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found += [json.loads(line) for line in log.read_text().splitlines()]
        start = numbers.stop
        if code:
            start = struct.unpack("<q", at[:])[0] + 1
            found.append([start - 1, "?", f"crashed: {code}", 0.0, 0.0])
    return found


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + GIGABYTES * 10**9
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # libraries speak of damaged files
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["images", "files"])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one kind of `files`")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # Pillow and torch speak of what they then refuse
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder, log = Path(name), Path(name, "log.jsonl")
        if args.what == "images":
            found = in_child(image_case(folder, args.seed), range(args.count), log)
            for row in found:  # a case that died does not say of which kind it was
                row[1] = (
                    "{}, {}".format(*damaged_pictures.case(row[0], args.seed)[:2])
                    if row[1] == "?"
                    else row[1]
                )
        else:
            kinds, found = [args.only] if args.only else list(damaged_files.KINDS), []
            for i, kind in enumerate(kinds):
                case = file_case(folder, args.seed, kind)
                share = args.count * (i + 1) // len(kinds) - args.count * i // len(kinds)
                for row in in_child(case, range(share), log):
                    row[1] = kind
                    found.append(row)
    rows = table(found)
    defects = [row for row in found if row[2] not in GOOD]
    for (kind, outcome), count in Counter((row[1], row[2]) for row in defects).most_common(40):
        numbers = [row[0] for row in defects if (row[1], row[2]) == (kind, outcome)]
        print(f"{count:5} x {kind}: {outcome}, as case {numbers[0]}")
    total = {key: sum(row[key] for row in rows) for key in ("made", *GOOD, *BAD)}
    print(", ".join(f"{v} {k}" for k, v in total.items()), f"{time.perf_counter() - begin:.0f} s", flush=True)
    if args.out:
        write(args.out, rows, total, time.perf_counter() - begin)
    sys.exit(1 if defects else 0)


def table(found: list[list]) -> list[dict]:
    """One row a kind: counts, seconds in all, the slowest case, and the most memory that its processes had."""
    groups = defaultdict(list)
    for row in found:
        groups[row[1]].append(row)
    rows = []
    for kind, group in sorted(groups.items()):
        counts = Counter(row[2].split(":")[0] for row in group)
        rows.append({"kind": kind, "made": len(group)} | {key: counts[key] for key in (*GOOD, *BAD)})
        rows[-1] |= {"seconds": round(sum(row[3] for row in group), 2)}
        rows[-1] |= {"slowest_ms": round(1000 * max(row[3] for row in group), 1)}
        rows[-1] |= {"peak_mb": round(max(row[4] for row in group))}
    return rows


def write(out: Path, rows: list[dict], total: dict[str, int], seconds: float) -> None:
    with open(out, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    facts = {
        "command": "python benchmarks/fuzz/run.py " + " ".join(sys.argv[1:]), **total, "seconds": round(seconds),
        "seconds_a_case": SECONDS, "dreamteacher": __version__, "torch": torch.__version__,
        "safetensors": safetensors.__version__, "pillow": PIL.__version__, "python": platform.python_version(),
        "machine": platform.machine(),
    }  # fmt: skip
    place = out.with_name("environment.json")
    known = json.loads(place.read_text()) if place.is_file() else {}
    place.write_text(json.dumps(known | {out.stem: facts}, indent=2) + "\n")


if __name__ == "__main__":
    main()
