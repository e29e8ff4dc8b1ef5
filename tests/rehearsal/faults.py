"""Faults that a rehearsal must find: GPT-2s that wait for the device or mix devices, but only on a GPU, so that planning and the
tests on a CPU pass."""

import torch

from models.base import register
from models.presets import Gpt2


class WaitsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * gradient.sum().item() if gradient.is_cuda else gradient  # backward


# x: the embedded tokens [B, T, D]. A test looks for the name in the line that a rehearsal names.
FAULTS = {
    "item": lambda x: x * x.sum().item(),
    "tolist": lambda x: x * x.sum(-1).tolist()[0][0],
    "bool": lambda x: x if x.sum() > 0 else -x,
    "nonzero": lambda x: x + x.nonzero().sum(),
    "mask": lambda x: x + x[x > 0].sum(),
    "mask_written": lambda x: x + x.detach().index_put((x[..., 0] > 0,), x.detach()[0, 0]),
    "cpu": lambda x: x + x.sum().cpu(),
    "to": lambda x: x + x.detach().sum().to("cpu").to(x.device, non_blocking=True),
    "copied": lambda x: x + torch.ones(x.shape[-1]).copy_(x[0, 0]).sum(),
    "tensor": lambda x: x * torch.tensor(1.0, device=x.device),
    "mixed": lambda x: x + torch.ones(x.shape[-1]),
    "backward": WaitsInBackward.apply,
    "synchronize": lambda x: x if torch.cuda.synchronize() is None else x,
}


def plant(name):
    class Faulty(Gpt2):
        def embed(self, tokens, context):
            x = super().embed(tokens, context)
            return FAULTS[name](x) if x.is_cuda else x

    Faulty.__qualname__ = name
    return register(f"faulty_{name}")(Faulty)


for each in FAULTS:
    plant(each)
