"""Shared by all tests: a tiny prepared dataset, a tiny run on it, and the command line as a user calls it."""

import gc
import getpass
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path

import pytest

# Side by side (`pytest -n 2`) each process has a core: two that want all of them mostly wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# One cache of compiled code for all tests and their runs, and no pool of compiling processes for each.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}")
)
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

ROOT = Path(__file__).parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"
COMPARISONS = sorted([*(ROOT / "configs").glob("compare-*.yaml"), *(ROOT / "configs" / "record").glob("*.yaml")])
WITH_ENTROPIES = ROOT / "configs" / "record" / "patches.yaml"  # its data are prepared with --patches
LADDERS = sorted((ROOT / "configs").glob("ladder-*.yaml"))
RUN_CONFIGS = sorted({*(ROOT / "configs").glob("*.yaml")} - {*COMPARISONS, *LADDERS})

# Seconds: what a test starts and does not end by then is stuck, not slow (the longest test took 135 beside CI's other lane on
# two slow cores). Less than engine.step_timeout_minutes: a run that only its watchdog ended counts as stuck.
PATIENCE = 240

# What is wrong if a test marked gpu("...") fails: `-m gpu` runs the most harmful first.
HARM = (
    "training",  # losses or weights
    "kernels",  # a fused kernel, against its reference
    "compiled",  # compiled or replayed code, against eager code
    "waiting",  # the host waits for the GPU in a step
    "memory",  # the memory plan, and what is said when memory runs out
    "launching",  # the strategies of several processes
    "costly",  # bench, 3 B parameters
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also the slow tests")
    parser.addoption("--nightly", action="store_true", help="also the slow tests and every case of the large matrices")
    parser.addoption("--failures", type=Path, help="file that each failure is appended to when it happens")


class FailureLog:
    """Writes each failure at once: a pytest that is killed prints none."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.failed:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"== {report.nodeid} ({report.when})\n{report.longreprtext}\n\n")

    pytest_collectreport = pytest_runtest_logreport


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("failures")
    if path is not None and "PYTEST_XDIST_WORKER" not in os.environ:  # workers report to the process that started them
        config.pluginmanager.register(FailureLog(path.resolve()))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Quick tests alone, unless --all, --nightly or a marker named in -m asks for more. With -m gpu in the order of HARM."""
    named = config.getoption("markexpr")
    nightly = config.getoption("nightly") or "nightly" in named
    left_out = set() if nightly else {"nightly"}
    if not (nightly or config.getoption("all") or "slow" in named):
        left_out.add("slow")
    waiting = [item for item in items if any(item.get_closest_marker(name) for name in left_out)]
    if waiting:
        config.hook.pytest_deselected(items=waiting)
        items[:] = [item for item in items if item not in set(waiting)]
    harm = {item: marker.args for item in items if (marker := item.get_closest_marker("gpu"))}
    if wrong := [item.nodeid for item, args in harm.items() if len(args) != 1 or args[0] not in HARM]:
        raise pytest.UsageError(f"{wrong[0]}: mark it gpu(...) with one of {', '.join(HARM)}")
    if "gpu" in named:
        items.sort(key=lambda item: HARM.index(harm[item][0]) if item in harm else len(HARM))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Keep the half million objects of the imports out of garbage collections: runs and plots ask for some hundred of them.

    Runs thaw what they froze; here that would bring the imports back.
    """
    gc.collect()
    gc.freeze()
    gc.unfreeze = lambda: None  # type: ignore[assignment]


THAW = gc.unfreeze


def beyond(sample: Collection, values: Iterable, several: bool = False) -> list:
    """Parameters of a test: all `values`; those that `sample` does not hold run with --nightly alone.

    several: each value is a tuple with a value for each of several names."""
    packed = [value if several else (value,) for value in values]
    kept = [value if several else (value,) for value in sample]
    return [pytest.param(*value, marks=() if value in kept else pytest.mark.nightly) for value in packed]


# For tests whose cases depend on each other or share one start: a part of the cases, and all of them.
WHOLE = [pytest.param(False, id="sample"), pytest.param(True, id="all", marks=pytest.mark.nightly)]


@pytest.fixture(autouse=True)
def own_plugins(monkeypatch):
    """What a test imports as a plug-in is none of the next test's."""
    monkeypatch.setattr("trainer.commands.plugins._IMPORTED", {})


@pytest.fixture(autouse=True)
def full_fp32():
    """A run on a GPU multiplies fp32 in TF32 from then on; the next test does not."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True)
def no_group_left():
    """A process has one default group, and what joined it is in its environment: what a test leaves would be the next one's error."""

    def group_exists() -> bool:
        dist = sys.modules.get("torch.distributed")
        return dist is not None and dist.is_initialized()

    from trainer.runtime.launcher import NAMES

    before, environment = group_exists(), {name: os.environ.get(name) for name in NAMES}
    yield
    for name, value in environment.items():
        os.environ.pop(name, None)
        os.environ.update({} if value is None else {name: value})
    if group_exists() and not before:
        sys.modules["torch.distributed"].destroy_process_group()
        pytest.fail("the test left a process group behind")


PICTURE = b"\x89PNG of a test"


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """A run draws its curves at each evaluation, half a second each time. A quick test's writes PICTURE, except in tests/runs."""
    drawn = request.path.parent.name == "runs" or request.node.get_closest_marker("slow")
    if not drawn and "trainer.runs.plots" in sys.modules:
        monkeypatch.setattr("trainer.runs.plots.render", lambda *_: PICTURE)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real text and tokenizer files, where this checkout stands beside them."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the folder {SHARED_DATA.relative_to(ROOT.parent)} beside the checkout")
    return SHARED_DATA


def words_text(seed: int, count: int) -> str:
    draw = random.Random(seed)
    words = [
        "the",
        "cat",
        "sat",
        "on",
        "a",
        "mat",
        "and",
        "dog",
        "ran",
        "far",
        "away",
        "from",
        "every",
        "small",
        "house",
    ]
    return " ".join(draw.choice(words) for _ in range(count)) + ".\n"


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory) -> Path:
    """About 60 kB of words in 40 documents, as bytes, in samples of 64 tokens and several shards."""
    from trainer.core.config import PrepareConfig
    from trainer.data.prepare import prepare

    folder = tmp_path_factory.mktemp("tiny")
    (folder / "texts").mkdir()
    for i in range(40):
        (folder / "texts" / f"{i:02d}.txt").write_text(words_text(i, 300))
    out = folder / "data"
    prepare(
        PrepareConfig(
            source=str(folder / "texts"),
            tokenizer="bytes",
            validation_fraction=0.1,
            sample_length=64,
            out=str(out),
            workers=1,
        ),
        lambda line: None,
    )
    return out


@pytest.fixture
def copy(tiny_dataset, tmp_path) -> Path:
    """A copy of the tiny dataset, to be damaged."""
    return shutil.copytree(tiny_dataset, tmp_path / "copy")


def open_split(folder, name="train", **data):
    """A split of the dataset in `folder` or at that address; data: further keys of `data`."""
    from trainer.core.config import DataConfig
    from trainer.data.stream import Split, find_dataset

    config = DataConfig(path=str(folder), **data)
    return Split(config, find_dataset(config), name)


def tiny_values(dataset: Path, run_dir: Path, **changes) -> dict:
    """A run of a few thousand parameters: hlb with sequence growth and all its laws. `a__b=1` changes key a.b."""
    values = {
        "model_scale": 0.05,
        "model": {"name": "hlb"},
        "run_dir": str(run_dir),
        "max_steps": 12,
        "precision": "fp32",
        "device": "cpu",
        "data": {"path": str(dataset)},
        "batch": {
            "tokens_per_step": 512,
            "tokens_per_microbatch": 256,
            "sequence_start": 16,
            "sequence_length": 64,
            "sequence_double_every": 3,
        },
        "evaluation": {"every": 0, "max_tokens": 512},
        "checkpoint": {"every": 4},
        "log": {"demo_tokens": 0, "sample_tokens": 0, "sample_prompt": "the cat"},
    }
    for key, value in changes.items():
        section, _, leaf = key.rpartition("__")
        (values.setdefault(section, {}) if section else values)[leaf] = value
    return values


def trainer(
    *words, timeout: float = PATIENCE, env: dict | None = None, cwd: Path = ROOT
) -> subprocess.CompletedProcess:
    """`python -m trainer WORDS` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "trainer", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT), **(env or {})},
    )


def text_only_transformers(monkeypatch):
    """The package transformers, 4 or 5, which does not look for torchvision: text needs no pictures, and a torchvision that was
    built for another torch stops the import of models. Skips the test where there is none."""
    transformers = pytest.importorskip("transformers", reason="needs Hugging Face transformers as the reference")
    from transformers.utils import import_utils

    monkeypatch.setattr(import_utils, "_torchvision_available", False, raising=False)  # of 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchvision", None)
        for look in (
            import_utils._is_package_available,
            import_utils.is_torchvision_available,
        ):  # 5 keeps what it found
            getattr(look, "cache_clear", lambda: None)()
        import_utils.is_torchvision_available()
    return transformers


def error_line(done: subprocess.CompletedProcess) -> str:
    """The one line a failed command gave; asserts that it was one line, with an exit code that says so and no traceback."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert lines[-1].startswith("error: "), done.stderr
    assert sum(line.startswith("error: ") for line in lines) == 1
    return lines[-1]


@pytest.fixture(scope="module")
def few_windows():
    """hlb's validation reads 153,600 tokens. test_evaluate.py tests that; 4 windows do elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.recipes.hlb.EVALUATION_TOKENS", 4 * 1024)
        yield


@pytest.fixture(scope="session")
def finished(tiny_dataset, tmp_path_factory) -> Path:
    """An uninterrupted run of 12 steps, for all that only reads it or works on a copy."""
    from trainer.commands.train import run

    folder = tmp_path_factory.mktemp("finished") / "run"
    values = tiny_values(tiny_dataset, folder, log__demo_tokens=20, log__sample_tokens=10, evaluation__every=5)
    values["evaluation"]["protocol"] = "both"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.recipes.hlb.EVALUATION_TOKENS", 4 * 1024)
        run(values)
    return folder
