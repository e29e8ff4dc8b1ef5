"""The dial against hlb-gpt's table (every printed digit), its schedules and its batch law."""

import math

import pytest
import torch

from trainer.optim import schedules
from trainer.planning import dial
from trainer.recipes import hlb as hlb_laws

# scale: d, L, d_qk, C, B(32), B(1024), N, lr_base, lr, b, p, K, evaluation (batch, steps)
TABLE = """
0.5 256 5 32 64234 2007 62 27805189 1.24390e-3 3.25901e-3 8.10925 -0.383515 4.76601e8 3x50
1 384 8 48 57236 1788 55 46009736 9.64073e-4 2.52587e-3 7.22228 -0.381301 8.11813e8 3x50
2 640 13 80 47733 1491 46 97678093 6.67467e-4 1.74876e-3 6.11072 -0.378128 1.79700e9 2x75
4 896 19 112 36620 1144 35 185497107 4.93702e-4 1.29350e-3 5.32798 -0.375545 3.53160e9 2x75
8 1216 25 152 25689 802 25 353410969 3.68308e-4 9.64968e-4 4.66359 -0.373052 6.95624e9 1x150
16 1600 33 200 16621 519 16 689027233 2.74617e-4 7.19496e-4 4.08106 -0.370572 1.40222e10 1x150
32 1920 40 240 10103 315 9 1114846120 2.23570e-4 5.85753e-4 3.71686 -0.368844 2.32245e10 1x150
64 2304 48 288 5885 183 5 1824438576 1.82013e-4 4.76873e-4 3.38516 -0.367124 3.89053e10 1x150
148 2752 58 344 2957 92 2 3022430842 1.48145e-4 3.88140e-4 3.08274 -0.365410 6.59776e10 1x150
"""
ROWS = [line.split() for line in TABLE.split("\n") if line]


def digits(value: float, printed: str) -> str:
    """`value` with as many digits as `printed` has."""
    if "e" in printed:
        mantissa, exponent = f"{value:.{len(printed.split('e')[0].split('.')[1])}e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.{len(printed.split('.')[1])}f}"


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_whole_table(row):
    scale = float(row[0])
    d, n_layers = dial.dimensions(scale)
    tokens = hlb_laws.tokens_per_microbatch(scale)
    n = dial.target_parameters(scale, 50304)
    law = hlb_laws.GradNormLaw.of(n)
    batch, steps = hlb_laws.evaluation_shape(tokens)
    assert [d, n_layers, d // 8, tokens, tokens // 32, tokens // 1024, n] == [int(cell) for cell in row[1:8]]
    computed = [
        hlb_laws.base_learning_rate(n),
        hlb_laws.learning_rate(n),
        hlb_laws.weight_decay_base(n),
        law.exponent,
        law.step_scale,
    ]
    assert [digits(value, cell) for value, cell in zip(computed, row[8:13], strict=True)] == row[8:13]
    assert f"{batch}x{steps}" == row[13]


def test_hlb_and_the_dial_agree():
    """models/ knows nothing of trainer/, so the law stands in both."""
    from models.hlb import HlbConfig

    for scale in (0.01, 0.05, 0.3, 0.5, 1, 2, 3.7, 8, 32, 148):
        config = HlbConfig.for_scale(scale, 50304)
        assert (config.d_model, config.n_layers) == dial.dimensions(scale)


def test_rounding_is_bankers():
    # 8 log2(1 + s) = 2.5 exactly: Python's round gives 2, school rounding would give 3.
    assert dial.dimensions(2 ** (2.5 / 8) - 1)[1] == 2


@pytest.mark.parametrize(
    "loss, decay", [(10.82, 8.19e-9), (6, 1.13e-4), (4, 5.88e-3), (3.8, 8.73e-3), (3, 4.25e-2), (2, 0.307), (0, 16)]
)
def test_weight_decay_law(loss, decay):
    base = hlb_laws.weight_decay_base(46_009_736)
    # Printed with three digits.
    assert hlb_laws.weight_decay(torch.tensor(loss), base).item() == pytest.approx(decay, rel=5e-3)


def test_grad_norm_targets():
    law = hlb_laws.GradNormLaw.of(46_009_736)
    totals = {0: 15.73, 5: 1.470, 50: 0.6115, 100: 0.4695, 500: 0.2542, 1000: 0.1951}
    for step, printed in totals.items():
        assert math.sqrt(46_009_736) * law.target(step) == pytest.approx(printed, rel=5e-4)


def test_sequence_growth_and_its_tokens():
    tokens_per_step, seen, stages = 57_236, 0, {}
    for step in range(1000):
        t = schedules.sequence_length(step, 32, 1024, 80)
        stages.setdefault(t, [step, tokens_per_step // t])
        seen += t * (tokens_per_step // t)
    assert stages == {
        32: [0, 1788], 64: [81, 894], 128: [161, 447], 256: [241, 223], 512: [321, 111], 1024: [401, 55]
    }  # fmt: skip
    assert seen == 56_638_336
    assert schedules.sequence_lengths(32, 1024, 80) == list(stages)


def multiplier(**kwargs):
    law = hlb_laws.GradNormLaw.of(1000)
    return hlb_laws.BatchMultiplier(law, n_parameters=1000, seed=3, n_max=kwargs.pop("n_max", 1e9), **kwargs)


def norm_of_ratio(law, step, ratio):
    return ratio * math.sqrt(1000) * law.target(step)


def test_batch_multiplier_follows_the_recurrence():
    m = multiplier()
    expected, ratios = 0.0, {0: 2.0, 5: 3.0, 10: 1.0, 15: 0.0, 20: 3.0, 25: 3.0, 30: 3.0}
    for step in range(32):
        m.after_step(step, norm_of_ratio(m.law, step - 1, ratios.get(step - 1, 100.0)))
        if step - 1 in ratios:
            expected = max(0.1, expected * (1 + ratios[step - 1]) / 2)
        assert m.n == pytest.approx(expected, rel=1e-12)
        assert m.k in (max(1, math.floor(m.n)), max(1, math.floor(m.n) + 1))


def test_batch_multiplier_dithers_around_n():
    m = multiplier(n=2.3)
    draws = []
    for step in range(1, 20001):
        if step % 5:
            m.after_step(step, None)
            draws.append(m.k)
    # Bernoulli(0.3) over 16,000 draws: five standard errors of the mean.
    assert sum(draws) / len(draws) == pytest.approx(2.3, abs=5 * math.sqrt(0.3 * 0.7 / len(draws)))
    assert set(draws) == {2, 3}


@pytest.mark.parametrize("n", [0.1, 0.7, 1.0])
def test_one_quantum_at_least_and_no_more_below_one(n):
    m = multiplier(n=n)
    ks = set()
    for step in range(1, 200):
        if step % 5:
            m.after_step(step, None)
            ks.add(m.k)
    assert ks == {1}


def test_batch_multiplier_is_bounded_and_ignores_nan():
    m = multiplier(n=4.0, n_max=6.0)
    m.after_step(1, norm_of_ratio(m.law, 0, 100.0))
    assert m.n == 6.0
    m.after_step(6, float("nan"))
    assert m.n == 6.0


def test_draws_depend_on_seed_and_step_only():
    a, b = multiplier(n=2.5), multiplier(n=2.5)
    for step in range(1, 5):
        b.after_step(step, None)
    a.after_step(4, None)
    assert a.k == b.k


def test_capacity_follows_the_device():
    assert hlb_laws.device_token_capacity(40 * 1024**3)[0] == 114_688
    assert hlb_laws.device_token_capacity(80 * 1024**3)[0] == 229_376
    assert hlb_laws.device_token_capacity(None)[0] == hlb_laws.CPU_CAPACITY
