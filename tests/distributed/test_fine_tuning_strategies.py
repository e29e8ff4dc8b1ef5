"""Fine-tuning on answers and on pairs takes the same steps on every strategy, on one and two ranks."""

import json

import pytest
from cases import matrix_values, train_cases
from conftest import WHOLE, tiny_values

from trainer.commands.train import run
from trainer.core.config import PrepareConfig
from trainer.data.prepare import prepare

pytestmark = pytest.mark.slow

SAME = 3e-5  # as in test_matrix.py
STRATEGIES = ("ddp", "fsdp", "zero2", "zero3")
SAMPLE = ("fsdp",)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Answers and pairs of many lengths; every batch has another number of targets."""
    found = {}
    for records in ("chat", "preference"):
        folder = tmp_path_factory.mktemp(records)
        rows = [
            {"prompt": "p" * (1 + i % 7), "completion": "c" * (1 + i % 5), "chosen": f"{i} yes", "rejected": "no" * i}
            for i in range(1, 25)
        ]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = {"tokenizer": "bytes", "workers": 1, "sample_length": 64, "records": records}
        found[records] = folder / "data"
        prepare(PrepareConfig(source=str(folder / "rows.jsonl"), out=str(found[records]), **options), lambda line: None)
    return found


@pytest.fixture(scope="module")
def reference(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference") / "run"
    model = {"name": "gpt2", "n_layers": 1, "d_model": 16, "n_heads": 2}
    run(
        tiny_values(data["chat"], folder, model=model, objective={"name": "sft"}, max_steps=1, batch__sequence_start=64)
    )
    return folder


@pytest.mark.parametrize("whole", WHOLE)
def test_every_strategy_takes_the_same_steps(data, reference, tmp_path, whole):
    kinds = {"sft": ("chat", {}), "dpo": ("preference", {"reference": str(reference)})}

    def case(name, strategy):
        records, options = kinds[name]
        changes = {"objective": {"name": name, **options}, "batch__sequence_start": 64}
        folder = tmp_path / f"{name}-{strategy}"
        return {
            "name": f"{name} {strategy}",
            "values": matrix_values(data[records], folder, "gpt2", strategy, **changes),
            "steps": 3,
        }

    alone = train_cases([case(name, "single") for name in kinds], 1, tmp_path)
    strategies = STRATEGIES if whole else SAMPLE
    for name, result in train_cases([case(n, s) for n in kinds for s in strategies], 2, tmp_path).items():
        expected = alone[f"{name.split()[0]} single"]
        for key in ("loss", "grad_norm"):
            assert result[key] == pytest.approx(expected[key], rel=SAME), (name, key)
