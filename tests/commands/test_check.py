"""`check`: each promise that a model breaks is named, the others are not, and plug-ins are found by name and by path."""

import re
import sys
from typing import ClassVar

import pytest
import torch
from conftest import error_line, trainer
from processes import forked_trainer
from torch import nn

from models.base import Split, get_model, load_models
from models.presets import Gpt2
from trainer.commands.check import CheckConfig
from trainer.commands.check.suite import KINDS, names_of, outcome, report, subject_of
from trainer.commands.plugins import import_plugin
from trainer.core.errors import UserError
from trainer.optim import names_by_role
from trainer.testing import numbers, sizes, strategies
from trainer.testing.subject import Failed, Subject

CHECKS = {check.name: check for check in (*sizes.CHECKS, *numbers.CHECKS, *strategies.CHECKS)}


class Uncounted(Gpt2):
    def __init__(self, config):
        super().__init__(config)
        self.more = nn.Parameter(torch.ones(2, 2))

    @classmethod
    def count_parameters(cls, config):
        return super().count_parameters(config) - 4


class Roleless(Gpt2):
    def parameter_groups(self):
        return {role: names[1:] for role, names in super().parameter_groups().items()}


class Fat(Gpt2):
    @classmethod
    def config_for_scale(cls, scale, vocab_size, target_parameters, **choices):
        return super().config_for_scale(scale, vocab_size, round(1.1 * target_parameters), **choices)


class Forgetful(Gpt2):
    def init_weights(self, generator=None):
        with torch.no_grad():
            self.embedding.weight.fill_(0)


class Restless(Gpt2):
    def init_weights(self, generator=None):
        super().init_weights(None)


class Prophetic(Gpt2):
    def trunk(self, x, tables, context, cache):
        return super().trunk(x + x.mean(1, keepdim=True), tables, context, cache)


class Mingling(Gpt2):
    def context(self, tokens, documents, cache):
        return super().context(tokens, None, cache)


class Flat(Gpt2):
    """Its loss knows no targets."""

    def loss(self, hidden, targets, reduction, weights=None):
        return hidden.states.float().sum(), {}


class Halved(Gpt2):
    def loss(self, hidden, targets, reduction, weights=None):
        loss, parts = super().loss(hidden, targets, reduction, weights)
        return loss / 2, parts


class Deaf(Gpt2):
    def forward(self, tokens, targets=None, documents=None, cache=None, reduction="mean"):
        return super().forward(tokens, targets, documents, None, reduction)


class Whole(Deaf):
    decodes_incrementally = False


class Boastful(Gpt2):
    def flops_per_token(self, sequence_length):
        return 2 * super().flops_per_token(sequence_length)


class Idle(Gpt2):
    def forward(self, tokens, targets=None, documents=None, cache=None, reduction="mean"):
        self.positions.weight.requires_grad_(False)
        return super().forward(tokens, targets, documents, cache, reduction)


def made(check, model_class):
    return outcome(Subject("mine", model_class), CHECKS[check])


@pytest.mark.parametrize(
    "check, model_class, why",
    [
        ("count", Uncounted, r"count_parameters says [\d,]+, the model has [\d,]+"),
        ("roles", Roleless, "without a role: "),
        ("dial", Fat, "parameters at scale 0.5, the target is"),
        ("initial weights", Forgetful, "init_weights does not set positions.weight, "),
        ("initial weights", Restless, "init_weights draws from torch's global generator"),
        ("causality", Prophetic, "token 1 changes the logits of those before it"),
        ("documents", Mingling, "document .* among others .* and alone: they differ by"),
        ("loss", Halved, "the loss minus its parts and the cross-entropy of the logits"),
        ("ignored targets", Flat, "the sum and the mean times the targets that count"),
        ("no targets", Flat, "if every target is IGNORE, the sum is"),
        ("decoding", Deaf, "logits of 24 calls with a cache and of the whole"),
        ("flops", Boastful, r"flops_per_token\(64\) is [\d,]+, but the count is"),
        ("gradients", Idle, "positions.weight gets no gradient"),
    ],
)
def test_a_broken_promise_is_named(check, model_class, why):
    kind, told = made(check, model_class)
    assert kind == "FAILED" and re.search(why, told), told


def test_what_is_not_promised_is_skipped():
    kind, why = made("decoding", Whole)
    assert kind == "skipped" and "new_state returns None" in why


def test_an_exception_is_told_with_its_place():
    class Raising(Gpt2):
        def forward(self, *args, **kwargs):
            raise RuntimeError("no such kernel")

    kind, why = made("causality", Raising)
    assert kind == "FAILED" and why.startswith("RuntimeError: no such kernel (test_check.py, line ")


def test_nothing_is_tried_on_weights_that_are_not_set(capsys):
    subject = Subject("mine", Forgetful)
    kinds = report(subject, numbers.CHECKS)
    assert kinds[0] == "FAILED" and set(kinds[1:]) == {"skipped"}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "mine (test_check.Forgetful)"
    assert lines[2].endswith("not tried, because this failed: init_weights sets everything, from the seed alone")


def test_a_model_that_keeps_all_trains_and_resumes():
    subject = Subject("gpt2", get_model("gpt2"))
    for check in ("start", "checkpoint", "single"):
        assert outcome(subject, CHECKS[check]) == ("ok", "")


# -- which models ----------------------------------------------------------------------------------------------------------

PLUGIN = """
from dataclasses import dataclass
from models.base import register
from models.presets import Gpt2
from neighbour import NAME

@dataclass
class Extra:
    of: "int" = 3

@register(NAME)
class Model(Gpt2):
    pass
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A plug-in that imports what lies beside it."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    name = f"mine{tmp_path.parent.name.replace('-', '')}{tmp_path.name.replace('-', '')}"
    (tmp_path / f"{name}.py").write_text(PLUGIN)
    (tmp_path / "neighbour.py").write_text(f"NAME = {name!r}\n")
    yield tmp_path / f"{name}.py"
    sys.modules.pop(name, None)
    sys.modules.pop("neighbour", None)


def test_a_file_is_imported_by_its_path_and_once(plugin):
    config = CheckConfig(module=str(plugin))
    assert names_of(config) == ([plugin.stem], {}, []) == names_of(config)
    assert import_plugin(str(plugin)) is sys.modules[plugin.stem]


def test_a_module_in_the_current_folder_is_found_by_name(plugin, monkeypatch):
    """As under `crescendo`, which does not look there by itself."""
    monkeypatch.chdir(plugin.parent)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder not in ("", str(plugin.parent))])
    assert import_plugin(plugin.stem).Model is get_model(plugin.stem)


def test_a_file_hides_no_module_of_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "json.py").write_text("x = 1\n")
    assert import_plugin(str(tmp_path / "json.py")).x == 1
    assert not hasattr(sys.modules["json"], "x")
    del sys.modules["plugin_json"]


@pytest.mark.parametrize(
    "content, why",
    [
        ("import nothing_of_this_name", "cannot import .*broken.py: ModuleNotFoundError: .*line 1"),
        ("x = (", "cannot import .*broken.py: SyntaxError"),
        ("raise SystemExit(3)", "cannot import .*broken.py: SystemExit: 3"),
        (None, "broken.py: there is no such file"),
    ],
)
def test_a_broken_plugin_is_one_line(tmp_path, monkeypatch, content, why):
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = tmp_path / "broken.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=f"^plugin: .*{why}") as error:
        import_plugin(str(path))
    assert "\n" not in str(error.value) and "broken" not in sys.modules


@pytest.mark.parametrize(
    "config, why",
    [
        (CheckConfig(), "^check: name a module"),
        (CheckConfig(module="json"), "^check: json registers no model, no optimizer and no objective"),
        (CheckConfig(model={"name": "nobody"}), "^model.name: 'nobody' is not known"),
    ],
)
def test_nothing_to_check_is_one_line(config, why):
    with pytest.raises(UserError, match=why):
        names_of(config)


def test_fields_of_the_config_may_be_set():
    subject = subject_of("gpt2", {"name": "gpt2", "mlp": "swiglu", "n_layers": "3"})
    assert subject.model.config.mlp == "swiglu" and subject.model.config.n_layers == 3
    with pytest.raises(UserError, match="model.n_leyers"):
        subject_of("gpt2", {"n_leyers": 3})


def test_fields_that_are_set_excuse_from_the_dial_but_from_nothing_else():
    options = {"n_layers": 2, "d_model": 64, "n_heads": 4, "window": 4}
    subject = subject_of("llama", options)
    kinds = {name: outcome(subject, CHECKS[name])[0] for name in ("count", "dial", "blocks", "flops", "decoding")}
    assert kinds == {"count": "ok", "dial": "skipped", "blocks": "skipped", "flops": "ok", "decoding": "ok"}


@pytest.mark.slow
def test_the_verb_says_what_it_has_tried(plugin):
    done = trainer("check", plugin)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"{plugin.stem}: ") and ", 0 FAILED, " in done.stdout
    broken = plugin.read_text() + "    masks_documents = True\n    def context(self, tokens, documents, cache):\n"
    plugin.write_text(broken + "        return super().context(tokens, None, cache)\n")
    done = forked_trainer("check", plugin)
    assert done.returncode == 1 and "  FAILED   documents do not see each other: " in done.stdout
    assert ", 1 FAILED, " in done.stdout.splitlines()[-1]
    assert all(line.split()[0] in KINDS for line in done.stdout.splitlines() if line.startswith("  "))
    assert "registers no model" in error_line(forked_trainer("check", "json"))


class Decaying(Gpt2):
    further_roles: ClassVar = {"decay vector": "norm", "hash table": "embedding"}

    def parameter_groups(self):
        groups = super().parameter_groups()
        return {**groups, "norm": groups["norm"][1:], "decay vector": groups["norm"][:1]}


class Unheard(Decaying):
    further_roles: ClassVar = {"decay vector": "vector"}


class Again(Decaying):
    further_roles: ClassVar = {"decay vector": "norm", "norm": "bias"}


def test_roles_of_its_own_are_treated_as_declared():
    assert made("roles", Decaying) == ("ok", "")
    subject = Subject("mine", Decaying)
    model = subject.meta_at(0.2)
    plain = Subject("plain", Gpt2).meta_at(0.2).parameter_groups()
    by_role = names_by_role(model)
    assert {role: set(names) for role, names in by_role.items() if names} == {k: set(v) for k, v in plain.items()}


class Split3(Gpt2):
    sizes: ClassVar = {"query": 1, "key": 1}
    dim = 0

    def fused_matrices(self):
        return {"layers.0.attention.qkv.weight": Split(self.dim, self.sizes)}


class NoDimension(Split3):
    dim = 2


class NoParameter(Split3):
    def fused_matrices(self):
        return {"qkv": Split(0, {})}


@pytest.mark.parametrize(
    "check, model_class, why",
    [
        ("roles", Unheard, r"a further role is treated as vector \(allowed: matrix, "),
        ("roles", Again, "a further role is one of matrix, .* already"),
        ("fused matrices", Split3, r"its dimension 0 does not split into \{'query': 1, 'key': 1\}"),
        ("fused matrices", NoDimension, "it has no dimension 2"),
        ("fused matrices", NoParameter, "qkv is not a parameter of the model"),
    ],
)
def test_roles_and_splits_that_cannot_be_are_told(check, model_class, why):
    with pytest.raises(Failed, match=why):
        CHECKS[check].run(Subject("mine", model_class))


@pytest.mark.parametrize(
    "choices, fused",
    [
        ({}, {"attention.qkv": 3, "mlp.up": 2}),
        ({"mlp": "gelu"}, {"attention.qkv": 3}),
        ({"block": "parallel"}, {"up": 5}),
        ({"attention": "latent"}, {"attention.down": 2, "attention.up": 2, "mlp.up": 2}),
        ({"pattention": "qkv"}, {"mlp.up": 2}),
    ],
)
def test_fused_matrices_of_the_decoder_split(choices, fused):
    load_models()
    subject = Subject("llama", get_model("llama"), choices=choices)
    CHECKS["fused matrices"].run(subject)
    found = subject.model.fused_matrices()
    first = {name: split for name, split in found.items() if name.startswith("layers.0.")}
    assert {name[len("layers.0.") : -len(".weight")]: len(split.sizes) for name, split in first.items()} == fused
