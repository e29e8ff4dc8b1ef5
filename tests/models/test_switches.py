"""Two hundred random combinations of the decoder's switches, each held to the contract of the zoo."""

import copy
import random
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from conftest import beyond

from models.base import Cache
from models.transformer import Transformer
from models.transformer_config import CHOICES, MEANT_FOR, TransformerConfig

VOCAB, B, T = 61, 2, 20
SWITCHES = {
    **{name: tuple(values) for name, values in CHOICES.items() if name != "kernels"},  # liger: test_liger.py
    "attention_kernel": ("torch", "sdpa"),
    "bias": (False, True),
    "qk_norm": (False, True),
    "rope_fraction": (1.0, 0.5),
    "rope_factor": (1.0, 2.0),
    "rope_original_context": (0, 16),
    "rope_local_theta": (0.0, 100.0),
    "rope_mscale_all_dim": (0.0, 1.0),
    "n_kv_heads": (0, 2, 1),
    "window": (0, 5, 16),
    "window_pattern": ("", "SL", "SSSL"),
    "attention_softcap": (0.0, 5.0),
    "forget_gate": (False, True),
    "kv_shift": (False, True),
    "value_residual": (False, True),
    "value_embeddings": (0, 1),
    "q_rank": (0, 8),
    "pattention": ("", "mlp", "qkv,out,mlp"),
    "pattention_slots": (0, 12),
    "n_streams": (1, 3),
    "x0_skip": (False, True),
    "unet_skips": (False, True),
    "tied": (False, True),
    "unpadded_vocab": (0, VOCAB - 3),
    "embedding_scale": (False, True),
    "final_softcap": (0.0, 10.0),
    "z_loss": (0.0, 1e-3),
    "neftune_alpha": (0.0, 0.1),
    "dropout": (0.0, 0.3),
    "n_predict": (1, 3),
    "share_unembedding": (True, False),
    "zero_init": (False, True),
    "mup": (False, True),
    "mup_base_width": (8, 64),
    "mup_base_depth": (3, 2),
    "mup_base_head_dim": (0, 4),
}


def random_config(seed):
    """A valid combination; each switch is thrown with a probability of its own draw, so that few and many are met."""
    draw = random.Random(seed)
    while True:
        eagerness = draw.random()
        choices = {name: draw.choice(values) for name, values in SWITCHES.items() if draw.random() < eagerness}
        drawn = SimpleNamespace(**{**asdict(TransformerConfig()), **choices})
        idle = {name for names, (_, has_meaning) in MEANT_FOR.items() if not has_meaning(drawn) for name in names}
        choices = {name: value for name, value in choices.items() if name not in idle}
        try:
            return TransformerConfig(
                vocab_size=VOCAB, d_model=32, n_layers=3, n_heads=4, max_context=64, hidden_multiple=8, **choices
            )
        except ValueError as error:
            assert str(error).count("\n") == 0


def build(config, seed=0):
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def stirred(config):
    """A model whose weights are no longer the initial ones: nothing is zero, one or the same as something else by design."""
    model = build(config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(params=beyond(range(100), range(200)))
def config(request):
    return random_config(request.param)


def draw_tokens(seed):
    return torch.randint(VOCAB - 3, (B, T), generator=torch.Generator().manual_seed(seed))


def distance(a, b):
    """Largest difference; where both are -inf there is none."""
    return (a - b).nan_to_num(0).abs().max().item() if torch.equal(a.isinf(), b.isinf()) else float("inf")


def test_random_switches_meet_the_contract(config):
    built = build(config)
    assert all(tensor.isfinite().all() for tensor in built.state_dict().values())
    assert Transformer.count_parameters(config) == sum(p.numel() for p in built.parameters())
    names = [name for group in built.parameter_groups().values() for name in group]
    assert sorted(names) == sorted(dict(built.named_parameters()))
    assert built.tied_embedding() == config.tied

    model, tokens, targets = stirred(config), draw_tokens(1), draw_tokens(2)
    output = model(tokens, targets)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name

    model.eval()
    with torch.no_grad():
        logits = model(tokens).logits
        output = model(tokens, targets)
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        assert abs(output.loss - sum((output.parts or {}).values()) - expected) < 1e-4
        check_causality(model, tokens, logits)
        check_documents(model, tokens)
        check_cache(model, tokens, logits)
        other = build(config, seed=1)
        other.load_state_dict(copy.deepcopy(model.state_dict()))
        assert torch.equal(other.eval()(tokens).logits, logits)


def check_causality(model, tokens, logits):
    for j in (1, T // 2, T - 1):
        changed = tokens.clone()
        changed[:, j] = (changed[:, j] + 1) % (VOCAB - 3)
        perturbed = model(changed).logits
        assert torch.equal(perturbed[:, :j], logits[:, :j])
        assert not torch.equal(perturbed[:, j:], logits[:, j:])


def check_documents(model, tokens):
    """Logits of this size: fp32 sums of 20 terms in another order, through 3 layers."""
    lengths = [6, 1, T - 7]
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).expand(B, T)
    packed, start = model(tokens, documents=documents).logits, 0
    for length in lengths:
        alone = model(tokens[:, start : start + length]).logits
        assert distance(packed[:, start : start + length], alone) < 1e-4 * max(1, alone[alone.isfinite()].abs().max())
        start += length


def check_cache(model, tokens, logits):
    for chunks in ([1] * T, [7, *[1] * 4, T - 11]):
        cache = Cache()
        decoded = torch.cat([model(part, cache=cache).logits for part in tokens.split(chunks, dim=1)], dim=1)
        assert distance(decoded, logits) < 1e-4 * max(1, logits[logits.isfinite()].abs().max())
