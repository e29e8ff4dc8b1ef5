"""The coordinate check of model.mup (arXiv 2203.03466, appendix D.1): how large activations are after some steps, at several sizes.

Where the parametrisation is right, they stay flat as width or depth grow; without it they grow. The parameter groups are those of
`train`; weights begin with init_std 0.02 at every width, gradients are not clipped, and the tokens are random and the same for all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from models.layers.attention import SoftmaxHeads
from models.materialise import materialise
from trainer.core.config import RunConfig
from trainer.core.errors import UserError
from trainer.core.settings import build
from trainer.engine.meta import build_meta
from trainer.optim import Optimizer
from trainer.optim.groups import shapes_of
from trainer.planning.model import read_model
from trainer.planning.mup import check_mup
from trainer.planning.resolver import ModelFacts
from trainer.recipes import build_optimizer

ROWS, LENGTH, VOCAB = 4, 32, 128
# A part is flat if it grows with a power between these. mup: 0, and -1/2 of the logits before they have learned. Standard: 1 of what has
# learned, 1/2 of the logits before. So half of the least growth is the upper limit.
LOWEST, HIGHEST = -0.5, 0.25


@dataclass(frozen=True)
class Growth:
    """sizes: widths or depths; means: part -> the mean absolute value of its numbers at each size, a geometric mean over seeds."""

    sizes: list[int]
    means: dict[str, list[float]]

    def slopes(self) -> dict[str, float]:
        """Part -> the slope of the logarithm of its mean against that of the size, by least squares: the power with which it grows."""
        xs = [math.log(size) for size in self.sizes]
        centre = sum(xs) / len(xs)
        spread = sum((x - centre) ** 2 for x in xs)
        return {
            part: sum((x - centre) * math.log(mean) for x, mean in zip(xs, means, strict=True)) / spread
            for part, means in self.means.items()
        }


@dataclass(frozen=True)
class Trial:
    """What is trained at each size. model, optim: sections of a config, without sizes; head: channels of a head; base: (width, depth) of
    mup, None: without mup; seeds: of weights and tokens; vocab_size: of a model for other data."""

    model: dict[str, Any]
    optim: dict[str, Any]
    steps: int
    seeds: Sequence[int]
    head: int
    base: tuple[int, int] | None
    vocab_size: int = VOCAB

    def over_widths(self, widths: Sequence[int], depth: int) -> Growth:
        """Of every block's output and scores, and of the logits. UserError for a config that cannot be, or as of `at`."""
        found = [self.at(width, depth) for width in widths]
        return Growth(list(widths), {part: [one[part] for one in found] for part in found[0]})

    def over_depths(self, depths: Sequence[int], width: int) -> Growth:
        """Of the last block's output, of the scores in all blocks, and of the logits. UserError as of `over_widths`."""
        found = [over_all_blocks(self.at(width, depth), depth) for depth in depths]
        return Growth(list(depths), {part: [one[part] for one in found] for part in found[0]})

    def at(self, width: int, depth: int) -> dict[str, float]:
        """Part -> geometric mean over the seeds. UserError if a part has no logarithm: it is not finite, or 0."""
        runs = [after_steps(*self.planned(width, depth), self.steps, seed) for seed in self.seeds]
        for part, mean in (pair for run in runs for pair in run.items()):
            if not 0 < mean < math.inf:
                raise UserError(no_size(part, mean, f"after {self.steps} steps at width {width} and depth {depth}"))
        return {part: math.exp(sum(math.log(run[part]) for run in runs) / len(runs)) for part in runs[0]}

    def planned(self, width: int, depth: int) -> tuple[Any, Any, RunConfig]:
        """(model class, its Config, a config with all that groups and optimizer need)."""
        base = {} if self.base is None else dict(zip(BASE_FIELDS, (True, *self.base), strict=True))
        shape = {"d_model": width, "n_layers": depth, "n_heads": max(1, width // self.head)}
        optim = {
            "recipe": "plain", "schedule": "constant", "warmup_steps": 0, "decay_steps": 0, "weight_decay": 0.1,
            "loss_driven_decay": False, "state_precision": "fp32", **self.optim,
        }  # fmt: skip
        values = {"precision": "fp32", "max_steps": max(1, self.steps), "optim": {"rest_lr": optim["lr"], **optim}}
        config = build(RunConfig, {**values, "model": {**self.model, **base}})
        name, model_class, given = read_model(config)
        try:
            model_config = model_class.config_for_scale(
                1.0, target_parameters=10**6, **{**given, "vocab_size": self.vocab_size, **shape}
            )
        except ValueError as error:
            raise UserError(f"model {name}: {error}") from None
        check_mup(config.optim, ModelFacts.of(name, model_class, model_config))
        return model_class, model_config, config


def no_size(part: str, mean: float, where: str) -> str:
    """What to do about a part that is not finite, or 0 everywhere: as where its weights have not learned, or are far too large."""
    if mean == 0:
        return f"lr, steps: {part} is 0 {where}, so it has no growth; change --lr or --steps"
    return f"lr: {part} is not finite {where}; lower --lr"


BASE_FIELDS = ("mup", "mup_base_width", "mup_base_depth")


def over_all_blocks(parts: dict[str, float], depth: int) -> dict[str, float]:
    scores = [mean for part, mean in parts.items() if part.startswith("scores")]
    mean = {"scores": sum(scores) / len(scores)} if scores else {}
    return {"last block": parts[f"block {depth}"], **mean, "logits": parts["logits"]}


def after_steps(model_class: Any, model_config: Any, config: RunConfig, steps: int, seed: int) -> dict[str, float]:
    """Part -> mean absolute value, after `steps` steps on one batch."""
    draw = torch.Generator().manual_seed(seed)
    model, optimizer = start(model_class, model_config, config, draw)
    tokens = torch.randint(VOCAB, (ROWS, LENGTH + 1), generator=draw)
    for step in range(steps):
        model(tokens[:, :-1], tokens[:, 1:]).loss.backward()
        take_step(optimizer, step)
    with recorded(model) as parts, torch.no_grad():
        parts["logits"] = size_of(model(tokens[:, :-1]).logits)
    return parts


def start(model_class: Any, model_config: Any, config: RunConfig, draw: torch.Generator) -> tuple[Any, Optimizer]:
    """A model with initial weights, and its optimizer as the trainer makes it; on the CPU, without an engine."""
    device = torch.device("cpu")
    model = materialise(build_meta(model_class, model_config), device, draw)
    local, plan = dict(model.named_parameters()), SimpleNamespace(config=config, model_config=model_config)
    optimizer = build_optimizer(plan, model, shapes_of(model), local, device, True)
    optimizer.exchange = lambda names, update: update({name: (local[name].grad, local[name]) for name in names})
    optimizer.allocate_whole(optimizer.whole)
    return model, optimizer


def take_step(optimizer: Optimizer, step: int) -> None:
    optimizer.prepare(step, torch.ones(()))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def size_of(values: Tensor) -> float:
    return values.detach().abs().mean().item()


@contextmanager
def recorded(model: Any) -> Iterator[dict[str, float]]:
    """Part -> mean absolute value in the next forward pass: the output of each block, and the scores of its attention."""
    parts: dict[str, float] = {}
    handles = []
    heads: list[Any] = [module for module in model.modules() if isinstance(module, SoftmaxHeads)]
    for number, block in enumerate(model.layers, 1):
        handles.append(block.register_forward_hook(_keep(parts, f"block {number}")))
    for number, one in enumerate(heads, 1):
        one.attend = _with_scores(one, parts, f"scores {number}")
    yield parts
    for handle in handles:
        handle.remove()
    for one in heads:
        del one.attend


def _keep(parts: dict[str, float], name: str) -> Any:
    def hook(module: Any, inputs: Any, output: Any) -> None:
        parts[name] = size_of(output[0])

    return hook


def _with_scores(heads: Any, parts: dict[str, float], name: str) -> Any:
    """`heads.attend`, which also keeps the size of the scores that a token sees."""
    attend = heads.attend

    def attended(q: Tensor, k: Tensor, *others: Any) -> Tensor:
        repeated = k.repeat_interleave(q.shape[1] // k.shape[1], 1)  # [B, H, T, d]
        scores = (q @ repeated.transpose(-1, -2)) * heads.scale  # [B, H, T, T]
        seen = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
        parts[name] = size_of(scores[..., seen])
        return attend(q, k, *others)

    return attended
