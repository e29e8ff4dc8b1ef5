"""HellaSwag as GPT2_Reproduction measures it: an ending's loss is the mean over its tokens, where lm-eval takes it per byte."""

from __future__ import annotations

from typing import Any


def process_results(document: dict[str, Any], results: list[Any]) -> dict[str, float]:
    """acc: whether the right ending has the highest log-likelihood; acc_norm: the highest per token."""
    gold = int(document["gold"] if "gold" in document else document["label"])
    sums = [nats for nats, _ in results]  # LogLikelihood
    means = [nats / nats.tokens for nats in sums]
    return {"acc": float(sums.index(max(sums)) == gold), "acc_norm": float(means.index(max(means)) == gold)}
