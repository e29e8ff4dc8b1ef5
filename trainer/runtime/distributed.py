"""The processes of a run: who we are, and the few collectives the loop needs. One process makes no process group."""

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

MEETING_SECONDS = 300.0  # they were all started together
LOOPBACK = "127.0.0.1"
CONNECT_SECONDS = 600.0  # NCCL takes seconds, or a minute with a thousand processes

T = TypeVar("T")


@dataclass
class World:
    """This process's place among all of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1  # processes on this machine
    timeout: timedelta = timedelta(minutes=30)  # of collectives; set by `join`
    told: set[str] = field(default_factory=set)  # what `decoration` has warned of

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
        """Print a line to stderr, on rank 0 alone. Also where nobody reads any more, as after a terminal was closed."""
        if self.leader:
            with contextlib.suppress(OSError):
                print(printable_lines(text), file=sys.stderr, flush=True)

    def say_from(self, text: str) -> None:
        """Print a line to stderr on the rank that calls, named where there are several: for what befalls one of them."""
        name = f"[rank {self.rank}, {launcher.own_host(os.environ)}] " if self.size > 1 else ""
        with contextlib.suppress(OSError):
            print(name + printable_lines(text), file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def decoration(self, what: str) -> Iterator[None]:
        """For what training does not need: curves, samples, records for others. A failure is told once, and ends nothing."""
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
        """Give groups that libraries have made the timeout of ours: theirs is torch's own, which users cannot raise."""
        if dist.is_initialized():
            limit_process_groups(self.timeout)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def on_leader(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, on every rank; its UserError or OSError too, so that no rank waits for another."""
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
        """Leave the process group, all together. Only for success: a rank that failed must end and let the launcher know."""
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()


@contextlib.contextmanager
def bounded(seconds: float, line: str) -> Iterator[None]:
    """End this process, with a line and exit code 2, if what is within takes so long: NCCL's own calls know no limit, and no
    signal is heard in them."""

    def end() -> None:
        try:
            print(f"error: {line} within {_spell(timedelta(seconds=seconds))}", file=sys.stderr, flush=True)
        finally:  # also where nobody reads any more
            os._exit(2)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def read_world() -> World:
    """This process's place, whatever the launcher; sees to it that MASTER_ADDR and MASTER_PORT are set if there are several.

    UserError where the environment is incomplete, or accelerate started fewer processes than it was asked for.
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
    """Enter the process group. One process makes none, unless `alone` asks for a group of one (fsdp, zero0 to zero3).

    timeout_minutes: how long a collective may take. UserError on every rank, with the same line, where some do not come or
    do not fit to the others.
    """
    if world.size == 1 and not alone:
        return
    from trainer.runtime.device import choose_device

    # FSDP and DeepSpeed call functions that torch has renamed since; it is not for a user to hear of on every rank.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # Libraries ask the environment, which srun sets otherwise and a single process not at all.
    os.environ.update(zip(launcher.NAMES, map(str, world.rank_info), strict=True))
    if world.on_one_machine and "lo" in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nobody else has to reach us
    world.timeout = timedelta(minutes=timeout_minutes)
    store: dist.Store = dist.HashStore() if world.size == 1 else meet(world, wanted_device)
    device = choose_device(wanted_device, world.local_rank)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    stuck = (
        "process group: see that NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name the interface between the machines "
        f"(NCCL_DEBUG=INFO tells more): rank {world.rank} on {launcher.own_host(os.environ)} is not connected to the others"
    )
    try:
        with bounded(CONNECT_SECONDS, stuck):
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if on_gpu else "gloo",  # offloaded tensors and checkpoints need gloo beside a GPU
                store=store,
                rank=world.rank,
                world_size=world.size,
                timeout=world.timeout,
                device_id=device if on_gpu else None,
            )
    except RuntimeError as error:
        raise MachineError(
            f"process group: the {world.size} processes came to {_meeting_point()} but cannot connect to each other; see "
            "that no firewall is between their machines, and that NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name the interface "
            f"between them: {str(error).splitlines()[0]}"
        ) from None


def meet(world: World, wanted_device: str) -> dist.Store:
    """The store in which all processes have posted facts that fit together.

    The last to come compares all facts, and whoever has waited too long names those who are missing: the first of these to
    write the outcome decides it for all.
    """
    from trainer.runtime.device import choose_device

    device, problem = None, ""
    try:
        device = choose_device(wanted_device, world.local_rank)
    except UserError as error:
        problem = str(error)  # the others are to end too, and to hear of it
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
            f"process group: {_meeting_point()} was there and is gone; see what rank 0 and the launcher printed: "
            f"{str(error).splitlines()[0]}"
        ) from None
    kind, errors = json.loads(outcome)
    if errors:
        if world.leader:
            time.sleep(1)  # the store may be in this process: let the others read it
        raise (MachineError if kind == "MachineError" else UserError)("; ".join(errors))
    store.set_timeout(world.timeout)
    return store


def _await_outcome(store: dist.Store, world: World, patience: timedelta) -> bytes:
    """What the meeting has come to, decided here if nobody else does in time. Rank 0, which speaks, is the first to lose patience."""
    try:
        store.wait(["outcome"], patience + timedelta(seconds=0 if world.leader else 10))
    except dist.DistStoreError:
        came = _posted(store, [rank for rank in range(world.size) if store.check([f"facts/{rank}"])])
        missing = absentees(world.size, came, launcher.slurm_hosts(os.environ))
        line = f"process group: {missing} to {_meeting_point()} within {_spell(patience)}; see what was printed there"
        store.compare_set("outcome", "", json.dumps(["MachineError", [line, *compare(came)[0]]]))
    return store.get("outcome")


def _posted(store: dist.Store, ranks: Iterable[int]) -> list[HostInfo]:
    posts = store.multi_get([f"facts/{rank}" for rank in ranks])
    return [HostInfo(**json.loads(post)) for post in posts]


def _attempt_store(world: World, patience: timedelta) -> dist.Store:
    """Torchrun's store, else one that rank 0 holds, with keys of this run and attempt alone: after a restart the dead ranks' are
    still in it, and another run's ranks may come to the same port."""
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
            advice = f"cannot listen at {_meeting_point()}; see that no other program has the port"
        else:
            advice = f"nobody answers at {_meeting_point()} within {_spell(patience)}; see what rank 0 printed"
            advice += ", and that this machine reaches that one"
        raise MachineError(f"process group: {advice}: {cause}") from None
    return dist.PrefixStore(attempt_prefix(), store)


def attempt_prefix() -> str:
    """Of the keys of this attempt of this run. The launch scripts draw a name; torchrun has one of its own."""
    run = os.environ.get("CRESCENDO_RENDEZVOUS") or os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"{run}/attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _launcher_holds_store() -> bool:
    """Whether torchrun's own process does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _listen_here(port: int) -> int:
    """A socket that only this machine can reach; torch's own would listen to all networks."""
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
