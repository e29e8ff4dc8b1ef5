"""LoRA on a base in 4 bits with several ranks: each holds it whole, trains as one process does, and goes on from any other's checkpoint."""

from pathlib import Path

import pytest
import torch
from cases import matrix_values, train_cases
from conftest import WHOLE, tiny_values
from test_lora_strategies import GPT2, SAME, WORLD, six_steps

from trainer.checkpoint import format as checkpoint
from trainer.commands.train import run
from trainer.planning.parent import with_origin

pytestmark = pytest.mark.slow

STRATEGIES = ("ddp", "fsdp", "hsdp:1", "zero0")
SAMPLE = ("ddp", "fsdp")


def case(dataset, folder: Path, parent: Path, strategy: str, name: str = "", **more) -> dict:
    changes = {"init_from": str(parent), "optim__ema": 0.5, "evaluation__max_tokens": 128}
    values = matrix_values(dataset, folder, "gpt2", strategy, **changes)
    values["model"] = {"lora_rank": 4, "lora_base": "nf4"}
    del values["model_scale"]
    whole = with_origin(values, None, 2, WORLD.say)
    return {"name": name or strategy, "values": whole, "steps": 3, "averages": True, **more}


@pytest.mark.parametrize("whole", WHOLE)
def test_every_strategy_trains_as_one_process(tiny_dataset, tmp_path, whole):
    """Three steps, and three more from another strategy's checkpoint; on one process, six at once."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (the extra quantize)")
    parent = tmp_path / "parent"
    run(tiny_values(tiny_dataset, parent, model=GPT2, max_steps=3, optim={"lr": 1e-2}))
    strategies = STRATEGIES if whole else SAMPLE
    alone = six_steps(case(tiny_dataset, tmp_path / "r", parent, "single")["values"])
    begun = [case(tiny_dataset, tmp_path / s, parent, s, save=str(tmp_path / s)) for s in strategies]
    sources = dict(zip(strategies, (*strategies[1:], strategies[0]), strict=True))
    then = [
        case(tiny_dataset, tmp_path / "r", parent, s, f"{s} on", load=str(tmp_path / source))
        for s, source in sources.items()
    ]
    for name, result in train_cases([*begun, *then], 2, tmp_path).items():
        first = 3 if name.endswith(" on") else 0
        for key in ("loss", "grad_norm", "average"):
            assert result[key] == pytest.approx(alone[key][first : first + 3], rel=SAME), (name, key)
    saved = [
        checkpoint.load(tmp_path / s / "checkpoints" / checkpoint.step_name(3), "model.", WORLD) for s in strategies
    ]
    packed = [name for name in saved[0] if name.endswith(".packed")]
    assert len(packed) == 8
    for name in packed:
        assert all(torch.equal(saved[0][name], other[name]) for other in saved[1:]), name
