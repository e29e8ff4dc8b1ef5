"""Steps of fixed shapes: the logits of the growing state, compiled without breaks and once for all tokens of a text."""

import pytest
import torch
from test_generate import VOCAB, Convolution, Runner
from test_generate import runner_of as gpt2_of
from test_speculative import near, runner_of

from models.base import get_model, model_names
from models.state import DecodingState, StaticState
from models.transformer import Transformer
from trainer.inference import compiled
from trainer.inference import decoding as g
from trainer.inference.reader import Reader
from trainer.inference.speculative import Account

SWITCHES = {
    "plain": {},
    "learned positions": {"positions": "learned", "max_context": 64},
    "alibi, softcap": {"positions": "alibi", "attention_softcap": 20.0},
    "window, groups of heads": {"window": 5, "window_pattern": "SL", "n_kv_heads": 2},
    "recurrent, forget gate": {"kv_shift": True, "forget_gate": True},
    "latent, window": {"attention": "latent", "window": 6},
    "differential": {"attention": "differential"},
    "parallel, values": {"block": "parallel", "value_residual": True, "x0_skip": True},
}
RUNNERS = {name: lambda s=switches: runner_of(**s) for name, switches in SWITCHES.items()} | {
    name: lambda n=name: Runner(n) for name in ("hlb", "ngpt", "gpt2", "mamba2", "rwkv7", "gated-delta-net", "ftp")
}
HYBRIDS = {
    "lfm2": {"n_layers": 3, "attention_head_dim": 8},
    "rene": {"n_layers": 3, "attention_head_dim": 8, "window": 5, "ssm_head_dim": 16},
    "zamba2": {"n_layers": 3, "attention_head_dim": 16, "hybrid_every": 1, "ssm_head_dim": 16, "rope_theta": 1e4},
}


def hybrid(name):
    """With attention."""
    runner, cls = Runner("gpt2"), get_model(name)
    runner.model = cls(cls.Config(vocab_size=64, d_model=32, **HYBRIDS[name]))
    runner.model.init_weights(torch.Generator().manual_seed(1))
    return runner


# What stands for several tokens is computed in some steps only.
VARYING = {"megabyte", "hourglass", "blt", "spacebyte", "aunet", "hnet"}
RUNNERS |= {name: lambda n=name: hybrid(n) for name in HYBRIDS}


@pytest.mark.parametrize("make", RUNNERS.values(), ids=RUNNERS)
def test_a_static_state_gives_the_logits_of_a_growing_one(make):
    model = make().model.eval()
    tokens = torch.randint(64, (3, 30), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        growing = DecodingState()
        model(tokens[:, :12], cache=growing)
        static = StaticState(growing, 40, tokens.device)
        addresses = [tensor.data_ptr() for tensor in static.tensors()]
        for round_ in range(2):
            for i in range(12, 24):
                expected = model(tokens[:, i : i + 1], cache=growing).logits
                found = model(tokens[:, i : i + 1], cache=static).logits
                assert (found - expected).abs().max() < 1e-4 * expected.abs().max(), (round_, i)
            growing = DecodingState()
            model(tokens[:, :12], cache=growing)
            static.load(growing)
    assert int(static.length) == 12 and [tensor.data_ptr() for tensor in static.tensors()] == addresses
    assert static.nbytes == sum(tensor.nbytes for tensor in static.tensors()) > 0


def eager(monkeypatch):
    """Steps with fixed shapes, which are not compiled."""
    monkeypatch.setattr(compiled, "compiled_step", lambda device_type: compiled.step)


@pytest.mark.parametrize("make", [lambda: runner_of(kv_shift=True, window=4), lambda: Runner("hlb")], ids=["kv", "hlb"])
def test_texts_of_static_steps_are_those_of_plain_ones(make, monkeypatch):
    eager(monkeypatch)
    runner, prompts, said = make(), [[3], [1, 4, 1, 5, 9, 2]], []
    options = {"temperature": 0.8, "repetition_penalty": 1.2}
    plain = g.generate(runner, prompts, 12, VOCAB, **options)
    assert g.generate(runner, prompts, 12, VOCAB, compiles=True, say=said.append, **options) == plain
    assert said == []


@pytest.mark.parametrize("name", [name for name in model_names() if get_model(name).__module__.startswith("models.")])
def test_drafts_and_fixed_shapes_change_no_text_of_any_model(name, monkeypatch):
    """Every model of this package takes both, or says in a line why it refuses steps of fixed shapes."""
    steps, said, account = [], [], Account()
    monkeypatch.setattr(compiled, "compiled_step", lambda _: lambda *given: steps.append(0) or compiled.step(*given))
    runner = hybrid(name) if name in HYBRIDS else Runner(name)
    prompts, options = [[3], [1, 4, 1, 5]], {"temperature": 0.8, "say": said.append}
    plain = g.generate(runner, prompts, 9, VOCAB, **options)
    assert g.generate(runner, prompts, 9, VOCAB, draft=near(runner), account=account, **options) == plain
    assert g.generate(runner, prompts, 9, VOCAB, compiles=True, **options) == plain
    assert account.drafted > 0
    if name in VARYING:
        [line] = said
        assert "a decoding step is not compiled" in line and "its steps have no fixed shapes" in line
    else:
        assert len(steps) > 5 and said == []


def test_past_the_context_static_steps_go_on(monkeypatch):
    eager(monkeypatch)
    runner, said = runner_of(positions="learned", max_context=8), []
    plain = g.generate(runner, [[3, 1], [4, 1, 5]], 25, VOCAB)
    assert g.generate(runner, [[3, 1], [4, 1, 5]], 25, VOCAB, compiles=True, say=said.append) == plain
    assert said == []


class CountsTokens(Transformer):
    """A model that needs the length of its state as a number in Python."""

    def hidden(self, tokens, *, documents=None, state=None):
        scale = 1.0 if state is None or state.n_keys(1) < 40 else 2.0
        hidden = super().hidden(tokens, documents=documents, state=state)
        return hidden._replace(states=hidden.states * scale)


def test_a_model_that_fixed_shapes_change_is_told_and_decodes_as_always(monkeypatch):
    eager(monkeypatch)
    runner, said = runner_of(), []
    model = CountsTokens(runner.model.config)
    model.load_state_dict(runner.model.state_dict())
    runner.model = model
    plain = g.generate(runner, [[3, 1]], 45, VOCAB, temperature=0)
    for _ in range(2):
        made = g.generate(runner, [[3, 1]], 45, VOCAB, temperature=0, compiles=True, say=said.append)
        assert made == plain
    [line] = said
    assert line.startswith("text: a decoding step is not compiled, which changes no text: its logits differ by ")


def test_a_step_that_fails_is_told(monkeypatch):
    def broken(model, tokens, state):
        raise RuntimeError("no compiler\nfound here")

    monkeypatch.setattr(compiled, "compiled_step", lambda device_type: broken)
    runner, said = runner_of(), []
    plain = g.generate(runner, [[3, 1]], 12, VOCAB)
    assert g.generate(runner, [[3, 1]], 12, VOCAB, compiles=True, say=said.append) == plain
    assert said == ["text: a decoding step is not compiled, which changes no text: RuntimeError: no compiler"]


def test_a_model_without_a_cache_has_no_steps(monkeypatch):
    eager(monkeypatch)
    runner, said = gpt2_of(Convolution), []
    plain = g.generate(runner, [[3, 1]], 5, VOCAB, say=said.append)
    assert g.generate(runner, [[3, 1]], 5, VOCAB, compiles=True, say=said.append) == plain and len(said) == 1


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda: runner_of(kv_shift=True, window=4), lambda: Runner("hlb")], ids=["kv", "hlb"])
def test_compiled_steps_are_one_graph_for_all_tokens(make):
    """fullgraph=True raises at a graph break; the texts are those of plain decoding, and nothing is compiled twice."""
    from trainer.runtime.compat import private

    torch.compiler.reset()
    compiled.compiled_step.cache_clear()
    runner, said = make(), []
    plain = g.generate(runner, [[3], [6, 5, 4]], 20, VOCAB)
    counters = private("counters")
    counters.clear()
    for _ in range(2):
        assert g.generate(runner, [[3], [6, 5, 4]], 20, VOCAB, compiles=True, say=said.append) == plain
    assert counters["stats"]["unique_graphs"] == 1, "one graph for both batches of texts"
    assert sum(counters["graph_break"].values()) == 0 and said == []


def test_steps_begin_after_the_prompt():
    reader = Reader(runner_of(), VOCAB, 1, 20, print, compiles=True)
    assert reader._step is not None and not reader._step.tried
