"""`data`: what a prepared dataset holds: counts, lengths of documents, documents that occur twice, and a look at some of them."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.commands import Verb
from trainer.core.config import DataConfig
from trainer.core.errors import UserError
from trainer.core.files import system_error, user_path, write_file
from trainer.core.settings import setting
from trainer.core.text import markdown_table, printable, printable_lines

if TYPE_CHECKING:
    import numpy as np

    from trainer.data.stream import Split
    from trainer.data.survey import Documents
    from trainer.data.tokenizers import Tokenizer

QUANTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)  # percent
QUANTILE_NAMES = {0: "shortest", 50: "median", 100: "longest"}
SHOWN_TOKENS = 100  # of a document
BINS = 60


@dataclass
class SurveyConfig:
    """`data`: what a prepared dataset holds."""

    path: str | None = setting(
        None, "prepared dataset: a folder or s3://, gs://, hf://... (the flag itself is optional)"
    )
    cache: str | None = setting(None, "folder for shards of a remote path; auto: in the user's cache folder")
    out: str | None = setting(
        None, "picture of the lengths of documents; auto: PATH-lengths.png, beside a local dataset"
    )
    samples: int = setting(3, "documents of the training split to show", low=0)
    seed: int = setting(0, "seed that chooses them", low=0)


def run(config: SurveyConfig, as_json: bool = False) -> None:
    """Run the verb: read the whole dataset once, print what it holds, and write the picture."""
    from trainer.data.remote import is_remote
    from trainer.data.stream import Split, find_dataset, say
    from trainer.data.survey import read_documents

    if config.path is None:
        raise UserError("path: is not set; name a prepared dataset: python -m trainer data DIR")
    data = DataConfig(path=config.path, cache=config.cache)
    info = find_dataset(data)
    assert info is not None  # without data.source a missing dataset is an error
    splits = {name: Split(data, info, name) for name in info.splits}
    documents = {name: read_documents(split, progress(name)) for name, split in splits.items()}
    folder = Path(Path(config.path).name) if is_remote(config.path) else user_path(config.path, "path").resolve()
    picture = user_path(config.out, "out") if config.out else folder.with_name(f"{folder.name}-lengths.png")
    report = {
        "path": config.path,
        "fingerprint": info.fingerprint,
        "tokenizer": asdict(info.tokenizer),
        "sample_length": info.sample_length,
        "splits": {name: describe(splits[name], found, documents) for name, found in documents.items()},
        "samples": examples(splits["train"], documents["train"], config) if "train" in splits else [],
        "picture": str(picture),
    }
    pictures = {picture: render(documents, info.sample_length, folder.name)}
    if info.patches is not None:
        from trainer.runs.patch_picture import patch_sizes, render_patches

        name = picture.name.removesuffix(".png").removesuffix("-lengths")
        coloured = picture.with_name(f"{name}-patches.png")
        pictures[coloured] = render_patches(splits["validation"], info.patches, folder.name)
        report["patches"] = asdict(info.patches) | {
            "picture": str(coloured),
            "sizes": {name: patch_sizes(split, info.patches) for name, split in splits.items()},
        }
    for path, content in pictures.items():
        try:
            write_file(path, content)
        except OSError as error:
            raise system_error(error, f"out: {printable(path)}: cannot be written") from None
    sys.stdout.write((json.dumps(report, indent=1) if as_json else printable_lines(in_words(report))) + "\n")
    for path in pictures:
        say(f"wrote {path}")


def progress(name: str) -> Callable[[int, int], None]:
    """Says on stderr how far the reading of a split is, every ten seconds."""
    told = time.monotonic()

    def tell(number: int, count: int) -> None:
        nonlocal told
        if time.monotonic() - told >= 10:
            told = time.monotonic()
            print(f"{name}: {number / count:.0%} read", file=sys.stderr, flush=True)

    return tell


def describe(split: Split, found: Documents, documents: dict[str, Documents]) -> dict[str, Any]:
    """What is known of a split. documents: those of all splits."""
    import numpy as np

    counts, count = split.counts, len(found.lengths)
    facts = {
        "documents": count,
        "tokens": counts.tokens,
        "bytes": counts.bytes,
        "words": counts.words,
        "bytes_per_token": counts.bytes / counts.tokens,
        "samples": counts.samples,
        "shards": len(split.shard_sizes),
        "mean_length": float(found.lengths.mean()),
        "length_quantiles": dict(
            zip(map(str, QUANTILES), np.percentile(found.lengths, QUANTILES).tolist(), strict=True)
        ),
        "repeats": found.repeats,
        "repeats_share": found.repeats / count,
    }
    if split.name != "train" and "train" in documents:
        shared = found.found_in(documents["train"])
        facts |= {"also_in_train": shared, "also_in_train_share": shared / count}
    return facts


def examples(split: Split, found: Documents, config: SurveyConfig) -> list[dict[str, Any]]:
    """The beginnings of some documents, drawn with the seed, as text; answers stand in [[ ]]."""
    import numpy as np

    from trainer.data.dataset import LOSS_MASK
    from trainer.data.tokenizers import Tokenizer

    info = split.info
    tokenizer = Tokenizer.from_file(split.folder / "tokenizer.json", info.tokenizer.name, info.tokenizer.eot_id)
    starts = np.cumsum(found.lengths) - found.lengths

    def text(start: int, count: int) -> str:
        tokens = split.read(start, count)
        if LOSS_MASK not in info.columns:
            return tokenizer.decode(tokens)
        return marked(tokenizer, tokens, split.read(start, count, LOSS_MASK))

    count = min(config.samples, len(starts))
    chosen = np.sort(np.random.default_rng(config.seed).choice(len(starts), count, replace=False)).tolist()
    return [
        {
            "document": number,
            "tokens": int(found.lengths[number]),
            "text": text(int(starts[number]), min(int(found.lengths[number]), SHOWN_TOKENS)),
        }
        for number in chosen
    ]


def marked(tokenizer: Tokenizer, tokens: np.ndarray, answers: np.ndarray) -> str:
    """The text of `tokens` [N], with [[ ]] around those that count in the loss of fine-tuning: answers [N], 1 or 0."""
    import numpy as np

    edges = [0, *(np.flatnonzero(np.diff(answers)) + 1).tolist(), len(tokens)]
    parts = [(tokenizer.decode(tokens[start:end]), answers[start]) for start, end in pairwise(edges)]
    return "".join(f"[[{text}]]" if answer else text for text, answer in parts)


def in_words(report: dict[str, Any]) -> str:
    """The report as text."""
    splits, tokenizer = report["splits"], report["tokenizer"]
    columns = [["", "documents", "tokens", "words", "bytes/token", "samples", "shards", "tokens of a document: mean"]]
    columns[0] += [QUANTILE_NAMES.get(percent, f"{percent} % have at most") for percent in QUANTILES]
    columns[0] += ["same as an earlier document", "same as a document of train"]
    for name, facts in splits.items():
        columns.append([name, f"{facts['documents']:,}", f"{facts['tokens']:,}", f"{facts['words']:,}"])
        columns[-1] += [f"{facts['bytes_per_token']:.3f}", f"{facts['samples']:,}", f"{facts['shards']:,}"]
        columns[-1] += [f"{length:,.0f}" for length in (facts["mean_length"], *facts["length_quantiles"].values())]
        columns[-1] += [
            f"{facts[key]:,} ({facts[f'{key}_share']:.2%})" if key in facts else ""
            for key in ("repeats", "also_in_train")
        ]
    shown = [
        f"document {sample['document']:,} of train, {sample['tokens']:,} tokens: {printable(sample['text'])}"
        for sample in report["samples"]
    ]
    head = (
        f"{report['path']}: tokenizer {tokenizer['name']} of {tokenizer['vocab_size']:,} ids, samples of "
        f"{report['sample_length']:,} tokens, fingerprint {report['fingerprint'][:12]}"
    )
    if "patches" in report:
        found = report["patches"]
        rules = (
            f"{rule} above {threshold:.6g} nats: "
            + ", ".join(f"{sizes[rule]:.3f} in {name}" for name, sizes in found["sizes"].items())
            for rule, threshold in found["thresholds"].items()
        )
        head += "\n" + "\n".join(
            f"tokens of a patch, {line} (entropies of {printable(found['run'])})" for line in rules
        )
    table = markdown_table([list(row) for row in zip(*columns, strict=True)])
    return "\n".join([head, "", *table, *("\n" + line for line in shown)])


def render(documents: dict[str, Documents], sample_length: int, name: str) -> bytes:
    """The picture: which share of documents, and of tokens, is in documents of each length."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    lengths = np.concatenate([found.lengths for found in documents.values()])
    bins = np.geomspace(lengths.min() - 0.5, lengths.max() + 0.5, BINS)  # a document has at least its end-of-text id
    for axis, what in zip(figure.subplots(1, 2), ("documents", "tokens"), strict=True):
        for split, found in documents.items():
            weights = found.lengths if what == "tokens" else np.ones(len(found.lengths))
            share = np.histogram(found.lengths, bins, weights=weights / weights.sum())[0]
            axis.stairs(
                share, bins, label=f"{split} ({len(found.lengths):,} documents)", fill=split == "train", alpha=0.7
            )
        axis.axvline(sample_length, color="0.4", linestyle=":", label=f"a sample: {sample_length:,} tokens")
        axis.set(xscale="log", xlabel="tokens of a document", ylabel=f"share of {what}")
        axis.grid(alpha=0.3)
    axis.legend()
    figure.suptitle(name.replace("$", r"\$"))
    picture = io.BytesIO()
    figure.savefig(picture, dpi=100, format="png")
    return picture.getvalue()


VERB = Verb(
    name="data",
    help="what a prepared dataset holds: counts, lengths of documents (a picture), repeats, examples",
    config=SurveyConfig,
    run=run,
    alone=True,
    json=True,
    positional=lambda word, flags: {"path": word},
)
