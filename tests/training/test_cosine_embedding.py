"""The cosine loss of hidden states: against a plain formula, over blocks of unequal number and width."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from models.base import IGNORE, get_model, load_models
from models.objective_layers import with_layers
from trainer.core.errors import UserError
from trainer.objectives import FrozenModel, build_objective, resolve_objective
from trainer.objectives.base import ModelAndObjective
from trainer.objectives.cosine_embedding import apart_of, block_pairs
from trainer.testing.subject import Subject

load_models()
GPT2 = get_model("gpt2")
STUDENT = Subject("gpt2", GPT2, {"n_layers": 2, "d_model": 32, "n_heads": 2}, weighted=True)
TEACHER = Subject("gpt2", GPT2, {"n_layers": 4, "d_model": 48, "n_heads": 2})
WIDER = dataclasses.replace(STUDENT, model_class=with_layers(GPT2, {"32_48": (32, 48)}))


def taught(student, teacher, **options):
    settings = resolve_objective({"name": "cosine_embedding", "teacher": "t", **options})
    joined = ModelAndObjective(student, build_objective(settings))
    joined.objective.frozen = {"teacher": FrozenModel(teacher)}
    return joined


def states(model, tokens):
    """The input of each block's successor: the output of block i is what block i + 1 reads."""
    found = []
    handles = [block.register_forward_hook(lambda _, __, output: found.append(output[0])) for block in model.blocks()]
    logits = model(tokens).logits
    for handle in handles:
        handle.remove()
    return found, logits


@pytest.mark.parametrize("layers, pairs", [("even", [(0, 1), (1, 3)]), ("0:0,1:0,1:3", [(0, 0), (1, 0), (1, 3)])])
def test_loss_and_gradients_are_those_of_a_plain_reference(layers, pairs):
    student, teacher = WIDER.build(0).double(), TEACHER.build(1).double()
    batch = STUDENT.batch
    batch["weights"] = batch["weights"].double()
    loss = taught(student, teacher, layers=layers, weight=3.0)(batch)
    loss.sum.backward()
    found = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}

    ours, logits = states(student, batch["tokens"])
    theirs, _ = states(teacher, batch["tokens"])
    weights = batch["weights"].where(batch["targets"] != IGNORE, 0)
    ce = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=IGNORE, reduction="none")
    cosine, projection = 0, student.objective_layers["32_48"].weight
    for here, there in pairs:
        a, b = ours[here] @ projection.T, theirs[there]
        cosine = cosine + 1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    cosine = 3.0 * (cosine / len(pairs) * weights).sum()
    expected = (ce * weights.flatten()).sum() + cosine
    student.zero_grad()
    expected.backward()
    torch.testing.assert_close(loss.sum.double(), expected, rtol=1e-6, atol=0)  # the fused cross-entropy sums in fp32
    torch.testing.assert_close(loss.parts["cosine"], cosine, rtol=1e-10, atol=0)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12)
    assert found["objective_layers.32_48.weight"].any()
    assert not any(block._forward_hooks for model in (student, teacher) for block in model.blocks())


def test_a_student_that_equals_its_teacher_is_not_apart():
    student = STUDENT.build(0).double()
    loss = taught(student, copy.deepcopy(student))({"tokens": STUDENT.tokens, "targets": STUDENT.targets})
    assert abs(loss.parts["cosine"].item()) < 1e-10


def test_what_is_measured_is_the_angle_alone():
    """0 for the same direction at any length, 2 for the opposite one."""
    states = torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for other, expected in ((states, 0.0), (7 * states, 0.0), (-states, 2.0)):
        torch.testing.assert_close(apart_of(states, other), torch.full((2, 3), expected).double(), rtol=0, atol=1e-12)


def test_one_projection_serves_all_pairs_of_the_same_widths():
    for teacher, expected in ((TEACHER, {"32_48": (32, 48)}), (STUDENT, {})):
        joined = taught(STUDENT.build(0), teacher.build(1))
        assert joined.objective.linear_layers(joined.model, STUDENT.batch) == expected


def test_blocks_are_compared_evenly():
    """The last with the last."""
    assert block_pairs("even", 2, 2) == [(0, 0), (1, 1)]
    assert block_pairs("even", 3, 22) == [(0, 7), (1, 14), (2, 21)]
    assert block_pairs("even", 4, 2) == [(0, 0), (1, 0), (2, 1), (3, 1)]
    with pytest.raises(UserError, match="objective.layers: 1:4 is not a pair of the student's 2 and the teacher's 4"):
        block_pairs("0:1,1:4", 2, 4)
    for wrong in ("0", "0:1:2", "a:1", "0:-1", ""):
        with pytest.raises(UserError, match="objective cosine_embedding: layers .* is neither even nor a list"):
            resolve_objective({"name": "cosine_embedding", "layers": wrong})
