"""Models whose blocks multiply in fp8: what is converted, that they train like bf16, recomputed, compiled and sharded."""

import copy

import processes
import pytest
import torch
from test_activation_checkpointing import Counting
from test_zoo import VOCAB, targets, tokens  # noqa: F401 (the last two are fixtures)
from torch import nn

from models.base import get_model
from models.layers.float8 import Float8Linear, convert_to_float8
from trainer.engine import activation_checkpointing


class Odd(nn.Module):
    """Layers that can, and one that cannot, be multiplied in fp8; and one that is not torch's own."""

    class Own(nn.Linear):
        pass

    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(32, 48)
        self.inner = nn.Sequential(nn.Linear(48, 24), nn.Linear(24, 32, bias=False))
        self.own = self.Own(32, 32)


def test_conversion_changes_nothing_but_the_class():
    module = Odd()
    before, parameters = copy.deepcopy(module.state_dict()), dict(module.named_parameters())
    assert convert_to_float8(module) == (1, ["inner.0", "inner.1"])
    assert type(module.wide) is Float8Linear and type(module.own) is Odd.Own
    assert list(module.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert all(parameter is parameters[name] for name, parameter in module.named_parameters())
    assert convert_to_float8(module)[0] == 0  # once is enough
    with torch.device("meta"):
        assert convert_to_float8(nn.Linear(16, 16)) == (1, [])


def converted(model):
    for block in model.blocks():
        assert convert_to_float8(block)[1] == []
    return model


SMALL = {"gpt2": {"n_heads": 2}, "hlb": {"qk_divisor": 4}}


def small(name):
    """A model of two blocks whose widths are divisible by 16 throughout; a CPU multiplies e4m3
    some thousand times slower than fp32."""
    cls = get_model(name)
    model = cls(cls.Config(vocab_size=VOCAB, d_model=32, n_layers=2, **SMALL[name]))
    model.init_weights(torch.Generator().manual_seed(0))
    return model


MODELS = pytest.mark.parametrize("name", ["gpt2", "hlb"])


@MODELS
def test_head_and_embedding_stay(name):
    model = converted(small(name))
    layers = [module for module in model.modules() if isinstance(module, Float8Linear)]
    assert len(layers) == {"gpt2": 4, "hlb": 2}[name] * len(model.blocks())
    assert name == "gpt2" or type(model.head) is nn.Linear


def losses(model, tokens, targets, steps):  # noqa: F811
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    curve = []
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens, targets=targets).loss
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return torch.tensor(curve)


@MODELS
def test_training_follows_bf16(name, tokens, targets):  # noqa: F811
    """The products of a step err by less than sqrt(2^-6 + 2^-8) = 14 % of their norm, at random: were all of it lost for the
    descent, the loss would at every step have fallen by 14 % less than in bf16."""
    model = small(name)
    plain = losses(copy.deepcopy(model), tokens, targets, steps=12)
    fp8 = losses(converted(model), tokens, targets, steps=12)
    assert plain[-1] < 0.5 * plain[0]  # there was something to learn
    assert not torch.equal(fp8, plain)
    assert ((fp8 - plain).abs() <= 0.01 * plain[0] + 0.14 * (plain[0] - plain)).all()


@MODELS
@pytest.mark.parametrize("how", ["full", "selective"])
def test_recomputed_gradients_are_those_without(name, how, tokens, targets):  # noqa: F811
    model = converted(small(name))
    twin = copy.deepcopy(model)
    activation_checkpointing.apply(twin, how)
    counted = []
    for one in (model, twin):
        with torch.autocast("cpu", torch.bfloat16):
            loss = one(tokens, targets=targets).loss
        with Counting() as counting:
            loss.backward()
        counted.append(counting.counts[torch.ops.aten._scaled_mm.default])
    for (key, plain), again in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(again.grad, plain.grad), key
    layers = sum(isinstance(module, Float8Linear) for module in model.modules())
    assert counted == [2 * layers, (3 if how == "full" else 2) * layers]


# -- compiled, sharded ------------------------------------------------------------------------------------------------


def norm_distance(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.slow
@MODELS
@pytest.mark.parametrize("how", ["selective"])
def test_compiled_blocks(name, how, tokens, targets):  # noqa: F811
    """Each block is one graph. What stands around the products rounds otherwise when compiled, and a number near the middle of
    two fp8 numbers may then go the other way: less is changed than by fp8 itself, whose factors all err."""
    gradients = {}
    model = small(name)
    for form in ("bf16", "eager", "compiled"):
        twin = copy.deepcopy(model) if form == "bf16" else converted(copy.deepcopy(model))
        activation_checkpointing.apply(twin, how)
        if form == "compiled":
            torch._dynamo.reset()
            for block in twin.blocks():
                block.compile(fullgraph=True)
        with torch.autocast("cpu", torch.bfloat16):
            twin(tokens, targets=targets).loss.backward()
        gradients[form] = {key: parameter.grad for key, parameter in twin.named_parameters()}
    for key, eager in gradients["eager"].items():
        assert norm_distance(gradients["compiled"][key], eager) < norm_distance(eager, gradients["bf16"][key]), key


RANK = """
import os, sys
sys.path[:0] = ["tests", "tests/engine", "tests/models"]
import torch, torch.distributed as dist
from test_float8_models import converted, small
from test_zoo import VOCAB
from trainer.engine import activation_checkpointing

around, precision, compiled = sys.argv[1], sys.argv[2], sys.argv[3] == "compiled"
dist.init_process_group("gloo")
generator = torch.Generator().manual_seed(dist.get_rank())
tokens, targets = torch.randint(VOCAB, (2, 2, 24), generator=generator)
reference = converted(small("hlb"))
if precision == "bf16":
    reference.bfloat16()
reference(tokens, targets).loss.backward()
expected = {key: parameter.grad.float() for key, parameter in reference.named_parameters()}
for gradient in expected.values():
    dist.all_reduce(gradient)
    gradient /= 2

model = converted(small("hlb"))
activation_checkpointing.apply(model, "selective")
if compiled:
    for block in model.blocks():
        block.compile()
if around == "ddp":
    from torch.nn.parallel import DistributedDataParallel
    wrapped = DistributedDataParallel(model)
    wrapped(tokens, targets=targets).loss.backward()
    got = {key: parameter.grad for key, parameter in model.named_parameters()}
else:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16" else None, reduce_dtype=torch.float32
    )
    for module in (*model.blocks(), model):
        fully_shard(module, mp_policy=policy)
    model(tokens, targets=targets).loss.backward()
    got = {key: parameter.grad.full_tensor() for key, parameter in model.named_parameters()}
assert all(gradient.dtype == torch.float32 for gradient in got.values())
if compiled:
    got, expected = ({"all": torch.cat([g.flatten() for g in gradients.values()])} for gradients in (got, expected))
for key, gradient in expected.items():
    worst = ((got[key] - gradient).norm() / gradient.norm()).item()
    assert worst < (0.14 if compiled else 1e-5), (key, worst)
dist.barrier()
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", ["ddp fp32 eager", "fsdp fp32 eager", "fsdp bf16 eager", "fsdp bf16 compiled"], ids=lambda words: words
)
def test_two_processes(tmp_path, words):
    """Two ranks' sum against the same two sums: the factors and their products are the same, 1e-5 is left to fp32 sums.

    A compiled block rounds what stands around the products otherwise, so that some factors go to the other fp8 number: the
    whole gradient then differs by less of its norm than if all factors of a product did, sqrt(2^-6 + 2^-8) = 0.14."""
    (tmp_path / "rank.py").write_text(RANK)
    done = processes.run(tmp_path / "rank.py", *words.split(), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
