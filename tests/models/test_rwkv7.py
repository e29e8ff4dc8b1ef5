"""RWKV-7 against its formulas written out token by token, in both forms; its initial values."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.rwkv7 import Rwkv7, Rwkv7Config

SIZES = {"vocab_size": 32, "d_model": 32, "n_layers": 3, "head_dim": 16}


def model_of(form):
    """With weights that are nowhere zero."""
    model = Rwkv7(Rwkv7Config(**SIZES, form=form))
    model.init_weights(torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=draw)
    return model.double().eval()


def low_rank(part, x, inner=lambda y: y):
    y = inner(x @ part.A) @ part.B
    return y if part.base is None else part.base + y


def mixed_final(time, x, before, first):
    xr, xw, xk, xv, xa, xg = (x + (before - x) * mix for mix in time.mix)
    r, k, v = time.receptance(xr), time.key(xk), time.value(xv)
    if first is None:
        first = v
    else:
        v = v + (first - v) * torch.sigmoid(low_rank(time.from_first, xv))
    rate, gate = torch.sigmoid(low_rank(time.rate, xa)), low_rank(time.gate, xg, torch.sigmoid)
    decay = torch.exp(-torch.exp(-F.softplus(-low_rank(time.decay, xw, torch.tanh)) - 0.5))
    removal = k * time.removal_scale
    return r, decay, k * (1 + (rate - 1) * time.key_rate), v, removal, rate, gate, first


def mixed_preview(time, x, before, first):
    change = before - x
    inner = torch.tanh((x + change * time.mix_first) @ time.shift_A).view(4, -1)
    xrg, xwa, xk, xv = (x + change * (time.mix[i] + inner[i] @ time.shift_B[i]) for i in range(4))
    r, k, v = time.receptance(xrg), time.key(xk), time.value(xv)
    inside = -F.softplus(-low_rank(time.decay, xwa, torch.tanh)) - 0.5
    removal = k + low_rank(time.removal, xk, torch.tanh)
    rate, m, n = (
        torch.sigmoid(low_rank(part, x)) for part, x in ((time.rate, xwa), (time.key_rate, xwa), (time.key_decay, xk))
    )
    k = k * (m + rate * (1 - m)) * torch.exp(torch.clamp(inside * n, max=0))
    return r, torch.exp(-torch.exp(inside)), k, v, removal, rate, low_rank(time.gate, xrg, torch.tanh), first


def by_hand(model, tokens, form):
    """Logits [T, V] of one text, a token at a time."""
    heads, width = model.config.n_heads, model.config.head_dim
    states = {}
    logits = []
    for token in tokens:
        x = model.embedding.weight[token]
        x = 2 * x if form == "preview" else model.embedding_norm(x)
        first = None
        for layer, block in enumerate(model.layers):
            state, before, channel_before = states.get(layer, (torch.zeros(heads, width, width).double(), 0 * x, 0 * x))
            time, normed = block.time, block.time_norm(x)
            mixed = mixed_final if form == "final" else mixed_preview
            r, decay, k, v, removal, rate, gate, first = mixed(time, normed, before, first)
            r, decay, k, v, removal, rate = (y.view(heads, width) for y in (r, decay, k, v, removal, rate))
            removal = removal / removal.norm(dim=-1, keepdim=True)
            out = []
            for h in range(heads):
                state[h] = (
                    state[h] * decay[h]
                    - torch.outer(state[h] @ removal[h], removal[h] * rate[h])
                    + torch.outer(v[h], k[h])
                )
                out.append(state[h] @ r[h])
            y = F.group_norm(torch.cat(out)[None], heads, time.norm.weight, time.norm.bias, 64e-5)[0]
            y = y + ((r * k * time.bonus.view(heads, width)).sum(-1, keepdim=True) * v).flatten()
            x = x + time.out(y * gate)
            mlp = block.channel_norm(x)
            shifted = mlp if block.channel.mix is None else mlp + (channel_before - mlp) * block.channel.mix
            x = x + block.channel.value(F.relu(block.channel.key(shifted)) ** 2)
            states[layer] = state, normed, mlp
        logits.append(model.head(model.norm(x)))
    return torch.stack(logits)


@pytest.mark.parametrize("form", ["final", "preview"])
def test_logits_are_those_of_the_formulas(form):
    model, tokens = model_of(form), torch.randint(32, (2, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found = model(tokens).logits
        for row in range(2):
            expected = by_hand(model, tokens[row], form)
            assert (found[row] - expected).abs().max() < 1e-10 * expected.abs().max()


def test_initial_decays_cover_slow_and_fast_channels():
    model = Rwkv7(Rwkv7Config(**SIZES))
    model.init_weights(torch.Generator().manual_seed(0))
    for block in model.layers:
        w = torch.exp(-math.exp(-0.5) * torch.sigmoid(block.time.decay.base))
        assert w.max() > 0.99 and w.min() < 0.95 and w.min() > math.exp(-math.exp(-0.5))
        assert block.time.out.weight.abs().max() == 0 and block.channel.value.weight.abs().max() == 0
        torch.testing.assert_close(block.time.key.weight @ block.time.key.weight.T, 0.01 * torch.eye(32))
    gains = [block.time.norm.weight[0].item() for block in model.layers]
    assert gains == pytest.approx([(1 / 3) ** 0.7, (2 / 3) ** 0.7, 1.0])


def test_low_rank_parts_and_shifts_get_no_weight_decay():
    model = Rwkv7(Rwkv7Config(**SIZES))
    groups = model.parameter_groups()
    assert all(name.endswith((".weight",)) for name in groups["matrix"])
    assert {"low rank", "token shift"} <= groups.keys()
    assert set(model.names_by_role()) <= set(model.roles)
