"""The format `hf`: a folder that transformers loads with AutoModelForCausalLM and AutoTokenizer.

config.json, generation_config.json, model*.safetensors
tokenizer.json, tokenizer_config.json, special_tokens_map.json
README.md (the model card), curves.png
*.py                if no class of transformers computes this model: its own code, which trust_remote_code=True runs
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import __version__
from trainer.checkpoint.hugging_face import MODEL_CONFIG, MODEL_NAME, NETWORK
from trainer.commands.export import tensors
from trainer.commands.export.carried import code_files
from trainer.commands.export.model_card import write_card
from trainer.commands.export.self_test import Expected, check_loaded, expected_of
from trainer.commands.export.source import Source
from trainer.commands.export.tokenizer_files import write_tokenizer
from trainer.core.errors import UserError
from trainer.core.files import write_file

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How a model is written for transformers.

    config: of config.json, without what every folder has; convert: (our name, value) -> (name in the file, value) of each; added:
    further tensors; code: name -> text of the files that compute it; vocabulary: logits of the written model.
    why: the reason for `code`, as a sentence; left_out: what of the model is not written.
    """

    config: dict[str, Any]
    convert: Callable[[str, Tensor], Iterable[tuple[str, Tensor]]]
    vocabulary: int
    code: dict[str, str] = field(default_factory=dict)
    added: dict[str, Tensor] = field(default_factory=dict)
    why: str = ""
    left_out: str = ""


def write_hugging_face(source: Source, out: Path, license: str | None) -> str:
    """Write the folder, load it again in another process, and compare. Returns what the command's last line adds.

    UserError if what was written does not give the logits and ids of the run.
    """
    rule = source.model_class.entropy_rule(source.model_config)
    if rule is not None:
        raise UserError(
            f"format: hf holds one model, and model.patching {rule} needs the entropies of a second one; write --format safetensors"
        )
    model = source.model()
    layout = layout_of(source, model)
    expected = expected_of(source, model, layout.vocabulary)
    del model  # the other process needs the memory
    write_weights(source, layout, out)
    write_config(source, layout, out)
    for name, text in layout.code.items():
        write_file(out / name, text)
    write_tokenizer(source, out)
    error = check_loaded(out, expected)
    write_card(source, layout, expected, error, license, out)
    return f"; {summary(layout, expected, error)}"


def summary(layout: Layout, expected: Expected, error: float) -> str:
    """What was written and checked, for the last line of the command."""
    architecture = layout.config["architectures"][0]
    parts = [f"a {architecture} of transformers" if not layout.code else "for transformers with its own code"]
    if layout.why:
        parts.append(f"because {layout.why}: load it with trust_remote_code=True")
    if layout.left_out:
        parts.append(f"without {layout.left_out}")
    parts.append(
        f"loaded again in another process: {expected.tokens.numel()} tokens, logits differ by at most {error:.1e}"
    )
    return ", ".join(parts)


def layout_of(source: Source, model: Any) -> Layout:
    """A class of transformers, if one computes exactly this model; otherwise its own code. model: with its weights."""
    from models.hugging_face_export import native
    from models.materialise import ties

    found, why = native(source.model_class, source.model_config)
    if found is not None:
        return Layout(found.config, found.convert, found.config["vocab_size"], left_out=found.left_out)
    doubled = ties(model)

    def convert(name: str, value: Tensor) -> Iterable[tuple[str, Tensor]]:
        return () if name in doubled else ((NETWORK + name, value),)

    held = model.state_dict()
    added = {NETWORK + name: value for name, value in model.named_buffers() if name not in held}
    config = {
        "model_type": "crescendo",
        "architectures": ["CrescendoForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_crescendo.CrescendoConfig",
            "AutoModelForCausalLM": "modeling_crescendo.CrescendoForCausalLM",
        },
        "vocab_size": source.model_config.vocab_size,
        "tie_word_embeddings": False,  # of classes in transformers; this code ties its weights itself
        "use_cache": False,
        MODEL_NAME: source.name,
        MODEL_CONFIG: source.fields,
    }
    code = code_files(source.model_class, __version__)
    return Layout(config, convert, source.model_config.vocab_size, code, added, why)


def write_weights(source: Source, layout: Layout, out: Path) -> None:
    """The weights in their files, under the names of the layout."""
    import torch

    sizes: dict[str, int] = {}
    for name, (shape, dtype) in source.stored().items():
        for theirs, value in layout.convert(name, torch.empty(shape, dtype=dtype, device="meta")):
            sizes[theirs] = value.numel() * value.element_size()
    sizes |= {name: value.numel() * value.element_size() for name, value in layout.added.items()}

    def converted() -> Iterator[tuple[str, Tensor]]:
        for name, value in source.each():
            yield from layout.convert(name, value)
        yield from layout.added.items()

    tensors.write_tensors(sizes, converted(), out, tensors.SHARD_BYTES)


def write_config(source: Source, layout: Layout, out: Path) -> None:
    """config.json and generation_config.json."""
    dtypes = {str(dtype).removeprefix("torch.") for _, dtype in source.stored().values() if dtype.is_floating_point}
    end = source.tokenizer.eot_id
    special = {"bos_token_id": end, "eos_token_id": end}  # as GPT-2: the token that ends a document precedes the next
    config: dict[str, Any] = {
        **layout.config,
        **special,
        "torch_dtype": dtypes.pop() if len(dtypes) == 1 else "float32",
        "crescendo": __version__,
        **source.chosen_end,
    }
    if config["model_type"] in ("llama", "qwen3"):
        config["max_position_embeddings"] = max_length(source)
    write_file(out / "config.json", json.dumps(config, indent=1) + "\n")
    generation = special | {key: config[key] for key in ("use_cache",) if key in config}
    write_file(out / "generation_config.json", json.dumps(generation, indent=1) + "\n")


def max_length(source: Source) -> int:
    """Tokens of the longest text that the model was made for: its limit, or else that of its training."""
    return source.fields.get("max_context") or source.config.batch.sequence_length or source.config.data.sample_length
