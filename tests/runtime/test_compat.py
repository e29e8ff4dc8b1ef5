"""Private names of torch and DeepSpeed: each is there as we use it, on the torch that is installed."""

import importlib.metadata
import importlib.util
import re

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT

from models.layers import flex
from models.layers.compat import raise_recompile_limit, scaled_product
from trainer.core.errors import UserError
from trainer.runtime import compat

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


@pytest.mark.parametrize("entry", compat.TORCH, ids=lambda entry: entry.name)
def test_torch_has_what_we_use(entry):
    assert compat.probe(entry) == ""


@pytest.mark.slow
@pytest.mark.skipif(not HAS_DEEPSPEED, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("entry", compat.DEEPSPEED, ids=lambda entry: entry.name)
def test_deepspeed_has_what_we_use(entry):
    assert compat.probe(entry) == ""


def test_an_attribute_that_deepspeed_no_longer_has_is_told_in_one_line():
    class Optimizer:
        parameter_offload = 3

    assert compat.deepspeed_attribute(Optimizer(), "parameter_offload") == 3
    with pytest.raises(UserError, match="deepspeed.*: has no Optimizer.ds_tensor, which engine.strategy zero3 needs; "):
        compat.deepspeed_attribute(Optimizer(), "ds_tensor")


@pytest.mark.parametrize("module", ["torch._no_such_module", "torch._dynamo"])
def test_what_is_not_there_is_told_in_one_line(module, monkeypatch):
    monkeypatch.setitem(compat._BY_NAME, "gone", compat.Private(module, "gone", "engine.compile"))
    with pytest.raises(
        UserError,
        match=rf"^torch {re.escape(importlib.metadata.version('torch'))}: has no {module}.gone, which engine.compile",
    ):
        compat.private("gone")


def test_another_signature_is_found():
    entry = compat.TORCH[0]._replace(arguments=("no_such_argument",))
    assert "FakeTensorMode has no argument no_such_argument, which the memory estimate needs" in compat.probe(entry)
    assert "has no argument alpha" in compat.probe(compat.Private("torch", "_fused_adamw_", "AdamW", ("alpha",)))


def test_names_are_told_apart():
    assert len(compat._BY_NAME) == len(compat.TORCH) + len(compat.DEEPSPEED)


def test_fake_tensors_know_autocast():
    with compat.fake_tensors(), torch.autocast("cpu", torch.bfloat16):
        assert (torch.ones(2, 3) @ torch.ones(3, 2)).dtype == torch.bfloat16


def test_a_shard_is_not_copied():
    with compat.pretended_process_group(rank=1, size=2):
        mesh = dist.init_device_mesh("cpu", (2,))
        from torch.distributed.tensor import Shard, distribute_tensor

        whole = distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)], src_data_rank=None)
        values = torch.zeros(2, 3, dtype=torch.bfloat16)
        shard = compat.as_shard(values, whole)
        assert shard.to_local().data_ptr() == values.data_ptr()
        assert (shard.shape, shard.dtype, shard.placements) == ((4, 3), torch.bfloat16, whole.placements)


def test_linear_is_replaced_for_all_modules_and_put_back():
    before = torch.nn.functional.linear
    try:
        compat.use_linear(lambda x, weight, bias=None: x + 1)
        assert torch.equal(torch.nn.Linear(2, 2)(torch.zeros(2)), torch.ones(2))
    finally:
        compat.use_linear(before)
    assert torch.nn.functional.linear is before


@pytest.mark.parametrize("name", ["optimize_ddp", "recompile_limit"])
def test_an_option_of_the_compiler_is_set(name):
    before = compat.private(name)
    try:
        compat.set_option(name, type(before)(7))
        assert compat.private(name) == type(before)(7)
    finally:
        compat.set_option(name, before)


def test_the_limit_of_compiled_versions_only_grows():
    raise_recompile_limit(64)
    raise_recompile_limit(1)
    assert torch._dynamo.config.recompile_limit >= 64


def test_fp8_products_scale_both_factors():
    a, b = torch.full((16, 16), 2.0), torch.eye(16)
    try:
        out = scaled_product(
            a.to(torch.float8_e4m3fn),
            b.to(torch.float8_e4m3fn).t(),
            torch.tensor(3.0),
            torch.tensor(0.5),
            torch.float32,
            False,
        )
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this device multiplies no fp8: {str(error).splitlines()[0]}")
    torch.testing.assert_close(out, torch.full((16, 16), 3.0))


def test_flex_has_one_operator():
    assert flex.HELD_BY_FLEX is flex.held_by_flex._opoverload


# Underscored modules and functions of torch. `[a-z]` behind the dot keeps attributes of our own objects out.
PRIVATE = re.compile(r"torch(?:\.[a-z_]+)*\._[a-zA-Z]")
ALLOWED = {
    "models/layers/compat.py",
    "trainer/runtime/compat.py",
    "trainer/engine/compilation.py",  # mark_static, and the name of a logger
    # operators in the hot path, probed
    "trainer/optim/adamw.py",
    "trainer/optim/ema.py",
    "trainer/optim/foreach.py",
    "trainer/optim/matrix_rule.py",
    "trainer/optim/narrow_state.py",
    "trainer/optim/optimizer.py",
    "trainer/optim/torch_rules.py",  # the name of an operator
    "trainer/testing/optimizers.py",
    "trainer/engine/base.py",
    "trainer/planning/memory.py",  # the name of an operator
    "trainer/training/profile.py",  # the name of a command, in a message
}


def test_no_other_module_uses_private_names():
    found = set()
    for folder in ("trainer", "models"):
        for path in (ROOT / folder).rglob("*.py"):
            if any(PRIVATE.search(line.split("#")[0]) for line in path.read_text(encoding="utf-8").splitlines()):
                found.add(path.relative_to(ROOT).as_posix())
    assert {path for path in found if not path.startswith("trainer/optim/rules/")} <= ALLOWED  # foreach, probed
