"""log.noise_scale on every strategy that has it: there a step sums the gradient over the ranks twice."""

import pytest
from cases import matrix_values, train_cases

pytestmark = pytest.mark.slow

SAME = 3e-5  # as in test_matrix.py


def cases(dataset, folder, *strategies, **changes):
    """Steps of 512 tokens."""
    changes |= {"log__noise_scale": True}
    values = {name: matrix_values(dataset, folder / name[:4], "gpt2", name, **changes) for name in strategies}
    return [{"name": name, "values": value, "steps": 4} for name, value in values.items()]


def magnified(noise_scale: float) -> float:
    """Relative error of tr(Sigma) / |G|^2 from the two norms, which are off by SAME. With x = |g_b|^2 / |g_B|^2, b = B / 2, it is
    B (x - 1) / (2 - x), so x - 1 = noise_scale / (B + noise_scale); by chance x may be less than 1."""
    x = 1 + noise_scale / (512 + noise_scale)
    return 4 * SAME * x * abs(1 / (x - 1) + 1 / (2 - x))


@pytest.mark.parametrize(
    "ranks, strategies", [(2, ("ddp", "fsdp", "zero0")), pytest.param(4, ("ddp", "hsdp:2"), marks=pytest.mark.nightly)]
)
def test_it_is_that_of_one_process(tiny_dataset, tmp_path, ranks, strategies):
    """With the same sequences in the first half of each step."""
    [single] = cases(tiny_dataset, tmp_path / "alone", "single", batch__tokens_per_microbatch=128)
    alone = train_cases([{**single, "halves_of": ranks}], 1, tmp_path / "alone")["single"]
    for strategy, result in train_cases(cases(tiny_dataset, tmp_path, *strategies), ranks, tmp_path).items():
        assert result["microbatches"] == [2] * 4, "of a share in one microbatch, the key makes two"
        for key in ("loss", "grad_norm"):
            assert result[key] == pytest.approx(alone[key], rel=SAME), (strategy, key)
        error = max(map(magnified, alone["noise_scale"]))
        assert error < 0.1 and result["noise_scale"] == pytest.approx(alone["noise_scale"], rel=error), strategy
