"""model.mup in the optimizer: the learning rate, decay and epsilon of each group, what the plan says, and what is refused."""

import functools

import pytest
from conftest import tiny_values

from models.base import load_models
from trainer.core.config import RunConfig
from trainer.core.errors import UserError
from trainer.core.settings import build
from trainer.engine.meta import build_meta
from trainer.optim.groups import shapes_of
from trainer.planning.parent import ModelParent, changed_model
from trainer.planning.plan import recipe_entries, resolve
from trainer.recipes import groups_of
from trainer.recipes.plain import HIGHEST_RATE, learning_rate

load_models()
# Four times as wide and three times as deep as the base.
LLAMA = {"name": "llama", "d_model": 64, "n_layers": 3, "n_heads": 2, "vocab_size": 320}
MUP = LLAMA | {"mup": True, "mup_base_width": 16, "mup_base_depth": 1}


def planned(optim=None, model=MUP, **more):
    optim = {"lr": 2**-8, "weight_decay": 0.125, **(optim or {})}
    return resolve(
        build(RunConfig, {"device": "cpu", "data": {"tokenizer": "bytes"}, "model": model, "optim": optim, **more})
    )


@functools.cache
def usual():
    return planned()


def groups(plan):
    model = build_meta(plan.model_class, plan.model_config)
    return {group.name: group for group in groups_of(plan.config, model, shapes_of(model))}


def test_each_group_has_what_completep_says():
    found = groups(usual())
    hidden, tables = found["decayed, hidden matrices"], found["decayed, outside of blocks"]
    norms, last = found["not decayed, in blocks"], found["not decayed, outside of blocks"]
    assert [group.lr / 2**-8 for group in (hidden, tables, norms, last)] == [1 / 4, 1, 1, 1]
    assert [group.weight_decay for group in (hidden, tables, norms, last)] == [0.5, 0.125, 0, 0]
    eps = [group.given["eps"] for group in (hidden, tables, norms, last)]
    assert eps == pytest.approx([1e-8 / 12, 1e-8 / 4, 1e-8 / 12, 1e-8 / 4], rel=1e-12)
    assert sorted(tables.parameters) == ["embedding.weight", "head.weight"] and last.parameters == ["norm.weight"]
    assert next(iter(found.values())) is hidden, "the log's learning rate is that of the first group"


def test_what_the_user_sets_is_the_bases():
    """Epsilon, and what optim.roles says; a decay that does not depend on lr stays."""
    roles = {"matrix": {"lr": 2**-6}, "embedding": {"weight_decay": 0.0}}
    found = groups(planned({"settings": {"eps": 1e-4, "independent_decay": True}, "roles": roles}))
    matrix = found["matrix, hidden matrices"]
    assert (matrix.lr, matrix.weight_decay) == (2**-8, 0.125)
    assert matrix.given["eps"] == pytest.approx(1e-4 / 12)
    assert (found["embedding, outside of blocks"].lr, found["embedding, outside of blocks"].weight_decay) == (2**-8, 0)


@pytest.mark.parametrize("scale, factor", [("match_rms", 1 / 2), ("spectral", 1)])
def test_muon_has_the_power_of_its_scale(scale, factor):
    """Its rest, which AdamW updates, has AdamW's."""
    found = groups(planned({"name": "muon", "settings": {"scale": scale}, "rest_lr": 2**-9}))
    hidden = found["decayed, hidden matrices"]
    assert (hidden.rule, hidden.lr, hidden.weight_decay) == ("muon", 2**-8 * factor, 0.125 / factor)
    rest = found["decayed, rest, outside of blocks"]
    assert (rest.rule, rest.lr) == ("adamw", 2**-9)


def test_an_optimizer_of_one_role_begins_at_the_bases_rate():
    """The rate that is inferred for it is multiplied once, not twice."""
    found = groups(planned({"roles": {"matrix": {"name": "lion"}}}))["matrix, hidden matrices"]
    assert found.rule == "lion" and found.lr == pytest.approx(2**-8 * 0.2 / 4)


def test_the_plan_names_base_and_rates():
    rows = {row.key: row for row in recipe_entries(usual())}
    assert rows["mup base"].value == "16 x 1" and "4 x as wide, 3 x as deep" in rows["mup base"].rule
    assert (rows["mup branches"].value, rows["mup logits"].value) == (1 / 3, 1 / 4)
    row = rows["lr of decayed, hidden matrices"]
    assert row.value == 2**-10 and "2203.03466" in row.rule and "weight decay 0.5" in row.rule


def test_the_inferred_rate_is_that_of_the_base_trained_as_long():
    """At every size, for the same batch and number of steps; that of the standard model of the base's size, but for its norms."""
    rates = []
    for width, depth, on in ((64, 2, True), (128, 4, True), (16, 2, False)):
        # Without norms the parameters would be 3:1 in the same ratio; with hidden_ratio 4 the MLP is as well.
        base = {"mup_base_depth": 2} if on else {"mup": False, "mup_base_width": 0, "mup_base_depth": 0}
        model = MUP | {"d_model": width, "n_layers": depth, "hidden_ratio": 4.0, **base}
        plan = planned({"lr": None}, model, batch={"tokens_per_step": 2**14}, max_steps=10**6)
        rates.append(plan.config.optim.lr)
        [entry] = [entry for entry in plan.entries if entry.key == "optim.lr"]
        assert ("of the base of model.mup, trained as long" in entry.rule) == on
    expected = learning_rate(2 * 16 * 16 * 16, 2**14, 2**14 * 10**6)
    norms = (
        5 * 16 / (2 * 16 * 16 * 16)
    )  # the share of the base's parameters, in the compute by which its rate and batch fall
    assert expected < HIGHEST_RATE and rates == pytest.approx([expected] * 3, rel=norms * (0.125 + 0.3271 / 2))


@pytest.mark.parametrize(
    "optim, why",
    [
        ({"name": "soap"}, "optim.name: no rule is known by which the learning rate of soap changes with the width"),
        ({"name": "adam"}, "optim.name: no rule is known by which the learning rate of adam "),
        ({"name": "muon", "settings": {"scale": "none"}}, "optim.name: no rule is known .* of muon "),
        ({"roles": {"head": {"name": "adafactor"}}}, "optim.roles.head.name: no rule is known .* of adafactor "),
        ({"recipe": "hlb"}, "optim.recipe: hlb has its own laws"),
        ({"loss_driven_decay": True}, "optim.loss_driven_decay: the decay by hlb's law"),
    ],
)
def test_what_has_no_rule_over_the_width_is_refused(optim, why):
    with pytest.raises(UserError, match=f"^{why}"):
        planned(optim)


@pytest.mark.parametrize(
    "name, why", [("hlb", "its recipe has laws"), ("ngpt", "norm 1"), ("mamba2", "only the decoders")]
)
def test_models_without_it_say_why(name, why):
    with pytest.raises(UserError, match=f"^model.mup: {name} has no maximal update parametrisation: .*{why}"):
        planned(model={"name": name, "mup": True})


def test_a_range_test_is_over_the_bases_rate(tiny_dataset, tmp_path):
    from trainer.commands.lr_range import open_copy, planned_rate

    values = tiny_values(tiny_dataset, tmp_path / "none", model=MUP | {"vocab_size": 323}, optim={"lr": 2**-8})
    copy = open_copy(values)
    assert planned_rate(copy) == 2**-8 and copy.engine.optimizer.groups[0].lr == 2**-10
    copy.stream.close()
    copy.engine.close()
    copy.world.stop()


def test_weights_keep_their_multipliers(tmp_path):
    """Those of a run with mup, and of one without: --init_from keeps the field, and refuses another value."""
    said: list[str] = []
    for model, other in ((MUP, {"mup": False, "mup_base_width": 0, "mup_base_depth": 0}), (LLAMA, {"mup": True})):
        parent = ModelParent("parent", tmp_path, model, {})
        assert changed_model({}, parent, said.append).get("mup") == model.get("mup")
        with pytest.raises(UserError, match=r"^init_from: model.mup is .* compute something else"):
            changed_model(other, parent, said.append)
    assert said == []
