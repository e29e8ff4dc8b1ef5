"""A long run takes no more memory, files, threads or time per evaluation at its end than in its middle."""

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import beyond, tiny_values

from trainer.commands.train import run
from trainer.runs.report import Report
from trainer.training.run import Run


@dataclass
class Sample:
    """After one evaluation: of this process, and how long the evaluation took with its sample and picture."""

    resident: int
    files: int
    threads: int
    seconds: float  # of CPU time


def look(began: float) -> Sample:
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return Sample(resident, len(os.listdir("/proc/self/fd")), threading.active_count(), time.process_time() - began)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
@pytest.mark.parametrize("evaluations", beyond([100], [100, 1000]))
def test_a_long_run_stays_as_it_is(tiny_dataset, tmp_path, monkeypatch, evaluations):
    """With a sample at each evaluation, every fourth picture (most of the time goes there) and an asynchronous save at every fifth."""
    samples: list[Sample] = []
    began = [0.0]
    validate, draw = Run.validate, Report.draw_curves

    def begin(self):
        began[0] = time.process_time()
        return validate(self)

    def end(self):
        samples.append(look(began[0]))
        if len(samples) % 4 == 0:
            draw(self)

    monkeypatch.setattr(Run, "validate", begin)
    monkeypatch.setattr(Report, "draw_curves", end)
    model = {"name": "llama", "d_model": 16, "n_layers": 1, "n_heads": 1}
    changes = {"evaluation__every": 5, "checkpoint__every": 25, "checkpoint__asynchronous": True}
    changes |= {"evaluation__max_tokens": 64, "log__sample_tokens": 1, "log__every": 50, "max_steps": 5 * evaluations}
    values = tiny_values(tiny_dataset, tmp_path / "run", model=model, **changes)
    values["batch"] |= {"tokens_per_step": 64, "tokens_per_microbatch": 64, "sequence_start": 64}
    run(values)

    assert len(samples) == evaluations
    # What comes before warms up: allocators, fonts, caches of kernels. The last evaluation is of the whole split.
    later = samples[evaluations // 3 : -1]
    grows = [
        np.polyfit(range(len(later)), [getattr(one, key) for one in later], 1)[0]
        for key in ("resident", "files", "threads")
    ]
    # A tenth of what one picture of four would add, were it kept (9 MB). One thing left open each time would be 1.
    assert grows[0] < 0.1 * 9e6 / 4 and max(grows[1:]) < 0.05, grows
    first, last = ([one.seconds for one in part] for part in (later[: len(later) // 2], later[len(later) // 2 :]))
    assert np.median(last) < 2 * np.median(first)
