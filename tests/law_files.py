"""A laws.yaml of known laws, for tests: of a tiny Llama on `tiny_dataset`."""

import dataclasses

from conftest import tiny_values

from trainer.core.config import RunConfig
from trainer.core.settings import build
from trainer.data.stream import find_dataset
from trainer.planning.expected import settings_of, validation_of
from trainer.planning.laws import BATCH_POWER, Fit, Law, Laws, LossLaw, Origin, PowerLaw, Subject
from trainer.planning.plan import resolve

MODEL = {"name": "llama", "d_model": 32, "n_layers": 1, "n_heads": 1}
LAW = Law(("N", "D"), 3.0, (40.0, 30.0), (0.5, 0.4))
RATE = {"constant": 1e-4, "power": -0.1, "batch_power": BATCH_POWER}


def values(dataset, folder, **changes):
    """A run that the laws are of."""
    batch = {"tokens_per_step": 512, "sequence_start": 64, "sequence_length": 64, "dynamic": False}
    return {
        **tiny_values(dataset, folder, model=MODEL, optim={"recipe": "plain"}, batch=batch),
        "max_steps": 4,
        **changes,
    }


def laws(dataset, folder, **changes):
    """Laws of the model of `values`. changes: fields of the Subject."""
    config = build(RunConfig, values(dataset, folder))
    info = find_dataset(config.data)
    plan = resolve(config, info)
    sized = ["d_model", "n_layers", "n_heads", "init_std"]
    fields = {
        key: value for key, value in dataclasses.asdict(plan.model_config).items() if key not in (*sized, "vocab_size")
    }
    of = Subject(
        model={"name": "llama", **fields},
        sized=sized,
        **{"recipe": "plain", "optimizer": "adamw", "objective": "next_token", "data": "far/away"},
        fingerprint=info.fingerprint,
        **{"tokenizer": "bytes", "tokenizer_sha256": info.tokenizer.sha256, "vocab_size": 257, "sequence_length": 64},
        validation=validation_of(plan.config),
        settings=settings_of(plan.config, plan.entries, sized),
    )
    ranges = {
        "N": [1000.0, 50_000.0],
        "D": [1000.0, 10_000.0],
        "B": [512.0, 512.0],
        "tokens_per_parameter": [0.01, 10.0],
    }
    where = Origin(
        "0" * 64, "python -m trainer ladder x.yaml", "2026", {"torch": "2"}, [1], 9, "a rule", **ranges, epochs=0.5
    )
    draws = tuple(dataclasses.replace(LAW, irreducible=2.9 + 0.01 * k) for k in range(21))
    return Laws(
        dataclasses.replace(of, **changes),
        LossLaw.of(Fit(LAW, draws, (0.0,) * 21), "nats a token", where),
        PowerLaw("lr = 0.0001 N^-0.100 B^0.5", **RATE, measured=[], origin=where),
        PowerLaw("B = 4 N^0.500", 4.0, 0.5, 0.0, [], where),
    )


def laws_file(dataset, folder, **changes):
    """The path of such a file."""
    path = folder / "laws.yaml"
    path.write_text(laws(dataset, folder / "run", **changes).text())
    return path
