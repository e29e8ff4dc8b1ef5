"""The output projection fused with the cross-entropy, against logits, softmax and autograd in fp64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.base import IGNORE, cross_entropy
from models.layers import linear_cross_entropy as module
from models.layers.linear_cross_entropy import linear_cross_entropy, linear_nll

B, T, V, D = 2, 7, 29, 5
SHAPES = {"none": {}, "softcap": {"softcap": 1.5}, "z_loss": {"z_loss": 0.1}, "padded": {"vocab_size": 23}}
SHAPES["all"] = SHAPES["softcap"] | SHAPES["z_loss"] | SHAPES["padded"]


@pytest.fixture
def limits(monkeypatch):
    """Sets how many rows of V columns a chunk and a tile have."""

    def set_rows(chunk, tile=2, itemsize=8):
        monkeypatch.setattr(module, "CHUNK_BYTES", 0)
        monkeypatch.setattr(module, "MIN_CHUNK_ROWS", chunk)
        monkeypatch.setattr(module, "TILE_BYTES_PER_CORE", -(-tile * V * itemsize // torch.get_num_threads()))

    return set_rows


def inputs(dtype=torch.float64, bias=False, seed=0, vocab_size=V):
    """x, weight, bias with gradients, targets; logits of deviation 2 or so, some far from the others."""
    draw = torch.Generator().manual_seed(seed)
    x, weight, offsets = (
        torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((B, T, D), (V, D), (V,))
    )
    targets = torch.randint(vocab_size, (B, T), generator=draw)
    targets[0, 2] = targets[1, 0] = IGNORE
    return x, weight, offsets if bias else None, targets


def plain(x, weight, targets, reduction="mean", bias=None, softcap=None, z_loss=0.0, vocab_size=V):
    """The same by the book: whole logits, in the type of the inputs."""
    logits = F.linear(x, weight, bias)[..., :vocab_size]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    counted = targets != IGNORE
    rows = logits[counted]
    loss = F.cross_entropy(rows, targets[counted], reduction="none") + z_loss * rows.logsumexp(-1).square()
    return loss.sum() if reduction == "sum" else loss.mean()


def gradients(loss, *tensors):
    return torch.autograd.grad(3 * loss, [tensor for tensor in tensors if tensor is not None])


# fp64 on both sides: a few hundred roundings of 1.1e-16 of numbers of order 10.
def assert_equal(actual, expected):
    assert actual.dtype == expected.dtype
    assert torch.allclose(actual, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("chunk, tile", [(1, 1), (3, 2), (7, 3), (13, 100), (100, 4), (100, 100)])
def test_loss_and_gradients_are_the_plain_ones(limits, shape, bias, reduction, chunk, tile):
    limits(chunk, tile)
    options = SHAPES[shape]
    x, weight, offsets, targets = inputs(bias=bias, vocab_size=options.get("vocab_size", V))
    expected = plain(x, weight, targets, reduction, bias=offsets, **options)
    loss = linear_cross_entropy(x, weight, targets, reduction, bias=offsets, **options)
    assert_equal(loss, expected)
    ours, theirs = gradients(loss, x, weight, offsets), gradients(expected, x, weight, offsets)
    for actual, correct in zip(ours, theirs, strict=True):
        assert_equal(actual, correct)
    if "vocab_size" in options:
        assert (ours[1][options["vocab_size"] :] == 0).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_form_for_a_compiler_is_the_plain_one_too(limits, shape, reduction):
    """Run without one."""
    limits(5)
    options = SHAPES[shape]
    x, weight, _, targets = inputs(vocab_size=options.get("vocab_size", V))
    expected = plain(x, weight, targets, reduction, **options)
    with module.scored_by(module.score_at_once):
        loss = linear_cross_entropy(x, weight, targets, reduction, **options)
    assert_equal(loss, expected)
    for actual, correct in zip(gradients(loss, x, weight), gradients(expected, x, weight), strict=True):
        assert_equal(actual, correct)


@pytest.mark.parametrize("shape", [{}, {"softcap": 1.5, "z_loss": 0.1, "vocab_size": 4}], ids=["none", "all"])
def test_gradcheck(limits, shape):
    """Against differences of the loss, not against another gradient."""
    limits(2, 1)
    draw = torch.Generator().manual_seed(0)
    targets = torch.tensor([0, IGNORE, 3])
    x, weight, bias = (
        torch.randn(size, generator=draw, dtype=torch.float64, requires_grad=True) for size in ((3, 2), (5, 2), (5,))
    )

    class Again(torch.autograd.Function):
        """gradcheck goes backward several times through one loss; here each time has a loss of its own."""

        @staticmethod
        def forward(ctx, *tensors):
            ctx.save_for_backward(*tensors)
            return linear_cross_entropy(*tensors[:2], targets, bias=tensors[2], **shape)

        @staticmethod
        def backward(ctx, gradient):
            tensors = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
            with torch.enable_grad():
                loss = linear_cross_entropy(*tensors[:2], targets, bias=tensors[2], **shape)
            return torch.autograd.grad(loss, tensors, gradient)

    assert torch.autograd.gradcheck(Again.apply, (x, weight, bias))


def test_only_the_gradients_asked_for():
    x, weight, _, targets = inputs()
    (only_x,) = gradients(linear_cross_entropy(x, weight.detach(), targets), x)
    (only_weight,) = gradients(linear_cross_entropy(x.detach(), weight, targets), weight)
    expected = gradients(plain(x, weight, targets), x, weight)
    assert_equal(only_x, expected[0])
    assert_equal(only_weight, expected[1])


@pytest.mark.parametrize("chunk", [3, 100])
def test_nothing_but_ignored_targets(limits, chunk):
    limits(chunk)
    x, weight, offsets, targets = inputs(bias=True)
    for reduction in ("sum", "mean"):
        loss = linear_cross_entropy(x, weight, torch.full_like(targets, IGNORE), reduction, bias=offsets, z_loss=0.1)
        assert loss == 0 if reduction == "sum" else loss.isnan()
        assert all((gradient == 0).all() for gradient in gradients(loss, x, weight, offsets))


def test_a_tied_weight_gets_both_gradients():
    _, weight, _, targets = inputs()
    tokens = torch.arange(B * T).view(B, T) % V
    ours = linear_cross_entropy(F.embedding(tokens, weight).tanh(), weight, targets)
    expected = plain(F.embedding(tokens, weight).tanh(), weight, targets)
    assert_equal(gradients(ours, weight)[0], gradients(expected, weight)[0])


def test_far_logits_and_fp32():
    """A target whose probability is 0 in fp32 has a finite loss, its logit's distance from the largest."""
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    weight = torch.tensor([[500.0, 0.0], [-500.0, 0.0], [0.0, 1e-3]], requires_grad=True)
    loss = linear_cross_entropy(x, weight, torch.tensor([1, 2]), "sum")
    expected = 1000 + math.log(2 + math.exp(1e-3)) - 1e-3
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=1e-6)
    assert all(gradient.isfinite().all() for gradient in gradients(loss, x, weight))


def test_without_gradients_the_loss_has_the_same_bits(limits):
    limits(5)
    x, weight, _, targets = inputs(torch.float32)
    loss = linear_cross_entropy(x, weight, targets, z_loss=0.1)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            alone = linear_cross_entropy(x, weight, targets, z_loss=0.1)
        assert not alone.requires_grad and torch.equal(alone, loss)


def test_autocast_is_as_near_as_bf16_allows(limits):
    """x and weight are rounded to 8 bits (e = 2^-9, relative), and so are the logits, their gradient g and each chunk's product.

    A logit is then off by at most a = e (2 sum |x w| + |logit|), a probability p by 2 a p, g by 2 a p + e |g|, and an entry
    of the weight's gradient by the sum over rows of (2 a p + 3 e |g|) |x|. Second orders: 10 % more.
    """
    limits(5, itemsize=4)
    x, weight, _, targets = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, weight, targets, "sum")
        without = cross_entropy(F.linear(x, weight), targets, "sum")
    loss.backward()
    assert loss.dtype == torch.float32 and torch.allclose(loss, without, rtol=1e-6)  # the same logits, bit for bit
    assert x.grad.dtype == weight.grad.dtype == torch.float32
    assert not torch.equal(weight.grad, weight.grad.bfloat16().float()), "the sum over chunks was rounded"

    rows, w, e = x.detach().double().flatten(0, 1), weight.detach().double(), 2**-9
    logits = (rows @ w.t()).requires_grad_()
    cross_entropy_sum = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="sum")
    (g,) = torch.autograd.grad(cross_entropy_sum, logits)
    p = logits.softmax(-1).detach() * (targets.flatten() != IGNORE)[:, None]
    a = e * (2 * rows.abs() @ w.abs().t() + logits.detach().abs()).amax(-1, keepdim=True)
    off = 2 * a * p + 3 * e * g.abs()
    assert ((weight.grad - g.t() @ rows).abs() <= 1.1 * off.t() @ rows.abs()).all()
    assert ((x.grad.flatten(0, 1) - g @ w).abs() <= 1.1 * off @ w.abs()).all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_bf16_weights_get_bf16_gradients(reduction):
    """FSDP and ZeRO gather bf16 weights. Three roundings of 2^-9 of the largest entries: the logits' gradient, the sum, the result."""
    x, weight, _, targets = inputs(torch.bfloat16)
    ours = gradients(linear_cross_entropy(x, weight, targets, reduction), x, weight)
    theirs = gradients(cross_entropy(F.linear(x, weight), targets, reduction), x, weight)
    for actual, expected in zip(ours, theirs, strict=True):
        assert actual.dtype == torch.bfloat16
        assert (actual - expected).abs().max() <= 3 * 2**-9 * expected.abs().max()


def test_one_backward_pass_and_none_through_it():
    x, weight, _, targets = inputs()
    loss = linear_cross_entropy(x, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass per forward pass"):
        loss.backward()
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(linear_cross_entropy(x, weight, targets), x, create_graph=True)


def test_impossible_input_is_refused():
    x, weight, _, targets = inputs()
    with pytest.raises(ValueError, match="reduction must be mean or sum, not 'none'"):
        linear_cross_entropy(x, weight, targets, "none")
    for wrong, rows in ((V, V), (20, 20), (-100, V)):
        targets[1, 1] = wrong
        with pytest.raises(RuntimeError, match="out of bounds"):
            linear_cross_entropy(x, weight, targets, vocab_size=rows)


# -- memory ------------------------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Entries of the largest tensor that any operator returned, and most bytes that were held at once of all they returned."""

    def __init__(self):
        super().__init__()
        self.held, self.largest, self.peak = {}, 0, 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
                self.held[StorageWeakRef(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        self.held = {storage: size for storage, size in self.held.items() if not storage.expired()}
        self.peak = max(self.peak, sum(self.held.values()))
        return out


@pytest.mark.parametrize("autocast", [False, True])
def test_no_tensor_is_larger_than_a_chunk(limits, autocast):
    limits(6)
    x, weight, offsets, targets = inputs(torch.float32, bias=True)
    with Watch() as watch, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        linear_cross_entropy(x, weight, targets, bias=offsets, softcap=1.5).backward()
    assert watch.largest == max(5 * V, V * D)  # 14 rows in three chunks of at most 6
    with Watch() as watch:
        plain(x, weight, targets).backward()
    assert watch.largest >= (B * T - 2) * V, "the watch sees nothing"


@pytest.mark.parametrize("autocast", [False, True])
def test_memory_of_gpt2s_loss_is_a_fraction_of_the_plain_one(monkeypatch, autocast):
    """Forward and backward of 8 x 1024 tokens at V = 50304, D = 768, of tensors without storage; with a GPU's larger tiles."""
    monkeypatch.setattr(module, "TILE_BYTES_PER_CORE", module.TILE_BYTES // torch.get_num_threads())

    def peak(loss_of):
        with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            x = torch.empty(8, 1024, 768, requires_grad=True)
            weight = torch.empty(50304, 768, requires_grad=True)
            targets = torch.empty(8, 1024, dtype=torch.long)
            with Watch() as watch:
                loss_of(x, weight, targets).backward()
        return watch.peak

    ratio = peak(linear_cross_entropy) / peak(lambda x, weight, targets: cross_entropy(F.linear(x, weight), targets))
    assert ratio < 0.2  # 0.13 in fp32, 0.15 under autocast, of which the gradient of the weight is 0.03 and 0.02


@pytest.mark.parametrize("rows", [1, 1000, 5248, 5249, 65536])
def test_chunks_of_a_gpu_are_whole_tiles(rows):
    chunk = module._chunk_rows(rows, 50304, 2, on_gpu=True)
    assert chunk == rows if rows <= 5248 else chunk % 128 == 0 and rows / 13 <= chunk <= 5248
    assert module.working_bytes(rows, 0, 50304, 2, on_gpu=True, fused=True) == chunk * 50304 * 2


class TestWorkingBytes:
    """Of 1,024 rows of bf16 logits, on a GPU: their chunk, and what the path needs."""

    chunk, weight = 1024 * 50304 * 2, 50304 * 768

    def of(self, **how):
        return module.working_bytes(1024, self.weight, 50304, 2, **{"on_gpu": True} | how)

    def test_triton_needs_nothing_but_the_chunk(self):
        assert self.of(fused=True) == self.of(fused=True, softcap=True) == self.chunk

    def test_torch_needs_tiles_or_a_product(self, monkeypatch):
        assert self.of() == self.chunk + 2 * module.TILE_BYTES
        assert self.of(softcap=True) == self.chunk + 3 * module.TILE_BYTES
        monkeypatch.setattr(module, "TILE_BYTES", 2**20)
        assert self.of() == self.chunk + 2 * self.weight

    def test_a_weight_larger_than_the_chunk_is_copied_after_it(self):
        wide = {"on_gpu": True, "fused": True, "rounded": True}
        assert module.working_bytes(1024, 50304 * 4096, 50304, 2, **wide) == 2 * 50304 * 4096
        assert self.of(fused=True, rounded=True) == self.chunk


@pytest.mark.parametrize("options", [{}, {"softcap": 1.5}, {"vocab_size": 23}], ids=str)
def test_each_token_may_weigh_what_it_likes(limits, options):
    """Weights, and a gradient for each token that is known in the backward pass alone."""
    limits(3, 2)
    x, weight, _, targets = inputs(vocab_size=options.get("vocab_size", V))
    weights = torch.rand(B, T, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    logits = F.linear(x, weight)[..., : options.get("vocab_size", V)]
    logits = 1.5 * torch.tanh(logits / 1.5) if "softcap" in options else logits
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none")
    expected = expected.view(B, T) * weights
    found = linear_nll(x, weight, targets, weights, **options)
    assert_equal(found, expected)
    of_sum = torch.autograd.grad(3 * expected.sum(), (x, weight), retain_graph=True)
    ours, theirs = gradients(found.square().sum(), x, weight), gradients(expected.square().sum(), x, weight)
    for actual, correct in zip(ours, theirs, strict=True):
        assert_equal(actual, correct)
    fused = linear_cross_entropy(x, weight, targets, "sum", weights=weights, **options)
    assert_equal(fused, expected.sum())
    for actual, correct in zip(gradients(fused, x, weight), of_sum, strict=True):
        assert_equal(actual, correct)
