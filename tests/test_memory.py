"""The memory plan: what a forward pass keeps is measured without storage, and is what a real one keeps."""

import itertools
import json

import pytest
import torch
from test_zoo import build, name  # noqa: F401 (a fixture)
from torch.profiler import ProfilerActivity, profile

from models.base import Output, cross_entropy, get_model
from models.layers import linear_cross_entropy
from trainer.engine import recompute
from trainer.memory import GIB, Demand, Spread, kept_bytes

MODES = ("none", "every-2", "selective", "full")
T = 64


@pytest.fixture
def model(name):  # noqa: F811
    return build(name, scale=0.4)


def really_kept(model):
    """Bytes that the allocator has given and not got back by the end of a forward pass."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        tokens = torch.zeros(1, T, dtype=torch.long)
        output = model(tokens, targets=tokens)
    assert output.loss is not None
    return sum(event.self_cpu_memory_usage for event in recorded.key_averages())


@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_kept_is_what_the_allocator_says(model, how, compute):
    """To a few hundred bytes (token numbers, scalars), the state of the random generator that each block remembers, and the
    gradient of the head, which the loss has made."""
    expected = kept_bytes(type(model), model.config, T, compute, how).total
    expected += 4 * model.token_embedding().weight.numel()
    every = recompute.parse(how)[0]
    remembered = len(model.blocks()[every - 1 :: every]) * torch.get_rng_state().nbytes if every else 0
    model = model.bfloat16() if compute == "bf16" else model
    recompute.apply(model, how)
    assert really_kept(model) == pytest.approx(expected + remembered, abs=1024)


def test_autocast_keeps_fp32_residuals_and_bf16_products(model):
    """Less than fp32, more than bf16; the copies of the weights are not an activation."""
    fp32, autocast, bf16 = (
        kept_bytes(type(model), model.config, T, compute).total for compute in ("fp32", "autocast", "bf16")
    )
    assert bf16 < autocast < fp32
    twice = kept_bytes(type(model), model.config, 2 * T, "autocast").total
    assert twice > 1.99 * autocast  # nothing that does not grow with the sequence


@pytest.mark.parametrize("strategy", ["single", "fsdp"])
def test_checkpointing_holds_less_and_a_block_to_recompute(model, strategy):
    demand, spread = Demand(type(model), model.config, T), Spread(strategy, "bf16")
    none, selective, full = (demand.activations(spread, how) for how in ("none", "selective", "full"))
    assert full < selective < none
    total, plain, _ = kept_bytes(type(model), model.config, T, spread.compute)
    kept, left, _ = kept_bytes(type(model), model.config, T, spread.compute, "full")
    assert none == total
    assert len(plain) == len(model.blocks()) and sum(plain) < total
    # A block that recomputes leaves its output, which is the next one's input.
    assert set(left) == {T * model.config.d_model * (2 if strategy == "fsdp" else 4)}
    assert full == kept + max(plain) - left[0]


def test_measuring_leaves_the_default_type(model):
    kept_bytes(type(model), model.config, T, "bf16")
    assert torch.get_default_dtype() == torch.float32


@pytest.fixture
def demand(model):
    return Demand(type(model), model.config, T)


def state(demand, strategy, precision="bf16", **spread):
    """Bytes per parameter by part, of 4 shards; without the head's gradient."""
    parts = demand.state(Spread(strategy, precision, 8, 4, **spread))
    del parts["head gradient"]
    return {part: round(size / demand.parameters, 2) for part, size in parts.items()}


def test_every_rank_holds_all_of_a_copy(demand):
    expected = {"weights": 4, "gradients": 4, "optimizer": 8, "bf16 copies": 2}
    assert all(state(demand, strategy) == expected for strategy in ("single", "ddp", "zero0"))
    assert state(demand, "ddp", "pure_bf16") == {"weights": 2, "gradients": 6, "optimizer": 4}


def test_zero_shards_stage_by_stage(demand):
    assert state(demand, "zero1") == {"weights": 2, "gradients": 6, "optimizer": 3}
    assert state(demand, "zero2") == {"weights": 2, "gradients": 1.5, "optimizer": 3}
    assert state(demand, "zero3") == {"weights": 0.5, "gradients": 1.5, "optimizer": 3, "gathered": 2}  # of so few
    assert state(demand, "zero2", offload=True) == {"weights": 2, "gradients": 0, "optimizer": 0}


def test_zero3_lets_go_of_what_it_does_not_need_soon():
    config = get_model("hlb").config_for_scale(148, 50304, 0)
    demand = Demand(get_model("hlb"), config, 1024)
    assert demand.parameters > 3e9
    assert demand.state(Spread("zero3", "bf16", 8, 8))["gathered"] == 2e9
    assert demand.state(Spread("fsdp", "bf16", 8, 8))["gathered"] == 2 * demand.gathered < 1e9


def test_fsdp_shards_all_but_what_it_gathers(demand):
    gathered = round(2 * demand.gathered / demand.parameters, 2)
    expected = {"weights": 1, "gradients": 1, "optimizer": 2, "gathered": gathered}
    assert state(demand, "fsdp") == state(demand, "hsdp") == expected
    assert state(demand, "fsdp", reshard=False)["gathered"] == 2
    assert state(demand, "fsdp", "fp32", reshard=False)["gathered"] == 4
    assert state(demand, "fsdp", offload=True) == {"weights": 0, "gradients": 0, "optimizer": 0, "gathered": gathered}
    accumulating = demand.state(Spread("fsdp", "bf16", 4, 4), accumulates=True)
    assert accumulating["unsharded gradients"] == 4 * demand.parameters


def test_the_heads_gradient_is_whole_where_it_cannot_stay_as_the_sum(demand):
    """4 bytes where it is added to another or cut to shards, 2 for the bf16 product it is summed from."""
    head, parts = demand.head, [Spread("single", "fp32"), Spread("ddp", "bf16", 2), Spread("fsdp", "fp32", 2, 2)]
    assert [demand.state(spread)["head gradient"] for spread in parts] == [0, 2 * head, 4 * head]
    assert [demand.state(spread, True)["head gradient"] for spread in parts] == [4 * head, 6 * head, 4 * head]


def test_gathered_are_two_blocks_and_the_rest(model, demand):
    inside = [sum(p.numel() for p in block.parameters()) for block in model.blocks()]
    assert demand.gathered == demand.parameters - sum(inside) + 2 * max(inside) < demand.parameters


def test_tokens_that_fit(demand):
    one = demand.activations(Spread("single", "fp32"), "none") + demand.loss(Spread("single", "fp32"), "none", T)
    room = 16 * demand.parameters + 10.5 * one
    spread = Spread("single", "fp32")
    assert demand.tokens_that_fit(int(room / 0.9), spread, "none", step=1) == 10 * T
    assert demand.tokens_that_fit(1024, spread, "none", step=1) == 0
    assert demand.tokens_that_fit(None, spread, "none", step=1) == float("inf")


def test_gradients_that_wait_for_the_last_microbatch_take_room(demand):
    """Where one microbatch takes the whole step, fsdp holds no unsharded gradients."""
    spread, memory = Spread("fsdp", "bf16", 2, 2), GIB // 4
    alone = demand.tokens_that_fit(memory, spread, "none", step=T)
    several = demand.tokens_that_fit(memory, spread, "none", step=1 << 40)
    one = demand.activations(spread, "none") + demand.loss(spread, "none", T)
    assert (alone - several) / T == pytest.approx(4 * demand.parameters / one, abs=1)


# -- the loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_the_loss_takes_what_is_expected(name, compute, tmp_path, monkeypatch):  # noqa: F811
    """The most that the allocator holds in a forward pass: what stays, the head's gradient, a chunk of logits; the tiles of a GPU.

    In bf16 the last product of [V, D] is made when the tile is gone; expected is the sum.
    """
    monkeypatch.setattr(linear_cross_entropy, "TILE_BYTES_PER_CORE", linear_cross_entropy.TILE_BYTES)
    length, model = 256, build(name, vocab=8192)
    demand = Demand(type(model), model.config, length)
    spread = Spread("fsdp", "pure_bf16" if compute == "bf16" else "fp32")
    expected, loss = kept_bytes(type(model), model.config, length, compute).total, demand.loss(spread, "none", length)
    expected += demand.state(spread)["head gradient"] + loss
    model = model.bfloat16() if compute == "bf16" else model
    held = most_held(model, length, tmp_path / "trace.json")
    product = 2 * demand.head if compute == "bf16" else 0
    assert loss > 0.3 * expected
    assert 0.98 * (expected - product) < held < 1.02 * expected


def most_held(model, length, path):
    """Most bytes that the allocator has given and not got back at any moment of a forward pass."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        tokens = torch.zeros(1, length, dtype=torch.long)
        model(tokens, targets=tokens)
    recorded.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event["name"] == "[memory]"]
    changes = [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]
    return max(itertools.accumulate(changes))


def test_logits_that_are_held_have_gradients(name):  # noqa: F811
    """A model that makes whole logits and hands them to cross_entropy."""

    class Holding(get_model(name)):
        def forward(self, tokens, targets=None, **more):
            return Output(loss=cross_entropy(super().forward(tokens, **more).logits, targets))

    config, spread = build(name).config, Spread("single", "bf16")
    chunked, holding = (Demand(model_class, config, T) for model_class in (get_model(name), Holding))
    more = holding.activations(spread, "none") - chunked.activations(spread, "none")
    assert more >= 4 * config.vocab_size * T
    for sequences in (1, 1000):
        assert holding.loss(spread, "none", sequences * T) == 8 * config.vocab_size * T * sequences
    assert chunked.loss(spread, "none", float("inf")) < 2**30


def test_chunks_leave_room_for_more(name):  # noqa: F811
    """The loss of many tokens takes no more than that of one chunk."""
    model_class = get_model(name)
    config = model_class.config_for_scale(1, 50304, 46_009_736)
    demand, spread = Demand(model_class, config, 1024), Spread("single", "bf16")
    most = demand.loss(spread, "none", float("inf"))
    assert most == demand.loss(spread, "none", 8192) < 2 * demand.loss(spread, "none", 2048)
    one, state = demand.activations(spread, "none"), sum(demand.state(spread).values())
    assert demand.tokens_that_fit(int((state + most + 20.5 * one) / 0.9), spread, "none", step=1) == 20 * 1024
