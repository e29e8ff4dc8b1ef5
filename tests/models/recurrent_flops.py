"""Training FLOPs of the recurrent models and hybrids by formula: 2 per multiply-add, three times the forward pass."""

from torch import nn

from models.gated_delta_net import DeltaMixer
from models.layers import delta_rule, ssd
from models.layers.mamba import Mamba2Mixer
from models.layers.plain_attention import PlainAttention
from models.rwkv7 import LowRank, TimeMixFinal
from models.zamba2 import SharedBlock


def of_stack(model, length):
    """Per token of a sequence of `length`, rounded down."""
    once = sum(of_module(module, length) for module in model.modules())
    again = 0  # what the second and later uses of a shared block compute, without its adapters
    for block in (module for module in model.modules() if isinstance(module, SharedBlock)):
        own = [block.attention.qkv, block.attention.out, block.up, block.down, block.attention]
        again += (len(block.adapters) - 1) * sum(of_module(module, length) for module in own)
    head = 2 * length * model.config.vocab_size * model.config.d_model if model.head is None else 0
    return 3 * (once + again + head) // length


def plain_layer(config, width, keys):
    """Multiply-adds of a token: projections, SwiGLU, scores and what they weigh."""
    hidden = max(32, round(config.hidden_ratio * width / 32) * 32)
    return 4 * width * width + 3 * width * hidden + 2 * width * keys


def of_spacebyte(config, length):
    """A byte passes the local layers; the global ones have room for 1.25 length / patch_size + 17 bytes."""
    c, slots = config, min(length, 17 + int((length - 1) * 1.25 / config.patch_size))
    per_byte = 2 * c.local_layers * plain_layer(c, c.d_model // 2, length) + c.vocab_size * (c.d_model // 2)
    return 6 * (per_byte * length + c.n_layers * plain_layer(c, c.d_model, slots) * slots) // length


def of_aunet(config, length):
    """A stage has room for so many vectors of the one before; each passes a matrix on its way down, and one for each place on its way up."""
    c, room, total = config, length, length * config.vocab_size * config.widths[0]
    for level, rule in enumerate(c.rules):
        width, below = c.widths[level : level + 2]
        total += 2 * c.depths[level] * plain_layer(c, width, room) * room
        room = rule.slots(room)
        total += (1 + c.places[level]) * width * below * room
    return 6 * (total + c.n_layers * plain_layer(c, c.d_model, room) * room) // length


def of_hnet(model, length):
    """Layers of bytes, a router and a residual projection pass each position of a stage, and there is room for so many chunks of it."""
    c, room, total = model.config, length, 2 * length * model.config.vocab_size * model.config.widths[0]
    for level, width in enumerate(c.widths[:-1]):
        outer, slots = model.outer[level], min(room, 17 + int((room - 1) * 1.25 / c.target))
        blocks = [module for side in (outer.down, outer.up) for module in side.modules()]
        total += sum(of_module(module, room) for module in blocks) + 2 * 3 * width * width * room
        assert slots <= ssd.CHUNK
        total += (
            2 * slots * slots * width
        )  # the smoothing of what comes back, in one chunk; scores of one number are no products
        room = slots
    total += 2 * c.n_layers * plain_layer(c, c.d_model, room) * room
    return 3 * total // length


def of_blt(config, length):
    """A byte passes the local layers, and one in `patch_size` bytes, of `static` patches, the latent ones. Scores of cross-attention are no
    matrix products."""
    c, d, w = config, config.d_model, config.local_width
    patches = c.rule.slots(length)
    assert patches == 2 + int((length - 2) // c.patch_size)
    per_byte = (c.encoder_layers + c.decoder_layers) * (plain_layer(c, w, length) + 2 * w * w) + c.vocab_size * w
    per_patch = c.n_layers * plain_layer(c, d, patches) + w * d + d * d
    per_patch += (c.encoder_layers + c.decoder_layers) * c.sub_vectors * 2 * w * w
    return 6 * (per_byte * length + per_patch * patches) // length


def of_module(module, length):
    """Forward, of what the module itself multiplies."""
    if isinstance(module, nn.Linear):
        return 2 * length * module.weight.numel()
    if isinstance(module, LowRank):
        return 2 * length * (module.A.numel() + module.B.numel())
    if isinstance(module, PlainAttention):
        return 4 * length * length * module.rows["query"]
    if isinstance(module, Mamba2Mixer):
        return of_ssd(length, module.heads, module.head_dim, module.groups, module.state_size)
    if isinstance(module, TimeMixFinal):
        size = len(module.bonus) // module.heads
        return of_delta_rule(length, module.heads, size, size)
    if isinstance(module, DeltaMixer):
        keys, values = (module.widths[name] // module.heads for name in ("key", "value"))
        return of_delta_rule(length, module.heads, keys, values)
    return 0


def of_ssd(length, heads, width, groups, states):
    size = min(ssd.CHUNK, length)
    chunks = -(-length // size)
    within = chunks * size * size * (groups * states + heads * width)
    return 2 * (within + 2 * (chunks - 1) * size * heads * width * states)


def of_delta_rule(length, heads, keys, values):
    """Of one decay per head, or bounded ones. A triangular system costs half a product."""
    size = min(delta_rule.CHUNK, 1 << (length - 1).bit_length())
    chunks = -(-length // size)
    between, inner = chunks - 1, max(0, chunks - 2)  # chunks that add to a state, that a state passes through
    square = size * size
    within = chunks * (4 * square * keys + 3 * square * values + square * (values + keys) / 2)
    passing = between * (4 * size * keys * values + square * values)
    factors = inner * (size * keys * keys + values * keys * keys)
    return round(2 * heads * (within + passing + factors))
