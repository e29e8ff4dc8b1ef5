"""What decoding remembers: the values of concatenation bit for bit, grown without copying all of it, cut to a layer's window."""

import pytest
import torch

from models.base import Cache, get_model, load_models
from models.transformer import Transformer, TransformerConfig

load_models()


class Concatenated(Cache):
    """What it replaces: everything is kept, and copied for every token."""

    def append(self, key, new, dim, window=0):
        held = self.state.get(key)
        self.state[key] = new if held is None else torch.cat((held, new), dim)
        return self.state[key]

    def extend(self, layer, k, v, dim, window=0):
        if layer in self.layers:
            k, v = (torch.cat(pair, dim) for pair in zip(self.layers[layer], (k, v), strict=True))
        self.layers[layer] = (k, v)
        return k, v


def model_of(name, **changes):
    if name == "transformer":
        shape = {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_context": 512}
        model = Transformer(TransformerConfig(**shape, **changes))
    else:
        cls = get_model(name)
        model = cls(cls.config_for_scale(0.1, 64, 100_000))
    model.init_weights(torch.Generator().manual_seed(0))
    for parameter in model.parameters():
        parameter.data.mul_(2)
    return model.eval()


def decode(model, cache, prompt, count):
    """Logits of a prompt and of `count` tokens, one by one."""
    tokens = torch.randint(64, (2, prompt + count), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        parts = [model(part, cache=cache).logits for part in tokens.split([prompt] + [1] * count, dim=1)]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize(
    "name, changes",
    [
        *[(name, {}) for name in ("hlb", "gpt2", "llama", "ngpt")],
        *[("transformer", changes) for changes in ({"attention": "latent"}, {"forget_gate": True, "kv_shift": True})],
    ],
    ids=str,
)
def test_logits_are_bit_for_bit_those_of_concatenation(name, changes):
    model = model_of(name, **changes)
    assert torch.equal(decode(model, Cache(), 9, 60), decode(model, Concatenated(), 9, 60))


WINDOWED = [
    {"window": 5},
    {"window": 5, "attention": "latent"},
    {"window": 5, "positions": "alibi", "forget_gate": True},
    {"window": 1},
    {"window": 5, "window_pattern": "SL", "n_kv_heads": 2},
]


@pytest.mark.parametrize("changes", WINDOWED, ids=str)
@pytest.mark.parametrize("prompt", [1, 3, 30])
def test_a_window_keeps_what_its_tokens_see(changes, prompt):
    model = model_of("transformer", **changes)
    tokens = torch.randint(64, (2, prompt + 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(tokens).logits
    assert (decode(model, Cache(), prompt, 40) - whole).abs().max() < 1e-5


def held_numbers(cache):
    """Of all storage that the cache holds on to."""
    tensors = [*cache.state.values(), *(y for pair in cache.layers.values() for y in pair)]
    return sum({y.untyped_storage().data_ptr(): y.untyped_storage().nbytes() // 4 for y in tensors}.values())


def test_a_window_bounds_what_is_held():
    model = model_of("transformer", window=8, forget_gate=True)
    numbers = []
    for count in (40, 400):
        cache = Cache()
        decode(model, cache, 100, count)
        numbers.append(held_numbers(cache))
        assert all(y.shape[2] == 8 for pair in cache.layers.values() for y in pair)
    # 2 layers of keys, values [2, 4, T, 8] and sums [2, 4, T]: T of the window, and room to grow.
    assert numbers[0] == numbers[1] <= 2 * (2 * 8 * 8 + 8) * (8 + 16 + 1)


def test_growth_copies_little():
    cache, buffers = Cache(), set()
    for _ in range(1000):
        k, _ = cache.extend(0, torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1, 4), dim=2)
        buffers.add(k.untyped_storage().data_ptr())
    assert k.shape == (1, 1, 1000, 4) and (k == 1).all()
    assert len(buffers) < 20 and k.untyped_storage().nbytes() <= 4 * 4 * 1.5 * 1000


def test_what_is_to_be_differentiated_is_not_written_over():
    model = model_of("gpt2").train()
    tokens = torch.randint(64, (2, 6), generator=torch.Generator().manual_seed(1))

    def gradient(parts):
        model.zero_grad()
        cache = Cache()
        logits = torch.cat([model(part, cache=cache).logits for part in tokens.split(parts, dim=1)], dim=1)
        logits.square().sum().backward()
        return model.embedding.weight.grad.clone()

    assert torch.allclose(gradient([2, 1, 1, 1, 1]), gradient([6]), rtol=1e-4, atol=1e-4)
