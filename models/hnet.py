"""H-Net (arXiv 2507.07955): a model of bytes that learns where to cut them into chunks, with all else, from the loss.

    x = encoder(bytes);  p_t = (1 - cos(q_t, k_t-1)) / 2, p = 1 at the start;  a chunk begins at t if p_t >= 1/2
    z = main network of the x of these positions;  s_i = P_i z_i + (1 - P_i) s_i-1, with P_i the p of chunk i
    decoder(s of the chunk that t is in, times c_t, + W x_t),  c_t = p_t where a chunk begins, else 1 - p_t

c_t counts as 1, but its gradient passes ("straight through"): with the one of P it teaches the router, which of itself only cuts. W
begins at zero. Router, s and W x are fp32 also under autocast, so that rounding moves no border. A vector gets wider by learned
channels, and narrower by losing them. With two stages the main network is such a model over chunks itself.

The ratio loss, N / (N - 1) ((N - 1) F G + (1 - F) (1 - G)), holds the share of positions that begin chunks, F, and the mean of p, G,
near 1 / N. It is of each row alone, weighted by the row's targets: so it does not depend on how a batch is divided. Both shares are of
what the router asks for. layers/stages.py says how many chunks there is room for: 1.25 times as many as the loss aims at.

As in the paper the encoder and decoder of bytes are Mamba-2 (`byte_blocks`), and each network ends in an RMSNorm. The stage between is
of transformer blocks here (in the paper mostly Mamba-2): the rows of a decoding batch have their chunks at different steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import counting
from models.base import IGNORE, Hidden, Split, register
from models.config import check_choice, setting
from models.layers import fill_, without_autocast
from models.layers.byte_config import ByteConfig
from models.layers.causal import Context, ShortConvolution
from models.layers.chunks import wide
from models.layers.mamba import check_ssm_sizes
from models.layers.norms import RMSNorm
from models.layers.patches_fixed import Learned
from models.layers.patching import PatchState, Rule, refuse_fixed_shapes
from models.layers.plain_block import PlainBlock, Shape, fused_matrices_in
from models.layers.positions import positions_in_documents
from models.layers.recurrent_kernels import CONVOLUTION, SSD
from models.layers.shapes import head_counts
from models.layers.ssd import ssd
from models.layers.stack import HybridStack
from models.layers.stages import Choice, Stage, before_each, choose, first_stage
from models.mamba2 import Layer, Mamba2Config


@dataclass(frozen=True)
class HNetConfig(ByteConfig):
    stages: int = setting(1, "times that vectors are joined into chunks: 1 or 2, as the paper counts", low=1, high=2)
    chunk_size: float = setting(
        0.0, "vectors of a chunk that the ratio loss aims at (N); 0: 6, with two stages 3 at each", low=0, high=10**4
    )
    ratio_weight: float = setting(0.03, "of the ratio loss", low=0, high=100)
    byte_width: int = setting(0, "width of encoder and decoder of bytes; 0: half of d_model", low=0, high=10**6)
    byte_layers: int = setting(0, "layers of each; 0: a sixth of n_layers", low=0, high=1000)
    byte_blocks: str = setting("mamba2", "these layers: mamba2, or transformer")
    byte_window: int = setting(512, "bytes that transformer layers of bytes see", low=1, high=10**9)
    middle_width: int = setting(0, "two stages: width of encoder and decoder of chunks; 0: d_model", low=0, high=10**6)
    middle_layers: int = setting(0, "two stages: layers of each; 0: a sixth of n_layers", low=0, high=1000)
    state_size: int = setting(128, "numbers that Mamba-2's state holds for each channel", low=1, high=10**4)
    ssm_head_dim: int = setting(0, "channels of a head of Mamba-2; 0: about 64", low=0, high=10**4)
    conv_size: int = setting(4, "bytes of its short convolution", low=2, high=100)
    scan_kernel: str = setting("auto", "of the state space: auto, torch, mamba-ssm or fla")
    conv_kernel: str = setting("auto", "of the short convolution: auto, torch, causal-conv1d or fla")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "byte_blocks", ("mamba2", "transformer"))
        check_choice(self, "scan_kernel", ("auto", "torch", *SSD))
        check_choice(self, "conv_kernel", ("auto", "torch", *CONVOLUTION))
        if 0 < self.chunk_size <= 1:
            raise ValueError(f"chunk_size must be 0 or above 1, not {self.chunk_size:g}")
        if self.widths != sorted(self.widths):
            raise ValueError(
                f"byte_width and middle_width must not be above the width of the next stage: {self.widths}"
            )
        names = ("middle_width",) if self.mamba else ("byte_width", "middle_width")
        for name, width in zip(names, self.widths[self.mamba : -1], strict=False):
            if width % self.head_dim:
                raise ValueError(f"{name} must be whole heads of {self.head_dim} channels, but {width} is not")
        if self.mamba:
            check_ssm_sizes(self.mixer)

    @property
    def mamba(self) -> bool:
        return self.byte_blocks == "mamba2"

    @property
    def target(self) -> float:
        return self.chunk_size or (6.0 if self.stages == 1 else 3.0)

    @property
    def widths(self) -> list[int]:
        """Of each stage, and of the main network."""
        between = [self.middle_width or self.d_model] * (self.stages - 1)
        return [self.byte_width or self.d_model // 2, *between, self.d_model]

    @property
    def depths(self) -> list[int]:
        """Layers on each side of each stage."""
        usual = max(1, round(self.n_layers / 6))
        return [self.byte_layers or usual, *[self.middle_layers or usual] * (self.stages - 1)]

    @property
    def depth(self) -> int:
        return self.n_layers + 2 * sum(self.depths)

    @property
    def shapes(self) -> list[Shape]:
        """Of transformer blocks of each stage, and of the main network."""
        return [self.shape_of(w, self.depth, 0 if i else self.byte_window) for i, w in enumerate(self.widths)]

    @property
    def mixer(self) -> Mamba2Config:
        """Of the Mamba-2 layers."""
        inner = 2 * self.widths[0]
        head_dim = self.ssm_head_dim or inner // head_counts(inner)[0]
        sizes = {"d_model": self.widths[0], "n_layers": self.depth, "state_size": self.state_size}
        others = {"conv_size": self.conv_size, "norm_eps": self.norm_eps, "dropout": self.dropout}
        return Mamba2Config(**sizes, ssm_head_dim=head_dim, **others)  # type: ignore[arg-type]


class WideLinear(nn.Module):
    """x [..., width] times a matrix, in fp32 (fp64 for fp64), whatever autocast says."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width))

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x.device.type):
            return F.linear(wide(x), wide(self.weight))


class Router(nn.Module):
    """How unlike the vector before each one is: p [B, n] in fp32, between 0 and 1. Both matrices begin as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key = WideLinear(width), WideLinear(width)

    def forward(self, x: Tensor, stage: Stage, key: Any) -> Tensor:
        """x [B, n, width]; key: of what it keeps in a decoding state."""
        similar = F.cosine_similarity(self.query(x), before_each(self.key(x), stage, key), dim=-1)
        if stage.documents is None:
            starts = stage.places(x.shape[1], x.device) == 0
        else:
            starts = positions_in_documents(stage.documents) == 0
        return ((1 - similar) / 2).clamp(0, 1).masked_fill(starts, 1.0)


class Route(NamedTuple):
    """What a router said of the positions of a stage: p [B, n]; real: [B, n] bool, which count (None: all)."""

    p: Tensor
    real: Tensor | None

    @property
    def begins(self) -> Tensor:
        """[B, n] bool"""
        return self.p >= 0.5

    def shares(self) -> tuple[Tensor, Tensor]:
        """(F, G), [B] each: the share of positions that should begin a chunk, the mean of p."""
        real = torch.ones_like(self.p) if self.real is None else self.real.to(self.p.dtype)
        count = real.sum(1)
        return (self.begins * real).sum(1) / count, (self.p * real).sum(1) / count


class OuterStage(nn.Module):
    """The parts of a stage around the next one; `down`, `up`: its layers before and after."""

    def __init__(self, config: HNetConfig, level: int) -> None:
        super().__init__()
        c, width, below = config, config.widths[level], config.widths[level + 1]
        self.config, self.level, self.width = c, level, width
        self.down, self.up = (self._layers(side) for side in ("down", "up"))
        self.norm = RMSNorm(width, c.norm_eps)
        self.router, self.residual = Router(width), WideLinear(width)
        self.channels = Learned(below - width) if below > width else None  # of the next stage, beyond those here

    def _layers(self, side: str) -> Any:
        c, level = self.config, self.level
        keys = [(side, level, i) for i in range(c.depths[level])]
        if level == 0 and c.mamba:
            return nn.ModuleList(Layer(c.mixer, key) for key in keys)  # type: ignore[arg-type]
        return nn.ModuleList(PlainBlock(c.shapes[level], key) for key in keys)

    def widened(self, x: Tensor) -> Tensor:
        """[B, M, width] -> [B, M, width of the next stage]"""
        if self.channels is None:
            return x
        return torch.cat((x, self.channels().to(x.dtype).expand(*x.shape[:2], -1)), dim=-1)

    def joined(self, x: Tensor, short: Tensor, route: Route, choice: Choice, below: Stage) -> Tensor:
        """What the decoder reads, [B, n, width]. x: what the encoder said, the same; short: [B, M, width], what the next stage did."""
        key = (self.level, "smoothed")
        smooth = smoothed(short, route.p.gather(1, choice.at), below, key)
        long = choice.spread(choice.with_last(smooth, below.state, key))
        sure = torch.where(choice.since == 0, route.p, 1 - route.p)
        sure = 1 + (sure - sure.detach())
        return (long * sure[..., None] + self.residual(x)).to(x.dtype)

    def reset(self, generator: torch.Generator | None) -> None:
        for layer in (*self.down, *self.up):
            layer.reset(generator)
        self.norm.reset()
        for matrix in (self.router.query, self.router.key):
            fill_(matrix.weight, torch.eye(self.width))
        fill_(self.residual.weight, torch.zeros(self.width, self.width))
        if self.channels is not None:
            self.channels.reset(0.0, generator)


def smoothed(z: Tensor, p: Tensor, stage: Stage, key: Any) -> Tensor:
    """s_i = p_i z_i + (1 - p_i) s_i-1 in each document, in fp32; z [B, M, D], p [B, M] (0 at places that are not used) -> as z.

    It is the recurrence of Mamba-2 with dt = -log(1 - p), A = -1, B = p / dt and C = 1 (the paper, section 2.2.2). key: of the last s in
    the state, which the caller remembers.
    """
    z = wide(z)
    if not z.shape[1]:
        return z
    p = p if stage.real is None else p * stage.real
    dt = -torch.log1p(-p.clamp(max=1 - torch.finfo(p.dtype).eps))
    B = torch.where(p > 0, p / dt.clamp(min=0.5), 1.0)  # p is at least 1/2, so dt is above 0.69
    held = None
    if stage.state is not None:
        held = stage.state.recall(key, z.new_zeros(len(z), 1, z.shape[2])).unsqueeze(-1)
    A, ones = -p.new_ones(1), torch.ones_like(B)[..., None, None]
    s, _ = ssd(z.unsqueeze(2), dt.unsqueeze(2), A, B[..., None, None], ones, held, stage.documents, keep_state=False)
    return s.squeeze(2)


@register("hnet")
class HNet(HybridStack):
    """`outer`: the stages of bytes, and with two stages of chunks; `layers`: of the main network."""

    Config = HNetConfig
    kernel_fields = ("attention_kernel", "scan_kernel", "conv_kernel")
    scans = SSD
    embedding: nn.Embedding
    # Matrices that may have learning rates of their own: of each outer stage, and of the routers.
    further_roles: ClassVar[dict[str, str]] = {
        **HybridStack.further_roles,
        "bytes": "matrix",
        "middle": "matrix",
        "router": "matrix",
    }

    def __init__(self, config: HNetConfig) -> None:
        c = config
        layers = [PlainBlock(c.shapes[-1], ("main", i)) for i in range(c.n_layers)]
        super().__init__(c, layers, RMSNorm(c.widths[0], c.norm_eps), width=c.widths[0])
        self.outer: Any = nn.ModuleList(OuterStage(c, level) for level in range(c.stages))
        self.inner_norms: Any = nn.ModuleList(RMSNorm(w, c.norm_eps) for w in c.widths[1:])
        self.convolutions = [(m.channels, m.size) for m in self.modules() if isinstance(m, ShortConvolution)]
        self.widths = (c.state_size, c.mixer.ssm_head_dim) if c.mamba else ()
        self.windows, self.attention_head_dim = (c.byte_window,), c.head_dim

    def fused_kernels(self, device: torch.device, length: int, documents: bool) -> dict[str, Any]:
        return super().fused_kernels(device, length, documents) if self.config.mamba else {}

    def hidden(
        self,
        tokens: Tensor,
        *,
        documents: Tensor | None = None,
        state: Any = None,  # a PatchState
    ) -> Hidden:
        """heads: the Route of each stage."""
        refuse_fixed_shapes(state)
        context = self.context(tokens, documents, state)
        stage = first_stage(tokens, context.documents, state)
        routes: list[Route] = []
        x = self.run_stage(0, self.embedding(tokens), stage, context, routes)
        if state is not None:
            state.length += tokens.shape[1]
        return Hidden(self.norm(x), tuple(routes))

    def run_stage(self, level: int, x: Tensor, stage: Stage, context: Context, routes: list[Route]) -> Tensor:
        """x [B, n, width of the stage] -> the same, before the last norm; appends to `routes`."""
        c, own = self.config, self.outer[level]
        for layer in own.down:
            x = layer(x, context)
        x = own.norm(x)
        route = Route(own.router(x, stage, (level, "router")), stage.real)
        routes.append(route)
        choice, below = choose(stage, route.begins, Rule("learned", c.target), level)
        short = own.widened(choice.taken(x))  # [B, M, width of the next stage]
        if short.shape[1]:
            inner = below.context(short, c.attention_kernel, c.head_dim, self.embedding.weight)
            if level + 1 < c.stages:
                short = self.run_stage(level + 1, short, below, inner, routes)
            else:
                short = self.run_layers(short, inner)
            short = self.inner_norms[level](short)
        x = own.joined(x, short[..., : own.width], route, choice, below)
        for layer in own.up:
            x = layer(x, context)
        return x

    # -- the loss -------------------------------------------------------------------------------------------------------------

    def loss(
        self, hidden: Hidden, targets: Tensor, reduction: str = "mean", weights: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss, parts = super().loss(hidden, targets, reduction, weights)
        size, of_row, ratio = self.config.target, counted_in_rows(targets, weights), torch.zeros_like(loss)
        for route in hidden.heads:
            begin, mean = route.shares()
            apart = size / (size - 1) * ((size - 1) * begin * mean + (1 - begin) * (1 - mean))
            ratio = ratio + self.config.ratio_weight * (apart * of_row).sum()
        ratio = ratio if reduction == "sum" else ratio / of_row.sum()
        return loss + ratio, {**parts, "ratio": ratio}

    @torch.no_grad()
    def measures(self, hidden: Hidden, targets: Tensor, weights: Tensor | None = None) -> dict[str, Tensor]:
        """The mean length of chunks that the routers ask for: in bytes, and at a second stage in chunks."""
        of_row = counted_in_rows(targets, weights)
        names = ("chunk_length", "chunk_length_2")
        return {name: (of_row / route.shares()[0]).sum() for name, route in zip(names, hidden.heads, strict=False)}

    # -- what it is made of ---------------------------------------------------------------------------------------------------

    def new_state(self, batch: int, max_length: int | None, device: torch.device, dtype: torch.dtype) -> PatchState:
        return PatchState(max_length)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        super().init_weights(generator)
        for module in self.outer:
            module.reset(generator)
        for norm in self.inner_norms:
            norm.reset()

    def blocks(self) -> list[nn.Module]:
        down, up = ([layer for stage in self.outer for layer in getattr(stage, side)] for side in ("down", "up"))
        return [*down, *self.layers, *up]

    def role_of(self, module: nn.Module, kind: str) -> str:
        return "matrix" if isinstance(module, WideLinear) else super().role_of(module, kind)

    def parameter_groups(self) -> dict[str, list[str]]:
        groups = super().parameter_groups()
        for name in groups.pop("matrix"):
            role = "matrix"
            if name.startswith("outer."):
                role = "router" if ".router." in name else ("bytes", "middle")[int(name.split(".")[1])]
            groups.setdefault(role, []).append(name)
        return groups

    def fused_matrices(self) -> dict[str, Split]:
        found = fused_matrices_in(self)
        for path, module in self.named_modules():
            if isinstance(module, Layer):
                found |= {f"{path}.mixer.{name}": split for name, split in module.mixer.fused_rows().items()}
        return found

    @classmethod
    def inferred(cls, config: HNetConfig) -> dict[str, Any]:
        c, found = (
            config,
            {"byte_width": config.widths[0], "byte_layers": config.depths[0], "chunk_size": config.target},
        )
        found |= {"middle_width": c.widths[1], "middle_layers": c.depths[1]} if c.stages > 1 else {}
        return found | ({"ssm_head_dim": c.mixer.ssm_head_dim} if c.mamba else {})

    @classmethod
    def config_for_scale(cls, scale: float, vocab_size: int, target_parameters: int, **choices: Any) -> HNetConfig:
        return counting.find_shape(cls, vocab_size, target_parameters, choices, cls.count_parameters)

    @classmethod
    def count_parameters(cls, config: HNetConfig) -> int:
        c, widths = config, config.widths
        total = (1 if c.tied else 2) * c.vocab_size * widths[0] + widths[0] + c.n_layers * c.shapes[-1].parameters
        for level, (shape, depth, below) in enumerate(zip(c.shapes, c.depths, widths[1:], strict=False)):
            layer = of_mamba(c.mixer) if level == 0 and c.mamba else shape.parameters
            total += 2 * depth * layer + 3 * shape.width**2 + 2 * below
        return total


def counted_in_rows(targets: Tensor, weights: Tensor | None) -> Tensor:
    """[B]: the number of targets that count, or the sum of their weights."""
    counted = targets != IGNORE
    return (counted if weights is None else weights.where(counted, 0)).sum(1)


def of_mamba(config: Mamba2Config) -> int:
    """The number of parameters of a Mamba-2 layer."""
    c, inner = config, config.expand * config.d_model
    heads, mixed = inner // c.ssm_head_dim, inner + 2 * c.n_groups * c.state_size
    return (
        c.d_model * (inner + mixed + heads)
        + mixed * (c.conv_size + 1)
        + 3 * heads
        + inner
        + inner * c.d_model
        + c.d_model
    )
