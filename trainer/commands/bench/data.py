"""`bench data`: measures how fast the loader delivers tokens and the tokenizer makes them, against what training consumes."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.commands.bench import BenchConfig
from trainer.commands.bench.baselines import Reader
from trainer.commands.bench.compare import enter
from trainer.commands.bench.report import Report, device_facts, distribution, show, title
from trainer.commands.bench.turns import in_turns
from trainer.commands.bench.variants import Variant
from trainer.core.errors import UserError
from trainer.data.dataset import DatasetInfo
from trainer.data.stream import Split, local_folder
from trainer.data.tokenizers import Tokenizer

SECONDS = 0.5  # length of one measurement, unless the data ends earlier
TEXT_TOKENS = 1 << 17  # tokens of the dataset that are decoded to text for the tokenizer
ENOUGH = 20  # times what training consumes: then no step waits for the loader


def run(config: BenchConfig, as_json: bool = False) -> None:
    """Run the verb: write bench.json and bench.md, and print the table or the JSON to stdout.

    The loader's numbers are those of rank 0 while all ranks read. They are compared with one rank's share of what training
    consumes.
    """
    if config.sweep:
        raise UserError("sweep: bench data measures one configuration; start it once for each configuration")
    world, (variant,), _, dataset = enter(config)
    loader = {"cold": cold_rates(config, variant), "warm": warm_rates(config, variant)}
    tokenizer = tokenizer_rates(config, variant, dataset) if world.leader else []
    in_turns([variant], config)
    if world.leader:
        data_report(config, variant, dataset, loader, tokenizer).publish(as_json)
    world.stop()


def cold_rates(config: BenchConfig, variant: Variant) -> list[float]:
    """Tokens per second of reading steps as training does, for each round of at most one epoch.

    Before each round the shards are dropped from the page cache, if the system can do that. Their hashes are checked again.
    """
    rates = []
    for _ in range(config.rounds):
        drop_from_page_cache(local_folder(variant.plan.config.data, variant.dataset) / "train")
        reader = Reader(variant.plan, variant.dataset, variant.world)
        rates.append(rate_of(reader.read_tokens, reader.stream.epoch_tokens / variant.world.size))
        reader.stream.close()
    return rates


def warm_rates(config: BenchConfig, variant: Variant) -> list[float]:
    """The same with shards in the page cache, hashes checked before, and any number of epochs."""
    reader = Reader(variant.plan, variant.dataset, variant.world)
    rates = [rate_of(reader.read_tokens) for _ in range(config.rounds + 1)]
    reader.stream.close()
    return rates[1:]


def rate_of(work: Callable[[], int], most: float = math.inf) -> float:
    """What `work` does per second. It is called until SECONDS have passed or it has done `most`."""
    begin, total = time.perf_counter(), 0
    while True:
        total += work()
        passed = time.perf_counter() - begin
        if passed >= SECONDS or total >= most:
            return total / passed


def drop_from_page_cache(folder: Path) -> None:
    """Ask the system (Linux) to drop the folder's files from the page cache."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def tokenizer_rates(config: BenchConfig, variant: Variant, dataset: DatasetInfo) -> list[float]:
    """Bytes of text per second that one process turns into tokens, for each round; the text is the dataset's own."""
    data = variant.plan.config.data
    tokenizer = Tokenizer.from_file(
        local_folder(data, dataset) / "tokenizer.json", dataset.tokenizer.name, dataset.tokenizer.eot_id
    )
    split = Split(data, dataset, "train")
    text = tokenizer.decode(split.read(0, min(TEXT_TOKENS, split.counts.tokens)))
    size = len(text.encode())

    def encode() -> int:
        tokenizer.encode(text)
        return size

    return [rate_of(encode) for _ in range(config.rounds + 1)][1:]


def data_report(
    config: BenchConfig, variant: Variant, dataset: DatasetInfo, loader: dict[str, list[float]], tokenizer: list[float]
) -> Report:
    """The report: a row for each of loader (cold, warm), tokenizer and training."""
    import numpy as np

    bytes_per_token = np.dtype(dataset.dtype).itemsize
    run, counts = variant.plan.config, dataset.splits["train"]
    text_bytes = counts.bytes / counts.tokens
    consumed = distribution(variant.record.rates)
    rows: list[dict[str, Any]] = []
    for kind, rates in loader.items():
        found = distribution(rates)
        per_process = consumed["median"] / variant.world.size
        megabytes = found["median"] * bytes_per_token / 1e6
        row = {"name": f"loader, {kind}", "tokens_per_second": found, "megabytes_per_second": megabytes}
        rows.append(row | {"ratio": found["median"] / per_process})
    found = distribution([rate / text_bytes for rate in tokenizer])
    megabytes = found["median"] * text_bytes / 1e6
    rows.append({"name": "tokenizer", "tokens_per_second": found, "megabytes_per_second": megabytes})
    rows.append({"name": f"training, {variant.name}", "tokens_per_second": consumed})
    table = [["", "tokens/s", "spread", "MB/s", "/ training"], *map(cells, rows)]
    notes = [
        f"loader: {run.data.threads} threads reading steps of {run.batch.tokens_per_step:,} tokens, in one of "
        f"{variant.world.size} process(es) that all read; MB as stored ({bytes_per_token} bytes a token); / training: divided by "
        f"one process's share of what training consumes, should be {ENOUGH} or more",
        "cold: shards dropped from the page cache, hashes checked; warm: neither",
        f"tokenizer: {dataset.tokenizer.name}, one process; MB of text ({text_bytes:.2f} bytes a token)",
    ]
    body = device_facts(variant) | {"rounds": config.rounds, "rows": rows, "notes": []}
    return Report(config, "data", title(variant), body, table, notes)


def cells(row: dict[str, Any]) -> list[str]:
    rate = row["tokens_per_second"]
    return [
        row["name"],
        f"{rate['median']:,.0f}",
        show(rate["spread"], ".1%"),
        show(row.get("megabytes_per_second"), ",.1f"),
        show(row.get("ratio"), ",.1f"),
    ]
