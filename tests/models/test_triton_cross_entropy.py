"""The Triton kernel of the loss against torch's kernels in fp64, forward and backward.

Where there is no GPU it runs in Triton's interpreter: TestKernel then runs in a process of its own, because Triton reads
TRITON_INTERPRET when it is imported. The interpreter runs one program after the other and knows no device_assert.
Faked in the tests of the choice: the device, and its kernel.
"""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode

from models.base import IGNORE
from models.layers import linear_cross_entropy as module
from models.layers.linear_cross_entropy import linear_cross_entropy, score_in_tiles

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and not CUDA
DEVICE = "cuda" if CUDA else "cpu"
BLOCK = 64

OPTIONS = [(None, 0.0), (1.5, 0.0), (None, 0.1), (1.5, 0.1)]  # softcap, z_loss
CASES = [(3 * BLOCK + 1, dtype, how) for dtype in (torch.float32, torch.bfloat16, torch.float16) for how in OPTIONS]
# One column; less than a block; whole blocks; whole blocks and a part of one.
CASES += [(vocab_size, torch.bfloat16, OPTIONS[3]) for vocab_size in (1, 29, BLOCK, 2 * BLOCK, 2 * BLOCK + 16)]

VERSION = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else ""
needs_triton = pytest.mark.skipif(not VERSION, reason="needs Triton: pip install '.[kernels]'")


@needs_triton
@pytest.mark.skipif(VERSION.startswith("3.6."), reason="Triton 3.6's interpreter needs numpy < 2.4")
@pytest.mark.slow
@pytest.mark.skipif(CUDA or INTERPRETED, reason="the kernel is tested in this process")
def test_the_kernel_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, "-k", "TestKernel"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-5000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-500:]


def chunk(vocab_size, dtype, seed=0):
    """A chunk of five rows, between columns of others: (the whole, logits [5, V], labels, factors)."""
    draw = torch.Generator().manual_seed(seed)
    whole = (4 * torch.randn(5, vocab_size + 9, generator=draw)).to(DEVICE, dtype)
    labels = torch.randint(vocab_size, (5,), generator=draw)
    labels[0], labels[1], labels[2] = 0, vocab_size - 1, 0
    factors = torch.rand(5, generator=draw)
    factors[2] = 0  # an ignored row
    return whole, whole[:, 3 : vocab_size + 3], labels.to(DEVICE), factors.to(DEVICE)


def scored(scorer, logits, labels, factors, form):
    """(cross-entropies, z-losses, gradient), in the dtype of factors and of logits."""
    losses = [torch.full_like(factors, torch.nan) for _ in range(2)]
    scorer(logits, labels, factors, *losses, form)
    return *losses, logits


class TestKernel:
    pytestmark = [
        pytest.mark.gpu("kernels"),
        needs_triton,
        pytest.mark.skipif(not (CUDA or INTERPRETED), reason="needs a CUDA device, or TRITON_INTERPRET=1"),
    ]

    @pytest.fixture(autouse=True)
    def small_blocks(self, monkeypatch):
        from models.layers import triton_cross_entropy

        monkeypatch.setattr(triton_cross_entropy, "BLOCK", BLOCK)
        monkeypatch.setattr(triton_cross_entropy, "WARPS", 2)
        self.kernel = triton_cross_entropy.score_in_kernel

    @pytest.mark.parametrize("vocab_size, dtype, options", CASES, ids=str)
    def test_a_chunk(self, vocab_size, dtype, options):
        """Scores and log-sums are at most 32, so that a rounding in fp32 is at most 2^-20: four of them for a loss, and for the
        exponent of a probability. A z-loss is z_loss times a square. A gradient is then rounded to its dtype; the interpreter
        cuts bits off for bf16."""
        softcap, z_loss = options
        form = module._Form(softcap, z_loss, vocab_size)
        whole, logits, *facts = chunk(vocab_size, dtype)
        before = whole.clone()
        exact = scored(score_in_tiles, logits.double(), facts[0], facts[1].double(), form)
        ours = scored(self.kernel, logits, *facts, form)
        rounding = 4 * 2**-20
        assert ((ours[0] - exact[0]).abs() <= rounding).all()
        assert ((ours[1] - exact[1]).abs() <= z_loss * 2 * 32 * rounding).all()
        last_bit = torch.finfo(dtype).eps * (1 if INTERPRETED and dtype == torch.bfloat16 else 0.5)
        off = last_bit * exact[2].abs() + rounding
        assert ((ours[2] - exact[2]).abs() <= off).all()
        assert (logits[2] == 0).all(), "an ignored row has a gradient"
        assert torch.equal(whole[:, :3], before[:, :3]) and torch.equal(whole[:, -6:], before[:, -6:])

    def test_far_logits(self):
        """A label whose probability is 0 in fp32, a column that is impossible, and a row that overflowed."""
        logits = torch.tensor([[500.0, -500.0, 0.0], [0.0, 1.0, -torch.inf], [0.0, 1.0, torch.inf]], device=DEVICE)
        labels = torch.tensor([1, 0, 0], device=DEVICE)
        form = module._Form(None, 0.0, 3)
        losses, _, gradient = scored(self.kernel, logits, labels, torch.ones(3, device=DEVICE), form)
        assert losses[0] == 1000 and gradient[0].tolist() == [1, -1, 0]
        assert losses[1].item() == pytest.approx(1.3132617, rel=1e-6) and gradient[1, 2] == 0
        assert losses[2].isnan()

    @pytest.mark.parametrize("options", [{}, {"softcap": 1.5, "z_loss": 0.1, "vocab_size": 90}], ids=["none", "all"])
    def test_the_loss_and_its_gradients(self, monkeypatch, options):
        """Three chunks, weighted rows, ignored ones, a padded vocabulary. Sums of at most 100 products in fp32 (in TF32 nowhere)."""
        for name in ("CHUNK_BYTES", "CHUNK_BYTES_OF_GPU", "ROWS_OF_GPU"):
            monkeypatch.setattr(module, name, int(name == "ROWS_OF_GPU"))
        monkeypatch.setattr(module, "MIN_CHUNK_ROWS", 5)
        draw = torch.Generator().manual_seed(0)
        x, weight = (torch.randn(shape, generator=draw).to(DEVICE) for shape in ((2, 7, 5), (100, 5)))
        targets = torch.randint(90, (2, 7), generator=draw).to(DEVICE)
        targets[0, 2] = targets[1, 0] = IGNORE
        weights = torch.rand(2, 7, generator=draw).to(DEVICE)
        found = []
        for scorer, dtype in ((self.kernel, torch.float32), (score_in_tiles, torch.float64)):
            leaves = [leaf.to(dtype, copy=True).requires_grad_() for leaf in (x, weight)]
            with module.scored_by(scorer):
                loss = linear_cross_entropy(*leaves, targets, weights=weights.to(dtype), **options)
            found.append((loss, *torch.autograd.grad(loss, leaves)))
        for ours, exact in zip(*found, strict=True):
            assert (ours - exact).norm() <= 100 * 2**-24 * exact.norm()
        assert (found[0][2][options.get("vocab_size", 100) :] == 0).all()


class TestOnAGpu:
    pytestmark = [pytest.mark.gpu("kernels"), needs_triton, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]

    @pytest.mark.parametrize("vocab_size", [50304, 50257])
    def test_a_chunk_of_gpt2s_logits(self, vocab_size):
        """With the blocks of training. The bounds are those of TestKernel.test_a_chunk."""
        draw = torch.Generator(DEVICE).manual_seed(0)
        logits = module._rows_of_logits(torch.empty(1, device=DEVICE, dtype=torch.bfloat16), 300, vocab_size)
        logits.normal_(0, 4, generator=draw)
        labels = torch.randint(vocab_size, (300,), generator=draw, device=DEVICE)
        factors = torch.rand(300, generator=draw, device=DEVICE)
        form = module._Form(None, 0.0, vocab_size)
        exact = scored(score_in_tiles, logits.double(), labels, factors.double(), form)
        ours = scored(module._kernel(logits.device), logits, labels, factors, form)
        assert ((ours[0] - exact[0]).abs() <= 4 * 2**-20).all()
        assert ((ours[2] - exact[2]).abs() <= 2**-8 * exact[2].abs() + 4 * 2**-20).all()

    def test_the_weights_gradient_is_added_up_in_fp32(self):
        """Twelve products of chunks. Their sum is rounded in fp32 alone."""
        total = torch.empty(4, 16, device=DEVICE)
        a = torch.ones(4, 128, device=DEVICE, dtype=torch.bfloat16)
        b = torch.full((128, 16), 1 / 3, device=DEVICE, dtype=torch.bfloat16)
        for part in range(12):
            module._add_product(total, a, b, first=part == 0)
        expected = 12 * (a.double() @ b.double())
        assert ((total - expected).abs() <= 12 * 128 * 2**-24 * expected).all()


@pytest.mark.parametrize(
    "device, capability, found, told",
    [
        ("cpu", None, True, ""),
        ("cuda", (9, 0), True, "loss: triton (one launch for a chunk of logits)"),
        ("cuda", (7, 5), True, "loss: torch (it needs Triton and compute capability 8.0)"),
        ("cuda", (9, 0), False, "loss: torch (it needs Triton and compute capability 8.0)"),
    ],
)
def test_which_kernel_is_told(monkeypatch, device, capability, found, told):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: "a spec" if found else None)
    assert module.describe_kernel(torch.device(device)) == told


@pytest.fixture
def nothing_tried():
    module._kernel.cache_clear()
    yield
    module._kernel.cache_clear()


def test_where_triton_fails_torch_computes_the_loss(monkeypatch, nothing_tried):
    """As without a C compiler. It is said once."""
    monkeypatch.setattr(module, "kernel_refusal", lambda device: None)
    monkeypatch.setitem(sys.modules, "models.layers.triton_cross_entropy", None)
    with pytest.warns(
        UserWarning, match="^the loss uses torch's kernels, because Triton failed: ModuleNotFoundError: "
    ) as said:
        assert [module._kernel(torch.device("cpu")) for _ in range(2)] == [None, None]
    assert len(said) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_kernel_takes_logits_on_a_gpu_except_in_fp64(monkeypatch, dtype):
    took = []

    def by(name):
        return lambda *facts: took.append(name) or score_in_tiles(*facts)

    monkeypatch.setattr(module, "_kernel", lambda device: by("kernel"))
    x, weight = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((3, 5), (7, 5)))
    targets = torch.tensor([1, IGNORE, 6])
    with module.scored_by(module.in_kernel_or(by("other"))):
        linear_cross_entropy(x, weight, targets).backward()
        monkeypatch.setattr(module, "_on_gpu", lambda x: True)
        linear_cross_entropy(x, weight, targets).backward()
    assert took == ["other", "kernel" if dtype == torch.float32 else "other"]


def test_tensors_without_storage_are_not_on_a_gpu():
    with FakeTensorMode():
        x = torch.empty(2, device="cuda")
    assert x.is_cuda and not module._on_gpu(x)


@pytest.mark.parametrize("vocab_size, entries", [(50257, 50304), (50304, 50304)])
def test_rows_start_where_vectors_can_be_loaded(vocab_size, entries):
    """On any device but a CPU, whatever the vocabulary."""
    strides = []

    def scorer(logits, *facts):
        strides.append(logits.stride())

    with module.scored_by(scorer):
        x, weight = (torch.empty(shape, device="meta", requires_grad=True) for shape in ((2, 16), (vocab_size, 16)))
        linear_cross_entropy(x, weight, torch.empty(2, device="meta", dtype=torch.long), "sum").backward()
    assert weight.grad.shape == weight.shape and strides == [(entries, 1)]
