"""Attention of the decoder of switches: against short definitions in fp64, what its cache holds, what it can see, Llama."""

import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import text_only_transformers
from test_switches import build, distance, stirred
from test_transformer import VOCAB, B, T, draw_tokens, small

import models.transformer
from models.base import Cache
from models.hugging_face import llama_config, load_llama_weights
from models.layers import attend
from models.layers.sums import sum_by_doubling
from models.presets import Llama


def draw(seed, *shape):
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


# -- definitions -------------------------------------------------------------------------------------------------------


def softmax_attention(q, k, v, bias=0.0):
    """One head: q, k [B, T, D], v [B, T, Dv]."""
    scores = q @ k.mT / math.sqrt(q.shape[-1]) + bias
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1) @ v


def split_heads(attention, x):
    """Lists of the queries, keys and values of each head."""
    return [y.split(attention.heads.head_dim, dim=-1) for y in attention.qkv(x).split(attention.heads.widths, dim=-1)]


def shifted(heads, own, before):
    return [a * y + b * F.pad(y, (0, 0, 1, 0))[:, :-1] for y, a, b in zip(heads, own, before, strict=True)]


def by_kv_shift(attention, x, values):
    q, k, v = split_heads(attention, x)
    shift, g = attention.heads.shift, len(k)
    k, v = shifted(k, shift.own[:g], shift.before[:g]), shifted(v, shift.own[g:], shift.before[g:])
    return [softmax_attention(q[h], k[h * g // len(q)], v[h * g // len(q)]) for h in range(len(q))]


def by_value_mix(attention, x, values):
    (a, b), (q, k, v) = attention.heads.value_mix.weights, split_heads(attention, x)
    return [softmax_attention(q[h], k[h], a * v[h] + b * y) for h, y in enumerate(values.split(8, dim=-1))]


def by_forget_gate(attention, x, values):
    """Scores gain the sum of log f_l over l = j+1 ... i: the query's own gate counts, the key's does not."""
    q, k, v = split_heads(attention, x)
    log_f = attention.heads.forget.gate(x).sigmoid().log()
    bias = torch.zeros(len(q), B, T, T, dtype=torch.double)
    for i in range(T):
        for j in range(i):
            bias[:, :, i, j] = log_f[:, j + 1 : i + 1].sum(1).T
    return [softmax_attention(q[h], k[h], v[h], bias[h]) for h in range(len(q))]


def by_differential(attention, x, values):
    q, k, v = split_heads(attention, x)
    layer, group = attention.heads.layer, len(q) // len(k)
    q1, k1, q2, k2 = attention.heads.lambdas.view(4, -1)
    lambda_init = 0.8 - 0.6 * math.exp(-0.3 * layer)
    weight = torch.exp(q1 @ k1) - torch.exp(q2 @ k2) + lambda_init
    outputs = []
    for h in range(len(q) // 2):
        g = h // group
        wide = torch.cat((v[2 * g], v[2 * g + 1]), dim=-1)
        first = softmax_attention(q[2 * h], k[2 * g], wide)
        y = first - weight * softmax_attention(q[2 * h + 1], k[2 * g + 1], wide)
        y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * attention.heads.head_norm.weight
        outputs.append((1 - lambda_init) * y)
    return outputs


def by_gate(attention, x, values):
    q, k, v = split_heads(attention, x)
    gates = attention.heads.gate(x).sigmoid().chunk(len(q), dim=-1)
    return [softmax_attention(q[h], k[h], v[h]) * gates[h] for h in range(len(q))]


def by_qk_norm(attention, x, values):
    q, k, v = split_heads(attention, x)
    (q, wq), (k, wk) = (q, attention.heads.query_norm.weight), (k, attention.heads.key_norm.weight)
    q = [y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * wq for y in q]
    k = [y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * wk for y in k]
    return [softmax_attention(q[h], k[h], v[h]) for h in range(len(q))]


@torch.no_grad()
@pytest.mark.parametrize(
    ("definition", "changes"),
    [
        (by_kv_shift, {"kv_shift": True}),
        (by_kv_shift, {"kv_shift": True, "n_kv_heads": 2}),
        (by_value_mix, {"value_residual": True}),
        (by_value_mix, {"value_embeddings": 1}),
        (by_forget_gate, {"forget_gate": True}),
        (by_differential, {"attention": "differential"}),
        (by_differential, {"attention": "differential", "n_heads": 8, "n_kv_heads": 4, "head_dim": 8}),
        (by_gate, {"attention_gate": "head"}),
        (by_gate, {"attention_gate": "channel"}),
        (by_qk_norm, {"qk_norm": True}),
    ],
)
def test_it_is_its_definition(definition, changes):
    model = stirred(small(positions="none", **changes)).double()
    attention, context = model.layers[-1].attention, model.context(draw_tokens(1), None, None)
    x, values = draw(2, B, T, 32), draw(3, B, T, 32)
    expected = attention.out(torch.cat(definition(attention, x, values), dim=-1))
    # The softmax and lambda are fp32 also here.
    assert distance(attention(x, values, context, None)[0], expected) < 1e-5 * max(1, expected.abs().max())


@torch.no_grad()
def test_the_values_of_the_first_layer_are_passed_on():
    model = stirred(small(value_residual=True))
    tokens, seen = draw_tokens(1), []
    for block in model.layers:
        block.attention.register_forward_hook(lambda module, args, result: seen.append((args[0], args[1], result[1])))
    model(tokens)
    first = model.layers[0].attention.qkv(seen[0][0])[..., 64:]
    assert seen[0][1] is None and model.layers[0].attention.heads.value_mix is None
    assert all(torch.equal(values, first) for _, *both in seen[1:] for values in both)


@pytest.mark.parametrize(
    ("changes", "owners"),
    [
        ({}, ""),
        ({"attention_bias": "qkv"}, "qkv"),
        ({"attention_bias": "all"}, "out qkv"),
        ({"bias": True}, "mlp.out out qkv up"),
        ({"bias": True, "attention_bias": "qkv"}, "mlp.out out qkv up"),
        ({"attention": "latent", "attention_bias": "qkv"}, "query"),
    ],
    ids=str,
)
def test_biases_are_where_they_were_asked_for(changes, owners):
    names = [name for name, _ in build(small(**changes)).named_parameters() if name.endswith(".bias")]
    found = {name.removesuffix(".bias").split(".", 2)[2] for name in names}
    assert {name.removeprefix("attention.").replace("mlp.up", "up") for name in found} == set(owners.split())


@pytest.mark.parametrize("dim", [1, -2])
@pytest.mark.parametrize("length", [1, 2, 37, 64])
def test_sums_by_doubling_are_running_sums(length, dim):
    """What stands for cumsum where CUDA has none that is the same each time."""
    x = draw(0, 2, length, 3).requires_grad_()
    upstream = draw(1, 2, length, 3)
    expected = x.cumsum(dim)
    torch.testing.assert_close(sum_by_doubling(x, dim), expected)
    given, wanted = (torch.autograd.grad(out, x, upstream)[0] for out in (sum_by_doubling(x, dim), expected))
    torch.testing.assert_close(given, wanted)


# -- shared keys and values, and the cache -----------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("n_kv_heads", [1, 2])
def test_shared_keys_and_values_are_those_of_every_head_tiled(n_kv_heads):
    shared, full = stirred(small(n_kv_heads=n_kv_heads, qk_norm=True)), build(small(qk_norm=True))
    weights = shared.state_dict()
    for name in [name for name in weights if "qkv" in name]:
        q, *kv = weights[name].split([32, 8 * n_kv_heads, 8 * n_kv_heads])
        tiled = [y.unflatten(0, (n_kv_heads, 8)).repeat_interleave(4 // n_kv_heads, dim=0).flatten(0, 1) for y in kv]
        weights[name] = torch.cat((q, *tiled))
    full.load_state_dict(weights)
    tokens, cache = draw_tokens(1), Cache(T)
    logits = full(tokens).logits
    assert distance(shared(tokens, cache=cache).logits, logits) < 1e-5 * logits.abs().max()
    assert cache.nbytes == 4 * 2 * len(shared.layers) * B * n_kv_heads * T * 8  # keys and values, fp32


@torch.no_grad()
@pytest.mark.parametrize(("changes", "expected"), [({}, 4 * 8 + 4), ({"kv_rank": 20, "rope_dim": 6, "q_rank": 12}, 26)])
def test_the_cache_of_latent_attention_holds_the_latent_and_one_rotated_key(changes, expected):
    model, cache = stirred(small(attention="latent", **changes)), Cache(T)
    for tokens in draw_tokens(1).split([5, 1, T - 6], dim=1):
        model(tokens, cache=cache)
    assert cache.nbytes == 4 * 3 * B * T * expected


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "eps"), [(torch.float32, 2**-24), (torch.bfloat16, 2**-8)])
def test_absorbed_is_expanded(dtype, eps):
    model = build(small(attention="latent", d_model=64, attention_softcap=20.0))
    attention, context = model.layers[0].attention, model.context(draw_tokens(1), None, None)
    attention.up.weight.copy_(draw(1, *attention.up.weight.shape) * 0.5)
    h, d, rope, rank = 4, 16, 8, 64
    arguments = [draw(i, B, n, T, width) for i, (n, width) in enumerate([(h, d), (h, rope), (1, rank), (1, rope)], 2)]
    exact = attention.double().expanded(*arguments, context)
    assert exact.abs().max() > 5
    attention.to(dtype)
    for attend_ in (attention.expanded, attention.absorbed):
        result = attend_(*(y.to(dtype) for y in arguments), context)
        assert result.dtype == dtype
        # Scores are of size 16 and rounded a few times, so weights are off by up to some 30 eps.
        assert distance(result.double(), exact) < 30 * eps * exact.abs().max()


@torch.no_grad()
def test_latent_attention_is_its_definition():
    model = stirred(small(attention="latent", q_rank=12, kv_rank=20, rope_dim=4)).double()
    a, context = model.layers[0].attention, model.context(draw_tokens(1), None, None)
    x = draw(2, B, T, 32)

    def norm(y, module):
        return y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * module.weight

    q = a.query(norm(a.query_down(x), a.query_norm)).unflatten(-1, (4, 12))
    latent, rotated = a.down(x).split([20, 4], dim=-1)
    k, v = a.up(norm(latent, a.latent_norm)).unflatten(-1, (2, 4, 8)).unbind(2)
    rotated = a.rotary.rotate_key(rotated[:, None], context.positions)[:, 0]
    outputs = []
    for h in range(4):
        turned = a.rotary.rotate_query(q[:, None, :, h, 8:], context.positions)[:, 0]
        query, key = torch.cat((q[:, :, h, :8], turned), -1), torch.cat((k[:, :, h], rotated), -1)
        outputs.append(softmax_attention(query, key, v[:, :, h]))
    expected = a.out(torch.cat(outputs, dim=-1))
    assert distance(a(x, None, context, None)[0], expected) < 1e-5 * max(1, expected.abs().max())


@torch.no_grad()
def test_both_soft_caps_hold_at_inference_and_with_a_cache():
    model, tokens, cache = stirred(small(attention_softcap=2.0, final_softcap=0.5)).eval(), draw_tokens(1), Cache()
    logits = model(tokens).logits
    uncapped = stirred(small(attention_softcap=2.0))(tokens).logits
    assert logits.abs().max() < 0.5 < 1.5 < uncapped.abs().max()
    assert distance(logits, 0.5 * (uncapped / 0.5).tanh()) < 1e-5
    decoded = torch.cat([model(part, cache=cache).logits for part in tokens.split(1, dim=1)], dim=1)
    assert distance(decoded, logits) < 1e-5
    assert distance(stirred(small(final_softcap=0.5))(tokens).logits, logits) > 1e-3, "too small scores to be capped"


# -- windows -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["torch", "sdpa"])
@pytest.mark.parametrize("block", ["serial", "parallel"])
def test_a_token_beyond_all_windows_is_not_seen(kernel, block):
    window, n_layers = 4, 3
    model = stirred(small(window=window, n_layers=n_layers, attention_kernel=kernel, block=block))
    tokens, reach = draw_tokens(1), n_layers * (window - 1)
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % VOCAB
    before, after = model(tokens).logits, model(changed).logits
    assert torch.equal(before[:, reach + 1 :], after[:, reach + 1 :])
    assert (before[:, reach] != after[:, reach]).any(dim=-1).all()


def test_a_pattern_of_windows_is_repeated_over_the_layers():
    model = build(small(n_layers=6, window=5, window_pattern="SSSL"))
    assert [block.attention.heads.window for block in model.layers] == [5, 5, 5, 0, 5, 5]
    assert model.windows == [0, 5]


@pytest.mark.parametrize(
    ("changes", "windows"), [({}, [0]), ({"n_predict": 2, "prediction_heads": "transformer"}, [0, 5])]
)
def test_windows_are_those_of_layers_that_exist(changes, windows):
    """Else masks are made for nobody, and a kernel is chosen for a window that no layer has."""
    assert build(small(n_layers=3, window=5, window_pattern="LLLS", **changes)).windows == windows


# -- kernels -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention": "differential"},
        {"attention": "latent"},
        {"attention": "latent", "rope_dim": 6, "kv_rank": 20, "head_dim": 12},
    ],
    ids=str,
)
def test_the_kernel_is_chosen_for_the_widths_it_gets(monkeypatch, changes):
    """In training and for a prompt; decoding takes none that minds widths."""
    declared, met = set(), set()

    def spy_on_choice(wanted, *, head_dim, value_dim, **case):
        declared.add((head_dim, value_dim))
        return "torch", "spied on"

    def spy_on_kernel(q, k, v, *args, **options):
        met.add((q.shape[-1], v.shape[-1]))
        return attend.attend_torch(q, k, v, *args, **options)

    monkeypatch.setattr(models.transformer, "choose_kernel", spy_on_choice)
    monkeypatch.setitem(attend.KERNELS, "torch", spy_on_kernel)
    model = build(small(**changes))
    model(draw_tokens(1), draw_tokens(2))
    model(draw_tokens(1), cache=Cache())
    assert declared == met


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"attention_kernel": "auto"}, r"attention: sdpa \(plain causal attention\)"),
        ({"attention_kernel": "torch"}, r"attention: torch \(asked for\)"),
        ({"attention_kernel": "auto", "window": 8}, r"attention: sdpa \(flash: it needs CUDA; flex: .*cpu\)"),
        ({"attention_kernel": "auto", "attention_softcap": 9.0}, r"attention: torch \(.*; sdpa: no soft-cap\)"),
        ({"attention_kernel": "auto", "forget_gate": True}, r"attention: torch \(.*; sdpa: no fused kernel.*\)"),
        ({"attention_kernel": "auto", "positions": "alibi"}, r"attention: torch \(.*; sdpa: no fused kernel.*\)"),
    ],
    ids=str,
)
def test_the_kernel_and_why_are_told(changes, line):
    text = build(small(max_context=64, **changes)).describe_kernels()
    assert "\n" not in text
    assert re.fullmatch(line, text)


def test_the_kernel_for_documents_is_told_where_they_are_kept_apart():
    model = build(small(max_context=64, attention_kernel="auto"))
    assert model.describe_kernels() == "attention: sdpa (plain causal attention)"
    assert re.fullmatch(r"attention: sdpa \(flash: .*; flex: .*cpu\)", model.describe_kernels(documents=True))


# -- Llama -------------------------------------------------------------------------------------------------------------


def tiny_llama(monkeypatch, theirs_changes, **changes):
    """Hugging Face's model with random weights, and ours of the same shape."""
    transformers = text_only_transformers(monkeypatch)
    values = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4} | theirs_changes
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(intermediate_size=80, max_position_embeddings=64, rms_norm_eps=1e-5, **values)
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    shape = {"vocab_size": 97, "d_model": 48, "n_layers": 3, "n_heads": 4, "d_hidden": 80}
    return theirs, Llama(Llama.Config(**(shape | changes)))


@torch.no_grad()
@pytest.mark.parametrize(
    ("theirs_changes", "changes"),
    [
        ({}, {}),
        ({"num_key_value_heads": 2}, {"n_kv_heads": 2}),
        ({"num_key_value_heads": 1, "tie_word_embeddings": True}, {"n_kv_heads": 1, "tied": True}),
        ({"attention_bias": True}, {"attention_bias": "all"}),
    ],
)
def test_logits_equal_those_of_hugging_faces_llama(monkeypatch, theirs_changes, changes):
    theirs, ours = tiny_llama(monkeypatch, theirs_changes, **changes)
    load_llama_weights(ours, theirs.state_dict())
    tokens = draw_tokens(1, 2, 32, vocab=97)
    expected = theirs(tokens).logits
    assert distance(ours(tokens).logits, expected) < 1e-4
    assert expected.std() > 0.5, "logits this small would agree by themselves"


@pytest.mark.parametrize(
    ("theirs_changes", "changes", "message"),
    [
        ({}, {"n_kv_heads": 2}, r"q_proj.weight \+ .*k_proj.weight \+ .*v_proj.weight is \(144, 48\), not \(96, 48\)"),
        ({}, {"d_hidden": 64}, r"up_proj.weight is \(160, 48\), not \(128, 48\)"),
        ({}, {"n_layers": 2}, r"no place for .*model.layers.2"),
        ({}, {"tied": True}, r"no place for lm_head.weight"),
        ({"attention_bias": True}, {}, r"no place for .*bias"),
    ],
)
def test_weights_of_another_shape_are_refused(monkeypatch, theirs_changes, changes, message):
    theirs, ours = tiny_llama(monkeypatch, theirs_changes, **changes)
    with pytest.raises(RuntimeError, match=message):
        load_llama_weights(ours, theirs.state_dict())


def test_missing_weights_are_named(monkeypatch):
    theirs, ours = tiny_llama(monkeypatch, {})
    with pytest.raises(KeyError, match=r"layers.0.mlp.up_proj.weight"):
        load_llama_weights(ours, {name: w for name, w in theirs.state_dict().items() if "up_proj" not in name})


LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS = [
    LLAMA3 | {"original_max_position_embeddings": 16},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "factor": 2.0},
    {"type": "linear", "factor": 4.0},
    None,
]


@torch.no_grad()
@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_a_config_of_hugging_faces_llama_gives_its_logits(monkeypatch, scaling):
    changes = {"rope_scaling": scaling, "rope_theta": 100.0, "num_key_value_heads": 2, "attention_bias": True}
    theirs, _ = tiny_llama(monkeypatch, changes)
    config = llama_config(theirs.config)
    tokens, logits = draw_tokens(1, 2, 64, vocab=97), {}
    for name, ours in {"scaled": config, "not": replace(config, **PLAIN_ROPE)}.items():
        model = Llama(ours)
        load_llama_weights(model, theirs.state_dict())
        logits[name] = model(tokens).logits
    expected = theirs(tokens).logits
    assert distance(logits["scaled"], expected) < 1e-4 < expected.std()
    assert (distance(logits["not"], expected) > 0.1) == (scaling is not None), "else it would tell nothing"


PLAIN_ROPE = {"rope_scaling": "none", "rope_factor": 1.0, "rope_original_context": 0}
PLAIN_ROPE |= {"rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "^rope_scaling: 'dynamic' is not implemented"),
        ({"rope_scaling": SCALINGS[1] | {"beta_fast": 16.0}}, "^rope_scaling: beta_fast of yarn is not implemented"),
        ({"rope_scaling": SCALINGS[1] | {"attention_factor": 2.0}}, "^rope_scaling: attention_factor of yarn"),
        ({"hidden_act": "relu"}, "^hidden_act 'relu' is not implemented"),
        ({"mlp_bias": True}, "^mlp_bias without attention_bias"),
    ],
    ids=str,
)
def test_a_config_of_what_we_do_not_compute_is_refused_by_name(monkeypatch, changes, message):
    theirs, _ = tiny_llama(monkeypatch, changes)
    with pytest.raises(ValueError, match=message) as error:
        llama_config(theirs.config)
    assert "\n" not in str(error.value)


def test_an_incomplete_rope_scaling_and_another_model_are_refused():
    llama = {"model_type": "llama", "attention_bias": False, "hidden_act": "silu", "rope_theta": 1e4}
    with pytest.raises(ValueError, match="^rope_scaling: llama3 needs factor, original_max"):
        llama_config(SimpleNamespace(**llama, rope_scaling=LLAMA3, **SIZES))
    with pytest.raises(ValueError, match="^model_type 'mistral' is not implemented"):
        llama_config(SimpleNamespace(**(llama | {"model_type": "mistral"}), **SIZES))
    # What transformers 5 calls it.
    new = SimpleNamespace(**llama, rope_parameters={"rope_theta": 5e5, "rope_type": "linear", "factor": 8}, **SIZES)
    assert (llama_config(new).rope_theta, llama_config(new).rope_factor) == (5e5, 8)


SIZES = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 4, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "max_position_embeddings": 64}
