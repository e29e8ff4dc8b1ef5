"""BLT's parts against those of transformers' `blt`, with random weights, where its code computes what the paper says.

It differs in these points, so that whole models cannot be compared: n-grams are hashed with the first power on the oldest byte, those that
begin before the text are zeros and not left out, and the sum of embeddings is not divided; vectors of patches begin with what an encoder
layer made of the bytes, and not with the bytes; both the module of cross-attention and its caller add the residual. The tests reverse
the n-grams, and take away or double what is added twice.
"""

import pytest
import torch
from conftest import text_only_transformers

from models.blt import Blt, BltConfig
from models.layers.causal import Context
from models.layers.ngrams import ngram_hash
from models.layers.patching import cut
from models.layers.positions import to_interleaved
from models.materialise import materialise
from trainer.engine.meta import build_meta

LENGTH, VECTORS, HEADS = 24, 2, 2  # heads of local layers
SIZES = {"d_model": 32, "n_heads": 4, "n_layers": 1, "decoder_layers": 3, "hash_size": 50, "sub_vectors": VECTORS}


@pytest.fixture(scope="module")
def theirs():
    with pytest.MonkeyPatch.context() as patch:
        text_only_transformers(patch)
        return pytest.importorskip("transformers.models.blt.modeling_blt", reason="needs transformers 4.57 or newer")


@pytest.fixture(scope="module")
def model():
    """norm_eps is so small that norms do not feel a doubled stream."""
    config = BltConfig(**SIZES, patching="space", local_window=LENGTH, norm_eps=1e-12)
    model = materialise(build_meta(Blt, config), torch.device("cpu"), torch.Generator().manual_seed(0)).eval()
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=draw)
    return model


@pytest.fixture(scope="module")
def tokens():
    return torch.tensor([list(b"one two, three four five"), list(b"a bc  def, g h ijklm no.")])


def of_decoder(theirs, layers):
    """transformers' config of the local decoder."""
    from transformers.models.blt.configuration_blt import BltLocalDecoderConfig

    sizes = {"hidden_size": 16, "hidden_size_global": 32, "cross_attn_k": VECTORS, "num_attention_heads": HEADS}
    others = {"intermediate_size": 32, "num_hidden_layers": layers, "rms_norm_eps": 1e-12, "rope_theta": 500_000.0}
    return BltLocalDecoderConfig(**sizes, **others, attn_implementation="eager")


@torch.no_grad()
def load_cross(into, own, scale=1.0):
    """transformers' cross-attention gets the weights of ours, its output times `scale`."""
    into.q_norm.weight.copy_(own.query_norm.weight)
    into.k_norm.weight.copy_(own.byte_norm.weight)
    into.q_proj.weight.copy_(own.query.weight)
    for matrix, part in zip((into.k_proj, into.v_proj), own.kv.weight.chunk(2), strict=True):
        matrix.weight.copy_(part)
    into.o_proj.weight.copy_(scale * own.out.weight)


@torch.no_grad()
def load_layer(into, own, scale):
    """The same for a layer of bytes, whose pairs of rotary channels are neighbours there."""
    into.input_layernorm.weight.copy_(own.attention_norm.weight)
    into.post_attention_layernorm.weight.copy_(own.mlp_norm.weight)
    q, k, v = own.attention.qkv.weight.chunk(3)
    for name, weight in (("q", to_interleaved(q, HEADS)), ("k", to_interleaved(k, HEADS)), ("v", v)):
        getattr(into.self_attn, f"{name}_proj").weight.copy_(weight)
    into.self_attn.o_proj.weight.copy_(scale * own.attention.out.weight)
    for matrix, part in zip((into.mlp.gate_proj, into.mlp.up_proj), own.mlp.up.weight.chunk(2), strict=True):
        matrix.weight.copy_(part)
    into.mlp.down_proj.weight.copy_(scale * own.mlp.out.weight)


def test_hashes_are_those_of_reversed_ngrams(theirs, tokens):
    for n in (3, 5, 8):
        found = theirs.rolling_polynomial_hash(tokens.unfold(1, n, 1).flip(-1))
        assert torch.equal(ngram_hash(tokens, n)[:, n - 1 :], found)


@torch.no_grad()
def test_vectors_of_patches_attend_to_the_same_bytes(theirs, model, tokens):
    patches, own = cut(tokens, model.config.rule), model.encoder[0].cross
    slots = int(patches.ids.max()) + 1
    draw = torch.Generator().manual_seed(2)
    x, vectors = (torch.randn(2, count, 16, generator=draw) for count in (LENGTH, slots * VECTORS))
    found = own(
        vectors.unflatten(1, (slots, VECTORS)), own.keys_and_values(x, Context(), LENGTH), patches.ids, patches.ids >= 0
    )
    attention = theirs.BltCrossAttention(of_decoder(theirs, 1), 0)
    load_cross(attention, own)
    mask = theirs._prepare_patch_cross_attention_mask(patches.ids, slots, LENGTH, True, VECTORS)
    expected, _ = attention(vectors, x, attention_mask=mask)
    filled = torch.stack([(patches.ids == i).any(1) for i in range(slots)], 1).repeat_interleave(VECTORS, 1)
    assert filled.sum() > 15
    torch.testing.assert_close(found.flatten(1, 2)[filled], (expected - vectors)[filled], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_decoder_is_the_same_but_for_the_doubled_residual(theirs, model, tokens):
    """Each cross-attention there doubles the stream, which norms do not feel: with what is added doubled as often, the end is the same."""
    patches, layers = cut(tokens, model.config.rule), model.decoder
    slots = int(patches.last.max()) + 1
    draw = torch.Generator().manual_seed(3)
    x, outputs = torch.randn(2, LENGTH, 16, generator=draw), torch.randn(2, slots, 32, generator=draw)
    context, states = model.context(tokens, None, None), x
    for layer in layers:
        states = layer(states, model.unpool(outputs).unflatten(-1, (VECTORS, -1)), patches.last, None, context)
    decoder = theirs.BltLocalDecoder(of_decoder(theirs, len(layers))).eval()
    decoder.patch_embedding_projection.weight.copy_(model.unpool.weight)
    decoder.norm.weight.copy_(model.norm.weight)
    for i, layer in enumerate(layers):
        load_cross(decoder.cross_attn_layers[i], layer.cross, scale=2.0 ** (i + 1))
        load_layer(decoder.layers[i], layer.layer, scale=2.0 ** (i + 1))
    causal = torch.full((LENGTH, LENGTH), torch.finfo(torch.float32).min).triu(1)[None, None]
    mask = theirs._prepare_patch_cross_attention_mask(patches.last, slots, LENGTH, False, VECTORS)
    found = decoder(inputs_embeds=x, patch_embeds=outputs, attention_mask=causal, encoder_attention_mask=mask)
    found = found if isinstance(found, torch.Tensor) else found[0]
    torch.testing.assert_close(model.norm(states), found, rtol=1e-4, atol=1e-4)
