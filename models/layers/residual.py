"""How a branch (attention or MLP, with its own norm) joins the residual stream: plain, weighted, or with hyper-connections.

x, kept = connection.mix(stream)
stream = connection.merge(stream, branch(x), kept)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import fill_, without_autocast


class Residual(nn.Module):
    """Base of the three connections. Only `forward` uses parameters; `merge` uses none."""

    def mix(self, stream: Tensor) -> tuple[Tensor, Any]:
        """(input of the branch [B, T, D], what `merge` needs)."""
        # Call the module, not `forward`: ZeRO-3 gathers parameters only when the module is called.
        return self(stream)

    def merge(self, stream: Tensor, branch_output: Tensor, kept: Any) -> Tensor:
        """The stream after the branch; branch_output: [B, T, D]."""
        raise NotImplementedError

    def roles(self) -> dict[str, str]:
        """Name of each parameter -> its role in the model."""
        return {}


class Plain(Residual):
    """stream + branch; stream [B, T, D]."""

    def forward(self, stream: Tensor) -> tuple[Tensor, None]:
        return stream, None

    def merge(self, stream: Tensor, branch_output: Tensor, kept: None) -> Tensor:
        return stream + branch_output


class Scaled(Plain):
    """stream + scale * branch; stream [B, T, D]. For a decoder with mup that is deeper or shallower than its base."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def merge(self, stream: Tensor, branch_output: Tensor, kept: None) -> Tensor:
        # Not `alpha` of torch.add: the compiler makes the number a variable, which an argument that is no tensor cannot be.
        return stream + self.scale * branch_output


class Weighted(Residual):
    """weight * stream + branch, with a learned weight that starts at 1; stream [B, T, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1))

    def reset(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, stream: Tensor) -> tuple[Tensor, Tensor]:
        return stream, (self.weight * stream).to(stream.dtype)

    def merge(self, stream: Tensor, branch_output: Tensor, kept: Tensor) -> Tensor:
        return kept + branch_output

    def roles(self) -> dict[str, str]:
        return {"weight": "norm"}


# Power of n_streams that scales the initial standard deviation of a branch's last matrix. The paper scales it "by a factor of
# sqrt(n)", so that the sum of the streams keeps its size, but does not say in which direction. Only `plain` equals Pre-Norm at
# the start.
START_SCALES = {"plain": 0.0, "shrunk": -0.5, "grown": 0.5}


class HyperConnection(Residual):
    """n streams H [B, T, n, D] (arXiv 2409.19606), for each token:

        input of the branch  A_m^T H     A_m [n, 1], at the start one-hot at stream `index` mod n
        next streams  A_r^T H + B^T o    A_r [n, n], at the start the identity; B [1, n], at the start ones

    so at the start each stream equals that of a Pre-Norm network. The branch has its own norm, after the mixing. With
    `dynamic`, s tanh(norm(H) W) is added to each of the three: norm is a LayerNorm without gain and bias. At the start W is 0
    and both s (one for B, one for A_m and A_r) are 0.01. Coefficients and mixing are fp32 for every dtype of H.

    index: number of the branch in the network, counted from 0. Raises ValueError for less than one stream.
    static: B, A_m and A_r as columns of one [n, n + 2] matrix, flattened, because parameters with two or more dimensions get
    weight decay, and these must not. dynamic_weight: W transposed, [n + 2, D], with weight decay. dynamic_scale: the two s, [2].
    """

    def __init__(self, d_model: int, n_streams: int, index: int, dynamic: bool) -> None:
        super().__init__()
        if n_streams < 1:
            raise ValueError(f"n_streams must be at least 1, not {n_streams}")
        self.d_model, self.n_streams, self.index, self.dynamic = d_model, n_streams, index, dynamic
        self.static = nn.Parameter(torch.empty(n_streams * (n_streams + 2)))
        if dynamic:
            self.dynamic_weight = nn.Parameter(torch.empty(n_streams + 2, d_model))
            self.dynamic_scale = nn.Parameter(torch.empty(2))

    def reset(self) -> None:
        n = self.n_streams
        identity = torch.eye(n, device="cpu")
        columns = (torch.ones(n, 1, device="cpu"), identity[:, [self.index % n]], identity)  # B, A_m, A_r
        fill_(self.static, torch.cat(columns, dim=1).flatten())
        if self.dynamic:
            nn.init.zeros_(self.dynamic_weight)
            nn.init.constant_(self.dynamic_scale, 0.01)

    def forward(self, streams: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        n = self.n_streams
        with without_autocast(streams.device.type):
            h = streams.to(torch.promote_types(streams.dtype, torch.float32))
            b, a = self._coefficients(h)  # [B, T, n, 1], [B, T, n, n + 1]
            # The product is (A_r - 1)^T H, and H is added later. Otherwise TF32 would round H itself in every block.
            a = a - F.pad(torch.eye(n, dtype=h.dtype, device=h.device), (1, 0))
            mixed = a.transpose(-1, -2) @ h  # [B, T, n + 1, D]
        x, change = mixed.split([1, n], dim=2)
        return x.squeeze(2).to(streams.dtype), (change, b)

    def _coefficients(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """B^T [B, T, n, 1] and [A_m | A_r] [B, T, n, n + 1], in the dtype of h [B, T, n, D]."""
        n = self.n_streams
        # Expanded to the full shape even if static: one batched product is twice as fast as [n, n + 1] times [B, T, n, D].
        static = self.static.to(h.dtype).view(n, n + 2).expand(*h.shape[:2], n, n + 2)
        b, a = static.split([1, n + 1], dim=-1)
        if not self.dynamic:
            return b, a
        scale, weight = self.dynamic_scale.to(h.dtype), self.dynamic_weight.to(h.dtype)
        more_b, more_a = F.linear(F.layer_norm(h, h.shape[-1:]), weight).tanh().split([1, n + 1], dim=-1)
        return b + scale[0] * more_b, a + scale[1] * more_a

    def merge(self, stream: Tensor, branch_output: Tensor, kept: tuple[Tensor, Tensor]) -> Tensor:
        change, b = kept
        return (stream + change + b * branch_output.unsqueeze(2)).to(stream.dtype)

    def roles(self) -> dict[str, str]:
        static = {"static": "norm"}
        return static | {"dynamic_weight": "matrix", "dynamic_scale": "norm"} if self.dynamic else static


def widen(x: Tensor, n: int) -> Tensor:
    """n copies of the embedded tokens as streams: [B, T, D] -> [B, T, n, D]."""
    return x.unsqueeze(2).repeat(1, 1, n, 1)


def narrow(streams: Tensor) -> Tensor:
    """The sum of the streams, for the final norm and the head: [B, T, n, D] -> [B, T, D]."""
    return streams.sum(dim=2)
