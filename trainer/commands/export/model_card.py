"""README.md of an exported folder: the model card that the Hugging Face hub shows, written from the files of the run."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import __version__
from trainer.commands.export.source import Source
from trainer.commands.export.tokenizer_files import template_of
from trainer.core.errors import UserError
from trainer.core.files import parse_json, write_file
from trainer.core.text import markdown_table, printable
from trainer.planning.run_config import ENVIRONMENT
from trainer.runs.metrics import read_rows

if TYPE_CHECKING:
    from trainer.commands.export.hugging_face import Layout
    from trainer.commands.export.self_test import Expected

UNKNOWN = "unknown"
# Identifiers that the hub knows; any other licence is `other`, with its name.
LICENSES = (
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "isc", "unlicense", "wtfpl", "zlib", "mpl-2.0", "eupl-1.2"),
    *("gpl-2.0", "gpl-3.0", "lgpl-2.1", "lgpl-3.0", "agpl-3.0", "osl-3.0", "afl-3.0", "artistic-2.0", "ecl-2.0"),
    *("cc0-1.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-3.0", "cc-by-nc-4.0"),
    *("cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "cc-by-nd-4.0", "odc-by", "odbl", "openrail", "gemma"),
    *("llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "bigscience-openrail-m", "other", UNKNOWN),
)
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")


def check_license(license: str | None) -> None:
    """UserError unless `license` is an identifier."""
    if license is not None and not LICENSE.fullmatch(license):
        raise UserError(
            f"license: {printable(license, 80)!r} is no identifier of a licence, such as apache-2.0: small letters, digits, "
            "points and hyphens"
        )


def write_card(
    source: Source, layout: Layout, expected: Expected, error: float, license: str | None, out: Path
) -> None:
    """Write README.md, and copy the run's curves. error: the largest difference of logits that the self-test found."""
    curves = source.folder / "curves.png"
    if curves.is_file():
        shutil.copy(curves, out / curves.name)
    parts = [
        front_matter(source, layout, license),
        f"# {title(source)}\n",
        introduction(source, layout, license),
        *section("How to load it", loading(source, layout, expected, error)),
        *section("Data", markdown_table(data_facts(source))),
        *section("Training", [*markdown_table(training_facts(source)), *curve(curves)]),
        *section("Evaluation", evaluation(source)),
        *section("Made with", made_with(source)),
    ]
    write_file(out / "README.md", "\n".join(parts))


def section(name: str, lines: list[str]) -> list[str]:
    return [f"## {name}\n", *lines, ""]


def title(source: Source) -> str:
    millions = source.model_class.count_parameters(source.model_config) / 1e6
    return f"{source.name}, {millions:,.1f} M parameters"


def front_matter(source: Source, layout: Layout, license: str | None) -> str:
    """The YAML head that the hub reads. Every value is written as JSON, which YAML understands."""
    named = license or UNKNOWN
    head: dict[str, Any] = {"license": named if named in LICENSES else "other"}
    if named not in LICENSES:
        head["license_name"] = named
    head |= {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["crescendo", source.name]}
    if layout.code:
        head["tags"].append("custom_code")
    from_hub = hub_name(source.info.source)
    if from_hub:
        head["datasets"] = [from_hub]
    base = hub_name(source.config.init_from or "")
    if base:
        head["base_model"] = base
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---", ""])


def hub_name(address: str) -> str | None:
    """ORG/NAME of hf://ORG/NAME..., None for anything else."""
    found = re.match(r"hf://([\w.-]+/[\w.-]+)", address)
    return found[1] if found else None


def introduction(source: Source, layout: Layout, license: str | None) -> str:
    """What the model is, and what of it was left out or changed."""
    config = source.model_config
    lines = [
        f"A language model of the architecture `{source.name}`, trained with Crescendo. Its weights are those after "
        f"{source.weights.manifest['step']:,} steps (`--weights {source.wanted}`)."
    ]
    if source.weights.lora_scale is not None:
        lines.append("The updates of LoRA are merged into the weights.")
    if layout.why:
        lines.append(f"It comes with its own code (`*.py`), because {layout.why}.")
    if layout.left_out:
        lines.append(f"Left out: {layout.left_out}, which only training needs.")
    size, rows = source.tokenizer.vocab_size, layout.vocabulary
    if rows < config.vocab_size:
        lines.append(f"Rows of the vocabulary from {rows:,} on are cut off: they were padding, and never predicted.")
    elif rows > size:
        lines.append(f"Ids from {size:,} to {rows - 1:,} are padding: they have rows, but no text gives them.")
    if license is None:
        lines.append("The licence of the weights is not known: nobody stated one (`--license`).")
    return "\n".join(lines) + "\n"


def loading(source: Source, layout: Layout, expected: Expected, error: float) -> list[str]:
    """A program that loads the folder, and how that was tested."""
    trust = ", trust_remote_code=True" if layout.code else ""
    lines = [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'folder = "."  # this folder, or its name on the hub',
        f"tokenizer = AutoTokenizer.from_pretrained(folder{trust})",
        f"model = AutoModelForCausalLM.from_pretrained(folder{trust})",
        'tokens = tokenizer("Once upon a time", return_tensors="pt").input_ids',
        "print(tokenizer.decode(model.generate(tokens, max_new_tokens=32)[0]))",
        "```",
        "",
        f"After it was written, the folder was loaded so in a process of its own: on {expected.tokens.numel()} tokens its logits "
        f"differ from those of the run by at most {error:.1e} (rounding alone may give {expected.tolerance:.1e}), and the "
        "tokenizer gives the same ids.",
    ]
    if layout.code:
        lines.append("`generate` computes the whole context for each new token.")
    if template_of(source) is not None:
        lines.append("`tokenizer.apply_chat_template` writes conversations as the model was trained on them.")
    lines.append(
        f"Text that spells `{source.end_of_text}` becomes that token; `split_special_tokens=True` keeps it text."
    )
    return lines


def data_facts(source: Source) -> list[list[str]]:
    """Rows of a table."""
    info, tokenizer = source.info, source.info.tokenizer
    splits = ", ".join(
        f"{name} {split.tokens:,} ({split.documents:,} documents)" for name, split in info.splits.items()
    )
    rows = [
        ["", ""],
        ["source", f"`{printable(info.source, 200)}`"],
        ["tokens", splits],
        ["fingerprint", f"`{info.fingerprint}`"],
        [
            "tokenizer",
            f"{printable(tokenizer.name)}, {tokenizer.vocab_size:,} ids, `{source.end_of_text}` ends documents",
        ],
    ]
    if info.records != "text":
        rows.append(["records", f"{info.records}, chat template {template_of(source)}"])
    for name, mix in source.config.data.mix.items():
        rows.append([f"mixed in: {printable(name)}", f"`{printable(mix.path, 200)}`, weight {mix.weight:g}"])
    return escaped(rows)


def escaped(rows: list[list[str]]) -> list[list[str]]:
    """A bar would begin another cell of a table."""
    return [[cell.replace("|", "\\|") for cell in row] for row in rows]


def training_facts(source: Source) -> list[list[str]]:
    """Rows of a table, from the run's config, its checkpoint and its last start."""
    config, manifest, start = source.config, source.weights.manifest, starts(source.folder)[-1:]
    rows = [
        ["", ""],
        ["parameters", f"{source.model_class.count_parameters(source.model_config):,}"],
        ["steps, tokens", f"{manifest['step']:,}, {manifest['tokens']:,}"],
        ["objective", str(config.objective.get("name"))],
        ["tokens per step, sequence", f"{config.batch.tokens_per_step:,}, {config.batch.sequence_length:,}"],
        [
            "optimizer",
            f"{config.optim.name}, learning rate {config.optim.lr:g}, weight decay {config.optim.weight_decay}",
        ],
        ["precision", f"{config.precision}; written as {written_dtypes(source)}"],
        ["strategy", config.engine.strategy],
        ["seed", str(config.seed)],
    ]
    begin = config.init_from or config.branch_from
    if begin:
        rows.append(["began with", f"`{printable(begin, 200)}`"])
    if start:
        rows.append(
            ["hardware", f"{config.device}, processes: {start[0].get('processes')}, CPU cores: {start[0].get('cpus')}"]
        )
    row = measured(source)
    if row is not None and row.get("seconds"):
        rows.append(["seconds of training", f"{row['seconds']:,.0f}"])
    return escaped(rows)


def written_dtypes(source: Source) -> str:
    return ", ".join(sorted({str(dtype).removeprefix("torch.") for _, dtype in source.stored().values()}))


def curve(path: Path) -> list[str]:
    return ["", f"![loss, learning rate and gradient norm over the run]({path.name})"] if path.is_file() else []


def evaluation(source: Source) -> list[str]:
    """The figures that the run measured, at the newest evaluation up to the checkpoint."""
    row = measured(source, evaluated=True)
    if row is None:
        return ["The run has measured nothing up to this step."]
    figures = {
        key: value
        for key, value in row.items()
        if value is not None and key.startswith(("val_", "ema_val_", "task_")) and isinstance(value, int | float)
    }
    lines = markdown_table([["figure", f"at step {row['step']:,}"], *([k, f"{v:.4f}"] for k, v in figures.items())])
    lines += ["", "`val_loss` is in nats per token, on the validation split; `task_...` are lm-eval's tasks."]
    if source.wanted != "evaluation":
        lines.append(
            f"These are figures of the run's own weights, not of `--weights {source.wanted}`, except `ema_...`."
        )
    return lines


def measured(source: Source, evaluated: bool = False) -> dict[str, Any] | None:
    """The newest row of metrics.jsonl up to the checkpoint; evaluated: with a validation loss."""
    path = source.folder / "metrics.jsonl"
    rows = read_rows(path) if path.is_file() else []
    step = source.weights.manifest["step"]
    found = [row for row in rows if row["step"] <= step and (row.get("val_loss") is not None or not evaluated)]
    return found[-1] if found else None


def made_with(source: Source) -> list[str]:
    """The command and the versions."""
    began = starts(source.folder)[:1]
    if not began:
        return [f"Crescendo {__version__}."]
    words = [str(word) for word in began[0].get("command", [])]
    versions = ", ".join(f"{name} {version}" for name, version in (began[0].get("versions") or {}).items())
    command = shlex.join(["python", "-m", "trainer", *words[1:]])
    return ["```", command, "```", "", f"{versions}. Exported by Crescendo {__version__}."]


def starts(folder: Path) -> list[dict[str, Any]]:
    """The environment of each start of the run, as far as its lines can be read."""
    path = folder / ENVIRONMENT
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            found.append(parse_json(line, path))
        except UserError:
            pass  # a line that a kill cut off says nothing that the weights depend on
    return found
