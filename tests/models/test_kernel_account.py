"""The account of models/README.md: FLOPs and bytes of each kernel of hlb's loss and attention and of a block of GPT-2, and the time
they should take.

A calculation, not a measurement: a kernel takes as long as its products at PRODUCTS of an H100's peak in bf16, or as its bytes at
MEMORY of its memory's bandwidth, whichever is longer.
"""

from typing import NamedTuple

import pytest
from conftest import ROOT

from models.layers.linear_cross_entropy import _chunk_rows

PEAK, BANDWIDTH = 989e12, 3.35e12  # of an H100 SXM: FLOP/s of bf16, dense, and bytes/s (NVIDIA's data sheet)
PRODUCTS, FLEX, MEMORY = 0.7, 0.35, 0.85  # shares: first contact saw 680 TFLOP/s in the head's products
TOKENS, LENGTH, LAYERS, WIDTH, QK, VOCAB = 55 * 1024, 1024, 8, 384, 48, 50304


class Kernel(NamedTuple):
    flops: float
    bytes: float
    share: float = PRODUCTS

    @property
    def ms(self):
        return 1e3 * max(self.flops / PEAK / self.share, self.bytes / BANDWIDTH / MEMORY)


def head(tokens=TOKENS, width=WIDTH, vocab_size=VOCAB):
    """Kernels of the head and the loss, per step: name -> kernel. Logits and x in bf16, the weight's gradient in fp32."""
    chunks = -(-tokens // _chunk_rows(tokens, vocab_size, 2, on_gpu=True))
    logits, matrix, x = 2 * tokens * vocab_size, vocab_size * width, 2 * tokens * width
    product = Kernel(2 * tokens * matrix, logits + chunks * 2 * matrix + x)
    return {
        "logits = x w^T": product,
        "gradient of x": product,
        "gradient of w, added up by its product": Kernel(product.flops, logits + x + 4 * matrix * (2 * chunks - 1)),
        "loss: one read from memory, one from L2, one write": Kernel(0, 2 * logits),
        "w to bf16; both gradients scaled": Kernel(0, (4 + 2 + 4 + 4) * matrix + 2 * x),
    }


def attention():
    """Kernels of hlb's attention, per step; FlexAttention in blocks of 128, in three heads of 128 values that repeat q k^T."""
    pairs, blocks, width = TOKENS * LENGTH * LAYERS, LENGTH // 128, 64  # channels of q and k, with their padding
    seen, values = pairs * (blocks + 1) / 2 / blocks * WIDTH / 128, 128
    io, scores = 2 * TOKENS * LAYERS * (2 * QK + 2 * WIDTH), 2 * pairs
    products = {name: 2 * pairs * n for name, n in (("narrow", QK), ("wide", WIDTH))}
    narrow, wide = (Kernel(flops, scores) for flops in products.values())
    return {
        "flex, forward": [Kernel(2 * seen * (width + values), io, FLEX)],
        # The scores and their gradient are computed twice, once for q and once for k and v.
        "flex, backward": [Kernel(2 * seen * (2 * (width + values) + 2 * width + values), 3 * io, FLEX)],
        "dense, forward: scores, softmax, values": [narrow, Kernel(0, 2 * scores), wide],
        "dense, backward: two wide products, softmax, two narrow products": [
            *(wide, wide),
            Kernel(0, 3 * scores),
            *(narrow, narrow),
        ],
    }


GPT2_TOKENS, GPT2_WIDTH, GPT2_BLOCKS, MFU = 32 * 1024, 768, 12, 0.45
BLOCK_WEIGHTS = (12 * GPT2_WIDTH + 9) * GPT2_WIDTH  # matrices and biases of one block
GPT2_WEIGHTS = GPT2_BLOCKS * BLOCK_WEIGHTS + VOCAB * GPT2_WIDTH


def gpt2():
    """What Inductor's own kernels do in GPT-2's blocks, for a microbatch: name -> (launches in a block, kernel of all blocks). The
    residual stream and its gradient are fp32; they are 2 units, the input of a branch in bf16 is 1 unit, and the MLP's 4."""
    unit = 2 * GPT2_TOKENS * GPT2_WIDTH
    kernels = {
        "forward: both norms, to bf16, the second with the sum before it": (2, (2 + 1 + 2 + 1 + 1) * unit),
        "forward: GELU": (1, (4 + 4) * unit),
        "forward: last sum": (1, (2 + 1 + 1 + 2) * unit),
        "forward: weights and biases to bf16": (8, 6 * BLOCK_WEIGHTS),
        "backward: gradient to bf16": (1, (2 + 1) * unit),
        "backward: GELU": (1, (4 + 4 + 4) * unit),
        "backward: sums for the biases": (8, (1 + 4 + 1 + 3) * unit),
        "backward: norms and sums": (3, (9 + 5 + 7) * unit),
        "backward: gradients of q, k and v side by side": (1, (3 + 3) * unit),
        "backward: gradients of weights to fp32": (4, 6 * BLOCK_WEIGHTS),
    }
    return {name: (launches, Kernel(0, GPT2_BLOCKS * size)) for name, (launches, size) in kernels.items()}


def row(name, kernels):
    flops, size = sum(kernel.flops for kernel in kernels), sum(kernel.bytes for kernel in kernels)
    return f"| {name} | {flops / 1e12:.2f} | {size / 1e9:.1f} | {sum(kernel.ms for kernel in kernels):.1f} |"


def ratio(kernels):
    """Time of head and loss over that of its three products."""
    times = [kernel.ms for kernel in kernels.values()]
    return sum(times) / sum(times[:3])


@pytest.mark.parametrize(
    "name, kernels", [*((name, [kernel]) for name, kernel in head().items()), *attention().items()], ids=str
)
def test_each_row_of_the_account_is_the_calculation(name, kernels):
    assert row(name, kernels) in (ROOT / "models" / "README.md").read_text()


def test_the_ratio_of_the_account():
    found = {width: ratio(head(width=width)) for width in (384, 768, 2048)}
    line = ", ".join(f"{value:.2f} at a width of {width:,}" for width, value in found.items())
    assert line in " ".join((ROOT / "models" / "README.md").read_text().split())


@pytest.mark.parametrize(("name", "row"), gpt2().items(), ids=str)
def test_each_row_of_gpt2_is_the_calculation(name, row):
    launches, kernel = row
    line = f"| {name} | {launches} | {kernel.bytes / 1e9:.1f} | {kernel.ms:.1f} |"
    assert line in (ROOT / "models" / "README.md").read_text()


def test_the_shares_of_gpt2():
    """Of the time of a microbatch at an MFU of 45 %, with 6 FLOPs for each weight and token."""
    microbatch = 1e3 * 6 * GPT2_WEIGHTS * GPT2_TOKENS / PEAK / MFU
    fused, casts = sum(kernel.ms for _, kernel in gpt2().values()), Kernel(0, 6 * GPT2_WEIGHTS).ms
    read_twice = (
        2 * Kernel(0, GPT2_BLOCKS * 4 * GPT2_TOKENS * GPT2_WIDTH).ms
    )  # forward x, backward its gradient, in fp32
    text = " ".join((ROOT / "models" / "README.md").read_text().split())
    assert f"take {fused:.1f} ms of the {microbatch:.0f} ms" in text
    assert f"{casts:.2f} ms, {casts / microbatch:.1%} of the microbatch".replace("%", " %") in text
    assert f"once more: {read_twice:.1f} ms" in text
    assert sum(launches for launches, _ in gpt2().values()) == 30


def test_the_account_of_a_residual_stream_in_bf16():
    """GPT-2 124M. A compiled block reads and writes fp32 entries of the stream or of its gradient 11 times, at 2 bytes too many.

    Forward: both norms and the last sum read its input, the last sum writes; backward: the last gradient is read for the MLP and
    for the sum, the input for both norms, the gradient between the branches is written and read, and that of the input is
    written.
    """
    forward, backward, tokens, width, layers, flops_per_token = 4, 7, 32 * 1024, 768, 12, 854_654_976
    saved = Kernel(0, 2 * (forward + backward) * tokens * width * layers)
    share = saved.ms / (1e3 * tokens * flops_per_token / 0.45 / PEAK)
    line = (
        f"{saved.bytes / 1e9:.1f} GB less in a step of 32 sequences of 1,024 tokens: {saved.ms:.1f} ms, or {share:.1%}"
    )
    assert line.replace("%", " %") in " ".join((ROOT / "models" / "README.md").read_text().split())
