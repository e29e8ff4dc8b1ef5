"""The format `gguf`: one file, `model.gguf`, for llama.cpp and the programs that are built on it.

Weights and settings are those of the class of transformers that `--format hf` would write, under the names of the package gguf.
llama.cpp's file of a Llama differs in one point: it rotates channels 2 i and 2 i + 1 of a head together, where transformers rotates
i and i + head_dim / 2, so the rows of queries and keys change their order. Vectors and learned positions are always fp32, as
llama.cpp wants them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.commands.export.hugging_face import max_length
from trainer.commands.export.source import Source
from trainer.commands.export.tokenizer_files import chat_template, template_of
from trainer.core.errors import UserError
from trainer.core.files import system_error
from trainer.data.tokenizers import byte_level_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from models.hugging_face_export import Native

FILE = "model.gguf"
KINDS = ("gpt2", "llama", "qwen3")
SERVED = "gguf holds GPT-2 with mlp gelu_tanh, and Llama and Qwen3 without biases and without rope_scaling"
NORMAL, CONTROL, UNUSED = 1, 3, 5  # kinds of tokens


def write_gguf(source: Source, out: Path) -> str:
    """Write `model.gguf`, read it back, and compare all keys and tensors. Returns what the command's last line adds.

    UserError if llama.cpp has no architecture or no tokenizer that does the same, or if what is read back is not what was meant.
    """
    found = served(source)
    values = model_keys(source, found) | numbers(source, found) | tokenizer_keys(source, found.config["vocab_size"])
    write(source, found, values, out / FILE)
    count = compare(source, found, values, out / FILE)
    parts = [f"{FILE}, a {found.kind} of llama.cpp", f"read back: {count} tensors and {len(values)} keys are equal"]
    if found.left_out:
        parts.insert(1, f"without {found.left_out}")
    return f"; {', '.join(parts)}"


def served(source: Source) -> Native:
    """The class of transformers whose weights the file holds. UserError if llama.cpp computes no such model."""
    from models.hugging_face_export import native

    found, why = native(source.model_class, source.model_config)
    if found is not None and found.kind not in KINDS:
        why = f"this model is a {found.config['architectures'][0]}"
    elif found is not None:
        theirs = found.config
        odd = {
            "biases": bool(theirs.get("attention_bias") or theirs.get("mlp_bias")),
            f"rope_scaling {theirs.get('rope_scaling')}": theirs.get("rope_scaling") is not None,
            "mlp gelu": theirs.get("activation_function") == "gelu",
        }
        why = " and ".join(name for name, here in odd.items() if here)
        if not why:
            return found
        why = f"this model has {why}"
    raise UserError(f"format: {SERVED}; {why}. --format hf writes any model")


# -- keys --------------------------------------------------------------------------------------------------------------


def model_keys(source: Source, found: Native) -> dict[str, Any]:
    """What the file is, for people and for the loader."""
    import gguf
    import torch

    narrow = any(dtype == torch.bfloat16 for _, dtype in source.stored().values())
    kind = gguf.LlamaFileType.MOSTLY_BF16 if narrow else gguf.LlamaFileType.ALL_F32
    return {
        "general.architecture": found.kind,
        "general.type": "model",
        "general.name": source.folder.resolve().name,
        "general.file_type": int(kind),
    }


def numbers(source: Source, found: Native) -> dict[str, Any]:
    """The sizes that the architecture reads, named as llama.cpp does."""
    theirs = found.config
    if found.kind == "gpt2":
        sizes = {
            "context_length": theirs["n_positions"],
            "embedding_length": theirs["n_embd"],
            "block_count": theirs["n_layer"],
            "feed_forward_length": theirs["n_inner"],
            "attention.head_count": theirs["n_head"],
            "attention.layer_norm_epsilon": float(theirs["layer_norm_epsilon"]),
        }
    else:
        width = theirs["head_dim"]
        sizes = {
            "context_length": max_length(source),
            "embedding_length": theirs["hidden_size"],
            "block_count": theirs["num_hidden_layers"],
            "feed_forward_length": theirs["intermediate_size"],
            "attention.head_count": theirs["num_attention_heads"],
            "attention.head_count_kv": theirs["num_key_value_heads"],
            "attention.key_length": width,
            "attention.value_length": width,
            "attention.layer_norm_rms_epsilon": float(theirs["rms_norm_eps"]),
            "rope.dimension_count": width,
            "rope.freq_base": float(theirs["rope_theta"]),
        }
    sizes["vocab_size"] = theirs["vocab_size"]
    return {f"{found.kind}.{name}": value for name, value in sizes.items()}


def tokenizer_keys(source: Source, rows: int) -> dict[str, Any]:
    """The keys of the tokenizer. rows: of the embedding.

    llama.cpp splits text as GPT-2 does, so a byte-level BPE gives the same ids there. UserError for every other tokenizer:
    llama.cpp reads no BPE without merges, has no list of characters, and its programs end at a file without a tokenizer.
    """
    content = json.loads((source.folder / "tokenizer.json").read_bytes())
    name, end = source.info.tokenizer.name, source.tokenizer.eot_id
    if byte_level_tokens(content, source.end_of_text) is None or not content["model"]["merges"]:
        raise UserError(
            f"format: gguf holds byte-level BPE tokenizers with merges, such as gpt2 or train-bpe:8192, not {name}; "
            "--format hf writes any tokenizer"
        )
    words = {number: word for word, number in content["model"]["vocab"].items()} | {end: source.end_of_text}
    kinds = [NORMAL if number in words else UNUSED for number in range(rows)]  # rows may be padded
    kinds[end] = CONTROL
    keys = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [words.get(number, f"[PAD{number}]") for number in range(rows)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": end,  # as GPT-2: the token that ends a document precedes the next
        "tokenizer.ggml.eos_token_id": end,
        "tokenizer.ggml.add_bos_token": False,
    }
    template = template_of(source)
    if template is not None:
        keys["tokenizer.chat_template"] = chat_template(template)
    return keys


# -- tensors -----------------------------------------------------------------------------------------------------------


def tensors(found: Native, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """(name in the file, value as it is there) of our weights, which may be on the meta device."""
    import gguf
    import torch

    architecture = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[found.kind]
    layers = found.config["n_layer" if found.kind == "gpt2" else "num_hidden_layers"]
    names = gguf.get_tensor_name_map(architecture, layers)
    for ours, whole in weights:
        for theirs, value in found.convert(ours, whole):
            name = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
            if name is None:
                raise UserError(f"format: the package gguf {_version()} has no name for {theirs} of {found.kind}")
            if found.kind == "gpt2" and theirs.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
                value = value.t()  # OpenAI's linear layers hold [in, out], those of the file [out, in]
            if found.kind == "llama" and theirs.endswith(("q_proj.weight", "k_proj.weight")):
                value = interleaved(value, found.config["head_dim"])
            narrow = value.dtype == torch.bfloat16 and value.ndim > 1 and not name.startswith("position_embd")
            yield name, value.to(torch.bfloat16 if narrow else torch.float32).contiguous()


def interleaved(weight: Tensor, width: int) -> Tensor:
    """weight [H * width, D]: of each head, row i + width / 2 moves behind row i."""
    heads = weight.unflatten(0, (-1, 2, width // 2))  # [H, 2, width / 2, D]
    return heads.transpose(1, 2).flatten(0, 2)


def _version() -> str:
    from importlib.metadata import version

    return version("gguf")


def _raw(value: Tensor) -> Any:
    """The values as numpy knows them: fp32, or the bytes of bf16."""
    import torch

    return value.numpy() if value.dtype == torch.float32 else value.view(torch.uint8).numpy()


# -- the file ----------------------------------------------------------------------------------------------------------


def write(source: Source, found: Native, values: dict[str, Any], file: Path) -> None:
    """Write the keys, then one tensor after the other. UserError or MachineError if the disk does not take them."""
    import gguf
    import torch

    writer = gguf.GGUFWriter(file, found.kind)  # it writes general.architecture itself
    for key, value in values.items():
        if key != "general.architecture":
            writer.add_key_value(key, value, _type(value))
    shapes = (
        (name, torch.empty(shape, dtype=dtype, device="meta")) for name, (shape, dtype) in source.stored().items()
    )
    for name, value in tensors(found, shapes):
        writer.add_tensor_info(name, *_info(value))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, value in tensors(found, source.each()):
            writer.write_tensor_data(_raw(value))
        writer.close()
    except OSError as error:
        raise system_error(error, f"out: {file} could not be written") from None


def _info(value: Tensor) -> tuple[Any, Any, int, Any]:
    """Shape, numpy's dtype, bytes and the file's dtype of a tensor without storage, as `add_tensor_info` takes them."""
    import gguf
    import numpy as np
    import torch

    size = value.numel() * value.element_size()
    if value.dtype == torch.float32:
        return list(value.shape), np.dtype(np.float32), size, gguf.GGMLQuantizationType.F32
    shape = [*value.shape[:-1], 2 * value.shape[-1]]  # of bytes
    return shape, np.dtype(np.uint8), size, gguf.GGMLQuantizationType.BF16


def _type(value: Any) -> Any:
    """How the file holds a value: llama.cpp refuses a count that is not an unsigned integer."""
    import gguf

    kinds = gguf.GGUFValueType
    return {str: kinds.STRING, bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, list: kinds.ARRAY}[
        type(value)
    ]


def compare(source: Source, found: Native, values: dict[str, Any], file: Path) -> int:
    """How many tensors the file holds. UserError if it has other keys or tensors than it should."""
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(file)
    held = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    for key in values.keys() | held.keys():
        expected = values.get(key)
        expected = float(np.float32(expected)) if isinstance(expected, float) else expected
        if held.get(key) != expected:
            raise UserError(f"format: {FILE} holds another {key} than was written, so it is removed")
    left = {tensor.name: tensor for tensor in reader.tensors}
    count = len(left)
    for name, value in tensors(found, source.each()):
        there, raw = left.pop(name, None), _raw(value)
        same = there is not None and there.tensor_type == _info(value)[3] and there.data.shape == raw.shape
        if there is None or not same or not np.array_equal(there.data.view(np.uint8), raw.view(np.uint8)):
            raise UserError(f"format: {FILE} holds another {name} than was written, so it is removed")
    if left:
        raise UserError(f"format: {FILE} holds {', '.join(sorted(left)[:3])}, which was not written, so it is removed")
    return count
