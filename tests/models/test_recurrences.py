"""The chunked forms of ssd.py and delta_rule.py against their recurrences, token by token."""

import math

import pytest
import recurrence_errors
import torch
import torch.nn.functional as F
from conftest import text_only_transformers

from models.layers.delta_rule import delta_rule, delta_rule_recurrent
from models.layers.positions import number_documents
from models.layers.ssd import ssd, ssd_recurrent

STRONGEST = -math.exp(-0.5)  # RWKV-7's strongest log decay
ROWS, HEADS, KEYS, VALUES = 2, 4, 8, 6


def ssm_inputs(length, dtype=torch.float64, fastest=0.1):
    draw = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(ROWS, length, *shape, generator=draw, dtype=dtype)

    dt = fastest * torch.rand(ROWS, length, HEADS, generator=draw, dtype=dtype)
    rates = -16 * torch.rand(HEADS, generator=draw, dtype=dtype)
    return normal(HEADS, VALUES), dt, rates, normal(2, KEYS), normal(2, KEYS)  # two groups of heads


def delta_inputs(length, dtype=torch.float64, strongest=STRONGEST, per_head=False):
    draw = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(ROWS, length, HEADS, *shape, generator=draw, dtype=dtype)

    removal = F.normalize(normal(KEYS), dim=-1)
    log_w = strongest * torch.rand(ROWS, length, HEADS, 1 if per_head else KEYS, generator=draw, dtype=dtype)
    rate = torch.rand(ROWS, length, HEADS, 1, generator=draw, dtype=dtype)
    return normal(KEYS), log_w, normal(KEYS), normal(VALUES), -removal, removal * rate


FORMS = {
    "ssd": (ssd, ssd_recurrent, ssm_inputs, (HEADS, VALUES, KEYS)),
    "ssd, fast": (ssd, ssd_recurrent, lambda n: ssm_inputs(n, fastest=20.0), (HEADS, VALUES, KEYS)),
    "delta rule": (delta_rule, delta_rule_recurrent, delta_inputs, (HEADS, VALUES, KEYS)),
    "strong decays": (
        delta_rule,
        delta_rule_recurrent,
        lambda n: delta_inputs(n, strongest=-60.0),
        (HEADS, VALUES, KEYS),
    ),
    "one decay": (delta_rule, delta_rule_recurrent, lambda n: delta_inputs(n, per_head=True), (HEADS, VALUES, KEYS)),
    "bounded": (
        lambda *inputs, **options: delta_rule(*inputs, least_log_w=STRONGEST, **options),
        delta_rule_recurrent,
        delta_inputs,
        (HEADS, VALUES, KEYS),
    ),
}


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


def apart(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("length", [1, 2, 65, 150])
@pytest.mark.parametrize("chunk", [1, 16, 64])
def test_chunks_equal_the_recurrence(form, length, chunk):
    """Any length, chunk and state before; fp64 leaves only rounding."""
    chunked, recurrent, inputs, shape = form
    given, before = inputs(length), torch.randn(ROWS, *shape, dtype=torch.float64)
    for state in (None, before):
        found, last = chunked(*given, state=state, chunk=chunk)
        expected, last_expected = recurrent(*given, state=state)
        assert apart(found, expected) < 1e-11 and apart(last, last_expected) < 1e-11


def test_gradients_equal_those_of_the_recurrence(form):
    chunked, recurrent, inputs, shape = form
    gradients = []
    for function, options in ((chunked, {"chunk": 16}), (recurrent, {})):
        given = [x.clone().requires_grad_() for x in inputs(40)]
        state = torch.ones(ROWS, *shape, dtype=torch.float64, requires_grad=True)
        y, last = function(*given, state=state, **options)
        (y.square().sum() + last.square().sum()).backward()
        gradients.append([x.grad for x in (*given, state)])
    for found, expected in zip(*gradients, strict=True):
        assert apart(found, expected) < 1e-10


@pytest.mark.parametrize("parts", [2, 4])
def test_segments_with_their_state_equal_one_pass(form, parts):
    chunked, _, inputs, _ = form
    given, state, outputs = inputs(96), None, []
    for segment in range(parts):
        rows = slice(segment * 96 // parts, (segment + 1) * 96 // parts)
        y, state = chunked(*(x if x.ndim == 1 else x[:, rows] for x in given), state=state, chunk=32)
        outputs.append(y)
    whole, last = chunked(*given, chunk=32)
    assert apart(torch.cat(outputs, dim=1), whole) < 1e-11 and apart(state, last) < 1e-11


def test_a_document_starts_with_an_empty_state(form):
    """Starts within a chunk, at its beginning, at its end, and several in one; what is left at the end is of the last document."""
    chunked, recurrent, inputs, _ = form
    given = inputs(50)
    numbers = [[0] * 7 + [1] * 20 + [2] + [3] * 22, [0] * 16 + [1] * 33 + [0]]
    documents = number_documents(torch.tensor(numbers))
    found, last = chunked(*given, documents=documents, chunk=16)
    for row in range(ROWS):
        for number in documents[row].unique():
            of_it = documents[row] == number
            expected, state = recurrent(*(x if x.ndim == 1 else x[row : row + 1, of_it] for x in given))
            assert apart(found[row : row + 1, of_it], expected) < 1e-11
        assert apart(last[row : row + 1], state) < 1e-11


@pytest.mark.parametrize("chunk", [16, 64, 256])
def test_fp32_is_near_fp64_at_the_strongest_decay(chunk):
    """A chunk of 256 with factors exp(-sum) overflows here. The bound: a hundred roundings, for sums over some 64 terms."""
    given = list(delta_inputs(512))
    given[1] = torch.full_like(given[1], STRONGEST)
    expected, _ = delta_rule_recurrent(*given)
    for bound in (-math.inf, STRONGEST):
        found, _ = delta_rule(*(x.float() for x in given), chunk=chunk, least_log_w=bound)
        assert apart(found.double(), expected) < 100 * torch.finfo(torch.float32).eps


def test_ssd_in_fp32_with_time_steps_that_forget_everything():
    given = ssm_inputs(300, fastest=100.0)
    expected, _ = ssd_recurrent(*given)
    found, _ = ssd(*(x.float() for x in given))
    assert apart(found.double(), expected) < 100 * torch.finfo(torch.float32).eps


def test_states_are_fp32_under_autocast(form):
    chunked, recurrent, inputs, _ = form
    given = [x.float() for x in inputs(70)]
    with torch.autocast("cpu", torch.bfloat16):
        found, last = chunked(*given)
    expected, _ = recurrent(*given)
    assert last.dtype == torch.float32 and apart(found, expected) < 100 * torch.finfo(torch.float32).eps


def test_a_state_and_documents_do_not_go_together(form):
    chunked, _, inputs, shape = form
    state = torch.zeros(ROWS, *shape, dtype=torch.float64)
    with pytest.raises(ValueError, match="documents must be None with a state"):
        chunked(*inputs(8), state=state, documents=torch.zeros(ROWS, 8, dtype=torch.long))


def test_the_delta_rule_is_that_of_transformers(monkeypatch):
    """Qwen3-Next's gated delta rule: decay, then (I - beta k k^T)."""
    text_only_transformers(monkeypatch)
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

    q, log_w, k, v, _, _ = delta_inputs(40, torch.float32, per_head=True)
    k, beta = F.normalize(k, dim=-1), torch.rand(ROWS, 40, HEADS)
    expected, state = torch_recurrent_gated_delta_rule(q, k, v, log_w.squeeze(-1), beta, None, True)
    beta, scaled = beta.unsqueeze(-1), q / math.sqrt(KEYS)
    found, last = delta_rule(scaled, log_w, k, beta * v, -beta * log_w.exp() * k, k)
    assert apart(found, expected) < 1e-5 and apart(last, state.transpose(-1, -2)) < 1e-5


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("form", recurrence_errors.FORMS)
def test_errors_of_every_chunk_size_are_those_of_rounding(form, dtype):
    """Also at the strongest decays. fp32: a hundred roundings of 2^-24; bf16: one more, of the output to 8 bits."""
    bound = 100 * 2**-24 + (2**-8 if dtype == "bf16" else 0)
    assert max(recurrence_errors.errors(form, recurrence_errors.DTYPES[dtype], length=260)) < bound


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("form", recurrence_errors.FORMS)
def test_segments_of_bf16_inputs_equal_one_pass(form, parts):
    """The state between segments is fp32: a sum that is rounded to bf16 differently may fall to the next number, 2^-7 of its size."""
    chunked, _, make, options = recurrence_errors.FORMS[form]
    given, state, outputs = recurrence_errors.inputs_in(torch.bfloat16, make(128)), None, []
    for segment in range(parts):
        rows = slice(segment * 128 // parts, (segment + 1) * 128 // parts)
        y, state = chunked(*(x if x.ndim == 1 else x[:, rows] for x in given), state=state, chunk=64, **options)
        outputs.append(y)
    whole, last = chunked(*given, chunk=64, **options)
    found = torch.cat(outputs, dim=1)
    assert found.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert apart(state, last) < 100 * 2**-24
    assert (found.float() - whole.float()).abs().max() <= 2**-7 * whole.float().abs().max()
    assert (found != whole).float().mean() < 0.01  # with a state in bf16, most differ


def test_without_removal_the_delta_rule_is_gated_linear_attention():
    """a = b = 0 (RWKV-7's rate at 0): the state space with one decay per head, by other code."""
    r, log_w, k, v, _, _ = delta_inputs(100, per_head=True)
    found, last = delta_rule(r, log_w, k, v, torch.zeros_like(k), torch.zeros_like(k), chunk=16)
    dt = -log_w.squeeze(-1)
    expected, state = ssd(v / dt.unsqueeze(-1), dt, -torch.ones(HEADS, dtype=torch.float64), k, r, chunk=16)
    assert apart(found, expected) < 1e-11 and apart(last, state) < 1e-11
