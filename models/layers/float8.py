"""Linear layers that multiply in fp8 (arXiv 2209.05433), at twice the speed of bf16 on GPUs that support it.

Each tensor in a product has one scale, from its largest entry in the current call. Inputs and weights use e4m3 (3 bits of
mantissa), gradients of outputs use e5m2 (2 bits, more range). Parameters do not change: names, dtypes, initialisation and
checkpoints are those of nn.Linear.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import autocast_dtype
from models.layers.compat import scaled_product

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # the GPU's fp8 products need every dimension to be divisible by this


class Float8Linear(nn.Linear):
    """nn.Linear with its three products (output, gradients of input and weight) in fp8. Made by `convert_to_float8`.

    Evaluation also computes in fp8, so that its loss is that of the trained model.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in the output dtype of nn.Linear: that of x, or autocast's."""
        dtype = autocast_dtype(x.device.type) or x.dtype
        rows = x.reshape(-1, self.in_features)  # [N, in]
        n = len(rows)
        if n % MULTIPLE:  # the weight's gradient sums over the N rows; rows of zeros add nothing to it
            rows = F.pad(rows, (0, 0, 0, -n % MULTIPLE))
        out = _Product.apply(rows, self.weight, dtype)[:n].view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias.to(dtype)


class _Product(torch.autograd.Function):
    """x [N, in], weight [out, in] -> x weight^T [N, out] in `dtype`; all three dimensions divisible by MULTIPLE.

    The backward pass keeps x in fp8 (half the memory of bf16) and the parameter itself, not the parameter's fp8 copy. That copy
    would take a byte per parameter until the backward pass, and would hold whole weights if they are sharded. The backward pass
    needs it transposed, so it has to make a new copy anyway.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        x_scale, weight_scale = scale_of(x, E4M3), scale_of(weight, E4M3)
        x8 = _cast(x, x_scale, E4M3)
        weight8 = _cast(weight, weight_scale, E4M3)
        ctx.save_for_backward(x8, x_scale, weight, weight_scale)
        ctx.x_dtype = x.dtype
        # Fast accumulation keeps about 14 bits of a partial sum (arXiv 2412.19437). This is enough for the output; gradients
        # are sums of more terms and accumulate in fp32.
        return scaled_product(x8, weight8.t(), x_scale, weight_scale, dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        x8, x_scale, weight, weight_scale = ctx.saved_tensors
        scale = scale_of(gradient, E5M2)
        gradient8 = _cast(gradient, scale, E5M2)  # [N, out]
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            columns = _cast(weight.t(), weight_scale, E4M3).t()  # [out, in], column-major
            dx = scaled_product(gradient8, columns, scale, weight_scale, gradient.dtype, fast=False).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            columns = x8.t().contiguous().t()  # [N, in], column-major
            rows = gradient8.t().contiguous()  # [out, N]
            # Directly in the dtype of the parameter, so that it is not rounded to bf16 first.
            dweight = scaled_product(rows, columns, scale, x_scale, weight.dtype, fast=False)
        return dx, dweight, None


def scale_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Power of two, an fp32 scalar on x's device: the largest |x| / scale is in [max / 2, max) of the fp8 `dtype`.

    Scaling by a power of two is exact, and nothing below max saturates, so only bits of the mantissa are lost.
    An Inf or NaN in x gives an infinite scale. Finite entries then become 0, and 0 * Inf is NaN when the scale is applied
    again; other entries become NaN. So every result is NaN, whatever the cast does with an Inf.
    """
    # A tensor of zeros has a scale above 0. This is a local name, because torch.compile(dynamic=True) makes an input of a global
    # float, and then fails at the second autograd function that uses it (torch 2.11 and 2.13).
    least = 2.0**-100
    low, high = torch.aminmax(x)
    ratio = torch.maximum(-low, high).float() / torch.finfo(dtype).max
    bits = ratio.clamp(min=least).view(torch.int32)
    return 2 * (bits & 0x7F800000).view(torch.float32)  # keep only the exponent; NaN has the exponent of Inf


def _cast(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x / scale in fp8, row-major."""
    return (x / scale).to(dtype).contiguous()


def convert_to_float8(module: nn.Module) -> tuple[int, list[str]]:
    """Make the linear layers in `module` compute in fp8, in place: (number of converted layers, names of those left out).

    Layers with a dimension that is not divisible by 16 are left out. Call this before compilation, sharding and wrapping.
    """
    count, left_out = 0, []
    for name, layer in module.named_modules():
        if type(layer) is not nn.Linear:
            continue
        if layer.in_features % MULTIPLE or layer.out_features % MULTIPLE:
            left_out.append(name)
        else:
            layer.__class__ = Float8Linear
            count += 1
    return count, left_out


def float8_refusal(device: torch.device) -> str | None:
    """Why fp8 is of no use on `device`; None if the device has fp8 units."""
    if device.type != "cuda":
        return f"a {device.type.upper()} has no units for fp8, and would only emulate it"
    if torch.version.hip is not None:
        return "AMD's GPUs have not been tried"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {capability[0]}.{capability[1]}; fp8 needs 8.9 (Ada, Hopper)"
    return None
