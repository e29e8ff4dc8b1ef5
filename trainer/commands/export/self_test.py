"""Loads a written folder in another process, as its readers will: with transformers alone, without this package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.commands.export.source import TEXT, Source
from trainer.commands.export.tokenizer_files import template_of
from trainer.core.errors import UserError
from trainer.core.text import printable

if TYPE_CHECKING:
    from torch import Tensor

QUESTION = "What is 2 + 2?"
NEW = 8  # tokens that the model writes

# Reads cases from stdin and writes one answer for each: the logits to a file, the rest to the file that is its argument, because
# transformers may print to stdout. A None in sys.modules stops an import: this package must not be needed, and a torchvision of
# another torch would stop transformers. transformers 5 asks before it reads even a tokenizer beside code, unless it is trusted.
LOAD = """
import json, sys
for name in ("models", "trainer", "torchvision"):
    sys.modules[name] = None
import numpy, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
answers = []
for case in json.load(sys.stdin):
    tokenizer = AutoTokenizer.from_pretrained(case["folder"])
    model, found = AutoModelForCausalLM.from_pretrained(
        case["folder"], trust_remote_code=True, torch_dtype=torch.float32, output_loading_info=True
    )
    with torch.no_grad():
        tokens = torch.tensor(case["tokens"])
        logits = model.float().eval()(tokens).logits
        start = tokens[:1, : case["start"]]
        options = {"max_new_tokens": case["more"], "do_sample": False, "attention_mask": torch.ones_like(start)}
        written = model.generate(start, **options)[0, start.shape[1] :].tolist()
    numpy.save(case["logits"], logits.numpy())
    ids = [tokenizer.encode(text) for text in case["texts"]]
    answers.append({
        "class": type(model).__name__,
        "keys": {kind: sorted(map(str, found[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")},
        "ids": ids,
        "texts": [tokenizer.decode(one) for one in ids],
        "end": tokenizer.eos_token_id,
        "written": written,
        "prompt": case["question"] and tokenizer.apply_chat_template(
            [{"role": "user", "content": case["question"]}], tokenize=False, add_generation_prompt=True
        ),
    })
with open(sys.argv[1], "w", encoding="utf-8") as file:
    json.dump(answers, file)
"""


@dataclass(frozen=True)
class Expected:
    """What a folder must give. tokens: [B, T]; logits: of them, fp32 [B, T, V]; tolerance: of their differences; ids: of `texts`;
    prompt: what the chat template makes of QUESTION (None: there is no template); written: what the model writes after the first
    half of the first row, always the likeliest token; sure: whether rounding cannot change that."""

    tokens: Tensor
    logits: Tensor
    tolerance: float
    texts: list[str]
    ids: list[list[int]]
    end: int
    prompt: str | None
    written: list[int]
    sure: bool


def expected_of(source: Source, model: Any, vocabulary: int) -> Expected:
    """What the run's own model and tokenizer give. vocabulary: how many logits the written model has."""
    import torch

    tokens = source.tokens()
    with torch.no_grad():
        logits = model(tokens).logits.float()[..., :vocabulary]
    tokenizer = source.tokenizer
    texts = [TEXT, *(tokenizer.decode(row).split(source.end_of_text)[0] for row in tokens.tolist())]
    ids = [tokenizer.encode(text).tolist() for text in texts]
    prompt = None
    if template_of(source) is not None:
        from trainer.data.records import conversations_of

        prompt = conversations_of(source.info, str(source.folder)).prompt(QUESTION)
    tolerance = tolerance_of(model, logits)
    written, margin = continuation(model, tokens[0, : tokens.shape[1] // 2].tolist(), vocabulary, tokenizer.eot_id)
    return Expected(tokens, logits, tolerance, texts, ids, tokenizer.eot_id, prompt, written, margin > 2 * tolerance)


def continuation(model: Any, begin: list[int], vocabulary: int, end: int) -> tuple[list[int], float]:
    """(the likeliest tokens after `begin`, up to NEW or to `end`; the smallest distance between the two likeliest logits)."""
    import torch

    written: list[int] = []
    margin = float("inf")
    with torch.no_grad():
        while len(written) < min(NEW, len(begin)) and written[-1:] != [end]:
            logits = model(torch.tensor([begin + written])).logits[0, -1, :vocabulary].float()
            best = logits.topk(2)
            margin = min(margin, (best.values[0] - best.values[1]).item())
            written.append(int(best.indices[0]))
    return written, margin


def tolerance_of(model: Any, logits: Tensor) -> float:
    """How much the same fp32 computation may differ if its sums have another order.

    A sum of K terms is off by about sqrt(K) roundings, and each of the blocks adds its own to the stream; 4 for the tail.
    """
    import torch

    terms = max(parameter.shape[-1] for parameter in model.parameters() if parameter.ndim)
    largest = logits[logits.isfinite()].abs().max().item()
    return 4 * torch.finfo(torch.float32).eps * terms**0.5 * (len(model.blocks()) + 1) * largest


def check_loaded(folder: Path, expected: Expected) -> float:
    """The largest difference of logits. UserError, of one line, if the folder gives another model or tokenizer than `expected`."""
    return check_all([(folder, expected)])[0]


def check_all(cases: list[tuple[Path, Expected]]) -> list[float]:
    """`check_loaded` of several folders, in one process."""
    import numpy as np
    import torch

    with tempfile.TemporaryDirectory() as place:
        files = [Path(place) / f"{number}.npy" for number in range(len(cases))]
        asked = [
            {
                "folder": str(folder.absolute()),
                "tokens": expected.tokens.tolist(),
                "start": expected.tokens.shape[1] // 2,
                "more": min(NEW, expected.tokens.shape[1] // 2),
                "texts": expected.texts,
                "question": QUESTION if expected.prompt is not None else None,
                "logits": str(file),
            }
            for (folder, expected), file in zip(cases, files, strict=True)
        ]
        answers = loaded(asked, Path(place))
        return [
            compare(expected, answer, torch.from_numpy(np.load(file)))
            for (_, expected), answer, file in zip(cases, answers, files, strict=True)
        ]


def loaded(asked: list[dict[str, Any]], place: Path) -> list[dict[str, Any]]:
    """The answers of LOAD in another process, whose current folder is `place`. UserError if it fails."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(place / "modules"),  # the copies of the code that transformers makes
        "TRANSFORMERS_VERBOSITY": "error",
        "CUDA_VISIBLE_DEVICES": "",
    }
    answers = place / "answers.json"
    words = [sys.executable, "-c", LOAD, str(answers)]
    done = subprocess.run(
        words, input=json.dumps(asked), cwd=place, env=environment, capture_output=True, encoding="utf-8"
    )
    if done.returncode:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
        raise UserError(f"format: transformers cannot load what was written, so it is removed: {printable(last, 300)}")
    return json.loads(answers.read_text(encoding="utf-8"))


def compare(expected: Expected, answer: dict[str, Any], logits: Tensor) -> float:
    """The largest difference of logits. UserError if anything is not as expected."""
    wrong = None
    for kind, names in answer["keys"].items():
        if names:
            wrong = f"{kind}: {', '.join(names[:3])}"
    for text, mine, theirs in zip(expected.texts, expected.ids, answer["ids"], strict=True):
        if mine != theirs:
            wrong = f"the tokenizer gives other ids for {text[:40]!r}"
    if expected.end != answer["end"]:
        wrong = f"the end of text is id {answer['end']}, not {expected.end}"
    if expected.prompt != answer["prompt"]:
        wrong = f"the chat template writes {answer['prompt']!r}"
    if expected.sure and expected.written != answer["written"]:
        wrong = f"generate writes {answer['written']}, not {expected.written}"
    if logits.shape != expected.logits.shape:
        wrong = f"logits are {list(logits.shape)}, not {list(expected.logits.shape)}"
    if wrong is None:
        return difference(expected, logits)
    raise UserError(
        f"format: transformers reads another model than was written, so it is removed: {printable(wrong, 300)}"
    )


def difference(expected: Expected, logits: Tensor) -> float:
    """The largest difference of finite logits. UserError if it is above the tolerance, or if others are infinite."""
    finite = expected.logits.isfinite()
    same = (finite == logits.isfinite()).all()
    largest = (logits - expected.logits)[finite].abs().max().item() if same else float("nan")
    if not largest <= expected.tolerance:
        raise UserError(
            f"format: what was written gives other logits in transformers (by {largest:.1e}; rounding explains "
            f"{expected.tolerance:.1e}), so it is removed"
        )
    return largest
