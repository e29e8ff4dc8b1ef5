"""Linear layers whose weights are packed into a few bits, and unpacked for each product: less memory, not more speed.

    nf4      4 bits: one of 16 quantiles of a normal distribution times the largest weight of a block of 64; these scales have 8 bits
             and a scale for each 256 of them (double quantisation): 4.127 bits a weight (QLoRA, arXiv 2305.14314), by bitsandbytes.
             The paper's 8-bit scales are floats; these are integers, which are off by 1/254 of the largest at most
    int8     8 bits: -127 .. 127 times a scale for each row
    ternary  2 bits: -1, 0 or 1 times a scale for a matrix (BitNet b1.58, arXiv 2402.17764)
    sign     1 bit: -1 or 1 times a scale for a matrix (BitNet, arXiv 2310.11453)

The packed tensors are neither parameters nor buffers: a change of the model's type must not change them, ranks need not exchange them.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import autocast_dtype
from models.layers.bit_linear import BitLinear, integer_product, normed, of_rows, signs, ternary

BLOCK, OUTER = 64, 256  # of nf4: weights that share a scale, scales that share a scale

Tensors = Mapping[str, Tensor]
Rows = Sequence[int]  # of each matrix that a weight [out, in] fuses
Room = dict[str, tuple[tuple[int, ...], torch.dtype]]


class Format(NamedTuple):
    """pack: weight [out, in] in fp32 -> tensors; matrix: tensors -> (matrix [out, in] in the dtype, fp32 scales of its rows or None),
    whose product is the weight; room: out, in -> shape and dtype of each tensor."""

    pack: Callable[[Tensor, Rows], dict[str, Tensor]]
    matrix: Callable[[Tensors, int, Rows, torch.dtype], tuple[Tensor, Tensor | None]]
    room: Callable[[int, int, Rows], Room]


# -- integers -------------------------------------------------------------------------------------------------------------


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Integers below 2^bits [out, in] -> bytes [out, in * bits / 8, rounded up], the first one in the lowest bits."""
    each = 8 // bits
    codes = F.pad(codes.to(torch.uint8), (0, -codes.shape[1] % each)).unflatten(1, (-1, each))
    return (codes << _shifts(bits, codes.device)).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, bits: int, width: int) -> Tensor:
    """The inverse of `pack_bits`; width: in."""
    return ((packed[..., None] >> _shifts(bits, packed.device)) & (2**bits - 1)).flatten(1)[:, :width]


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device)


def _pack_int8(weight: Tensor, rows: Rows) -> dict[str, Tensor]:
    scales = weight.abs().amax(1) / 127
    safe = torch.where(scales > 0, scales, 1)
    return {"packed": (weight / safe[:, None]).round().to(torch.int8), "scales": scales}


def _pack_ternary(weight: Tensor, rows: Rows) -> dict[str, Tensor]:
    values, scales = ternary(weight, rows)
    return {"packed": pack_bits(values + 1, 2), "scales": scales}


def _pack_sign(weight: Tensor, rows: Rows) -> dict[str, Tensor]:
    values, scales = signs(weight, rows)
    return {"packed": pack_bits(values > 0, 1), "scales": scales}


def _int8(tensors: Tensors, width: int, rows: Rows, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return tensors["packed"].to(dtype), tensors["scales"]


def _ternary(tensors: Tensors, width: int, rows: Rows, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return unpack_bits(tensors["packed"], 2, width).to(dtype) - 1, of_rows(tensors["scales"], rows)


def _sign(tensors: Tensors, width: int, rows: Rows, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return 2 * unpack_bits(tensors["packed"], 1, width).to(dtype) - 1, of_rows(tensors["scales"], rows)


def _bits_room(bits: int) -> Callable[[int, int, Rows], Room]:
    def room(out: int, width: int, rows: Rows) -> Room:
        return {"packed": ((out, -(-width * bits // 8)), torch.uint8), "scales": ((len(rows),), torch.float32)}

    return room


def _int8_room(out: int, width: int, rows: Rows) -> Room:
    return {"packed": ((out, width), torch.int8), "scales": ((out,), torch.float32)}


# -- nf4 ------------------------------------------------------------------------------------------------------------------


def _bitsandbytes() -> Any:
    """Its functions. Every product asks for them, also in compiled code, so only the first call does more than an import."""
    if "bitsandbytes" not in sys.modules:
        _import_bitsandbytes()
    from bitsandbytes import functional

    return functional


def _import_bitsandbytes() -> None:
    """On some CPUs its import would fetch a kernel for products in 4 bits from a hub, by the package `kernels`, and warns if it cannot.
    Nothing here calls that kernel: it is neither fetched nor missed."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    modules: dict[str, Any] = sys.modules
    hidden = "kernels" not in modules
    if hidden:
        modules["kernels"] = None  # an import of it fails
    try:
        importlib.import_module("bitsandbytes")
    finally:
        if hidden:
            del modules["kernels"]


def _pack_nf4(weight: Tensor, rows: Rows) -> dict[str, Tensor]:
    packed, state = _bitsandbytes().quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    offset = state.absmax.mean()
    rest = state.absmax - offset
    outer = F.pad(rest, (0, -len(rest) % OUTER)).view(-1, OUTER).abs().amax(1) / 127
    safe = torch.where(outer > 0, outer, 1).repeat_interleave(OUTER)[: len(rest)]
    return {
        "packed": packed.view(len(weight), -1),
        "scales": (rest / safe).round().to(torch.int8),
        "scales_of_scales": outer,
        "offset": offset.reshape(1),
    }


def _nf4(tensors: Tensors, width: int, rows: Rows, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    functional = _bitsandbytes()
    scales = tensors["scales"].float()
    outer = tensors["scales_of_scales"][:, None].expand(-1, OUTER).flatten()[: len(scales)]
    state = functional.QuantState(
        absmax=scales * outer + tensors["offset"],
        # One long row: bitsandbytes' kernel for AVX-512 (0.50) begins a block in every row, and packing does not.
        shape=torch.Size((sum(rows) * width,)),
        dtype=dtype,
        blocksize=BLOCK,
        quant_type="nf4",
    )
    return functional.dequantize_4bit(tensors["packed"].view(-1, 1), state).view(-1, width), None


def _nf4_room(out: int, width: int, rows: Rows) -> Room:
    blocks = math.ceil(out * width / BLOCK)
    return {
        "packed": ((out, width // 2), torch.uint8),
        "scales": ((blocks,), torch.int8),
        "scales_of_scales": ((math.ceil(blocks / OUTER),), torch.float32),
        "offset": ((1,), torch.float32),
    }


def is_installed() -> bool:
    """Whether there is what nf4 needs."""
    return importlib.util.find_spec("bitsandbytes") is not None


FORMATS = {
    "nf4": Format(_pack_nf4, _nf4, _nf4_room),
    "int8": Format(_pack_int8, _int8, _int8_room),
    "ternary": Format(_pack_ternary, _ternary, _bits_room(2)),
    "sign": Format(_pack_sign, _sign, _bits_room(1)),
}


PARTS = {
    "nf4": ("packed", "scales", "scales_of_scales", "offset"),
    **dict.fromkeys(("int8", "ternary", "sign"), ("packed", "scales")),
}


def packed_bytes(format: str, out: int, width: int, rows: Rows) -> int:
    """Of a weight [out, width] with its scales."""
    room = FORMATS[format].room(out, width, rows)
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in room.values())


# -- the layer ------------------------------------------------------------------------------------------------------------


class QuantizedLinear(nn.Linear):
    """nn.Linear without the parameter `weight`. Made in place by `quantize_linear`, so hooks, bias and adapters stay.

    weight: the unpacked weight [out, in], made anew, of the type that it had; it has no gradient. rounds_inputs: whether it was a
    BitLinear, and so norms its inputs and rounds them to 8 bits.
    """

    format: str
    rows: tuple[int, ...]
    packed: dict[str, Tensor]
    dtype: torch.dtype
    rounds_inputs: bool

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        if self.packed["packed"].is_meta:
            return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")
        matrix, scales = self._matrix(self.dtype)
        return matrix if scales is None else (matrix * scales[:, None]).to(self.dtype)

    def _matrix(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        return FORMATS[self.format].matrix(self.packed, self.in_features, self.rows, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in the output dtype of nn.Linear."""
        dtype = autocast_dtype(x.device.type) or x.dtype
        if self.rounds_inputs:
            matrix, scales = self._matrix(dtype)
            assert scales is not None  # of signs and ternary values, see `quantize_linear`
            out = integer_product(normed(x), matrix, scales, dtype)
        else:
            tensors = [self.packed[part] for part in PARTS[self.format]]
            out = _Product.apply(x.to(dtype), self.format, self.in_features, self.rows, *tensors)
        return out if self.bias is None else out + self.bias.to(dtype)


class _Product(torch.autograd.Function):
    """x [..., in] -> x W^T [..., out]. The backward pass unpacks W again, as keeping it would take the memory of all layers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, format: str, width: int, rows: Rows, *packed: Tensor) -> Tensor:
        ctx.save_for_backward(*packed)
        ctx.format, ctx.width, ctx.rows = format, width, rows
        matrix, scales = _unpacked(packed, format, width, rows, x.dtype)
        out = F.linear(x, matrix)
        return out if scales is None else (out * scales).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        packed = ctx.saved_tensors
        matrix, scales = _unpacked(packed, ctx.format, ctx.width, ctx.rows, gradient.dtype)
        scaled = gradient if scales is None else (gradient * scales).to(gradient.dtype)
        return (scaled @ matrix, None, None, None, *[None] * len(packed))


def _unpacked(
    packed: Sequence[Tensor], format: str, width: int, rows: Rows, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    return FORMATS[format].matrix(dict(zip(PARTS[format], packed, strict=True)), width, rows, dtype)


def refusal(format: str, layer: nn.Linear) -> str | None:
    """Why a linear layer cannot have this format; None if it can."""
    odd = format == "nf4" and layer.in_features % 2
    return f"has {layer.in_features} columns, and nf4 packs two in a byte" if odd else None


def quantize_linear(layer: Any, format: str, rows: Rows, packed: Tensors | None = None) -> None:
    """Pack the weight of an nn.Linear in place, on its device. packed: instead of its own weight, tensors on any device.

    rows: of each matrix that the weight fuses. ValueError if a layer with three values or two is to be packed otherwise.
    """
    of_bits = isinstance(layer, BitLinear)
    if of_bits and format != OWN_FORMAT[layer.kind]:
        raise ValueError(f"a layer trained as {layer.kind} is packed as {OWN_FORMAT[layer.kind]}, not as {format}")
    weight = layer.weight.detach()
    if packed is None:
        packed = FORMATS[format].pack(weight.float().contiguous(), rows)
    del layer._parameters["weight"]
    layer.__class__ = QuantizedLinear
    layer.format, layer.rows, layer.packed = format, tuple(rows), dict(packed)
    layer.dtype, layer.rounds_inputs = weight.dtype, of_bits


def fill_packed(layer: QuantizedLinear, weight: Tensor) -> None:
    """Pack `weight` [out, in], of any device, into the tensors that the layer has."""
    device = layer.packed["packed"].device
    for part, values in FORMATS[layer.format].pack(weight.to(device).float().contiguous(), layer.rows).items():
        layer.packed[part].copy_(values)


def unpack(format: str, packed: Tensors, width: int, rows: Rows) -> Tensor:
    """The weight [out, width] in fp32."""
    matrix, scales = FORMATS[format].matrix(packed, width, rows, torch.float32)
    return matrix if scales is None else matrix * scales[:, None]


def rounds_inputs(layer: nn.Module) -> bool:
    """Whether a layer computes with inputs of 8 bits, so that it does more than multiply by its weight."""
    return isinstance(layer, BitLinear) or (isinstance(layer, QuantizedLinear) and layer.rounds_inputs)


OWN_FORMAT = {"bitnet": "ternary", "sign": "sign"}  # kind of a BitLinear -> the format that loses nothing
