"""Rows of documents on several ranks, whose batches hold different shares of padding: the steps are those of one process."""

import pytest
from cases import matrix_values, train_cases

from trainer.core.config import PrepareConfig
from trainer.data.prepare import prepare

pytestmark = pytest.mark.slow

SAME = 3e-5  # as in test_matrix.py


def cases(dataset, folder, *strategies):
    """Steps of 7 rows of up to 64 tokens, so that ranks have different numbers of rows."""
    rows = {"batch": {"tokens_per_step": 448, "tokens_per_microbatch": 128, "sequence_length": 64}}
    return [
        {
            "name": f"{packing} {strategy}",
            "values": matrix_values(
                dataset, folder / packing, "gpt2", strategy, **rows,
                data={"path": str(dataset), "packing": packing, "separate_documents": packing == "best_fit"},
            ),
            "steps": 4,
        }
        for packing in ("best_fit", "none")
        for strategy in strategies
    ]  # fmt: skip


def test_ranks_train_as_one_process(tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        "".join(f'{{"text": "{"word " * (1 + i % 9)}{i}"}}\n' for i in range(200)), encoding="utf-8"
    )
    values = {"source": str(tmp_path / "rows.jsonl"), "tokenizer": "bytes", "sample_length": 64, "workers": 1}
    dataset = tmp_path / "data"
    prepare(PrepareConfig(**values, out=str(dataset)), lambda line: None)
    alone = train_cases(cases(dataset, tmp_path / "alone", "single"), 1, tmp_path / "alone")
    for name, result in train_cases(cases(dataset, tmp_path, "ddp", "fsdp"), 2, tmp_path).items():
        packing, _ = name.split()
        for key in ("loss", "grad_norm"):
            assert result[key] == pytest.approx(alone[f"{packing} single"][key], rel=SAME), (name, key)
