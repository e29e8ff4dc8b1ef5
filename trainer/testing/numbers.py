"""Checks of what a model computes: initial weights, logits, losses, gradients, decoding, FLOPs."""

from __future__ import annotations

import copy
import functools
import io
import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from models.base import IGNORE
from models.materialise import materialise
from models.state import State
from trainer.runtime.compat import pretended_process_group
from trainer.testing.subject import (
    ROWS,
    SCALE,
    VOCAB,
    Check,
    Skipped,
    Subject,
    distance,
    gradients,
    require,
    require_close,
    train,
)


def state_of(model: Any, batch: int, max_length: int | None = None) -> Any:
    return model.new_state(batch, max_length, torch.device("cpu"), torch.float32)


# -- weights -----------------------------------------------------------------------------------------------------------


def weights_depend_on_the_seed_alone(subject: Subject) -> None:
    before = torch.get_rng_state()
    first, same, other = subject.build(), subject.build(), subject.build(seed=1)
    require(torch.equal(torch.get_rng_state(), before), "init_weights draws from torch's global generator")
    for name, value in itertools.chain(first.named_parameters(), first.named_buffers()):
        if isinstance(value, torch.nn.Parameter):
            require(value.isfinite().all(), f"{name} is not finite")
    changed = False
    for name, value in first.state_dict().items():
        require(torch.equal(same.state_dict()[name], value), f"{name} differs between two models of one seed")
        changed |= not torch.equal(other.state_dict()[name], value)
    require(changed, "another seed gives the same weights")


def shards_are_parts_of_the_whole(subject: Subject) -> None:
    """Initialise as rank 1 of 2, while rank 0 does not exist: initialising must need no communication."""
    whole = subject.build()
    with pretended_process_group(rank=1, size=2):
        model = subject.meta_at(SCALE)
        mesh = dist.init_device_mesh("cpu", (2,))
        for module in (*model.blocks(), model):
            fully_shard(module, mesh=mesh)
        materialise(model, torch.device("cpu"), torch.Generator().manual_seed(0))
        sharded = dict(model.named_parameters())
        for name, parameter in whole.named_parameters():
            chunks = parameter.chunk(2)
            expected = chunks[1] if len(chunks) > 1 else parameter[:0]
            require(
                torch.equal(sharded[name].to_local(), expected),
                f"{name}: its second shard is not the second half of the whole; initialise with normal_ and fill_ of models.layers",
            )


def gradients_reach_every_parameter(subject: Subject) -> None:
    model, tokens, targets = subject.model, subject.tokens, subject.targets
    found = gradients(model, tokens, targets)[1]
    for name, gradient in found.items():
        require(gradient is not None, f"{name} gets no gradient")
        require(gradient.isfinite().all(), f"the gradient of {name} is not finite")  # type: ignore[union-attr]
    require(any(bool(g.any()) for g in found.values() if g is not None), "all gradients are 0")


@torch.no_grad()
def state_dict_carries_the_whole(subject: Subject) -> None:
    model, other, stored = subject.model, subject.build(seed=5), io.BytesIO()
    torch.save(model.state_dict(), stored)
    stored.seek(0)
    other.load_state_dict(torch.load(stored, weights_only=True))
    same = torch.equal(model(subject.tokens).logits, other(subject.tokens).logits)
    require(same, "a model with the state_dict of another gives other logits")


def copies_share_no_state(subject: Subject) -> None:
    model, tokens = subject.model, subject.tokens
    before, twin = model(tokens).logits.detach(), copy.deepcopy(model)
    train(twin, tokens, subject.targets, steps=2)
    if (state := state_of(twin, ROWS)) is not None:
        twin(tokens, cache=state)
    require(torch.equal(model(tokens).logits, before), "training a copy changes the model")
    require(not torch.equal(twin(tokens).logits, before), "two steps of training change nothing")


# -- forward -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def no_token_sees_the_future(subject: Subject, tolerance: float = 1e-5) -> None:
    """Each token of each row is changed, in one batch: a model that mixes its rows fails too."""
    model, tokens, length = subject.model, subject.tokens, subject.length
    same = tokens.repeat_interleave(length, dim=0)  # [B T, T], row b T + j is to be changed at j
    changed, columns = same.clone(), torch.arange(length).repeat(ROWS)
    changed[torch.arange(len(same)), columns] = (tokens.flatten() + 1) % VOCAB
    logits = model(same).logits
    shape = tuple(logits.shape)
    expected = (len(same), length, VOCAB)
    require(shape == expected, f"logits are {list(shape)}, not {list(expected)}")
    perturbed = model(changed).logits
    for j in range(length):
        rows = columns == j
        told = f"token {j} changes the logits of those before it, or of other rows"
        require_close(perturbed[rows, :j], logits[rows, :j], told, tolerance)
        seen = all(not torch.equal(perturbed[row, j:], logits[row, j:]) for row in rows.nonzero())
        require(seen, f"token {j} changes no logits")


@torch.no_grad()
def inputs_stay_as_they_are(subject: Subject) -> None:
    model, tokens, targets = subject.model, subject.tokens, subject.targets
    documents = torch.arange(subject.length).expand(ROWS, -1) // 5
    given = {"tokens": tokens.clone(), "targets": targets.clone(), "documents": documents.clone()}
    model(given["tokens"])
    model(given["tokens"], given["targets"], documents=given["documents"] if model.masks_documents else None)
    if (state := state_of(model, ROWS)) is not None:
        model(given["tokens"], cache=state)
    for (name, value), before in zip(given.items(), (tokens, targets, documents), strict=True):
        require(torch.equal(value, before), f"the model writes into the {name} that it is given")


@torch.no_grad()
def loss_is_the_cross_entropy(subject: Subject) -> None:
    model, tokens, targets = subject.model, subject.tokens, subject.targets
    output = model(tokens, targets)
    require(output.logits is None, "with targets the model still returns logits: they take memory beside the loss")
    kind = f"{output.loss.dtype}, {list(output.loss.shape)}"
    require(output.loss.shape == () and output.loss.dtype == torch.float32, f"the loss is {kind}, not an fp32 scalar")
    parts = sum(part.double() for part in (output.parts or {}).values())
    log_probabilities = model(tokens).logits.double().log_softmax(-1)
    expected = -log_probabilities.gather(-1, targets[..., None]).mean()
    require_close(
        output.loss.double() - parts, expected, "the loss minus its parts and the cross-entropy of the logits"
    )


@torch.no_grad()
def ignored_targets_do_not_count(subject: Subject) -> None:
    model, tokens, targets, half = subject.model, subject.tokens, subject.targets, subject.length // 2
    counted, others = targets.clone(), targets.clone()
    counted[0, :half] = IGNORE
    others[0, half:] = others[1] = IGNORE
    total, mean = model(tokens, counted, reduction="sum").loss, model(tokens, counted).loss
    require_close(total, mean * (counted != IGNORE).sum(), "the sum and the mean times the targets that count")
    rest, whole = (model(tokens, t, reduction="sum").loss for t in (others, targets))
    require_close(total + rest, whole, "the sums over two halves of the targets and over all")


def nothing_that_counts_is_a_zero_loss(subject: Subject) -> None:
    model, tokens = subject.model, subject.tokens
    loss, found = gradients(model, tokens, torch.full_like(tokens, IGNORE), reduction="sum")
    require(loss == 0, f"if every target is IGNORE, the sum is {loss.item():.3g}, not 0")
    for name, gradient in found.items():
        require(gradient is not None and not gradient.any(), f"if every target is IGNORE, {name} still has a gradient")


@torch.no_grad()
def documents_are_kept_apart(subject: Subject) -> None:
    model, tokens, length = subject.model, subject.tokens, subject.length
    if not model.masks_documents:
        raise Skipped("masks_documents is false")
    lengths = [length // 4, 1, length // 3]
    lengths.append(length - sum(lengths))
    for numbers in ([0, 1, 2, 3], [7, 1, 7, 1]):  # a number that occurs again is a new document
        documents = torch.repeat_interleave(torch.tensor(numbers), torch.tensor(lengths)).expand(ROWS, length)
        packed = model(tokens, documents=documents).logits
        for start, stop in itertools.pairwise([0, *itertools.accumulate(lengths)]):
            name = f"document {start}:{stop} among others (numbers {numbers}) and alone"
            require_close(packed[:, start:stop], alone(model, tokens, start, stop), name)


def alone(model: Any, tokens: Tensor, start: int, stop: int) -> Tensor:
    """Logits of a document without others, except for other tokens that put it at the same place of the model's grid."""
    offset = start % model.document_grid
    if not offset:
        return model(tokens[:, start:stop]).logits
    others = (tokens[:, start - offset : start] + 1) % VOCAB
    padded = torch.cat((others, tokens[:, start:stop]), dim=1)
    documents = (torch.arange(padded.shape[1]) >= offset).long().expand_as(padded)
    return model(padded, documents=documents).logits[:, offset:]


@torch.no_grad()
def cached_decoding_equals_the_whole(subject: Subject) -> None:
    model, tokens, length = subject.model, subject.tokens, subject.length
    if state_of(model, ROWS) is None:
        raise Skipped("new_state returns None: generation computes the whole context again for every token")
    whole, third = model(tokens).logits, max(1, length // 3)
    for chunks in (
        [1] * length,
        [length],
        [third] + [1] * (length - third),
        [third, 1, length - third - 1],
    ):
        state = state_of(model, ROWS, length)
        logits = [model(part, cache=state).logits for part in tokens.split(chunks, dim=1)]
        told = f"logits of {len(chunks)} calls with a cache and of the whole"
        require_close(torch.cat(logits, dim=1), whole, told)
        require(state.length == length, f"the state's length is {state.length} after {length} tokens")  # type: ignore[union-attr]
    state_can_be_changed(subject)


def state_can_be_changed(subject: Subject) -> None:
    """The state of texts that decode together can be reordered, reset, restored and, if the state allows it, cropped."""
    model, tokens, length = subject.model, subject.tokens, subject.length
    whole, half = model(tokens).logits, max(1, length // 2)

    def read(state: State, tokens: Tensor, expected: Tensor, told: str) -> None:
        require_close(model(tokens, cache=state).logits, expected, f"logits after {told} and of the whole")

    state = state_of(model, ROWS, length)
    model(tokens[:, :half], cache=state)
    require(state.nbytes > 0, f"the state's nbytes are {state.nbytes} after {half} tokens")
    swapped = torch.arange(ROWS).flip(0)
    state.select(swapped)
    read(state, tokens[swapped, half:], whole[swapped, half:], "select")
    state.reset()
    read(state, tokens, whole, "reset")
    state.reset()
    model(tokens[:, :half], cache=state)
    snapshot = state.snapshot()
    model(tokens[:, half:].flip(1), cache=state)
    state.restore(snapshot)
    require(state.length == half, f"the state's length is {state.length} after restore of a snapshot of {half} tokens")
    read(state, tokens[:, half:], whole[:, half:], "restore")
    state.reset()
    model(tokens[:, :half], cache=state)
    model(tokens[:, half:].flip(1), cache=state)
    try:
        state.crop(half)
    except ValueError:
        require(state.length == length, "a crop that the state refuses changes its length")
    else:
        require(state.length == half, f"the state's length is {state.length} after crop({half})")
        read(state, tokens[:, half:], whole[:, half:], "crop")


@torch.no_grad()
def bf16_is_near_fp32(subject: Subject) -> None:
    model, tokens, targets = subject.model, subject.tokens, subject.targets
    exact = model(tokens, targets).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, targets).loss
    require(loss.dtype == torch.float32, f"under autocast the loss is {loss.dtype}, not fp32")
    require(
        torch.allclose(loss, exact, rtol=1e-2), f"in bf16 the loss is {loss.item():.5g}, in fp32 {exact.item():.5g}"
    )


@torch.no_grad()
def too_long_a_sequence_is_refused(subject: Subject) -> None:
    model = subject.model
    limit = model.max_context
    if limit is None:
        raise Skipped("max_context is None: any length")
    longer = torch.zeros(1, limit + 1, dtype=torch.long)

    def refused(call: functools.partial) -> None:
        try:
            call()
        except ValueError as error:
            named = str(limit + 1) in str(error) and str(limit) in str(error)
            require(named, f"the error of {limit + 1} tokens does not name both lengths: {error}")
        else:
            require(False, f"{limit + 1} tokens are accepted, but max_context is {limit}")

    refused(functools.partial(model, longer))
    if (state := state_of(model, 1)) is not None:
        model(longer[:, :-1], cache=state)
        refused(functools.partial(model, longer[:, -1:], cache=state))


# -- training ----------------------------------------------------------------------------------------------------------


def loss_falls_on_one_batch(subject: Subject) -> None:
    """At one of two learning rates, since models tolerate different ones."""
    tokens, targets = subject.tokens, subject.targets
    runs = [train(subject.build(), tokens, targets, steps=40, lr=lr) for lr in (3e-3, 1e-2)]
    first, last = runs[0][0], min(losses[-1] for losses in runs)
    require(last < 0.5 * first, f"40 steps on one batch bring the loss only from {first:.3g} to {last:.3g}")


def recomputed_blocks_give_the_same_gradients(subject: Subject) -> None:
    model, tokens, targets = subject.model, subject.tokens, subject.targets
    loss, plain = gradients(model, tokens, targets)
    for block in model.blocks():
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    again, recomputed = gradients(model, tokens, targets)
    require(torch.equal(again, loss), "under activation checkpointing the loss differs")
    for name, gradient in recomputed.items():
        same = gradient is not None and plain[name] is not None and distance(gradient, plain[name]) == 0  # type: ignore[arg-type]
        require(same, f"under activation checkpointing the gradient of {name} differs")


def flops_are_those_counted(subject: Subject, may_leave_out: bool = True) -> None:
    """Within 2 %: the backward pass saves one product, the gradient of the first block's input (embedding lookups cost nothing).

    may_leave_out: the model may compute less than what the convention counts, the whole square of attention.
    """
    model = subject.model
    lengths = [length for length in (64, 256) if model.max_context is None or length <= model.max_context]
    if not lengths:
        raise Skipped(f"max_context is {model.max_context}: too short to tell products from the rest")
    # Where a row has some room besides, for patches, a token of a longer row may cost less.
    per_length = max(0, model.flops_per_token(64) - model.flops_per_token(32)) / (64 - 32)
    for length in lengths:
        tokens = torch.randint(VOCAB, (1, length), generator=torch.Generator().manual_seed(0))
        # The counter knows matrix products, not every fused attention kernel of the CPU.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(tokens, tokens).loss.backward()
        counted, said = counter.get_total_flops() / length, model.flops_per_token(length)
        least = said - per_length * length if may_leave_out else said
        require(
            0.98 * least <= counted <= 1.02 * said,
            f"flops_per_token({length}) is {said:,}, but the count is {counted:,.0f} (2 per multiply-add, attention over the "
            "whole square, the backward pass twice the forward pass)",
        )


CHECKS = [
    Check(
        "initial weights", "init_weights sets everything, from the seed alone", weights_depend_on_the_seed_alone, True
    ),
    Check("shards", "a shard's initial weights are its part of the whole", shards_are_parts_of_the_whole),
    Check("gradients", "every parameter gets a finite gradient", gradients_reach_every_parameter),
    Check("state_dict", "state_dict carries the whole model", state_dict_carries_the_whole),
    Check("copies", "copies share no state", copies_share_no_state),
    Check("causality", "no token sees the future", no_token_sees_the_future),
    Check("inputs", "the batch that a model is given stays as it is", inputs_stay_as_they_are),
    Check("loss", "the loss is the cross-entropy of the logits", loss_is_the_cross_entropy),
    Check("ignored targets", "targets that are IGNORE do not count", ignored_targets_do_not_count),
    Check("no targets", "if no target counts, loss and gradients are 0", nothing_that_counts_is_a_zero_loss),
    Check("documents", "documents do not see each other", documents_are_kept_apart),
    Check("decoding", "decoding with a cache gives the same logits", cached_decoding_equals_the_whole),
    Check("bf16", "under autocast to bf16 the loss is near fp32's", bf16_is_near_fp32),
    Check("context", "more than max_context tokens are refused", too_long_a_sequence_is_refused),
    Check("learning", "the loss falls on one batch", loss_falls_on_one_batch),
    Check("flops", "flops_per_token agrees with a count", flops_are_those_counted),
    Check("recomputation", "activation checkpointing changes nothing", recomputed_blocks_give_the_same_gradients),
]
