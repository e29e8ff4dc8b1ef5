"""The model whose entropies decide where patches end: `prepare --patches` stores them, and every run that needs more opens it again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.layers.entropy_model import EntropyModel
from models.layers.patching import ENTROPY_RULES
from trainer.core.config import PrepareConfig
from trainer.core.errors import Damaged, UserError
from trainer.data.dataset import ENTROPIES, ColumnInfo, PatchesInfo, TokenizerInfo
from trainer.engine.base import with_weights
from trainer.engine.meta import build_meta
from trainer.objectives import FrozenSpec
from trainer.planning.frozen import Frozen, portable, told_as
from trainer.planning.parent import Parent, RunParent, find_parent
from trainer.runtime.device import choose_device
from trainer.runtime.distributed import World

TENTHS = 10  # bins of the histogram per nat
CODES = 1 << 16  # of float16


class EntropyColumn:
    """Predicts samples from their first token on. columns: what `predict` gives of each token.

    UserError if there is no such model, it has another tokenizer, or it cannot read samples of this length.
    """

    columns = {ENTROPIES: ColumnInfo("float16", [])}

    def __init__(self, config: PrepareConfig, tokenizer: TokenizerInfo) -> None:
        assert config.patches is not None
        world = World()
        with told_as("patches"):
            parent = find_parent(config.patches, world.say)
            parent.check_tokenizer(tokenizer, config.source, config.end_of_text)
        self.device = choose_device("auto", 0)
        self.model, self.weights = open_entropy_model(parent, tokenizer, self.device, world)
        limit = self.model.model.max_context
        if limit is not None and limit < config.sample_length:
            raise UserError(
                f"patches: {parent} reads {limit} tokens at most; set sample_length ({config.sample_length}) to that or less"
            )
        self.source, self.size = str(parent), config.patch_size
        self.counts = {rule: np.zeros(CODES, np.int64) for rule in ENTROPY_RULES}

    def predict(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """Of token 1 and all later ones of samples [N, L + 1]: how uncertain the model was of it, [N, L] float16."""
        given = torch.from_numpy(tokens[:, :-1].astype(np.int64)).to(self.device)
        found = self.model.entropies(given).cpu().numpy().astype(np.float16)
        for rule, values in (
            ("entropy", found),
            ("monotonic", np.diff(found.astype(np.float32), axis=1).astype(np.float16)),
        ):
            self.counts[rule] += np.bincount(values.view(np.uint16).ravel(), minlength=CODES)
        return {ENTROPIES: found}

    def facts(self, log: Callable[[str], None]) -> dict[str, Any]:
        """The thresholds for the wanted mean size. `log` is told the size that each gives."""
        thresholds = {}
        for rule, counts in self.counts.items():
            thresholds[rule], size = threshold_for(counts, self.size)
            log(
                f"patches: {rule} above {thresholds[rule]:.6g} nats gives {size:.3f} tokens on average ({self.size:g} asked)"
            )
        separate = self.model.end is not None
        return {
            "patches": PatchesInfo(
                self.source, self.weights, separate, float(self.size), thresholds, histogram(self.counts["entropy"])
            )
        }


def values_of(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the float16 that occur, ascending, as float64; how often each does). counts: by code, [CODES]"""
    codes = np.flatnonzero(counts)
    values = codes.astype(np.uint16).view(np.float16).astype(np.float64)
    order = np.argsort(values, kind="stable")
    return values[order], counts[codes[order]]


def threshold_for(counts: np.ndarray, size: float) -> tuple[float, float]:
    """(threshold, mean size of the patches that it gives), the size nearest to `size`: patches end where a value is above the threshold,
    which lies between two float16 and is not below 0. counts: of each value, by its code."""
    values, often = values_of(counts)
    above = often.sum() - np.cumsum(often)  # how many are above each value
    sizes = often.sum() / np.maximum(above, 1)
    sizes = np.where(values < 0, np.inf, sizes)
    best = int(np.argmin(np.abs(np.log(sizes / size))))
    after = values[best + 1] if best + 1 < len(values) else values[best] + 1
    return float((values[best] + after) / 2), float(sizes[best])


def histogram(counts: np.ndarray) -> list[int]:
    """Entropies in bins of a tenth of a nat."""
    values, often = values_of(counts)
    return np.bincount((np.maximum(values, 0) * TENTHS).astype(int), weights=often).astype(int).tolist()


def open_entropy_model(
    parent: Parent, tokenizer: TokenizerInfo, device: torch.device, world: World
) -> tuple[EntropyModel, str]:
    """(the model, sha256 of its weights)"""
    frozen = Frozen(FrozenSpec(str(parent)), portable(parent.model))
    meta = build_meta(*frozen.classes())
    digest = hashlib.sha256()
    with told_as("patches"):
        weights = parent.weights("evaluation", *frozen.classes(), world)
        model = with_weights(meta, digested(weights, digest), device)
    apart = isinstance(parent, RunParent) and parent.config.data.separate_documents
    return EntropyModel(model, tokenizer.vocab_size, tokenizer.eot_id if apart else None), digest.hexdigest()


def digested(weights: Iterable[tuple[str, Tensor]], digest: Any) -> Iterator[tuple[str, Tensor]]:
    """The same weights, each added to `digest` by its name and its values in fp32. They always come in the same order."""
    for name, tensor in weights:
        digest.update(name.encode())
        digest.update(tensor.detach().float().contiguous().cpu().numpy().tobytes())
        yield name, tensor


def open_patcher(info: PatchesInfo, tokenizer: TokenizerInfo, device: torch.device, world: World) -> EntropyModel:
    """The model that a dataset's entropies are of. UserError if it is no longer there, Damaged if it has other weights."""
    with told_as("patches"):
        parent = find_parent(info.run, world.say)
    model, weights = open_entropy_model(parent, tokenizer, device, world)
    if weights != info.weights:
        raise Damaged(
            f"patches: {info.run} has other weights than when the data were prepared; prepare the data again with --patches"
        )
    return model


def give_patcher(
    model: Any, info: PatchesInfo | None, tokenizer: TokenizerInfo, device: torch.device, world: World
) -> None:
    """Pass the entropy model down to a model that needs one. info: of the data that it was trained on."""
    if model.entropy_rule(model.config) is None:
        return
    if info is None:
        raise UserError(
            f"model.patching: {model.config.patching} needs the entropies of another model, which the data of this run do not name; prepare "
            "data with --patches RUN"
        )
    model.patcher = open_patcher(info, tokenizer, device, world)
