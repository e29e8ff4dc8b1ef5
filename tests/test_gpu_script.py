"""tests/gpu.sh as far as it goes without a GPU: its commands, its table, and what it says when it is stopped."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import gpu_session
import pytest
import torch
from conftest import HARM, PATIENCE, ROOT

from trainer.__main__ import dispatch

SCRIPT = ROOT / "tests" / "gpu.sh"


def script(*words) -> subprocess.Popen:
    environment = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    return subprocess.Popen(
        [SCRIPT, *map(str, words)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def planned(*words) -> list[list[str]]:
    """The commands of a dry run, without `env NAME=VALUE`."""
    out, err = script("--minutes", "12", "--dry-run", *words).communicate(timeout=PATIENCE)
    assert err == ""
    lines = [shlex.split(line) for line in out.splitlines()]
    return [line[2:] if line[0] == "env" else line for line in lines]


@pytest.mark.parametrize("tiny", [(), ("--tiny",)], ids=str)
def test_every_command_of_the_trainer_is_parsed(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    verbs = []
    for line in planned("--out", tmp_path / "out", *tiny):
        assert line[:2] == ["python", "-m"]
        if line[2] == "trainer":
            dispatch([*line[3:], *([] if line[3] == "prepare" else ["--device", "cpu"]), "--print_config"])
            verbs.append(line[3])
    assert verbs == ["prepare", "train", "train", "train", "bench", "bench", "train", "train"]
    assert not (tmp_path / "out").exists()


def test_the_command_of_the_tests_finds_every_file_with_one(pytestconfig, monkeypatch):
    monkeypatch.chdir(ROOT)
    [line] = [line for line in planned() if line[2] == "pytest"]
    known, unknown = pytestconfig._parser.parse_known_and_unknown_args(line[3:])
    assert not [
        word for word in unknown if word.startswith("-") and word not in ("-n", "--dist", "--no-loadscope-reorder")
    ]
    assert (known.markexpr, known.all) == ("gpu", True) and known.failures.name == "failures.txt"
    marked = {str(path.relative_to(ROOT)) for path in ROOT.glob("tests/**/test_*.py") if ".gpu(" in path.read_text()}
    assert marked - {"tests/test_gpu_script.py"} <= set(known.file_or_dir)


@pytest.mark.parametrize(
    "words, line",
    [
        ((), "error: --minutes: needs a whole number above 0"),
        (("--minutes", "0"), "error: --minutes: needs a whole number above 0"),
        (("--minutes", "3", "--out", ROOT), f"error: --out: {ROOT} exists already"),
        (("--fast",), "error: --fast: unknown; tests/gpu.sh --minutes N"),
    ],
    ids=str,
)
def test_a_wrong_word_is_told_in_one_line(words, line):
    process = script(*words)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2 and out == "" and err.startswith(line) and err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_without_a_gpu_nothing_begins(tmp_path):
    process = script("--minutes", "3", "--out", tmp_path / "out")
    assert "error: torch is not installed or sees no GPU" in process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 2 and not (tmp_path / "out").exists()


def test_a_session_that_is_stopped_prints_its_table(tmp_path):
    process = script("--minutes", "5", "--tiny", "--out", tmp_path / "out")
    while not (tmp_path / "out" / "tests.log").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143
    header, row, *_ = [line for line in out.splitlines() if not line.startswith("not installed")]
    assert header.split()[:3] == ["step", "result", "seconds"] and row.split()[:2] == ["tests", "stopped"]
    assert f"logs, runs and benches: {tmp_path / 'out'}" in out


@pytest.mark.nightly
def test_a_whole_session_on_a_cpu(tmp_path):
    out, err = script("--minutes", "30", "--tiny", "--out", tmp_path / "out").communicate(timeout=1800)
    rows = [line.split() for line in out.splitlines() if line[:3] in ("tes", "dat", "hlb", "gpt")]
    steps = "tests data-bytes hlb-cold hlb-warm hlb-eager hlb-bench gpt2-bench hlb-profile gpt2-profile".split()
    assert [row[:2] for row in rows] == [[name, "ok"] for name in steps], out + err
    assert "bare loop" in out and "nanogpt" in out and out.count("operations.txt") == 2


# -- the table ---------------------------------------------------------------------------------------------------------------


def test_the_table_has_the_figures_of_every_step(tmp_path):
    steps = ["tests\tout of time\t300", "hlb-cold\tok\t80", "hlb-bench\tfailed (1)\t9", "gpt2-bench\tok\t70"]
    (tmp_path / "steps.tsv").write_text("\n".join(steps) + "\n")
    ends = ["PASSED tests/a.py::x[one two]", "FAILED tests/a.py::y", "PASSED tests/a.py::z ", "ERROR tests/a.py::z"]
    ends += ["SKIPPED tests/a.py::w@launching"]
    lines = [f"[gw{i % 2}] [ {i}0%] {end}" for i, end in enumerate(ends)]
    (tmp_path / "tests.log").write_text("\n".join([*lines, "FAILED tests/a.py::y - of the summary", "[gw0] [ 9%] PAS"]))
    (tmp_path / "failures.txt").touch()
    (tmp_path / "hlb-cold").mkdir()
    row = {"step": 500, "seconds": 61.25, "tokens_per_second": 1e6, "mfu": 0.2, "compile_seconds": 12.0}
    rows = [json.dumps(row | {"step": 1, "seconds": 9.04}), json.dumps(row), '{"step": 501, "sec']
    (tmp_path / "hlb-cold" / "metrics.jsonl").write_text("\n".join(rows))
    (tmp_path / "gpt2-bench").mkdir()
    measured = {"name": "bare loop", "first_step_seconds": 3.0, "phases_ms": {"step": 145.0}, "mfu": None}
    measured |= {"tokens_per_second": {"median": 451192.4}, "peak_memory_bytes": 13 * 2**30}
    (tmp_path / "gpt2-bench" / "bench.json").write_text(json.dumps({"rows": [measured]}))

    rows = gpu_session.table(tmp_path).splitlines()
    header = [" ".join(cell.split()) for cell in rows[0].split("  ") if cell]
    assert header == list(gpu_session.HEADER)
    cells = [[cell.strip() for cell in row.split("  ") if cell.strip()] for row in rows[1:6]]
    dashes = ["-"] * 9
    assert cells[0] == ["tests", "out of time", "300", "1 / 2 / 1", *dashes[:8]]
    assert cells[1] == ["hlb-cold", "ok", "80", "-", "500", "61.2", "9.0", "12.0", "-", "1,000,000", "20.0%", "-"]
    assert cells[2] == ["hlb-bench", "failed (1)", "9", *dashes]
    assert cells[3] == ["gpt2-bench", "ok", "70", *dashes]
    assert cells[4] == ["bare loop", "-", "-", "-", "-", "-", "3.0", "-", "145.0", "451,192", "-", "13.00"]
    assert rows[6:] == [f"logs, runs and benches: {tmp_path}", f"failed tests: {tmp_path / 'failures.txt'}"]


def test_a_missing_package_is_named(monkeypatch):
    missing = {*gpu_session.missing_packages()}
    installed = gpu_session.importlib.metadata.requires

    def requires(name):
        if name in ("deepspeed", "hjson", "msgpack"):
            if name == "deepspeed":
                return ["hjson", "msgpack>=1", 'extra_one; extra == "all"']
            raise gpu_session.importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(gpu_session.importlib.metadata, "requires", requires)
    assert gpu_session.missing_packages() == sorted({*missing, "hjson", "msgpack"})


# -- order, and failures as they happen ----------------------------------------------------------------------------------------


def pytest_of(text, folder, *words):
    """pytest with the hooks of tests/conftest.py, on one file."""
    (folder / "test_it.py").write_text("import os, pytest\n" + text)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        ROOT / "pyproject.toml",
        "--rootdir",
        folder,
        "-p",
        "no:cacheprovider",
    ]
    alone = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    return subprocess.run(
        [*map(str, command), "-p", "conftest", *map(str, words), str(folder / "test_it.py")],
        env=alone | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip


def test_the_most_harmful_run_first_and_a_failure_survives_a_kill(tmp_path):
    marked = "\n".join(f'@pytest.mark.gpu("{harm}")\ndef test_{harm}(): pass' for harm in reversed(HARM))
    broken = '\n@pytest.mark.gpu("costly")\ndef test_killed(): os._exit(9)'
    broken += '\n@pytest.mark.gpu("training")\ndef test_broken(): assert 2 + 2 == 5, "arithmetic"\n'
    done = pytest_of(marked + broken, tmp_path, "-m", "gpu", "-vv", "--failures", tmp_path / "failures.txt")
    assert done.returncode == 9, done.stdout + done.stderr
    order = [line.split("::test_")[1].split()[0] for line in done.stdout.splitlines() if "::test_" in line]
    assert order == ["training", "broken", *HARM[1:], "killed"]
    text = (tmp_path / "failures.txt").read_text()
    assert text.startswith("== ") and "test_broken (call)" in text and "AssertionError: arithmetic" in text


def test_a_gpu_test_without_its_harm_is_refused(tmp_path):
    done = pytest_of("@pytest.mark.gpu\ndef test_it(): pass\n", tmp_path)
    assert done.returncode == 4 and f"mark it gpu(...) with one of {', '.join(HARM)}" in done.stderr
