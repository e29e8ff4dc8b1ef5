"""Hidden states, logits and losses: the parts of a forward pass agree with the whole, whichever of them an author writes."""

import odd_model
import pytest
import torch

from models.base import (
    IGNORE,
    Hidden,
    LanguageModel,
    LogitsAsHidden,
    get_model,
    load_models,
    logits_at,
    register,
    with_hidden,
)
from models.transformer import Transformer, TransformerConfig

load_models()


def model_of(name, **changes):
    shape = {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_context": 64}
    if name in ("hlb", "ngpt"):
        cls = get_model(name)
        model = cls(cls.config_for_scale(0.1, 64, 100_000))
    elif name == "transformer":
        model = Transformer(TransformerConfig(**shape, **changes))
    else:
        model = get_model(name)(get_model(name).Config(**shape))
    model.init_weights(torch.Generator().manual_seed(0))
    return model


MODELS = [
    ("hlb", {}),
    ("ngpt", {}),
    ("odd", {}),
    ("transformer", {"n_predict": 2, "z_loss": 0.1, "final_softcap": 3.0}),
]


def drawn():
    tokens, targets = torch.randint(64, (2, 2, 9), generator=torch.Generator().manual_seed(1))
    targets[0, :3] = IGNORE
    weights = torch.rand(2, 9, generator=torch.Generator().manual_seed(2))
    return tokens, targets, weights


@pytest.mark.parametrize("name, changes", MODELS, ids=str)
def test_logits_and_losses_are_those_of_the_forward_pass(name, changes):
    model = model_of(name, **changes)
    tokens, targets, weights = drawn()
    view = with_hidden(model)
    assert isinstance(view, LogitsAsHidden) == (name == "odd")
    hidden = view.hidden(tokens)
    logits = model(tokens).logits
    assert torch.equal(view.logits(hidden), logits)
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none"
    )
    nll = view.nll(hidden, targets)
    assert nll.dtype == torch.float32 and (nll.flatten() - expected).abs().max() < 1e-5
    assert (nll[targets == IGNORE] == 0).all()
    assert torch.equal(view.nll(hidden, targets, weights), nll * weights)
    output = model(tokens, targets, reduction="sum")
    loss, parts = view.loss(hidden, targets, "sum")
    assert torch.equal(loss, output.loss) or (name == "odd" and torch.allclose(loss, output.loss))
    assert parts.keys() == (output.parts or {}).keys()
    weighted, parts = view.loss(hidden, targets, "sum", weights)
    assert (weighted - sum(parts.values())).item() == pytest.approx((nll * weights).sum().item(), rel=1e-4)


def test_further_heads_weigh_their_own_targets():
    """A head that predicts two ahead gets the weight of the target two ahead."""
    model = model_of("transformer", n_predict=2)
    tokens, targets, weights = drawn()
    hidden = model.hidden(tokens)
    _, parts = model.loss(hidden, targets, "sum", weights)
    states = model.states_of_heads(hidden)[1]
    nll = model.nll(Hidden(states[:, :-1]), targets[:, 1:], weights[:, 1:])
    assert parts["head_2"].item() == pytest.approx(nll.sum().item(), rel=1e-5)


def test_a_forward_pass_below_the_hidden_states_has_the_last_word():
    class Doubled(odd_model.Steady):
        def hidden(self, tokens, *, documents=None, state=None):
            hidden = super().hidden(tokens, documents=documents, state=state)
            return hidden._replace(states=2 * hidden.states)

    config = odd_model.Steady.Config(vocab_size=64, d_model=32, n_layers=1, n_heads=2)
    steady, doubled = odd_model.Steady(config), Doubled(config)
    assert isinstance(with_hidden(steady), LogitsAsHidden) and with_hidden(doubled) is doubled


def test_a_model_without_either_is_refused():
    with pytest.raises(TypeError, match=r"Nothing must define hidden and logits \(or forward\), Config, "):

        @register("nothing")
        class Nothing(LanguageModel):
            pass


@pytest.mark.parametrize("name, changes", MODELS, ids=str)
def test_logits_of_some_tokens_are_those_among_all(name, changes):
    model = model_of(name, **changes)
    tokens, *_ = drawn()
    positions = torch.tensor([[0, 0, 1], [8, 2, 5]])
    logits = model(tokens).logits
    found = logits_at(model, tokens, None, positions)
    assert found.shape == (1, 3, logits.shape[-1])
    # The same products, of fewer rows: the sums of 32 terms may be in another order.
    assert torch.allclose(found[0], logits[positions[0], positions[1]], atol=1e-5)
