"""Trials of a run that goes on after one digit in one of its small files has become another.

`python tests/crash/flips.py TRIALS` draws that many and counts how they end.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from harness import Lab

KEPT_FOR_PEOPLE = ("plan.txt", "samples.txt")  # nothing is read from these


class Flip(NamedTuple):
    path: Path  # below the folder that stands for the disk
    place: int
    digit: int

    def __str__(self) -> str:
        return f"{self.path} at byte {self.place}"

    def apply(self, content: bytes) -> bytes:
        digit = (int(chr(content[self.place])) + self.digit) % 10
        return content[: self.place] + str(digit).encode() + content[self.place + 1 :]


def same_content(before: bytes, after: bytes) -> bool:
    """Whether two files of JSON hold the same values."""
    try:
        return json.loads(before) == json.loads(after)
    except ValueError:
        return False


class FlipLab:
    """A run of four steps, and what two more come to when nothing is changed."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.base = lab.folder / "base"
        shutil.rmtree(lab.disk)
        lab.disk.mkdir()
        assert lab.run(more=("--checkpoint.keep", "2"))[0] == 0, lab.log
        shutil.copytree(lab.disk, self.base)
        assert self.go_on() == 0, lab.log
        lab.expected = lab.result()

    def go_on(self) -> int:
        return self.lab.run(more=("--checkpoint.keep", "2", "--max_steps", "6"))[0]

    def files(self) -> list[Path]:
        paths = sorted(path for path in self.base.rglob("*") if path.is_file() and path.name not in KEPT_FOR_PEOPLE)
        small = [path for path in paths if path.suffix in (".json", ".jsonl", ".yaml") or path.name == "latest"]
        return [path.relative_to(self.base) for path in small]

    def draw(self, count: int, seed: int) -> list[Flip]:
        """Flips spread evenly over the files, whatever their size."""
        draw, files = random.Random(seed), self.files()
        return [self._draw_one(files[number % len(files)], draw) for number in range(count)]

    def _draw_one(self, path: Path, draw: random.Random) -> Flip:
        """One that changes what is read: the last digits of a long number may leave it what it is."""
        before = (self.base / path).read_bytes()
        places = [place for place, byte in enumerate(before) if chr(byte).isdigit()]
        while True:
            flip = Flip(path, draw.choice(places), draw.randrange(1, 10))
            if path.suffix != ".json" or not same_content(before, flip.apply(before)):
                return flip

    def attempt(self, flip: Flip) -> str:
        """found (named, and the run ended as it should), refused (named), or what must not be."""
        shutil.rmtree(self.lab.disk)
        shutil.copytree(self.base, self.lab.disk)
        file = self.lab.disk / flip.path
        file.write_bytes(flip.apply(file.read_bytes()))
        code, log = self.go_on(), self.lab.log
        named = flip.path.name in log
        if "Traceback" in log:
            return "traceback"
        if code:
            return "refused" if named and "error: " in log else "refused, not named"
        if not self.lab.is_expected(rows_too=flip.path.name != "metrics.jsonl"):  # its changed row stays, and is told
            return "different"
        return "found" if named else "silent"


def main() -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        lab = Lab(Path(scratch))
        flips = FlipLab(lab)
        counts: Counter[str] = Counter()
        for flip in flips.draw(int(sys.argv[1]), 0):
            end = flips.attempt(flip)
            counts[end] += 1
            if end not in ("found", "refused"):
                print(f"{flip}: {end}: {' | '.join(lab.log.splitlines()[-2:])}", flush=True)
        print(dict(counts))
        lab.close()


if __name__ == "__main__":
    main()
