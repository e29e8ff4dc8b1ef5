"""How branches join the residual stream; hyper-connections are those of arXiv 2409.19606."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.layers import normal_
from models.layers.residual import HyperConnection, Plain, Weighted, narrow, widen

B, T, D = 2, 3, 16
BOTH = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])


def connect(n=4, index=0, dynamic=False, dtype=torch.float32, drawn=False):
    """As models are built: on the meta device, then filled. drawn: with random values in all parameters."""
    with torch.device("meta"):
        connection = HyperConnection(D, n, index, dynamic)
    connection = connection.to(dtype).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in connection.parameters():
            parameter.fill_(math.nan)
    connection.reset()
    if drawn:
        generator = torch.Generator().manual_seed(10 + index)
        for parameter in connection.parameters():
            normal_(parameter, 0.5, generator)
    return connection


def draw(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Network(nn.Module):
    """Branches of norm and linear layer between an embedding and a head, each joined by its own connection."""

    def __init__(self, connections, n=None, dtype=torch.float32):
        super().__init__()
        self.n, self.connections = n, nn.ModuleList(connections)
        branches = [nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D), nn.Tanh()) for _ in connections]
        self.branches, self.norm, self.head = nn.ModuleList(branches), nn.LayerNorm(D), nn.Linear(D, 7)
        self.to(dtype)
        generator = torch.Generator().manual_seed(0)
        for parameter in itertools.chain(self.branches.parameters(), self.head.parameters()):
            normal_(parameter, 0.3, generator)

    def stream(self, x):
        stream = x if self.n is None else widen(x, self.n)
        for connection, branch in zip(self.connections, self.branches, strict=True):
            inputs, kept = connection.mix(stream)
            stream = connection.merge(stream, branch(inputs), kept)
        return stream

    def forward(self, x):
        stream = self.stream(x)
        return self.head(self.norm(stream if self.n is None else narrow(stream)))


def prenorm(depth, dtype=torch.float32):
    return Network([Plain() for _ in range(depth)], dtype=dtype)


def hyper(depth, n=4, dynamic=False, dtype=torch.float32, drawn=False):
    return Network([connect(n, k, dynamic, dtype, drawn) for k in range(depth)], n, dtype)


def by_definition(connection, streams, branch):
    """The paper's equations in fp64, sum by sum: [B, T, n, D] -> [B, T, n, D] and the branch's input."""
    n, h = connection.n_streams, streams.double()
    static = connection.static.detach().double().view(n, n + 2)
    b, m, r = (static[:, columns].expand(B, T, n, -1) for columns in (slice(0, 1), slice(1, 2), slice(2, None)))
    if connection.dynamic:
        normed = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        weight, (s_b, s_a) = connection.dynamic_weight.detach().double(), connection.dynamic_scale.detach().double()
        more = torch.einsum("btid,kd->btik", normed, weight).tanh()
        b, m, r = b + s_b * more[..., :1], m + s_a * more[..., 1:2], r + s_a * more[..., 2:]
    x = torch.einsum("bti,btid->btd", m[..., 0], h)
    return torch.einsum("btij,btid->btjd", r, h) + torch.einsum("btj,btd->btjd", b[..., 0], branch(x)), x


# -- at the start ------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("n", [1, 2, 4])
def test_at_the_start_it_is_prenorm_bit_for_bit(n, dynamic):
    """Each stream is Pre-Norm's own; the sum of n = 2^k equal numbers is exact. More branches than streams, so that the
    branch's input comes from every one."""
    plain, network, x = prenorm(6), hyper(6, n, dynamic), draw(B, T, D)
    expected, streams = plain.stream(x), network.stream(x)
    assert streams.shape == (B, T, n, D)
    assert torch.equal(streams, expected.unsqueeze(2).expand_as(streams))
    assert torch.equal(narrow(streams), n * expected)
    # The sum is n times as large: only the final norm's eps (1e-5 beside a variance of at least 0.1) tells of it.
    assert torch.allclose(network(x), plain(x), rtol=1e-4, atol=1e-4)


def test_branches_read_the_streams_in_turn():
    streams = draw(B, T, 3, D)
    for index in range(7):
        assert torch.equal(connect(3, index).mix(streams)[0], streams[:, :, index % 3])


def test_weighted_starts_as_plain_and_learns_its_weight():
    weighted, stream, branch = Weighted(), draw(B, T, D), draw(B, T, D, seed=2)
    weighted.reset()
    inputs, kept = weighted.mix(stream)
    assert torch.equal(inputs, stream)
    assert torch.equal(weighted.merge(stream, branch, kept), Plain().merge(stream, branch, None))
    with torch.no_grad():
        weighted.weight.fill_(0.5)
    out = weighted.merge(stream, branch, weighted.mix(stream)[1])
    assert torch.allclose(out, 0.5 * stream + branch)
    out.sum().backward()
    assert weighted.weight.grad.item() == pytest.approx(stream.sum().item(), rel=1e-5)
    half = stream.bfloat16()
    assert weighted.merge(half, half, weighted.mix(half)[1]).dtype == torch.bfloat16


@BOTH
def test_init_gives_a_shard_its_part_of_the_same_values(dynamic):
    """Rank 1 of 2, with nobody at the other end."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    whole = connect(3, 2, dynamic)
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        with torch.device("meta"):
            sharded = HyperConnection(D, 3, 2, dynamic)
        sharded = fully_shard(sharded, mesh=dist.init_device_mesh("cpu", (2,))).to_empty(device="cpu")
        sharded.reset()
        for name, parameter in sharded.named_parameters():
            assert torch.equal(parameter.to_local(), whole.get_parameter(name).chunk(2)[1]), name
    finally:
        dist.destroy_process_group()


# -- what it computes --------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_it_is_the_definition(n, dynamic):
    """With random coefficients, so that rows and columns are not to be mistaken for each other."""
    connection, streams = connect(n, dynamic=dynamic, dtype=torch.float64, drawn=True), draw(B, T, n, D).double()
    before = streams.clone()
    inputs, kept = connection.mix(streams)
    out = connection.merge(streams, inputs.sin(), kept)
    expected, x = by_definition(connection, streams, torch.sin)
    assert torch.allclose(inputs, x, atol=1e-12) and torch.allclose(out, expected, atol=1e-12)
    assert torch.equal(streams, before)


def test_one_stream_fixed_is_prenorm():
    """[[0, B], [A_m, A_r]] = [[0, 1], [1, 1]]"""
    network = hyper(3, n=1)
    with torch.no_grad():
        for connection in network.connections:
            connection.static.fill_(1)
    x = draw(B, T, D)
    assert torch.equal(narrow(network.stream(x)), prenorm(3).stream(x))


def test_two_streams_make_a_parallel_block():
    """B = (1, 0) and A_r = 1 add both branches to the first stream, and both read the same."""
    network, x = hyper(2, n=2), draw(B, T, D)
    with torch.no_grad():
        for connection in network.connections:  # rows of B, A_m, A_r
            connection.static.copy_(torch.tensor([1.0, 0, 1, 0, 0, 1, 0, 1]))
    first, second = network.branches
    assert torch.allclose(network.stream(x)[:, :, 0], x + first(x) + second(x), atol=1e-6)


@BOTH
def test_every_coefficient_has_a_gradient_after_one_step(dynamic):
    """At the start W is 0, and with it its scale's gradient; and no norm tells streams apart that are alike."""
    network, x = hyper(4, 3, dynamic, torch.float64), draw(B, T, D).double()

    def backward():
        network.zero_grad()
        network(x).log_softmax(-1)[..., 0].sum().neg().backward()

    backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
    torch.optim.SGD(network.parameters(), lr=0.1).step()
    backward()
    for connection in network.connections:
        for name, parameter in connection.named_parameters():
            # Not far from 0 is A_m's of the first branch: it scales what the branch's norm undoes, but for its eps.
            assert (parameter.grad.abs() > 1e-13).all(), (connection.index, name)


def test_rank_grows_by_one_per_branch():
    network, x = hyper(3, drawn=True, dtype=torch.float64), draw(B, T, D).double()
    for k in range(4):
        part = hyper(k, dtype=torch.float64)
        part.connections, part.branches = network.connections[:k], network.branches[:k]
        assert (torch.linalg.matrix_rank(part.stream(x)) == k + 1).all()


# -- number formats ----------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_a_stream_in_bf16_is_mixed_in_fp32(weights, dynamic):
    """Rounded once, at the end: within 2^-8 of the definition. Coefficients in bf16 would be off by as much by
    themselves, and each of the five terms again."""
    connection, streams = connect(4, 1, dynamic, weights, drawn=True), draw(B, T, 4, D).bfloat16()
    inputs, kept = connection.mix(streams)
    branch = draw(B, T, D, seed=2).bfloat16()
    out = connection.merge(streams, branch, kept)
    assert inputs.dtype == out.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in kept} == {torch.float32}
    expected, x = by_definition(connection, streams, lambda _: branch.double())
    for got, exact in ((inputs, x), (out, expected)):
        # and fp32's own error where terms cancel: of a few eps of terms up to about 10
        assert ((got.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-5).all()


@BOTH
def test_autocast_does_not_reach_the_mixing(dynamic):
    connection, streams = connect(4, 1, dynamic, drawn=True), draw(B, T, 4, D)
    branch = draw(B, T, D, seed=2).bfloat16()
    inputs, kept = connection.mix(streams)
    expected = connection.merge(streams, branch, kept)
    with torch.autocast("cpu", torch.bfloat16):
        again, kept = connection.mix(streams)
        out = connection.merge(streams, branch, kept)
    assert torch.equal(again, inputs) and torch.equal(out, expected) and out.dtype == torch.float32


def test_products_of_little_precision_leave_the_streams_as_they_are(monkeypatch):
    """On a GPU products in fp32 are TF32's, which keeps 10 bits: here they keep bf16's 7. At the start they multiply
    A_r - 1 = 0, and what a stream holds is not rounded again in every block."""
    product = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: product(a.bfloat16(), b.bfloat16()).float())
    connection, streams = connect(4), draw(B, T, 4, D)
    inputs, kept = connection.mix(streams)
    assert not torch.equal(inputs, streams[:, :, 0])
    assert torch.equal(connection.merge(streams, torch.zeros(B, T, D), kept), streams)


# -- what the model and the trainer ask --------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("n", [1, 4])
def test_counts(n, dynamic):
    connection = connect(n, dynamic=dynamic)
    static = n * (n + 2)
    assert sum(p.numel() for p in connection.parameters()) == static + dynamic * (D * (n + 2) + 2)
    x = draw(B, T, D).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        streams = widen(x, n)
        inputs, kept = connection.mix(streams)
        connection.merge(streams, inputs, kept).sum().backward()
    # [A_m | A_r]^T H, and norm(H) W where dynamic; what is no product of matrices counts nothing.
    assert counter.get_total_flops() == B * T * 6 * D * n * (n + 1 + (n + 2) * dynamic)


@pytest.mark.parametrize("dynamic, paper", [(False, 768), (True, 394_048)])
def test_sizes_are_the_papers(dynamic, paper):
    """OLMo-1B: 16 layers of two branches, 2048 wide."""
    with torch.device("meta"):
        connection = HyperConnection(2048, 4, 0, dynamic=dynamic)
    assert 2 * 16 * sum(p.numel() for p in connection.parameters()) == paper


def test_only_the_dynamic_matrix_decays():
    """Recipes decay by role (matrix) or by two dimensions: both must pick the same."""
    for connection in (Plain(), Weighted(), connect(), connect(dynamic=True)):
        parameters = dict(connection.named_parameters())
        assert connection.roles().keys() == parameters.keys()
        matrices = {name for name, role in connection.roles().items() if role == "matrix"}
        assert matrices == {name for name, parameter in parameters.items() if parameter.ndim > 1}
        assert all(parameter.ndim > 0 for parameter in parameters.values())
    assert matrices == {"dynamic_weight"}


@pytest.mark.parametrize("make", [Weighted, connect, lambda: connect(dynamic=True)])
def test_parameters_are_needed_in_the_call_of_the_module_alone(make):
    """ZeRO-3 holds them whole while a module's forward runs, and empty before and after."""
    connection = make()
    connection.reset()
    is_hyper = isinstance(connection, HyperConnection)
    stream, branch = draw(B, T, *([4] if is_hyper else []), D), draw(B, T, D, seed=2)
    expected = connection.merge(stream, branch, connection.mix(stream)[1])
    whole = {name: parameter.data for name, parameter in connection.named_parameters()}

    def gather(module, _):
        for name, parameter in module.named_parameters():
            parameter.data = whole[name]

    def release(module, *_):
        for parameter in module.parameters():
            parameter.data = torch.empty(0)

    release(connection)
    connection.register_forward_pre_hook(gather)
    connection.register_forward_hook(release)
    assert torch.equal(connection.merge(stream, branch, connection.mix(stream)[1]), expected)


def test_no_streams_are_refused():
    with pytest.raises(ValueError, match=r"^n_streams must be at least 1, not 0$"):
        HyperConnection(D, 0, 0, False)


def _compare_compiled(backend, dynamic):
    eager, compiled = connect(dynamic=dynamic, drawn=True), connect(dynamic=dynamic, drawn=True)

    def step(connection, x):
        streams = widen(x, 4)
        inputs, kept = connection.mix(streams)
        return narrow(connection.merge(streams, inputs.sin(), kept))

    traced = torch.compile(step, dynamic=True, fullgraph=True, backend=backend)
    for length in (5, 9):
        step(eager, draw(B, length, D)).square().mean().backward()
        traced(compiled, draw(B, length, D)).square().mean().backward()
    torch._dynamo.reset()
    for (name, expected), got in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        # fp32 sums in another order: some hundred eps of a gradient's largest entry.
        scale = max(1e-2, expected.grad.abs().max().item())
        assert (got.grad - expected.grad).abs().max() < 200 * torch.finfo().eps * scale, name


@BOTH
def test_traced_equals_eager(dynamic):
    _compare_compiled("aot_eager", dynamic)


@pytest.mark.slow
@BOTH
def test_compiled_equals_eager(dynamic):
    _compare_compiled("inductor", dynamic)
