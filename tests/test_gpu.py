"""What only a GPU can show. Skipped, with the reason, where there is none."""

import pytest
import torch
from conftest import tiny_values

from trainer.config import RunConfig
from trainer.data.stream import find_dataset
from trainer.engine.distributed import World
from trainer.engine.signals import StopSignals
from trainer.engine.watchdog import Watchdog
from trainer.metrics.record import read_rows
from trainer.plan import resolve
from trainer.settings import build
from trainer.train import Run, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "pure_bf16"])
@pytest.mark.parametrize("model", ["hlb", "gpt2"])
def test_training_on_a_gpu_is_close_to_the_cpu(tiny_dataset, tmp_path, model, precision):
    losses = {}
    for device in ("cpu", "cuda"):
        folder = tmp_path / device
        run(tiny_values(tiny_dataset, folder, device=device, precision=precision, model={"name": model}, max_steps=4))
        losses[device] = [row["loss"] for row in read_rows(folder / "metrics.jsonl")]
    # TF32 keeps 10 bits, bf16 7: relative errors of 2^-10 and 2^-7 per product, carried on for four steps.
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.01 if precision == "fp32" else 0.05)


def test_no_host_sync_in_the_step(tiny_dataset, tmp_path):
    config = build(RunConfig, tiny_values(tiny_dataset, tmp_path / "r", device="cuda", precision="bf16"))
    info = find_dataset(config.data)
    one = Run(resolve(config, info), World(), info, Watchdog(World(), 60), StopSignals(World()))
    for _ in range(11):  # past sequence growth, so that kernels are built and shapes seen
        one.optimiser_step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):  # steps 11 to 14: the batch law looks at the norm in steps 10 and 15
            one.optimiser_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_resume_on_a_gpu(tiny_dataset, tmp_path):
    values = tiny_values(tiny_dataset, tmp_path / "r", device="cuda", max_steps=8)
    run(values)
    run({"run_dir": str(tmp_path / "r"), "max_steps": 12})
    assert [row["step"] for row in read_rows(tmp_path / "r" / "metrics.jsonl")] == list(range(1, 13))
