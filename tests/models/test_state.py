"""What decoding remembers: the values of concatenation bit for bit, grown without copying all of it, cut to a layer's window."""

import pytest
import torch

from models.base import LanguageModel, get_model, load_models
from models.state import DecodingState
from models.transformer import Transformer, TransformerConfig

load_models()


class Concatenated(DecodingState):
    """The plain form: everything is kept, and copied for every token."""

    def __init__(self):
        super().__init__()
        self.held = {}

    def append(self, key, new, dim, window=0):
        self.held[key] = torch.cat((self.held[key], new), dim) if key in self.held else new
        return self.held[key]

    def last(self, key):
        return self.held[key][:, :, -1:] if key in self.held else None


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


def decode(model, state, prompt, count):
    """Logits of a prompt and of `count` tokens, one by one."""
    tokens = torch.randint(64, (2, prompt + count), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        parts = [model(part, cache=state).logits for part in tokens.split([prompt] + [1] * count, dim=1)]
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
    expected = decode(model, Concatenated(), 9, 60)
    for max_length in (None, 69, 100):
        assert torch.equal(decode(model, DecodingState(max_length), 9, 60), expected)


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
    assert (decode(model, DecodingState(prompt + 40), prompt, 40) - whole).abs().max() < 1e-5


def test_a_window_bounds_what_is_held():
    model = model_of("transformer", window=8, forget_gate=True)
    numbers = []
    for count in (40, 400):
        state = DecodingState(100 + count)
        decode(model, state, 100, count)
        numbers.append(state.nbytes // 4)
    # 2 layers of keys, values [2, 4, T, 8] and sums [2, 4, T]: T of the window, and room to grow.
    assert numbers[0] == numbers[1] <= 2 * (2 * 8 * 8 + 8) * (8 + 16 + 1)


def grow(state, count):
    """All that 1000 tokens are seen through, and how many buffers held it."""
    buffers = set()
    for _ in range(count):
        k, _ = state.extend(0, torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1, 4), dim=2)
        state.length += 1
        buffers.add(k.untyped_storage().data_ptr())
    assert k.shape == (1, 1, count, 4) and (k == 1).all()
    return k, len(buffers) - 1  # the first token is seen where it was


def test_growth_copies_little():
    k, buffers = grow(DecodingState(), 1000)
    assert buffers < 20 and k.untyped_storage().nbytes() <= 4 * 4 * 1.5 * 1000


def test_room_for_a_known_length_is_allocated_once():
    state = DecodingState(1000)
    k, buffers = grow(state, 1000)
    assert buffers == 1 and k.untyped_storage().nbytes() == 4 * 4 * 1000
    assert state.nbytes == 2 * 4 * 4 * 1000
    with pytest.raises(ValueError, match="made for 1000 tokens, but 1001 are to be read"):
        state.append("keys", torch.ones(1, 1, 1, 4), dim=2)


def test_what_is_to_be_differentiated_is_not_written_over():
    model = model_of("gpt2").train()
    tokens = torch.randint(64, (2, 6), generator=torch.Generator().manual_seed(1))

    def gradient(parts):
        model.zero_grad()
        state = DecodingState()
        logits = torch.cat([model(part, cache=state).logits for part in tokens.split(parts, dim=1)], dim=1)
        logits.square().sum().backward()
        return model.embedding.weight.grad.clone()

    assert torch.allclose(gradient([2, 1, 1, 1, 1]), gradient([6]), rtol=1e-4, atol=1e-4)


# -- what is done to a state -------------------------------------------------------------------------------------------


def read(model, state, tokens):
    with torch.no_grad():
        return model(tokens, cache=state).logits


def texts(rows, length):
    return torch.randint(64, (rows, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    "changes", [{}, {"attention": "latent"}, {"forget_gate": True, "kv_shift": True}, {"window": 5}], ids=str
)
def test_rows_are_reordered_repeated_and_dropped(changes):
    model, tokens = model_of("transformer", **changes), texts(3, 20)
    state = DecodingState(20)
    read(model, state, tokens[:, :12])
    for rows in (torch.tensor([2, 0, 2, 1]), torch.tensor([3, 2])):
        state.select(rows)
        tokens = tokens[rows]
    cached = torch.cat([read(model, state, tokens[:, i : i + 1]) for i in range(12, 20)], dim=1)
    assert (cached - read(model, None, tokens)[:, 12:]).abs().max() < 1e-5


@pytest.mark.parametrize("changes", [{}, {"attention": "latent"}, {"forget_gate": True}, {"window": 5}], ids=str)
@pytest.mark.parametrize("max_length", [None, 20])
def test_a_cropped_state_goes_on_as_one_that_never_read_more(changes, max_length):
    model, tokens = model_of("transformer", **changes), texts(2, 20)
    whole, state = read(model, None, tokens), DecodingState(max_length)
    read(model, state, tokens[:, :12])
    read(model, state, tokens[:, 2:8])  # a draft of which nothing is right
    state.crop(12)
    assert state.length == 12
    assert (read(model, state, tokens[:, 12:13]) - whole[:, 12:13]).abs().max() < 1e-5
    assert (read(model, state, tokens[:, 13:]) - whole[:, 13:]).abs().max() < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention": "latent"},
        {"kv_shift": True},
        {"window": 1, "forget_gate": True},
        {"window": 5, "kv_shift": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("max_length", [None, 20])
@pytest.mark.parametrize("start", [0, 9])
def test_a_restored_state_goes_on_as_one_that_never_read_more(changes, max_length, start):
    """Any number of passes later, and twice to the same snapshot; recurrent state and windows too."""
    model, tokens = model_of("transformer", **changes), texts(2, 20)
    whole, state = read(model, None, tokens), DecodingState(max_length)
    for i in range(0, start, 3):
        read(model, state, tokens[:, i : i + 3])
    snapshot = state.snapshot()
    for stop in (start + 11, start + 4):
        for i in range(start, stop):
            read(model, state, (tokens + 1)[:, i : i + 1] % 64)  # drafts of which nothing is right
        state.restore(snapshot)
        assert state.length == start
    cached = torch.cat([read(model, state, tokens[:, i : i + 1]) for i in range(start, 20)], dim=1)
    assert (cached - whole[:, start:]).abs().max() < 1e-5


def test_cropping_a_prompt_leaves_its_tensors_as_they_are():
    state, k = DecodingState(), torch.ones(1, 1, 4, 2)
    state.extend(0, k, k.clone(), dim=2)
    state.length = 4
    state.crop(2)
    seen, _ = state.extend(0, torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2), dim=2)
    assert seen[0, 0, :, 0].tolist() == [1, 1, 0] and (k == 1).all()


@pytest.mark.parametrize(
    "changes, length, why",
    [
        ({"window": 5}, 3, "a layer's window has dropped"),
        ({"kv_shift": True}, 8, "recurrent state does not go back"),
        ({}, 13, "cannot crop a state of 12 tokens to 13"),
        ({}, -1, "cannot crop a state of 12 tokens to -1"),
    ],
    ids=str,
)
def test_a_crop_that_is_refused_changes_nothing(changes, length, why):
    model, tokens = model_of("transformer", **changes), texts(2, 20)
    state = DecodingState()
    for i in range(12):
        read(model, state, tokens[:, i : i + 1])
    with pytest.raises(ValueError, match=why):
        state.crop(length)
    cached = read(model, state, tokens[:, 12:])
    assert (cached - read(model, None, tokens)[:, 12:]).abs().max() < 1e-5


def test_a_reset_state_begins_anew():
    model, tokens = model_of("transformer", kv_shift=True, forget_gate=True), texts(2, 8)
    state = DecodingState(8)
    first = read(model, state, tokens)
    state.reset()
    assert state.length == 0 == state.nbytes and torch.equal(read(model, state, tokens), first)
    with pytest.raises(ValueError, match="single rows cannot be reset"):
        state.reset(torch.tensor([0]))
    state.crop(0)
    assert torch.equal(read(model, state, tokens), first)


def test_recurrent_state_has_a_fixed_size_and_rows_of_its_own():
    state, like = DecodingState(), torch.ones(3, 2, dtype=torch.bfloat16)
    assert torch.equal(state.recall("h", like), torch.zeros_like(like))
    state.remember("h", like)
    state.reset(torch.tensor([1]))
    assert state.recall("h", like)[:, 0].tolist() == [1, 0, 1] and state.nbytes == 12
    state.select(torch.tensor([1, 2]))
    assert state.recall("h", like[:2])[:, 0].tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"recurrent state 'h' was \[2, 2\], and is now \[2, 3\]"):
        state.remember("h", torch.ones(2, 3))


def test_a_model_that_does_not_decode_incrementally_has_no_state():
    class Whole(LanguageModel):
        decodes_incrementally = False

    assert Whole(None).new_state(1, 8, torch.device("cpu"), torch.float32) is None
