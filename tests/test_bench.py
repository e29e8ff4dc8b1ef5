"""`bench` measures every strategy named beside the bare loop, and leaves nothing behind."""

import json

import pytest
import yaml
from conftest import error_line, tiny_values, trainer

pytestmark = pytest.mark.slow


def test_bench_compares_and_cleans_up(tiny_dataset, tmp_path):
    config, disk = tmp_path / "config.yaml", tmp_path / "disk"
    (disk / "checkpoints").mkdir(parents=True)  # as in a run's folder: not bench's to touch
    config.write_text(yaml.safe_dump(tiny_values(tiny_dataset, tmp_path / "run")))
    words = ["bench", config, "--rounds", "1", "--steps_per_round", "1", "--bench_dir", disk, "--json"]
    done = trainer(*words, "--strategies", "single", "--strategies", "fsdp")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    rates = report["tokens_per_second"]
    assert list(rates) == ["bare loop", "single", "fsdp"] and rates["bare loop"]["ratio"] == 1
    assert all(row["tokens_per_second"] > 0 for row in rates.values())
    assert set(report["checkpoint"]) == {"single", "fsdp"}
    assert [path.name for path in disk.iterdir()] == ["checkpoints"]
    assert not (tmp_path / "run").exists()
    assert "engine.strategy" in error_line(trainer(*words, "--strategies", "hsdp"))
