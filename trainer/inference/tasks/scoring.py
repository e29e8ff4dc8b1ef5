"""The log-likelihood of continuations, many in a batch, on all ranks together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from trainer.core.errors import UserError
from trainer.inference.evaluation import LOGIT_BYTES
from trainer.runtime.distributed import World

# Most tokens of a batch, padding included, by type of device.
BATCH_TOKENS = {"cpu": 2048, "cuda": 1 << 14}

Request = tuple[list[int], list[int]]  # (context, at least one token; continuation, at least one token)
Row = tuple[int, ...]  # what the model reads of a request: all but its last token
Asked = list[tuple[int, list[int]]]  # the requests of a row: (number of the request, its continuation)


class LogLikelihood(float):
    """The log-likelihood of a continuation in nats, which also knows how many tokens that has."""

    tokens: int

    def __new__(cls, nats: float, tokens: int) -> LogLikelihood:
        made = super().__new__(cls, nats)
        made.tokens = tokens
        return made


@torch.no_grad()
def log_likelihoods(
    runner: Any,
    requests: list[Request],
    length: int,
    world: World,
    at: Callable[[str], None] = lambda where: None,
) -> list[tuple[LogLikelihood, bool]]:
    """Of each request: log p(continuation | context), and whether each of its tokens is the likeliest one.

    All ranks call this with the same requests, and all get the results. Of what is longer than `length` the beginning is left
    out. The batches do not depend on the number of ranks, so neither do the results. runner, at: as in evaluation.full.
    """
    for request in requests:
        check_fits(request, length)
    rows: dict[Row, Asked] = {}  # several requests may need the same row, such as "yes" and "no" after a question
    for number, (context, continuation) in enumerate(requests):
        row = tuple((context + continuation)[-(length + 1) : -1])
        rows.setdefault(row, []).append((number, continuation))
    batches = list(batched(rows, runner.model.config.vocab_size, runner.device.type))
    found = torch.zeros(
        len(requests), 2, dtype=torch.float64, device=runner.device
    )  # nats, tokens that are not the likeliest
    training = runner.model.training
    runner.model.eval()
    # Ranks take batches in turn. All make equally many forward passes, which may contain collectives.
    for number in range(world.rank, -(-len(batches) // world.size) * world.size, world.size):
        at(f"tasks, batch {number} of {len(batches)}")
        chosen: list[Row] = batches[number] if number < len(batches) else [(0,)]
        score(runner, chosen, [rows.get(row, []) for row in chosen], found)
    runner.model.train(training)
    nats, misses = world.sum(found).T.tolist()
    if any(value != value for value in nats):
        raise UserError(
            "tasks: the model gives log-probabilities that are NaN; its weights, or the precision, are broken"
        )
    return [
        (LogLikelihood(total, len(continuation)), not missed)
        for total, missed, (_, continuation) in zip(nats, misses, requests, strict=True)
    ]


def check_fits(request: Request, length: int) -> None:
    """UserError if the model cannot read a continuation at once."""
    if len(request[1]) > length:
        raise UserError(
            f"evaluation.sequence_length: {length} tokens are too few for the tasks: a continuation has {len(request[1])}; "
            "raise it, or choose other tasks"
        )


def batched(rows: dict[Row, Asked], vocab_size: int, device_type: str) -> Iterator[list[Row]]:
    """Batches of rows of similar length, the longest first, that keep within BATCH_TOKENS and, with their logits, LOGIT_BYTES."""
    most_positions = LOGIT_BYTES[device_type] // (4 * vocab_size)
    batch: list[Row] = []
    positions = 0
    for row in sorted(rows, key=lambda row: (-len(row), row)):
        more = max(len(continuation) for _, continuation in rows[row])
        full = (len(batch) + 1) * len((batch or [row])[0]) > BATCH_TOKENS[device_type]
        if batch and (full or positions + more > most_positions):
            yield batch
            batch, positions = [], 0
        batch.append(row)
        positions += more
    if batch:
        yield batch


def score(runner: Any, rows: list[Row], asked: list[Asked], found: Tensor) -> None:
    """One forward pass over `rows`; adds to found[number] what `log_likelihoods` returns of the requests in `asked`."""
    width = max(map(len, rows))
    tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])  # [B, T]
    # The logits of the last tokens of each row are needed, as many as its longest continuation has. [M] of the batch in all.
    wanted = [max((len(continuation) for _, continuation in those), default=1) for those in asked]
    places = [(i, column) for i, row in enumerate(rows) for column in range(len(row) - wanted[i], len(row))]
    ends = torch.tensor(wanted).cumsum(0).tolist()  # of the rows within `places`
    picked = [
        (number, end - len(continuation) + i, token)
        for end, those in zip(ends, asked, strict=True)
        for number, continuation in those
        for i, token in enumerate(continuation)
    ]
    tokens = tokens.to(runner.device)
    positions = torch.tensor(places).T.to(runner.device)  # [2, M]
    with runner.autocast():
        logits = runner.predict(tokens, runner.documents(tokens), positions=positions)[0].float()  # [M, V]
    if not picked:
        return
    numbers, which, targets = torch.tensor(picked).T.to(runner.device)  # [N] each
    nats = logits[which, targets] - logits.logsumexp(-1)[which]
    missed = logits.max(-1).indices[which] != targets
    found.index_add_(0, numbers, torch.stack((nats.double(), missed.double()), 1))
