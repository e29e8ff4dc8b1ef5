"""Preflight: reports, before training begins, how the machines of a run differ and which of them is slow.

trainer/runtime/host_info.py checks that the processes fit together when they meet. After that, `measure` runs on all ranks
in lockstep: clocks, free disk, a matrix product on every rank, an all-reduce, and the links between machines. `judge` warns
of what is slow or short.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer.core.errors import UserError
from trainer.engine.base import prepare_device
from trainer.runtime.device import choose_device
from trainer.runtime.distributed import World
from trainer.runtime.host_info import HostInfo, compare, find_host_info, machines, rank_names, where

SLOW = 0.7  # of the median speed: warn of a rank or a machine below it
CLOCK_SECONDS = 3.0  # warn of clocks further apart
TEMPORARY_BYTES = 10**9  # warn of less free space for temporary files
ROUNDS = 5  # of each measurement


@dataclass(frozen=True)
class Measured:
    """The measurements of one rank. Rates are in FLOP/s and bytes/s."""

    flops: float
    free_run: int  # bytes at the run folder
    free_temporary: int
    clock: list[tuple[float, float]] = field(default_factory=list)  # own time before and after each collective
    bus: float = 0.0  # bus bandwidth of the all-reduce
    links: dict[tuple[int, int], float] = field(default_factory=dict)  # by the indices of two machines, each direction


def measure(world: World, everyone: Sequence[HostInfo], device: torch.device, folder: Path) -> Measured:
    """All ranks call this. It draws no random numbers and leaves no memory in use."""
    clock = []
    for _ in range(ROUNDS if world.size > 1 else 0):
        before = time.time()
        _line_up(world)
        clock.append((before, time.time()))
    measured = Measured(
        flops=_matmul(world, device),
        free_run=_free(folder),
        free_temporary=_free(Path(tempfile.gettempdir())),
        clock=clock,
        bus=_all_reduce(world, device) if world.size > 1 else 0.0,
        links=_exchange_along_ring(world, everyone, device),
    )
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return measured


def _line_up(world: World) -> None:
    """A barrier: no rank leaves before all have entered."""
    world.sum(torch.zeros(1))


def _free(path: Path) -> int:
    """Free bytes at `path`, or at its nearest parent that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _seconds(work: Callable[[], Any], device: torch.device) -> list[float]:
    """Seconds of each of ROUNDS calls, after one call to warm up."""
    taken = []
    for _ in range(1 + ROUNDS):
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - begin)
    return taken[1:]


def _matmul(world: World, device: torch.device) -> float:
    """FLOP/s of the fastest of ROUNDS calls, while all ranks multiply. So a brief load by other programs does not count."""
    on_gpu = device.type == "cuda"
    n, times = (8192, 8) if on_gpu else (256, 8)
    native = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    matrix = torch.full((n, n), 1 / n, device=device, dtype=torch.bfloat16 if native else torch.float32)
    product = torch.empty_like(matrix)

    def multiply() -> None:
        for _ in range(times):
            torch.mm(matrix, matrix, out=product)

    _line_up(world)
    return times * 2 * n**3 / min(_seconds(multiply, device))


def _all_reduce(world: World, device: torch.device) -> float:
    """Bus bandwidth, 2 (n - 1) / n * bytes / seconds: what each link of a ring carries, comparable for any number of ranks n."""
    tensor = torch.zeros(all_reduce_bytes(device.type) // 4, device=device)
    _line_up(world)
    seconds = statistics.median(_seconds(lambda: dist.all_reduce(tensor), device))
    return 2 * (world.size - 1) / world.size * 4 * tensor.numel() / seconds


def all_reduce_bytes(device: str) -> int:
    """Enough bytes for a link's full speed, but few enough for a slow link."""
    return 64 * 2**20 if device == "cuda" else 4 * 2**20


def _exchange_along_ring(
    world: World, everyone: Sequence[HostInfo], device: torch.device
) -> dict[tuple[int, int], float]:
    """Bytes/s in each direction between this machine and its neighbours, measured by each machine's first rank."""
    firsts = [ranks[0] for ranks in machines(everyone).values()]
    size = all_reduce_bytes(device.type) // 4
    rates = {}
    for pairing in pairings(len(firsts)):
        for link in pairing:
            ends = [firsts[number] for number in link]
            if world.rank in ends:
                peer = ends[1 - ends.index(world.rank)]
                rates[link] = size / min(_seconds(_exchange(size, peer, device), device))
        _line_up(world)
    return rates


def _exchange(size: int, peer: int, device: torch.device) -> Callable[[], None]:
    """A function that sends `size` bytes to `peer` and receives as many from it at the same time."""
    out, into = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))

    def work() -> None:
        operations = [dist.P2POp(dist.isend, out, peer), dist.P2POp(dist.irecv, into, peer)]
        for request in dist.batch_isend_irecv(operations):
            request.wait()

    return work


def pairings(count: int) -> list[list[tuple[int, int]]]:
    """The links of a ring of `count` machines, in turns. In each turn a machine has at most one link."""
    if count < 3:
        return [[(0, 1)]] if count == 2 else []
    links = [(number, (number + 1) % count) for number in range(count)]
    even = count - count % 2
    return [turn for turn in (links[:even:2], links[1:even:2], links[even:]) if turn]


# -- what it means -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Survey:
    """Hosts and measurements of all ranks, by rank."""

    host_infos: list[HostInfo]
    measured: list[Measured]

    def clocks(self) -> dict[str, tuple[float, float]]:
        """By machine: seconds that its clock is ahead of the first machine's, and the error of that figure.

        No rank leaves a collective before all have entered it. So of two ranks, each enters before the other leaves. This
        bounds the difference of their clocks from both sides, however long messages take.
        """
        first, found = self.measured[0].clock, {}
        for host, ranks in machines(self.host_infos).items():
            both = list(zip(self.measured[ranks[0]].clock, first, strict=True))
            low = max((own[0] - other[1] for own, other in both), default=0.0)
            high = min((own[1] - other[0] for own, other in both), default=0.0)
            found[host] = ((low + high) / 2, (high - low) / 2)
        return found

    def speeds(self) -> list[float]:
        """Speed of each rank's matrix product, relative to the median."""
        middle = statistics.median_high(one.flops for one in self.measured)
        return [one.flops / middle for one in self.measured]

    def links(self) -> dict[tuple[str, str], float]:
        """Bytes/s of each link between two machines, as the slower end measured it."""
        hosts = list(machines(self.host_infos))
        rates: dict[tuple[str, str], float] = {}
        for one in self.measured:
            for (a, b), rate in one.links.items():
                rates[hosts[a], hosts[b]] = min(rate, rates.get((hosts[a], hosts[b]), rate))
        return rates

    def free(self, value: Callable[[Measured], int]) -> tuple[int, str]:
        """(bytes, host) of the machine with the least free space."""
        return min((value(one), host_info.host) for one, host_info in zip(self.measured, self.host_infos, strict=True))


def survey(world: World, device: torch.device, folder: Path) -> Survey:
    """All ranks call this, and each gets the survey of all. folder: where checkpoints go."""
    everyone = world.gather(find_host_info(world.rank_info, device))
    return Survey(everyone, world.gather(measure(world, everyone, device, folder)))


def judge(seen: Survey) -> list[str]:
    """Warnings about differences between machines, wrong clocks, slow ranks, slow links and full temporary folders."""
    warnings = compare(seen.host_infos)[1]
    clocks = seen.clocks()
    right = statistics.median_low(ahead for ahead, _ in clocks.values())
    usual = next(host for host, (ahead, _) in clocks.items() if ahead == right)
    for host, (ahead, error) in clocks.items():
        if abs(ahead - right) - error > CLOCK_SECONDS:
            side = "ahead of" if ahead > right else "behind"
            warnings.append(
                f"the clock of {host} is {abs(ahead - right):.1f} s {side} that of {usual} (+-{error:.1g} s)"
            )
    speeds = seen.speeds()
    for host, ranks in machines(seen.host_infos).items():
        slow = [rank for rank in ranks if speeds[rank] < SLOW]
        if slow:
            rate = min(speeds[rank] for rank in slow)
            warnings.append(f"{rank_names(slow)} on {host}: a matrix product runs at {rate:.2f} of the median's speed")
    free, host = seen.free(lambda one: one.free_temporary)
    if free < TEMPORARY_BYTES:
        warnings.append(f"{_size(free)} free for temporary files on {host}")
    return warnings + _judge_links(seen.links())


def _judge_links(links: dict[tuple[str, str], float]) -> list[str]:
    """Warnings about machines whose links are all slow, and about single slow links between other machines."""
    best = {host: max(rate for ends, rate in links.items() if host in ends) for host in dict.fromkeys(sum(links, ()))}
    if len(best) < 3:
        return []
    usual = statistics.median_high(best.values())
    slow = [host for host, rate in best.items() if rate < SLOW * usual]
    pairs = [ends for ends, rate in links.items() if rate < SLOW * usual and not any(host in slow for host in ends)]
    said = [(f"the links of {host}", best[host]) for host in slow]
    said += [(f"the link between {a} and {b}", links[a, b]) for a, b in pairs]
    return [f"{what}: {_rate(rate)} where {_rate(usual)} is usual" for what, rate in said]


def check_room(seen: Survey, folder: Path, checkpoint: int, more: int) -> list[str]:
    """Warnings about free disk. UserError if not even one checkpoint fits.

    checkpoint: bytes of one checkpoint; more: bytes of all that will exist at once, minus those that exist already.
    """
    free, host = seen.free(lambda one: one.free_run)
    if free < checkpoint:
        raise UserError(
            f"run_dir: {_size(free)} free at {folder} on {host}, but a checkpoint takes {_size(checkpoint)}; make room or "
            "choose another --run_dir"
        )
    if free < more:
        return [
            f"{_size(free)} free at {folder} on {host}; the checkpoints to come take {_size(more)} (checkpoint.keep)"
        ]
    return []


def summary(seen: Survey) -> str:
    """The survey in one line."""
    hosts, first, several = machines(seen.host_infos), seen.host_infos[0], len(seen.host_infos) > 1
    sizes = {len(ranks) for ranks in hosts.values()}
    count = (
        f" x {_count(sizes.pop(), 'process')}" if len(sizes) == 1 else f", {_count(len(seen.host_infos), 'process')}"
    )
    software = f"torch {first.software['torch']}"
    if "git" in first.software:
        software += f", git {first.software['git'][:7]}{' with changes' if first.changed else ''}"
    parts = [
        _count(len(hosts), "machine") + count + ", " + (f"equal software ({software})" if several else software),
    ]
    if len(hosts) > 1:
        clocks = seen.clocks().values()
        apart = max(ahead + error for ahead, error in clocks) - min(ahead - error for ahead, error in clocks)
        parts.append(f"clocks within {1000 * apart:.2g} ms" if apart < 1 else f"clocks within {apart:.1f} s")
    parts.append(f"{_size(seen.free(lambda one: one.free_run)[0])} free for runs")
    if several:
        mebibytes = all_reduce_bytes(first.device) // 2**20
        parts.append(f"all-reduce of {mebibytes} MiB at {_rate(min(one.bus for one in seen.measured))}")
        parts += [f"{a} to {b} {_rate(rate)}" for (a, b), rate in seen.links().items() if len(hosts) == 2]
        speed, rank = min((speed, rank) for rank, speed in enumerate(seen.speeds()))
        parts[-1] += f" (slowest matmul: {where([seen.host_infos[rank]])}, {speed:.2f} of the median)"
    return "preflight: " + "; ".join(parts)


def table(seen: Survey) -> str:
    """The survey as a table, with a line per machine."""
    clocks, links = seen.clocks(), seen.links()
    rows = [("machine", "processes", "device", "free for runs", "temporary", "clock", "matmul", "links")]
    for host, ranks in machines(seen.host_infos).items():
        one, own = seen.host_infos[ranks[0]], [seen.measured[rank] for rank in ranks]
        ahead, error = clocks[host]
        rates = [_rate(rate) for ends, rate in links.items() if host in ends]
        rows.append(
            (
                host,
                f"{len(ranks)} ({rank_names(ranks)})",
                f"{one.devices} x {one.gpu}, driver {one.driver}" if one.gpu else "CPU",
                _size(min(of.free_run for of in own)),
                _size(min(of.free_temporary for of in own)),
                f"{1000 * ahead:+.1f} +-{1000 * error:.1f} ms" if len(clocks) > 1 else "-",
                f"{min(of.flops for of in own) / 1e9:,.0f} GFLOP/s",
                ", ".join(rates) or "-",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _count(number: int, what: str) -> str:
    plural = "es" if what.endswith("s") else "s"
    return f"{number} {what}{'' if number == 1 else plural}"


def _size(count: int) -> str:
    """Bytes in decimal units."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"


def _rate(rate: float) -> str:
    return f"{rate / 1e9:.3g} GB/s"


# -- where it is called --------------------------------------------------------------------------------------------------


def before_training(plan: Any, world: World) -> None:
    """With several processes, say the survey's line and warnings. UserError on all ranks if not even one checkpoint fits."""
    if world.size == 1:
        return
    from trainer.checkpoint.format import found

    config = plan.config
    device = choose_device(config.device, world.local_rank)
    prepare_device(device, config.deterministic)  # cuBLAS reads its settings at the first product of the process
    folder = Path(config.run_dir).expanduser()
    seen = survey(world, device, folder)
    # Weights and two moments, with every engine. Buffers and the second names of tied weights are small in comparison.
    checkpoint = (plan.parameters + 2 * plan.trained) * (2 if config.precision == "pure_bf16" else 4)

    def tell() -> None:
        most = config.checkpoint.keep + config.checkpoint.keep_best
        there = min(most, len(found(folder / "checkpoints")))
        warnings = check_room(seen, folder, checkpoint, (most + 1 - there) * checkpoint)
        say_survey(world, summary(seen), warnings + judge(seen))

    world.on_leader(tell)


def say_survey(world: World, line: str, warnings: list[str]) -> None:
    world.say("\n".join([line, *(f"warning: preflight: {text}" for text in warnings)]))
