"""The table, the live view, the clock, metrics.jsonl, wandb and the curves."""

import contextlib
import copy
import errno
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_values

from trainer.commands.train import run
from trainer.core.config import RunConfig
from trainer.core.errors import MachineError
from trainer.core.settings import build
from trainer.engine.meta import build_meta
from trainer.planning.plan import resolve
from trainer.runs import console, plots
from trainer.runs import history as history_module
from trainer.runs.history import History, smoothed
from trainer.runs.metrics import MetricsFile, parse_row, read_rows, rewind_samples
from trainer.runs.report import Clock, Report
from trainer.runs.wandb import Wandb, chosen_mode
from trainer.runtime.device import HostCopy
from trainer.runtime.distributed import World
from trainer.training.loop import collecting_by_hand
from trainer.training.step import StepResult

FACTS = {
    "step": 1250, "max_steps": 20_000, "loss": 7.12345, "val": None, "bits/byte": None, "tokens/s": 12_345.6, "MFU": None,
    "ETA": 3_900.0, "more": {"grad norm": "0.6115", "memory": "1.25 GiB", "length": "64", "batch multiplier": "2"},
}  # fmt: skip
EVALUATED = {**FACTS, "val": 6.5, "bits/byte": 1.2345, "MFU": 0.4567}


def test_a_row_stands_under_its_header(capsys):
    table = console.Table()
    for facts in (FACTS, EVALUATED):
        table.step(facts)
        table.row()
    table.close()
    table.close()  # by who says more below it, and again at the end
    lines = capsys.readouterr().err.splitlines()
    assert [set(line) == {"-"} for line in lines] == [True, False, True, False, False, True]
    header, first, second = lines[1], *lines[3:5]
    assert {len(line) for line in lines} == {len(header)} and len(header) <= 100
    assert header.split() == ["step", "loss", "val", "bits/byte", "tokens/s", "MFU", "ETA"] == list(console.COLUMNS)
    assert first.split() == ["1,250", "7.1235", "12,346", "n/a", *"1 h 05 min".split()]
    assert second.split() == ["1,250", "7.1235", "6.5000", "1.2345", "12,346", "45.7%", *"1 h 05 min".split()]


def test_the_loss_of_a_row_is_a_mean_of_the_last_steps():
    figures = console.Figures()
    assert figures.add({**FACTS, "loss": None})["loss"] == ""
    assert figures.add({**FACTS, "loss": 4.0})["loss"] == "4.0000"
    assert figures.add({**FACTS, "loss": 2.0})["loss"] == f"{(4 * 0.95 + 2) / 1.95:.4f}"
    assert figures.add({**FACTS, "loss": None})["loss"] == f"{(4 * 0.95 + 2) / 1.95:.4f}"
    for _ in range(400):
        texts = figures.add({**FACTS, "loss": 1.0})
    assert texts["loss"] == "1.0000"


def test_numbers_and_durations():
    for value, text in ((12.3, "12.3000"), (123456.789, "123456.8"), (7.3616e43, "7.36e+43"), (5, "5")):
        assert console.format_number(value, 8) == text
    for seconds, text in ((0, "0 min 00 s"), (249.9, "4 min 09 s"), (3_600, "1 h 00 min"), (183_600, "2 d 03 h")):
        assert console.format_duration(seconds) == text


def test_a_narrow_terminal_has_fewer_columns():
    for width in (100, 80, 70, 60, 45):
        names = console.fitting(width)
        assert len(console.format_row({}, names)) <= width
        assert {"step", "loss", "val", "ETA"} <= set(names)
    assert console.fitting(80) == console.COLUMNS


def test_live_view_shows_everything(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    live = console.Live("hlb, 46.0 M parameters")
    live.step(EVALUATED)
    live.row()
    live.step(FACTS)  # the result of the validation stays
    live.row()
    live.say("[note] with brackets")
    live.close()
    shown = screen.getvalue()
    for text in (
        "hlb, 46.0 M",
        "step 1,250 / 20,000",
        "bits/byte 1.2345",
        "MFU",
        "ETA",
        "[note] with brackets",
        "0.6115",
    ):
        assert text in shown
    assert shown.count("step 1,250  loss 7.1235  val 6.5000") == 1
    assert "[dim]" not in shown, "a note must not switch the panel's styles off"


LIVE = """
import os, sys, time
from trainer.runs import console
live = console.Live("hlb, 46.0 M parameters")
facts = {facts}
for step in range(1, 4):
    live.step({{**facts, "step": step}})
    live._live.refresh()
os.write(2, b"^C")  # as the terminal shows it
live.say("SIGINT: will stop")
live.step({{**facts, "step": 4}})
live.close()
print("the summary", file=sys.stderr)
"""


def screen_of(written: str, columns: int) -> list[str]:
    """The lines that a terminal shows after `written`."""
    lines, row, column = [""], 0, 0
    for text in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[^\x1b]", written):
        if text == "\r":
            column = 0
        elif text == "\n":
            row += 1
        elif text == "\x1b[2K":
            lines[row] = ""
        elif re.fullmatch(r"\x1b\[\d*A", text):
            row -= int(text[2:-1] or 1)
        elif text[0] != "\x1b":
            if column == columns:
                row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
            lines[row] = lines[row].ljust(column)[:column] + text + lines[row][column + 1 :]
            column += 1
        lines += [""] * (row + 1 - len(lines))
    return [line.rstrip() for line in lines]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("columns", [60, 100, 180])
def test_the_live_view_ends_whole_after_ctrl_c(columns):
    """One panel, what was said above it, the summary below it: the terminal's ^C moves no line."""
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    # COLUMNS, which pytest-xdist sets, would count for more than the size of the terminal.
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns), "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen([sys.executable, "-c", LIVE.format(facts=EVALUATED)], stderr=theirs, env=environment)
    os.close(theirs)
    written = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(ours, 1 << 16):
            written += part
    os.close(ours)
    assert child.wait() == 0
    lines = [line for line in screen_of(written.decode(), columns) if line]
    assert lines[0] == "SIGINT: will stop"
    assert lines[1].startswith("╭─ hlb, 46.0 M parameters  step 4 / 20,000") and lines[-2].startswith("╰─")
    assert lines[-1] == "the summary" and sum("╭" in line for line in lines) == 1
    assert max(map(len, lines)) <= min(100, columns - console.ROOM_FOR_KEYS)


def test_rows_of_earlier_releases_have_the_key_of_today():
    row = json.loads(rows(1))
    assert parse_row(json.dumps({**row, "microbatch_steps": 3}).encode()) == {**row, "batch_multiplier": 3}


def test_only_the_leader_has_a_console():
    assert isinstance(console.open_console("live", False, ""), console.Silent)


def test_clock_counts_training_only():
    clock = Clock(100.0)
    time.sleep(0.05)
    clock.stop()
    held = clock.seconds
    time.sleep(0.05)
    assert clock.seconds == held
    assert 100.04 < held < 101
    clock.start()
    time.sleep(0.02)
    assert clock.seconds > held


def test_further_losses_have_keys_of_their_own(tiny_dataset, tmp_path):
    model = {"name": "llama", "d_model": 64, "n_layers": 1, "n_heads": 2, "n_predict": 2, "z_loss": 0.1}
    run(tiny_values(tiny_dataset, tmp_path / "r", model=model, max_steps=2))
    for row in read_rows(tmp_path / "r" / "metrics.jsonl"):
        assert 0 < row["loss_z_loss"] and 0.8 * row["loss"] < row["loss_head_2"] < 1.2 * row["loss"]


def test_time_goes_to_the_step_that_took_it(tiny_dataset, tmp_path):
    """A step is reported when the next one has been launched; its time ends before that launch."""
    plan = resolve(build(RunConfig, tiny_values(tiny_dataset, tmp_path / "r")))
    engine = SimpleNamespace(device=torch.device("cpu"))
    report = Report(tmp_path, plan, World(), engine, 0, 0.0)
    report.clock = SimpleNamespace(seconds=0.0, stop=lambda: None)  # moved by hand
    first, second = (
        StepResult(
            step, 0, 12, 0.0, {}, 16, 1, 0.1, ("head_2",),
            HostCopy(**{name: torch.ones(1) for name in ("loss", "grad_norm", "finite", "parts")}),
        )
        for step in (1, 2)
    )  # fmt: skip
    report.clock.seconds = 2.0
    report.stamp()
    report.clock.seconds = 5.0
    report.write(report.row(first))
    report.stamp()
    report.clock.seconds = 6.0  # the device finishes the second step
    report.stop_clock()
    report.write(report.row(second))
    report.close()
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["tokens_per_second"] for row in rows] == [6.0, 3.0]
    assert [row["seconds"] for row in rows] == [2.0, 6.0]
    assert [row["loss_head_2"] for row in rows] == [1.0, 1.0]


def test_flops_are_those_of_whole_weights(tmp_path, tiny_dataset, monkeypatch):
    """Under zero3 each process's parameters have no numbers between their uses; FLOPs follow from the Config all the same."""
    plan = resolve(build(RunConfig, tiny_values(tiny_dataset, tmp_path, model={"name": "llama"})))
    whole = build_meta(plan.model_class, plan.model_config)
    parted = copy.deepcopy(whole)
    for parameter in parted.parameters():
        parameter.data = torch.empty(0, device="meta")
    engine = SimpleNamespace(model=parted, device=torch.device("cpu"))
    report = Report(tmp_path, plan, SimpleNamespace(leader=False, size=1), engine, 0, 0.0)
    assert report._flops == {t: whole.flops_per_token(t) for t in plan.sequence_lengths}
    assert parted.flops_per_token(64) == whole.flops_per_token(64)


def test_resumed_metrics_have_each_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(rows(3) + '{"step": 4, "lo')  # cut off by a kill
    said = []
    metrics = MetricsFile(path, 2, said.append)
    metrics.write({**json.loads(rows(1)), "step": 3, "loss": 9})
    metrics.close()
    assert [(row["step"], row["loss"]) for row in read_rows(path)] == [(1, 5.0), (2, 2.5), (3, 9)]
    assert said == [] and not (tmp_path / "metrics.jsonl.damaged").exists()


def test_lines_that_are_no_rows_are_kept_aside_and_told(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first, second = rows(2).splitlines(keepends=True)
    odd = [first.replace('"step": 1', '"step": "7"'), "[1]\n", "\udcff{not json\n", '{"step": 2}\n', "[" * 5000 + "\n"]
    path.write_text(first + "".join(odd) + second, errors="surrogateescape")
    for times in (1, 2):
        said = []
        MetricsFile(path, 2, said.append).close()
        assert path.read_text() == first + second
        assert (tmp_path / "metrics.jsonl.damaged").read_text(errors="surrogateescape") == "".join(odd)
        assert bool(said) == (times == 1)
        if said:
            assert said[0].endswith("5 lines are not rows (line 2); kept in metrics.jsonl.damaged")


def test_samples_after_the_checkpoint_are_cut_off(tmp_path):
    path = tmp_path / "samples.txt"
    kept = "=== step 4\nthe cat\n=== not a header\n\n=== step 8\nsat\n\n"
    for rest in ("", "=== step 9\nlost\n\n", "=== step 12, final\nlost\n\n=== step 8\n"):
        path.write_text(kept + rest)
        rewind_samples(path, 8)
        assert path.read_text() == kept
    rewind_samples(tmp_path / "none.txt", 8)
    assert not (tmp_path / "none.txt").exists()


def rows(count):
    base = {"lr": 1e-3, "val_loss": None, "val_bits_per_byte": None, "tokens_per_second": 9.0}
    made = [
        {"step": i + 1, "tokens": i * 1000, "loss": 5 / (i + 1), "grad_norm": 1.0, "seconds": i, **base}
        for i in range(count)
    ]
    if made:
        made[-1]["val_loss"] = 1.0
    return "".join(json.dumps(row) + "\n" for row in made)


def history_of(text: str) -> History:
    history = History()
    for line in text.splitlines():
        history.add(json.loads(line))
    return history


def test_curves(tmp_path):
    plots.draw(history_of(rows(20)), tmp_path / "c.png", "a $title \u4e2d")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_the_fall_of_the_first_steps_leaves_room_for_the_rest():
    smooth = np.concatenate([np.linspace(11, 4, 50), np.linspace(4, 3, 950)])
    low, high = plots.loss_range(smooth, np.array([3.5, np.nan, 4.2]))
    assert 2.7 < low < 3 and 4.2 < high < 4.5
    nothing = np.full(3, np.nan)
    assert plots.loss_range(nothing, nothing) == (None, None) == plots.loss_range(np.ones(3), nothing)


@pytest.mark.parametrize("skipped", [1, 5])
def test_curves_of_a_run_that_has_barely_begun_or_skipped_steps(tmp_path, skipped):
    plots.draw(history_of(rows(1)), tmp_path / "none.png", "")
    assert not (tmp_path / "none.png").exists()
    nothing = {**json.loads(rows(1)), "loss": None, "grad_norm": None, "val_loss": None}
    history = history_of("" if skipped > 1 else rows(5))
    for _ in range(skipped):
        history.add(nothing)
    plots.draw(history, tmp_path / "some.png", "")
    assert (tmp_path / "some.png").exists()


def test_history_is_bounded_and_keeps_means_and_extremes(monkeypatch):
    monkeypatch.setattr(history_module, "POINTS", 8)
    history, losses = History(), np.random.default_rng(0).normal(size=1000)
    base = json.loads(rows(1))
    for step, loss in enumerate(losses):
        history.add({**base, "tokens": step, "loss": None if step == 3 else float(loss), "val_loss": float(step)})
    losses[3] = np.nan
    steps, every = history.steps(), history.every
    assert every == 64 and len(steps["loss"]) == 16 and len(history._evaluations) < 16
    for point in range(16):
        block = losses[point * every : (point + 1) * every]
        assert steps["loss"][point] == pytest.approx(np.nanmean(block), abs=0.02)
        assert (steps["loss_low"][point], steps["loss_high"][point]) == (np.nanmin(block), np.nanmax(block))
    assert history.evaluations()["val_loss"][-1] >= 990


def test_smoothing_leaves_out_what_is_not_finite_and_shifts_nothing():
    line = np.arange(1000.0)
    assert smoothed(line) == pytest.approx(line)
    line[500] = np.nan
    assert np.isfinite(smoothed(line)).all() and smoothed(line)[500] == pytest.approx(500)
    assert smoothed(np.array([1.0, np.nan, 3.0]))[1] != 2  # too few to smooth


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
def test_pictures_leave_no_memory_behind(tmp_path):
    """As in a run, with Python's garbage collector off: a figure that stays is 9 MB."""
    history = history_of(rows(20))
    plots.draw(history, tmp_path / "c.png", "")
    with collecting_by_hand():
        plots.draw(history, tmp_path / "c.png", "")
        before = resident_bytes()
        for _ in range(3):
            plots.draw(history, tmp_path / "c.png", "")
        assert resident_bytes() - before < 9e6


@pytest.mark.slow
def test_wandb_offline_without_login_and_the_same_id_on_resume(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("WANDB_MODE", "")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for _ in range(2):
        recorder = Wandb("auto", "p", tmp_path, {"a": 1}, World())
        recorder.write({"step": 1, "loss": 2.0, "val_loss": None})
        recorder.close()
    said = capfd.readouterr().err
    assert "recording offline" in said and "warning: " not in said
    run_id = (tmp_path / "wandb-id").read_text()
    assert list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}"))


def test_wandb_with_a_key_and_no_network_records_offline(tmp_path, monkeypatch, capfd):
    """Its service holds on to the id of the run that it could not begin."""
    begun = []

    class Service:
        Settings = dict
        login = staticmethod(lambda **_: True)

        @staticmethod
        def init(**settings):
            begun.append((settings["mode"], settings["id"]))
            if settings["mode"] == "online" or begun.count(begun[-1]) > 1:
                raise ConnectionError("context deadline exceeded\n while retrying")
            return object()

    monkeypatch.setitem(sys.modules, "wandb", Service)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert Wandb("online", "p", tmp_path, {}, World())._run is not None
    (online, run_id), (offline, other_id) = begun
    assert (online, offline) == ("online", "offline") and run_id == (tmp_path / "wandb-id").read_text() != other_id
    assert "no login or network (context deadline exceeded while retrying); recording offline" in capfd.readouterr().err


def test_wandb_disabled_imports_nothing(tmp_path):
    recorder = Wandb("disabled", "p", tmp_path, {}, World())
    recorder.write({"step": 1})
    recorder.close()
    assert not (tmp_path / "wandb").exists()


@pytest.mark.parametrize(
    "mode, wanted, chosen",
    [
        ("online", "", "online"),
        ("online", "offline", "offline"),
        ("auto", "disabled", "disabled"),
        ("auto", "dryrun", "offline"),
        ("offline", "online", "offline"),
        ("disabled", "online", "disabled"),
    ],
)
def test_the_environment_can_quiet_wandb(mode, wanted, chosen):
    assert chosen_mode(mode, {"WANDB_MODE": wanted}) == chosen


class Broken:
    def log(self, values, step):
        raise ConnectionError("the service is gone")

    def finish(self):
        raise ConnectionError("the service is gone")


def test_a_wandb_that_fails_is_told_once(tmp_path, capfd):
    recorder = Wandb("disabled", "p", tmp_path, {}, World())
    recorder._run = Broken()
    for step in (1, 2):
        recorder.write({"step": step, "loss": 1.0})
    assert capfd.readouterr().err == "warning: wandb: the service is gone; training goes on\n"


def test_rows_wait_in_memory_until_they_can_be_written(tmp_path):
    """Also where only a part of a row was written before the disk was full."""
    path = tmp_path / "metrics.jsonl"
    metrics, base = MetricsFile(path, 0, print), json.loads(rows(1))
    metrics.write({**base, "step": 1})
    written = os.write

    def half(descriptor, data):
        if len(data) < 10:
            raise OSError(errno.ESTALE, "Stale file handle")
        return written(descriptor, data[:-5])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", half)
        for step in (2, 3):
            with pytest.raises(MachineError, match="metrics.jsonl: cannot be written: Stale file handle; . rows wait"):
                metrics.write({**base, "step": step})
        with pytest.raises(MachineError):
            metrics.sync()
    metrics.write({**base, "step": 4})
    metrics.sync()
    metrics.close()
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3, 4]


def test_decoration_that_fails_ends_no_run(tiny_dataset, tmp_path, monkeypatch, capfd):
    """Curves, samples and rows cannot be written; each is told once, and the weights are those of an undisturbed run."""

    def broken(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(plots, "write_file", broken)
    (tmp_path / "r" / "samples.txt").mkdir(parents=True)
    changes = {"evaluation__every": 4, "log__sample_tokens": 4, "max_steps": 8}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricsFile, "_flush", broken)
        patch.setattr(MetricsFile, "close", lambda self: None)
        run(tiny_values(tiny_dataset, tmp_path / "r", **changes))
    warnings = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert [line.split(":")[1].strip() for line in warnings] == ["samples.txt", "metrics.jsonl", "curves.png"]
    assert all(line.endswith("; training goes on") for line in warnings)
    assert len(list((tmp_path / "r" / "checkpoints").glob("step-*"))) == 2
