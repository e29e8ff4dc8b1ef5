"""What the documents of a prepared split are: how long, and which of them are the same. One pass over the shards."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from trainer.data.stream import Split

TOLD_EVERY = 4096  # samples


@dataclass(frozen=True)
class Documents:
    """Of each document of a split, in order: its tokens with the end-of-text id [N] int64, and xxh64 of these [N] uint64."""

    lengths: np.ndarray
    hashes: np.ndarray

    @property
    def repeats(self) -> int:
        """How many documents are the same, token for token, as an earlier one."""
        return len(self.hashes) - len(np.unique(self.hashes))

    def found_in(self, others: Documents) -> int:
        """How many documents are also among `others`."""
        return int(np.isin(self.hashes, others.hashes).sum())


def read_documents(split: Split, tell: Callable[[int, int], None]) -> Documents:
    """The documents of a split; 16 bytes of memory for each. tell: called now and then with the samples read and their number.

    A document ends where its stored length says, in older datasets at each end-of-text id.
    """
    import xxhash

    stored = np.cumsum(split.lengths()) if split.info.has_lengths else None
    ends, hashes, hasher = array("q"), array("Q"), xxhash.xxh64()
    count = split.counts.samples
    for number in range(count):
        if number % TOLD_EVERY == 0:
            tell(number, count)
        tokens, begin = split.sample(number)["tokens"], number * split.length
        if number < count - 1:
            tokens = tokens[:-1]  # the next sample begins with this token
        if stored is None:
            here = np.flatnonzero(tokens == split.info.tokenizer.eot_id) + 1
        else:
            first, last = np.searchsorted(stored, [begin, begin + len(tokens)], side="right")
            here = stored[first:last] - begin
        start = 0
        for end in here.tolist():
            hasher.update(tokens[start:end].data)
            ends.append(begin + end)
            hashes.append(hasher.intdigest())
            hasher.reset()
            start = end
        hasher.update(tokens[start:].data)
    if not ends or ends[-1] < split.counts.tokens:  # a stream whose last document has no end
        ends.append(split.counts.tokens)
        hashes.append(hasher.intdigest())
    return Documents(np.diff(np.array(ends, np.int64), prepend=0), np.array(hashes, np.uint64))
