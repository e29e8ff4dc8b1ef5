"""`generate`: continues prompts with the model of a run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from trainer.commands import Verb, run_folder
from trainer.core.config import STEP, WEIGHTS, Precision, Step
from trainer.core.errors import UserError
from trainer.core.settings import setting
from trainer.core.text import for_stream


@dataclass
class GenerateConfig:
    """`generate`: text from a run's checkpoint."""

    run_dir: str | None = setting(None, "folder of the run (the flag itself is optional)")
    step: Step = setting(None, STEP, low=0)
    weights: str = setting("evaluation", WEIGHTS)
    prompt: list[str] = setting((), "text to continue; repeat the flag for a batch")
    chat: bool = setting(
        False, "a prompt is a message, put into the chat template of the run's data; the answer alone is printed"
    )
    max_new_tokens: int = setting(128, "tokens to add to each prompt", low=0)
    temperature: float = setting(1.0, "0: always the likeliest token", low=0)
    top_k: int = setting(0, "sample among the k likeliest; 0: off", low=0)
    top_p: float = setting(
        1.0, "sample among the likeliest that hold this share of probability; 1: off", above=0, high=1
    )
    min_p: float = setting(
        0.0, "sample among those at least so likely as this share of the likeliest; 0: off", low=0, high=1
    )
    repetition_penalty: float = setting(
        1.0, "above 1: a token that the text already holds becomes less likely (CTRL's rule); 1: off", above=0
    )
    samples: int = setting(1, "texts for each prompt", low=1)
    beams: int = setting(
        0, "beam search of this width instead of sampling, which prints `samples` of them; 0: off", low=0
    )
    draft: str | None = setting(
        None,
        "speculative decoding, which changes no text: folder of a smaller run with the same tokenizer, RUN or RUN@STEP, or mtp, "
        "the model's own heads for later tokens",
    )
    draft_tokens: int = setting(4, "draft: tokens that are drafted at a time, at most", low=1, high=64)
    compile: bool | None = setting(
        None,
        "compile a step of one token, as a CUDA graph on a GPU; it changes no text. auto: on a GPU for many new tokens, without draft",
    )
    length_penalty: float = setting(
        1.0, "beams: log-probabilities are divided by length^length_penalty; 0 favours short texts"
    )
    stop: list[str] = setting((), "end a text where one of these strings appears; repeat the flag for several")
    seed: int = setting(0, "seed for sampling", low=0, high=2**62)
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where to compute")
    precision: Precision = setting("auto", "compute type; the weights do not change")


def run(config: GenerateConfig) -> None:
    """Run the verb: print each prompt with its continuations to stdout, a single one as it is written; its speed to stderr."""
    from trainer.inference.speculative import Account
    from trainer.runs.opening import open_run

    check(config)
    opened = open_run(config.run_dir, config.step, config.device, config.precision, weights=config.weights)
    draft = open_draft(config, opened)
    prompts = messages(config, opened) if config.chat else config.prompt or [opened.config.log.sample_prompt]
    if config.beams:
        search(config, opened, prompts)
        return
    texts = [prompt for prompt in prompts for _ in range(config.samples)]
    single = len(texts) == 1
    if single:
        write(for_stream(printed(config, texts[0]), sys.stdout))
    begin, account = time.perf_counter(), Account()
    found = continuations(config, opened, draft, texts, show if single else None, account)
    seconds = time.perf_counter() - begin
    if single:
        write("\n")
    else:
        write_all([printed(config, prompt) + text for prompt, text in zip(texts, found, strict=True)])
    print(f"{account.tokens:,} tokens in {seconds:.1f} s: {account.tokens / seconds:.0f} tokens/s", file=sys.stderr)
    if draft is not None:
        print(account.line(), file=sys.stderr)


def check(config: GenerateConfig) -> None:
    """UserError for keys that do not go together."""
    if config.chat and not config.prompt:
        raise UserError("prompt: --chat answers a message; give one")
    if "" in config.stop:
        raise UserError("stop: is empty; give a text of at least one character")
    if not config.beams and config.length_penalty != 1:
        raise UserError("length_penalty: is for beam search; give --beams too")
    if config.draft is None and config.draft_tokens != 4:
        raise UserError("draft_tokens: is for speculative decoding; give --draft too")
    if config.compile and (config.beams or config.draft is not None):
        raise UserError("compile: is for sampling one token at a time; leave it out, or --draft and --beams")
    if not config.beams:
        return
    if config.draft is not None:
        raise UserError("draft: speculative decoding samples; leave it out, or --beams")
    sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0}
    changed = [key for key, default in sampling.items() if getattr(config, key) != default]
    if changed:
        raise UserError(f"{changed[0]}: beam search draws nothing at random; leave it out, or --beams")
    if config.samples > config.beams:
        raise UserError(f"samples: {config.samples} are more than the {config.beams} beams; raise --beams")


def open_draft(config: GenerateConfig, opened: Any) -> Any:
    """What drafts for the model, see `generate` in trainer/inference/decoding.py. UserError if it cannot."""
    from trainer.checkpoint.quantized import is_quantized
    from trainer.core.files import user_path
    from trainer.inference.decoding import FURTHER_HEADS
    from trainer.planning.run_config import branch_point
    from trainer.runs.opening import open_run

    if config.draft is None:
        return None
    if config.draft == FURTHER_HEADS:
        if getattr(opened.model.config, "n_predict", 1) < 2:
            name = opened.config.model["name"]
            raise UserError(
                f"draft: mtp: this {name} has no heads for later tokens (model.n_predict); name a smaller run"
            )
        return FURTHER_HEADS
    quantized = is_quantized(user_path(config.draft, "draft"))
    folder, step = (config.draft, None) if quantized else branch_point(config.draft, "draft")
    draft = open_run(str(folder), step, config.device, config.precision)
    if draft.tokenizer.sha256 != opened.tokenizer.sha256:
        raise UserError(
            f"draft: {draft.folder} uses tokenizer {draft.tokenizer.name}, but the run uses {opened.tokenizer.name}; both must be "
            "trained with the same one"
        )
    return draft


def continuations(
    config: GenerateConfig,
    opened: Any,
    draft: Any,
    prompts: list[str],
    show: Callable[[str], None] | None,
    account: Any,
) -> list[str]:
    """A sampled continuation of each prompt. draft, account: see `generate` in trainer/inference/decoding.py; show: see `complete`."""
    from trainer.inference.decoding import complete

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "draft_tokens")
    options = {name: getattr(config, name) for name in names} | {"draft": draft, "account": account}
    options["compiles"] = compiles(config, opened.device.type)
    return complete(opened, opened.tokenizer, prompts, config.max_new_tokens, config.stop, show=show, **options)


def compiles(config: GenerateConfig, device_type: str) -> bool:
    """Whether steps are compiled."""
    from trainer.inference.compiled import COMPILED_FROM

    if config.compile is None:
        return device_type == "cuda" and config.draft is None and config.max_new_tokens >= COMPILED_FROM
    return config.compile


def search(config: GenerateConfig, opened: Any, prompts: list[str]) -> None:
    """Print the best beams of each prompt, each with its score."""
    from trainer.inference.beam import beam_search
    from trainer.inference.decoding import continuation, cut_at, encode_prompt

    tokenizer, texts = opened.tokenizer, []
    for prompt in prompts:
        ids = encode_prompt(tokenizer, prompt)
        found = beam_search(
            opened,
            ids,
            config.max_new_tokens,
            tokenizer.vocab_size,
            config.beams,
            length_penalty=config.length_penalty,
            repetition_penalty=config.repetition_penalty,
            end=tokenizer.eot_id,
        )
        texts += [
            printed(config, prompt) + cut_at(continuation(tokenizer, ids, beam.tokens), config.stop)
            for beam in found[: config.samples]
        ]
    write_all(texts)


def messages(config: GenerateConfig, opened: Any) -> list[str]:
    """The prompts as messages of a user, in the chat template of the run's data. UserError if these have none."""
    from trainer.data.dataset import DatasetInfo
    from trainer.data.records import conversations_of

    conversations = conversations_of(DatasetInfo.load(opened.folder), f"chat: {opened.folder}")
    return [conversations.prompt(prompt) for prompt in config.prompt]


def printed(config: GenerateConfig, prompt: str) -> str:
    """What is printed before a continuation."""
    return "" if config.chat else prompt


def show(text: str) -> None:
    """Write a piece of a text to the terminal at once."""
    write(for_stream(text, sys.stdout))
    sys.stdout.flush()


def write_all(texts: list[str]) -> None:
    """Write texts to stdout, with a line between several."""
    for text in texts:
        write(for_stream(text, sys.stdout) + "\n")
        if len(texts) > 1:
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
