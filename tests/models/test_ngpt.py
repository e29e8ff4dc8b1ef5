"""nGPT (arXiv 2410.01131): what it is defined to be, and what a known reproduction got wrong."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_values

from models import ngpt
from models.base import cross_entropy
from models.ngpt import Ngpt, NgptConfig, Scale, normalise_, step_on_sphere
from trainer.core.config import RunConfig
from trainer.core.errors import UserError
from trainer.core.settings import build
from trainer.data.stream import find_dataset
from trainer.engine import build_engine
from trainer.optim import Optimizer
from trainer.planning.plan import resolve
from trainer.recipes import RECIPES
from trainer.runtime.distributed import World
from trainer.runtime.signals import StopSignals
from trainer.runtime.watchdog import Watchdog
from trainer.training.run import Run
from trainer.training.step import optimiser_step

V, D, LAYERS, HEADS = 96, 32, 2, 4
# The dimension of each matrix along which its vectors lie: the one of size D, where only one is.
ALONG = {"embedding": 1, "head": 1, "qkv": 1, "mlp_in": 1, "attention_out": 0, "mlp_out": 0}


def make():
    model = Ngpt(NgptConfig(vocab_size=V, d_model=D, n_layers=LAYERS, n_heads=HEADS))
    model.init_weights(torch.Generator().manual_seed(0))
    return model


@pytest.fixture
def model():
    """Every learned scale away from its initial value, some alphas below zero."""
    model, generator = make(), torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data *= noise if "alpha" in name else 1 + 0.3 * noise
    return model


@pytest.fixture
def tokens():
    return torch.randint(V, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def targets():
    return torch.randint(V, (2, 12), generator=torch.Generator().manual_seed(2))


def test_fp64_stays_fp64(tokens, targets):
    """In matrices of fp64 the norm is exact to fp64's digits, and so is the loss."""
    weight = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    normalise_(weight, 1)
    assert (weight.norm(dim=1) - 1).abs().max() < 1e-15
    model = make()
    single, double = model(tokens, targets).loss, model.double()(tokens, targets).loss
    model.post_step()
    assert abs(single - double) < 1e-5 and {p.dtype for p in model.parameters()} == {torch.float64}
    assert all(
        ((p.norm(dim=d) - 1).abs().max() < 1e-15)
        for p, d in ((model.head.weight, 1), (model.layers[0].mlp_out.weight, 0))
    )


def norm_errors(weights):
    """Name -> largest | |vector| - 1 | of each matrix in `weights` (name -> tensor)."""
    errors = {}
    for name, weight in weights.items():
        if weight.ndim == 2:
            norms = weight.detach().float().norm(dim=ALONG[name.removesuffix(".weight").rsplit(".", 1)[-1]])
            errors[name] = (norms - 1).abs().max().item()
    assert len(errors) == 2 + 4 * LAYERS
    return errors


def set_scale(scale, value):
    scale.stored.data.fill_(value * scale.scale / scale.init)


# -- the definition ------------------------------------------------------------------------------------------------------


def reference(model, tokens):
    """Logits by the definition, in fp64, one head and position at a time."""
    weights = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    d_k, length = D // HEADS, tokens.shape[1]

    def norm(x):
        return x / x.square().sum(-1, keepdim=True).sqrt()

    def value(name, init, scale):
        return weights[f"{name}.stored"] * init / scale

    angles = torch.arange(length)[:, None] * 10000.0 ** (-2 * torch.arange(d_k // 2).double() / d_k)

    def rotate(x):  # [B, T, d_k]
        a, b = x[..., : d_k // 2], x[..., d_k // 2 :]
        return torch.cat((a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()), -1)

    h = weights["embedding.weight"][tokens]
    for i in range(LAYERS):
        at = f"layers.{i}."
        q, k, v = (h @ w.T for w in weights[f"{at}qkv.weight"].split(D))
        s_qk, heads = value(f"{at}qk_scale", 1, D**-0.5), []
        for part in (slice(n * d_k, (n + 1) * d_k) for n in range(HEADS)):
            scores = (norm(rotate(q[..., part])) * s_qk[part]) @ (norm(rotate(k[..., part])) * s_qk[part]).mT * d_k**0.5
            future = torch.ones(length, length).triu(1).bool()
            heads.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ v[..., part])
        h_a = torch.cat(heads, -1) @ weights[f"{at}attention_out.weight"].T
        h = norm(h + value(f"{at}attention_alpha", 0.05, D**-0.5).abs() * (norm(h_a) - h))
        u, v = (h @ w.T for w in weights[f"{at}mlp_in.weight"].split(4 * D))
        s_u, s_v = value(f"{at}mlp_scale", 1, 1).split(4 * D)
        u, v = u * s_u * D**0.5, v * s_v * D**0.5
        h_m = (u * v * v.sigmoid()) @ weights[f"{at}mlp_out.weight"].T
        h = norm(h + value(f"{at}mlp_alpha", 0.05, D**-0.5).abs() * (norm(h_m) - h))
    return value("logit_scale", 1, D**-0.5) * (h @ weights["head.weight"].T)


def test_logits_are_those_of_the_definition(model, tokens):
    # fp32 sums of some hundred terms; logits are of order 1. Without sqrt(D) in the MLP they are off by more than 0.01.
    assert (model(tokens).logits - reference(model, tokens)).abs().max() < 1e-5


def test_parameters_of_the_official_form():
    """No dead embedding, no bias, a vector s_qk for each head."""
    assert Ngpt.count_parameters(NgptConfig(vocab_size=50304, d_model=768, n_layers=12, n_heads=12)) == 190_664_832
    assert Ngpt.count_parameters(NgptConfig()) == 190_664_832


def test_initial_values_and_reach_of_the_scales():
    model = make()
    expected = {
        "attention_alpha": (D, 0.05, D**-0.5), "mlp_alpha": (D, 0.05, D**-0.5), "qk_scale": (D, 1, D**-0.5),
        "mlp_scale": (8 * D, 1, 1), "logit_scale": (V, 1, D**-0.5),
    }  # fmt: skip
    scales = {name: module for name, module in model.named_modules() if isinstance(module, Scale)}
    assert len(scales) == 1 + 4 * LAYERS
    assert sum(s.stored.numel() for s in scales.values()) == sum(p.numel() for p in model.parameters() if p.ndim == 1)
    for name, module in scales.items():
        size, init, scale = expected[name.rsplit(".", 1)[-1]]
        assert module.stored.shape == (size,)
        assert torch.allclose(module.stored, torch.full((size,), float(scale)))
        assert torch.allclose(module(), torch.full((size,), float(init)))


def test_stored_size_of_a_scale_changes_its_steps_only(model, tokens):
    for module in model.modules():
        if isinstance(module, Scale):
            module.reset()
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, Scale):
            module.scale *= 3
            module.reset()
    assert torch.allclose(model(tokens).logits, other(tokens).logits, atol=1e-6)
    moved = []
    for module in (model.logit_scale, other.logit_scale):
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
        module().sum().backward()
        optimizer.step()
        moved.append(1 - module().mean().item())
    assert moved == pytest.approx([1e-3 * D**0.5, 1e-3 * D**0.5 / 3], rel=1e-3)


# -- the sphere ----------------------------------------------------------------------------------------------------------


# Rounded to bf16 a number is off by up to 2^-8 of itself, and so is a norm at worst.
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_vectors_of_every_matrix_have_norm_1_after_each_step(model, tokens, targets, dtype, tolerance):
    model.to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2, weight_decay=0.1)
    for _ in range(3):
        model(tokens, targets).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert min(norm_errors(dict(model.named_parameters())).values()) > 2 * tolerance, "a step leaves the sphere"
        model.post_step()
        assert all(parameter.dtype == dtype for parameter in model.parameters())
        errors = norm_errors(dict(model.named_parameters()))
        assert max(errors.values()) < tolerance, errors


def test_vectors_have_norm_1_before_the_first_step():
    assert max(norm_errors(dict(make().named_parameters())).values()) < 1e-6


def test_whoever_looks_after_a_step_sees_projected_weights(tiny_dataset, tmp_path):
    """Validation and checkpoints too: the projection belongs to the step before, not to the one that follows."""
    shape = {"name": "ngpt", "d_model": D, "n_layers": LAYERS, "n_heads": HEADS}
    config = build(RunConfig, tiny_values(tiny_dataset, tmp_path / "r", model=shape, optim__lr=1e-2))
    dataset, world = find_dataset(config.data), World()
    watchdog = Watchdog(world, 60)
    run = Run(resolve(config, dataset), world, dataset, watchdog, StopSignals(world))
    before = run.engine.tensors()["model.embedding.weight"].clone()
    optimiser_step(run)
    run.stream.close()
    watchdog.close()
    tensors = {name: value for name, value in run.engine.tensors().items() if name.startswith("model.")}
    assert not torch.equal(tensors["model.embedding.weight"], before)
    assert max(norm_errors(tensors).values()) < 1e-6


@pytest.mark.parametrize("autocast", [False, True])
def test_hidden_states_have_norm_1_after_every_half_of_a_block(model, tokens, monkeypatch, autocast):
    states = [model.embedding(tokens)]

    def watched(h, target, alpha):
        states.append(step_on_sphere(h, target, alpha))
        return states[-1]

    monkeypatch.setattr(ngpt, "step_on_sphere", watched)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(tokens)
    assert len(states) == 1 + 2 * LAYERS
    for h in states:
        assert (h.norm(dim=-1) - 1).abs().max() < 1e-5


def test_norms_are_taken_in_fp32():
    """1001^0.5 is no number of bf16, and rounding it first gives another quotient."""
    weight = torch.full((3, 1001), 1.0, dtype=torch.bfloat16)
    normalise_(weight, 1)
    assert weight[0, 0] == torch.tensor(1001**-0.5).bfloat16()
    h = torch.full((1, 1, 1001), 1.0, dtype=torch.bfloat16)
    assert step_on_sphere(h, h, torch.zeros(1001)).unique() == torch.tensor(1001**-0.5).bfloat16()


def test_attention_logits_are_bounded(model, tokens, monkeypatch):
    seen, attend = [], F.scaled_dot_product_attention

    def watched(q, k, v, *arguments, scale, **settings):
        seen.append((q @ k.mT).abs().max() * scale)
        return attend(q, k, v, *arguments, scale=scale, **settings)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data *= 100  # also of weights that are not normalised
    model(tokens)
    for found, block in zip(seen, model.layers, strict=True):
        bound = (D // HEADS) ** 0.5 * block.qk_scale().square().max()
        assert 0.2 * bound < found <= bound * (1 + 1e-5)


def test_alpha_is_the_share_of_the_way(model, tokens):
    block, positions = model.layers[0], torch.arange(tokens.shape[1])
    h = model.embedding(tokens)
    for alpha in (block.attention_alpha, block.mlp_alpha):
        set_scale(alpha, 0.0)
    assert (block(h, positions, None) - h).abs().max() < 1e-6
    set_scale(block.mlp_alpha, 1.0)
    expected = F.normalize(block.mlp(h), dim=-1)
    assert (block(h, positions, None) - expected).abs().max() < 1e-6
    set_scale(block.mlp_alpha, -1.0)
    assert (block(h, positions, None) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("part", ["attention_out", "mlp_out"])
def test_length_of_a_branch_does_not_matter(model, tokens, part):
    before = model(tokens).logits
    for block in model.layers:
        getattr(block, part).weight.data *= 7.0
    assert (model(tokens).logits - before).abs().max() < 1e-5
    model.post_step()
    assert (model(tokens).logits - before).abs().max() < 1e-5


def test_loss_without_logits_has_the_gradients_of_the_logits(model, tokens, targets):
    """Those of the head and of s_z come through their product."""
    found = torch.autograd.grad(model(tokens, targets).loss, list(model.parameters()))
    expected = torch.autograd.grad(cross_entropy(model(tokens).logits, targets), list(model.parameters()))
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() < 1e-4 * b.abs().max() + 1e-8


# -- training it -----------------------------------------------------------------------------------------------------------


def test_neither_weight_decay_nor_warm_up_unless_asked_for():
    """A weight decay of 0 must reach the optimiser, whose own default is 0.01."""
    plan = resolve(build(RunConfig, {"device": "cpu", "model": {"name": "ngpt"}, "model_scale": 0.02}))
    optim = plan.config.optim
    assert (optim.recipe, optim.weight_decay, optim.warmup_steps) == ("plain", 0.0, 0)
    assert {row.key: row.rule for row in plan.entries}["optim.weight_decay"].startswith("what ngpt is made for")
    model = Ngpt(plan.model_config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    groups = RECIPES[optim.recipe].groups(model, shapes, plan.config)
    assert all(group.schedule(0) == 1 for group in groups)
    optimizer = Optimizer(groups, shapes, dict(model.named_parameters()), 1.0, torch.zeros_like, torch.device("cpu"))
    assert [settings["weight_decay"] for settings in optimizer.param_groups] == [0.0, 0.0]

    asked = {"device": "cpu", "model": {"name": "ngpt"}, "model_scale": 0.02, "optim": {"weight_decay": 0.1}}
    plan = resolve(build(RunConfig, asked))
    assert (plan.config.optim.weight_decay, plan.config.optim.warmup_steps) == (0.1, 0)
    assert {row.key: row.rule for row in plan.entries}["optim.weight_decay"] == "set"
    assert resolve(build(RunConfig, {"device": "cpu", "model": {"name": "gpt2"}})).config.optim.weight_decay == 0.1


def test_roles():
    groups = make().parameter_groups()
    assert (groups["embedding"], groups["head"]) == (["embedding.weight"], ["head.weight"])
    assert len(groups["matrix"]) == 4 * LAYERS and len(groups["norm"]) == 4 * LAYERS + 1


def test_a_projection_that_flat_vectors_cannot_have_is_refused():
    class Odd(Ngpt):
        def post_step(self):
            pass

    config = SimpleNamespace(
        engine=SimpleNamespace(strategy="zero2", offload=False),
        model={"name": "odd"},
        optim=SimpleNamespace(name="adamw"),
    )
    with pytest.raises(UserError, match=r"zero2.*post_step.*odd.*projections"):
        build_engine(SimpleNamespace(config=config, model_class=Odd), World())


@pytest.mark.parametrize("field, value", [("n_heads", 5), ("n_heads", 32), ("alpha_init", 0.0)])
def test_impossible_shapes_name_the_field(field, value):
    with pytest.raises(ValueError, match=field):
        NgptConfig(**{"vocab_size": V, "d_model": D, "n_heads": HEADS, field: value})
