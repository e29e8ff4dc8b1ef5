"""The cost of optimizers at the shape of GPT-2 124M, by hand: CPU seconds of a process with one thread, which other processes
disturb little.

    OMP_NUM_THREADS=1 python tests/optim/cost.py adamw muon soap

One microbatch is computed forward and backward; its gradients serve all rules. A step that turns SOAP's basis is measured for itself
and counts 1 / frequency. The first step, in which SOAP makes its basis by eigh, is left out.
"""

import contextlib
import os
import sys
import time

import torch

from models.base import load_models
from trainer.core.config import RunConfig
from trainer.core.settings import build
from trainer.engine import build_engine
from trainer.planning.plan import resolve
from trainer.runtime.distributed import World

TOKENS = 2048


def engine_of(rule: str):
    values = {
        "model": {"name": "gpt2", "d_model": 768, "n_layers": 12, "n_heads": 12, "vocab_size": 50304},
        "batch": {"sequence_length": 1024, "tokens_per_step": TOKENS, "tokens_per_microbatch": TOKENS},
        "optim": {"name": rule},
        "engine": {"strategy": "single", "compile": False, "activation_checkpointing": "none"},
        "device": "cpu",
        "precision": "fp32",
        "data": {"tokenizer": "gpt2"},
    }
    return contextlib.closing(build_engine(resolve(build(RunConfig, values), world=World()), World()))


def seconds(function, *arguments) -> float:
    begin = time.process_time()
    function(*arguments)
    return time.process_time() - begin


def step(engine, number: int) -> None:
    engine.optimizer.prepare(number, torch.tensor(1.0))
    engine.optimizer.step()


def main() -> None:
    load_models()
    torch.set_num_threads(1)
    gradients: dict[str, torch.Tensor] = {}
    computing = 0.0
    for rule in sys.argv[1:]:
        with engine_of(rule) as engine:
            if not gradients:
                tokens = torch.randint(0, 50257, (TOKENS // 1024, 1024))
                computing = seconds(engine.backward, {"tokens": tokens, "targets": tokens}, 1 / TOKENS, True)
                gradients = {name: parameter.grad.clone() for name, parameter in engine.local.items()}
                print(
                    f"load {os.getloadavg()[0]:.1f}; forward and backward of {TOKENS} tokens {computing:.1f} s",
                    flush=True,
                )
            for name, parameter in engine.local.items():
                parameter.grad = gradients[name]
            config = engine.optimizer.param_groups[0]["config"]
            frequency = getattr(config, "frequency", 1)
            step(engine, frequency + 1 if frequency > 1 else 1)  # allocates
            plain = seconds(step, engine, frequency + 1)
            turning = seconds(step, engine, 2 * frequency) if frequency > 1 else plain
            mean = plain + (turning - plain) / frequency
            state = sum(value.nbytes for held in engine.optimizer.state.values() for value in held.values())
            numbers = sum(shape.numel() for shape in engine.shapes.values())
            print(
                f"{rule:<10} step {mean:6.2f} s (plain {plain:.2f}, turning {turning:.2f}), {state / numbers:.1f} bytes a parameter, "
                f"load {os.getloadavg()[0]:.1f}", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
