"""Whole tensors for rules that need them (scope matrix or tensor).

Each tensor has an owner rank. The owner gets the whole gradients and weights of all its tensors, computes their updates at once,
and sends every rank its part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

# Of the tensors that a rank owns, by name: (whole gradient, whole weight) -> whole result, of which each rank gets its part
Update = Callable[[dict[str, tuple[Tensor, Tensor]]], dict[str, Tensor]]


def deal(costs: dict[str, float], ranks: int) -> dict[str, int]:
    """Name -> rank. Assigns the most expensive first, each to the rank with the least cost so far."""
    loads, owners = [0.0] * ranks, {}
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += costs[name]
    return owners


def update_cost(shapes: Iterable[torch.Size]) -> float:
    """Relative cost of an update of tensors. For an [m, n] matrix: products with its smaller Gram matrix, m n min(m, n)."""
    return float(sum(shape.numel() * (min(shape) if len(shape) == 2 else 1) for shape in shapes))


def update_copies(
    tensors: dict[str, tuple[Tensor, Tensor]], update: Update, owners: dict[str, int]
) -> dict[str, Tensor]:
    """single, ddp: all ranks hold the same whole (gradient, weight). Each owner broadcasts its results to the others."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    own = update({name: pair for name, pair in tensors.items() if owners[name] == rank})
    updates = {
        name: own[name].contiguous() if name in own else torch.empty_like(weight, memory_format=torch.contiguous_format)
        for name, (_, weight) in tensors.items()
    }
    if dist.is_initialized() and dist.get_world_size() > 1:
        wait([dist.broadcast(tensor, owners[name], async_op=True) for name, tensor in updates.items()])
    return updates


def ranks_of(mesh: DeviceMesh) -> list[list[int]]:
    """[copies][shards]: the ranks that hold each copy of the model."""
    return mesh.mesh.view(-1, mesh["shard"].size()).tolist()


def update_shards(
    tensors: dict[str, tuple[DTensor, DTensor]], update: Update, owners: dict[str, int], mesh: DeviceMesh
) -> dict[str, Tensor]:
    """fsdp, hsdp: (gradient, weight) are sharded by rows over the mesh dimension "shard". Returns this rank's rows of all updates.

    With several copies of the model (hsdp) the owners are spread over all ranks: each copy gathers, computes and scatters some
    of the matrices, then the copies exchange the resulting rows.
    """
    ranks = ranks_of(mesh)
    place = {rank: (copy, shard) for copy, row in enumerate(ranks) for shard, rank in enumerate(row)}
    copy, shard = place[dist.get_rank()]

    ours = {name: pair for name, pair in tensors.items() if place[owners[name]][0] == copy}
    updates = _gather_update_scatter(ours, update, owners, mesh)
    if len(ranks) > 1:
        for name, (_, weight) in tensors.items():
            updates.setdefault(name, torch.empty_like(weight.to_local()))
        sources = {name: ranks[place[owners[name]][0]][shard] for name in tensors}
        column = mesh.get_group("replicate")
        wait([dist.broadcast(updates[name], sources[name], group=column, async_op=True) for name in tensors])
    return updates


def _gather_update_scatter(
    tensors: dict[str, tuple[DTensor, DTensor]], update: Update, owners: dict[str, int], mesh: DeviceMesh
) -> dict[str, Tensor]:
    """`update_shards` within one copy of the model. All gathers come first, so that the owners compute at the same time."""
    group, width, rank = mesh.get_group("shard"), mesh["shard"].size(), dist.get_rank()
    padded = {name: [_padded(tensor, width) for tensor in pair] for name, pair in tensors.items()}
    pieces = {  # on the owner: the pieces of all ranks
        name: [[torch.empty_like(part) for _ in range(width)] if owners[name] == rank else None for part in parts]
        for name, parts in padded.items()
    }
    wait(
        [
            dist.gather(part, all_parts, owners[name], group, async_op=True)
            for name, parts in padded.items()
            for part, all_parts in zip(parts, pieces[name], strict=True)
        ]
    )
    whole = {
        name: [torch.cat(part) for part in pieces[name] if part is not None] for name in tensors if owners[name] == rank
    }
    rows = {name: len(tensors[name][1]) for name in whole}  # without the padding
    own = update({name: (gradient[: rows[name]], weight[: rows[name]]) for name, (gradient, weight) in whole.items()})
    results: dict[str, list[Tensor] | None] = dict.fromkeys(tensors)
    for name, (_, padded_weight) in whole.items():
        padded_weight[: rows[name]] = own[name]
        results[name] = list(padded_weight.chunk(width))
    received = {name: parts[1] for name, parts in padded.items()}
    wait([dist.scatter(received[name], results[name], owners[name], group, async_op=True) for name in tensors])
    return {name: received[name][: len(weight.to_local())].contiguous() for name, (_, weight) in tensors.items()}


class Piece(NamedTuple):
    """This rank's part of a flattened parameter: `size` numbers of a flat vector, from `start` on."""

    vector: Tensor
    start: int
    size: int

    @property
    def weight(self) -> Tensor:
        return self.vector.detach().narrow(0, self.start, self.size)

    @property
    def gradient(self) -> Tensor:
        assert self.vector.grad is not None
        return self.vector.grad.narrow(0, self.start, self.size)


def update_pieces(
    pieces: dict[str, Piece],
    shapes: dict[str, torch.Size],
    sizes: dict[str, list[int]],
    update: Update,
    owners: dict[str, int],
) -> dict[str, Tensor]:
    """zero1 to zero3: each rank holds a piece of each flattened parameter, of sizes[name][rank], in the order of the ranks. Returns
    this rank's piece of all updates."""
    exchange = _PieceExchange(list(pieces), sizes, owners)
    gradients = exchange.to_owners({name: piece.gradient for name, piece in pieces.items()})
    weights = exchange.to_owners({name: piece.weight for name, piece in pieces.items()})
    own = update({name: (gradients[name].view(shapes[name]), weights[name].view(shapes[name])) for name in weights})
    received = {name: torch.empty_like(piece.weight) for name, piece in pieces.items()}
    exchange.to_ranks({name: values.flatten() for name, values in own.items()}, received)
    return received


class _PieceExchange:
    """Flattened parameters between their owners and the ranks that hold pieces of them: one all-to-all each way."""

    def __init__(self, names: list[str], sizes: dict[str, list[int]], owners: dict[str, int]) -> None:
        self.rank, self.sizes = dist.get_rank(), sizes
        self.of_owner: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        for name in names:
            self.of_owner[owners[name]].append(name)
        self.own = self.of_owner[self.rank]
        # How many numbers this rank exchanges with each other one: of pieces that it holds, and of parameters that it owns.
        self.held = [sum(sizes[name][self.rank] for name in theirs) for theirs in self.of_owner]
        self.owned = [sum(sizes[name][rank] for name in self.own) for rank in range(len(self.of_owner))]

    def to_owners(self, pieces: dict[str, Tensor]) -> dict[str, Tensor]:
        """The whole flattened parameters that this rank owns."""
        sent = torch.cat([pieces[name] for theirs in self.of_owner for name in theirs])
        received = sent.new_empty(sum(self.owned))
        dist.all_to_all_single(received, sent, self.owned, self.held)
        parts = [
            part.split([self.sizes[name][rank] for name in self.own])
            for rank, part in enumerate(received.split(self.owned))
        ]
        return {name: torch.cat([part[place] for part in parts]) for place, name in enumerate(self.own)}

    def to_ranks(self, whole: dict[str, Tensor], pieces: dict[str, Tensor]) -> None:
        """Fill `pieces`, those that this rank holds, with what the owners have."""
        names = [name for theirs in self.of_owner for name in theirs]
        cut = {name: whole[name].split(self.sizes[name]) for name in self.own}
        received = pieces[names[0]].new_empty(sum(self.held))
        sent = torch.cat([received[:0], *(cut[name][rank] for rank in range(len(self.of_owner)) for name in self.own)])
        dist.all_to_all_single(received, sent, self.held, self.owned)
        for name, values in zip(names, received.split([pieces[name].numel() for name in names]), strict=True):
            pieces[name].copy_(values)


def _padded(tensor: DTensor, width: int) -> Tensor:
    """This rank's rows, padded with rows of zeros, because collectives need pieces of equal size."""
    local = tensor.to_local()
    padded = local.new_zeros(-(-tensor.shape[0] // width), *tensor.shape[1:])
    padded[: len(local)] = local
    return padded


def wait(works: list) -> None:
    for work in works:
        work.wait()
