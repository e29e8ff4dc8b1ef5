"""`quantize`: a run's weights in few bits, as a folder that generates and evaluates, and a table of what that costs.

Only the linear layers of the blocks are packed (by the role `matrix` of their weights): embedding, head, norms and biases stay as
they are. This is rounding after training: the weights are not trained further. nf4 and int8 suit any model; ternary and sign suit a
model that was trained so (`model.linear bitnet` or `sign`).
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from trainer.commands import Verb, run_folder
from trainer.core.config import STEP, WEIGHTS, DataConfig, Precision, Step
from trainer.core.errors import UserError
from trainer.core.files import user_path, write_file
from trainer.core.settings import setting
from trainer.core.text import printable

DECODED = 64  # tokens of a measurement of speed
REPEATS = 3  # of it; the median counts


@dataclass
class QuantizeConfig:
    """`quantize`: a run's weights in few bits, and what that costs."""

    run_dir: str | None = setting(None, "folder of the run (the flag itself is optional)")
    to: Literal["nf4", "int8", "ternary", "sign"] | None = setting(None, "format of the matrices")
    out: str | None = setting(None, "folder to write; must not exist; auto: RUN/quantized-FORMAT-STEP")
    step: Step = setting(None, STEP, low=0)
    weights: str = setting("evaluation", WEIGHTS)
    data: DataConfig = field(default_factory=DataConfig)
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where to measure")
    precision: Precision = setting("auto", "compute type of the measurements; auto: the run's")


def run(config: QuantizeConfig, as_json: bool = False) -> None:
    """Run the verb in one process. It overwrites nothing, and removes a partial result if it fails."""
    from trainer.checkpoint.quantized import check_installed, refuse_quantized
    from trainer.commands.export import fresh_folder
    from trainer.inference.evaluation import check_enough
    from trainer.runs.opening import open_run

    if config.run_dir is None or config.to is None:
        missing = "run_dir" if config.run_dir is None else "to"
        raise UserError(f"{missing}: name it, as in `python -m trainer quantize runs/NAME --to nf4`")
    check_installed(config.to, "to")
    refuse_quantized(user_path(config.run_dir, "run_dir"), "run_dir")
    how = config.device, config.precision
    opened = open_run(config.run_dir, config.step, *how, weights=config.weights)
    check_trained_as(opened.config.model, config.to)
    split = opened.split(config.data, "validation")
    check_enough(split, "full", "data")
    default = opened.folder / f"quantized-{config.to}-{opened.step}"
    out = default if config.out is None else user_path(config.out, "out")
    with fresh_folder(out) as partial:
        left = write_folder(partial, out, config, opened.step)
        packed = open_run(str(partial), None, *how)
        report = {
            "run": config.run_dir,
            "step": opened.step,
            "weights": config.weights,
            "to": config.to,
            "out": str(out),
            "device": str(opened.device),
            "precision": opened.precision,
            "left_matrices": left,
            **sizes_of(packed.model, config, partial),
        }
        rates = decoding_rates([opened, packed])
        for when, one, rate in zip(("before", "after"), (opened, packed), rates, strict=True):
            report[when] |= quality(one, split) | {"tokens_per_second": rate}
    sys.stdout.write((json.dumps(report) if as_json else render(report)) + "\n")


def check_trained_as(model: dict[str, Any], to: str) -> None:
    """UserError if the run was trained with weights of one bit or three values, and these are to be packed in another format."""
    from models.layers.quantized import OWN_FORMAT

    kind = model.get("linear")
    if kind in OWN_FORMAT and to != OWN_FORMAT[kind]:
        raise UserError(
            f"to: the run was trained with model.linear {kind}, so --to {OWN_FORMAT[kind]} loses nothing and {to} has no use"
        )


def write_folder(partial: Path, out: Path, config: QuantizeConfig, step: int) -> dict[str, str]:
    """Write the folder that becomes `out`. Returns the matrices that stay as they are, with the reason."""
    from models.lora import without_lora
    from models.quantization import packed_layers, quantize_matrices
    from trainer import __version__
    from trainer.checkpoint.quantized import write_quantized
    from trainer.checkpoint.weights import choose_weights
    from trainer.planning.model import written_out
    from trainer.planning.run_config import write_config
    from trainer.runs.opening import load_model, stored_run
    from trainer.runtime.distributed import World

    world = World()
    folder, stored = stored_run(config.run_dir or "", lambda line: None)  # it was said when the run was opened
    kept = stored.build()
    kept = dataclasses.replace(kept, model=without_lora(kept.model), run_dir=str(out.absolute()))
    kept.init_from, kept.init_weights, kept.branch_from = None, "evaluation", None
    weights = choose_weights(folder / "checkpoints", step, config.weights, lambda line: None, world)
    model = load_model(*written_out(kept), weights, "cpu", world)
    left = quantize_matrices(model, config.to or "")
    if not packed_layers(model):
        raise UserError(
            f"run_dir: {kept.model['name']} has no linear layer with the role `matrix`, so there is nothing to pack"
        )
    source = f"{folder.absolute()}@{step}" + ("" if config.weights == "evaluation" else f" ({config.weights})")
    facts = {"tokens": weights.manifest["tokens"], "weights": config.weights, "crescendo": __version__}
    for name in ("dataset.json", "tokenizer.json"):
        write_file(partial / name, (folder / name).read_bytes())
    write_config(partial, kept)
    write_quantized(partial, model, config.to or "", step, source, facts)
    return left


def quality(opened: Any, split: Any) -> dict[str, float]:
    """Loss and bits per byte on the whole split."""
    from trainer.inference.evaluation import validate
    from trainer.runtime.distributed import World

    trained = opened.config
    length = trained.evaluation.sequence_length or trained.batch.sequence_length
    protocol = dataclasses.replace(trained.evaluation, protocol="full", sequence_length=length)
    found = validate(opened, split, dataclasses.replace(trained, evaluation=protocol), World(), opened.step)["full"]
    return {key: found[key] for key in ("loss", "bits_per_byte", "bits_per_byte_is_estimate")}


def decoding_rates(models: list[Any]) -> list[float]:
    """Tokens per second of each OpenRun in greedy decoding of one text. They are measured in turns, and the median of each counts:
    other programs of the machine should slow all alike."""
    from trainer.inference.decoding import encode_prompt, generate

    prompt = encode_prompt(models[0].tokenizer, models[0].config.log.sample_prompt)
    limit = models[0].model.max_context
    count = DECODED if limit is None else max(1, min(DECODED, limit - len(prompt)))

    def seconds(opened: Any, tokens: int) -> float:
        begin = time.perf_counter()
        generate(opened, [prompt], tokens, opened.tokenizer.vocab_size, say=lambda line: None, temperature=0.0)
        return time.perf_counter() - begin  # the host has read each token, so the device has finished

    for opened in models:
        seconds(opened, 2)
    turns = [[seconds(opened, count) for opened in models] for _ in range(REPEATS)]
    return [count / statistics.median(times) for times in zip(*turns, strict=True)]


def sizes_of(model: Any, config: QuantizeConfig, folder: Path) -> dict[str, Any]:
    """Counts, and bytes before and after. model: the quantised one, as it was opened for measuring; folder: its."""
    from models.materialise import ties
    from models.quantization import packed_layers, packed_tensors
    from trainer.checkpoint.quantized import WEIGHTS
    from trainer.checkpoint.weights import choose_weights
    from trainer.runtime.distributed import World

    layers, packed = packed_layers(model), packed_tensors(model)
    matrices = sum(layer.in_features * layer.out_features for layer in layers.values())
    rest = [tensor for name, tensor in model.state_dict().items() if name not in ties(model)]
    others = sum(parameter.numel() for parameter in model.parameters())
    held, in_packed = sum(tensor.nbytes for tensor in rest), sum(tensor.nbytes for tensor in packed.values())
    itemsize = next(iter(layers.values())).dtype.itemsize
    run_folder = user_path(config.run_dir or "", "run_dir")
    stored = choose_weights(
        run_folder / "checkpoints", config.step, config.weights, lambda line: None, World()
    ).stored()
    on_disk = sum(shape.numel() * dtype.itemsize for name, (shape, dtype) in stored.items() if name not in ties(model))
    weights = matrices + others
    after = held + in_packed
    return {
        "matrices": len(layers),
        "matrix_weights": matrices,
        "other_weights": others,
        "before": {
            "disk_bytes": on_disk,
            "memory_bytes": held + itemsize * matrices,
            "bits_per_weight": 8 * (held + itemsize * matrices) / weights,
            "bits_per_matrix_weight": 8.0 * itemsize,
        },
        "after": {
            "disk_bytes": (folder / WEIGHTS).stat().st_size,
            "memory_bytes": after,
            "bits_per_weight": 8 * after / weights,
            "bits_per_matrix_weight": 8 * in_packed / matrices,
        },
    }


ROWS = (
    ("disk_bytes", "weights on disk, MB", 1e6, ",.2f"),
    ("memory_bytes", "weights in memory, MB", 1e6, ",.2f"),
    ("bits_per_matrix_weight", "bits per weight of the matrices", 1, ".3f"),
    ("bits_per_weight", "bits per weight of the model", 1, ".3f"),
    ("loss", "validation loss, nats per token", 1, ".4f"),
    ("bits_per_byte", "validation bits/byte", 1, ".4f"),
    ("tokens_per_second", "tokens/s, decoding one text", 1, ",.0f"),
)


def render(report: dict[str, Any]) -> str:
    """The report as a table."""
    lines = [
        printable(f"{report['run']}, step {report['step']} -> {report['out']}", 1000),
        f"{report['matrices']} matrices of {report['matrix_weights']:,} weights in {report['to']}; {report['other_weights']:,} other "
        "parameters (embedding, head, norms, biases) stay as they are",
        *(f"{name} stays as it is: it {why}" for name, why in report["left_matrices"].items()),
        f"{'':<33}{'before':>12}{'after':>12}",
    ]
    for key, label, unit, form in ROWS:
        before, after = (format(report[when][key] / unit, form) for when in ("before", "after"))
        lines.append(f"{label:<33}{before:>12}{after:>12}")
    return "\n".join([*lines, f"measured on {report['device']} in {report['precision']}"])


VERB = Verb(
    name="quantize",
    help="a run's weights in 8, 4, 2 or 1 bits, and what that costs",
    config=QuantizeConfig,
    run=run,
    alone=True,
    json=True,
    positional=run_folder,
)
