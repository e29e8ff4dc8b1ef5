"""`cluster(**settings)` gives a test a running Slurm; where none can run, the tests that ask for it are skipped with the reason.

Root and Slurm's packages are needed; with CRESCENDO_TEST_SLURM=install in the environment the packages are installed."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slurm.cluster import ENVIRONMENT, Busy, Cluster

PACKAGES = {  # program -> Debian package
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "ip": "iproute2",
    "setpriv": "util-linux",
    "unshare": "util-linux",
    "nsenter": "util-linux",
}


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Callable[..., Cluster]]:
    """Call it in each test with what the test needs: `slurm = cluster(track="pgid", preempt_signal=False)`.

    The cluster of the test before is used again if it has the same settings and was left idle; else a new one is started."""
    if reason := why_not():
        pytest.skip(f"no Slurm: {reason}")
    running: dict[str, Cluster] = {}

    def given(**settings) -> Cluster:
        key = repr(sorted(settings.items()))
        if key in running and running[key].is_idle():
            return running[key]
        stop()
        running[key] = Cluster(tmp_path_factory.mktemp("slurm"), **settings)
        try:
            running[key].start()
        except Busy as error:
            pytest.skip(f"no Slurm: {error}")
        return running[key]

    def stop() -> None:
        while running:
            running.popitem()[1].stop()

    yield given
    stop()


def why_not() -> str | None:
    """Why no cluster can run here, in one line; None if one can. Installs the packages where the user allows it."""
    if sys.platform != "linux":
        return "needs Linux"
    if os.geteuid() != 0:
        return "needs root, for namespaces and slurmd"
    missing = {package for program, package in PACKAGES.items() if not shutil.which(program, path=ENVIRONMENT["PATH"])}
    if missing:
        names = " ".join(sorted(missing))
        if os.environ.get("CRESCENDO_TEST_SLURM") != "install":
            return f"needs the packages {names} (CRESCENDO_TEST_SLURM=install installs them)"
        if problem := _install(names.split()):
            return f"cannot install {names}: {problem}"
    attempt = "mount -t tmpfs tmpfs /dev/shm && ip link add v0 type veth peer name v1 && ip link add v2 type bridge"
    words = ["unshare", "--mount", "--uts", "--ipc", "--net", "--pid", "--fork", "bash", "-c", attempt]
    done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT)
    return f"namespaces are not permitted: {_last_line(done)}" if done.returncode else None


def _install(packages: list[str]) -> str | None:
    """Install Debian packages without starting their daemons; what went wrong, or None."""
    policy = Path("/usr/sbin/policy-rc.d")  # Debian asks it before it starts a service; 101 forbids it
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        for words in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
            environment = {**ENVIRONMENT, "DEBIAN_FRONTEND": "noninteractive"}
            done = subprocess.run(["apt-get", "-q", *words], capture_output=True, text=True, env=environment)
            if done.returncode:
                return _last_line(done)
    except FileNotFoundError:
        return "this machine has no apt-get"
    finally:
        if ours:
            policy.unlink()
    return None


def _last_line(done: subprocess.CompletedProcess) -> str:
    return (done.stdout + done.stderr).strip().rpartition("\n")[2]
