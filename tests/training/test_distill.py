"""Distillation: the loss and its gradient against plain formulas, and what must change nothing."""

import copy

import pytest
import torch
import torch.nn.functional as F

from models.base import IGNORE, get_model, load_models
from trainer.core.errors import UserError
from trainer.data.dataset import TEACHER_IDS, TEACHER_LOG_PROBS, ColumnInfo
from trainer.objectives import FrozenModel, build_objective, distill, resolve_objective
from trainer.objectives.base import ModelAndObjective
from trainer.testing.subject import Subject

load_models()
DIVERGENCES = ("forward", "reverse", "js")
SUBJECT = Subject("gpt2", get_model("gpt2"), weighted=True)
VOCAB = SUBJECT.meta_at(0.02).config.vocab_size


def taught(student, teacher, **options):
    joined = ModelAndObjective(
        student, build_objective(resolve_objective({"name": "distill", "teacher": "t", **options}))
    )
    joined.objective.frozen = {"teacher": FrozenModel(teacher)}
    return joined


def gradients_of(joined, batch):
    joined.zero_grad()
    loss = joined(batch)
    loss.sum.backward()
    return loss, {name: parameter.grad.clone() for name, parameter in joined.model.named_parameters()}


def models(dtype=torch.float64):
    return SUBJECT.build(0).to(dtype), SUBJECT.build(1).to(dtype)


def batch64():
    batch = SUBJECT.batch
    return {**batch, "weights": batch["weights"].double()}


def plain(kind, z_s, z_t, t):
    """The textbook's divergence of softmax(z / t), with logarithms of probabilities."""
    q, p = (z_s / t).softmax(-1), (z_t / t).softmax(-1)
    m = (p + q) / 2
    one = {
        "forward": p * (p / q).log(),
        "reverse": q * (q / p).log(),
        "js": (p * (p / m).log() + q * (q / m).log()) / 2,
    }
    return one[kind].sum(-1)


# -- the divergence ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.7, 1.0, 3.0])
def test_the_gradient_of_a_logit_is_that_of_hinton_et_al(t):
    """t^2 KL has the gradient t (softmax(z_S / t) - p_T). Both sides are fp64, so they agree to about 1e-15."""
    z_s, z_t = 3 * torch.randn(2, 5, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z_s.requires_grad_()
    (t**2 * distill.divergence("forward", z_s, z_t, t)).sum().backward()
    torch.testing.assert_close(z_s.grad, t * ((z_s / t).softmax(-1) - (z_t / t).softmax(-1)), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_an_id_that_one_of_both_excludes_counts_for_neither(kind):
    """As padding of a vocabulary does, with logits of -inf: as if it were not there, and no NaN, even at a low temperature."""
    z_s, z_t = torch.randn(2, 5, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z_s.requires_grad_()
    without = distill.divergence(kind, z_s[:, :9], z_t[:, :9], 0.01)
    [expected] = torch.autograd.grad(without.sum(), z_s)
    masked = z_s.masked_fill(torch.arange(11) == 10, -torch.inf)
    found = distill.divergence(kind, masked, z_t.masked_fill(torch.arange(11) == 9, -torch.inf), 0.01)
    [gradient] = torch.autograd.grad(found.sum(), z_s)
    torch.testing.assert_close(found, without, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


# -- the objective -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("top_k", [0, 7])
def test_loss_and_gradients_are_those_of_a_plain_reference(kind, top_k, monkeypatch):
    """Whole logits in fp64 on one side; chunks of three tokens on the other."""
    student, teacher = models()
    batch, t, alpha = batch64(), 1.7, 0.3
    monkeypatch.setattr(distill, "CHUNK_BYTES", 3 * 4 * VOCAB)
    loss, found = gradients_of(
        taught(student, teacher, divergence=kind, top_k=top_k, alpha=alpha, temperature=t), batch
    )

    z_s, z_t = student(batch["tokens"]).logits, teacher(batch["tokens"]).logits
    ce = F.cross_entropy(z_s.flatten(0, 1), batch["targets"].flatten(), ignore_index=IGNORE, reduction="none")
    weights = batch["weights"].where(batch["targets"] != IGNORE, 0)
    if top_k:
        kept = z_t.topk(top_k).indices
        z_s, z_t = z_s.gather(-1, kept), z_t.gather(-1, kept)
    apart = plain(kind, z_s, z_t, t)
    expected = (((1 - alpha) * ce.view(weights.shape) + alpha * t**2 * apart) * weights).sum()
    student.zero_grad()
    expected.backward()
    torch.testing.assert_close(loss.sum.double(), expected, rtol=1e-6, atol=0)  # the fused cross-entropy sums in fp32
    assert loss.measures["divergence"].item() == pytest.approx((apart * weights).sum().item(), rel=1e-10)
    assert loss.measures["cross_entropy"].item() == pytest.approx((ce * weights.flatten()).sum().item(), rel=1e-6)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(kind):
    student = models()[0]
    loss, found = gradients_of(taught(student, copy.deepcopy(student), divergence=kind, alpha=1.0), batch64())
    assert abs(loss.sum.item()) < 1e-12
    assert all(gradient.abs().max() < 1e-12 for gradient in found.values())


def test_all_ids_as_top_k_change_nothing():
    student, teacher = models()
    (one, first), (other, second) = (
        gradients_of(taught(student, teacher, top_k=k, temperature=2.0), batch64()) for k in (0, VOCAB)
    )
    assert one.sum.item() == pytest.approx(other.sum.item(), rel=1e-12)
    for name, gradient in first.items():
        torch.testing.assert_close(second[name], gradient, rtol=1e-9, atol=1e-14)


def test_padding_changes_nothing():
    """Two rows alone, and in a longer batch with a row of padding."""
    student, teacher = models()
    tokens, targets = (values[:2, :12] for values in (SUBJECT.tokens, SUBJECT.targets))
    padded = {
        "tokens": F.pad(tokens, (0, 5, 0, 1), value=3),
        "targets": F.pad(targets, (0, 5, 0, 1), value=IGNORE),
    }
    (one, first), (other, second) = (
        gradients_of(taught(student, teacher), batch) for batch in ({"tokens": tokens, "targets": targets}, padded)
    )
    assert one.count == other.count == 24
    assert one.sum.item() == pytest.approx(other.sum.item(), rel=1e-6)
    for name, gradient in first.items():
        torch.testing.assert_close(second[name], gradient, rtol=1e-9, atol=1e-12)


def test_a_teacher_with_a_padded_vocabulary_is_cut():
    """Its further ids get no probability, whatever it predicts for them."""
    student, teacher = models()
    cls, config = type(teacher), teacher.config
    wide = cls(type(config)(**{**vars(config), "vocab_size": VOCAB + 64})).double()
    state = {
        name: F.pad(v, (0, 0, 0, 64), value=9.0) if v.shape[0] == VOCAB else v
        for name, v in teacher.state_dict().items()
    }
    wide.load_state_dict(state)
    one, other = (gradients_of(taught(student, model), batch64())[0] for model in (teacher, wide))
    assert one.sum.item() == pytest.approx(other.sum.item(), rel=1e-12)


def test_stored_predictions_are_those_of_the_teacher():
    """Its top 7 log-probabilities, beside the targets, give the loss of the teacher itself with top_k 7."""
    student, teacher = models()
    batch = batch64()
    with torch.no_grad():
        top = teacher(batch["tokens"]).logits.log_softmax(-1).topk(7)
    stored = {**batch, TEACHER_IDS: top.indices.to(torch.uint16), TEACHER_LOG_PROBS: top.values}
    settings = {"name": "distill", "temperature": 1.5}
    one, first = gradients_of(taught(student, teacher, top_k=5, temperature=1.5), batch)
    for k, expected in ((5, one.sum.item()), (0, None)):
        joined = ModelAndObjective(student, build_objective(resolve_objective({**settings, "top_k": k})))
        loss, found = gradients_of(joined, stored)
        if expected is not None:
            assert loss.sum.item() == pytest.approx(expected, rel=1e-12)
            assert all(torch.allclose(found[name], g, rtol=1e-9, atol=1e-14) for name, g in first.items())
        else:
            assert loss.sum.item() != one.sum.item(), "all that is stored counts"


@pytest.mark.parametrize(
    "options, why",
    [
        ({"alpha": 1.5}, "objective.alpha: 1.5 is too large"),
        ({"temperature": 0}, "objective.temperature: 0.0 is too small"),
        ({"divergence": "backward"}, "objective.divergence"),
        ({"top_k": -1}, "objective.top_k: -1 is too small"),
    ],
)
def test_wrong_settings_are_one_line(options, why):
    with pytest.raises(UserError, match=why):
        resolve_objective({"name": "distill", **options})


def test_without_a_teacher_the_dataset_must_hold_one():
    objective = build_objective(resolve_objective({"name": "distill", "top_k": 8}))
    with pytest.raises(ValueError, match="^teacher: name a model, or prepare the data with --teacher"):
        objective.check_columns({})
    with pytest.raises(ValueError, match="^top_k: is 8, but the dataset stores 4 ids"):
        objective.check_columns({TEACHER_IDS: ColumnInfo("uint16", [4])})
    objective.check_columns({TEACHER_IDS: ColumnInfo("uint16", [8])})
