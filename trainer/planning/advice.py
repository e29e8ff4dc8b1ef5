"""Advice on a plan: one line for each thing to think about before the run. None of them is an error."""

from __future__ import annotations

from typing import Any

# The dial meets a number of parameters within 3 %. If the parameters outside embeddings and head, which the architecture
# arranges, are less than a third of all, this is more than 9 % of them. By L ~ N^-0.076 (arXiv 2001.08361) it is 0.7 % of the
# loss: 0.02 nats of 3.3, as much as architectures differ.
LEAST_SHARE = 1 / 3
COMPUTE_OPTIMAL = 20  # tokens per parameter (arXiv 2203.15556)
FAR_BELOW = 10  # advise if tokens per parameter are fewer by this factor
FEW_STEPS = 200  # hlb of 0.9 M parameters, as many tokens: 14 steps of its rule's batch end 0.56 nats above 901 steps, 56 steps 0.21
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
    lines.extend(few_steps(plan, tokens))
    epochs = epochs_of(plan, tokens)
    if epochs is not None and epochs > MOST_EPOCHS:
        lines.append(
            f"the run reads its text {epochs:.1f} times; beyond {MOST_EPOCHS} times, repetition helps less (arXiv 2305.16264): "
            "use fewer steps or more text"
        )
    return lines


def few_steps(plan: Any, tokens: int) -> list[str]:
    """A line if a length in tokens is few steps of a batch that the recipe chose: such rules are for long runs from initial weights."""
    rules, config = {entry.key: entry.rule for entry in plan.entries}, plan.config
    given = "set" in (rules["batch.tokens_per_step"], rules["max_steps"])
    if given or config.init_from or config.max_steps >= FEW_STEPS:
        return []
    length = config.batch.sequence_length
    smaller = max(length, tokens // FEW_STEPS // length * length)
    return [
        f"the run has only {config.max_steps} optimizer steps, for the rule of batch.tokens_per_step is for longer runs; a smaller batch, "
        f"such as {smaller:,}, ends with a lower loss"
    ]


def epochs_of(plan: Any, tokens: int) -> float | None:
    """How many times a run of so many tokens reads its training split; None if there is no data yet."""
    return tokens / plan.train_tokens if plan.train_tokens else None
