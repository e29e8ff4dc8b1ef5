"""`generate`: continues prompts with the model of a run."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

from trainer.commands import Verb, run_folder
from trainer.core.config import WEIGHTS, Precision
from trainer.core.errors import UserError
from trainer.core.settings import setting
from trainer.core.text import for_stream


@dataclass
class GenerateConfig:
    """`generate`: text from a run's checkpoint."""

    run_dir: str | None = setting(None, "folder of the run (the flag itself is optional)")
    step: int | None = setting(None, "checkpoint to use; auto: the newest good one", low=0)
    weights: str = setting("evaluation", WEIGHTS)
    prompt: list[str] = setting((), "text to continue; repeat the flag for a batch")
    max_new_tokens: int = setting(128, "tokens to add to each prompt", low=0)
    temperature: float = setting(1.0, "0: always the likeliest token", low=0)
    top_k: int = setting(0, "sample among the k likeliest; 0: off", low=0)
    top_p: float = setting(
        1.0, "sample among the likeliest that hold this share of probability; 1: off", above=0, high=1
    )
    stop: list[str] = setting((), "end a text where one of these strings appears; repeat the flag for several")
    seed: int = setting(0, "seed for sampling", low=0, high=2**62)
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where to compute")
    precision: Precision = setting("auto", "compute type; the weights do not change")


def run(config: GenerateConfig) -> None:
    """Run the verb: print each prompt with its continuation to stdout."""
    from trainer.inference.decoding import complete
    from trainer.runs.opening import open_run

    if "" in config.stop:
        raise UserError("stop: is empty; give a text of at least one character")
    opened = open_run(config.run_dir, config.step, config.device, config.precision, weights=config.weights)
    prompts = config.prompt or [opened.config.log.sample_prompt]
    texts = complete(
        opened,
        opened.tokenizer,
        prompts,
        config.max_new_tokens,
        config.stop,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
    )
    for prompt, text in zip(prompts, texts, strict=True):
        write(for_stream(prompt + text, sys.stdout) + "\n")
        if len(prompts) > 1:
            write("-" * 80 + "\n")


def write(text: str) -> None:
    """Write to stdout; characters that its encoding lacks become question marks."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))


VERB = Verb(
    name="generate",
    help="continue prompts with a run's model",
    config=GenerateConfig,
    run=run,
    alone=True,
    positional=run_folder,
)
