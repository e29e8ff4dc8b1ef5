"""A real Slurm cluster of several nodes on one machine, started in about a second and thrown away afterwards.

slurmctld and munged run on the machine itself, so that `sbatch` works as on a login node. Every node is a set of Linux
namespaces with one slurmd inside: a host name, an address, process ids, /etc/hosts and /dev/shm of its own. The nodes
hang on a bridge, the "switch", in a network namespace of its own, where no firewall rule of the machine sees their
traffic and no way leads out. The file system is shared, as a home directory on a cluster is.

No namespace has a name: each lives exactly as long as the process that holds it, every such process is a child of ours
and asks the kernel to be killed when we die (`setpriv --pdeathsig`). So nothing is left over, even after `kill -9`.

    with Cluster(folder, track="pgid") as slurm:
        job = slurm.sbatch("-N2", "--wrap", "srun hostname")
        assert slurm.wait(job)["JobState"] == "COMPLETED"
"""

import contextlib
import functools
import os
import re
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

POLL = 0.2  # seconds between two looks at the cluster
ENDED = set("COMPLETED FAILED CANCELLED TIMEOUT NODE_FAIL BOOT_FAIL OUT_OF_MEMORY DEADLINE PREEMPTED".split())
NAMESPACES = ("--mount", "--uts", "--ipc", "--net", "--pid")  # what each node has of its own

# Daemons often live where an ordinary PATH does not look. Variables of a job that we may run in would confuse ours.
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
ENVIRONMENT["PATH"] = f"{os.environ.get('PATH', '/usr/bin:/bin')}:/usr/sbin:/sbin"

# Process 1 of a node. It first tells us its own number as the machine sees it, for nsenter: the old /proc knows it.
# The empty /sys/fs/cgroup makes slurmd's cgroup/v1 plugin, which it loads but does not need, the same everywhere.
# bash then waits for ever, and unlike slurmd in its place it reaps the orphans of the node.
INIT = """set -e
hostname "$1"
mount --bind "$2" /etc/hosts
mount -t tmpfs tmpfs /sys/fs/cgroup
mount -t tmpfs -o mode=1777,size=1g tmpfs /dev/shm
read -r pid _ </proc/self/stat
mount -t proc proc /proc
echo "$pid"
exec >/dev/null
sleep infinity & wait"""

# The less obvious ones:
# - cred_expire is also the time that a requeued job must wait before it may start again (120 s unless told).
# - MessageTimeout: a node answers once a step that is to end has ended. Later than this, slurmctld tells it again a minute after,
#   and ends the step of the same number in the next try, which without those 120 s is there already.
# - MinJobAge keeps ended jobs visible to `scontrol show job`, as there is no accounting.
# - ReturnToService=2: a node that was down serves again as soon as it registers.
# - config_overrides: nodes may claim more CPUs, memory and GPUs than this machine has; nothing is enforced.
SLURM_CONF = """ClusterName=test
SlurmctldHost={host}({net}.254)
SlurmctldPort={port}
SlurmdPort={slurmd_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/ended-jobs.log
ProctrackType=proctrack/{track}
TaskPlugin=task/none
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{signal_key}
SlurmdTimeout={node_timeout}
KillWait=30
MessageTimeout=30
MinJobAge=3600
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
{lines}
PartitionName=main Nodes=ALL Default=YES DefaultTime=30 PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high Nodes=ALL DefaultTime=30 PriorityTier=10 PreemptMode=OFF
"""


class Busy(RuntimeError):
    """As many clusters as there is room for already run on this machine."""


@dataclass
class Cluster:
    """A cluster of node1, node2, ... with the partitions main (preemptible, the default) and high (preempts main).

    folder          a new one, for configuration, logs and the jobs' default working directory (`folder/jobs`)
    track           "linuxproc": a signal reaches every process of a task; "pgid": only those in the task's own process
                    group, so a launcher but not its workers, as on production clusters with proctrack/cgroup
    preempt_signal  a preempted job gets its own --signal first; without, its steps get SIGTERM
    node_timeout    seconds until a node that does not answer is DOWN; it takes some 10 more, or 20 on a busy machine
    grace           seconds between the first signal of a preemption and the end of the job
    gpus, cpus      of each node; the GPUs are only claimed, but jobs get CUDA_VISIBLE_DEVICES as if they were there
    """

    folder: Path
    track: str = "linuxproc"
    preempt_signal: bool = True
    nodes: int = 2
    node_timeout: int = 15
    grace: int = 20
    gpus: int = 8
    cpus: int = 16

    def __post_init__(self):
        self.folder = Path(self.folder).resolve()
        self.names = [f"node{i + 1}" for i in range(self.nodes)]
        self.env = {**ENVIRONMENT, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self._cleanup = contextlib.ExitStack()
        self._inits: dict[str, tuple[subprocess.Popen, str]] = {}  # name -> (unshare, its child: process 1 of the node)

    def __enter__(self) -> "Cluster":
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    # ------------------------------------------------------------------------------------------------ start and stop

    def start(self) -> None:
        """Start everything and wait until all nodes are idle. Raises Busy, or RuntimeError with what the logs say."""
        with contextlib.ExitStack() as cleanup:
            self._take_slot(cleanup)
            self._configure()
            self._connect(cleanup)
            self._start_controller(cleanup)
            cleanup.callback(self._crash_all)
            for node in self.names:
                self.boot(node)
            self.idle(30)
            self._cleanup = cleanup.pop_all()

    def stop(self) -> None:
        """End all jobs and daemons at once and take the network away. The folder with the logs stays."""
        self._cleanup.close()

    def _take_slot(self, cleanup: contextlib.ExitStack) -> None:
        """Clusters of several test runs at once differ in address, port and name of their link to the machine."""
        for slot in range(8):
            # An abstract socket is a lock that no crash leaves behind, and holds where the addresses do: in this network.
            lock = cleanup.enter_context(socket.socket(socket.AF_UNIX))
            with contextlib.suppress(OSError):
                lock.bind(f"\0crescendo-test-slurm-{slot}")
                # 198.18.0.0/15 is set aside for tests of networks, so no site has its machines there.
                self._net, self._port, self.link = f"198.18.{slot}", 26817 + 2 * slot, f"test-slurm{slot}"
                return
        raise Busy("8 test clusters already run on this machine")

    def _configure(self) -> None:
        for name in ("munge", "state", "jobs", "gpus"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        host = socket.gethostname().partition(".")[0]
        # A node's name must give its own address and not the loopback one, which gloo would announce to the others.
        addresses = {"localhost": "127.0.0.1", host: f"{self._net}.254", **{n: self._address(n) for n in self.names}}
        (self.folder / "hosts").write_text("".join(f"{address} {name}\n" for name, address in addresses.items()))
        # The claimed GPUs have to be devices, which these are (all the same as /dev/null); nothing opens them.
        devices = [self.folder / "gpus" / f"gpu{i}" for i in range(self.gpus)]
        for device in devices:
            if not device.exists():
                os.mknod(device, stat.S_IFCHR, os.makedev(1, 3))
        lines = [f"NodeName={name} Name=gpu File={device}\n" for name in self.names for device in devices]
        # Autodetection would ask the library of real GPUs.
        (self.folder / "gres.conf").write_text("AutoDetect=off\n" + "".join(lines))
        newer = int(re.findall(r"\d+", self._command("slurmd", "-V"))[0]) >= 24  # "disabled" is not known before
        (self.folder / "cgroup.conf").write_text(f"CgroupPlugin={'disabled' if newer else 'cgroup/v1'}\n")
        settings = {**vars(self), "host": host, "net": self._net, "port": self._port, "slurmd_port": self._port + 1}
        settings["signal_key"] = "SlurmctldParameters=preempt_send_user_signal" if self.preempt_signal else ""
        size = f"CPUs={self.cpus} RealMemory=65536" + (f" Gres=gpu:{self.gpus}" if self.gpus else "")
        lines = [f"NodeName={name} NodeAddr={self._address(name)} {size}" for name in self.names]
        (self.folder / "slurm.conf").write_text(SLURM_CONF.format(**settings, lines="\n".join(lines)))

    def _address(self, name: str) -> str:
        return f"{self._net}.{self.names.index(name) + 1}"

    def _connect(self, cleanup: contextlib.ExitStack) -> None:
        """Build the switch and plug this machine in as address .254. Taking one end of a link away takes both."""
        switch, self._switch = self._unshare("--net", "bash", "-c", "echo $$; exec sleep infinity")
        cleanup.callback(_end, switch)
        self._at_switch("link", "add", "bridge", "type", "bridge")
        self._at_switch("link", "set", "bridge", "up")
        remove = functools.partial(self._command, "ip", "link", "delete", self.link, check=False)
        remove()  # what a killed predecessor may have left for a moment
        peer = ("peer", "name", "machine", "netns", self._switch)
        self._command("ip", "link", "add", self.link, "type", "veth", *peer)
        cleanup.callback(remove)
        self._command("ip", "address", "add", f"{self._net}.254/24", "dev", self.link)
        self._command("ip", "link", "set", self.link, "up")
        self._at_switch("link", "set", "machine", "master", "bridge", "up")

    def _start_controller(self, cleanup: contextlib.ExitStack) -> None:
        munge = self.folder / "munge"
        key = munge / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        paths = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={munge / name}" for option, name in paths.items()]
        # --force, as it wants a folder that all users can reach, and that of the tests is only root's, as its users are.
        self._start_daemon(cleanup, (munge / "socket").exists, "munged", "--foreground", "--force", *options)
        self._start_daemon(cleanup, self._controller_answers, "slurmctld", "-D")

    def _controller_answers(self) -> bool:
        return "is UP" in self._command("scontrol", "ping", check=False)

    def _start_daemon(self, cleanup: contextlib.ExitStack, is_up: Callable[[], bool], *words: str) -> None:
        process = self._spawn(*words)
        cleanup.callback(_end, process)
        self.until(lambda: process.poll() is not None or is_up(), words[0], 10)
        if process.poll() is not None:
            raise RuntimeError(f"{words[0]} ended\n{_tail(self.folder / 'daemons.out')}")

    # ------------------------------------------------------------------------------------------------ nodes

    def boot(self, node: str) -> None:
        """Start a node that is down. `idle` waits until Slurm uses it again."""
        words = ("--fork", "--kill-child", "bash", "-c", INIT, "init", node, str(self.folder / "hosts"))
        self._inits[node] = process, pid = self._unshare(*NAMESPACES, *words)
        self._at_switch("link", "add", node, "type", "veth", "peer", "name", "eth0", "netns", pid)
        self._at_switch("link", "set", node, "master", "bridge", "up")
        up = 'ip link set lo up && ip address add "$0" dev eth0 && ip link set eth0 up'
        self.run_in(node, ["bash", "-c", up, f"{self._address(node)}/24"])
        self.start_slurmd(node)

    def crash(self, node: str) -> None:
        """End every process of the node at once: its connections close, and then there is only silence."""
        process, pid = self._inits.pop(node)
        if process.poll() is None:
            os.kill(int(pid), signal.SIGKILL)
        process.wait(30)  # the kernel lets go of process 1 of a namespace only when all others are gone
        # Else the link would vanish a moment later, in the middle of the next boot.
        self._at_switch("link", "delete", node, check=False)

    def _crash_all(self) -> None:
        for node in list(self._inits):
            self.crash(node)

    def cut(self, node: str) -> None:
        """Pull the node's network cable; its processes live on."""
        self._at_switch("link", "set", node, "down")

    def mend(self, node: str) -> None:
        """Plug the node's network cable in again."""
        self._at_switch("link", "set", node, "up")

    def kill_slurmd(self, node: str) -> None:
        """Kill slurmd alone; the job steps of the node live on."""
        script = 'read -r pid <"$0"; kill -KILL $pid; while kill -0 $pid 2>/dev/null; do sleep 0.05; done'
        self.run_in(node, ["bash", "-c", script, str(self.folder / f"slurmd-{node}.pid")])

    def start_slurmd(self, node: str) -> None:
        self.run_in(node, ["slurmd", "-N", node])

    def run_in(self, node: str, words: list[str], timeout: float = 30) -> str:
        """What a command prints that is run inside the node. Raises RuntimeError if it fails."""
        return self._command("nsenter", "--target", self._inits[node][1], *NAMESPACES, "--", *words, timeout=timeout)

    def pids(self, node: str) -> list[int]:
        """The processes of the node, with the numbers they have on this machine."""
        if node not in self._inits:
            return []
        inside = os.readlink(f"/proc/{self._inits[node][1]}/ns/pid")
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it ended while we looked
                if os.readlink(folder / "ns" / "pid") == inside:
                    found.append(int(folder.name))
        return sorted(found)

    # ------------------------------------------------------------------------------------------------ jobs

    def sbatch(self, *words, env: dict | None = None, cwd: Path | None = None) -> str:
        """Submit a job with the environment of the tests, changed by `env`, in `cwd` (folder/jobs); gives its id."""
        out = self._command("sbatch", "--parsable", *map(str, words), env=env, cwd=cwd or self.folder / "jobs")
        return out.strip().partition(";")[0]

    def job(self, job_id: str) -> dict[str, str]:
        """`scontrol show job` of a job or of one element of an array (ID_ELEMENT): JobState, Restarts, ExitCode..."""
        records = self._command("scontrol", "--oneliner", "show", "job", job_id).strip().splitlines()
        if len(records) > 1:
            raise RuntimeError(f"{job_id} is an array: name one element, {job_id}_0")
        return dict(re.findall(r"([\w/:]+)=(.*?)(?=\s+[A-Z][\w/:]*=|\s*$)", records[0]))

    def wait(self, job_id: str, *states: str, restarts: int = 0, timeout: float = 60) -> dict[str, str]:
        """Wait until a job is in one of the states (any in which it has ended), restarted at least so often.

        Returns what `job` gives. Raises TimeoutError, with all that tells why, after `timeout` seconds, and at once
        when the job has ended in a state not waited for."""
        deadline = time.monotonic() + timeout
        while True:
            job = self.job(job_id)
            if job["JobState"] in (states or ENDED) and int(job["Restarts"]) >= restarts:
                return job
            if job["JobState"] in ENDED or time.monotonic() > deadline:
                wanted = f"{' or '.join(states) or 'ended'}, restarts >= {restarts}"
                raise TimeoutError(f"job {job_id} is {job['JobState']}, waited for {wanted}\n{self.report(job_id)}")
            time.sleep(POLL)

    def cancel(self, job_id: str, *flags: str) -> None:
        """`scancel FLAGS ID`."""
        self._command("scancel", *flags, job_id)

    def signal_batch(self, job_id: str, name: str) -> None:
        """Send a signal to the batch script alone, as the warnings that `--signal=B:...` asks for."""
        self.cancel(job_id, "--batch", f"--signal={name}")

    def idle(self, timeout: float = 60) -> None:
        """Wait until no job is left and all nodes are usable."""
        self.until(self.is_idle, "all jobs to be gone and all nodes idle", timeout)

    def is_idle(self) -> bool:
        """Whether no job is left and all nodes are usable; no, if slurmctld does not answer."""
        states = self._command("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T", check=False).split()
        return states == ["idle"] * self.nodes and not self._command("squeue", "--noheader", check=False)

    def until(self, condition: Callable[[], object], what: str, timeout: float) -> None:
        """Wait until the condition holds. Raises TimeoutError, with the state of the cluster, after so many seconds."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {timeout} s for {what}\n{self.report()}")
            time.sleep(POLL)

    def report(self, job_id: str | None = None) -> str:
        """Everything that explains a failure: queue, nodes, the job and its output, ends of the logs."""
        commands = [["squeue"], ["sinfo", "--Node", "--long"], ["sinfo", "--list-reasons"]]
        logs = sorted(self.folder.glob("slurm*.log"))
        if job_id:
            commands.append(["scontrol", "show", "job", job_id])
            logs.append(Path(self.job(job_id).get("StdOut", "")))
        parts = [f"$ {' '.join(words)}\n{self._command(*words, check=False)}" for words in commands]
        return "\n".join([*parts, *map(_tail, logs)])

    # ------------------------------------------------------------------------------------------------ commands

    def _spawn(self, *words: str, stdout=None) -> subprocess.Popen:
        """Start a process that dies with us, in a session of its own, so that Ctrl-C in the terminal is only ours."""
        with (self.folder / "daemons.out").open("ab") as log:
            return subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *words],
                stdin=subprocess.DEVNULL,
                stdout=stdout or log,
                stderr=log,
                env=self.env,
                start_new_session=True,
                text=True,
            )

    def _unshare(self, *words: str) -> tuple[subprocess.Popen, str]:
        """Start a holder of new namespaces, and wait until it stands in them and says its process id."""
        process = self._spawn("unshare", *words, stdout=subprocess.PIPE)
        assert process.stdout
        with process.stdout as out:
            pid = out.readline().strip()
        if not pid:
            raise RuntimeError(f"no namespaces\n{_tail(self.folder / 'daemons.out')}")
        return process, pid

    def _at_switch(self, *words: str, check: bool = True) -> None:
        """`ip WORDS` in the switch's network."""
        self._command("nsenter", "--target", self._switch, "--net", "--", "ip", *words, check=check)

    def _command(self, *words: str, check=True, env: dict | None = None, cwd: Path | None = None, timeout=30.0) -> str:
        """What a command prints; RuntimeError with its error output if it fails, unless told not to check."""
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=timeout, env={**self.env, **(env or {})}, cwd=cwd
        )
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(words)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout if check else done.stdout + done.stderr


def _end(process: subprocess.Popen) -> None:
    """SIGTERM, so that slurmctld takes its helper along, and SIGKILL to one that does not listen."""
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(5)


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else ["(none)"]
    return "\n".join([f"--- end of {log}", *lines[-25:]])
