"""model.mup: at the base nothing changes, coordinates stay flat, and the multipliers go wherever the weights go."""

from dataclasses import replace

import pytest
import torch
from conftest import trainer
from test_switches import draw_tokens, stirred
from test_transformer import PRESETS, small
from torch import nn

from models.base import get_model
from models.hugging_face import family_of
from models.hugging_face_export import native
from models.lora import with_lora
from models.materialise import materialise
from models.mup import Multipliers, folded_config
from models.presets import Gpt2, Llama
from models.transformer_config import TransformerConfig
from trainer.commands.check import CoordinatesConfig, coordinates
from trainer.core.errors import UserError
from trainer.engine.meta import build_meta
from trainer.testing.coordinates import HIGHEST, LOWEST, Growth, Trial

TINY = {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
# mup_base_width a quarter of d_model, mup_base_depth half of n_layers, heads twice as wide as the base's.
GROWN = {"mup": True, "mup_base_width": 8, "mup_base_depth": 1, "mup_base_head_dim": 4}


def drawn(model_class, config):
    return materialise(build_meta(model_class, config), torch.device("cpu"), torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", PRESETS)
def test_at_the_base_nothing_changes(name):
    """Bit for bit, and no group of parameters is treated in another way."""
    depth = 6 if name == "modded" else 2
    choices = TINY | {"n_layers": depth, "embedding_scale": True}
    config = get_model(name).Config(**choices)
    base = replace(config, mup=True, mup_base_width=32, mup_base_depth=depth)
    ours, theirs = drawn(get_model(name), base), drawn(get_model(name), config)
    assert ours.transfers() == {} and base.multipliers == Multipliers()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert torch.equal(ours(draw_tokens(1)).logits, theirs(draw_tokens(1)).logits)


def test_every_multiplier_is_where_it_belongs():
    """Without mup, weights that hold the multipliers compute the same: tied, with further heads, and in the fused loss too."""
    config = small(**GROWN, embedding_scale=True, n_predict=2, z_loss=1e-3)
    model, plain = stirred(config), stirred(folded_config(config))
    plain.load_state_dict(model.state_dict())
    assert model.layers[0].attention.heads.scale == pytest.approx(8**-0.5 * 2**-0.5)
    with torch.no_grad():
        plain.embedding.weight.mul_((8 / 32) ** 0.5)  # embedding_scale is sqrt(8), not sqrt(32)
        for head in (plain.norm, plain.further[0].norm):  # the head is the embedding's matrix, which has just changed
            head.weight.mul_(8 / 32 / (8 / 32) ** 0.5)
        for block in plain.layers:
            for end in block.residual_projections():
                end.weight.mul_(1 / 3)
            block.attention.qkv.weight[: config.n_heads * config.head_width].mul_(2**-0.5)
    tokens, targets = draw_tokens(1), draw_tokens(2)
    torch.testing.assert_close(model(tokens).logits, plain(tokens).logits, rtol=1e-4, atol=1e-5)
    for ours, theirs in ((model(tokens, targets), plain(tokens, targets)),):
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-6)
        assert ours.parts["head_2"] == pytest.approx(theirs.parts["head_2"].item(), rel=1e-5)
    hidden = model.hidden(tokens)
    expected = nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), targets.flatten(), reduction="none")
    torch.testing.assert_close(model.nll(hidden, targets).flatten(), expected, rtol=1e-4, atol=1e-5)


def test_initial_weights_over_the_size():
    """Hidden matrices shrink as 1 / sqrt(width), embedding and head do not; ends of branches have the depth of the base."""
    std = {}
    for width, depth in ((64, 2), (256, 8)):
        config = Llama.Config(vocab_size=512, d_model=width, n_heads=4, n_layers=depth, mup=True, mup_base_width=64)
        std[width] = {name: one.std().item() for name, one in drawn(Llama, config).named_parameters() if one.ndim == 2}
    # A std of n numbers is known to 1 / sqrt(2 n): here at most 1.1 %, so four of these.
    same = 0.045
    for name, found in std[64].items():
        kept = 1 if name in ("embedding.weight", "head.weight") else 2
        assert std[256][name] * kept == pytest.approx(found, rel=same), name
    assert std[64]["layers.0.mlp.out.weight"] == pytest.approx(0.02 / (2 * 2) ** 0.5, rel=same)


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"attention": "latent"}, "mup cannot be used with latent attention"),
        ({"init": "mitchell"}, "init must be gpt2 or normal with mup, not 'mitchell'"),
        ({"residual": "weighted", "mup_base_depth": 2}, r"mup_base_depth must be n_layers \(3\) with residual"),
        (
            {"x0_skip": True, "unet_skips": True, "mup_base_depth": 2},
            r"mup_base_depth must be n_layers \(3\) with x0_skip and unet_skips",
        ),
        ({"attention": "differential", "mup_base_head_dim": 4}, "mup_base_head_dim must be that of the model"),
        ({"mup": False, "mup_base_width": 8}, "mup_base_width has a meaning only with mup"),
    ],
)
def test_what_has_no_rule_is_refused(changes, why):
    with pytest.raises(ValueError, match=f"^{why}"):
        small(**{"mup": True, **changes})


@pytest.mark.parametrize("changes", [{"residual": "weighted"}, {"x0_skip": True, "unet_skips": True}])
def test_learned_mixing_has_its_own_depth_as_base(changes):
    config = small(mup=True, **changes)
    assert (config.inferred()["mup_base_depth"], config.multipliers.depth) == (3, 1)


# -- coordinates -------------------------------------------------------------------------------------------------------

WIDTHS, DEPTHS, LR = (32, 128), (2, 8), 2**-8


def slopes(name, base, optim=None, depths=DEPTHS, **model):
    trial = Trial({"name": name, **model}, {"lr": LR, **(optim or {})}, 4, (0,), 16, base)
    over_depth = trial.over_depths(depths, WIDTHS[0]).slopes() if len(depths) > 1 else {}
    return trial.over_widths(WIDTHS, depths[0]).slopes(), over_depth


def flat(found):
    return all(LOWEST < slope < HIGHEST for slope in found.values())


def test_a_slope_is_the_power_of_growth():
    sizes = [2, 8, 16, 64]
    found = Growth(sizes, {"a": [3 * size**0.5 for size in sizes], "b": [0.1] * 4}).slopes()
    assert found == pytest.approx({"a": 0.5, "b": 0.0}, abs=1e-12)


@pytest.mark.parametrize("name", PRESETS)
def test_coordinates_stay_flat_over_width_and_depth(name):
    depths = (6,) if name == "modded" else DEPTHS  # its skips have no rule over depth
    over_width, over_depth = slopes(name, (WIDTHS[0], depths[0]), depths=depths)
    assert flat(over_width) and flat(over_depth), (over_width, over_depth)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_coordinates_grow_without_it(name):
    over_width, over_depth = slopes(name, None)
    assert all(slope > 2 * HIGHEST for slope in over_width.values()), over_width
    assert over_depth["last block"] > slopes(name, (32, 2))[1]["last block"] + 0.1, over_depth


@pytest.mark.parametrize(
    "optim", [{"name": "muon"}, {"name": "muon", "settings": {"scale": "spectral"}, "lr": 2**-6}, {"name": "lion"}]
)
def test_other_rules_follow_by_their_own_power(optim):
    over_width, over_depth = slopes("llama", (32, 2), optim)
    assert flat(over_width) and flat(over_depth), (over_width, over_depth)


def test_scores_stay_flat_where_heads_grow():
    """Two heads at each width. With 1 / sqrt(head) the scores that have learned grow as sqrt(head)."""
    found = {}
    for base_head in (16, 0):
        model = {"name": "llama", "mup_base_head_dim": base_head}
        trials = {width: Trial(model, {"lr": 2**-5}, 16, (0,), width // 2, (32, 2)) for width in WIDTHS}
        means = [trial.at(width, 2)["scores 2"] for width, trial in trials.items()]
        found[base_head] = Growth(list(WIDTHS), {"scores": means}).slopes()["scores"]
    assert LOWEST < found[16] < HIGHEST < found[0], found


def test_the_verb_writes_a_picture_and_says_what_grows(tmp_path, capsys, monkeypatch):
    out = tmp_path / "coordinates.png"
    config = CoordinatesConfig(
        model={"name": "gpt2"}, widths=[32, 128], depths=[2], steps=4, seeds=1, lr=LR, out=str(out)
    )
    coordinates.run(config)
    said = capsys.readouterr().out
    assert out.read_bytes().startswith(b"\x89PNG")
    assert said.count("ok       mup") == said.count("grows    standard") == 5 and "FAILED" not in said
    monkeypatch.setattr(Multipliers, "output", 1.0)  # the mean of logits then grows
    with pytest.raises(SystemExit):
        coordinates.run(config)
    assert "FAILED   mup        logits" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"model": {"name": "hlb"}}, "model.name: hlb has no mup: its recipe has laws"),
        ({"model": {"name": "nobody"}}, "model.name: 'nobody' is not known"),
        ({"model": {"d_model": 64}}, "model.d_model: the check sets it itself"),
        ({"widths": [64, 32]}, "widths: 64 32: give sizes from the smallest to the largest"),
        ({"widths": [64]}, "widths: a slope needs two"),
        ({"widths": [32, 40]}, "widths: each must be a multiple of head_width, 16"),
        ({"optimizer": "soap"}, "optim.name: no rule is known"),
        ({"out": "/nowhere/at/all.png"}, "out: there is no folder /nowhere/at"),
    ],
)
def test_the_verb_refuses_what_it_cannot_compare(changes, why, tmp_path):
    with pytest.raises(UserError, match=f"^{why}"):
        coordinates.run(CoordinatesConfig(**{"out": str(tmp_path / "a.png"), "steps": 0, "seeds": 1, **changes}))


@pytest.mark.parametrize(
    "lr, why",
    [(1e3, "lr, steps: scores . is 0 after 4 steps at width 32"), (1e30, "lr: .* is not finite after 4 steps")],
)
def test_activations_that_have_no_logarithm_are_an_error_of_one_line(lr, why, tmp_path):
    config = CoordinatesConfig(widths=[32, 64], depths=[2], steps=4, seeds=1, lr=lr, out=str(tmp_path / "a.png"))
    with pytest.raises(UserError, match=f"^{why}"):
        coordinates.run(config)
    assert not (tmp_path / "a.png").exists()


# -- where the weights go ----------------------------------------------------------------------------------------------

HF = {
    "llama": (Llama, Llama.Config(**TINY, **GROWN, d_hidden=48)),
    "llama-tied": (Llama, Llama.Config(**TINY, **GROWN, d_hidden=48, tied=True, attention_bias="all")),
    "qwen3": (Llama, Llama.Config(**TINY, **GROWN, d_hidden=48, qk_norm=True)),
    "gpt2": (Gpt2, Gpt2.Config(**{**TINY, "n_kv_heads": 0}, **GROWN, max_context=32)),
}


@pytest.mark.parametrize("kind", HF)
def test_transformers_classes_get_the_multipliers_in_their_weights(kind):
    model_class, config = HF[kind]
    model = drawn(model_class, config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.3)
    found, why = native(model_class, config)
    assert found is not None, why
    theirs = dict(pair for name, value in model.state_dict().items() for pair in found.convert(name, value))
    family, back = family_of(found.config)
    assert not back.mup
    again = drawn(get_model(family.name), back).eval()
    again.load_state_dict(dict(family.weights(again, theirs)), strict=False)
    logits = model(draw_tokens(1)).logits
    torch.testing.assert_close(again(draw_tokens(1)).logits, logits, rtol=1e-4, atol=1e-4)
    assert logits.std() > 0.1, "logits this small would agree by themselves"


def test_adapters_have_no_width_rule():
    adapted = with_lora(Llama)
    model = build_meta(adapted, adapted.Config(**TINY, **GROWN, lora_rank=2))
    assert model.multipliers() is None and model.transfers() == {}
    assert model.head_scale == 0.25, "but the model computes as it was trained"


@pytest.mark.slow
def test_the_contract_holds_with_mup():
    """Also cached decoding, and two steps on every strategy give the losses of one device."""
    done = trainer("check", "--model.name", "llama", "--model.mup", "true", "--model.mup_base_width", "64")
    assert done.returncode == 0 and ", 0 FAILED, " in done.stdout, done.stdout + done.stderr


def test_an_older_config_has_no_mup():
    assert not TransformerConfig().mup and Llama.Config(**TINY).multipliers == Multipliers()
