"""Moments in bf16: every step is the fp32 step from what they hold, rounded once; runs with them go on bit for bit."""

import math
import shutil

import pytest
import torch
from conftest import tiny_values
from tiny_runs import losses, make, same, weights
from torch import nn

from trainer import optim
from trainer.checkpoint import format as checkpoint
from trainer.commands.train import run
from trainer.optim import narrow_state
from trainer.optim.narrow_state import StochasticRounding
from trainer.runs.metrics import read_rows
from trainer.testing.optimizers import _Watched
from trainer.testing.subject import Failed
from trainer.training.step import optimiser_step

# Rounding to bf16 changes a number by at most this share of it: its spacing is 2^-7 of the power of two below it.
U = 2**-8
ONE, ZERO = torch.tensor(1.0), torch.tensor(0.0)
MOMENTS = ("exp_avg", "exp_avg_sq")


def build(parameters, betas=(0.9, 0.95), weight_decay=0.0, loss_driven=False, device="cpu", rounding=None):
    settings = {"adamw": {"beta1": betas[0], "beta2": betas[1], "eps": 1e-9}}
    group = optim.Group("g", list(parameters), 0.1, lambda step: 1.0, weight_decay, loss_driven, settings)
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    return optim.Optimizer(
        [group], shapes, parameters, first_loss=6.0, decay_of=torch.zeros_like, device=torch.device(device), narrow=True,
        rounding=rounding,
    )  # fmt: skip


def step(optimizer, number=0, finite=ONE):
    optimizer.prepare(number, finite)
    optimizer.step()


def odd_parameters(device="cpu"):
    """Of sizes that no piece divides, one without numbers, as shards can be, and one stored by columns."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"matrix": (13, 17), "row": (5,), "long": (300,), "none": (0, 3), "scalar": ()}
    values = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    values["columns"] = torch.randn(20, 11, generator=draw).t()
    return {name: nn.Parameter(value.to(device)) for name, value in values.items()}


def check_steps(device):
    """torch's own AdamW takes each step from the same moments in fp32: equal weights, equal moments once rounded."""
    ours = odd_parameters(device)
    theirs = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in ours.items()}
    optimizer = build(ours, weight_decay=0.3, device=device)
    reference = torch.optim.AdamW(theirs.values(), 0.1, (0.9, 0.95), 1e-9, 0.3, fused=True)
    for number in range(4):
        for name, parameter in ours.items():
            parameter.grad = torch.randn_like(parameter)
            theirs[name].grad = parameter.grad.clone()
        step(optimizer, number, ONE.to(device))
        reference.step()
        for name, parameter in ours.items():
            state, wide = optimizer.state[parameter], reference.state[theirs[name]]
            assert torch.equal(parameter, theirs[name]), (number, name)
            assert state["step"] == wide["step"] == number + 1
            for key in MOMENTS:
                assert state[key].dtype == torch.bfloat16
                assert torch.equal(state[key], wide[key].bfloat16()), (number, name)
                wide[key].copy_(state[key])


@pytest.mark.parametrize("size", [64, 256, 2**20])
def test_each_step_is_the_fp32_step_from_rounded_moments(monkeypatch, size):
    """In pieces smaller than a parameter, with several parameters to a piece, and all at once."""
    monkeypatch.setitem(narrow_state.PIECE, "cpu", size)
    check_steps("cpu")


def test_no_step_reads_a_number():
    """A GPU would have to be waited for. `_foreach_add_` of a single tensor does it: Python then takes its overload for numbers."""
    parameters = odd_parameters()
    optimizer = build(parameters, loss_driven=True)
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    for number in range(2):
        with _Watched():
            step(optimizer, number)
            optimizer.follow(ONE, ONE)
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}
    with _Watched(), pytest.raises(Failed, match="reads a tensor's value"):
        torch._foreach_add_([torch.zeros(())], ONE)


@pytest.mark.gpu("training")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(monkeypatch):
    monkeypatch.setitem(narrow_state.PIECE, "cuda", 64)
    check_steps("cuda")


@pytest.mark.parametrize("size", [1, 16, 64, 1000])
def test_batches_are_bounded_and_whole(size):
    rows = [[torch.arange(n), -torch.arange(n), torch.tensor(n)] for n in (3, 64, 0, 130, 16)]
    seen: dict[int, list[int]] = {int(scalar): [] for *_, scalar in rows}
    for ups, downs, scalars in narrow_state.batches(rows, size):
        assert sum(len(up) for up in ups) <= size
        for up, down, scalar in zip(ups, downs, scalars, strict=True):
            assert torch.equal(up, -down)
            seen[int(scalar)] += up.tolist()
    assert seen == {n: list(range(n)) for n in seen}


@pytest.mark.parametrize("limit", [1, 8, 100])
def test_whole_batches_hold_each_parameter_once(limit):
    sizes = [3, 64, 0, 5, 3, 8]
    cut = [sizes[batch] for batch in narrow_state.whole_batches(sizes, limit)]
    assert sum(cut, []) == sizes
    assert all(sum(part) <= limit or len([size for size in part if size]) == 1 for part in cut)
    if limit == 8:
        assert cut == [[3], [64], [0, 5, 3], [8]]


def test_deviation_from_fp32_moments_stays_within_what_rounding_adds_up_to():
    """A moment's error is at most beta times the one before and U of what is rounded, which is within U of what it
    becomes. An update is then at worst (|m| + error) / sqrt(v - error). fp32's own rounding is below 1e-6."""
    ours, theirs = nn.Parameter(torch.zeros(1000)), nn.Parameter(torch.zeros(1000))
    optimizer = build({"p": ours})
    reference = torch.optim.AdamW([theirs], 0.1, (0.9, 0.95), 1e-9, 0.0, fused=True)
    draw = torch.Generator().manual_seed(0)
    errors, betas, bound = dict.fromkeys(MOMENTS, torch.zeros(1000)), dict(zip(MOMENTS, (0.9, 0.95), strict=True)), 0.0
    for number in range(1, 41):
        ours.grad = torch.randn(1000, generator=draw)
        theirs.grad = ours.grad.clone()
        step(optimizer, number)
        reference.step()
        state, wide = optimizer.state[ours], reference.state[theirs]
        before = {key: betas[key] * errors[key] for key in MOMENTS}  # of the moments that the update saw
        average, square = (wide[key] / (1 - betas[key] ** number) for key in MOMENTS)
        off, below = (before[key] / (1 - betas[key] ** number) for key in MOMENTS)
        update = average.abs() / square.sqrt()
        bound = bound + 0.1 * ((average.abs() + off) / (square - below).sqrt() - update + 1e-6)
        assert ((ours - theirs).abs() <= bound).all()
        for key in MOMENTS:
            errors[key] = before[key] + U * state[key].float().abs() / (1 - U)
            assert ((state[key].float() - wide[key]).abs() <= errors[key] + 1e-7).all()
    assert (ours != theirs).float().mean() > 0.9, "nothing was rounded"


@pytest.mark.parametrize("beta", [0.9, 0.6])
def test_moments_do_not_stall(beta):
    """With no gradient they fall as in fp32, but for (1 + U) per rounding; with a steady one they rest near it."""
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = build({"p": parameter}, betas=(beta, 0.95))

    def follow(gradient, steps):
        for _ in range(steps):
            parameter.grad = torch.full((2,), gradient)
            step(optimizer)
        return (optimizer.state[parameter][key][0].item() for key in MOMENTS)

    for start in (0.0, 2.0):  # from below and from above
        follow(start, 100)
        average, square = follow(1.0, 300)
        assert average == pytest.approx(1, rel=U / (1 - beta))
        assert square == pytest.approx(1, rel=U / 0.05)
    average, square = follow(0.0, 100)
    assert average <= beta**100 * (1 + U) ** 100 * 1.08
    assert square <= 0.95**100 * (1 + U) ** 100 * 1.08


def test_tiny_second_moments_keep_their_size():
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = build({"p": parameter})
    parameter.grad = torch.tensor([1e-15, 1e-18, 1e15])
    step(optimizer)
    square = optimizer.state[parameter]["exp_avg_sq"].double()
    torch.testing.assert_close(square, 0.05 * parameter.grad.double() ** 2, rtol=U, atol=0)


def test_stochastic_rounding_takes_a_neighbour_and_keeps_the_mean():
    values = torch.tensor([1.0 + 2**-9, -(1.0 + 3 * 2**-10), 3e-30, 0.0, 1.5, math.inf, -math.inf, math.nan])
    rounding = StochasticRounding(seed=3)
    draws = values.repeat(20_000, 1)
    rounding(draws)
    assert torch.equal(draws.bfloat16().float().nan_to_num(), draws.nan_to_num()), "not numbers of bf16"
    spacing = torch.tensor([2**-7, 2**-7, 2.0 ** (math.floor(math.log2(3e-30)) - 7)])
    away = (draws[:, :3] - values[:3]) / spacing
    assert (away.abs() < 1).all() and (draws[:, :3].std(0) > 0).all()
    # The variance of one draw is at most a quarter of the spacing's square: five standard deviations of the mean.
    assert (away.mean(0).abs() < 5 * 0.5 / 20_000**0.5).all()
    assert torch.equal(draws[:, 3:7], values[3:7].expand(20_000, 4)) and draws[:, 7].isnan().all()


def test_stochastic_rounding_follows_seed_and_step():
    def rounded(seed, step):
        rounding, values = StochasticRounding(seed), torch.linspace(1, 2, 1000)
        rounding.begin(step)
        rounding(values)
        return values

    assert torch.equal(rounded(1, 5), rounded(1, 5))
    assert not torch.equal(rounded(1, 5), rounded(2, 5)) and not torch.equal(rounded(1, 5), rounded(1, 6))


@pytest.mark.parametrize("size", [64, 2**20])
def test_averages_that_nearest_cannot_lower_fall(monkeypatch, size):
    """Without gradients a second moment with beta2 0.999 falls by a factor of e in 1,000 steps. To nearest, it stays as it is."""
    monkeypatch.setitem(narrow_state.PIECE, "cpu", size)
    fallen = {}
    for name, rounding in (("nearest", None), ("stochastic", StochasticRounding(0))):
        parameter = nn.Parameter(torch.zeros(400))
        optimizer = build({"p": parameter}, betas=(0.9, 0.999), rounding=rounding)
        parameter.grad = torch.ones(400)
        step(optimizer)
        first = optimizer.state[parameter]["exp_avg_sq"].float().mean()
        parameter.grad = torch.zeros(400)
        for number in range(1, 1001):
            step(optimizer, number)
        fallen[name] = (optimizer.state[parameter]["exp_avg_sq"].float().mean() / first).item()
    assert fallen["nearest"] == 1
    # A step rounds a number x to a spacing s <= 2^-7 x, with a variance of p (1 - p) s^2 where p s = 0.001 x is the way to fall: at most
    # 0.001 * 2^-7 x^2. In 1,000 steps: below 0.0079 x^2, or 9 % of x; the mean of 400 deviates by 0.5 %. Five of these:
    assert fallen["stochastic"] == pytest.approx(0.999**1000, rel=0.025)


@pytest.mark.parametrize("rounding", [None, StochasticRounding(0)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(monkeypatch, bad, rounding):
    monkeypatch.setitem(narrow_state.PIECE, "cpu", 64)
    parameters = odd_parameters()
    optimizer = build(parameters, weight_decay=0.5, loss_driven=True, rounding=rounding)

    def update(number, finite, spoil):
        for parameter in parameters.values():
            parameter.grad = torch.full_like(parameter, spoil) if finite is ZERO else torch.randn_like(parameter)
        step(optimizer, number, finite)
        states = [state for parameter in parameters.values() for state in optimizer.state[parameter].values()]
        return [tensor.detach().clone() for tensor in (*parameters.values(), *states)]

    before = update(0, ONE, 0.0)
    after = update(1, ZERO, bad)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(after, update(2, ONE, 0.0), strict=True))


def test_half_the_memory():
    parameters = odd_parameters()
    optimizer = build(parameters)
    optimizer.allocate(parameters.values())
    held = sum(optimizer.state[p][key].nbytes for p in parameters.values() for key in MOMENTS)
    assert held == 4 * sum(p.numel() for p in parameters.values())


@pytest.fixture(scope="module")
def runs(tiny_dataset, tmp_path_factory):
    """State precision -> folder of an uninterrupted run of 12 steps."""
    folders = {}
    for kind in ("fp32", "bf16", "bf16_stochastic"):
        folders[kind] = tmp_path_factory.mktemp(kind) / "run"
        run(tiny_values(tiny_dataset, folders[kind], optim__state_precision=kind, checkpoint__keep=9))
    return folders


def test_a_run_learns_what_it_learns_with_fp32_moments(runs):
    """First moments and roots of second ones are within 4 %: updates are within 8 %, and so is what is learned."""
    losses_of = {kind: [row["loss"] for row in read_rows(folder / "metrics.jsonl")] for kind, folder in runs.items()}
    fp32 = losses_of.pop("fp32")
    assert losses_of["bf16"] != losses_of["bf16_stochastic"]
    for bf16 in losses_of.values():
        assert bf16 != fp32
        assert bf16 == pytest.approx(fp32, rel=0, abs=0.08 * (fp32[0] - fp32[-1]))


@pytest.mark.parametrize("kind, cut", [("bf16", 4), ("bf16", 8), ("bf16_stochastic", 4)])
def test_resume_is_bitwise(runs, tmp_path, kind, cut):
    folder = shutil.copytree(runs[kind], tmp_path / "r")
    for later in (8, 12):
        if later > cut:
            shutil.rmtree(folder / "checkpoints" / checkpoint.step_name(later))
    run({"run_dir": str(folder)})
    assert losses(folder) == losses(runs[kind])
    assert same(weights(folder, 12), weights(runs[kind], 12))
    kinds = {tensor.dtype for name, tensor in weights(folder, 12).items() if name.endswith(MOMENTS)}
    assert kinds == {torch.bfloat16}


@pytest.mark.parametrize("saved, loaded", [("fp32", "bf16"), ("bf16", "fp32")])
def test_moments_of_either_kind_can_be_loaded(runs, tiny_dataset, tmp_path, saved, loaded):
    there = weights(runs[saved], 12)
    engine = make(tiny_dataset, tmp_path / "r", optim__state_precision=loaded).engine
    engine.load(runs[saved] / "checkpoints" / checkpoint.step_name(12))
    for name, tensor in engine.tensors().items():
        assert torch.equal(tensor, there[name].to(tensor.dtype)), name
        if name.endswith(MOMENTS):
            assert tensor.dtype == (torch.bfloat16 if loaded == "bf16" else torch.float32)


def test_nothing_changes_for_bf16_weights(tiny_dataset, tmp_path):
    """Their moments are bf16 already, and the kernel rounds them itself."""
    asked, plain = (
        make(tiny_dataset, tmp_path / kind, precision="pure_bf16", optim__state_precision=kind)
        for kind in ("bf16", "auto")
    )
    for one in (asked, plain):
        assert not one.engine.optimizer.narrow, "copies for nothing"
        optimiser_step(one)
    assert same(asked.engine.tensors(), plain.engine.tensors())
