"""Whole matrices for optimisers that need them (Muon, SOAP): each matrix has an owner rank, which sees the whole gradient,
computes the update once, and hands every rank its part."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from trainer.runtime.distributed import World

Update = Callable[[str, Tensor], Tensor]  # (name, whole gradient [m, n]) -> whole update [m, n]


def deal(costs: dict[str, float], ranks: int) -> dict[str, int]:
    """Name -> rank: the costliest first, each to the rank that has least so far."""
    loads, owners = [0.0] * ranks, {}
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += costs[name]
    return owners


def matrix_costs(shapes: dict[str, torch.Size]) -> dict[str, float]:
    """What the update of an [m, n] matrix costs up to a factor: products with its smaller Gram matrix, m n min(m, n)."""
    return {name: float(shape.numel() * min(shape)) for name, shape in shapes.items()}


def update_copies(gradients: dict[str, Tensor], update: Update, world: World) -> dict[str, Tensor]:
    """single, ddp: all ranks hold the same whole gradients; each owner's updates go to all the others."""
    owners = deal(matrix_costs({name: gradient.shape for name, gradient in gradients.items()}), world.size)
    updates = {
        name: update(name, gradient).contiguous() if owners[name] == world.rank else torch.empty_like(gradient)
        for name, gradient in gradients.items()
    }
    if world.size > 1:
        wait([dist.broadcast(tensor, owners[name], async_op=True) for name, tensor in updates.items()])
    return updates


def update_shards(gradients: dict[str, DTensor], update: Update, mesh: DeviceMesh) -> dict[str, Tensor]:
    """fsdp, hsdp: gradients are cut by rows over the mesh's dimension "shard"; returns this rank's rows of every update.

    With several copies of the model (hsdp) the owners are dealt out over all ranks: each copy gathers, computes and
    scatters some of the matrices, then the copies exchange the rows they have.
    """
    ranks = mesh.mesh.view(-1, mesh["shard"].size())  # [copies, shards]
    owners = deal(matrix_costs({name: gradient.shape for name, gradient in gradients.items()}), ranks.numel())
    place = {rank: (copy, shard) for copy, row in enumerate(ranks.tolist()) for shard, rank in enumerate(row)}
    owner_ranks = {name: int(ranks.flatten()[owner]) for name, owner in owners.items()}
    copy, shard = place[dist.get_rank()]

    ours = {name: gradient for name, gradient in gradients.items() if place[owner_ranks[name]][0] == copy}
    updates = _gather_update_scatter(ours, update, owner_ranks, mesh)
    if len(ranks) > 1:
        for name, gradient in gradients.items():
            updates.setdefault(name, torch.empty_like(gradient.to_local()))
        sources = {name: int(ranks[place[owner_ranks[name]][0], shard]) for name in gradients}
        column = mesh.get_group("replicate")
        wait([dist.broadcast(updates[name], sources[name], group=column, async_op=True) for name in gradients])
    return updates


def _gather_update_scatter(
    gradients: dict[str, DTensor], update: Update, owners: dict[str, int], mesh: DeviceMesh
) -> dict[str, Tensor]:
    """Within one copy of the model. All gather before any owner computes, so that the owners compute at the same time."""
    group, width = mesh.get_group("shard"), mesh["shard"].size()
    padded: dict[
        str, Tensor
    ] = {}  # this rank's rows; collectives want equal pieces, so some have rows that mean nothing
    pieces: dict[str, list[Tensor] | None] = {}  # of all ranks, at the owner
    for name, gradient in gradients.items():
        local = gradient.to_local()
        padded[name] = local.new_zeros(-(-gradient.shape[0] // width), *gradient.shape[1:])
        padded[name][: len(local)] = local
        mine = owners[name] == dist.get_rank()
        pieces[name] = [torch.empty_like(padded[name]) for _ in range(width)] if mine else None
    wait([dist.gather(padded[name], pieces[name], owners[name], group, async_op=True) for name in gradients])
    for name, parts in pieces.items():
        if parts is not None:
            stacked = torch.cat(parts)
            rows = gradients[name].shape[0]
            stacked[:rows] = update(name, stacked[:rows])
            pieces[name] = list(stacked.chunk(width))
    wait([dist.scatter(padded[name], pieces[name], owners[name], group, async_op=True) for name in gradients])
    return {name: padded[name][: len(gradient.to_local())].contiguous() for name, gradient in gradients.items()}


def wait(works: list) -> None:
    for work in works:
        work.wait()
