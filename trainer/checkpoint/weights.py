"""Which of the weights that a run's checkpoints hold: those of `--weights`.

    evaluation   those that the run validates with (the trained ones, unless the optimizer's rule has others)
    ema          the moving average (optim.ema)
    last-K       the mean of the last K checkpoints ("latest weight averaging", arXiv 2306.03241)

A mean of projected weights is not projected: a mean of unit vectors is shorter than 1. So all but the trained weights are projected.

The weights of a run with LoRA are those of the model without adapters: W + (alpha / rank) B A in place of W, which may have to be
unpacked from 4 bits. Layers that the
objective trains with the model are no part of it, and are left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.layers.lora import updated
from models.layers.quantized import FORMATS, unpack
from models.lora import factors_of, has_lora, has_packed_base, is_factor
from models.objective_layers import is_objective_layer
from trainer.checkpoint.format import check, choose, found, together
from trainer.checkpoint.quantized import check_installed, refuse_quantized
from trainer.checkpoint.reader import Reader
from trainer.core.errors import Damaged, UserError
from trainer.runtime.distributed import World

MODEL = "model."  # prefix of the trained weights and buffers
EVALUATION = "evaluation."  # of the weights for evaluation, if they differ from the trained ones
EMA = "ema."  # of the moving average
EMA_UPDATES = "ema_updates"  # how many updates it holds
PACKED = ".packed"  # follows the name of a matrix in that of its packed tensor
LAST = re.compile(r"last-([0-9]{1,9})")

Projections = Mapping[str, Callable[[Tensor], None]]  # name of a parameter -> projects it in place


@dataclass(frozen=True)
class Weights:
    """Weights of one checkpoint, or the mean of several.

    paths: of the checkpoints, oldest first; prefix: tensors that are also stored under it are read from there; averaged: whether
    they are not the trained ones of a checkpoint; manifest: of the newest checkpoint.
    """

    paths: tuple[Path, ...]
    prefix: str
    averaged: bool
    manifest: dict[str, Any]

    @property
    def lora_scale(self) -> float | None:
        """alpha / rank of a run with LoRA, whose updates `each` merges into the weights. None: there are no updates."""
        model = model_of(self.manifest)
        return model["lora_alpha"] / model["lora_rank"] if has_lora(model) else None

    def stored(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Name without prefix -> (whole shape, dtype) of what `each` yields, in alphabetical order."""
        stored = Reader(self.paths[-1]).stored()
        found = {name.removeprefix(MODEL): entry for name, entry in stored.items() if name.startswith(MODEL)}
        found = {name: entry for name, entry in found.items() if not is_objective_layer(name)}
        found = with_unpacked(found) if has_packed_base(model_of(self.manifest)) else found
        return found if self.lora_scale is None else {name: at for name, at in found.items() if not is_factor(name)}

    def each(self, projections: Projections) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor) on the CPU, one at a time in the order of `stored`, in this process alone.

        The sum of K checkpoints is fp32, which is off by at most K roundings of a weight.
        """
        readers = [Reader(path) for path in self.paths]
        there = readers[-1].stored()
        for name, (_, dtype) in self.stored().items():
            tensor = self._whole(readers[-1], name, there)
            if len(readers) > 1 and dtype.is_floating_point:
                tensor = tensor.float()
                for reader in readers[:-1]:
                    tensor += self._whole(reader, name, there)
                tensor /= len(readers)
            if name in projections and (self.prefix + name in there or len(readers) > 1):
                projections[name](tensor)
            yield name, tensor.to(dtype)

    def _whole(self, reader: Reader, name: str, there: Mapping[str, tuple[torch.Size, torch.dtype]]) -> Tensor:
        """A tensor of one checkpoint, with the updates of LoRA. there: what the newest checkpoint holds."""

        def stored(name: str) -> Tensor:
            if has_packed_base(model_of(self.manifest)) and MODEL + name + PACKED in there:
                return self._unpacked(reader, name, there)
            source = self.prefix + name if self.prefix + name in there else MODEL + name
            return read(reader, source, *there[source])

        tensor, scale = stored(name), self.lora_scale
        pairs: list[tuple[Tensor, Tensor]] = []
        while scale is not None and MODEL + factors_of(name, len(pairs))[0] in there:
            a, b = factors_of(name, len(pairs))
            pairs.append((stored(a), stored(b)))
        return updated(tensor, pairs, scale) if scale is not None and pairs else tensor

    def _unpacked(self, reader: Reader, name: str, there: Mapping[str, tuple[torch.Size, torch.dtype]]) -> Tensor:
        """A matrix of a base in 4 bits (model.lora_base nf4), in fp32."""
        check_installed("nf4", "run_dir")
        out, half = there[MODEL + name + PACKED][0]
        room = FORMATS["nf4"].room(out, 2 * half, [out])
        parts = {part: MODEL + f"{name}.{part}" for part in room}
        missing = [stored for stored in parts.values() if stored not in there]
        if missing:
            raise Damaged(f"checkpoint: {reader.path} lacks {missing[0]}")
        packed = {part: read(reader, stored, *there[stored]) for part, stored in parts.items()}
        return unpack("nf4", packed, 2 * half, [out])

    def load(self, projections: Projections, world: World, device: torch.device | str) -> dict[str, Tensor]:
        """All that `each` yields, on `device`. All ranks call this. If one cannot read, all raise UserError."""
        tensors: dict[str, Tensor] = {}

        def fill() -> None:
            tensors.update((name, tensor.to(device)) for name, tensor in self.each(projections))

        together(fill, world)
        return tensors


def with_unpacked(found: dict[str, tuple[torch.Size, torch.dtype]]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """In alphabetical order, with the matrices in place of their packed tensors. found: as in `Weights.stored`."""
    packed = [name.removesuffix(PACKED) for name in found if name.endswith(PACKED)]
    kept = {name: entry for name, entry in found.items() if name.rpartition(".")[0] not in packed}
    for name in packed:
        out, half = found[name + PACKED][0]
        kept[name] = torch.Size((out, 2 * half)), torch.float32
    return dict(sorted(kept.items()))


def read(reader: Reader, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A whole tensor of this shape, as `dtype`. UserError if it cannot be read."""
    tensor = torch.empty(shape, dtype=dtype)
    reader.fill({name: tensor})
    return tensor


def choose_weights(
    folder: Path, step: int | str | None, wanted: str, say: Callable[[str], None], world: World
) -> Weights:
    """The weights that `wanted` names, of the checkpoint that `choose` takes for `step` in `folder`. All ranks call this.

    UserError if there is no such checkpoint, it holds no moving average, or fewer than K are kept.
    """
    count = how_many(wanted)
    world.on_leader(lambda: refuse_quantized(folder.parent, "run_dir"))
    chosen = world.on_leader(lambda: choose(folder, step, say))
    if chosen is None:
        raise UserError(f"run_dir: {folder.parent} has no checkpoint yet")
    path, manifest = chosen
    if has_packed_base(model_of(manifest)):
        say(
            f"weights: the frozen matrices of {path} have 4 bits; they are unpacked, and LoRA's updates are merged into them"
        )
    if wanted == "ema":
        if not world.on_leader(lambda: holds(path, EMA)):
            raise UserError(f"weights: {path} holds no moving average; only runs with optim.ema have one")
        return Weights((path,), EMA, True, manifest)
    averaged = count > 1 or world.on_leader(lambda: holds(path, EVALUATION))
    kept = [at for at in world.on_leader(lambda: found(folder)) if at[0] <= manifest["step"]]
    steps = ", ".join(str(at) for at, _ in kept[-count:])
    if len(kept) < count:
        raise UserError(
            f"weights: {wanted} needs {count} checkpoints, but {folder} keeps {len(kept)} up to step {manifest['step']} "
            f"({steps}); train with a larger checkpoint.keep, or with checkpoint.keep_every"
        )
    paths = tuple(at for _, at in kept[-count:])
    for older in paths[:-1]:
        check(older, world)  # Damaged names what is wrong
    if count > 1:
        say(f"weights: the mean of the checkpoints of steps {steps}")
    return Weights(paths, EVALUATION, averaged, manifest)


def model_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """The section `model` of the config in a manifest."""
    return (manifest.get("config") or {}).get("model") or {}


def how_many(wanted: str) -> int:
    """The checkpoints that a value of `--weights` needs. UserError if it is none."""
    last = LAST.fullmatch(wanted)
    if wanted in ("evaluation", "ema"):
        return 1
    if last is None or int(last[1]) < 1:
        raise UserError(f"weights: {wanted!r} is not known (allowed: evaluation, ema, last-K with K checkpoints)")
    return int(last[1])


def holds(path: Path, prefix: str) -> bool:
    """Whether the checkpoint holds weights under this prefix."""
    return any(name.startswith(prefix) for name in Reader(path).stored())
