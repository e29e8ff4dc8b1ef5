"""Learning the vocabulary of `train-bpe`. No signal interrupts this native code, so it runs in a process that can be killed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from trainer.core.errors import MachineError, UserError
from trainer.data.child import begin_child
from trainer.data.coder import BYTE_CHARACTERS, native_errors, silent_stderr

TRAINING_CHARACTERS = 64 << 20  # from the start of the training text; more hardly changes the merges
Learned = tuple[dict[str, int], list[Any]]  # vocabulary and merges


def learn_bpe(size: int, texts: Iterable[str]) -> Learned:
    """Byte-level BPE of at most `size` tokens with GPT-2's pre-tokenisation, from the first 64 M characters of `texts`."""
    import tokenizers

    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, min_frequency=2, initial_alphabet=BYTE_CHARACTERS, show_progress=False
    )
    model.train_from_iterator(_first(texts, TRAINING_CHARACTERS), trainer)
    learned = json.loads(model.to_str())["model"]
    return learned["vocab"], learned["merges"]


def _first(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return


def learn_in_child(size: int, texts: Iterable[str]) -> Learned:
    """`learn_bpe` in a separate process, which is killed if a signal interrupts this one."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_learn_for_parent, args=(theirs, size), daemon=True)
    child.start()
    theirs.close()
    try:
        for text in _first(texts, TRAINING_CHARACTERS):
            ours.send(text)
        ours.send(None)
        result = ours.recv()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise MachineError("the process that learns the tokenizer died (killed, or out of memory); try again") from None
    finally:
        child.kill()
        child.join()
        ours.close()
    if isinstance(result, str):
        raise UserError(result)
    return result


def _learn_for_parent(parent: Connection, size: int) -> None:
    begin_child()
    try:
        with native_errors("train-bpe: cannot learn from this text"), silent_stderr():
            result: Learned | str = learn_bpe(size, iter(parent.recv, None))
    except UserError as error:
        result = str(error)
    parent.send(result)
