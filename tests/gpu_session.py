"""What tests/gpu.sh asks: `packages` names what is not installed; `table FOLDER` sums up its steps. Needs only Python itself."""

import importlib.metadata
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TEST_PACKAGES = ("pytest", "pytest-xdist")
HEADER = (
    *("step", "result", "seconds", "passed / failed / skipped", "steps", "training s", "first step s", "compile s"),
    *("ms/step", "tokens/s", "MFU", "peak GiB"),
)
NONE = "-"


def missing_packages() -> list[str]:
    """Names of packages that Crescendo or a package it needs requires and that are not installed. torch's own are not looked for."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    assert listed is not None
    seen: set[str] = set()
    missing: list[str] = []
    waiting = [*TEST_PACKAGES, *re.findall(r'^ *"([\w.-]+)', listed[1], re.MULTILINE)]
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if name != "torch":
            waiting += [
                re.split(r"[^\w.-]", one)[0] for one in requires if ";" not in one
            ]  # a marker: an extra, another system
    return sorted(missing)


def table(folder: Path) -> str:
    """A row for each step of steps.tsv, with the figures in its files; a bench has a row for each candidate."""
    path = folder / "steps.tsv"
    steps = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    rows = [list(HEADER)]
    for name, result, seconds in steps:
        lines = figures(folder, name) or [{}]
        for number, found in enumerate(lines):
            row = {"step": name, "result": result, "seconds": seconds} if number == 0 else {"step": ""}
            rows.append([str({**row, **found}.get(column, NONE)) for column in HEADER])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    body = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    notes = [f"logs, runs and benches: {folder}"]
    if (folder / "failures.txt").exists():
        notes.append(f"failed tests: {folder / 'failures.txt'}")
    notes += [f"top operations: {path}" for path in sorted(folder.glob("*/profile/operations.txt"))]
    return "\n".join([*body, *notes])


def figures(folder: Path, name: str) -> list[dict[str, str]]:
    """The cells of a step's rows, as far as its files have them."""
    if name == "tests":
        return of_tests((folder / "tests.log").read_text(encoding="utf-8", errors="replace"))
    if (folder / name / "bench.json").exists():
        return of_bench(json.loads((folder / name / "bench.json").read_text(encoding="utf-8")))
    if (folder / name / "metrics.jsonl").exists():
        return of_run((folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return []


def of_tests(log: str) -> list[dict[str, str]]:
    """The counts of what pytest-xdist has reported so far, each test once: a test that passed may fail as it is torn down."""
    ends: dict[str, str] = {}
    for end, test in re.findall(r"^\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|ERROR|SKIPPED) (.*?) *$", log, re.MULTILINE):
        ends[test] = "FAILED" if "FAILED" in (ends.get(test), end) or end == "ERROR" else end
    counts = [list(ends.values()).count(end) for end in ("PASSED", "FAILED", "SKIPPED")]
    return [{"passed / failed / skipped": " / ".join(map(str, counts))}]


def of_run(lines: list[str]) -> list[dict[str, str]]:
    """From the first and the last whole row of metrics.jsonl."""
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    if not rows:
        return []
    row = rows[-1]
    return [
        {
            "steps": str(row["step"]),
            "training s": number(row["seconds"], ".1f"),
            "first step s": number(rows[0]["seconds"], ".1f"),
            "compile s": number(row.get("compile_seconds"), ".1f"),
            "tokens/s": number(row["tokens_per_second"], ",.0f"),
            "MFU": number(row.get("mfu"), ".1%"),
        }
    ]


def of_bench(body: dict[str, Any]) -> list[dict[str, str]]:
    """A row for each candidate, below the row of the bench itself."""
    found: list[dict[str, str]] = [{}]
    for row in body["rows"]:
        found.append(
            {
                "step": f"  {row['name']}",
                "first step s": number(row["first_step_seconds"], ".1f"),
                "ms/step": number(row["phases_ms"]["step"], ".1f"),
                "tokens/s": number(row["tokens_per_second"]["median"], ",.0f"),
                "MFU": number(row["mfu"], ".1%"),
                "peak GiB": number(row["peak_memory_bytes"] / 2**30, ".2f"),
            }
        )
    return found


def number(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


if __name__ == "__main__":
    if sys.argv[1] == "packages":
        missing = missing_packages()
        if missing:
            print(f"not installed, so that some steps may fail: {' '.join(missing)}; pip install -e '.[dev,gpu]'")
    else:
        print(table(Path(sys.argv[2])))
