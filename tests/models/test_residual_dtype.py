"""A residual stream in bf16: where it is, what blocks then hold, and that its rounding is all that it changes."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from test_switches import B, T, build, draw_tokens
from test_transformer import small
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from models.layers.norms import LayerNorm
from trainer.engine import activation_checkpointing

# One rounding changes an entry by up to 2^-8 of it. Taken as even within these limits and as independent, n of them change a tensor
# by sqrt(n) of this part of its length.
ROUNDING = 2**-8 / math.sqrt(3)
LAYERS = 3
DOCUMENTS = torch.arange(3).repeat_interleave(torch.tensor([6, 1, T - 7])).expand(B, T)


def twins(**switches):
    """Two models with the same weights: the stream fp32 under autocast, and bf16."""
    model = build(small(n_layers=LAYERS, **switches))
    other = build(replace(model.config, residual_dtype="bf16"))
    other.load_state_dict(model.state_dict())
    return model, other


def loss_of(model, bf16=True, **inputs):
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return model(draw_tokens(1), draw_tokens(2), **inputs).loss


def gradients(model, bf16=True, **inputs):
    """(loss, name -> gradient)"""
    model.zero_grad()
    loss = loss_of(model, bf16, **inputs)
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def dtypes_between_blocks(model, bf16=True, **inputs):
    found = []
    hooks = [block.register_forward_hook(lambda _, x, out: found.extend((x[0], out[0]))) for block in model.blocks()]
    output = loss_of(model, bf16, **inputs)
    for hook in hooks:
        hook.remove()
    assert len(found) == 2 * len(model.blocks()) and output.dtype == torch.float32
    return {x.dtype for x in found}


# All ways in which something joins the stream or the values, beside all kinds of branches and norms.
FORMS = {
    "gpt2": {"norm": "layer", "bias": True, "positions": "learned", "max_context": T, "mlp": "gelu"},
    "modded": {"x0_skip": True, "unet_skips": True, "value_embeddings": 1, "qk_norm": True, "embedding_scale": True},
    "weighted": {"residual": "weighted", "value_residual": True, "neftune_alpha": 0.1},
    "pre_post": {"norm_placement": "pre_post", "norm": "layer", "attention": "differential"},
    "post": {"norm_placement": "post", "norm": "layer", "kv_shift": True},
    "branch": {"norm_placement": "branch", "norm": "dyt", "attention_gate": "head", "forget_gate": True},
    "parallel": {"block": "parallel"},
    "two norms": {"block": "parallel_two_norms", "attention": "latent"},
    "pattention": {"pattention": "qkv,out,mlp"},
    "linear heads": {"n_predict": 3},
    "heads with blocks": {"n_predict": 2, "prediction_heads": "transformer", "norm": "layer"},
}


@pytest.mark.parametrize("form", FORMS)
def test_the_stream_is_bf16_under_autocast_alone(form):
    wide, narrow = twins(**FORMS[form])
    assert dtypes_between_blocks(wide) == {torch.float32}
    assert dtypes_between_blocks(narrow) == {torch.bfloat16}
    assert dtypes_between_blocks(narrow, documents=DOCUMENTS) == {torch.bfloat16}
    assert dtypes_between_blocks(narrow, bf16=False) == {torch.float32}


@pytest.mark.parametrize("form", ["gpt2", "linear heads", "heads with blocks"])
def test_inputs_of_all_heads_are_fp32_as_before(form):
    for model in twins(**FORMS[form]):
        with torch.autocast("cpu", torch.bfloat16):
            states = model.states_of_heads(model.hidden(draw_tokens(1)))
        assert {x.dtype for x in states} == {torch.float32}


def test_without_autocast_nothing_changes():
    """Neither in fp32 nor in bf16, which is then the dtype of the weights."""
    wide, narrow = twins(norm="layer", bias=True)
    for _ in range(2):
        (loss, expected), (again, found) = (gradients(model, bf16=False) for model in (wide, narrow))
        assert torch.equal(loss, again) and all(torch.equal(found[name], expected[name]) for name in expected)
        wide, narrow = wide.bfloat16(), narrow.bfloat16()
    assert dtypes_between_blocks(narrow, bf16=False) == {torch.bfloat16}


# -- what is held ------------------------------------------------------------------------------------------------------


def fp32_held_in_blocks(model):
    """How many tensors of B T D fp32 numbers the blocks keep for their backward pass."""
    kept = []

    def keep(x):
        if inside and x.dtype == torch.float32 and x.numel() == B * T * model.config.d_model:
            kept.append(x)  # alive, so that no other gets its place
        return x

    inside = []
    for block in model.blocks():
        block.register_forward_pre_hook(lambda *_: inside.append(True))
        block.register_forward_hook(lambda *_: inside.clear())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss_of(model)
    return len({x.data_ptr() for x in kept})


@pytest.mark.parametrize(("form", "norms"), {"gpt2": 0, "modded": 4, "weighted": 2, "parallel": 1}.items())
def test_blocks_hold_no_fp32_beside_that_of_their_norms(form, norms):
    """LayerNorm keeps x itself. A CPU's RMSNorm keeps an fp32 copy of x: one for each norm of a block, of x or of queries or keys."""
    wide, narrow = twins(attention_kernel="sdpa", **FORMS[form])
    assert fp32_held_in_blocks(narrow) == norms * LAYERS < fp32_held_in_blocks(wide)


# -- numbers -----------------------------------------------------------------------------------------------------------

SUMS = 2 * LAYERS  # of the stream and a branch
# The embedding and each sum are rounded; in the backward pass each norm's gradient of x, and its sum with that of the stream.
FORWARD, BOTH = 1 + SUMS, 1 + SUMS + 2 * SUMS


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_rounding_is_the_only_difference(norm):
    """At the start, where branches are small beside the stream, so that they do not amplify what earlier sums have rounded."""
    wide, narrow = twins(norm=norm)
    ends = []
    wide.norm.register_forward_pre_hook(lambda _, x: x[0].retain_grad() or ends.append(x[0]))
    (loss, expected), (found_loss, found) = gradients(wide), gradients(narrow)
    # To first order; and fp32's own sums.
    reach = (ends[0].norm() * ends[0].grad.norm()).item()
    assert abs(found_loss - loss) <= math.sqrt(FORWARD) * ROUNDING * reach + 1e-6
    difference = torch.cat([(found[name] - expected[name]).flatten() for name in expected]).norm()
    length = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
    assert 0 < difference / length <= math.sqrt(BOTH) * ROUNDING


def test_thirty_steps_end_alike():
    """Each step lowers the loss by lr |g|^2, and a relative error e of g changes that by 2 e at most."""
    ends = []
    for model in twins(norm="layer"):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.03)
        losses = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses == sorted(losses, reverse=True)  # so small are the steps
        ends.append((losses[0], losses[-1]))
    (first, last), (_, other) = ends
    assert first - last > 1
    assert abs(other - last) <= 2 * math.sqrt(BOTH) * ROUNDING * (first - last)


def test_documents_are_kept_apart():
    """Bit for bit: what another document says does not change a row's numbers."""
    model = twins(norm="layer")[1].eval()
    tokens = draw_tokens(1)
    other = tokens.clone()
    other[:, :6] = (other[:, :6] + 1) % 50
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        one, two = (model(x, documents=DOCUMENTS).logits for x in (tokens, other))
    assert torch.equal(one[:, 6:], two[:, 6:]) and not torch.equal(one[:, :6], two[:, :6])


# -- around the blocks -------------------------------------------------------------------------------------------------


def assert_same(model, around):
    """Bit for bit what the bf16 stream gives without what is around it."""
    loss, expected = gradients(model)
    again, found = gradients(around)
    assert torch.equal(again, loss)
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name.removeprefix("module.")]), name


@pytest.mark.parametrize("how", ["full", "selective"])
def test_recomputed_blocks_give_the_same(how):
    model = twins(norm="layer")[1]
    around = copy.deepcopy(model)
    activation_checkpointing.apply(around, how)
    assert_same(model, around)


def test_blocks_are_traced_as_one_graph():
    """With the operators of eager code, so that the numbers are the same."""
    model = twins(norm="layer", qk_norm=True)[1]  # both norms that leave autocast
    around = copy.deepcopy(model)
    for block in around.blocks():
        block.compile(backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()
    assert_same(model, around)
    torch._dynamo.reset()


@pytest.fixture
def alone():
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_ddp_gives_the_same(alone):
    model = twins(norm="layer")[1]
    assert_same(model, DistributedDataParallel(copy.deepcopy(model)))


def test_under_fsdp_the_stream_has_the_dtype_of_the_weights(alone):
    """With or without the switch."""
    results = []
    for model in twins(norm="layer", bias=True):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        for part in (*model.blocks(), model):
            fully_shard(part, mp_policy=policy, mesh=dist.init_device_mesh("cpu", (1,)))
        assert dtypes_between_blocks(model, bf16=False) == {torch.bfloat16}
        loss, found = gradients(model, bf16=False)
        results.append((loss, {name: gradient.full_tensor() for name, gradient in found.items()}))
    (loss, expected), (again, found) = results
    assert torch.equal(loss, again) and all(torch.equal(found[name], expected[name]) for name in expected)


def test_decoding_goes_on_from_a_cache():
    """The logits of the whole: after LAYERS blocks they differ by no more than other roundings would."""
    model = twins(norm="layer")[1].eval()
    tokens = draw_tokens(1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        whole, state = model(tokens).logits, model.new_state(B, T, tokens.device, torch.bfloat16)
        parts = torch.cat([model(part, cache=state).logits for part in tokens.split(5, dim=1)], dim=1)
    assert (parts - whole).norm() <= math.sqrt(FORWARD) * ROUNDING * whole.norm()


def test_parameters_are_those_of_the_default():
    wide, narrow = twins(norm="layer", bias=True)
    assert list(wide.state_dict()) == list(narrow.state_dict())
    assert wide.parameter_groups() == narrow.parameter_groups()


def test_the_default_keeps_torchs_layer_norm():
    """Whose result is fp32 on a GPU behind a branch too, where ours would round it."""
    wide, narrow = twins(norm="layer", norm_placement="pre_post")
    for model, kind in ((wide, torch.nn.LayerNorm), (narrow, LayerNorm)):
        found = {type(module) for module in model.modules() if isinstance(module, torch.nn.LayerNorm)}
        assert found == {kind}
