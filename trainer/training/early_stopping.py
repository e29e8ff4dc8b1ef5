"""What an evaluation decides: whether its weights are among the best so far, and whether the run has stopped improving.

Both follow from numbers that all ranks share, so all decide the same. What patience counts is a part of the checkpoint's state, and the
best so far are read from the manifests that are there: a run that goes on decides as the undisturbed one.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from trainer.checkpoint.manifest import ranked
from trainer.runs.report import validation_columns

if TYPE_CHECKING:
    from trainer.training.run import Run


def judge(run: Run, validation: dict[str, dict[str, Any]]) -> bool:
    """Count an evaluation at the run's step. Returns whether its weights are among the best `checkpoint.keep_best`.

    validation: see Run.validate. A value that is not finite improves nothing.
    """
    state, settings = run.state, run.config.evaluation
    value = validation_columns(validation)[settings.metric]
    if state.metric != settings.metric:
        state.metric, state.reference, state.stale = settings.metric, [], 0
    if not math.isfinite(value):
        state.stale += 1
        return False
    run.judged = state.step, {"metric": settings.metric, "value": value}
    if not state.reference or value < state.reference[1] - settings.min_delta:
        state.reference, state.stale = [state.step, value], 0
    else:
        state.stale += 1
    wanted = run.config.checkpoint.keep_best
    run.best = sorted([*run.best, (value, state.step)])
    among = (value, state.step) in run.best[:wanted]
    run.best = run.best[:wanted]
    return among


def read_best(run: Run) -> list[tuple[float, int]]:
    """(value, step) of the best checkpoints up to the run's step, best first. All ranks call this."""
    metric, wanted = run.config.evaluation.metric, run.config.checkpoint.keep_best
    if not wanted:
        return []
    there = run.world.on_leader(lambda: ranked(run.saver.folder, run.world.say, metric))
    return [(value, step) for value, step, _ in there if step <= run.state.step][:wanted]


def ended(run: Run) -> str:
    """Why the run ends before its last step; "" if it does not."""
    state, settings = run.state, run.config.evaluation
    if not settings.patience or state.metric != settings.metric or state.stale < settings.patience:
        return ""
    by = f" by more than {settings.min_delta:g}" if settings.min_delta else ""
    best = f"{state.reference[1]:.4f} at step {int(state.reference[0]):,}" if state.reference else "never finite"
    return f"{settings.metric} has not improved{by} in {state.stale} evaluations (best: {best})"
