"""Environments as launchers leave them, and what is read there: our place, where to meet, what accelerate asks for."""

import os
import subprocess
from datetime import timedelta
from types import SimpleNamespace

import pytest

from trainer.__main__ import without_local_rank
from trainer.core.config import RunConfig
from trainer.core.errors import UserError
from trainer.planning.launcher_config import LauncherConfig, read_launcher_config, reconcile
from trainer.runtime import launcher
from trainer.runtime.launcher import RankInfo, find_meeting_point, find_rank_info, refuse_lost_processes, unused_tasks

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
MEETING = {"MASTER_ADDR": "head", "MASTER_PORT": "29500"}
JOB = {"SLURM_JOB_ID": "70123", "SLURM_NTASKS": "9", "SLURM_JOB_NODELIST": "node[1-3]", "SLURM_PROCID": "0"}
TASK = JOB | {
    "SLURM_STEP_ID": "0", "SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "2", "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_STEP_NODELIST": "node[1-3]",
}  # fmt: skip
BATCH_SCRIPT = JOB | {"SLURM_NODEID": "0", "SLURM_LOCALID": "0"}


def without(environ, *names):
    return {name: value for name, value in environ.items() if name not in names}


@pytest.mark.parametrize(
    "environ, rank_info",
    [
        ({}, RankInfo(0, 1, 0, 1)),
        ({"WORLD_SIZE": "1"}, RankInfo(0, 1, 0, 1)),
        (TORCHRUN, RankInfo(5, 8, 1, 4)),
        (without(TORCHRUN, "LOCAL_WORLD_SIZE") | {"LOCAL_SIZE": "4", "CROSS_SIZE": "2"}, RankInfo(5, 8, 1, 4)),
        (TASK, RankInfo(4, 5, 0, 1)),
        (TASK | {"SLURM_PROCID": "3", "SLURM_NODEID": "1", "SLURM_LOCALID": "1"}, RankInfo(3, 5, 1, 2)),
        (TASK | TORCHRUN, RankInfo(5, 8, 1, 4)),  # torchrun as the task of each node
        (TASK | {"WORLD_SIZE": "5", "RANK": "4"}, RankInfo(4, 5, 0, 1)),  # exported by hand, and true
        (TASK | {"SLURM_STEP_NUM_TASKS": "1"}, RankInfo(0, 1, 0, 1)),  # a shell of srun --pty
        (BATCH_SCRIPT, RankInfo(0, 1, 0, 1)),
        (BATCH_SCRIPT | TORCHRUN, RankInfo(5, 8, 1, 4)),
    ],
)
def test_place(environ, rank_info):
    assert find_rank_info(environ) == rank_info


@pytest.mark.parametrize(
    "environ, words",
    [
        ({"WORLD_SIZE": "2"}, "RANK: not set, although WORLD_SIZE is 2"),
        ({"RANK": "0"}, "WORLD_SIZE: not set, although RANK is"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE: 'two' is not a number"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK: '-1' is not a number"),
        (TORCHRUN | {"RANK": "8"}, "RANK: 8 is not below WORLD_SIZE, 8"),
        ({"WORLD_SIZE": "1", "RANK": "1"}, "RANK: 1 is not below WORLD_SIZE, 1"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "LOCAL_RANK: 4 is not below LOCAL_WORLD_SIZE, 4"),
        (without(TORCHRUN, "LOCAL_RANK"), "LOCAL_RANK: not set"),
        (without(TORCHRUN, "LOCAL_WORLD_SIZE"), "LOCAL_WORLD_SIZE: not set"),
        (TASK | {"WORLD_SIZE": "9"}, "WORLD_SIZE: is 9, but srun says 5 (5 tasks); unset WORLD_SIZE"),
        (without(TASK, "SLURM_PROCID"), "SLURM_PROCID: not set"),
        (without(TASK, "SLURM_STEP_TASKS_PER_NODE"), "SLURM_STEP_TASKS_PER_NODE: has no entry for node 2"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun started 4 processes, which is not supported"),
    ],
)
def test_a_place_that_cannot_be_is_a_line(environ, words):
    with pytest.raises(UserError) as caught:
        find_rank_info(environ)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_meeting_point_is_the_launchers():
    assert find_meeting_point(TORCHRUN | MEETING) == ("head", "29500")
    assert find_meeting_point(TASK | MEETING) == ("head", "29500")


def test_meeting_point_under_srun(monkeypatch):
    asked = []

    def scontrol(words, **_):
        asked.append(words)
        return SimpleNamespace(stdout="node1\nnode2\nnode3\n")

    monkeypatch.setattr(subprocess, "run", scontrol)
    address, port = find_meeting_point(TASK)
    assert (address, asked) == ("node1", [["scontrol", "show", "hostnames", "node[1-3]"]])
    others = [TASK | {"SLURM_JOB_ID": "70124"}, TASK | {"SLURM_STEP_ID": "1"}, TASK | {"SLURM_RESTART_COUNT": "1"}]
    ports = {port, *(find_meeting_point(environ)[1] for environ in others[1:])}
    assert len(ports) == 3 and find_meeting_point(others[0])[1] != port
    assert all(1024 < int(port) < 32768 for port in ports)
    assert find_meeting_point(TASK | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"}) == (address, port)
    asked.clear()
    assert find_meeting_point(TASK | {"SLURM_STEP_NODELIST": "gpu-07"})[0] == "gpu-07"
    assert not asked, "one name needs no scontrol"


def test_meeting_point_without_scontrol(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(UserError, match="MASTER_ADDR: .* set MASTER_ADDR"):
        find_meeting_point(TASK)


@pytest.mark.parametrize("name", ["MASTER_ADDR", "MASTER_PORT"])
def test_meeting_point_missing(name):
    with pytest.raises(UserError, match=f"{name}: not set, although WORLD_SIZE is 8"):
        find_meeting_point(without(TORCHRUN | MEETING, name))
    with pytest.raises(UserError, match="MASTER_PORT: '99999' is not a port number"):
        find_meeting_point(TORCHRUN | MEETING | {"MASTER_PORT": "99999"})


def test_tasks_that_nobody_uses():
    assert "Slurm gave this job 9 tasks and this is one process" in (unused_tasks(BATCH_SCRIPT) or "")
    assert "3 tasks" in (unused_tasks(without(BATCH_SCRIPT, "SLURM_NTASKS") | {"SLURM_JOB_NUM_NODES": "3"}) or "")
    for environ in ({}, BATCH_SCRIPT | {"SLURM_NTASKS": "1"}, TASK | {"SLURM_STEP_NUM_TASKS": "1"}):
        assert unused_tasks(environ) is None


def test_processes_that_accelerate_did_not_start(monkeypatch, tmp_path):
    asked_for_two = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}
    (tmp_path / "environ").write_bytes(b"HOME=/root\0OTHER_MASTER_ADDR=1\0")
    monkeypatch.setattr(launcher, "Path", lambda name: tmp_path / "environ")
    with pytest.raises(UserError, match="several processes were asked for, but it started only one.*use `torchrun"):
        refuse_lost_processes(asked_for_two)
    for environ in ({}, MEETING, {"ACCELERATE_MIXED_PRECISION": "no"}, asked_for_two | {"WORLD_SIZE": "1"}):
        refuse_lost_processes(environ)
    (tmp_path / "environ").write_bytes(b"MASTER_ADDR=head\0HOME=/root\0")  # accelerate itself was given it
    refuse_lost_processes(asked_for_two)
    (tmp_path / "environ").unlink()  # a system without /proc
    with pytest.raises(UserError):
        refuse_lost_processes(asked_for_two)


def test_local_rank_on_the_command_line():
    rank_info = RankInfo(5, 8, 1, 4)
    for option in ("--local_rank=1", "--local-rank=1"):
        assert without_local_rank([option, "train", "--seed", "1"], rank_info) == ["train", "--seed", "1"]
    with pytest.raises(UserError, match="--local_rank=2: LOCAL_RANK is 1"):
        without_local_rank(["train", "--local_rank=2"], rank_info)


ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}
FSDP = ACCELERATE | {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1", "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_OFFLOAD_PARAMS": "false", "FSDP_ACTIVATION_CHECKPOINTING": "false",
}  # fmt: skip
PARALLEL = FSDP | {"FSDP_VERSION": "2", "ACCELERATE_USE_PARALLELISM_CONFIG": "true"} | TORCHRUN
DEEPSPEED = ACCELERATE | {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}


@pytest.mark.parametrize(
    "environ, launcher_config",
    [
        ({}, {}),
        (ACCELERATE, {"launcher": "accelerate"}),
        (TORCHRUN | {"TORCHELASTIC_RUN_ID": "x"}, {"launcher": "torchrun"}),
        (TORCHRUN | {"CROSS_SIZE": "1"}, {"launcher": "deepspeed"}),
        (TASK, {"launcher": "srun"}),
        (ACCELERATE | {"ACCELERATE_MIXED_PRECISION": "bf16"}, {"mixed_precision": "bf16"}),
        (ACCELERATE | {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {"compile": True}),
        (FSDP, {"strategy": "fsdp"}),
        (FSDP | {"FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP"}, {"strategy": "fsdp", "reshard_after_forward": False}),
        (FSDP | {"FSDP_SHARDING_STRATEGY": "2"}, {"strategy": "fsdp", "reshard_after_forward": False}),
        (FSDP | {"FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"}, {"strategy": "hsdp"}),
        (FSDP | {"FSDP_SHARDING_STRATEGY": "HYBRID_SHARD_ZERO2"}, {"strategy": "hsdp", "reshard_after_forward": False}),
        (FSDP | {"FSDP_SHARDING_STRATEGY": "NO_SHARD"}, {"strategy": "ddp"}),
        (FSDP | {"FSDP_VERSION": "2"}, {"strategy": "fsdp"}),
        (
            FSDP | {"FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "false"},
            {"strategy": "fsdp", "reshard_after_forward": False},
        ),
        (
            FSDP | {"FSDP_OFFLOAD_PARAMS": "true", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            {"strategy": "fsdp", "offload": True, "activation_checkpointing": "full"},
        ),
        (
            PARALLEL | {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "4"},
            {"strategy": "hsdp", "shard_size": 4},
        ),
        (PARALLEL | {"PARALLELISM_CONFIG_DP_SHARD_SIZE": "8"}, {"strategy": "fsdp"}),
        (PARALLEL | {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "8"}, {"strategy": "ddp"}),
        (DEEPSPEED, {"strategy": "zero2"}),
        (
            DEEPSPEED
            | {
                "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
                "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
                "ACCELERATE_GRADIENT_CLIPPING": "0.5",
            },
            {"strategy": "zero3", "offload": True, "clip_norm": 0.5},
        ),
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, {"deepspeed_config": "ds.json"}),
    ],
)
def test_launcher_config(environ, launcher_config):
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in environ
    assert read_launcher_config(environ) == LauncherConfig(
        **{"launcher": "accelerate" if by_accelerate else "python"} | launcher_config
    )


@pytest.mark.parametrize(
    "environ, words",
    [
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "MEGATRON_LM"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed_precision fp16"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed_precision fp8"),
        ({"ACCELERATE_DYNAMO_BACKEND": "CUDAGRAPHS"}, "dynamo_backend cudagraphs"),
        (FSDP | {"FSDP_SHARDING_STRATEGY": "SOME"}, "fsdp_sharding_strategy SOME"),
        (FSDP | {"FSDP_SHARDING_STRATEGY": "NO_SHARD", "FSDP_VERSION": "2"}, "NO_SHARD with fsdp_version 2"),
        (FSDP | {"FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "true"}, "fsdp_activation_checkpointing_offload"),
        (PARALLEL | {"PARALLELISM_CONFIG_TP_SIZE": "2"}, "parallelism_config_tp_size 2"),
        (PARALLEL | {"PARALLELISM_CONFIG_CP_SIZE": "2"}, "parallelism_config_cp_size 2"),
        (PARALLEL | {"PARALLELISM_CONFIG_DP_SHARD_SIZE": "4"}, "is not the number of processes"),
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"}, "offload_optimizer_device nvme"),
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, "offload_param_device cpu"),
    ],
)
def test_what_accelerate_has_and_we_do_not_is_a_line(environ, words):
    with pytest.raises(UserError) as caught:
        read_launcher_config(environ)
    assert words in str(caught.value) and str(caught.value).startswith("accelerate's ")


def config_with(**engine) -> RunConfig:
    config = RunConfig()
    for name, value in engine.items():
        setattr(config.engine, name, value)
    return config


@pytest.mark.parametrize("size", [1, 2])
def test_reconcile_with_nothing_asked_for(size):
    config = RunConfig()
    assert reconcile(config, LauncherConfig("python"), size) == []
    assert config == RunConfig()


def test_reconcile_fills_what_is_open():
    config = RunConfig()
    launcher_config = LauncherConfig(
        "accelerate", strategy="hsdp", shard_size=2, reshard_after_forward=False, offload=True,
        activation_checkpointing="full", compile=True, clip_norm=0.5, mixed_precision="bf16",
    )  # fmt: skip
    filled = reconcile(config, launcher_config, 4)
    assert {key: value for key, value, _ in filled} == {
        "engine.strategy": "hsdp", "engine.shard_size": 2, "engine.reshard_after_forward": False,
        "engine.offload": True, "engine.activation_checkpointing": "full", "engine.compile": True,
        "optim.clip_norm": 0.5,
    }  # fmt: skip
    assert {rule for *_, rule in filled} == {"accelerate's config"}
    assert (config.engine.strategy, config.engine.shard_size, config.optim.clip_norm) == ("hsdp", 2, 0.5)
    assert reconcile(config, launcher_config, 4) == [], "what is already so is no contradiction"


@pytest.mark.parametrize(
    "engine, launcher_config, size, words",
    [
        ({"strategy": "ddp"}, {"strategy": "fsdp"}, 2, "engine.strategy: ddp, but accelerate's config asks for fsdp"),
        ({"shard_size": 4}, {"shard_size": 2}, 4, "engine.shard_size: 4, but"),
        ({"deepspeed_config": "a.json"}, {"deepspeed_config": "b.json"}, 2, "engine.deepspeed_config: a.json, but"),
        ({"compile": False}, {"compile": True}, 1, "engine.compile: False, but accelerate's config asks for True"),
        (
            {"activation_checkpointing": "none"},
            {"activation_checkpointing": "full"},
            1,
            "activation_checkpointing: none",
        ),
        ({"strategy": "single"}, {}, 2, "single, but 2 processes were started"),
        ({"strategy": "ddp"}, {}, 1, "ddp needs several processes and one was started"),
        ({"strategy": "hsdp"}, {}, 1, "hsdp needs several processes"),
        ({}, {"strategy": "hsdp"}, 1, "hsdp needs several processes"),
    ],
)
def test_reconcile_refuses(engine, launcher_config, size, words):
    with pytest.raises(UserError) as caught:
        reconcile(config_with(**engine), LauncherConfig("accelerate", **launcher_config), size)
    assert words in str(caught.value)


def test_reconcile_precision():
    for precision, fits in (("auto", True), ("bf16", True), ("fp32", False), ("pure_bf16", False)):
        config, launcher_config = RunConfig(), LauncherConfig("accelerate", mixed_precision="bf16")
        config.precision = precision
        if fits:
            reconcile(config, launcher_config, 1)
            assert config.precision == precision
        else:
            with pytest.raises(UserError, match=f"precision: {precision}, but accelerate's mixed_precision is bf16"):
                reconcile(config, launcher_config, 1)


@pytest.mark.parametrize("strategy", ["fsdp", "zero0", "zero1", "zero2", "zero3"])
def test_one_process_may_shard(strategy):
    assert reconcile(config_with(strategy=strategy), LauncherConfig("python"), 1) == []


def test_finer_checkpointing_than_accelerate_can_say_stays():
    config = config_with(activation_checkpointing="selective")
    reconcile(config, LauncherConfig("accelerate", activation_checkpointing="full"), 1)
    assert config.engine.activation_checkpointing == "selective"


def test_a_deepspeed_config_says_the_strategy(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(
        '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}, "gradient_clipping": 1.0}'
    )
    for config, launcher_config in (
        (RunConfig(), LauncherConfig("accelerate", deepspeed_config=str(path))),
        (config_with(deepspeed_config=str(path)), LauncherConfig("python")),
    ):
        reconcile(config, launcher_config, 2)
        assert (config.engine.strategy, config.engine.offload, config.optim.clip_norm) == ("zero3", True, 1.0)
    with pytest.raises(UserError, match=r"engine.strategy: ddp, but .*ds\.json asks for zero3"):
        reconcile(config_with(strategy="ddp", deepspeed_config=str(path)), LauncherConfig("python"), 2)
    path.write_text('{"zero_optimization": {"stage": "auto"}, "gradient_clipping": "auto"}')
    config = config_with(strategy="zero2", deepspeed_config=str(path))
    assert reconcile(config, LauncherConfig("python"), 2) == []
    with pytest.raises(UserError, match="names no zero_optimization.stage; set engine.strategy"):
        reconcile(config_with(deepspeed_config=str(path)), LauncherConfig("python"), 2)


@pytest.fixture
def standard_names(monkeypatch):
    """`join` writes these; they are put back afterwards."""
    for name in (*launcher.NAMES, *MEETING):
        monkeypatch.setenv(name, "")


def test_a_group_of_one(standard_names):
    import torch
    import torch.distributed as dist

    from trainer.runtime.distributed import World, join

    join(World(), "cpu")
    assert not dist.is_initialized(), "one process makes no group unless it is asked to"
    join(World(), "cpu", timeout_minutes=0.5, alone=True)
    try:
        assert (dist.get_world_size(), dist.get_backend()) == (1, "gloo")
        value = torch.ones(1)
        dist.all_reduce(value)
        assert value.item() == 1 and os.environ["LOCAL_RANK"] == "0"
    finally:
        dist.destroy_process_group()


def test_peers_that_do_not_come_are_a_line(standard_names, monkeypatch):
    import socket

    from trainer.runtime.distributed import World, join

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(UserError, match=rf"rank 1 \(.+\) has not come to 127.0.0.1:{port} within 1 s") as caught:
        join(World(0, 2, 0, 2), "cpu", timeout_minutes=1 / 60)
    assert "\n" not in str(caught.value)


def test_a_port_that_is_taken_is_a_line(standard_names, monkeypatch):
    import socket

    from trainer.runtime.distributed import World, join

    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(UserError, match="no other program uses the port: .*Address already in use"):
            join(World(0, 2, 0, 2), "cpu", timeout_minutes=1 / 60)


def test_on_one_machine_nobody_else_can_reach_the_store(monkeypatch):
    """Torch's own store listens to all networks, and whoever connects may read and change it."""
    import socket

    from trainer.runtime.distributed import World, _attempt_store, read_world

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in (TORCHRUN | MEETING | {"MASTER_PORT": str(port), "RANK": "0", "LOCAL_RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", TORCHRUN["WORLD_SIZE"])
    read_world()
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"
    size = int(TORCHRUN["WORLD_SIZE"])
    store = _attempt_store(World(0, size, 0, size), timedelta(seconds=5))
    store.set("key", "value")
    assert store.get("key") == b"value"
    socket.create_connection(("127.0.0.1", port), 5).close()
    with pytest.raises(ConnectionRefusedError):  # another address of this machine, as any other's would be
        socket.create_connection(("127.0.0.2", port), 5)


@pytest.mark.parametrize(
    "environ, prefix",
    [
        ({}, "/attempt0"),
        ({"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "2"}, "a/attempt2"),
        ({"CRESCENDO_RENDEZVOUS": "b", "TORCHELASTIC_RUN_ID": "a"}, "b/attempt0"),
    ],
)
def test_keys_are_of_one_run_and_attempt(monkeypatch, environ, prefix):
    from trainer.runtime.distributed import attempt_prefix

    for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "CRESCENDO_RENDEZVOUS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert attempt_prefix() == prefix


@pytest.mark.parametrize("text", ["x", "-1", "1.5", "\u00b2", "9" * 5000, " "])
def test_variables_that_are_no_numbers_are_a_line(text):
    for read, environ in (
        (find_rank_info, TORCHRUN | {"RANK": text}),
        (find_rank_info, TASK | {"SLURM_PROCID": text}),
        (find_meeting_point, TASK | {"SLURM_RESTART_COUNT": text}),
        (find_meeting_point, TORCHRUN | MEETING | {"MASTER_PORT": text}),
        (read_launcher_config, PARALLEL | {"PARALLELISM_CONFIG_DP_SHARD_SIZE": text}),
        (read_launcher_config, FSDP | {"FSDP_SHARDING_STRATEGY": text}),
    ):
        with pytest.raises(UserError) as caught:
            read(environ)
        assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_odd_tasks_per_node_take_no_memory():
    with pytest.raises(UserError, match="SLURM_STEP_TASKS_PER_NODE: has no entry for node 2"):
        find_rank_info(TASK | {"SLURM_STEP_TASKS_PER_NODE": "1(x9999999999999)"})
