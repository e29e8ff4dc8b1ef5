"""The contract of `models/base.py`, checked on every registered model: a new model gets all of this by existing."""

import contextlib
import copy
import functools
import itertools
import json
import os
from dataclasses import asdict, fields, replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from models.base import IGNORE, Cache, get_model, load_models, materialise, model_names
from trainer import scaling

load_models()
VOCAB, SCALE = 257, 0.2  # the smallest scale of more than one block
B, T = 2, 24


def build(name, scale=SCALE, seed=0, vocab=VOCAB):
    """A small model, weights from `seed`, built as the trainer does it: on the meta device, then filled."""
    cls = get_model(name)
    config = cls.config_for_scale(scale, vocab, scaling.target_parameters(scale, vocab))
    with torch.device("meta"):
        model = cls(config)
    return materialise(model, torch.device("cpu"), torch.Generator().manual_seed(seed))


@functools.cache
def _pristine(name):
    return build(name)


# Without what other tests have registered, whichever were read first.
ZOO = [name for name in model_names() if get_model(name).__module__.startswith("models.")]


@pytest.fixture(params=ZOO)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    return copy.deepcopy(_pristine(name))


@pytest.fixture
def tokens():
    return torch.randint(VOCAB, (B, T), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def targets():
    return torch.randint(VOCAB, (B, T), generator=torch.Generator().manual_seed(2))


def gradients(model, *args, **kwargs):
    model.zero_grad()
    loss = model(*args, **kwargs).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def distance(a, b):
    return (a - b).abs().max().item()


# -- config and counts -------------------------------------------------------------------------------------------------


def test_every_config_field_has_help_and_a_default(name):
    for field in fields(get_model(name).Config):
        assert field.metadata.get("help"), field.name
    get_model(name).Config()


def test_config_round_trips_through_json_and_rejects_unknown_fields(model):
    values = json.loads(json.dumps(asdict(model.config)))
    assert type(model).Config(**values) == model.config
    with pytest.raises(TypeError, match="no_such_field"):
        type(model).Config(**values, no_such_field=1)


def test_config_errors_name_the_field(model):
    for field in ("vocab_size", "d_model", "n_layers"):
        if hasattr(model.config, field):
            with pytest.raises(ValueError, match=field) as error:
                replace(model.config, **{field: 0})
            assert "\n" not in str(error.value)


def test_counted_parameters_are_those_declared(model):
    assert type(model).count_parameters(model.config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("vocab", [8192, 50304] if os.environ.get("FULL_MATRIX") else [50304])
@pytest.mark.parametrize("scale", [0.5, 1, 2, 4, 8, 16, 32, 64, 148])
def test_parameters_follow_the_dial_within_3_percent(name, scale, vocab):
    cls, target = get_model(name), scaling.target_parameters(scale, vocab)
    config = cls.config_for_scale(scale, vocab, target)
    assert cls.count_parameters(config) == pytest.approx(target, rel=0.03)
    assert 1 / 8 <= config.d_model / (64 * config.n_layers) <= 4, "neither a needle nor a pancake"
    with torch.device("meta"):
        model = cls(config)
    assert sum(p.numel() for p in model.parameters()) == cls.count_parameters(config)


@pytest.mark.parametrize("vocab", [257, 8192, 50304])
@pytest.mark.parametrize("scale", [0.02, 0.05, 0.1, 0.3])
def test_tiny_scales_give_a_model_of_about_the_size(name, scale, vocab):
    target = scaling.target_parameters(scale, vocab)
    config = get_model(name).config_for_scale(scale, vocab, target)
    assert get_model(name).count_parameters(config) == pytest.approx(target, rel=0.1)


def test_roles_hold_every_parameter_once(model):
    groups = model.parameter_groups()
    assert set(groups) <= set(model.roles)
    names = [parameter for group in groups.values() for parameter in group]
    assert sorted(names) == sorted(dict(model.named_parameters()))
    assert model.tied_embedding() == ("head" not in groups)


def test_blocks_are_distinct_and_hold_most_parameters(name):
    cls = get_model(name)
    with torch.device("meta"):
        model = cls(cls.config_for_scale(8, VOCAB, scaling.target_parameters(8, VOCAB)))
    blocks = model.blocks()
    assert len(blocks) > 1 and len({id(block) for block in blocks}) == len(blocks)
    inside = [id(p) for block in blocks for p in block.parameters()]
    assert len(set(inside)) == len(inside), "blocks share parameters"
    assert sum(p.numel() for block in blocks for p in block.parameters()) > 0.9 * cls.count_parameters(model.config)


# -- weights -----------------------------------------------------------------------------------------------------------


def test_init_sets_everything_and_depends_on_the_seed_alone(name):
    first, same, other = build(name), build(name), build(name, seed=1)
    for key, value in itertools.chain(first.named_parameters(), first.named_buffers()):
        assert value.isfinite().all(), key
    assert all(torch.equal(first.state_dict()[key], value) for key, value in same.state_dict().items())
    assert any(not torch.equal(first.state_dict()[key], value) for key, value in other.state_dict().items())


def test_init_does_not_touch_the_global_generator(name):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    build(name)
    assert torch.equal(torch.get_rng_state(), before)


def test_init_gives_a_shard_its_part_of_the_same_weights(name):
    """Rank 1 of 2, with nobody at the other end: initialising needs no communication."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    whole = build(name)
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        with torch.device("meta"):
            model = get_model(name)(whole.config)
        mesh = dist.init_device_mesh("cpu", (2,))
        for module in (*model.blocks(), model):
            fully_shard(module, mesh=mesh)
        materialise(model, torch.device("cpu"), torch.Generator().manual_seed(0))
        sharded = dict(model.named_parameters())
        for key, parameter in whole.named_parameters():
            chunks = parameter.chunk(2)
            expected = chunks[1] if len(chunks) > 1 else parameter[:0]
            assert torch.equal(sharded[key].to_local(), expected), key
    finally:
        dist.destroy_process_group()


def test_every_parameter_gets_a_gradient(model, tokens, targets):
    train(model, tokens, targets, steps=2)  # what follows a matrix that starts at zero gets its gradient then
    for key, gradient in gradients(model, tokens, targets)[1].items():
        assert gradient.isfinite().all() and gradient.abs().max() > 0, key


def test_state_dict_carries_the_whole_model(model, name, tokens, tmp_path):
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = build(name, seed=5)
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(model(tokens).logits, other(tokens).logits)


def test_copies_share_no_state(model, tokens, targets):
    before, twin = model(tokens).logits.detach(), copy.deepcopy(model)
    train(twin, tokens, targets, steps=2)
    cache = Cache()
    twin(tokens, cache=cache)
    assert torch.equal(model(tokens).logits, before)
    assert not torch.equal(twin(tokens).logits, before)


# -- forward -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_no_token_sees_the_future(model, tokens):
    logits = model(tokens).logits
    assert logits.shape == (B, T, VOCAB)
    for j in (1, T // 2, T - 1):
        changed = tokens.clone()
        changed[:, j] = (changed[:, j] + 1) % VOCAB
        perturbed = model(changed).logits
        assert torch.equal(perturbed[:, :j], logits[:, :j])
        assert not torch.equal(perturbed[:, j:], logits[:, j:])


@torch.no_grad()
def test_the_loss_is_the_cross_entropy_of_the_logits(model, tokens, targets):
    output = model(tokens, targets)
    assert output.logits is None and output.loss.shape == () and output.loss.dtype == torch.float32
    parts = sum(part.double() for part in (output.parts or {}).values())
    log_probabilities = model(tokens).logits.double().log_softmax(-1)
    expected = -log_probabilities.gather(-1, targets[..., None]).mean()
    assert (output.loss.double() - parts - expected).abs() < 1e-5


@torch.no_grad()
def test_mean_and_sum_agree_and_ignored_targets_do_not_count(model, tokens, targets):
    counted = targets.clone()
    counted[0, : T // 2] = IGNORE
    total, mean = model(tokens, counted, reduction="sum").loss, model(tokens, counted).loss
    assert torch.allclose(total, mean * (counted != IGNORE).sum(), rtol=1e-6)
    first = targets.clone()
    first[0, T // 2 :] = IGNORE
    first[1] = IGNORE
    rest = model(tokens, first, reduction="sum").loss
    assert torch.allclose(total + rest, model(tokens, targets, reduction="sum").loss, rtol=1e-6)


def test_nothing_but_ignored_targets_is_a_zero_loss_with_zero_gradients(model, tokens, targets):
    loss, grads = gradients(model, tokens, torch.full_like(targets, IGNORE), reduction="sum")
    assert loss == 0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in grads.values())


@torch.no_grad()
@pytest.mark.parametrize("numbers", [[0, 1, 2, 3], [7, 1, 7, 1]], ids=["ascending", "returning"])
def test_documents_do_not_see_each_other(model, tokens, numbers):
    if not model.masks_documents:
        pytest.skip("this model does not mask documents")
    lengths = [5, 1, 11, T - 17]
    documents = torch.repeat_interleave(torch.tensor(numbers), torch.tensor(lengths)).expand(B, T)
    packed = model(tokens, documents=documents).logits
    for start, stop in itertools.pairwise([0, *itertools.accumulate(lengths)]):
        assert distance(packed[:, start:stop], model(tokens[:, start:stop]).logits) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[1] * T, [T], [7] + [1] * (T - 7), [5, 11, T - 16]], ids=str)
def test_cached_decoding_equals_the_full_forward(model, tokens, chunks):
    cache, logits = Cache(), []
    for part in tokens.split(chunks, dim=1):
        logits.append(model(part, cache=cache).logits)
    assert cache.length == T
    assert distance(torch.cat(logits, dim=1), model(tokens).logits) < 1e-5


@torch.no_grad()
def test_bf16_autocast_is_near_fp32(model, tokens, targets):
    exact = model(tokens, targets).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, targets).loss
    assert loss.dtype == torch.float32 and torch.allclose(loss, exact, rtol=1e-2)


@torch.no_grad()
def test_too_long_a_sequence_is_refused_by_both_lengths(model):
    if model.max_context is None:
        pytest.skip("this model takes any length")
    longer = torch.zeros(1, model.max_context + 1, dtype=torch.long)
    with pytest.raises(ValueError, match=rf"{model.max_context + 1}.*{model.max_context}"):
        model(longer)
    cache = Cache()
    model(longer[:, :-1], cache=cache)
    with pytest.raises(ValueError, match=rf"{model.max_context + 1}.*{model.max_context}"):
        model(longer[:, -1:], cache=cache)


# -- training ----------------------------------------------------------------------------------------------------------


def train(model, tokens, targets, steps, lr=1e-2):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(tokens, targets).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.post_step()
        losses.append(loss.item())
    return losses


def test_loss_falls_on_one_batch(model, tokens, targets):
    """At one of two learning rates: how large a step they bear differs."""
    runs = [train(copy.deepcopy(model), tokens, targets, steps=40, lr=lr) for lr in (3e-3, 1e-2)]
    assert min(losses[-1] for losses in runs) < 0.5 * runs[0][0]


def test_checkpointed_blocks_give_the_same_gradients(model, tokens, targets):
    loss, plain = gradients(model, tokens, targets)
    for block in model.blocks():
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    again, recomputed = gradients(model, tokens, targets)
    assert torch.equal(again, loss)
    assert all(torch.equal(recomputed[key], plain[key]) for key in plain)


@pytest.mark.parametrize("length", [64, 256])
def test_declared_flops_are_those_counted(model, length):
    """Within 2 %: the first block's input and nothing else saves a product (embedding lookups cost nothing)."""
    tokens = torch.randint(VOCAB, (1, length))
    # The counter knows matrix products, not every fused attention kernel of the CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens, tokens).loss.backward()
    assert counter.get_total_flops() / length == pytest.approx(model.flops_per_token(length), rel=0.02)


def test_flops_grow_with_the_length_of_the_sequence(model):
    attention = model.flops_per_token(256) - model.flops_per_token(64)
    assert attention > 0.1 * model.flops_per_token(64), "attention is too small a part here for the count to be a test"


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO if os.environ.get("FULL_MATRIX") else ("llama",))  # others in test_compilation.py
def test_compiled_equals_eager(model, tokens, targets):
    loss, eager = gradients(model, tokens, targets)
    compiled = copy.deepcopy(model)
    with contextlib.closing(_reset_dynamo()):
        again = torch.compile(compiled)(tokens, targets).loss
        again.backward()
    # fp32 sums in another order: some hundred eps of the loss, and of the largest entry of each gradient.
    eps = 200 * torch.finfo(torch.float32).eps
    assert (again - loss).abs() < eps * loss.abs()
    for key, parameter in compiled.named_parameters():
        assert distance(parameter.grad, eager[key]) < eps * max(1e-2, eager[key].abs().max().item()), key


class _reset_dynamo:
    close = staticmethod(torch._dynamo.reset)
