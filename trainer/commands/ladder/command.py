"""What the verb does, in order: read the spec, train the sizes, fit, write the prediction, train the held-out size, report.

ladder-NAME/losses/            the runs that the law is fitted to: an experiment of `compare`
            prediction.json    the law and what it expects of the held-out run; written before that run begins, and never again
            held-out/          the run that was predicted
            learning-rates/    the sweeps of `--check lr`
            batches/           the sweeps of `--check batch`
            laws.yaml          the laws that were found, for `dial`
            ladder.md .json .png
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from trainer.commands.compare.command import say
from trainer.commands.compare.experiment import Experiment, Task, stored_experiment
from trainer.commands.compare.spec import Arm
from trainer.commands.ladder import LadderConfig
from trainer.commands.ladder.fit import fit
from trainer.commands.ladder.laws_file import about, keep, origin
from trainer.commands.ladder.page import publish_losses
from trainer.commands.ladder.spec import (
    Rung,
    check_numbers,
    held_out_multiple,
    held_out_scale,
    ladder_folder,
    means_of,
)
from trainer.commands.ladder.sweeps import LEARNING_RATES, TOKENS_OF_A_STEP, sweep_and_check
from trainer.commands.ladder.work import MOST_LOSS, Work, check_sizes, loss_or_diverged
from trainer.core.errors import UserError
from trainer.core.files import read_json, sealed, write_file
from trainer.core.text import printable
from trainer.planning.laws import SHARE, Fit, LossLaw
from trainer.runs.folder import locked
from trainer.runtime.environment import environment

PREDICTION = "prediction.json"
HELD_OUT = "held-out"


def ladder(config: LadderConfig) -> None:
    """Train what is missing of the ladder, and report it."""
    check_numbers(config)
    folder = ladder_folder(config)
    with locked(folder, key="ladder_dir", doing="at work on"):
        work = Work(config, folder)
        if config.check == "none":
            predict_and_check(work)
        else:
            sweep_and_check(work, {"lr": LEARNING_RATES, "batch": TOKENS_OF_A_STEP}[config.check])


def predict_and_check(work: Work) -> None:
    """Fit the law, predict the held-out size, train it, and report."""
    config = work.config
    pairs = [(scale, multiple) for scale in config.scales for multiple in config.tokens_per_parameter]
    *fitted, held_out = work.rungs([*pairs, (held_out_scale(config), held_out_multiple(config))])
    check_sizes([*fitted, held_out])
    experiment = work.experiment("losses", fitted, config.seeds)
    stored = stored_experiment(work.folder / HELD_OUT)
    seeds = stored["seeds"] if stored else config.seeds[:1]  # more seeds later do not change the run that was predicted
    check = work.experiment(HELD_OUT, [held_out], seeds)
    laws = None if config.estimate else work.laws(fitted)
    if not work.train(experiment) or laws is None:
        print("\nThe run that is predicted:\n")
        work.train(check)
        return
    points = [(one, seed, final_loss(experiment, one.arm, seed)) for one in fitted for seed in config.seeds]
    found = fit_points(points)
    prediction = predicted(work.folder / PREDICTION, found, held_out)
    work.train(check)
    measured = final_loss(check, held_out.arm, seeds[0])
    laws.loss = LossLaw.of(found, "nats a token", origin(config, fitted, len(points)))
    laws.loss.held_out = {key: prediction[key] for key in ("N", "D", "loss", "low", "high")} | {"measured": measured}
    keep(work.folder, laws)
    publish_losses(work.folder, about(laws.of), points, found, held_out, prediction, measured)


def final_loss(experiment: Experiment, of: Arm, seed: int) -> float:
    """The validation loss of a run at its end. UserError if it failed, diverged or has an impossible loss: a law through the others would
    hide it."""
    task = Task(of, experiment.lengths[of.key].learning_rate, seed, "test")
    loss = loss_or_diverged(experiment, task)
    if math.isinf(loss):
        why = experiment.state(task).message or f"its loss is above {MOST_LOSS:g} nats a token"
        raise UserError(
            f"{task.name}: diverged: {why}; so this ladder has no law, or its prediction failed: another try "
            "needs other `scales` or a lower optim.lr, in another --ladder_dir"
        )
    return loss


def fit_points(points: list[tuple[Rung, int, float]]) -> Fit:
    """The law through the mean of each size and length over its seeds: what the law misses there is the same for all of them, so they are
    not independent points."""
    means = means_of(points)
    try:
        return fit(("N", "D"), [one.point for one, _ in means], [loss for _, loss in means])
    except ValueError as error:
        raise UserError(f"scales, tokens_per_parameter: {error}") from None


def predicted(path: Path, found: Fit, held_out: Rung) -> dict[str, Any]:
    """What the law says of the held-out run. It is written once: a prediction that changes after the run is none."""
    if path.exists():
        before = read_json(path)
        if (before["N"], before["D"]) != (held_out.size, held_out.length.tokens):
            raise UserError(
                f"{printable(path)}: predicts {before['N']:,} parameters and {before['D']:,} tokens, not the {held_out.size:,} and "
                f"{held_out.length.tokens:,} of the spec; put the spec back (what held_out_* does not say follows from scales and "
                "tokens_per_parameter), or choose another --ladder_dir"
            )
        return before
    if any((path.parent / HELD_OUT / "runs").glob("*")):
        raise UserError(
            f"{printable(path)}: is gone, and the run that it predicted has begun: what is written now would be no prediction; put the "
            "file back, or choose another --ladder_dir"
        )
    loss, low, high = found.predict(*held_out.point, share=SHARE)
    content = {
        "environment": environment(),
        "law": found.law.formula(),
        "scale": held_out.arm.scale,
        "N": held_out.size,
        "D": held_out.length.tokens,
        "loss": loss,
        "low": low,
        "high": high,
        "share": SHARE,
    }
    write_file(path, sealed(content))
    say(
        f"prediction: scale {held_out.arm.scale:g}, {held_out.size:,} parameters without embeddings and head, "
        f"{held_out.length.tokens:,} tokens: loss {loss:.4f}, {SHARE:.0%} between {low:.4f} and {high:.4f}; {path}"
    )
    return content
