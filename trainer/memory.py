"""Memory of a run before it is one: models without storage, what they keep for the backward pass, what fits a device."""

from __future__ import annotations

from typing import Any

GIB = 1024**3

# Bytes per parameter by precision. pure_bf16 adds its gradients up in fp32; bf16 computes with bf16 copies of the weights.
PARTS = {
    "fp32": {"weights": 4, "gradients": 4, "optimizer": 8},
    "bf16": {"weights": 4, "gradients": 4, "optimizer": 8, "bf16 copies": 2},
    "pure_bf16": {"weights": 2, "gradients": 6, "optimizer": 4},
}


def build_meta(model_class: Any, model_config: Any) -> Any:
    """The model with shapes but no memory."""
    import torch

    with torch.device("meta"):
        return model_class(model_config)


def activation_bytes(model: Any, length: int, half: bool) -> int:
    """Bytes that one sequence of `length` tokens keeps for the backward pass, measured by running the model on meta tensors.

    half: in bfloat16. Parameters do not count. The engine's own buffers and fragmentation come on top.
    """
    import torch

    model = model.to(torch.bfloat16) if half else model
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        alive.append(tensor)  # keeps the address from being used again
        return tensor

    alive: list[torch.Tensor] = []
    tokens = torch.zeros(1, length, dtype=torch.long, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        model(tokens, targets=tokens)
    return sum(kept.values())


def expected_memory(model_class: Any, model_config: Any, config: Any) -> dict[str, int]:
    """Bytes on one device: weights, gradients, optimiser, activations of one microbatch, and their sum. config: resolved."""
    n = model_class.count_parameters(model_config)
    memory = {part: n * size for part, size in PARTS[config.precision].items()}
    length = config.batch.sequence_length
    sequences = min(config.batch.tokens_per_microbatch, config.batch.tokens_per_step) // length
    one = activation_bytes(build_meta(model_class, model_config), length, config.precision != "fp32")
    memory["activations"] = one * sequences
    memory["total"] = sum(memory.values())
    return memory


def tokens_that_fit(memory: int | None, model_class: Any, model_config: Any, length: int, precision: str) -> float:
    """Tokens in whole sequences whose activations fit a GPU of `memory` bytes beside the model; no limit on a CPU (None).

    hlb's C is of a run in pure bf16; fp32 weights, moments and losses take more.
    """
    if memory is None:
        return float("inf")
    state = sum(PARTS[precision].values()) * model_class.count_parameters(model_config)
    # The backward pass holds the logits' gradient besides, in fp32 and in the compute type.
    one = activation_bytes(build_meta(model_class, model_config), length, precision != "fp32")
    one += 8 * model_config.vocab_size * length
    return max(0, int((0.9 * memory - state) / one)) * length
