"""A run survives a crash and a fault at any of its file operations, and one wrong digit in its files is never silent.

A sample; --nightly tries all of them (hours). Needs Linux and gcc.
"""

import os
import random
import shutil
import sys

import pytest
from conftest import WHOLE, beyond
from disk import Disk, Record, crashes
from flips import FlipLab
from harness import Lab

TRIALS, FLIPS = 24, 16


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    if sys.platform != "linux" or shutil.which("gcc") is None:
        pytest.skip("needs Linux and gcc")
    lab = Lab(tmp_path_factory.mktemp("lab"))
    yield lab
    lab.close()


@pytest.mark.slow
@pytest.mark.parametrize("whole", WHOLE)
def test_faults_and_crashes(lab, whole):
    trials = lab.trials()
    chosen = trials if whole else random.Random(1).sample(trials, TRIALS)
    wrong = {trial.name: found for trial in chosen if (found := lab.attempt(trial))}
    assert not wrong, f"{len(wrong)} of {len(chosen)} trials: {wrong}"


@pytest.mark.slow
@pytest.mark.parametrize("count", beyond([FLIPS], [FLIPS, 3000]))
def test_flipped_digits(lab, count):
    flips = FlipLab(lab)
    ends = {str(flip): flips.attempt(flip) for flip in flips.draw(count, 1)}
    wrong = {name: end for name, end in ends.items() if end not in ("found", "refused")}
    assert not wrong, f"{len(wrong)} of {len(ends)} flips: {wrong}"


def trace(*records):
    return [
        Record(name, opening, flags, position, path, other, data)
        for name, opening, flags, position, path, other, data in records
    ]


def test_the_disk_that_a_crash_leaves():
    """Written aside and renamed: without the flush of the file its new name may hold nothing."""
    create = os.O_WRONLY | os.O_CREAT
    unflushed = [
        ("open", 1, create, 0, "/r/a.tmp", "-", b""),
        ("write", 1, 0, 0, "-", "-", b"new"),
        ("rename", 0, 0, 0, "/r/a.tmp", "/r/a", b""),
    ]
    flushed = [*unflushed[:2], ("sync", 1, 0, 0, "/r/a.tmp", "-", b""), unflushed[2]]
    folder = [("open", 2, os.O_RDONLY, 0, "/r", "-", b""), ("sync", 2, 0, 0, "/r", "-", b"")]

    def left(records, kind):
        disk = Disk("/r")
        for record in trace(*records):
            disk.apply(record)
        return disk.files(kind)

    assert left(unflushed, "written") == {"a": b"new"}
    assert left(unflushed, "hollow") == {"a": b"\0\0\0"}
    assert left(flushed, "hollow") == {"a": b"new"}
    assert left(flushed, "lost") == {}
    assert left([*flushed, *folder], "lost") == {"a": b"new"}
    disks = [files for _, files in crashes(trace(*flushed), "/r")]
    assert {"a.tmp": b"n"} in disks and {"a.tmp": b"\0\0\0"} in disks
