"""`--profile`: what is recorded, the arithmetic of table and totals, and what is said when a GPU's memory runs out."""

import gzip
import itertools
import json
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent

from trainer.core.errors import UserError
from trainer.training.profile import Profiler, Recording, common, explain_out_of_memory, window

CPU, GPU = torch.device("cpu"), torch.device("cuda")
NUMBERS = itertools.count(1)


@pytest.fixture(autouse=True)
def one_thread():
    """Operators then do not wait for one another's cores, however busy the machine is."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def profile_steps(folder: Path, step, *, done: int, last: int, first: int = 0, rank: int = 0) -> list[str]:
    """`done` calls of `step` under a Profiler; returns what it said."""
    said: list[str] = []
    profiler = Profiler(folder, rank, 2, CPU, first, last, said.append)
    for _ in range(done):
        step()
        profiler.step_done()
    profiler.close()
    profiler.close()  # a second time does nothing
    return said


def trace_names(path: Path) -> list[str]:
    with gzip.open(path, "rt") as file:
        return [event.get("name", "") for event in json.load(file)["traceEvents"]]


def rows_of(text: str) -> list[tuple[str, float, float]]:
    """(operation, ms per step, share in per cent) of the table's lines, the total among them."""
    table = text.split("\n\n")[1].splitlines()[1:]
    return [(line.split("  ")[0], float(line.split()[-3]), float(line.split()[-2])) for line in table]


def training_step():
    """A step of a small perceptron with its optimiser, most of it five products of square matrices."""
    model = torch.nn.Sequential(torch.nn.Linear(768, 768), torch.nn.ReLU(), torch.nn.Linear(768, 768))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    data = torch.randn(768, 768)

    def step() -> None:
        model(data).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def test_a_run_is_recorded_after_its_first_steps(tmp_path):
    said = profile_steps(tmp_path, training_step(), first=100, last=120, done=10)
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == ["operations.txt", "trace-rank0.json.gz"]
    assert len(said) == 1 and "steps 106 to 108" in said[0] and "operations.txt, trace-rank0.json.gz" in said[0]
    names = trace_names(tmp_path / "profile" / "trace-rank0.json.gz")
    assert names.count("aten::addmm") == 2 * 3  # two layers, three steps
    assert [names.count(f"ProfilerStep#{number}") > 0 for number in range(10)] == [False] * 5 + [True] * 3 + [False] * 2

    text = (tmp_path / "profile" / "operations.txt").read_text()
    rows = rows_of(text)
    # Five times 1536 additions and multiplications for each number of a matrix, some fifty for all else: most of
    # the time; a third of it allows for a machine that makes an operation wait while others compute.
    products = [row for row in rows if row[0] in ("aten::mm", "aten::addmm")]
    assert rows[0] == products[0] and sum(part for *_, part in products) > 33
    assert len(rows) == 22 and [name for name, *_ in rows[-2:]] == ["all others", "total"]
    assert [own for _, own, _ in rows[:20]] == sorted((own for _, own, _ in rows[:20]), reverse=True)
    # 21 rows rounded to 0.0005 ms and to 0.05 %.
    assert sum(own for _, own, _ in rows[:-1]) == pytest.approx(rows[-1][1], abs=0.011)
    assert sum(part for *_, part in rows[:-1]) == pytest.approx(100, abs=1.1)
    wall, busy = (float(line.split("ms per step")[0].split()[-1]) for line in text.strip().splitlines()[-2:])
    # Own times of one thread do not overlap, so that they add up to what they cover.
    assert busy == pytest.approx(rows[-1][1], abs=0.011) and busy < wall
    assert "communication" not in text
    assert "768, 768x768, 768x768" in text and "rank 0 of 2, cpu" in text


def test_a_rank_beside_the_first_writes_its_trace_alone(tmp_path):
    profile_steps(tmp_path, training_step(), last=20, done=8, rank=1)
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["trace-rank1.json.gz"]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(1000, (3, 2, 3)), (8, (3, 2, 3)), (7, (2, 2, 3)), (5, (0, 2, 3)), (3, (0, 1, 2)), (2, (0, 1, 1)), (1, (0, 1, 0))],
)
def test_a_short_run_skips_less(steps, expected):
    assert window(steps) == expected


def test_a_short_run_is_recorded_to_its_last_step(tmp_path):
    """What the loop does after the last step, the final validation, is in no figure."""
    step = training_step()
    profiler = Profiler(tmp_path, 0, 1, CPU, 10, 12, lambda line: None)
    for _ in range(2):
        step()
        profiler.step_done()
    torch.ones(3).sinh()
    profiler.close()
    names = trace_names(tmp_path / "profile" / "trace-rank0.json.gz")
    assert names.count("aten::addmm") == 2 and "aten::sinh" not in names
    assert (tmp_path / "profile" / "operations.txt").read_text().startswith("Steps 12 to 12, ")


def test_a_run_that_ends_within_the_recording_keeps_it(tmp_path):
    said = profile_steps(tmp_path, training_step(), last=1000, done=7)
    assert "steps 6 to 7" in said[0]
    assert trace_names(tmp_path / "profile" / "trace-rank0.json.gz").count("aten::addmm") == 2 * 2


@pytest.mark.parametrize(("last", "done", "first"), [(1000, 2, 6), (1000, 4, 6), (1000, 5, 6), (1, 1, 2)])
def test_a_run_that_ends_before_says_so(tmp_path, last, done, first):
    """Within the steps let pass, the warm-up, the first recorded step; and a run of a single step."""
    said = profile_steps(tmp_path, lambda: None, last=last, done=done)
    assert said == [f"--profile: nothing recorded, training ended before step {first} was done"]
    assert not (tmp_path / "profile").exists()


def test_a_folder_that_cannot_be_written_does_not_end_the_run(tmp_path):
    (tmp_path / "profile").write_text("a file in its way")
    said = profile_steps(tmp_path, training_step(), last=20, done=8)
    assert len(said) == 1 and said[0].startswith(f"--profile: could not write to {tmp_path / 'profile'}: ")


def test_gloo_is_seen(tmp_path):
    """Its collectives run on threads of its own while the main thread computes."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:

        def step() -> None:
            work = dist.all_reduce(torch.ones(1 << 20), async_op=True)
            torch.randn(256, 256) @ torch.randn(256, 256)
            work.wait()

        profile_steps(tmp_path, step, last=20, done=8)
    finally:
        dist.destroy_process_group()
    last = (tmp_path / "profile" / "operations.txt").read_text().strip().splitlines()[-1]
    assert last.startswith("communication") and last.endswith("hidden under computation")
    total, hidden = (float(part.split()[-1]) for part in last.split(" ms ")[:2])
    assert 0 <= hidden <= total and total > 0


def test_common():
    assert common([(0, 10), (5, 12), (20, 30)], [(8, 22), (21, 25), (40, 50)]) == (12 - 8) + (25 - 20)
    assert common([(0, 1)], [(1, 2)]) == 0
    assert common([], [(1, 2)]) == 0


def event(name: str, begin: float, end: float, **known) -> FunctionEvent:
    """One that the profiler could have recorded, on thread 1 where nothing else is said."""
    return FunctionEvent(**{"id": next(NUMBERS), "name": name, "thread": 1, "start_us": begin, "end_us": end, **known})


def tree(events: list[FunctionEvent], use_device: str | None = None) -> EventList:
    """`events` as the profiler hands them out: each knows which it encloses."""
    found = EventList(events, use_device=use_device)
    found._build_tree()
    return found


def test_overlap_on_a_cpu():
    """One step of 1 ms in which a collective runs from 300 to 700 us."""
    recorded = Recording.of(
        tree(
            [
                event("ProfilerStep*", 0, 1000, is_user_annotation=True),
                event("autograd::node", 100, 500),  # its own: 100-200, 350-400 and 450-500
                event("aten::mm", 200, 350, input_shapes=[[2, 3], [], [3, 4]]),
                event("c10d::allreduce_", 400, 450),
                event("FSDP::wait", 500, 800, is_user_annotation=True),  # waits from 600 on
                event("aten::mm", 550, 600, input_shapes=[[2, 3], [3, 4]]),
                event("aten::add", 600, 680, thread=7),  # of gloo's own
                event("gloo:all_reduce", 300, 700, thread=7, is_async=True, is_user_annotation=True),
                event("## Call CompiledFxGraph f1 ##", 900, 940, is_user_annotation=True),
                event("## Call CompiledFxGraph f2 ##", 940, 1000, is_user_annotation=True),
            ]
        ),
        CPU,
    )
    assert recorded.operations == {
        ("autograd::node", ""): (1, 200),
        ("aten::mm", "2x3, 3x4"): (2, 200),
        ("c10d::allreduce_", ""): (1, 50),
        ("compiled code", ""): (2, 100),
    }
    wall, busy, communication = recorded.totals(steps=2, wall_ms=1.0)
    assert "0.500 ms per step" in wall
    assert "0.250 ms per step, 50.0 %" in busy  # 200 + 200 + 100 us
    # 300-400, 450-500 and 550-600 us are hidden.
    assert "0.200 ms per step" in communication and "0.100 ms (50.0 %) hidden" in communication


def test_overlap_on_a_gpu():
    """Kernels of two streams, a collective on a third, annotations, and a kernel that no operator started."""
    product, reduce = event("aten::mm", 0, 10, use_device="cuda"), event("c10d::allreduce_", 10, 20, use_device="cuda")
    step = event("ProfilerStep*", 0, 30, use_device="cuda", is_user_annotation=True)
    product.append_kernel("gemm", 0, 300)
    reduce.append_kernel("ncclDevKernel_AllReduce", 0, 400)
    step.append_kernel("ProfilerStep*", 0, 900)
    on_device = {"device_type": DeviceType.CUDA, "use_device": "cuda"}
    kernels = [
        event("gemm", 100, 400, **on_device),
        event("Memset", 350, 450, **on_device),
        event("ncclDevKernel_AllReduce", 300, 700, **on_device),
        event("nccl:all_reduce", 300, 700, is_user_annotation=True, **on_device),
        event("ProfilerStep*", 100, 1000, is_user_annotation=True, **on_device),
    ]
    recorded = Recording.of(tree([step, product, reduce, *kernels], "cuda"), GPU)
    assert recorded.operations == {("aten::mm", ""): (1, 300), ("c10d::allreduce_", ""): (1, 400)}
    text = recorded.render(steps=1, wall_ms=1.0)
    # The memset's 100 us belong to no operator.
    assert [row[1:] for row in rows_of("\n\n" + text.partition("\n\n")[2])] == [
        (0.4, 50.0),
        (0.3, 37.5),
        (0.1, 12.5),
        (0.8, 100.0),
    ]
    assert "0.350 ms per step, 35.0 %" in text
    assert "0.400 ms per step, of which 0.150 ms (37.5 %) hidden" in text


RAN_OUT = (
    "CUDA out of memory. Tried to allocate 22.78 GiB. GPU 0 has a total capacity of 31.47 GiB of which "
    "12.73 GiB is free. Of the allocated memory 9.08 GiB is allocated by PyTorch, and 9.35 GiB is reserved by PyTorch "
    "but unallocated. If reserved but unallocated memory is large try setting "
    "PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation.\n"
)


def run_out(folder: Path, device: torch.device) -> None:
    with explain_out_of_memory(folder, 3, device, lambda: "set batch.tokens_per_microbatch below 4096"):
        raise torch.OutOfMemoryError(RAN_OUT)


def test_out_of_memory_is_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda name: Path(name).write_bytes(b"held"))
    with pytest.raises(UserError) as caught:
        run_out(tmp_path, GPU)
    line, snapshot = str(caught.value), tmp_path / "profile" / "memory-rank3.pickle"
    assert snapshot.read_bytes() == b"held"
    assert line.startswith("rank 3: CUDA out of memory. Tried to allocate 22.78 GiB. ") and "\n" not in line
    assert "9.08 GiB is allocated" in line and "expandable" not in line
    assert "; set batch.tokens_per_microbatch below 4096; " in line
    assert f"trace_plot {snapshot} " in line and "https://pytorch.org/memory_viz" in line
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_a_snapshot_that_fails_hides_nothing(tmp_path, monkeypatch):
    def full(name: str) -> None:
        raise OSError("no space\nleft")

    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", full)
    with pytest.raises(UserError, match="22.78 GiB.*no snapshot.*OSError: no space left") as caught:
        run_out(tmp_path, GPU)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_nothing_else_is_touched(tmp_path):
    with pytest.raises(torch.OutOfMemoryError):
        run_out(tmp_path, CPU)
    with pytest.raises(ZeroDivisionError), explain_out_of_memory(tmp_path, 0, GPU, lambda: ""):
        1 / 0  # noqa: B018
    assert not (tmp_path / "profile").exists()


@pytest.mark.gpu("memory")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_that_runs_out_of_memory(tmp_path):
    """A real snapshot, with the history of a profiled run; and a profile whose product takes most of the time."""
    left, right = torch.randn(2, 4096, 4096, device=GPU)
    said: list[str] = []
    profiler = Profiler(tmp_path, 0, 1, GPU, 0, 20, said.append)
    with pytest.raises(UserError, match="Tried to allocate .* is allocated by PyTorch.*memory-rank0.pickle"):
        with explain_out_of_memory(tmp_path, 0, GPU, lambda: "ask for less"):
            for _ in range(8):
                left @ right
                profiler.step_done()
            torch.empty(1 << 50, device=GPU)
    profiler.close()
    rows = rows_of((tmp_path / "profile" / "operations.txt").read_text())
    assert rows[0][0] == "aten::mm" and rows[0][2] > 90
    history = pickle.loads((tmp_path / "profile" / "memory-rank0.pickle").read_bytes())["device_traces"]  # noqa: S301
    assert any(entry["action"] == "oom" and entry["frames"] for trace in history for entry in trace)
    torch.cuda.memory._record_memory_history(None)
