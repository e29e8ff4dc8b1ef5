"""Text from a model: incremental decoding with a cache, a batch of prompts at a time."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from models.base import Cache
from trainer.config import GenerateConfig
from trainer.errors import UserError
from trainer.text import for_stream


@torch.no_grad()
def generate(
    runner: Any,
    prompts: list[list[int]],
    max_new_tokens: int,
    vocab_size: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    end: int | None = None,
    stopped: Any = None,
) -> list[list[int]]:
    """Continue each prompt (token ids, at least one each) by up to `max_new_tokens`; returns the new tokens only.

    runner: has model, device, autocast() and agree(), as an engine does. vocab_size: ids from here on are padding and never sampled.
    end: id that ends a text (not returned). stopped(new_tokens) -> bool: ends a text after a token.
    Prompts of different length share a batch without padding: a longer one goes on reading while a shorter one already
    writes. Each text has its own generator, so it does not depend on the others in the batch.
    """
    model, device = runner.model, runner.device
    training = model.training
    model.eval()
    draws = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    new: list[list[int]] = [[] for _ in prompts]
    done = [max_new_tokens == 0 for _ in prompts]
    shortest = min(len(prompt) for prompt in prompts)
    cache = Cache()
    column = torch.tensor([prompt[:shortest] for prompt in prompts], device=device)  # [B, shortest], then [B, 1]
    at = shortest
    while not all(done):
        with runner.autocast():
            logits = model(column, cache=cache).logits[:, -1].float().cpu()  # [B, V]
        following = [
            prompt[at] if at < len(prompt) else sample(logits[i, :vocab_size], temperature, top_k, top_p, draws[i])
            for i, prompt in enumerate(prompts)
        ]
        following = runner.agree(following)
        for i, token in enumerate(following):
            if done[i] or at < len(prompts[i]):
                continue
            if token == end:
                done[i] = True
                continue
            new[i].append(token)
            done[i] = len(new[i]) >= max_new_tokens or (stopped is not None and stopped(new[i]))
        column = torch.tensor(following, device=device)[:, None]
        at += 1
    model.train(training)
    return new


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, draw: torch.Generator) -> int:
    """One token from logits [V]: the likeliest at temperature 0, else among the top_k and the nucleus of top_p."""
    if temperature < 1e-5:  # as good as 0, and logits / temperature would overflow
        return int(logits.argmax())
    logits = logits / temperature
    if 0 < top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], float("-inf"))
    probabilities = logits.softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p  # the token that crosses top_p stays in
        probabilities[order[outside]] = 0
    return int(torch.multinomial(probabilities, 1, generator=draw))


def cut_at(text: str, stops: list[str]) -> str:
    """`text` up to the first of the stop strings."""
    return text[: min([text.find(stop) for stop in stops if stop in text], default=len(text))]


def complete(
    runner: Any, tokenizer: Any, prompts: list[str], max_new_tokens: int, stop: list[str], **options: Any
) -> list[str]:
    """Continuations of text prompts. An empty prompt starts as a document does, after an end-of-text token."""
    try:
        encoded = [tokenizer.encode(prompt).tolist() or [tokenizer.eot_id] for prompt in prompts]
    except UnicodeError:
        raise UserError("prompt: is not valid UTF-8 text") from None
    limit = runner.model.max_context
    longest = max(len(ids) for ids in encoded)
    if limit is not None and longest + max_new_tokens > limit:
        raise UserError(
            f"max_new_tokens: a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's context of {limit}"
        )

    def stopped(ids: list[int]) -> bool:
        return bool(stop) and any(text in tokenizer.decode(ids) for text in stop)

    new = generate(
        runner, encoded, max_new_tokens, tokenizer.vocab_size, end=tokenizer.eot_id, stopped=stopped, **options
    )
    return [cut_at(tokenizer.decode(ids), stop) for ids in new]


def run(config: GenerateConfig) -> None:
    """The verb: print each prompt with its continuation to stdout."""
    from trainer.run_folder import open_run

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
        sys.stdout.write(for_stream(prompt + text, sys.stdout) + "\n")
        if len(prompts) > 1:
            sys.stdout.write("-" * 80 + "\n")
