"""log.noise_scale: its estimates against planted gradients and against autograd; what it changes, what it needs, how it goes on."""

import json
import math
import shutil

import pytest
import torch
from conftest import tiny_values
from tiny_runs import make, same, weights

from trainer.checkpoint import format as checkpoint
from trainer.checkpoint.manifest import amend
from trainer.commands.train import run
from trainer.core.config import RunConfig
from trainer.core.errors import UserError
from trainer.core.settings import build
from trainer.planning.plan import resolve
from trainer.runs.metrics import read_rows
from trainer.runtime.distributed import World
from trainer.training.noise_scale import DECAY, NoiseScale
from trainer.training.step import microbatches, optimiser_step

ONE = torch.tensor(1.0)


def ratio(noise: NoiseScale) -> float:
    square, trace = noise.averages.tolist()
    return trace / square


def test_hand_computed():
    """4 tokens with the mean gradient (1, 0), the first 2 of them with the mean gradient (1, 1):
    |G|^2 = (4 * 1 - 2 * 2) / 2 = 0 and tr(Sigma) = (2 - 1) / (1/2 - 1/4) = 4; then (1, 1) and (1, 1): 2 and 0."""
    noise, tokens = NoiseScale(torch.device("cpu")), torch.tensor(2.0)
    noise.add(torch.tensor(math.sqrt(2) / 2), tokens, torch.tensor(1.0), 4, ONE)
    assert noise.averages.tolist() == pytest.approx([0, 4 * (1 - DECAY)], abs=1e-6)
    noise.add(torch.tensor(math.sqrt(2) / 2), tokens, torch.tensor(math.sqrt(2)), 4, ONE)
    assert noise.averages.tolist() == pytest.approx([2 * (1 - DECAY), 4 * DECAY * (1 - DECAY)], abs=1e-6)
    before = noise.averages.clone()
    nan, zero = torch.tensor(math.nan), torch.tensor(0.0)
    # A step that is not finite; no number; a square that overflows; nothing after the first part.
    for part, count, finite in ((ONE, 4, zero), (nan, 4, ONE), (torch.tensor(1e30), 4, ONE), (ONE, 2, ONE)):
        noise.add(part, tokens, ONE, count, finite)
        assert torch.equal(noise.averages, before)


def test_planted_gradients():
    """Tokens' gradients are G + N(0, s^2 I) in d dimensions, of which steps of different sizes see the mean."""
    d, scale, s, steps = 1000, 500.0, 0.3, 600
    draw = torch.Generator().manual_seed(0)
    g = torch.full((d,), s / math.sqrt(scale))  # so d s^2 / |G|^2 = scale
    noise = NoiseScale(torch.device("cpu"))
    for step in range(steps):
        count = (1000, 1500, 2000)[step % 3]
        first, second = (g + s / math.sqrt(count / 2) * torch.randn(d, generator=draw) for _ in range(2))
        # A loss that is divided by the count of the whole step has half of the first half's mean gradient.
        noise.add(first.norm() / 2, torch.tensor(count / 2), (first + second).norm() / 2, count, ONE)
    # With first = G + u + v and the whole G + v, where u and v are independent N(0, s^2 / B I): relative variances of a step's
    # estimates are 6 / d + 4 B / (scale d) of tr(Sigma) and 8 scale / (B d) + 8 scale^2 / (B^2 d) of |G|^2; an average with
    # DECAY keeps (1 - DECAY) / (1 + DECAY) of them. Take the largest of each, and four standard deviations.
    kept = (1 - DECAY) / (1 + DECAY)
    trace, square = 6 / d + 4 * 2000 / (scale * d), 8 * scale / (1000 * d) + 8 * scale**2 / (1000**2 * d)
    error = math.sqrt(kept * trace) + math.sqrt(kept * square)
    assert 4 * error < 0.07
    assert ratio(noise) == pytest.approx(scale, rel=4 * error)


@pytest.mark.parametrize("size", [512, 64])
def test_a_step_compares_its_first_half_with_the_whole(tiny_dataset, tmp_path, size):
    """Against autograd. A step of one microbatch is cut in two."""
    one = make(tiny_dataset, tmp_path, model={"name": "gpt2"}, log__noise_scale=True, batch__tokens_per_microbatch=size)
    length = one.plan.sequence_length(0)
    batch = one.read(length, 512 // length)
    parts = microbatches(one, batch, length, 512 // length)
    assert len(parts) == {512: 2, 64: 8}[size]
    squares = []
    rows = len(batch["tokens"])
    for some in (rows // 2, rows):
        one.model(batch["tokens"][:some], targets=batch["targets"][:some]).loss.backward()
        squares.append(sum(parameter.grad.square().sum().item() for parameter in one.model.parameters()))
        one.model.zero_grad()
    small, big = squares
    expected = ((small - big) / (1 / 256 - 1 / 512)) / ((512 * big - 256 * small) / 256)
    # Squares of fp32 sums of 512 terms: each off by some 2 * 3e-5, which the differences of the two magnify.
    magnified = (small + big) * (1 / abs(small - big) + 1 / abs(2 * big - small))
    assert optimiser_step(one).noise_scale == pytest.approx(expected, rel=6e-5 * magnified)
    assert 6e-5 * magnified < 0.05


@pytest.mark.parametrize("precision", ["fp32", "pure_bf16"])
def test_it_changes_nothing(tiny_dataset, tmp_path, precision):
    """Bit for bit, where a step has two microbatches anyway. The rows have the key only if it is asked for."""
    taken = {}
    for asked in (False, True):
        folder = tmp_path / str(asked)
        run(tiny_values(tiny_dataset, folder, precision=precision, log__noise_scale=asked, max_steps=4))
        rows = read_rows(folder / "metrics.jsonl")
        assert all(("noise_scale" in row) == asked for row in rows)
        taken[asked] = [(row["loss"], row["grad_norm"]) for row in rows], weights(folder, 4)
    assert taken[True][0] == taken[False][0] and same(taken[True][1], taken[False][1])
    assert any(row["noise_scale"] is not None for row in rows)


def test_pure_bf16_measures_the_fp32_sums(tiny_dataset, tmp_path):
    """The norm in the middle of a step is that of the sums which the end of the step would round to bf16."""
    one = make(tiny_dataset, tmp_path, model={"name": "gpt2"}, precision="pure_bf16")
    one.engine.backward(one.read(16, 16), 1 / 256, True)
    found = one.engine.norm_so_far()
    one.engine.collect_gradients()
    # The rounding changes each entry by at most 2^-9 of it.
    assert found.item() == pytest.approx(one.engine.gradient_norm().item(), rel=2**-9) and found.dtype == torch.float32


def test_a_run_goes_on_with_the_averages(tiny_dataset, tmp_path):
    """Bit for bit as one that was not interrupted; also from a checkpoint of a release without them, which begins anew."""
    folder = tmp_path / "r"
    values = tiny_values(tiny_dataset, folder, log__noise_scale=True, max_steps=8)
    run(values)

    def go_on() -> list:
        shutil.rmtree(folder / "checkpoints" / checkpoint.step_name(8))
        run(values)
        return [row["noise_scale"] for row in read_rows(folder / "metrics.jsonl")]

    before = [row["noise_scale"] for row in read_rows(folder / "metrics.jsonl")]
    assert len(set(before)) > 4 and go_on() == before

    path = folder / "checkpoints" / checkpoint.step_name(4)
    state = json.loads((path / checkpoint.MANIFEST).read_text())["state"]
    del state["noise"]
    amend(path, {"state": state})
    after = go_on()
    assert after[:4] == before[:4] and after[4:] != before[4:]


@pytest.mark.parametrize(
    "settings, processes, why",
    [
        ({"engine": {"strategy": "zero2"}}, 2, "log.noise_scale: zero2 has no norm of the gradient in the middle of a step"),
        ({"batch": {"tokens_per_step": 1024, "sequence_length": 64}}, 16, "log.noise_scale: step 1 has 16 sequences of 64"),
        (
            {"batch": {"tokens_per_step": 512, "sequence_start": 16, "sequence_length": 64, "sequence_double_every": 3}},
            5,
            "log.noise_scale: step 8 has 8 sequences of 64 tokens for 5 processes",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(settings, processes, why):
    config = {
        "model": {"name": "gpt2"},
        "model_scale": 0.05,
        "data": {"tokenizer": "bytes"},
        "device": "cpu",
    } | settings
    with pytest.raises(UserError, match=why):
        resolve(build(RunConfig, {**config, "log": {"noise_scale": True}}), world=World(0, processes, 0))
    resolve(build(RunConfig, config), world=World(0, processes, 0))
