"""Fields of models' Configs: ranges, and what a stored config of an older release lacks."""

import dataclasses
import math

import pytest

from models.base import _REGISTRY, get_model, load_models, model_names
from models.config import check_ranges, setting, with_later_fields
from models.presets import Gpt2, TokenFormer, with_defaults

load_models()
ZOO = [name for name in model_names() if get_model(name).__module__.startswith("models.")]


@pytest.mark.parametrize("name", ZOO)
def test_numbers_far_out_are_refused_at_once_by_name(name):
    config = get_model(name).Config
    for field in dataclasses.fields(config):
        kind = type(field.default)
        wrong = {int: (2**63, -(2**63), 10**400, -1), float: (math.nan, math.inf, -math.inf, -1.0, 1e300)}.get(kind, ())
        for value in wrong:
            with pytest.raises(ValueError, match=rf"^{field.name} must be ") as error:
                config(**{field.name: value})
            assert "\n" not in str(error.value)


@dataclasses.dataclass(frozen=True)
class Ranged:
    share: float = setting(0.5, "a share", above=0, high=1)
    plain: int = 3

    def __post_init__(self):
        check_ranges(self)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"share": 0.0}, "share must be above 0, not 0.0"),
        ({"share": 1.5}, "share must be at most 1, not 1.5"),
        ({"plain": -(2**40)}, "plain must be at least -2,147,483,647, not -1099511627776"),
        ({"plain": 2**40}, "plain must be at most 2,147,483,647, not 1099511627776"),
    ],
)
def test_ranges(values, message):
    with pytest.raises(ValueError) as error:
        Ranged(**values)
    assert str(error.value) == message


def test_a_field_that_came_later_means_what_changes_nothing_also_where_a_preset_has_another_default(monkeypatch):
    class Later(Gpt2):
        Config = with_defaults("LaterConfig", Gpt2.Config, z_loss=1e-4, norm_eps=1e-6)

    monkeypatch.setitem(_REGISTRY, "later", Later)
    stored = {"name": "later", **dataclasses.asdict(Later.Config())}
    assert with_later_fields(stored) == stored, "what is stored stays, whatever the defaults are"
    del stored["z_loss"], stored["norm_eps"], stored["init"]
    completed = with_later_fields(stored)
    assert (completed["z_loss"], completed["norm_eps"], completed["init"]) == (0.0, 1e-5, "gpt2")
    assert Later.Config(**{key: value for key, value in completed.items() if key != "name"})


def test_every_stored_preset_is_complete_and_a_stranger_is_left_alone():
    for name in ZOO:
        stored = {"name": name, **dataclasses.asdict(get_model(name).Config())}
        assert with_later_fields(stored) == stored
    assert with_later_fields({"name": "stranger", "width": 3}) == {"name": "stranger", "width": 3}
    assert with_later_fields({}) == {}
    assert with_later_fields({"name": "tokenformer"})["pattention"] != TokenFormer.Config().pattention
