"""What a plan should make its reader think about before the run: one line each, none of them an error."""

from __future__ import annotations

from typing import Any

# The dial meets a number of parameters within 3 %. Where less than a third of them are arranged by the architecture (all but
# embeddings and head), that is more than 9 % of these, and by L ~ N^-0.076 (arXiv 2001.08361) 0.7 % of the loss: 0.02 nats of
# 3.3, as much as architectures differ by.
LEAST_SHARE = 1 / 3
COMPUTE_OPTIMAL = 20  # tokens per parameter (arXiv 2203.15556)
FAR_BELOW = 10  # times fewer
MOST_EPOCHS = 4  # until then text that is read again is nearly as good as new text (arXiv 2305.16264)


def advice(plan: Any, tokens: int) -> list[str]:
    """tokens: of the whole run, at least."""
    lines = []
    share = plan.non_embedding / plan.parameters
    if share < LEAST_SHARE:
        lines.append(
            f"only {share:.0%} of the parameters are outside embeddings and head: models of equally many parameters may differ by "
            "that alone; to compare architectures raise model_scale or take a smaller vocabulary, to above 33 %"
        )
    own = max(1, plan.non_embedding)
    text = tokens if plan.train_tokens is None else min(tokens, plan.train_tokens)
    if text * FAR_BELOW < own * COMPUTE_OPTIMAL:
        what = "of the run" if text == tokens else "of text"
        lines.append(
            f"{text:,} tokens {what} for {own:,} parameters without embeddings and head are {text / own:.2g} each; "
            f"best for the compute are about {COMPUTE_OPTIMAL} (arXiv 2203.15556): a smaller model_scale, or more "
            f"{'steps' if text == tokens else 'text'}, reaches a lower loss"
        )
    epochs = epochs_of(plan, tokens)
    if epochs is not None and epochs > MOST_EPOCHS:
        lines.append(
            f"the run reads its text {epochs:.1f} times; beyond {MOST_EPOCHS} times more brings less and less (arXiv 2305.16264): "
            "fewer steps or more text"
        )
    return lines


def epochs_of(plan: Any, tokens: int) -> float | None:
    """How many times a run of so many tokens reads its training split; None where there is no data yet."""
    return tokens / plan.train_tokens if plan.train_tokens else None
