"""Training FLOPs of the hierarchical models by formula: 2 per multiply-add, three times the forward pass."""

from torch import nn


def of_hierarchical(model, length):
    """Per token of a sequence of `length`, rounded down."""
    count = {"MegaByte": of_megabyte, "Ftp": of_ftp, "Hourglass": of_hourglass}[type(model).__name__]
    return 3 * count(model, length) // length


def weights(*modules):
    return sum(part.weight.numel() for module in modules for part in module.modules() if isinstance(part, nn.Linear))


def attention(queries, keys, width):
    """Scores and sums of values."""
    return 4 * queries * keys * width


def of_megabyte(model, length):
    c = model.config
    patches, size = -(-length // c.patch_size), c.patch_size
    large = patches * weights(model.global_layers, model.to_local) + (patches - 1) * weights(model.patch_embedder)
    small = patches * size * weights(model.layers)
    scores = c.n_layers * attention(patches, patches, c.d_model) + patches * c.locals * attention(size, size, c.local)
    return 2 * (large + small + length * c.vocab_size * c.local) + scores


def of_ftp(model, length):
    c, d = model.config, model.config.d_model
    size, head = c.predict_tokens, c.vocab_size * d
    kv = sum(block.cross.kv.weight.numel() for block in model.layers)
    others = weights(model.layers) - kv
    if c.chunked:
        chunks = -(-length // size)
        read = (chunks - 1) * size
        products = read * weights(model.encoder) + (chunks + 1) * model.expand.weight.numel()
        products += chunks * (size * others + (size + 1) * kv) + length * head
        scores = c.n_layers * attention(read, read, d) + chunks * c.decoders * attention(size, 2 * size + 1, d)
        return 2 * products + scores
    starts, slots = -(-length // c.every) if size > 1 else 0, c.pseudo_tokens
    tokens = length + starts * size
    products = length * weights(model.encoder) + (length + starts) * (model.expand.weight.numel() + slots * kv)
    products += tokens * others + (length + starts * (size - 1)) * head
    own = length + starts * size * size
    scores = c.n_layers * attention(length, length, d) + c.decoders * 4 * d * (own + tokens * slots)
    return 2 * products + scores


def of_hourglass(model, length):
    c, d, last = model.config, model.config.d_model, len(model.config.path) - 1
    total, fine = 2 * length * c.vocab_size * d, length
    for level, (blocks, _) in enumerate(c.path[: last // 2 + 1]):
        blocks += c.path[last - level][0] if 2 * level < last else 0
        total += blocks * (2 * fine * weights(model.layers[0]) + attention(fine, fine, d))
        if 2 * level < last:
            down, up = model.shorten[level], model.upsample[level]
            coarse = -(-fine // down.k)
            total += 2 * coarse * sum(m.matrix.weight.numel() for m in (down, up) if m.matrix is not None)
            for part, queries, keys in ((down, coarse, fine), (up, fine, coarse)):
                if part.attention is not None:
                    own = weights(part.attention.query, part.attention.out, part.mlp)
                    total += 2 * (queries * own + keys * weights(part.attention.kv)) + attention(queries, keys, d)
            fine = coarse
    return total
