"""The run's own model as a model of lm-eval (EleutherAI's evaluation harness), which the extra `lm-eval` installs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from trainer.core.errors import UserError
from trainer.core.text import printable
from trainer.inference.decoding import continuation, cut_at, generate
from trainer.inference.tasks.scoring import LogLikelihood, Request, check_fits, log_likelihoods
from trainer.runtime.distributed import World

NEW_TOKENS = 256  # of a text, where the task does not say
GENERATED_AT_ONCE = 16  # texts of a batch


class LiveModel(TemplateLM):
    """Answers lm-eval's requests as its HFLM does: a context and its continuation are tokenised together, what is too long loses
    its beginning, and an empty context is an end-of-text token.

    lm-eval sees one process on every rank, which asks everything; the ranks divide the work among them.
    """

    def __init__(
        self, runner: Any, tokenizer: Any, length: int, world: World, at: Callable[[str], None] = lambda where: None
    ) -> None:
        """runner, at: as in evaluation.full; tokenizer: the run's own; length: most tokens that the model reads at once."""
        super().__init__()
        self.runner, self.text, self.length, self.world, self.at = runner, tokenizer, length, world, at

    @property
    def eot_token_id(self) -> int:
        return self.text.eot_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.text.encode(string).tolist()

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return self._loglikelihood_tokens([(one.args, *self.encoded(*one.args)) for one in requests])

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> Any:
        pairs: list[Request] = [(context, answer) for _, context, answer in requests]
        return log_likelihoods(self.runner, pairs, self.length, self.world, self.at)

    def encoded(self, context: str, answer: str) -> Request:
        """The tokens of a context and of its continuation. UserError if the tokenizer has none for the latter."""
        start = [self.prefix_token_id]
        before, after = self._encode_pair(context, answer) if context else (start, self.tok_encode(answer))
        if not after:
            raise UserError(
                f"tasks: the run's tokenizer has no tokens for the continuation {printable(repr(answer), 80)}"
            )
        return before or start, after

    def check(self, request: Any) -> None:
        """UserError if the model cannot answer a request, because of its tokenizer or its context."""
        if request.request_type == "generate_until":
            self.generation(*request.args)
        elif request.request_type == "loglikelihood":
            check_fits(self.encoded(*request.args), self.length)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        """The log-likelihood of each whole text, in windows: each token is predicted once."""
        windows: list[Request] = []
        counts = []
        for (text,) in (one.args for one in requests):
            parts = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.length, context_len=1)
            found = [make_disjoint_window(part) for part in parts]
            windows += found
            counts.append(len(found))
        answers = iter(log_likelihoods(self.runner, windows, self.length, self.world, self.at))
        sums = [[next(answers)[0] for _ in range(count)] for count in counts]
        return [LogLikelihood(sum(parts), sum(part.tokens for part in parts)) for parts in sums]

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """Texts up to the first of the task's stop strings: greedy ones, or at the task's temperature."""
        asked = [self.generation(*one.args) for one in requests]
        # Texts that are made together should be of similar length and have the same settings.
        order = sorted(range(len(asked)), key=lambda i: (repr(asked[i][1:]), -len(asked[i][0]), i))
        groups: list[list[int]] = []
        for i in order:
            same = groups and asked[groups[-1][0]][1:] == asked[i][1:] and len(groups[-1]) < GENERATED_AT_ONCE
            groups[-1].append(i) if same else groups.append([i])
        # Ranks that hold a part of the model make each text together; others take groups in turn.
        together = getattr(self.runner, "lockstep", False)
        rank, size = (0, 1) if together else (self.world.rank, self.world.size)
        texts: dict[int, str] = {}
        for number in range(rank, -(-len(groups) // size) * size, size):
            self.at(f"tasks, texts {number} of {len(groups)}")
            for i, text in self.texts(groups[number], asked) if number < len(groups) else ():
                texts[i] = text
        for other in self.world.gather(texts):
            texts |= other
        return [texts[i] for i in range(len(asked))]

    def generation(self, context: str, options: dict[str, Any]) -> tuple[list[int], list[str], int, float]:
        """(prompt, stop strings, most new tokens, temperature) of a request."""
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        most = int(next((options[name] for name in names if options.get(name) is not None), NEW_TOKENS))
        if most >= self.length:
            raise UserError(
                f"evaluation.sequence_length: {self.length} tokens are too few for the tasks: an answer has up to {most}; "
                "raise it, or choose other tasks"
            )
        prompt = self.tok_encode(context)[-(self.length - most) :] or [self.prefix_token_id]
        sampled = options.get("do_sample", True) and float(options.get("temperature") or 0)
        return prompt, [stop for stop in stops if stop], most, float(sampled)

    def texts(self, group: list[int], asked: list[Any]) -> list[tuple[int, str]]:
        """(number of the request, its text) of a group with the same settings."""
        prompts = [asked[i][0] for i in group]
        _, stops, most, temperature = asked[group[0]]

        def stopped(row: int, new: list[int]) -> bool:
            text = continuation(self.text, prompts[row], new)
            return any(stop in text for stop in stops)

        new = generate(
            self.runner,
            prompts,
            most,
            self.text.vocab_size,
            seed=group[0],
            end=self.eot_token_id,
            stopped=stopped,
            say=self.world.say,
            temperature=temperature,
        )
        made = (continuation(self.text, prompt, tokens) for prompt, tokens in zip(prompts, new, strict=True))
        return [(i, cut_at(text, stops)) for i, text in zip(group, made, strict=True)]
