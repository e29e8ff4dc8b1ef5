"""What DeepSpeed is told, and contradictions between a user's deepspeed.json and the run's config."""

import json
import os

import pytest

from trainer.core.config import RunConfig
from trainer.core.errors import UserError
from trainer.core.settings import build
from trainer.engine.deepspeed_config import deepspeed_settings
from trainer.planning.memory import BUCKET


def settings(tmp_path=None, theirs=None, strategy="zero2", precision="fp32", clip=1.0, **engine):
    if theirs is not None:
        path = tmp_path / "deepspeed.json"
        path.write_text(theirs if isinstance(theirs, str) else json.dumps(theirs))
        engine["deepspeed_config"] = str(path)
    values = {"precision": precision, "optim": {"clip_norm": clip}, "engine": {"strategy": strategy, **engine}}
    return deepspeed_settings(build(RunConfig, values))


def test_own_settings():
    fp32 = settings()
    offload = {"offload_optimizer": {"device": "none"}}
    told = {"stage": 2, "compute_grad_norm": True, "round_robin_gradients": False, "reduce_bucket_size": BUCKET}
    assert fp32["zero_optimization"] == told | offload and fp32["gradient_allreduce_op"] == "mean"
    assert fp32["gradient_clipping"] == 1.0 and fp32["bf16"] == {"enabled": False}
    assert fp32["train_micro_batch_size_per_gpu"] == fp32["gradient_accumulation_steps"] == 1
    bf16 = settings(precision="bf16", offload=True)
    assert bf16["bf16"] == {"enabled": True, "check_grad_overflow": True} and bf16["data_types"] == {
        "grad_accum_dtype": "fp32"
    }
    assert bf16["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}


def test_stage_zero_computes_bf16_by_autocast_and_leaves_clipping_to_us():
    given = settings(strategy="zero0", precision="bf16")
    assert given["bf16"] == {"enabled": False} and given["torch_autocast"]["dtype"] == "bfloat16"
    assert given["gradient_clipping"] == 0.0


def test_a_users_own_settings_are_kept(tmp_path):
    theirs = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": 1,
        "fp16": {"enabled": False},
        "optimizer": None,
        "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 1000},
        "wall_clock_breakdown": False,
    }
    given = settings(tmp_path, theirs)
    assert given["zero_optimization"]["reduce_bucket_size"] == 1000
    assert given["zero_optimization"]["overlap_comm"] is True
    assert given["train_micro_batch_size_per_gpu"] == 1 and given["gradient_clipping"] == 1
    assert "optimizer" not in given and "fp16" not in given


@pytest.mark.parametrize(
    "theirs, expected",
    [
        ({"zero_optimization": {"stage": 3}}, "says zero_optimization.stage 3, but by the run's config it is 2; change engine.strategy"),
        ({"gradient_clipping": 0.5}, "says gradient_clipping 0.5, .* it is 1.0; change optim.clip_norm"),
        ({"bf16": {"enabled": True}}, "says bf16.enabled true, .* it is false; change precision"),
        ({"gradient_accumulation_steps": 4}, "sets gradient_accumulation_steps, but microbatches follow from"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "change engine.offload"),
        ({"optimizer": {"type": "AdamW"}}, "sets optimizer, but the optimizer is optim.name; remove it there"),
        ({"fp16": {"enabled": True}}, "sets fp16, but the number format is `precision`"),
        ({"zero_optimization": {"round_robin_gradients": True}}, "round_robin_gradients true, .* it is false; remove it there"),
        ({"gradient_allreduce_op": "sum"}, 'gradient_allreduce_op "sum", .* it is "mean"; remove it there'),
        ({"train_batch_size": 32}, "sets train_batch_size, but the batch is batch.tokens_per_step"),
        ("{", "is not valid JSON"),
        ("[]", "holds no JSON object"),
    ],
)  # fmt: skip
def test_contradictions_are_one_line(tmp_path, theirs, expected):
    with pytest.raises(UserError, match=expected) as caught:
        settings(tmp_path, theirs)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("engine.deepspeed_config: ")


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match="nowhere.json: cannot be read: No such file"):
        settings(deepspeed_config=str(tmp_path / "nowhere.json"))


@pytest.mark.parametrize(
    "theirs, expected",
    [
        ('{"a": ' * 100 + "1" + "}" * 100, "more than 32 levels"),
        ('{"a": ' * 100_000, "is not valid JSON"),
        ('{"gradient_clipping": 1, "gradient_clipping": 2}', "a key occurs twice"),
        ('{"a": ' + "1" * 5000 + "}", "is not valid JSON"),
    ],
)
def test_an_extreme_file_is_one_line(tmp_path, theirs, expected):
    with pytest.raises(UserError, match=f"engine.deepspeed_config: .*{expected}"):
        settings(tmp_path, theirs)


def test_what_is_no_file_is_refused_before_it_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", str(tmp_path / "pipe")):
        with pytest.raises(UserError, match="is a pipe or a device"):
            settings(deepspeed_config=path)
    with pytest.raises(UserError, match="engine.deepspeed_config: is empty"):
        settings(deepspeed_config="")


@pytest.mark.parametrize("section", ["bf16", "zero_optimization"])
def test_a_section_must_be_one(tmp_path, section):
    with pytest.raises(UserError, match=f"{section} is not a section"):
        settings(tmp_path, {section: True})


def test_nothing_may_switch_off_the_look_for_nan(tmp_path):
    with pytest.raises(UserError, match="check_grad_overflow false"):
        settings(tmp_path, {"bf16": {"check_grad_overflow": False}}, precision="bf16")
    with pytest.raises(UserError, match="compute_grad_norm false"):
        settings(tmp_path, {"zero_optimization": {"compute_grad_norm": False}})


def test_stage_zero_agrees_with_a_file_that_says_what_the_config_says(tmp_path):
    theirs = {"gradient_clipping": 1.0, "bf16": {"enabled": True}, "gradient_accumulation_steps": 1}
    given = settings(tmp_path, theirs, strategy="zero0", precision="bf16")
    assert given["gradient_clipping"] == 0.0 and given["bf16"] == {"enabled": False}
