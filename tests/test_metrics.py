"""The table, the live view, the clock, metrics.jsonl, wandb and the curves."""

import copy
import io
import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_values

from trainer.config import RunConfig
from trainer.device import HostCopy
from trainer.errors import UserError
from trainer.memory import build_meta
from trainer.metrics import console, plots
from trainer.metrics.record import MetricsFile, Wandb, read_rows
from trainer.metrics.report import Clock, Measured, Report
from trainer.plan import resolve
from trainer.run import Run
from trainer.settings import build
from trainer.train import run

ROW = {
    "epoch": 0, "curr_step": 50, "train_loss": 7.12345, "val_loss": 6.5, "val_perplexity": 665.1416, "train_acc": 0.1,
    "val_acc": None, "grad_norm": 0.61152, "microbatch_steps": 1, "total_seconds": 12.0,
}  # fmt: skip


def test_cells_are_right_justified_with_four_decimals():
    header = console.format_cells(dict(zip(console.COLUMNS, console.COLUMNS, strict=True)))
    cells = console.format_cells(ROW)
    assert len(header) == len(cells)
    assert header.split("|")[1:-1] == [f"  {name}  " for name in console.COLUMNS]
    values = [cell.strip() for cell in cells.split("|")[1:-1]]
    assert values == ["0", "50", "7.1235", "6.5000", "665.1416", "0.1000", "", "0.6115", "1", "12.0000"]
    assert cells.split("|")[2] == "  " + "50".rjust(len("curr_step")) + "  "


def test_a_perplexity_that_is_too_wide_for_its_column_is_a_power_of_ten():
    wide = console.format_cells(ROW | {"val_perplexity": 7.3616e43})
    assert len(wide) == len(console.format_cells(ROW)) and "7.362e+43" in wide


def test_table_has_rules_above_below_and_at_the_end(capsys):
    table = console.Table()
    table.row(ROW, {})
    table.close()
    lines = capsys.readouterr().err.splitlines()
    assert [set(line) == {"-"} for line in lines] == [True, False, True, False, True]


def test_live_view_shows_everything(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    live = console.Live("hlb, 46.0 M parameters")
    facts = {"loss": "3.8", "val": "3.9", "bits/byte": "1.2", "tokens/s": "9", "MFU": "n/a", "memory": "1 GiB"}
    live.step({"step": 5, "max_steps": 10, "length": 64, "microbatches": 2, "ETA": "1 min", **facts})
    live.row({**ROW, "train_acc": None}, {"step": 5, "max_steps": 10})
    live.say("[note] with brackets")
    live.close()
    shown = screen.getvalue()
    for text in ("hlb, 46.0 M", "step 5 / 10", "bits/byte", "MFU", "ETA", "val_loss 6.5000", "[note] with brackets"):
        assert text in shown
    assert "[dim]" not in shown, "a note must not switch the panel's styles off"


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


def test_time_goes_to_the_step_that_took_it(monkeypatch):
    class Hands:
        seconds = 0.0

        def stop(self):
            """It is moved by hand."""

    report = Report.__new__(Report)
    report.clock, report._waiting, report._seconds_then = Hands(), None, 0.0
    monkeypatch.setattr(Report, "flush", lambda self: setattr(self, "_waiting", None))
    steps = [Measured(i, 0, 10, 0.0, 16, 1, 0.1, HostCopy(torch.zeros(6))) for i in range(2)]
    report.clock.seconds = 2.0
    report.step_done(steps[0])
    report.clock.seconds = 5.0
    report.step_done(steps[1])
    report.clock.seconds = 6.0  # the device finishes the second step
    report.stop_clock()
    assert [step.elapsed for step in steps] == [2.0, 4.0]
    assert [step.seconds for step in steps] == [2.0, 6.0]


def test_flops_are_those_of_whole_weights(tmp_path, tiny_dataset, monkeypatch):
    """Under zero3 each process's parameters have no numbers between their uses, and none would be counted."""
    plan = resolve(build(RunConfig, tiny_values(tiny_dataset, tmp_path, model={"name": "llama"})))
    whole = build_meta(plan.model_class, plan.model_config)
    parted = copy.deepcopy(whole)
    for parameter in parted.parameters():
        parameter.data = torch.empty(0, device="meta")
    engine = SimpleNamespace(model=parted, device=torch.device("cpu"))
    report = Report(tmp_path, plan, SimpleNamespace(leader=False, size=1), engine, 0, 0.0)
    assert report._flops == {t: whole.flops_per_token(t) for t in plan.sequence_lengths}
    assert parted.flops_per_token(64) < whole.flops_per_token(64)


def test_what_a_row_costs_is_part_of_its_time(tiny_dataset, tmp_path, monkeypatch):
    """The forward pass for the training accuracy of a row of the console."""
    running = []

    def accuracy(self):
        running.append(clocks[0]._running)

    clocks = []
    made = Clock.__init__
    monkeypatch.setattr(Clock, "__init__", lambda self, seconds: (clocks.append(self), made(self, seconds))[1])
    monkeypatch.setattr(Run, "train_accuracy", accuracy)
    run(tiny_values(tiny_dataset, tmp_path / "r", max_steps=2, log__every=1))
    assert running == [True, True]


def test_resumed_metrics_have_each_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(rows(3) + '{"step": 2}\n[1]\n{"step": 4, "lo')
    metrics = MetricsFile(path, resume_step=2)
    row = {**json.loads(rows(1)), "step": 3, "loss": 9}
    metrics.write(row)
    metrics.close()
    assert [(row["step"], row["loss"]) for row in read_rows(path)] == [(1, 5.0), (2, 2.5), (3, 9)]


def rows(count):
    base = {"lr": 1e-3, "val_loss": None, "val_bits_per_byte": None, "tokens_per_second": 9.0}
    made = [
        {"step": i + 1, "tokens": i * 1000, "loss": 5 / (i + 1), "grad_norm": 1.0, "seconds": i, **base}
        for i in range(count)
    ]
    if made:
        made[-1]["val_loss"] = 1.0
    return "".join(json.dumps(row) + "\n" for row in made)


def test_curves(tmp_path):
    (tmp_path / "m.jsonl").write_text(rows(20))
    plots.draw(tmp_path / "m.jsonl", tmp_path / "c.png", "a title")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_curves_of_a_run_that_has_barely_begun_or_skipped_steps(tmp_path):
    (tmp_path / "m.jsonl").write_text(rows(1))
    plots.draw(tmp_path / "m.jsonl", tmp_path / "none.png", "")
    assert not (tmp_path / "none.png").exists()
    (tmp_path / "m.jsonl").write_text(rows(5) + '{"step": 6, "tokens": 1, "loss": null, "grad_norm": null, "seconds": 6, '
                                      '"lr": 0.1, "val_loss": null}\n')  # fmt: skip
    plots.draw(tmp_path / "m.jsonl", tmp_path / "some.png", "")
    assert (tmp_path / "some.png").exists()


@pytest.mark.slow
def test_wandb_offline_without_login_and_the_same_id_on_resume(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("WANDB_MODE", "")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    said = []
    for _ in range(2):
        recorder = Wandb("auto", "p", tmp_path, {"a": 1}, said.append)
        recorder.write({"step": 1, "loss": 2.0, "val_loss": None})
        recorder.close()
    assert said and "recording offline" in said[0]
    run_id = (tmp_path / "wandb-id").read_text()
    assert list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}"))


def test_wandb_disabled_imports_nothing(tmp_path):
    recorder = Wandb("disabled", "p", tmp_path, {}, print)
    recorder.write({"step": 1})
    recorder.close()
    assert not (tmp_path / "wandb").exists()


def test_a_full_disk_at_a_row_names_the_file(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0)
    metrics._file.close()
    metrics._file = open("/dev/full", "a")
    with pytest.raises(UserError, match="metrics.jsonl: cannot be written: No space left"):
        metrics.write({"step": 1})
