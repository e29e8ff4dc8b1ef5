"""What can go wrong in a run of several processes, done to real ones: what the user then sees, and that nothing is lost."""

import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from cases import matrix_values, run, start, torchrun
from conftest import beyond
from processes import Ended, wait

from trainer.checkpoint import format as checkpoint
from trainer.runs.metrics import read_rows
from trainer.runtime.distributed import World

pytestmark = pytest.mark.slow

STEPS = 12  # with a checkpoint after every fourth
STRATEGIES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
SAME = 3e-4  # as in test_matrix.py: sums in another order, carried on over as many steps


@pytest.fixture
def values(tiny_dataset, tmp_path):
    """values(strategy, **changes): of a run in its own folder."""

    def chosen(strategy: str, name: str = "run", **changes) -> dict:
        settings = {"checkpoint__every": 4, "checkpoint__keep": 9, "max_steps": STEPS, **changes}
        return matrix_values(tiny_dataset, tmp_path / name, "hlb", strategy, **settings)

    return chosen


@pytest.fixture(scope="module")
def calm(tiny_dataset, tmp_path_factory):
    """calm(strategy): run folder of twelve steps on two ranks that nothing happened to."""
    done: dict[str, Path] = {}

    def folder(strategy: str) -> Path:
        if strategy not in done:
            done[strategy] = tmp_path_factory.mktemp(strategy) / "run"
            settings = matrix_values(tiny_dataset, done[strategy], "hlb", strategy, max_steps=STEPS)
            assert run(settings, 1 if strategy == "single" else 2).codes in ([0], [0, 0])
        return done[strategy]

    return folder


def history(folder: Path) -> list[tuple]:
    return [
        (row["step"], row["loss"], row["grad_norm"], row["val_loss"]) for row in read_rows(folder / "metrics.jsonl")
    ]


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    path = folder / "checkpoints" / checkpoint.step_name(step)
    checkpoint.check(path)
    return checkpoint.load(path, "", World())


def assert_same_run(folder: Path, reference: Path) -> None:
    """The same ranks add in the same order: equal bit for bit."""
    assert history(folder) == history(reference)
    mine, expected = weights(folder, STEPS), weights(reference, STEPS)
    assert mine.keys() == expected.keys()
    assert all(torch.equal(mine[name], expected[name]) for name in expected)


def saved(folder: Path) -> list[int]:
    return [step for step, _ in checkpoint.found(folder / "checkpoints")]


def error_line(ended: Ended) -> str:
    """The one line of a failure; no traceback beside it."""
    assert "Traceback" not in ended.said, ended.said
    (line,) = ended.lines("error: ")
    return line


# -- kill -9 -----------------------------------------------------------------------------------------------------------


def test_a_killed_rank_is_restarted_and_nothing_is_lost(calm, values):
    given = values("fsdp")
    faults = [{"do": "SIGKILL", "moment": "update", "rank": 1, "step": 6, "attempt": 0}]
    ended = torchrun(given, 2, "--max-restarts", "1", faults=faults)
    assert ended.codes == [0], ended.said
    assert len(ended.lines("going on from ")) == 1
    assert "step-00000004, step 4 of 12" in ended.said
    assert_same_run(Path(given["run_dir"]), calm("fsdp"))


def test_rank_zero_killed_and_then_no_restart_left(calm, values):
    """Rank 0, which holds the run folder and writes its files; then rank 1, with what torchrun does where it may not restart."""
    given = values("zero2")
    faults = [
        {"do": "SIGKILL", "moment": "update", "rank": 0, "step": 6, "attempt": 0},
        {"do": "SIGKILL", "moment": "update", "rank": 1, "step": 10, "attempt": 1},
    ]
    ended = torchrun(given, 2, "--max-restarts", "1", faults=faults)
    assert ended.codes == [1], ended.said
    assert "step-00000004, step 4 of 12" in ended.said
    assert not re.search(r"\[rank \d\] Traceback", ended.said), "that a rank is lost is told in one line, if at all"
    assert re.search(r"Root Cause[^=]*rank +: 1 [^=]*exitcode +: -9", ended.said), ended.said
    assert saved(Path(given["run_dir"])) == [4, 8]
    ended = run(given, 2)
    assert ended.codes == [0, 0], ended.said
    assert "step-00000008, step 8 of 12" in ended.said
    assert_same_run(Path(given["run_dir"]), calm("zero2"))


@pytest.mark.parametrize(
    "strategy, rank, moment",
    beyond(
        [("fsdp", 0, "update"), ("ddp", 1, "save")],
        [("fsdp", 0, "update"), ("zero2", 1, "update"), ("ddp", 1, "save")],
        several=True,
    ),
)
def test_the_other_rank_ends_without_being_told(values, strategy, rank, moment):
    """Also where the collectives that break are those of an asynchronous checkpoint."""
    given = values(strategy, checkpoint__asynchronous=True)
    ended = run(given, 2, [{"do": "SIGKILL", "moment": moment, "rank": rank, "step": 8}], tells=False)
    assert (ended.codes[rank], ended.codes[1 - rank]) == (-signal.SIGKILL, 1), ended.said
    assert error_line(ended).startswith(f"error: [rank {1 - rank}] lost another rank (Connection ")
    assert saved(Path(given["run_dir"])) == [4]


@pytest.mark.parametrize(
    "asynchronous, moment",
    beyond([(False, "save"), (True, "publish")], [(False, "save"), (True, "save"), (True, "publish")], several=True),
)
def test_all_ranks_killed_in_a_save(calm, values, asynchronous, moment):
    given = values("fsdp", checkpoint__asynchronous=asynchronous)
    ended = run(given, 2, [{"do": "SIGKILL all", "moment": moment, "rank": 0, "step": 8}])
    assert ended.codes == [-signal.SIGKILL] * 2, ended.said
    folder = Path(given["run_dir"])
    assert saved(folder) == [4]
    assert (folder / "checkpoints" / "step-00000008.tmp").exists()
    ended = run(given, 2)
    assert ended.codes == [0, 0], ended.said
    assert f"going on from {folder}/checkpoints/step-00000004, step 4 of 12" in ended.said
    assert not list((folder / "checkpoints").glob("*.tmp"))
    assert_same_run(folder, calm("fsdp"))


# -- signals -----------------------------------------------------------------------------------------------------------


def assert_stopped(ended: Ended, folder: Path, name: str, code: int, told: bool = True) -> int:
    """Ended by the signal, with a checkpoint; returns its step. told: rank 0 had the signal itself."""
    assert ended.codes == [code] * len(ended.codes), ended.said
    assert ended.said.count(f"{name}: will stop with a checkpoint once all processes know") == told
    (line,) = ended.lines("stopped by ")
    step = saved(folder)[-1]
    assert line == f"stopped by {name} at step {step}; checkpoint written; the same command goes on from it"
    assert "Traceback" not in ended.said
    return step


def assert_goes_on(given: dict, reference: Path, ranks: int) -> None:
    ended = run(given, ranks)
    assert ended.codes == [0] * ranks, ended.said
    assert_same_run(Path(given["run_dir"]), reference)


@pytest.mark.parametrize(
    "strategy, ranks", beyond([("fsdp", 2)], [("single", 1), ("fsdp", 2), ("zero3", 2)], several=True)
)
def test_sigterm_to_all(calm, values, strategy, ranks):
    """The step that is under way is finished, and one more, whose losses travel with the request."""
    given = values(strategy)
    ended = run(given, ranks, [{"do": "SIGTERM", "moment": "forward", "step": 5}])
    assert assert_stopped(ended, Path(given["run_dir"]), "SIGTERM", 143) in (5, 6)
    assert_goes_on(given, calm(strategy), ranks)


@pytest.mark.parametrize("rank, asynchronous", [(0, False), (1, True)])
def test_sigusr1_to_one_rank(calm, values, rank, asynchronous):
    """Also where the signal comes to it after the step's losses are summed, and so too late for this step."""
    given = values("fsdp", checkpoint__asynchronous=asynchronous)
    ended = run(given, 2, [{"do": "SIGUSR1", "moment": "update", "step": 5, "rank": rank}])
    assert assert_stopped(ended, Path(given["run_dir"]), "SIGUSR1", 138, told=rank == 0) in (6, 7)
    assert_goes_on(given, calm("fsdp"), 2)


def test_sigterm_to_torchrun(calm, values):
    given = values("fsdp")
    faults = [
        {"do": "SIGTERM launcher", "moment": "forward", "rank": 0, "step": 3},
        {"do": "slow", "moment": "forward"},  # it takes its time to tell the workers
    ]
    ended = torchrun(given, 2, faults=faults)
    folder = Path(given["run_dir"])
    assert ended.codes[0] != 0
    (line,) = ended.lines("stopped by ")
    step = saved(folder)[-1]
    assert 3 <= step < STEPS
    assert line.startswith(f"stopped by SIGTERM at step {step}; checkpoint written")
    assert ended.said.count("SIGTERM: will stop with a checkpoint once all processes know") == 1
    assert_goes_on(given, calm("fsdp"), 2)


@pytest.mark.parametrize("strategy, rank", [("fsdp", None), ("ddp", 1)])
def test_sigterm_in_validation(values, strategy, rank):
    """All break it off, at the same window, and make it when the run goes on."""
    narrow = {"do": "validate window by window", "moment": "build"}
    settings = {"evaluation__every": 4, "evaluation__protocol": "full", "evaluation__max_tokens": 2048}
    calm, given = values(strategy, "calm", **settings), values(strategy, **settings)
    ended = run(calm, 2, [narrow])
    assert ended.codes == [0, 0], ended.said
    fault = {"do": "SIGTERM", "moment": "window", "step": 4} | ({} if rank is None else {"rank": rank})
    ended = run(given, 2, [narrow, fault])
    folder = Path(given["run_dir"])
    assert assert_stopped(ended, folder, "SIGTERM", 143, told=rank is None) == 4
    assert [row["step"] for row in read_rows(folder / "metrics.jsonl")] == [1, 2, 3]
    ended = run(given, 2, [narrow])
    assert ended.codes == [0, 0], ended.said
    assert_same_run(folder, Path(calm["run_dir"]))


@pytest.mark.parametrize("rank", [None, 1])
def test_sigterm_before_training_begins(calm, values, rank):
    """Nothing is there to save. Whom it did not reach, the launcher tells."""
    given = values("fsdp")
    fault = {"do": "SIGTERM", "moment": "build"} | ({} if rank is None else {"rank": rank})
    ended = run(given, 2, [fault])
    assert ended.codes == [143, 143], ended.said
    assert ended.lines("stopped by ") == ["stopped by SIGTERM before training began; nothing was saved"]
    assert "Traceback" not in ended.said and saved(Path(given["run_dir"])) == []
    assert_goes_on(given, calm("fsdp"), 2)


# -- NaN ---------------------------------------------------------------------------------------------------------------

NAN = [{"do": "nan loss", "moment": "forward", "step": 3}, {"do": "nan gradient", "moment": "forward", "step": 7}]


def on_rank_one(faults: list[dict]) -> list[dict]:
    return [{**fault, "rank": 1} for fault in faults]


@pytest.fixture(scope="module")
def skipping(tiny_dataset, tmp_path_factory) -> Path:
    """A single process that skips the two steps."""
    folder = tmp_path_factory.mktemp("skipping") / "run"
    given = matrix_values(tiny_dataset, folder, "hlb", "single", max_steps=STEPS, optim__non_finite="skip")
    assert run(given, 1, NAN).codes == [0]
    return folder


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nan_on_one_rank_skips_the_step_on_all(skipping, values, strategy):
    given = values(strategy, optim__non_finite="skip")
    ended = run(given, 2, on_rank_one(NAN))
    assert ended.codes == [0, 0], ended.said
    assert len(ended.lines("step 3: loss or gradient is not finite; the step is skipped")) == 1
    mine, expected = history(Path(given["run_dir"])), history(skipping)
    assert [row[0] for row in mine if row[1] is None] == [3, 7]
    for column in (1, 2):
        numbers = [[row[column] for row in rows if row[1] is not None] for rows in (mine, expected)]
        assert numbers[0] == pytest.approx(numbers[1], rel=SAME)
    assert all(tensor.isfinite().all() for tensor in weights(Path(given["run_dir"]), STEPS).values())


@pytest.mark.parametrize("strategy", beyond(("fsdp", "zero2", "zero3"), STRATEGIES))
def test_nan_in_bf16(values, strategy):
    """Where DeepSpeed keeps weights and masters apart."""
    given = values(strategy, optim__non_finite="skip", precision="bf16")
    ended = run(given, 2, on_rank_one(NAN))
    assert ended.codes == [0, 0], ended.said
    assert [row[0] for row in history(Path(given["run_dir"])) if row[1] is None] == [3, 7]
    assert all(tensor.isfinite().all() for tensor in weights(Path(given["run_dir"]), STEPS).values())


@pytest.mark.parametrize("strategy", beyond(("fsdp", "zero2", "zero3"), STRATEGIES))
def test_nan_on_one_rank_stops_all(values, strategy):
    given = values(strategy)
    folder = Path(given["run_dir"])
    for what, step in (("nan gradient", 7), ("nan loss", 6)):  # the second start goes on from step 4
        ended = run(given, 2, [{"do": what, "moment": "forward", "rank": 1, "step": step}])
        assert ended.codes[0] == 2, ended.said
        assert error_line(ended).startswith(f"error: step {step}: loss or gradient is not finite (1 in a row)")
        assert saved(folder) == [4]
    assert all(tensor.isfinite().all() for tensor in weights(folder, 4).values())


# -- disks -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MiB, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=3m none {disk} 2>/dev/null"):
        pytest.skip("mounting a small file system needs root")
    yield disk
    os.system(f"umount {disk}")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk(calm, values, small_disk, asynchronous):
    """Room for one checkpoint of about 1.4 MB (fp32 weights and two moments of 118,403 parameters), not for two."""
    given = values("fsdp", "disk/run", checkpoint__asynchronous=asynchronous)
    ended = run(given, 2)
    folder = Path(given["run_dir"])
    assert ended.codes[0] != 0
    assert re.match(
        r"error: checkpoint: step 8 could not be written to .* No space left on device.*", error_line(ended)
    )
    assert saved(folder) == [4] and weights(folder, 4)
    roomy = shutil.copytree(folder, small_disk.parent / "roomy")
    assert_goes_on({**given, "run_dir": str(roomy)}, calm("fsdp"), 2)


def test_damaged_shards(calm, values):
    """A bit of the newest checkpoint is flipped, and the one before it is cut short: the third is used."""
    given = values("fsdp")
    folder = Path(shutil.copytree(calm("fsdp"), given["run_dir"]))
    ended = run({**given, "max_steps": STEPS + 4}, 2)
    assert ended.codes == [0, 0] and saved(folder)[-3:] == [8, 12, 16]
    flipped = folder / "checkpoints" / "step-00000016" / "__0_0.distcp"
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    cut = folder / "checkpoints" / "step-00000012" / "__1_0.distcp"
    os.truncate(cut, cut.stat().st_size - 1)
    ended = run({**given, "max_steps": STEPS + 4}, 2)
    assert ended.codes == [0, 0], ended.said
    assert (
        len(ended.lines(f"checkpoint: {flipped} is damaged: its hash is not the manifest's; trying the one before it"))
        == 1
    )
    assert len(ended.lines(f"checkpoint: {cut} has ")) == 1
    assert f"going on from {folder}/checkpoints/step-00000008" in ended.said
    assert [row[:3] for row in history(folder)[:STEPS]] == [row[:3] for row in history(calm("fsdp"))]


# -- one run in the way of another, a rank in the way of all -------------------------------------------------------------


def test_two_runs_in_one_folder(calm, values):
    given = values("fsdp")
    first = start(given, 2, [{"do": "slow", "moment": "forward"}])
    while not (Path(given["run_dir"]) / "config.yaml").exists():
        time.sleep(0.02)
    second = run(given, 2)
    assert second.codes[0] == 2
    assert error_line(second).startswith(
        f"error: run_dir: another process is training in {given['run_dir']}; wait for it"
    )
    assert wait(first).codes == [0, 0]
    assert_same_run(Path(given["run_dir"]), calm("fsdp"))


def test_a_rank_that_hangs(values):
    """Two runs beside each other, since both mostly wait; by the time-out of steps, and by that of everything."""
    started = []
    for strategy, moment, place, key in (
        ("fsdp", "update", "loss and update", "step_timeout_minutes"),
        ("ddp", "forward", "microbatch 1", "timeout_minutes"),
    ):
        given = values(strategy, strategy, **{f"engine__{key}": 0.1})
        fault = {"do": "sleep", "moment": moment, "rank": 1, "step": 6}
        # Each rank ends by itself: the launcher would end the second one, where the two are far enough apart.
        started.append((start(given, 2, [fault], tells=False), Path(given["run_dir"]), place))
    for hanging, folder, place in started:
        ended = wait(hanging)
        assert ended.codes == [1, 1]
        assert f"no progress for 6 s: rank 1 is behind, at step 6, {place} (faults.py" in error_line(ended)
        assert saved(folder) == [4]
