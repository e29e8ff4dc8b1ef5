"""Positions inside attention: rotary embeddings, with extensions to longer contexts, and ALiBi's slopes.

Positions are integers and angles are fp32 (fp64 for fp64), for every dtype of queries and keys and under autocast, because
bf16 cannot distinguish neighbouring positions above 256.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

XPOS_GAMMA = 0.4  # arXiv 2212.10554: a larger value means a weaker decay
XPOS_SCALE = 512  # tokens per power of zeta
# arXiv 2309.00071: pairs with more than FAST turns over the original context stay, those with fewer than SLOW are interpolated.
YARN_FAST, YARN_SLOW = 32, 1


class Scaling(NamedTuple):
    """How `Rotary` extends to a longer context."""

    name: str = "none"
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


class Rotary(nn.Module):
    """Rotary position embeddings (arXiv 2104.09864): rotates channel pair i of queries and keys by position * theta^(-2i/r).

    Only the first r = fraction * head_dim channels rotate; pair i is channels (i, i + r/2), as in Llama ("half-split").
    scaling, one of SCALINGS, says how to reach a context `factor` times as long as in training:
      none         no extension
      interpolate  positions / factor (arXiv 2306.15595)
      ntk          a larger theta, the same for every length: the fastest pair is unchanged, the slowest is `factor` times
                   slower. (`dynamic` of Hugging Face depends on the length of the text, and is not available here.)
      yarn         each pair is unchanged, interpolated or between the two, by the number of its turns over `original_context`
                   tokens, and a temperature of the softmax multiplies queries and keys (arXiv 2309.00071; `yarn` of Hugging
                   Face). It multiplies only the channels that rotate: with fraction < 1, and in latent attention, it
                   changes only their part of the scores, as in Hugging Face
      llama3       each pair by the number of its turns over `original_context` tokens: unchanged above high_freq_factor,
                   divided by `factor` below low_freq_factor, mixed between them (Llama 3.1; `llama3` of Hugging Face)
      xpos         scores that decay with distance (arXiv 2212.10554), for causal attention. Position original_context // 2
                   has scale 1 for every length, so that cached keys stay valid. Fp32 and bf16 overflow 35,000 tokens from
                   there, fp16 some 4,000.
    A ValueError names the field: rope_theta, rope_fraction, rope_scaling, rope_factor, rope_original_context,
    rope_low_freq_factor or rope_high_freq_factor. temperature: replaces yarn's temperature.
    The frequencies are an integer buffer with the bits of fp32 numbers, so that casting the model to bf16 does not change them.
    """

    bits: Tensor

    def __init__(
        self,
        head_dim: int,
        theta: float = 10000.0,
        fraction: float = 1.0,
        scaling: str = "none",
        factor: float = 1.0,
        original_context: int = 0,
        low_freq_factor: float = 1.0,
        high_freq_factor: float = 4.0,
        temperature: float | None = None,
    ) -> None:
        super().__init__()
        how = Scaling(scaling, factor, original_context, low_freq_factor, high_freq_factor)
        self.width = r = check_rotary(head_dim, theta, fraction, how)
        frequencies = _FREQUENCIES[scaling](theta, r, how)
        self._rows = [[-w for w in frequencies] + frequencies]  # [1, r]; the signs become those of the sines
        own = yarn_temperature(factor) if scaling == "yarn" else 1.0
        self._temperature = own if temperature is None else temperature
        self._decays = scaling == "xpos"
        if self._decays:
            self._rows.append(_xpos_decay(r))  # [2, r]
        self._centre = original_context // 2
        self.register_buffer("bits", torch.empty(len(self._rows), r, dtype=torch.int32), persistent=False)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Set the buffer; call this when the module is on a real device."""
        self.bits.copy_(_bits_of(self._rows))

    def rotate_query(self, q: Tensor, positions: Tensor) -> Tensor:
        """q [B, H, T, D], positions [T] or [B, T] integers -> [B, H, T, D] in the dtype of q."""
        return self._rotate(q, positions, 1)

    def rotate_key(self, k: Tensor, positions: Tensor) -> Tensor:
        """As `rotate_query`; the two differ only for xpos."""
        return self._rotate(k, positions, -1)

    def _rotate(self, x: Tensor, positions: Tensor, side: int) -> Tensor:
        rows = self.bits.view(torch.float32).to(torch.promote_types(x.dtype, torch.float32))
        at = positions[..., None, :, None]  # [1, T, 1] or [B, 1, T, 1]
        angles = at * rows[0]  # [..., T, r]
        cos, sin = angles.cos(), angles.sin()
        if self._temperature != 1:
            cos, sin = cos * self._temperature, sin * self._temperature
        if self._decays:
            scale = torch.exp2(side * (at - self._centre) * rows[1])
            cos, sin = cos * scale, sin * scale
        turned = x[..., : self.width]
        # (x1 cos - x2 sin, x2 cos + x1 sin)
        turned = torch.addcmul(turned * cos, turned.roll(self.width // 2, -1), sin).to(x.dtype)
        return turned if self.width == x.shape[-1] else torch.cat((turned, x[..., self.width :]), dim=-1)


def _bits_of(rows: list[list[float]]) -> Tensor:
    """The bits of fp32 numbers, as integers."""
    # Not through a float tensor: when DeepSpeed builds the weights in bf16, that tensor would be bf16 too.
    bits = [struct.unpack(f"{len(row)}i", struct.pack(f"{len(row)}f", *row)) for row in rows]
    return torch.tensor(bits, dtype=torch.int32, device="cpu")


def check_rotary(head_dim: int, theta: float, fraction: float, how: Scaling) -> int:
    """The number of channels that rotate; ValueError, with the names of the fields, if the settings are impossible."""
    width = _rotated_width(head_dim, fraction)
    _check_scaling(theta, how, width)
    return width


def _rotated_width(head_dim: int, fraction: float) -> int:
    if fraction == 1 and (head_dim < 2 or head_dim % 2):
        raise ValueError(
            f"head_dim (d_model / n_heads; in latent attention rope_dim) must be even with rotary positions, not {head_dim}"
        )
    width = round(fraction * head_dim) if 0 < fraction <= 1 else 0
    if width < 2 or width % 2 or abs(width - fraction * head_dim) > 1e-6:
        raise ValueError(
            f"rope_fraction must select an even number of a head's {head_dim} channels, at least 2 and at most all, "
            f"not {fraction} of them"
        )
    return width


def _check_scaling(theta: float, how: Scaling, width: int) -> None:
    scaling, factor, original_context, low, high = how
    if not 1 < theta < math.inf:
        raise ValueError(f"rope_theta must be above 1, not {theta}")
    if scaling not in SCALINGS:
        raise ValueError(f"rope_scaling must be {', '.join(SCALINGS[:-1])} or {SCALINGS[-1]}, not {scaling!r}")
    if not 1 <= factor < math.inf:
        raise ValueError(f"rope_factor must be at least 1, not {factor}")
    if factor != 1 and scaling in ("none", "xpos"):
        raise ValueError(f"rope_factor must be 1 with rope_scaling {scaling}, which does not use it, not {factor}")
    if scaling == "ntk" and width < 4:
        raise ValueError(
            "rope_scaling must not be ntk if only 2 channels rotate: the one pair is both the fastest and the slowest"
        )
    if original_context < (1 if scaling in ("yarn", "llama3") else 0):
        raise ValueError(
            f"rope_original_context must be the sequence length of earlier training, not {original_context}"
        )
    if original_context and scaling not in ("yarn", "llama3", "xpos"):
        raise ValueError(
            f"rope_original_context must be 0 with rope_scaling {scaling}, which does not use it, not {original_context}"
        )
    if not 0 < low < high < math.inf:
        raise ValueError(f"rope_low_freq_factor must be above 0 and below rope_high_freq_factor ({high}), not {low}")


# -- frequencies: theta, rotated channels r, Scaling -> radians per token of the r/2 pairs ---------------------------------


def _plain(theta: float, r: int, how: Scaling) -> list[float]:
    return [theta ** (-2 * i / r) for i in range(r // 2)]


def _interpolated(theta: float, r: int, how: Scaling) -> list[float]:
    return [w / how.factor for w in _plain(theta, r, how)]


def _ntk(theta: float, r: int, how: Scaling) -> list[float]:
    return _plain(theta * how.factor ** (r / (r - 2)), r, how)


def yarn_temperature(factor: float, strength: float = 1.0) -> float:
    """The factor by which YaRN multiplies both queries and keys; strength: DeepSeek's mscale."""
    return 0.1 * strength * math.log(factor) + 1


def _yarn(theta: float, r: int, how: Scaling) -> list[float]:
    def pair_with(turns: int) -> float:
        return r * math.log(how.original_context / (2 * math.pi * turns)) / (2 * math.log(theta))

    low = max(math.floor(pair_with(YARN_FAST)), 0)
    high = min(math.ceil(pair_with(YARN_SLOW)), r - 1)
    frequencies = []
    for i, w in enumerate(_plain(theta, r, how)):
        interpolated = min(max((i - low) / max(high - low, 0.001), 0), 1)
        frequencies.append(w * (1 - interpolated) + w / how.factor * interpolated)
    return frequencies


def _llama3(theta: float, r: int, how: Scaling) -> list[float]:
    frequencies = []
    for w in _plain(theta, r, how):
        turns = how.original_context * w / (2 * math.pi)
        kept = (turns - how.low_freq_factor) / (how.high_freq_factor - how.low_freq_factor)
        kept = min(max(kept, 0), 1)
        frequencies.append(w * kept + w / how.factor * (1 - kept))
    return frequencies


_FREQUENCIES: dict[str, Callable[[float, int, Scaling], list[float]]] = {
    "none": _plain,
    "interpolate": _interpolated,
    "ntk": _ntk,
    "yarn": _yarn,
    "llama3": _llama3,
    "xpos": _plain,
}
SCALINGS = tuple(_FREQUENCIES)


def _xpos_decay(r: int) -> list[float]:
    """log2 of a query's scale factor per token, for each channel: log2(zeta_i) / 512."""
    zeta = [(2 * i + XPOS_GAMMA * r) / ((1 + XPOS_GAMMA) * r) for i in range(r // 2)]
    return [math.log2(z) / XPOS_SCALE for z in zeta] * 2


# -- layouts of foreign checkpoints ----------------------------------------------------------------------------------------


def to_half_split(weight: Tensor, n_heads: int) -> Tensor:
    """Reorder W_q or W_k from pairs (2i, 2i + 1), as Meta and Mistral publish them, to the pairs (i, i + D/2) used here.

    weight: [n_heads * D, ...], or its bias; n_heads: for W_k the number of key heads. Every channel of a head must rotate.
    """
    return weight.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def to_interleaved(weight: Tensor, n_heads: int) -> Tensor:
    """The inverse of `to_half_split`."""
    return weight.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


# -- ALiBi -----------------------------------------------------------------------------------------------------------------


def alibi_slopes(n_heads: int) -> list[float]:
    """Slopes of ALiBi's bias -slope * distance, one per head, all above 0 (arXiv 2108.12409).

    2^(-8/n), 2^(-16/n), ... if n is a power of two. Otherwise the slopes of the power of two below n, then every other slope of
    the power of two above.
    """
    power = 1 << (n_heads.bit_length() - 1)
    slopes = [2 ** (-8 * (head + 1) / power) for head in range(power)]
    between = [2 ** (-4 * (2 * head + 1) / power) for head in range(n_heads - power)]
    return slopes + between


class Alibi(nn.Module):
    """ALiBi's bias: the scores of each head fall with the distance, by its own slope. The slopes are kept as bits, as in `Rotary`."""

    bits: Tensor

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self._slopes = alibi_slopes(n_heads)
        self.register_buffer("bits", torch.empty(1, n_heads, dtype=torch.int32), persistent=False)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Set the buffer; call this when the module is on a real device."""
        self.bits.copy_(_bits_of([self._slopes]))

    def forward(self, n_keys: int) -> Tensor:
        """-slope * position of the keys at 0 ... n_keys - 1, fp32 [1, H, n_keys]."""
        return -self.bits.view(torch.float32)[..., None] * torch.arange(n_keys, device=self.bits.device)


def number_documents(documents: Tensor) -> Tensor:
    """Number the documents of each row 0, 1, ... in their order; [B, T] -> [B, T]. If an old number occurs again later, it is a new
    document, so that no document attends to one that has ended. This does not wait for the device."""
    return F.pad(documents[:, 1:] != documents[:, :-1], (1, 0)).cumsum(dim=1)


def positions_in_documents(documents: Tensor) -> Tensor:
    """Position of each token in its document, 0 wherever the document number changes; documents [B, T] -> [B, T]."""
    t = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    starts = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    return t - torch.where(starts, t, 0).cummax(dim=1).values
