"""RWKV-7 against its formulas written out token by token, in both forms; its initial values."""

import math

import pytest
import torch
import torch.nn.functional as F

from models import rwkv7
from models.layers.causal import Context
from models.rwkv7 import Rwkv7, Rwkv7Config
from trainer.testing import numbers
from trainer.testing.subject import Failed, Subject

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


def test_the_strongest_key_decay_of_the_preview_is_finite():
    """w~ is the logarithm of -log w, which is 0 in fp32 from z = -104 on; so are its gradients."""
    model = model_of("preview").float()
    model.layers[0].time.decay.base.data.fill_(-110)
    tokens = torch.arange(10).view(1, 10)
    loss = model(tokens, tokens).loss
    loss.backward()
    assert loss.isfinite() and all(parameter.grad.isfinite().all() for parameter in model.parameters())


def without(part):
    """A shift or recurrence that does not know of the state, or of documents."""
    return lambda real, *given: real(
        *(one._replace(**{part: None}) if isinstance(one, Context) else one for one in given)
    )


# The function that is broken, how (it is given the real one first) -> the check that must find it.
FAULTS = {
    "the recurrence sees the future": ("recurrence", lambda real, *given: real(*given).flip(1), "causality"),
    "the shift takes the next token": ("previous", lambda real, x, *_: x.roll(-1, 1), "causality"),
    "the state is not carried": ("recurrence", without("state"), "decoding"),
    "the shift is not carried": ("previous", without("state"), "decoding"),
    "the state crosses documents": ("recurrence", without("documents"), "documents"),
    "the shift crosses documents": ("previous", without("documents"), "documents"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("form", ["final", "preview"])
def test_what_must_not_be_is_found(monkeypatch, form, fault):
    """Its branches begin at zero: on initial weights the contract would find none of these."""
    name, broken, check = FAULTS[fault]
    real = getattr(rwkv7, name)
    monkeypatch.setattr(rwkv7, name, lambda *given: broken(real, *given))
    [found] = [one for one in numbers.CHECKS if one.name == check]
    with pytest.raises(Failed):
        found.run(Subject("rwkv7", Rwkv7, {"form": form}))


def test_initial_values_are_those_of_the_papers_code():
    """Of the final form: each channel's mixing, decay, rate and gains, in the first and the last layer and between."""
    depth, width, head = 4, 64, 16
    model = Rwkv7(Rwkv7Config(vocab_size=32, d_model=width, n_layers=depth, head_dim=head))
    model.init_weights(torch.Generator().manual_seed(0))
    n = torch.arange(width).float()
    linear = n / (width - 1) - 0.5
    zigzag = 2 * (n % head) / (head - 1) - 1
    zigzag = zigzag.sign() * zigzag**2
    for layer, block in enumerate(model.layers):
        first, last, time = layer / (depth - 1), 1 - layer / depth, block.time
        for i, power in enumerate((0.2, 0.9, 0.7, 0.7, 0.9, 0.2)):  # r, w, k, v, a, g
            torch.testing.assert_close(time.mix[i], 1 - (n / width) ** (power * last))
        torch.testing.assert_close(block.channel.mix, 1 - (n / width) ** (last**4))
        decay = -6 + 6 * (n / (width - 1)) ** (1 + first**0.3) + 0.5 + 2.5 * zigzag
        torch.testing.assert_close(time.decay.base, decay, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(time.rate.base, -0.19 + 0.3 * zigzag + 0.4 * linear, rtol=1e-5, atol=1e-5)
        assert (time.from_first is None) == (layer == 0)
        if time.from_first is not None:
            torch.testing.assert_close(time.from_first.base, 0.73 - 0.4 * linear)
        torch.testing.assert_close(time.removal_scale, 0.71 - 0.1 * linear)
        assert (time.key_rate == 1.02).all() and (time.bonus == -0.04).all() and not time.gate.A.any()
        assert (time.norm.weight == time.norm.weight[0]).all()


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
