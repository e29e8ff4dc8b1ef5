"""What a run folder holds decides how the run goes on: it is checked, and what does not fit is named."""

import dataclasses
import json
import pkgutil
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_values
from tiny_runs import losses, other_data, same, weights

from trainer.checkpoint import format as checkpoint
from trainer.commands.train import run
from trainer.core.errors import Damaged, UserError
from trainer.core.files import sealed
from trainer.runs.opening import open_run
from trainer.training.run import State

pytestmark = pytest.mark.usefixtures("few_windows")


def edit(folder: Path, old: str, new: str) -> None:
    """Change config.yaml as an editor does."""
    path = folder / "config.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_changed_config_is_named_and_that_of_the_checkpoint_taken(finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "r")
    shutil.rmtree(folder / "checkpoints" / checkpoint.step_name(12))
    lr = yaml.safe_load((folder / "config.yaml").read_text())["optim"]["lr"]
    edit(folder, f"lr: {lr}", "lr: 0.5")
    changed = (folder / "config.yaml").read_bytes()
    run({"run_dir": str(folder)})
    assert "its digest is not that of its content" in capsys.readouterr().err
    assert losses(folder) == losses(finished)
    assert same(weights(folder, 12), weights(finished, 12))
    assert yaml.safe_load((folder / "config.yaml").read_text())["optim"]["lr"] == lr
    assert (folder / "config.yaml.changed").read_bytes() == changed


def test_a_changed_config_without_a_checkpoint_is_refused(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "r")
    shutil.rmtree(folder / "checkpoints")
    edit(folder, "seed: 0", "seed: 1")
    with pytest.raises(UserError, match="its digest is not that .*put it back as it was, or remove its first line"):
        run({"run_dir": str(folder)})


def test_every_digit_of_a_config_counts(finished, tmp_path):
    from trainer.planning.run_config import _read

    folder = tmp_path / "r"
    folder.mkdir()
    text = (finished / "config.yaml").read_text()
    start = text.index("format")  # a later format is refused as such
    for place in [
        i for i, character in enumerate(text) if character.isdigit() and not start < i < text.index("digest")
    ]:
        (folder / "config.yaml").write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])
        with pytest.raises(Damaged):
            _read(folder)


def test_a_start_reads_the_config_and_plans_once(finished, tmp_path, monkeypatch):
    calls = []
    for module, name in (
        ("trainer.planning.run_config", "read_config"),
        ("trainer.training.start", "resolve"),
        ("trainer.data.dataset.DatasetInfo", "load"),
    ):
        original = getattr(pkgutil.resolve_name(module), name)

        def counted(*words, original=original, name=name, **options):
            calls.append(name)
            return original(*words, **options)

        monkeypatch.setattr(f"{module}.{name}", counted)
    run({"run_dir": str(shutil.copytree(finished, tmp_path / "r")), "max_steps": 13})
    assert sorted(calls) == ["load", "read_config", "resolve"]


def test_comments_in_a_config_change_nothing(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "r")
    edit(folder, "seed: 0", "# the seed of 2026\nseed: 0")
    run({"run_dir": str(folder)})


def test_a_key_that_an_older_release_did_not_know(finished, tmp_path):
    """It means what that release did; a command may name that value, and no other."""
    folder = shutil.copytree(finished, tmp_path / "r")
    values = yaml.safe_load((folder / "config.yaml").read_text())
    del values["deterministic"], values["optim"]["clip_norm"], values["data"]["separate_documents"]
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    (folder / "checkpoints" / checkpoint.step_name(12) / "manifest.json").unlink()
    with pytest.raises(UserError, match="^optim.clip_norm: .* was started with 0.0, now it is 1.0"):
        run({"run_dir": str(folder), "optim": {"clip_norm": 1.0}})
    run({"run_dir": str(folder), "optim": {"clip_norm": 0}, "deterministic": False})
    assert losses(folder) == losses(finished)
    assert same(weights(folder, 12), weights(finished, 12))


def test_a_config_of_another_release_says_which_one_reads_it(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "r")
    text = (folder / "config.yaml").read_text()
    body = text[text.index("\n") + 1 :] + "novelty: 3\n"
    from trainer.planning.run_config import seal

    for version, line in (
        (2, "crescendo-lm 9.1.0, this is .*unknown key novelty"),
        (3, "has format 3 of crescendo-lm 9.1.0"),
    ):
        (folder / "config.yaml").write_text(seal(body, "9.1.0", str(version)))
        with pytest.raises(UserError, match=line):
            run({"run_dir": str(folder)})


@pytest.mark.parametrize(
    "change, key",
    [({"optim": {"lr": 0.5}}, "optim.lr"), ({"model": {"d_model": 128}}, "model.d_model"), ({"seed": 9}, "seed")],
)
def test_a_run_cannot_change_its_mind(finished, change, key):
    with pytest.raises(UserError, match=f"^{key}: .* was started with"):
        run({"run_dir": str(finished), "max_steps": 30, **change})


def test_kernels_bind_neither_readers_nor_resumptions(tiny_dataset, tmp_path):
    """A run that a GPU's kernels computed, on a machine without: it is read by `auto`, and goes on by others when told."""
    shape = {"name": "llama", "d_model": 32, "n_layers": 1, "n_heads": 2}
    values = tiny_values(tiny_dataset, tmp_path / "r", max_steps=2, model=shape, optim={"recipe": "plain"})
    run(values)
    path = tmp_path / "r" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["model"] |= {"attention_kernel": "flex", "kernels": "liger"}
    path.write_text(yaml.safe_dump(config))
    opened = open_run(str(tmp_path / "r"), None, "cpu", "auto")
    found = opened.model.config
    assert (found.attention_kernel, found.kernels) == ("auto", "auto")
    opened.model(torch.zeros(1, 8, dtype=torch.long))
    run({"run_dir": str(tmp_path / "r"), "max_steps": 3, "model": {"attention_kernel": "torch", "kernels": "auto"}})
    found = yaml.safe_load(path.read_text())["model"]
    assert (found["attention_kernel"], found["kernels"]) == ("torch", "auto")
    run({"run_dir": str(tmp_path / "r"), "max_steps": 4, "model": {"attention_kernel": "auto"}})
    assert yaml.safe_load(path.read_text())["model"]["attention_kernel"] == "auto"
    assert [row[0] for row in losses(tmp_path / "r")] == [1, 2, 3, 4]


def test_a_refused_start_changes_nothing(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "r")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(UserError):
        run({"run_dir": str(folder), "max_steps": 30, "data": {"path": str(other_data(tmp_path))}})
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_checkpoints_without_their_config_are_not_written_over(finished, tiny_dataset, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "r")
    (folder / "config.yaml").unlink()
    with pytest.raises(UserError, match="has checkpoints but no config.yaml"):
        run(tiny_values(tiny_dataset, folder))


def test_a_config_of_another_model_is_named(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "r")
    values = yaml.safe_load((folder / "config.yaml").read_text())
    values["model"]["d_model"], values["max_steps"] = 128, 30
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"^model.d_model: the run's config.yaml says 128, .* was made with 64"):
        run({"run_dir": str(folder)})


def test_a_changed_row_of_metrics_is_told(finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "r")
    run({"run_dir": str(folder), "max_steps": 13})
    assert "are not the ones that this run wrote" not in capsys.readouterr().err
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text().replace('"step": 3, "tokens": ', '"step": 3, "tokens": 1', 1))
    run({"run_dir": str(folder), "max_steps": 14})
    assert "metrics.jsonl: the rows up to step 13 are not the ones that this run wrote" in capsys.readouterr().err


def test_a_state_of_another_version_is_named(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "r")
    path = folder / "checkpoints" / checkpoint.step_name(12) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["state"]["odd"] = 1
    path.write_text(sealed(manifest))
    with pytest.raises(UserError, match="is not this version's"):
        run({"run_dir": str(folder), "max_steps": 30})


@pytest.mark.parametrize(
    "change",
    [
        {"step": -1},
        {"position": 1.5},
        {"tokens": "7"},
        {"k": 0},
        {"n": None},
        {"norm": []},
        {"seconds": True},
        {"step": 1 << 70},
    ],
)
def test_a_state_that_no_run_can_have_is_refused(change):
    state = dataclasses.asdict(State(step=3, position=9, tokens=9))
    assert State.stored(state, Path("manifest.json")) == State(step=3, position=9, tokens=9)
    with pytest.raises(Damaged, match="in manifest.json holds a value that no run can have"):
        State.stored({**state, **change}, Path("manifest.json"))


def test_odd_lines_of_the_environment_are_told_and_left_out(finished, tmp_path, capsys):
    from trainer.planning.run_config import _last_start

    folder = shutil.copytree(finished, tmp_path / "r")
    for end in ('{"time": "2026', "[1, 2]", "null"):
        with (folder / "environment.jsonl").open("a") as file:
            file.write(end)  # without the end of the line, as a kill leaves it
        assert _last_start(folder)["processes"] == 1, "of the start before"
        run({"run_dir": str(folder), "max_steps": 13})
        assert "environment.jsonl, line 2: " in capsys.readouterr().err
        assert len((folder / "environment.jsonl").read_text().splitlines()) > 2
    with (folder / "environment.jsonl").open("a") as file:
        file.write('\n{"processes": "one", "command": 3, "versions": []}\n')
    assert _last_start(folder) == {}
