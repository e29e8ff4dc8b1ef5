"""Objectives: what they promise, what is divided by what, and that their settings are settings of a run."""

import re
import sys

import pytest
import torch
from conftest import ROOT, tiny_values
from tiny_runs import make

from models.base import IGNORE, get_model, load_models
from trainer.commands.check import CheckConfig
from trainer.commands.check.suite import names_of, outcome
from trainer.commands.plugins import import_plugin
from trainer.commands.train import run
from trainer.core.config import RunConfig
from trainer.core.errors import UserError
from trainer.core.settings import build
from trainer.objectives import Loss, Objective, build_objective, load_objectives, register_objective, resolve_objective
from trainer.objectives.base import REGISTRY
from trainer.planning.plan import resolve
from trainer.runs.metrics import read_rows
from trainer.testing import objectives
from trainer.testing.subject import Subject

load_models()
load_objectives()
CHECKS = {check.name: check for check in objectives.CHECKS}
PLUGIN = ROOT / "tests" / "plugins" / "label_smoothing.py"


@pytest.fixture
def smoothing(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    return import_plugin(str(PLUGIN)).LabelSmoothing


def checked(name, model="gpt2", **options):
    subject = Subject(model, get_model(model), objective={"name": name, **options}, weighted=True)
    return {check: outcome(subject, CHECKS[check]) for check in CHECKS}


@pytest.mark.parametrize("name", ["distill", "cosine_embedding"])
def test_objectives_with_a_teacher_keep_all_that_is_promised(name, monkeypatch):
    monkeypatch.setattr("trainer.objectives.distill.CHUNK_BYTES", 1 << 14)
    assert set(checked(name, teacher="given by the check").values()) == {("ok", "")}


@pytest.mark.parametrize("model", ["gpt2", "hlb"])
def test_next_token_keeps_all_that_is_promised(model):
    assert set(checked("next_token", model).values()) == {("ok", "")}


def test_a_plugin_is_recognised_and_keeps_all(smoothing):
    assert names_of(CheckConfig(module=str(PLUGIN))) == ([], {}, ["label_smoothing"])
    assert set(checked("label_smoothing").values()) == {("ok", "")}


@pytest.fixture
def broken():
    """Registers objectives for one test."""
    before = dict(REGISTRY)
    yield register_objective
    REGISTRY.clear()
    REGISTRY.update(before)


def test_label_smoothing_of_the_guide_is_twenty_lines_and_trains(tiny_dataset, tmp_path, monkeypatch, broken):
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "trainer" / "objectives" / "README.md").read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    (tmp_path / "smooth.py").write_text(code)
    monkeypatch.setattr(sys, "path", [*sys.path])
    import_plugin(str(tmp_path / "smooth.py"))
    assert set(checked("smooth").values()) == {("ok", "")}
    objective = {"name": "smooth", "smoothing": 0.2}
    small = {"name": "gpt2", "n_layers": 1, "d_model": 16, "n_heads": 2}
    run(tiny_values(tiny_dataset, tmp_path / "r", model=small, objective=objective, max_steps=2))
    assert len(read_rows(tmp_path / "r" / "metrics.jsonl")) == 2


def test_the_layers_of_an_objective_are_checked_with_it(broken):
    @broken("probe")
    class Probe(Objective):
        """A further matrix before the output projection."""

        def linear_layers(self, model, batch):
            width = model.hidden(batch["tokens"]).states.shape[-1]
            return {"before": (width, width)}

        def forward(self, model, batch):
            hidden = model.hidden(batch["tokens"])
            hidden = hidden._replace(states=model.objective_layers["before"](hidden.states))
            return Loss(model.nll(hidden, batch["targets"], batch.get("weights")).sum(), self.count(batch))

    assert set(checked("probe").values()) == {("ok", "")}


def test_a_broken_promise_is_named(broken):
    class Base(Objective):
        def forward(self, model, batch):
            nll = model.nll(model.hidden(batch["tokens"]), batch["targets"], batch.get("weights")).sum()
            return Loss(self.change(nll, batch), self.count(batch))

        def change(self, nll, batch):
            return nll

    @broken("infinite")
    class Infinite(Base):
        def change(self, nll, batch):
            return nll / 0

    @broken("rows")
    class Rows(Base):
        def count(self, batch):
            return torch.tensor(float(len(batch["tokens"])))

    @broken("means")
    class Means(Base):
        """The mean of each microbatch, which counts by its rows."""

        def change(self, nll, batch):
            return nll / self.count(batch).clamp(min=1)

    @broken("unweighted")
    class Unweighted(Objective):
        def forward(self, model, batch):
            return Loss(model.nll(model.hidden(batch["tokens"]), batch["targets"]).sum(), self.count(batch))

    def failed(name):
        return {check: why for check, (kind, why) in checked(name).items() if kind == "FAILED"}

    assert "not a finite scalar" in failed("infinite")["finite"]
    assert failed("rows")["count"].startswith("count and the weights of the targets")
    assert "microbatches and in one" in failed("means")["microbatches"]
    assert "sums with a target of weight 0" in failed("unweighted")["nothing"]


# -- in a run ----------------------------------------------------------------------------------------------------------


def test_weighted_targets_are_divided_by_the_weights_of_the_whole_step(tiny_dataset, tmp_path):
    """Microbatches that count differently: the gradient is that of the sum over all, divided once."""
    one = make(tiny_dataset, tmp_path, model={"name": "gpt2"})
    draw = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(0, 250, (2, 6, 16), generator=draw)
    targets[0] = targets[3, :9] = IGNORE
    batch = {"tokens": tokens, "targets": targets, "weights": torch.rand(6, 16, generator=draw)}
    count = one.engine.count(batch, 96)
    assert count.item() == pytest.approx(batch["weights"][targets != IGNORE].sum().item(), rel=1e-6)
    parts = [{key: value[i : i + 2] for key, value in batch.items()} for i in (0, 2, 4)]
    loss = sum(one.engine.backward(part, 1 / count, part is parts[-1])[0] for part in parts) / count
    found = {name: parameter.grad.clone() for name, parameter in one.model.named_parameters()}
    one.model.zero_grad()
    logits = one.model(tokens).logits
    nll = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none"
    )
    expected = (nll * batch["weights"].flatten()).sum() / count
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in one.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-7)


def test_without_weights_the_size_of_the_step_is_the_count(tiny_dataset, tmp_path):
    one = make(tiny_dataset, tmp_path)
    assert one.engine.count({"tokens": None, "targets": None}, 512) == 512  # no tensor: nobody waits for a device


def test_settings_are_those_of_the_run(smoothing):
    def plan(**options):
        return resolve(build(RunConfig, {"objective": options, "data": {"tokenizer": "bytes"}, "device": "cpu"}))

    assert plan().config.objective == {"name": "next_token"}
    resolved = plan(name="label_smoothing", smoothing="0.3")
    assert resolved.config.objective == {"name": "label_smoothing", "smoothing": 0.3}
    assert build_objective(resolved.config.objective).config.smoothing == 0.3
    assert any(entry.key == "objective.smoothing" for entry in resolved.entries)


@pytest.mark.parametrize(
    "options, why",
    [
        ({"name": "nobody"}, "objective.name: 'nobody' is not known"),
        ({"name": "next_token", "smoothing": 1}, "objective.smoothing"),
        ({"name": "label_smoothing", "smoothing": 2}, "smoothing"),
    ],
)
def test_wrong_settings_are_one_line(smoothing, options, why):
    with pytest.raises(UserError, match=why):
        resolve_objective(options)


def test_an_objective_that_holds_parameters_is_refused(broken):
    @broken("holding")
    class Holding(Objective):
        def __init__(self, config):
            super().__init__(config)
            self.scale = torch.nn.Parameter(torch.ones(1))

        def forward(self, model, batch):
            raise NotImplementedError

    with pytest.raises(UserError, match="objective holding: holds scale; parameters and buffers belong to the model"):
        build_objective({"name": "holding"})
    with pytest.raises(TypeError, match="Idle must define forward"):

        @broken("idle")
        class Idle(Objective):
            pass
