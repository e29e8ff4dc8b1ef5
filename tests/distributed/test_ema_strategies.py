"""The moving average of the weights where ranks hold parts of it, and how it moves between strategies and numbers of processes."""

import itertools
from pathlib import Path

import pytest
import torch
from cases import matrix_values, train_cases
from conftest import WHOLE

from trainer.checkpoint import format as checkpoint
from trainer.runtime.distributed import World

pytestmark = pytest.mark.slow

SAME = 3e-5  # as in test_matrix.py
STRATEGIES = ("ddp", "fsdp", "hsdp:2", "zero0", "zero1", "zero2", "zero3")
# zero1 to zero3: the average of flat vectors; ngpt: projected before it is evaluated, in columns and rows; muon: owners of matrices.
SAMPLE = {("gpt2", "zero1"), ("ngpt", "fsdp"), ("ngpt", "zero3"), ("muon", "fsdp"), ("muon", "zero2")}


def case(dataset, folder: Path, kind: str, strategy: str, name: str = "", **more) -> dict:
    model, rule = ("gpt2", "muon") if kind == "muon" else (kind, "adamw")
    changes = {"optim__ema": 0.5, "optim__name": rule, "optim__lr": 3e-3, "evaluation__max_tokens": 512}
    values = matrix_values(dataset, folder, model, strategy, **changes)
    values["engine"]["offload"] = more.pop("offload", False)
    return {"name": name or f"{kind} {strategy}", "values": values, "steps": 3, "averages": True, **more}


def averages(folder: Path, step: int) -> dict[str, torch.Tensor]:
    tensors = checkpoint.load(folder / "checkpoints" / checkpoint.step_name(step), "", World())
    return {name: tensor for name, tensor in tensors.items() if name.startswith("ema")}


@pytest.mark.parametrize("whole", WHOLE)
def test_every_strategy_averages_what_one_process_does(tiny_dataset, tmp_path, whole):
    """The losses of six steps, and of the average after three and six of them: once in one go, once from another strategy's save.
    An evaluation lies between, so what is trained on afterwards are the trained weights again."""
    alone = train_cases(
        [case(tiny_dataset, tmp_path / "r", kind, "single", steps=6) for kind in ("gpt2", "ngpt", "muon")], 1, tmp_path
    )
    pairs = list(itertools.product(("gpt2", "ngpt", "muon"), STRATEGIES)) if whole else sorted(SAMPLE)
    folders = {pair: tmp_path / "-".join(pair).replace(":", "-") for pair in pairs}
    begun = [case(tiny_dataset, folders[p], *p, save=str(folders[p])) for p in pairs]
    swapped = {pairs[i]: next(p for p in (*pairs[i + 1 :], *pairs) if p[0] == pairs[i][0]) for i in range(len(pairs))}
    then = [
        case(
            tiny_dataset, tmp_path / "r", *pair, name=f"{pair[0]} {pair[1]} from {source[1]}", load=str(folders[source])
        )
        for pair, source in swapped.items()
    ]
    results = train_cases([*begun, *then], 2, tmp_path)
    for name, result in results.items():
        kind, strategy, *path = name.split()
        first = 3 if path else 0
        expected = alone[f"{kind} single"]
        for key in ("loss", "average"):
            assert result[key] == pytest.approx(expected[key][first : first + 3], rel=SAME), (name, key)
    for kind, result in ((kind, alone[f"{kind} single"]) for kind in ("gpt2", "ngpt", "muon")):
        assert all(a != b for a, b in zip(result["average"], result["loss"], strict=True)), kind
    reference = averages(folders[pairs[0]], 3)
    assert all(averages(folders[p], 3).keys() == reference.keys() for p in pairs if p[0] == pairs[0][0])


def test_an_offloaded_average(tiny_dataset, tmp_path):
    strategies = ("fsdp", "zero3")
    alone = train_cases([case(tiny_dataset, tmp_path / "r", "gpt2", "single")], 1, tmp_path)["gpt2 single"]
    cases = [case(tiny_dataset, tmp_path / s, "gpt2", s, offload=True, save=str(tmp_path / s)) for s in strategies]
    for name, result in train_cases(cases, 2, tmp_path).items():
        for key in ("loss", "average"):
            assert result[key] == pytest.approx(alone[key], rel=SAME), (name, key)
    for strategy in strategies:  # Adam's steps turn where a gradient is near zero: the first one by lr at most
        for name, tensor in averages(tmp_path / strategy, 3).items():
            torch.testing.assert_close(tensor, averages(tmp_path / "fsdp", 3)[name], rtol=1e-4, atol=1e-4)


def test_in_low_precision_the_average_is_fp32(tiny_dataset, tmp_path):
    kinds = [("fsdp", "pure_bf16"), ("fsdp", "bf16"), ("zero3", "bf16")]
    cases = []
    for strategy, precision in kinds:
        folder = tmp_path / f"{strategy}-{precision}"
        one = case(tiny_dataset, folder, "gpt2", strategy, name=folder.name, save=str(folder))
        one["values"]["precision"] = precision
        cases.append(one)
    for name, result in train_cases(cases, 2, tmp_path).items():
        assert result["average"] == pytest.approx(result["loss"], rel=0.1) and result["average"] != result["loss"], name
        found = averages(tmp_path / name, 3)
        assert {tensor.dtype for tensor in found.values()} == {torch.float32}
        rounded = [torch.equal(t, t.bfloat16().float()) for t in found.values() if t.ndim == 2]
        assert not any(rounded), "the average is rounded like the weights"
