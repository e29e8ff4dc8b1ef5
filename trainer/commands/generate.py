"""`generate`: prompts continued by the model of a run."""

from __future__ import annotations

import sys

from trainer.core.config import GenerateConfig
from trainer.core.errors import UserError
from trainer.core.text import for_stream
from trainer.inference.decoding import complete


def run(config: GenerateConfig) -> None:
    """The verb: print each prompt with its continuation to stdout."""
    from trainer.runs.opening import open_run

    if "" in config.stop:
        raise UserError("stop: is empty; every text holds the empty string")
    opened = open_run(config.run_dir, config.step, config.device, config.precision)
    prompts = config.prompt or [opened.plan.config.log.sample_prompt]
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
    """To stdout; what its encoding has no characters for becomes question marks."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
