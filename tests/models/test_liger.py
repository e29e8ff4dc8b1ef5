"""Liger's kernels against the reference, forward and backward, and where they are refused.

Where there is no GPU the kernels run in Triton's interpreter: TestKernels then runs in a process of its own.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_switches import build, stirred
from torch.utils.checkpoint import checkpoint

from models.base import IGNORE
from models.layers import liger
from models.layers.linear_cross_entropy import linear_cross_entropy
from models.layers.mlp import ACTIVATIONS
from models.layers.norms import rms_norm
from models.transformer_config import TransformerConfig

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and not CUDA
DEVICE = "cuda" if CUDA else "cpu"
HERE = importlib.util.find_spec("triton") is not None and liger._version() >= liger.MIN_VERSION
HALF = torch.bfloat16 if CUDA else torch.float16  # the interpreter does not multiply in bf16
VOCAB = 61
LIGER = "liger (asked for; the compiler stops at them, and at recomputed blocks)"

needs_liger = pytest.mark.skipif(not HERE, reason="needs Triton and liger-kernel >= 0.8.4 installed")
kernels = [
    pytest.mark.gpu("kernels"),
    needs_liger,
    pytest.mark.skipif(not (CUDA or INTERPRETED), reason="needs a CUDA device, or TRITON_INTERPRET=1"),
]


def small(**changes):
    shape = {"vocab_size": VOCAB, "d_model": 32, "n_layers": 1, "n_heads": 4, "d_hidden": 24}
    return TransformerConfig(**(shape | {"attention_kernel": "torch", "kernels": "liger"} | changes))


# -- refusals and the line that tells the choice ---------------------------------------------------------------------------


def test_liger_is_refused_in_one_line_where_it_cannot_run(monkeypatch):
    model = build(small())
    tokens = torch.zeros(1, 4, dtype=torch.long)
    line = r"^kernels liger cannot be used: it needs CUDA; use auto or torch$"
    for call in (lambda: model(tokens), lambda: model(tokens, tokens), model.describe_kernels):
        with pytest.raises(ValueError, match=line):
            call()
    with pytest.raises(ValueError, match=line):  # the loss by itself: of a model without RMSNorm and SwiGLU
        build(small(norm="layer", mlp="gelu"))(tokens, tokens)
    for version in ((), (0, 8, 3)):
        monkeypatch.setattr(liger, "_version", lambda version=version: version)
        with pytest.raises(
            ValueError, match=r"^kernels liger .* needs liger-kernel >= 0\.8\.4 installed; use auto or torch$"
        ):
            liger.require(torch.device("cuda"))
    with pytest.raises(ValueError, match="^kernels must be one of auto, torch, liger, not 'triton'$"):
        small(kernels="triton")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, f"RMSNorm, SwiGLU, loss: {LIGER}"),
        ({"norm": "layer", "mlp": "geglu"}, f"loss: {LIGER}"),
        ({"norm": "layer", "qk_norm": True, "mlp": "gelu"}, f"RMSNorm, loss: {LIGER}"),
        ({"block": "parallel"}, f"RMSNorm, SwiGLU, loss: {LIGER}"),
        ({"n_predict": 2}, f"RMSNorm, SwiGLU: {LIGER}; loss: not liger (liger weighs no rows, as n_predict does)"),
        (
            {"z_loss": 1e-4, "mlp": "relu2"},
            f"RMSNorm: {LIGER}; loss: not liger (liger tells the share of z_loss in",
        ),
        (
            {"unpadded_vocab": 60, "norm": "dyt", "mlp": "gelu"},
            "loss: not liger (liger predicts padding, which unpadded_vocab",
        ),
        ({"kernels": "auto"}, "norms, MLP: torch (the compiler fuses them; liger only if asked for)"),
    ],
    ids=str,
)
def test_what_liger_computes_is_told(monkeypatch, changes, line):
    monkeypatch.setattr(liger, "_refusal", lambda device: None)
    text = build(small(**changes)).describe_kernels()
    assert text.startswith(f"attention: torch (asked for); {line}") and "\n" not in text


def test_nothing_is_told_where_there_was_no_choice():
    for choice in ("auto", "torch"):
        assert build(small(kernels=choice)).describe_kernels() == "attention: torch (asked for)"


# -- equivalence -----------------------------------------------------------------------------------------------------------


def complete_interpreter():
    """What Triton's interpreter lacks of what its compiler does: numbers are fp32 scalars, and these two functions."""
    import numpy
    import triton.language as tl
    from triton.language.extra import libdevice
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def with_numbers(argument):
        if not isinstance(argument, float):
            return convert(argument)
        return tl.tensor(interpreter.TensorHandle(numpy.array([argument], numpy.float32), tl.float32), tl.float32)

    interpreter._implicit_cvt = with_numbers
    libdevice.rsqrt = lambda x: 1 / tl.sqrt(x)
    libdevice.tanh = lambda x: 1 - 2 / (tl.exp(2 * x) + 1)


if INTERPRETED and HERE:
    complete_interpreter()
    liger._refusal = lambda device: None


@needs_liger
@pytest.mark.slow
@pytest.mark.skipif(CUDA or INTERPRETED, reason="the kernels are tested in this process")
def test_the_kernels_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, "-k", "TestKernels"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-5000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-500:]


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def both(function, reference, *leaves, view=lambda x: x):
    """Results of the two and their gradients: [(of function, of reference)]; the first leaf is seen through `view`."""
    found = []
    for call in (function, reference):
        inputs = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        y = call(view(inputs[0]), *inputs[1:])
        y.backward(randn(y.numel(), seed=9, dtype=y.dtype).view(y.shape))
        found.append([y.detach(), *(x.grad for x in inputs)])
    return list(zip(*found, strict=True))


def assert_close(pairs, dtype):
    """fp32: sums of some hundred numbers, an error of 2^-24 each. In half precision a few roundings of at most eps / 2 of an entry
    follow on each other, and where differs: eps of the norm in all."""
    for ours, theirs in pairs:
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        error = (ours.double() - theirs.double()).norm()
        assert error <= (1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps) * theirs.double().norm()


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)


class TestKernels:
    pytestmark = kernels

    @DTYPES
    @pytest.mark.parametrize("heads", [False, True])
    def test_kernel_is_rms_norm(self, dtype, heads):
        """Whole rows, and heads that lie apart in memory. The gain is fp32, as under autocast."""
        x, weight = 0.1 * randn(3, 5, 4, 24, dtype=dtype), 1 + 0.3 * randn(24, seed=1)  # mean square 0.01: eps counts
        view = (lambda x: x.transpose(1, 2)) if heads else (lambda x: x)
        functions = [lambda x, w, f=f: f(x, w, 1e-3) for f in (liger.rms_norm, rms_norm)]
        pairs = both(*functions, x, weight, view=view)
        assert_close(pairs, dtype)
        if dtype == HALF:  # rounded before the gain: only ties between two sums in fp32 may fall differently
            assert (pairs[0][0] != pairs[0][1]).float().mean() < 0.01

    def test_kernel_is_rms_norm_that_leaves_the_gradient_that_comes_in_alone(self):
        x, gradient = randn(6, 32).requires_grad_(), randn(6, 32, seed=2)
        y = liger.rms_norm(x, torch.ones(32, device=DEVICE), 1e-5)
        before = gradient.clone()
        first = torch.autograd.grad(y, x, gradient, retain_graph=True)[0]
        assert torch.equal(gradient, before)
        assert torch.equal(torch.autograd.grad(y, x, gradient)[0], first)

    @DTYPES
    @pytest.mark.parametrize("rows", [1, 7])
    @pytest.mark.parametrize("part", [False, True])
    def test_kernel_is_swiglu(self, dtype, rows, part):
        """Alone, and as the last columns of a wider product (block: parallel)."""
        view = (lambda x: x[..., 16:]) if part else (lambda x: x)
        pairs = both(liger.swiglu, ACTIVATIONS["swiglu"].apply, randn(2, rows, 64, dtype=dtype), view=view)
        assert_close(pairs, dtype)
        if dtype == HALF:  # silu is rounded before the product, as torch's is
            assert (pairs[0][0] != pairs[0][1]).float().mean() < 0.01

    @DTYPES
    @pytest.mark.parametrize("softcap", [None, 3.0])
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_kernel_is_the_loss(self, dtype, softcap, reduction):
        x, weight = 2 * randn(2, 9, 16, dtype=dtype), randn(VOCAB, 16, seed=1, dtype=dtype)
        targets = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(3)).to(DEVICE)
        targets[0, 2:5] = IGNORE
        functions = [
            lambda x, w, f=f: f(x, w, targets, reduction, softcap=softcap)
            for f in (liger.linear_cross_entropy, linear_cross_entropy)
        ]
        pairs = both(*functions, x, weight)
        assert pairs[0][0].dtype == torch.float32
        assert_close(pairs, dtype)
        torch.testing.assert_close(*pairs[0], rtol=1e-5, atol=0)  # of the same logits, also in half precision

    def test_kernel_is_the_loss_of_fp32_weights_under_autocast(self):
        x, weight, targets = randn(2, 9, 16), randn(VOCAB, 16, seed=1), torch.arange(18, device=DEVICE).view(2, 9)
        with torch.autocast(DEVICE, HALF):
            pairs = both(
                *(lambda x, w, f=f: f(x, w, targets) for f in (liger.linear_cross_entropy, linear_cross_entropy)),
                x,
                weight,
            )
        assert_close(pairs, HALF)

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_kernel_is_the_loss_where_nothing_counts(self, reduction):
        x, targets = randn(2, 3, 16).requires_grad_(), torch.full((2, 3), IGNORE, device=DEVICE)
        loss = liger.linear_cross_entropy(x, randn(VOCAB, 16), targets, reduction)
        loss.backward()
        assert loss.isnan() if reduction == "mean" else loss == 0
        assert not x.grad.any()

    @pytest.mark.parametrize(
        ("changes", "recompute", "compiles"),
        [
            ({"final_softcap": 5.0, "qk_norm": True, "tied": False}, False, False),
            ({"final_softcap": 5.0, "qk_norm": True, "tied": False}, True, True),
            ({"block": "parallel"}, True, False),
            ({"n_predict": 2, "z_loss": 1e-3, "norm_placement": "pre_post"}, False, True),
        ],
        ids=str,
    )
    def test_model_is_that_of_torch(self, changes, recompute, compiles):
        tokens = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(3)).to(DEVICE)
        found = []
        for choice in ("torch", "liger"):
            model = stirred(small(kernels=choice, **changes)).to(DEVICE)
            for block in model.blocks() if choice == "liger" else ():
                if recompute:
                    block.forward = lambda *args, f=block.forward: checkpoint(f, *args, use_reentrant=False)
                if compiles:
                    block.forward = torch.compile(
                        block.forward, dynamic=True, backend="inductor" if CUDA else "aot_eager"
                    )
            loss = model(tokens, tokens.roll(1, 1)).loss
            loss.backward()
            found.append([loss.detach(), *(p.grad for p in model.parameters())])
        pairs = list(zip(*found, strict=True))
        for (
            mine,
            reference,
        ) in pairs:  # fp32 throughout: some ten operations with errors of 2^-24 times sqrt(32) on each other
            assert (mine - reference).norm() <= 1e-4 * reference.norm() + 1e-7
