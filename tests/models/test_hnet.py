"""H-Net: what only it promises, besides the contract of every model."""

import pytest
import torch
import torch.nn.functional as F

from models.base import IGNORE
from models.hnet import HNet, HNetConfig, Route, smoothed
from models.layers.causal import Context
from models.layers.patching import Rule
from models.layers.plain_attention import visible
from models.layers.stages import Stage, choose
from models.materialise import materialise
from trainer.engine.meta import build_meta
from trainer.objectives.next_token import NextToken
from trainer.testing import numbers
from trainer.testing.subject import Subject

TINY = {"d_model": 32, "n_layers": 2, "n_heads": 2, "byte_layers": 1, "middle_layers": 1, "state_size": 8}
LENGTH = 24


def built(**fields):
    """A model with large weights, whose routers cut at about half of the bytes."""
    config = HNetConfig(**{**TINY, **fields})
    model = materialise(build_meta(HNet, config), torch.device("cpu"), torch.Generator().manual_seed(0)).eval()
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=draw)
    return model


def drawn(seed=0, rows=3, length=LENGTH):
    return torch.randint(257, (rows, length), generator=torch.Generator().manual_seed(seed))


def by_definition(model, level, x):
    """The stages of one text [1, n, width], in a loop over its positions."""
    c, outer, n = model.config, model.outer[level], x.shape[1]
    windows = (c.byte_window if level == 0 else 0,)
    context = Context(visible=visible("torch", windows, c.head_dim, model.embedding.weight, x[..., 0], Context()))
    for layer in outer.down:
        x = layer(x, context)
    x = outer.norm(x)
    q, k = F.linear(x, outer.router.query.weight), F.linear(x, outer.router.key.weight)
    p = [1.0] + [(1 - F.cosine_similarity(q[0, t], k[0, t - 1], dim=0)).item() / 2 for t in range(1, n)]
    begins = [t for t in range(n) if p[t] >= 0.5]
    z = x[:, begins]
    if outer.channels is not None:
        z = torch.cat((z, outer.channels().expand(1, len(begins), -1)), dim=-1)
    if level + 1 < c.stages:
        z = by_definition(model, level + 1, z)
    else:
        seen = visible("torch", (0,), c.head_dim, model.embedding.weight, z[..., 0], Context())
        for layer in model.layers:
            z = layer(z, Context(visible=seen))
    z = model.inner_norms[level](z)[..., : outer.width]
    smooth, before = [], torch.zeros(1, outer.width)
    for i, t in enumerate(begins):
        before = p[t] * z[:, i] + (1 - p[t]) * before
        smooth.append(before)
    long = torch.stack([smooth[sum(begin <= t for begin in begins) - 1] for t in range(n)], dim=1)
    x = long + F.linear(x, outer.residual.weight)
    for layer in outer.up:
        x = layer(x, context)
    return x


KINDS = [
    {},
    {"byte_blocks": "transformer", "byte_window": 5},
    {"stages": 2},
    {"stages": 2, "middle_width": 16, "byte_width": 16},
]


@pytest.mark.parametrize("fields", KINDS, ids=str)
@torch.no_grad()
def test_it_is_what_the_paper_defines(fields):
    """Rows of one batch, cut at other places, each as by loops over its own positions."""
    model, tokens = built(**fields), drawn()
    found = model(tokens).logits
    for row, logits in zip(tokens, found, strict=True):
        x = by_definition(model, 0, model.embedding(row[None]))
        torch.testing.assert_close(logits, F.linear(model.norm(x), model.head.weight)[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("fields", KINDS[1:], ids=str)
def test_every_kind_keeps_the_contract(fields):
    case = Subject("hnet", HNet, {**TINY, **fields})
    numbers.no_token_sees_the_future(case, tolerance=0)
    numbers.documents_are_kept_apart(case)
    numbers.cached_decoding_equals_the_whole(case)
    numbers.loss_is_the_cross_entropy(case)
    numbers.ignored_targets_do_not_count(case)


def test_the_next_bytes_loss_alone_teaches_the_router():
    """Through the smoothing and the confidence, without the ratio loss; with neither there is no gradient."""
    model, tokens = built(ratio_weight=0.0), drawn()
    model(tokens, drawn(1)).loss.backward()
    for matrix in (model.outer[0].router.query, model.outer[0].router.key):
        assert matrix.weight.grad.abs().max() > 1e-6
    model.zero_grad()
    [route] = model.hidden(tokens).heads
    route.p.detach().requires_grad_()  # what decides where to cut has no gradient
    assert not route.begins.requires_grad and route.p.requires_grad


def test_confidence_is_one_with_a_gradient():
    """d loss / d p of a byte without chunk is - (what it gets) . gradient, of one that begins a chunk the other way round."""
    model, tokens = built(), drawn()
    x = model.outer[0].norm(model.embedding(tokens)).detach()
    p = torch.full((3, LENGTH), 0.25)
    p[:, ::4] = 0.75
    p[:, 0] = 1.0
    p.requires_grad_()
    route, stage = Route(p, None), Stage()
    choice, below = choose(stage, route.begins, Rule("learned", 1.5), 0)
    short = torch.randn(3, choice.at.shape[1], 16, generator=torch.Generator().manual_seed(2))
    smooth = smoothed(short, p.detach().gather(1, choice.at), below, 0)
    out = model.outer[0].joined(x, short, Route(p, None), choice, below)
    torch.testing.assert_close(out, choice.spread(smooth) + model.outer[0].residual(x))
    out.sum().backward()
    plain = ~route.begins
    torch.testing.assert_close(p.grad[plain], -choice.spread(smooth).sum(-1)[plain])


@torch.no_grad()
def test_the_ratio_loss_is_of_each_row_and_does_not_depend_on_how_a_batch_is_divided():
    model, tokens, targets = built(chunk_size=4.0, ratio_weight=0.5), drawn(), drawn(1)
    targets[0, 5:] = targets[2] = IGNORE
    [route] = model.hidden(tokens).heads
    expected = 0.0
    for p, count in zip(route.p, (5, LENGTH, 0), strict=True):
        begin, mean = (p >= 0.5).float().mean().item(), p.mean().item()
        expected += 0.5 * count * 4 / 3 * (3 * begin * mean + (1 - begin) * (1 - mean))
    whole = model(tokens, targets, reduction="sum")
    assert whole.parts["ratio"].item() == pytest.approx(expected, rel=1e-5)
    rows = [model(tokens[i : i + 1], targets[i : i + 1], reduction="sum").parts["ratio"] for i in range(3)]
    torch.testing.assert_close(sum(rows), whole.parts["ratio"])
    weighted = model.loss(model.hidden(tokens), targets, "sum", torch.full(targets.shape, 0.5))[1]
    torch.testing.assert_close(weighted["ratio"], 0.5 * whole.parts["ratio"])


@torch.no_grad()
def test_the_length_of_chunks_is_measured():
    model, tokens, targets = built(stages=2), drawn(), drawn(1)
    targets[0] = IGNORE
    first, second = model.hidden(tokens).heads
    loss = NextToken(NextToken.Config())(model, {"tokens": tokens, "targets": targets})
    lengths = [LENGTH / row.sum().item() for row in first.begins[1:]]
    assert loss.measures["chunk_length"].item() / loss.count.item() == pytest.approx(sum(lengths) / 2)
    lengths = [
        real.sum().item() / (row & real).sum().item()
        for row, real in zip(second.begins[1:], second.real[1:], strict=True)
    ]
    assert loss.measures["chunk_length_2"].item() / loss.count.item() == pytest.approx(sum(lengths) / 2)
    assert loss.sum - sum(loss.parts.values()) == pytest.approx(model.nll(model.hidden(tokens), targets).sum())


@torch.no_grad()
def test_autocast_moves_no_border_of_the_same_vectors():
    outer = built().outer[0]
    x = torch.randn(4, 500, 16, generator=torch.Generator().manual_seed(0))
    p = outer.router(x, Stage(), 0)
    with torch.autocast("cpu", torch.bfloat16):
        again = outer.router(x, Stage(), 0)
    assert again.dtype == torch.float32 and torch.equal(again, p)
    assert ((p > 0.495) & (p < 0.505)).sum() > 10, "some are so near to 1/2 that bf16 would move them"
    assert outer.residual(x.bfloat16()).dtype == torch.float32


@torch.no_grad()
def test_more_borders_than_there_is_room_for():
    """A row, its beginning, and the same step by step, where chunks of 50 bytes are aimed at, and every second byte wants one."""
    model, tokens = built(chunk_size=50.0, stages=2), drawn(3, 2, 90)
    assert model.hidden(tokens).heads[0].begins.sum(1).min() > 25
    logits = model(tokens).logits
    for stop in (2, 40, 77):
        torch.testing.assert_close(model(tokens[:, :stop]).logits, logits[:, :stop], rtol=1e-3, atol=1e-3)
    state = model.new_state(2, 90, torch.device("cpu"), torch.float32)
    found = torch.cat([model(part, cache=state).logits for part in tokens.split([35, *[1] * 30, 25], 1)], 1)
    torch.testing.assert_close(found, logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"chunk_size": 1.0}, "chunk_size must be 0 or above 1"),
        ({"byte_width": 64}, "must not be above the width of the next stage"),
        ({"byte_blocks": "gru"}, "byte_blocks must be one of mamba2, transformer"),
        ({"byte_blocks": "transformer", "byte_width": 24}, "byte_width must be whole heads of 16 channels"),
        ({"stages": 2, "middle_width": 24}, "middle_width must be whole heads of 16 channels"),
        ({"ssm_head_dim": 7}, "ssm_head_dim must divide"),
        ({"scan_kernel": "x"}, "scan_kernel must be one of"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        HNetConfig(**{**TINY, **fields})
