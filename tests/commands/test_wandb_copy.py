"""`wandb-copy`, against a service in memory that behaves as wandb's does; and that the installed wandb has what is called."""

import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

from trainer.__main__ import dispatch
from trainer.commands import wandb_copy
from trainer.core.errors import MachineError, UserError

SOURCE = "them/speed/abc123"
HISTORY = [
    {"_step": step, "_runtime": 1.0, "_timestamp": 5.0, "loss": 5.0 - step / 100, "lr": None}
    for step in range(0, 100, 25)
]


class Frozen(dict):
    """Of the source: read-only."""

    def __setitem__(self, *_):
        raise AssertionError("the source was written to")

    update = pop = __delitem__ = __setitem__


class File:
    def __init__(self, name, content):
        self.name, self.content = name, content

    def download(self, root, replace):
        path = Path(root) / self.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.content)
        return path.open()


class Stored:
    """A run as the service keeps it."""

    def __init__(self, name="one", state="finished", source=False):
        kind = Frozen if source else dict
        self.name, self.state, self.tags = name, state, ["fast"]
        self.config, self.summary = kind(depth=12), kind({"loss": 4.25, "_runtime": 9, "plot": {"_type": "image-file"}})
        self.rows, self.stored = [], {}

    @property
    def lastHistoryStep(self):
        return self.rows[-1]["_step"] if self.rows else None

    def scan_history(self, use_cache):
        yield from self.rows

    def files(self):
        return [File(name, content) for name, content in self.stored.items()]


class Service:
    """What stands for the package wandb. cut: rows after which the network ends; lost: files that never arrive."""

    errors = SimpleNamespace(Error=type("Error", (Exception,), {}))

    def __init__(self, cut=None, lost=()):
        self.runs, self.cut, self.lost, self.begun = {}, cut, set(lost), []
        original = Stored(source=True)
        original.rows = [dict(row) for row in HISTORY]
        original.rows[1]["picture"] = {"_type": "image-file"}
        original.stored = {"train.log": "speed\n", "code/train.py": "pass\n", "config.yaml": "depth: 12\n"}
        self.runs[SOURCE] = original

    def login(self, prompt, verify):
        assert not prompt
        return True

    def Api(self):
        def run(path):
            if path not in self.runs:
                raise ValueError(f"Could not find run {path}")
            return self.runs[path]

        return SimpleNamespace(run=run, default_entity="us")

    def Settings(self, **given):
        return given

    def init(self, entity, project, id, name, config, tags, **more):
        assert more["resume"] == "allow" and more["mode"] == "online"
        stored = self.runs.setdefault(f"{entity}/{project}/{id}", Stored())
        stored.name, stored.tags = name, tags
        stored.config.update(config)
        stored.summary.clear()
        self.begun.append(f"{entity}/{project}/{id}")
        return Copy(self, stored)


class Copy:
    """A run that is being recorded."""

    def __init__(self, service, stored):
        self.service, self.stored, self.summary = service, stored, stored.summary

    def log(self, values, step):
        rows = self.stored.rows
        if self.service.cut is not None and len(rows) == self.service.cut:
            self.service.cut = None
            raise self.service.errors.Error("network\nis gone")
        if rows and step <= rows[-1]["_step"]:
            raise AssertionError("wandb takes no step twice")
        rows.append({"_step": step, **values})

    def save(self, path, base_path, policy, glob):
        name = str(Path(path).relative_to(base_path))
        if name not in self.service.lost:
            self.stored.stored[name] = Path(path).read_text()

    def finish(self):
        pass


def copied(service, to="us/lines", name=None):
    return wandb_copy.copy_run(service, SOURCE, to, name)


def the_copy(service):
    (path,) = set(service.runs) - {SOURCE}
    return path, service.runs[path]


def test_it_copies_config_steps_summary_and_files():
    service = Service()
    said = copied(service, to="lines", name="record")
    path, copy = the_copy(service)
    assert path.startswith("us/lines/") and f"{path}: a copy of {SOURCE}, 4 rows, 3 files; 1 values" in said
    assert copy.rows == [{"_step": row["_step"], "loss": row["loss"]} for row in HISTORY]
    assert copy.name == "record" and copy.tags == ["fast", "benchmark"]
    assert copy.config == {"depth": 12, "copied_from": SOURCE} and copy.summary == {"loss": 4.25, "copied_rows": 4}
    assert copy.stored == {"train.log": "speed\n", "code/train.py": "pass\n", "source/config.yaml": "depth: 12\n"}


def test_again_it_does_nothing():
    service = Service()
    copied(service)
    assert "is a whole copy" in copied(service) and "4 rows" in copied(service)
    assert len(service.begun) == 1 and len(the_copy(service)[1].rows) == 4


def test_an_interrupted_copy_goes_on_where_it_was():
    service = Service(cut=2)
    with pytest.raises(service.errors.Error):
        copied(service)
    assert "copied_rows" not in the_copy(service)[1].summary
    copied(service)
    assert [row["_step"] for row in the_copy(service)[1].rows] == [0, 25, 50, 75]
    assert the_copy(service)[1].summary["copied_rows"] == 4


def test_it_is_whole_only_when_the_service_has_every_file():
    service = Service(lost=["train.log"])
    with pytest.raises(MachineError, match="lacks train.log; the same command goes on"):
        copied(service)
    service.lost.clear()
    assert "3 files" in copied(service) and len(the_copy(service)[1].rows) == 4


def test_what_cannot_be_copied_is_refused():
    service = Service()
    with pytest.raises(UserError, match="there is no run them/speed/none"):
        wandb_copy.copy_run(service, "them/speed/none", "us/lines", None)
    service.runs[SOURCE].state = "running"
    with pytest.raises(UserError, match="is running; only a finished run is copied"):
        copied(service)
    service.runs[SOURCE].state = "finished"
    copied(service)
    the_copy(service)[1].config["copied_from"] = "another"
    with pytest.raises(UserError, match="is no copy of them/speed/abc123"):
        copied(service)
    outside = Service()
    outside.runs[SOURCE].stored = {"../../x": "1"}
    with pytest.raises(UserError, match="is not inside its run"):
        copied(outside)
    assert set(service.runs) | {SOURCE} == set(service.runs)


@pytest.mark.parametrize(
    "words, told",
    [
        ([], "source: nothing is not ENTITY/PROJECT/RUN_ID"),
        (["a/b", "--to", "c"], "source: a/b is not ENTITY/PROJECT/RUN_ID"),
        (["a/b/c"], "to: nothing is not PROJECT or ENTITY/PROJECT"),
        (["a/b/c", "--to", "d/e/f"], "to: d/e/f is not PROJECT"),
    ],
)
def test_wrong_words_are_refused(words, told):
    with pytest.raises(UserError, match=told):
        dispatch(["wandb-copy", *words])


def test_a_failure_of_the_service_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", Service(cut=1))
    with pytest.raises(
        MachineError, match="the service cannot be reached, or refused: network is gone; the same command goes on"
    ):
        dispatch(["wandb-copy", SOURCE, "--to", "us/lines"])


def test_without_a_login_there_is_one_line(tmp_path):
    """The installed wandb, without a key and without a network."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")} | {
        "HOME": str(tmp_path)
    }
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "wandb-copy", "a/b/c", "--to", "d"],
        capture_output=True, text=True, cwd=ROOT, env=environment | {"NETRC": str(tmp_path / "netrc")}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1] == (
        "error: wandb-copy: nobody is logged in to wandb on this machine; `wandb login` first"
    )


def test_the_installed_wandb_has_what_is_called():
    import wandb
    from wandb.apis import public

    assert {"use_cache"} <= set(inspect.signature(public.Run.scan_history).parameters)
    assert {"root", "replace"} <= set(inspect.signature(public.File.download).parameters)
    assert {"base_path", "policy", "glob"} <= set(inspect.signature(wandb.Run.save).parameters)
    called = {"entity", "project", "id", "name", "config", "tags", "job_type", "resume", "mode", "dir", "settings"}
    assert called <= set(inspect.signature(wandb.init).parameters)
    assert {"run", "default_entity"} <= set(dir(public.Api)) and {"lastHistoryStep", "files", "summary"} <= set(
        dir(public.Run)
    )
    assert issubclass(public.runs.RunNotFoundError, ValueError)
    wandb.Settings(
        silent=True, console="off", x_disable_stats=True, x_disable_meta=True, disable_git=True, disable_code=True
    )
