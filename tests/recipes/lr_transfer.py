"""Whether the best learning rate stays where it is when the width grows: a table, with mup and without.

    python tests/recipes/lr_transfer.py --data.path DATASET

trains a Llama of each width with each learning rate on the same text, and prints the mean loss of the last tenth of the steps, over
all seeds of the initial weights. --widths, --rates, --seeds, --depth, --steps, --rows and --length change what is tried. mup's base is
the first width.
"""

import argparse
import json
import math
import sys
import time

import torch

from trainer.core.config import DataConfig
from trainer.data.stream import Split, find_dataset
from trainer.planning.model import with_init_std
from trainer.testing.coordinates import Trial, start, take_step


def read_options():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data.path", dest="path", required=True)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--rates", type=int, nargs="+", default=[*range(-10, -5)], help="powers of two")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    return parser.parse_args()


def batches(options):
    """[steps, rows, length + 1] tokens, the same for every run, and the size of the vocabulary."""
    data = DataConfig(path=options.path)
    info = find_dataset(data)
    split = Split(data, info, "train")
    draw, tokens = torch.Generator().manual_seed(0), info.splits["train"].tokens
    starts = torch.randint(tokens - options.length - 1, (options.steps * options.rows,), generator=draw).tolist()
    rows = [torch.tensor(split.read(at, options.length + 1).astype("int64")) for at in starts]
    return torch.stack(rows).view(options.steps, options.rows, -1), info.tokenizer.vocab_size


def last_loss(options, width, rate, on, seed, tokens, vocab_size):
    """Mean loss of the last tenth of the steps; infinite if it is not a number."""
    base = (options.widths[0], options.depth) if on else None
    optim = {"lr": 2.0**rate, "schedule": "cosine", "warmup_steps": options.steps // 10}
    trial = Trial({"name": "llama", "hidden_multiple": 32}, optim, options.steps, (0,), 16, base, vocab_size)
    model_class, model_config, config = trial.planned(width, options.depth)
    model_config, _ = with_init_std(model_class, model_config, {})  # as `train` begins
    model, optimizer = start(model_class, model_config, config, torch.Generator().manual_seed(seed))
    losses = []
    for step, batch in enumerate(tokens):
        loss = model(batch[:, :-1], batch[:, 1:]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        take_step(optimizer, step)
        losses.append(loss.item())
    last = losses[-max(1, options.steps // 10) :]
    mean = sum(last) / len(last)
    return mean if math.isfinite(mean) else math.inf


def main():
    options = read_options()
    torch.set_num_threads(1)
    tokens, vocab_size = batches(options)
    print("| width | " + " | ".join(f"2^{rate}" for rate in options.rates) + " |")
    for width in options.widths:
        for on in (False, True) if width != options.widths[0] else (False,):  # at the base both are the same
            begun, losses = time.process_time(), []  # [rates, seeds]
            for rate in options.rates:
                losses.append([last_loss(options, width, rate, on, seed, tokens, vocab_size) for seed in options.seeds])
            cells = [sum(row) / len(row) for row in losses]
            shown = [f"**{cell:.3f}**" if cell == min(cells) else f"{cell:.3f}" for cell in cells]
            print(f"| {'mup' if on else 'standard'} {width} | " + " | ".join(shown) + " |", flush=True)
            facts = {"mup": on, "width": width, "losses": losses, "cpu_seconds": round(time.process_time() - begun)}
            print(json.dumps(facts), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
