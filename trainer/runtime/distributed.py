"""The processes of a run: rank, process group, and the collectives that the loop needs. One process needs no process group."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from trainer.core.errors import MachineError, UserError
from trainer.core.files import system_error
from trainer.core.text import printable, printable_lines
from trainer.runtime import launcher
from trainer.runtime.compat import limit_process_groups
from trainer.runtime.host_info import HostInfo, absentees, compare, find_host_info

MEETING_SECONDS = 300.0  # time for all processes to arrive; they were started together
LOOPBACK = "127.0.0.1"
CONNECT_SECONDS = 600.0  # NCCL needs seconds, or a minute with a thousand processes

T = TypeVar("T")


@dataclass
class World:
    """Rank of this process, number of processes, and collectives between them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1  # processes on this machine
    timeout: timedelta = timedelta(minutes=30)  # of collectives; `join` sets it
    told: set[str] = field(default_factory=set)  # names for which `decoration` has printed a warning

    @property
    def leader(self) -> bool:
        return self.rank == 0

    @property
    def on_one_machine(self) -> bool:
        return self.local_size == self.size

    @property
    def rank_info(self) -> launcher.RankInfo:
        return launcher.RankInfo(self.rank, self.size, self.local_rank, self.local_size)

    def say(self, text: str) -> None:
        """Print a line to stderr on rank 0 only. A closed stderr, for example of a closed terminal, is not an error."""
        if self.leader:
            with contextlib.suppress(OSError):
                print(printable_lines(text), file=sys.stderr, flush=True)

    def say_from(self, text: str) -> None:
        """Print a line to stderr on the calling rank, for an event on this rank only. With several ranks the line names it."""
        name = f"[rank {self.rank}, {launcher.own_host(os.environ)}] " if self.size > 1 else ""
        with contextlib.suppress(OSError):
            print(name + printable_lines(text), file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def decoration(self, what: str) -> Iterator[None]:
        """A context for work that training does not need: curves, samples, logs. A failure gives one warning and ends nothing."""
        try:
            yield
        except Exception as error:
            if what not in self.told:
                self.told.add(what)
                reason = error.strerror or error if isinstance(error, OSError) else error
                text = (
                    printable(reason, 300)
                    if isinstance(error, (OSError, UserError))
                    else f"{type(error).__name__}: {printable(reason, 300)}"
                )
                self.say(f"warning: {what}: {text}; training goes on")

    def limit_groups(self) -> None:
        """Set our timeout for groups that libraries have made. They start with torch's default, which users cannot raise."""
        if dist.is_initialized():
            limit_process_groups(self.timeout)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def on_leader(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 and return its result on every rank.

        If it raises UserError or OSError, every rank raises a UserError, so that no rank waits for another.
        """
        if self.size == 1:
            return work()
        box: list[Any] = [None, None]
        if self.leader:
            try:
                box[0] = work()
            except UserError as error:
                box[1] = error
            except OSError as error:
                box[1] = system_error(error, printable(error.filename or "input or output"))
        dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def stop(self) -> None:
        """Leave the process group, on all ranks together. Call it only after success: a failed rank must exit with an error."""
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()


@contextlib.contextmanager
def bounded(seconds: float, line: str) -> Iterator[None]:
    """End this process with a line and exit code 2 if the body takes longer than `seconds`.

    NCCL's own calls have no time limit, and Python handles no signal while they run.
    """

    def end() -> None:
        try:
            print(f"error: {line} within {_spell(timedelta(seconds=seconds))}", file=sys.stderr, flush=True)
        finally:  # also if stderr is closed
            os._exit(2)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def read_world() -> World:
    """The World of this process, under any launcher. With several processes it also sets MASTER_ADDR and MASTER_PORT.

    UserError if the environment is incomplete, or if accelerate started fewer processes than it was asked for.
    """
    world = World(*launcher.find_rank_info(os.environ))
    if world.size > 1:
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = launcher.find_meeting_point(os.environ)
        if world.on_one_machine and not _launcher_holds_store():
            os.environ["MASTER_ADDR"] = LOOPBACK
        return world
    launcher.refuse_lost_processes(os.environ)
    note = launcher.unused_tasks(os.environ)
    if note:
        world.say(note)
    return world


def join(world: World, wanted_device: str, timeout_minutes: float = 30.0, alone: bool = False) -> None:
    """Join the process group. A single process makes none, unless `alone` asks for a group of one (fsdp, zero0 to zero3).

    timeout_minutes: how long a collective may take. If some ranks do not come, or do not fit the others, every rank raises a
    UserError with the same line.
    """
    if world.size == 1 and not alone:
        return
    from trainer.runtime.device import choose_device

    # FSDP and DeepSpeed call functions that torch has since renamed; a user does not need this warning from every rank.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # Libraries read these variables. srun sets others, and a single process has none.
    os.environ.update(zip(launcher.NAMES, map(str, world.rank_info), strict=True))
    if world.on_one_machine and "lo" in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # no other machine needs to connect
    world.timeout = timedelta(minutes=timeout_minutes)
    store: dist.Store = dist.HashStore() if world.size == 1 else meet(world, wanted_device)
    device = choose_device(wanted_device, world.local_rank)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    stuck = (
        "process group: check that NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name the interface between the machines "
        f"(NCCL_DEBUG=INFO prints more): rank {world.rank} on {launcher.own_host(os.environ)} is not connected to the others"
    )
    try:
        with bounded(CONNECT_SECONDS, stuck):
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if on_gpu else "gloo",  # offloaded tensors and checkpoints always need gloo
                store=store,
                rank=world.rank,
                world_size=world.size,
                timeout=world.timeout,
                device_id=device if on_gpu else None,
            )
    except RuntimeError as error:
        raise MachineError(
            f"process group: the {world.size} processes came to {_meeting_point()} but cannot connect to each other; check "
            "that no firewall is between their machines, and that NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name the interface "
            f"between them: {str(error).splitlines()[0]}"
        ) from None


def meet(world: World, wanted_device: str) -> dist.Store:
    """The store in which all processes have posted their facts, after a check that these fit together.

    The last rank to arrive compares all facts. A rank that has waited too long names the missing ranks. The first rank to
    write an outcome decides for all.
    """
    from trainer.runtime.device import choose_device

    device, problem = None, ""
    try:
        device = choose_device(wanted_device, world.local_rank)
    except UserError as error:
        problem = str(error)  # post it, so that the other ranks also end and report it
    own = find_host_info(world.rank_info, device, problem)
    patience = min(timedelta(seconds=MEETING_SECONDS), world.timeout)
    store = _attempt_store(world, patience)
    try:
        store.set(f"facts/{world.rank}", json.dumps(asdict(own)))
        if store.add("arrived", 1) >= world.size:
            errors, _ = compare(_posted(store, range(world.size)))
            store.compare_set("outcome", "", json.dumps(["UserError", errors]))
        outcome = _await_outcome(store, world, patience)
    except RuntimeError as error:
        raise MachineError(
            f"process group: the store at {_meeting_point()} is gone; read what rank 0 and the launcher printed: "
            f"{str(error).splitlines()[0]}"
        ) from None
    kind, errors = json.loads(outcome)
    if errors:
        if world.leader:
            time.sleep(1)  # this process may hold the store: let the others read it
        raise (MachineError if kind == "MachineError" else UserError)("; ".join(errors))
    store.set_timeout(world.timeout)
    return store


def _await_outcome(store: dist.Store, world: World, patience: timedelta) -> bytes:
    """The outcome of the meeting. If no rank decides in time, this rank does; rank 0, which prints, waits the shortest time."""
    try:
        store.wait(["outcome"], patience + timedelta(seconds=0 if world.leader else 10))
    except dist.DistStoreError:
        came = _posted(store, [rank for rank in range(world.size) if store.check([f"facts/{rank}"])])
        missing = absentees(world.size, came, launcher.slurm_hosts(os.environ))
        line = f"process group: {missing} to {_meeting_point()} within {_spell(patience)}; read the output of the missing ranks"
        store.compare_set("outcome", "", json.dumps(["MachineError", [line, *compare(came)[0]]]))
    return store.get("outcome")


def _posted(store: dist.Store, ranks: Iterable[int]) -> list[HostInfo]:
    posts = store.multi_get([f"facts/{rank}" for rank in ranks])
    return [HostInfo(**json.loads(post)) for post in posts]


def _attempt_store(world: World, patience: timedelta) -> dist.Store:
    """torchrun's store, or one that rank 0 holds, with a prefix for the keys of this run and attempt.

    The prefix is needed because after a restart the store still holds the keys of the dead ranks, and because ranks of another
    run may use the same port.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    holder = world.leader and not _launcher_holds_store()
    try:
        listening = _listen_here(port) if holder and world.on_one_machine else None
        store = dist.TCPStore(
            address,
            port,
            world.size,
            is_master=holder,
            timeout=patience,
            wait_for_workers=False,
            multi_tenant=True,
            master_listen_fd=listening,
        )
    except (OSError, RuntimeError) as error:
        cause = str(error).splitlines()[0]
        if holder:
            advice = f"cannot listen at {_meeting_point()}; check that no other program uses the port"
        else:
            advice = f"nobody answers at {_meeting_point()} within {_spell(patience)}; read what rank 0 printed"
            advice += ", and check that this machine can reach that one"
        raise MachineError(f"process group: {advice}: {cause}") from None
    return dist.PrefixStore(attempt_prefix(), store)


def attempt_prefix() -> str:
    """The key prefix for this attempt of this run. The launch scripts choose a name for a run; so does torchrun."""
    run = os.environ.get("CRESCENDO_RENDEZVOUS") or os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"{run}/attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _launcher_holds_store() -> bool:
    """Whether torchrun's own process holds the store, so that rank 0 does not."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _listen_here(port: int) -> int:
    """The descriptor of a socket that only this machine can reach; torch's own socket would listen on all networks."""
    listening = socket.socket()
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((LOOPBACK, port))
        listening.listen(2048)
    except OSError:
        listening.close()
        raise
    return listening.detach()


def _meeting_point() -> str:
    return ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))


def _spell(time: timedelta) -> str:
    seconds = time.total_seconds()
    return f"{seconds / 60:g} min" if seconds >= 60 else f"{seconds:g} s"
