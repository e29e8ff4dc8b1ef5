"""Advice on a plan: one line for each thing to think about before the run. None of them is an error."""

from __future__ import annotations

from typing import Any

# The dial meets a number of parameters within 3 %. If the parameters outside embeddings and head, which the architecture
# arranges, are less than a third of all, this is more than 9 % of them. By L ~ N^-0.076 (arXiv 2001.08361) it is 0.7 % of the
# loss: 0.02 nats of 3.3, as much as architectures differ.
LEAST_SHARE = 1 / 3
COMPUTE_OPTIMAL = 20  # tokens per parameter (arXiv 2203.15556)
FAR_BELOW = 10  # advise if tokens per parameter are fewer by this factor
MOST_EPOCHS = 4  # up to then, repeated text is nearly as good as new text (arXiv 2305.16264)


def advice(plan: Any, tokens: int) -> list[str]:
    """tokens: of the whole run, as a minimum."""
    lines = []
    if plan.unused_tokenizer:
        lines.append(f"{plan.unused_tokenizer}, which the run reads; for the other one, give a new data.path")
    share = plan.non_embedding / plan.parameters
    if share < LEAST_SHARE:
        lines.append(
            f"only {share:.0%} of the parameters are outside embeddings and head: this alone may make models of equally many "
            "parameters differ; to compare architectures raise model_scale or use a smaller vocabulary, to above 33 %"
        )
    own = max(1, plan.non_embedding)
    text = tokens if plan.train_tokens is None else min(tokens, plan.train_tokens)
    trains_all = plan.trained == plan.parameters  # with LoRA, the other weights have read their text already
    if trains_all and text * FAR_BELOW < own * COMPUTE_OPTIMAL:
        what = "of the run" if text == tokens else "of text"
        lines.append(
            f"{text:,} tokens {what} for {own:,} parameters without embeddings and head are {text / own:.2g} per parameter; "
            f"about {COMPUTE_OPTIMAL} are compute-optimal (arXiv 2203.15556): a smaller model_scale, or more "
            f"{'steps' if text == tokens else 'text'}, reaches a lower loss"
        )
    epochs = epochs_of(plan, tokens)
    if epochs is not None and epochs > MOST_EPOCHS:
        lines.append(
            f"the run reads its text {epochs:.1f} times; beyond {MOST_EPOCHS} times, repetition helps less (arXiv 2305.16264): "
            "use fewer steps or more text"
        )
    return lines


def epochs_of(plan: Any, tokens: int) -> float | None:
    """How many times a run of so many tokens reads its training split; None if there is no data yet."""
    return tokens / plan.train_tokens if plan.train_tokens else None
