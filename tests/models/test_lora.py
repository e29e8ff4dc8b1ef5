"""LoRA on any model: it starts as the model without adapters, only they are trained, and they can be merged."""

import dataclasses

import pytest
import torch
from plugins.convolution import Convolution, ConvolutionConfig
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.base import get_model, load_models, model_names, register
from models.config import setting
from models.layers.float8 import Float8Linear, convert_to_float8
from models.layers.lora import effective_weight
from models.lora import FIELDS, factors_of, is_factor, with_lora
from trainer.testing import numbers, sizes
from trainer.testing.subject import Subject

load_models()
WITHOUT = {"ngpt": "projects its weights", "tokenformer": "no linear layer in the blocks has the role 'matrix'"}
OURS = {name for name in model_names() if get_model(name).__module__.startswith("models.")}  # other tests register more
ADAPTED = sorted(OURS - WITHOUT.keys())


def subject(name: str, **choices) -> Subject:
    return Subject(name, with_lora(get_model(name)), {"lora_rank": 4, **choices})


def trained(model) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def plain(model, state=None):
    """The model without adapters, with the weights of `state` or those that the adapted model has itself."""
    cls = model.adapts
    config = cls.Config(**{field.name: getattr(model.config, field.name) for field in dataclasses.fields(cls.Config)})
    found = cls(config)
    found.init_weights()
    state = model.state_dict() if state is None else state
    found.load_state_dict({name: value for name, value in state.items() if not is_factor(name)})
    return found.eval()


def draw_b(model) -> None:
    """B as after some training: the update is of the size of the weights."""
    for name, parameter in trained(model).items():
        if name.endswith(".b"):
            nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ADAPTED)
def test_it_starts_as_the_model_and_only_adapters_are_trained(name):
    case = subject(name)
    model = case.build()
    for parameter in model.parameters():
        if not parameter.requires_grad and not parameter.any():  # a branch that starts at zero hides its adapters
            nn.init.constant_(parameter, 0.5)
    with torch.no_grad():  # and no weight that wants a gradient: matmul asks for it when it chooses how to multiply
        before = model(case.tokens).logits
        assert torch.equal(before, plain(model).requires_grad_(False)(case.tokens).logits)
    model(case.tokens, case.targets).loss.backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == trained(model).keys() == {name for name in model.state_dict() if is_factor(name)}
    assert any(parameter.grad.any() for parameter in trained(model).values())
    draw_b(model)
    assert not torch.equal(model(case.tokens).logits, before)


@pytest.mark.parametrize("name, choices", [("hlb", {}), ("llama", {}), ("llama", {"attention": "latent"})])
def test_merged_weights_give_the_same_logits(name, choices):
    """Within fp32 rounding: the products of a hidden width of up to 400 are added in another order, 400 * 2^-24 = 2.4e-5 relative."""
    case = subject(name, **choices)
    model = case.model
    draw_b(model)
    state = model.state_dict()
    for path, layer in model.named_modules():
        if hasattr(layer, "lora"):
            state[f"{path}.weight"] = effective_weight(layer)
    found, expected = plain(model, state)(case.tokens).logits, model(case.tokens).logits
    torch.testing.assert_close(found, expected, rtol=2.4e-5, atol=2.4e-5 * expected.abs().max().item())
    assert not torch.allclose(plain(model)(case.tokens).logits, expected, rtol=1e-2), "the update shows nothing"


def test_each_matrix_of_a_fused_layer_has_its_own_pair():
    block = subject("hlb").model.blocks()[0]
    assert [list(pair.b.shape) for pair in block.expand.lora] == [[width, 4] for width in block.widths]
    assert [list(pair.a.shape) for pair in block.project.lora] == [[4, block.project.in_features]]
    draw_b(block)
    x = torch.randn(2, 3, block.expand.in_features, generator=torch.Generator().manual_seed(0))
    update = (block.expand(x) - nn.functional.linear(x, block.expand.weight)).split(block.widths, dim=-1)
    for part, pair in zip(update, block.expand.lora, strict=True):
        assert pair.scale == 32 / 4
        torch.testing.assert_close(part, 8 * x @ pair.a.T @ pair.b.T, rtol=1e-4, atol=1e-5)


def test_the_contract_of_models_holds():
    """Seeds, shards, decoding with latent attention (which multiplies by a matrix without calling its layer), counts, roles."""
    case = subject("llama", attention="latent", d_model=32, n_layers=2, n_heads=2)
    numbers.cached_decoding_equals_the_whole(case)
    numbers.no_token_sees_the_future(case)
    numbers.copies_share_no_state(case)
    numbers.weights_depend_on_the_seed_alone(case)
    numbers.shards_are_parts_of_the_whole(case)
    for check in (sizes.parameters_are_counted, sizes.roles_hold_every_parameter_once, sizes.config_goes_through_json):
        check(case)


def test_initial_factors_have_the_variance_of_the_papers_code():
    """1 / (3 d_in); the sample of 4 x 128 numbers is within 5 standard errors, sqrt(2 / 512) each, of it."""
    model = Subject("gpt2", with_lora(get_model("gpt2")), {"lora_rank": 4, "d_model": 128, "n_heads": 2}).build()
    pair = model.layers[0].attention.out.lora[0]
    assert 3 * 128 * pair.a.var().item() == pytest.approx(1, abs=5 * (2 / 512) ** 0.5)
    assert not pair.b.any()


class Strict(Convolution):
    """A stranger's model that knows its own parameters and refuses others, whose MLP has a role of its own."""

    further_roles = {"mixing matrix": "matrix"}
    known = ("embedding.weight", "head.weight", "norm.weight", "mix.weight")
    roles_of_known = dict(zip(known, ("embedding", "head", "norm", "mixing matrix"), strict=True))

    def parameter_groups(self):
        groups = {}
        for name, _ in self.named_parameters():
            [known] = [known for known in self.known if name.endswith(known)]
            groups.setdefault(self.roles_of_known[known], []).append(name)
        return groups


SMALL = {"vocab_size": 64, "d_model": 32, "n_layers": 2, "lora_rank": 2}


@pytest.mark.parametrize("targets", ["matrix", "mixing matrix", " mixing matrix , matrix"])
def test_a_strangers_model_needs_no_line(targets):
    cls = with_lora(Strict)
    model = cls(cls.Config(**SMALL, lora_targets=targets))
    model.init_weights(torch.Generator().manual_seed(0))
    names = [name for i in range(2) for name in factors_of(f"layers.{i}.mix.weight", 0)]
    assert list(trained(model)) == names == model.parameter_groups()["mixing matrix"][2:]
    assert with_lora(Strict) is cls and cls.count_parameters(model.config) == sum(p.numel() for p in model.parameters())
    assert [field.name for field in dataclasses.fields(cls.Config)][-len(FIELDS) :] == list(FIELDS)


def test_a_layer_in_fp8_keeps_its_adapter():
    model = subject("gpt2", d_model=64, n_heads=2).model
    block = model.blocks()[0]
    count, _ = convert_to_float8(block)
    assert count == 4 and isinstance(block.attention.qkv, Float8Linear)
    assert len(block.attention.qkv._forward_hooks) == 1 and len(block.attention.qkv.lora) == 3


def test_frozen_matrices_cost_no_gradient():
    """At most 5 % above the counted FLOPs: the first of eight blocks needs no gradient of its input."""
    cls = with_lora(get_model("llama"))
    config = cls.Config(vocab_size=320, d_model=64, n_layers=8, n_heads=2, lora_rank=2)
    model = cls(config)
    model.init_weights(torch.Generator().manual_seed(0))
    tokens = torch.zeros(1, 64, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens, tokens).loss.backward()
    assert 1 <= 64 * model.flops_per_token(64) / counter.get_total_flops() <= 1.05
    assert model.flops_per_token(64) < 0.8 * plain(model).flops_per_token(64)


class Shared(Strict):
    """Both blocks multiply by one matrix."""

    def __init__(self, c):
        super().__init__(c)
        self.layers[1].mix.weight = self.layers[0].mix.weight


class Taken(Strict):
    def __init__(self, c):
        super().__init__(c)
        self.layers[1].mix.lora = 1.0


@pytest.mark.parametrize(
    "cls, targets, words",
    [
        (
            Strict,
            "matrix,bias",
            "lora_targets: no linear layer in the blocks has the role 'bias' (roles there: mixing matrix)",
        ),
        (Strict, "", "has the role ''"),
        (Strict, "head", "has the role 'head'"),
        (Shared, "matrix", "(roles there: none)"),
        (Taken, "matrix", "lora_targets: layers.1.mix has an attribute `lora` of its own; rename it"),
    ],
)
def test_layers_that_cannot_be_adapted_are_told(cls, targets, words):
    adapted = with_lora(cls)
    with pytest.raises(ValueError) as error:
        adapted(adapted.Config(**SMALL, lora_targets=targets))
    assert words in str(error.value)


@pytest.mark.parametrize("name", WITHOUT)
def test_models_that_cannot_be_adapted_are_told_before_they_are_sized(name):
    with pytest.raises(ValueError, match=WITHOUT[name]):
        subject(name).config_at(0.2)


def test_a_model_cannot_have_fields_of_the_same_name():
    @dataclasses.dataclass(frozen=True)
    class Config(ConvolutionConfig):
        lora_rank: int = setting(4, "its own", low=1)

    with pytest.raises(TypeError, match="Config has a field lora_rank, as every model has"):
        register("own-lora")(type("Own", (Convolution,), {"Config": Config}))
