"""Activation checkpointing gives the same gradients with less memory, whatever is laid around the blocks."""

import collections
import copy
from types import SimpleNamespace

import processes
import pytest
import torch
from conftest import beyond
from test_zoo import VOCAB, build, gradients, targets, tokens  # noqa: F401 (the last two are fixtures)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.base import Cache
from models.layers import flex
from trainer.core.errors import UserError
from trainer.engine import activation_checkpointing

MODES = ("full", "selective", "every-1", "every-2")


@pytest.fixture(params=("hlb", "gpt2", "modded"))
def name(request):
    return request.param


@pytest.fixture
def model(name):
    return build(name, scale=0.4)  # three blocks or more, so that every-2 leaves one


def checkpointed(model, how):
    twin = copy.deepcopy(model)
    activation_checkpointing.apply(twin, how)
    return twin


def count_blocks(model):
    """Counts the calls of each block's own forward."""
    counts = [0] * len(model.blocks())

    def counting(i, forward):
        def run(*args, **kwargs):
            counts[i] += 1
            return forward(*args, **kwargs)

        return run

    for i, block in enumerate(model.blocks()):
        block.forward = counting(i, block.forward)
    return counts


@pytest.mark.parametrize("how, expected", [("none", (0, False)), ("full", (1, False)), ("every-12", (12, False))])
def test_words(how, expected):
    assert activation_checkpointing.parse(how) == expected


@pytest.mark.parametrize("how", ["", "auto", "every", "every-0", "every--1", "every-x", "Full", "every-1.5", "every-²"])
def test_other_words_are_refused(how):
    with pytest.raises(UserError, match="^engine.activation_checkpointing: .*; use none, selective, full or every-N"):
        activation_checkpointing.parse(how)


@pytest.mark.parametrize("how, times", [("none", [1, 1, 1]), ("full", [2, 2, 2]), ("every-2", [1, 2, 1])])
def test_the_blocks_named_recompute(model, tokens, targets, how, times):  # noqa: F811
    counts = count_blocks(model)
    activation_checkpointing.apply(model, how)
    gradients(model, tokens, targets)
    assert counts[:3] == times


@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_gradients_are_those_without(model, tokens, targets, how, bf16):  # noqa: F811
    """Bit for bit: the same operators on the same numbers, in the types of the autocast of the forward pass."""
    results = []
    for twin in (model, checkpointed(model, how)):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = twin(tokens, targets=targets).loss
        loss.backward()
        results.append((loss.detach(), {key: parameter.grad for key, parameter in twin.named_parameters()}))
    (loss, plain), (again, recomputed) = results
    assert torch.equal(loss, again)
    assert all(torch.equal(recomputed[key], plain[key]) for key in plain)


@pytest.mark.parametrize("how", MODES)
def test_names_blocks_and_classes_stay(model, how):
    twin = checkpointed(model, how)
    assert [key for key, _ in twin.named_parameters()] == [key for key, _ in model.named_parameters()]
    assert list(twin.state_dict()) == list(model.state_dict())
    assert [type(block) for block in twin.blocks()] == [type(block) for block in model.blocks()]


def test_a_copy_computes_with_its_own_weights(model, tokens):  # noqa: F811
    activation_checkpointing.apply(model, "full")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert model(tokens).logits.abs().sum() > 0
    assert twin(tokens).logits.abs().sum() == 0


@pytest.mark.parametrize("how", ["full", "selective"])
def test_evaluation_and_decoding_go_straight_through(model, tokens, how, monkeypatch):  # noqa: F811
    with torch.no_grad():
        expected = model(tokens).logits
        monkeypatch.setattr(
            activation_checkpointing, "checkpoint", lambda *args, **kwargs: pytest.fail("recomputes for nothing")
        )
        activation_checkpointing.apply(model, how)
        assert torch.equal(model(tokens).logits, expected)
        cache, steps = Cache(), []
        for part in tokens.split(8, dim=1):
            steps.append(model(part, cache=cache).logits)
    assert (torch.cat(steps, dim=1) - expected).abs().max() < 1e-5  # as test_zoo's cached decoding


class Noisy(nn.Module):
    """A block with dropout, a product with weights and a direct parameter."""

    def __init__(self, width=16):
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x + self.scale * nn.functional.dropout(torch.tanh(self.inner(x)), 0.5)


class Stack(nn.Module):
    def __init__(self, block=Noisy):
        super().__init__()
        self.layers = nn.ModuleList(block() for _ in range(3))

    def blocks(self):
        return list(self.layers)

    def forward(self, x):
        for block in self.layers:
            x = block(x)
        return x

    def loss(self, x):
        return x.sum()


@pytest.mark.parametrize("how", MODES)
def test_dropout_falls_on_the_same_places_again(how):
    torch.manual_seed(0)
    model, x = Stack(), torch.randn(4, 16)
    results = []
    for twin in (model, checkpointed(model, how)):
        torch.manual_seed(1)
        twin(x).square().sum().backward()
        results.append([parameter.grad for parameter in twin.parameters()])
        assert torch.initial_seed() == 1
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class Attends(nn.Module):
    """Fused attention and products, counted when they are really computed."""

    def __init__(self, width=16):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind()
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        plain = (q @ k.transpose(-1, -2)).softmax(-1) @ v  # hlb's dense attention is of this kind
        return x + self.out((attended + plain).transpose(1, 2).flatten(2))


class Counting(TorchDispatchMode):
    """Counts the operators that are really computed: those that `selective` has kept do not get here again."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.counts[operator] += 1
        return operator(*args, **(kwargs or {}))


def test_selective_repeats_products_of_activations_but_not_of_weights_nor_fused_attention():
    counted = {}
    for how in ("none", "selective", "full"):
        model = checkpointed(Stack(Attends), how)
        loss = model(torch.randn(2, 8, 16)).square().sum()
        with Counting() as counted[how]:
            loss.backward()

    def times(operator):  # in the backward pass; it computes no addmm, softmax or attention of its own
        return [counted[how].counts[operator] for how in counted]

    aten = torch.ops.aten
    assert times(aten.addmm.default) == [0, 0, 3]  # the last product of a block is not needed
    assert times(aten._scaled_dot_product_flash_attention_for_cpu.default) == [0, 0, 3]
    assert times(aten._softmax.default) == [0, 3, 3]


def test_selective_keeps_flex_attention():
    assert torch.ops.higher_order.flex_attention in activation_checkpointing.kept_operators()
    assert torch.ops.aten.mm.default in activation_checkpointing.kept_operators()
    assert torch.ops.aten.bmm.default not in activation_checkpointing.kept_operators()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["selective", "full"])
def test_selective_keeps_what_a_kernel_of_its_own_gives(how):
    """FlexAttention in an eager block: compiled by itself, its operator is not to be seen any more, only the compiled code."""
    calls = []

    @torch.library.custom_op("test_activation_checkpointing::counted", mutates_args=())
    def counted(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return x.clone()

    counted.register_fake(torch.empty_like)
    counted.register_autograd(lambda ctx, gradient: gradient)

    class Block(nn.Module):
        def forward(self, x):
            return flex.compiled(counted)(x).sin()

    block = Block()
    activation_checkpointing.apply(SimpleNamespace(blocks=lambda: [block]), how)
    x = torch.ones(4, requires_grad=True)
    block(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(4).cos())
    assert len(calls) == (1 if how == "selective" else 2)


# -- with what is laid around the blocks ------------------------------------------------------------------------------


RANK = """
import copy, os, sys
os.environ["DS_ACCELERATOR"] = "cpu"
sys.path[:0] = ["tests", "tests/models"]
import torch, torch.distributed as dist
from test_zoo import VOCAB, build
from trainer.engine import activation_checkpointing

how, around, name = sys.argv[1:]
dist.init_process_group("gloo")
generator = torch.Generator().manual_seed(dist.get_rank())
tokens, targets = torch.randint(VOCAB, (2, 2, 24), generator=generator)
reference = build(name)
reference(tokens, targets).loss.backward()
expected = {key: parameter.grad for key, parameter in reference.named_parameters()}
for gradient in expected.values():
    dist.all_reduce(gradient)
    gradient /= 2

model = build(name)
calls = 0
def count(*_):
    global calls
    calls += 1
for module in model.modules():
    if type(module) is torch.nn.Linear:
        module.register_forward_hook(count)
activation_checkpointing.apply(model, how)
if around == "ddp":
    from torch.nn.parallel import DistributedDataParallel
    wrapped = DistributedDataParallel(model)
    wrapped(tokens, targets=targets).loss.backward()
    got = {key: parameter.grad for key, parameter in model.named_parameters()}
elif around == "fsdp":
    from torch.distributed.fsdp import fully_shard
    for module in (*model.blocks(), model):
        fully_shard(module)
    model(tokens, targets=targets).loss.backward()
    got = {key: parameter.grad.full_tensor() for key, parameter in model.named_parameters()}
else:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad
    from trainer.runtime.compat import leave_out_shared_memory
    leave_out_shared_memory()
    # Nothing is small enough to stay gathered, and all is let go of at once.
    zero = {"stage": int(around[-1]), "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        config={"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero, "zero_allow_untested_optimizer": True},
    )
    engine.backward(engine(tokens, targets=targets).loss)
    got = {key: safe_get_full_grad(parameter) for key, parameter in model.named_parameters()}
for key, gradient in expected.items():
    worst = (got[key] - gradient).abs().max() / gradient.abs().max()
    assert worst < 1e-5, (key, worst.item())
if dist.get_rank() == 0:
    print("linear layers called", calls, "parameters", len(got), flush=True)
dist.barrier()
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", beyond(["selective"], ["full", "selective"]))
@pytest.mark.parametrize("around", ["ddp", "fsdp", "zero1", "zero2", "zero3"])
def test_two_processes(tmp_path, around, how):
    """hlb's blocks have a parameter of their own besides their submodules'. Two ranks' sum against the same two sums:
    fp32 rounding of products of a few hundred terms, 1e-5 of the largest entry."""
    (tmp_path / "rank.py").write_text(RANK)
    done = processes.run(tmp_path / "rank.py", how, around, "hlb", ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "linear layers called 6 parameters" in done.stdout  # 2 blocks of 2; the first of each again
