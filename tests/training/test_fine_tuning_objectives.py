"""The objectives of fine-tuning against plain references in fp64, and what must not change their losses."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.base import IGNORE, Hidden, Output
from trainer.core.errors import UserError
from trainer.data.dataset import LOSS_MASK
from trainer.objectives import FrozenModel, build_objective, resolve_objective

VOCAB, WIDTH = 23, 8


class Plain(torch.nn.Module):
    """A causal model in fp64: the mean of the embeddings so far."""

    def __init__(self, seed):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.embedding = torch.nn.Parameter(torch.randn(VOCAB, WIDTH, generator=draw, dtype=torch.float64))
        self.head = torch.nn.Parameter(torch.randn(VOCAB, WIDTH, generator=draw, dtype=torch.float64))

    def hidden(self, tokens, *, documents=None):
        states = self.embedding[tokens].cumsum(1) / torch.arange(1, tokens.shape[1] + 1)[:, None]
        return Hidden(states)

    def logits(self, hidden):
        return hidden.states @ self.head.T

    def nll(self, hidden, targets, weights=None):
        logits = self.logits(hidden)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none")
        return losses.view(targets.shape)

    def loss(self, hidden, targets, reduction, weights=None):
        return self.nll(hidden, targets).sum(), {}

    def forward(self, tokens, targets, documents, reduction):
        return Output(loss=self.nll(self.hidden(tokens), targets).sum())


def pairs(rows=3, length=12, prompt=4, seed=0):
    """Random pairs [rows, 2, length] with a shared prompt and answers of different length."""
    draw = torch.Generator().manual_seed(seed)
    stream = torch.randint(VOCAB, (rows, 2, length + 1), generator=draw)
    stream[:, 1, :prompt] = stream[:, 0, :prompt]
    lengths = torch.randint(1, length - prompt, (rows, 2, 1), generator=draw)
    places = torch.arange(1, length + 1)
    answers = (places >= prompt) & (places < prompt + lengths)
    targets = stream[..., 1:].where(places < prompt + lengths, IGNORE)
    return {"tokens": stream[..., :-1], "targets": targets, LOSS_MASK: answers.to(torch.uint8)}


def dpo(reference=None, **options):
    objective = build_objective(resolve_objective({"name": "dpo", **options}))
    if reference is not None:
        objective.frozen["reference"] = FrozenModel(reference)
    return objective


def written_out(model, batch):
    """Sum of the log-probabilities of each answer, token by token: [B, 2], and their number."""
    sums, numbers = [], []
    for tokens, targets, mask in zip(
        *(batch[key].flatten(0, 1) for key in ("tokens", "targets", LOSS_MASK)), strict=True
    ):
        chosen = [i for i in range(len(tokens)) if mask[i]]
        logits = model.logits(model.hidden(tokens[None]))[0]
        sums.append(sum(logits[i].log_softmax(-1)[targets[i]] for i in chosen))
        numbers.append(len(chosen))
    return torch.stack(sums).view(-1, 2), torch.tensor(numbers).view(-1, 2)


def expected(options, model, reference, batch):
    ours, numbers = written_out(model, batch)
    beta = options["beta"]
    if options["loss"] == "simpo":
        better, worse = (beta * ours / numbers).unbind(1)
        return -torch.log(torch.sigmoid(better - worse - options["gamma"])).sum()
    ratio = (ours - written_out(reference, batch)[0].detach()) @ torch.tensor([1.0, -1.0], dtype=torch.float64)
    if options["loss"] == "ipo":
        return ((ratio - 1 / (2 * beta)) ** 2).sum()
    wrong = options["label_smoothing"]
    return -(
        (1 - wrong) * torch.log(torch.sigmoid(beta * ratio)) + wrong * torch.log(torch.sigmoid(-beta * ratio))
    ).sum()


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "sigmoid", "beta": 0.3, "label_smoothing": 0.0},
        {"loss": "sigmoid", "beta": 0.3, "label_smoothing": 0.2},
        {"loss": "ipo", "beta": 0.2},
        {"loss": "simpo", "beta": 2.0, "gamma": 0.7},
    ],
    ids=["dpo", "cdpo", "ipo", "simpo"],
)
def test_losses_and_gradients_are_those_of_the_formula(options):
    model, reference, batch = Plain(1), Plain(2), pairs()
    loss = dpo(reference, **options)(model, batch)
    plain = expected(options, model, reference, batch)
    assert loss.sum.item() == pytest.approx(plain.item(), rel=1e-12) and loss.count == 3
    ours, theirs = (torch.autograd.grad(one, list(model.parameters())) for one in (loss.sum, plain))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_where_the_model_is_the_reference_the_loss_is_ln_2_and_its_slope_half_of_beta():
    model, batch = Plain(1), pairs(rows=1)
    objective = dpo(model, beta=0.1)
    loss = objective(Plain(1), batch)
    assert loss.sum.item() == pytest.approx(math.log(2), rel=1e-12)
    assert loss.measures["margin"] == 0 and loss.measures["accuracy"] == 0
    ratio = torch.zeros(
        1, dtype=torch.float64, requires_grad=True
    )  # of the log-probabilities, which the margin is beta times
    (slope,) = torch.autograd.grad(objective.losses(0.1 * ratio).sum(), ratio)
    assert slope.item() == pytest.approx(-0.1 / 2, rel=1e-12)


def test_the_prompt_does_not_enter_beyond_what_the_model_reads():
    """More targets in the prompt, which the mask leaves out, change nothing."""
    model, reference, batch = Plain(1), Plain(2), pairs()
    unmasked = {**batch, "targets": batch["targets"].where(batch[LOSS_MASK] != 0, IGNORE)}
    assert torch.equal(dpo(reference)(model, batch).sum, dpo(reference)(model, unmasked).sum)


def test_swapping_the_answers_negates_the_margin():
    model, reference, batch = Plain(1), Plain(2), pairs()
    swapped = {key: values.flip(1) for key, values in batch.items()}
    one, other = (dpo(reference)(model, each).measures for each in (batch, swapped))
    assert one["margin"].item() == pytest.approx(-other["margin"].item(), rel=1e-12)
    assert one["accuracy"] + other["accuracy"] == 3


def padded(batch, count, token):
    fill = {"tokens": token, "targets": IGNORE, LOSS_MASK: 0}
    return {key: F.pad(values, (0, count), value=fill[key]) for key, values in batch.items()}


@pytest.mark.parametrize("name", ["dpo", "sft"])
def test_padding_changes_nothing(name):
    batch = pairs()
    if name == "sft":
        batch = {key: values.flatten(0, 1) for key, values in batch.items()}
    model = Plain(1)
    objective = dpo(Plain(2)) if name == "dpo" else build_objective(resolve_objective({"name": "sft"}))
    found = [objective(model, each) for each in (batch, padded(batch, 1, 0), padded(batch, 7, 5))]
    # fp64, and longer rows are summed in another order: half a unit for each of the 33 terms, of one sign
    assert [loss.sum.item() for loss in found] == pytest.approx([found[0].sum.item()] * 3, rel=33 * 2**-53, abs=0)
    assert len({loss.count.item() for loss in found}) == 1


def test_a_pair_without_an_answer_does_not_count():
    model, reference, batch = Plain(1), Plain(2), pairs()
    cut = {**batch, LOSS_MASK: batch[LOSS_MASK].clone()}
    cut[LOSS_MASK][0, 1] = 0
    rest = {key: values[1:] for key, values in batch.items()}
    one, other = (dpo(reference)(model, each) for each in (cut, rest))
    assert one.count == other.count == 2
    assert one.sum.item() == pytest.approx(other.sum.item(), rel=1e-12)
    empty = {**batch, "targets": torch.full_like(batch["targets"], IGNORE)}
    assert dpo(None, loss="simpo")(model, empty).sum == 0


def test_sft_is_the_cross_entropy_of_the_answers():
    model = Plain(1)
    batch = {key: values.flatten(0, 1) for key, values in pairs().items()}
    objective = build_objective(resolve_objective({"name": "sft"}))
    loss = objective(model, batch)
    sums, numbers = written_out(model, {key: values[:, None] for key, values in batch.items()})
    assert loss.count == numbers.sum() == objective.count(batch)
    assert loss.sum.item() == pytest.approx(-sums.sum().item(), rel=1e-12)
    ours, theirs = (torch.autograd.grad(one, list(model.parameters())) for one in (loss.sum, -sums.sum()))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "options, why",
    [
        ({"beta": 0}, "objective.beta: 0.0 is too small"),
        ({"label_smoothing": 0.6}, "objective.label_smoothing: 0.6 is too large; at most 0.5"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing is for the loss sigmoid"),
        ({"loss": "simpo", "reference": "runs/x"}, "simpo has no reference"),
        ({"loss": "hinge"}, "objective.loss"),
    ],
)
def test_wrong_settings_are_one_line(options, why):
    with pytest.raises(UserError, match=why):
        resolve_objective({"name": "dpo", **options})
