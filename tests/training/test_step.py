"""One step of the optimiser: microbatches and shares, gradients, precisions, and what is not finite."""

import importlib
import math

import pytest
import torch
from conftest import tiny_values
from tiny_runs import losses, make, same, weights

import models.base
from models.base import IGNORE, cross_entropy
from trainer.checkpoint import format as checkpoint
from trainer.commands.train import run
from trainer.core.errors import UserError
from trainer.engine.base import Engine
from trainer.recipes.hlb import weight_decay, weight_decay_base
from trainer.runs.metrics import read_rows
from trainer.runtime.device import HostCopy
from trainer.runtime.distributed import World
from trainer.training import step as training_step
from trainer.training.step import microbatches, optimiser_step


def test_microbatches_do_not_change_the_step(tiny_dataset, tmp_path):
    """One large microbatch and eight small ones: the same gradient up to the order of additions."""
    norms, after = [], []
    for size in (512, 64):
        one = make(tiny_dataset, tmp_path / str(size), batch__tokens_per_microbatch=size)
        measured = [optimiser_step(one) for _ in range(3)]
        norms.append([m.grad_norm for m in measured])
        after.append([m.loss for m in measured])
    # fp32 sums of 512 terms in another order: a relative error of some 512 * 2^-24 = 3e-5 at worst.
    assert norms[0] == pytest.approx(norms[1], rel=3e-5)
    assert after[0] == pytest.approx(after[1], rel=3e-5)


def test_numbers_of_a_step_are_read_after_the_next_one_is_launched(tiny_dataset, tmp_path, monkeypatch):
    """So that a GPU never waits for Python. Only the last step is waited for: its row, evaluation and checkpoint follow."""
    launched, read = [], []

    def launch(engine, *arguments):
        launched.append(len(launched) + 1)
        return step(engine, *arguments)

    class Watched(HostCopy):
        def __init__(self, **numbers):
            super().__init__(**numbers)
            self.step = launched[-1]

        def read(self):
            read.append((self.step, launched[-1]))
            return super().read()

    step = Engine.step
    monkeypatch.setattr(Engine, "step", launch)
    monkeypatch.setattr(training_step, "HostCopy", Watched)
    rare = {"evaluation__every": 0, "checkpoint__every": 0, "log__every": 0}
    run(tiny_values(tiny_dataset, tmp_path / "r", max_steps=8, **rare))
    assert {of for of, _ in read} == set(range(1, 9))
    assert all(now > of for of, now in read if of < 8)


def step_batch(one, length):
    """(tokens, targets) of each microbatch of the next step."""
    parts = microbatches(one, one.read(length, 512 // length), length, 512 // length)
    return [(part["tokens"], part["targets"]) for part in parts]


def test_the_loss_of_a_step_is_that_of_the_next_token(tiny_dataset, tmp_path):
    """The losses of further heads and of large logits are optimised, too, but validation knows nothing of them; nor does
    the weight decay that follows the loss."""
    model = {"name": "llama", "d_model": 64, "n_layers": 2, "n_heads": 2, "n_predict": 3, "z_loss": 0.1}
    one = make(tiny_dataset, tmp_path, model=model, optim__recipe="hlb", batch__tokens_per_microbatch=128)
    length = one.plan.sequence_length(0)
    batch = step_batch(one, length)
    with torch.no_grad():
        expected = sum(cross_entropy(one.model(tokens).logits, targets, "sum") for tokens, targets in batch) / 512
        whole = sum(one.model(tokens, targets, reduction="sum").loss for tokens, targets in batch) / 512
    measured = optimiser_step(one)
    loss = measured.loss
    assert whole > 2 * expected
    assert list(measured.parts) == ["head_2", "head_3", "z_loss"]
    assert loss + sum(measured.parts.values()) == pytest.approx(whole.item(), rel=3e-5)
    # A difference of fp32 sums of 128 terms: an error of some 128 * 2^-24 = 8e-6 of the larger, which is three times it.
    assert loss == pytest.approx(expected.item(), rel=3e-5)
    decay = weight_decay(torch.tensor(loss), weight_decay_base(one.plan.parameters)).item()
    assert one.engine.optimizer.decay.item() == pytest.approx(decay, rel=1e-5)


def test_embedding_rows_are_divided_by_their_counts_over_the_whole_step(tiny_dataset, tmp_path):
    """Against a plain gradient of the same batch, divided row by row."""
    one = make(tiny_dataset, tmp_path / "r", optim__embedding_frequency="global", batch__tokens_per_microbatch=128)
    length = one.plan.sequence_length(0)
    batch = step_batch(one, length)
    assert len(batch) == 4
    tokens = torch.cat([part[0] for part in batch])
    targets = torch.cat([part[1] for part in batch])
    one.model(tokens, targets=targets).loss.backward()
    expected = one.model.embedding.weight.grad / torch.bincount(tokens.flatten(), minlength=320).clamp(min=1)[:, None]
    one.model.zero_grad()
    captured = {}
    one.engine.update = lambda: captured.update(grad=one.model.embedding.weight.grad.clone())
    optimiser_step(one)
    torch.testing.assert_close(captured["grad"], expected, rtol=3e-5, atol=1e-9)


def test_original_counts_per_microbatch(tiny_dataset, tmp_path):
    """With one microbatch per step both ways of counting are the same; with four they differ."""

    def gradient(kind, size):
        one = make(tiny_dataset, tmp_path / kind, optim__embedding_frequency=kind, batch__tokens_per_microbatch=size)
        captured = {}
        one.engine.update = lambda: captured.update(grad=one.model.embedding.weight.grad.clone())
        optimiser_step(one)
        return captured["grad"]

    torch.testing.assert_close(gradient("global", 512), gradient("microbatch", 512), rtol=1e-4, atol=1e-9)
    assert not torch.allclose(gradient("global", 128), gradient("microbatch", 128), rtol=1e-2, atol=1e-7)


def test_clip(tiny_dataset, tmp_path):
    captured = {}
    for clip in (0.0, 0.01):
        one = make(tiny_dataset, tmp_path / "r", optim__clip_norm=clip)
        one.engine.update = lambda one=one, clip=clip: captured.update(
            {clip: torch.nn.utils.get_total_norm([p.grad for p in one.model.parameters()]).item()}
        )
        reported = optimiser_step(one).grad_norm
        assert reported > 0.01, "the norm before clipping is what is reported"
    assert captured[0.0] == pytest.approx(reported)
    assert captured[0.01] == pytest.approx(0.01, rel=1e-3)  # torch divides by norm + 1e-6


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_shares_cover_every_sequence(tiny_dataset, tmp_path, size):
    one = make(tiny_dataset, tmp_path / "r")
    for sequences in (1, 2, 7, 32):
        taken = []
        for rank in range(size):
            one.world = World(rank, size, rank)
            first, count = one.share(sequences)
            taken += range(first, first + count)
        assert taken == list(range(sequences))


def test_a_rank_without_sequences_takes_part_with_nothing(tiny_dataset, tmp_path):
    one = make(tiny_dataset, tmp_path / "r")
    one.world = World(0, 2, 0)  # the first of two ranks gets none of one sequence
    [part] = microbatches(one, one.read(64, 1), 64, 1)
    tokens, targets = part["tokens"], part["targets"]
    assert tokens.shape == (1, 64) and (targets == IGNORE).all()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "pure_bf16"])
def test_precisions(tiny_dataset, tmp_path, precision):
    one = make(tiny_dataset, tmp_path / "r", precision=precision)
    kinds = {parameter.dtype for parameter in one.model.parameters()}
    assert kinds == {torch.bfloat16 if precision == "pure_bf16" else torch.float32}
    first = optimiser_step(one)
    assert first.loss == pytest.approx(math.log(320), abs=0.3)
    states = {tensor.dtype for name, tensor in one.engine.tensors().items() if "exp_avg" in name}
    assert states == kinds


def test_pure_bf16_adds_gradients_up_in_fp32(tiny_dataset, tmp_path):
    """64 microbatches of one sequence: sums kept in bf16 would lose the small parts; fp32 sums come close to one large batch."""
    grads = {}
    for size in (64, 1024):
        one = make(
            tiny_dataset, tmp_path / "r", precision="pure_bf16", batch__tokens_per_microbatch=size,
            batch__tokens_per_step=1024, batch__sequence_start=64, batch__sequence_double_every=0,
        )  # fmt: skip
        one.engine.update = lambda one=one, size=size: grads.update({size: one.model.head.weight.grad.float().clone()})
        optimiser_step(one)
    error = (grads[64] - grads[1024]).norm() / grads[1024].norm()
    # Each microbatch's gradient is rounded to bf16 (2^-9 relative); independent roundings do not add up beyond that.
    assert error < 2**-8


def test_fp8_where_it_is_not(tiny_dataset, tmp_path, monkeypatch):
    values = tiny_values(tiny_dataset, tmp_path / "r", precision="bf16", float8=True)
    with pytest.raises(UserError, match="^float8: a CPU has no units for fp8, .*; leave it out$"):
        run(values)
    monkeypatch.setattr("models.layers.float8.float8_refusal", lambda device: None)
    with pytest.raises(UserError, match="^float8: .* precision fp32 promises; use bf16$"):
        run(values | {"precision": "fp32"})
    assert not (tmp_path / "r" / "config.yaml").exists()


@pytest.mark.slow
def test_fp8_trains_and_goes_on(tiny_dataset, tmp_path, monkeypatch):
    """Emulated by the CPU, a thousand times slower than what it stands for."""
    monkeypatch.setattr("models.layers.float8.float8_refusal", lambda device: None)
    for folder, cut in (("straight", 2), ("cut", 1)):
        values = tiny_values(
            tiny_dataset, tmp_path / folder, precision="bf16", max_steps=cut, float8=True,
            batch__tokens_per_step=64, batch__tokens_per_microbatch=64, batch__sequence_length=16,
            batch__dynamic=False, evaluation__max_tokens=16, checkpoint__every=1,
        )  # fmt: skip
        run(values)
    run({"run_dir": str(tmp_path / "cut"), "max_steps": 2})
    assert losses(tmp_path / "cut") == losses(tmp_path / "straight")
    assert same(weights(tmp_path / "cut", 2), weights(tmp_path / "straight", 2))


POISON = """
import torch
from models.base import register
from models.hlb import Hlb, HlbConfig

@register("poison")
class Poison(Hlb):
    Config = HlbConfig
    steps = 0
    def forward(self, tokens, **kwargs):
        out = super().forward(tokens, **kwargs)
        if self.training and torch.is_grad_enabled() and type(tokens) is torch.Tensor:
            type(self).steps += 1
            if type(self).steps in (7, 8) and out.loss is not None:
                out = out._replace(loss=out.loss * float("nan"))
        return out
"""


@pytest.fixture
def poison(tmp_path, monkeypatch):
    (tmp_path / "poison_model.py").write_text(POISON)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(models.base._REGISTRY, "poison", raising=False)
    module = importlib.import_module("poison_model")
    importlib.reload(module)
    return module


def poisoned(dataset, tmp_path, **changes):
    return tiny_values(
        dataset, tmp_path / "r", model={"name": "poison"}, optim__recipe="hlb",
        batch__tokens_per_microbatch=512, batch__dynamic=False, **changes,
    )  # fmt: skip


def test_nan_stops_the_run_and_spares_the_weights(poison, tiny_dataset, tmp_path):
    with pytest.raises(UserError, match="step 7: loss or gradient is not finite"):
        run(poisoned(tiny_dataset, tmp_path))
    newest = checkpoint.found(tmp_path / "r" / "checkpoints")[-1]
    assert newest[0] == 4
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "r", 4).values())


def test_nan_is_skipped_by_choice(poison, tiny_dataset, tmp_path):
    run(poisoned(tiny_dataset, tmp_path, optim__non_finite="skip"))
    rows = read_rows(tmp_path / "r" / "metrics.jsonl")
    assert [row["step"] for row in rows if row["loss"] is None] == [7, 8]
    assert len(rows) == 12
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "r", 12).values())


def test_skipping_has_a_cap(poison, tiny_dataset, tmp_path):
    with pytest.raises(UserError, match="step 8: .* .2 in a row."):
        run(poisoned(tiny_dataset, tmp_path, optim__non_finite="skip", optim__max_skips=1))
