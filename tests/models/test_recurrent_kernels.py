"""The fused kernels of recurrences and short convolutions: which is chosen, and that each equals torch's, forward and backward.

Where there is no GPU, the kernels of fla (and of mamba-ssm, where it is installed) run in Triton's interpreter: TestKernels then
runs in a process of its own. The interpreter checks the numbers, not what the compiler makes of the kernels.
"""

import importlib.util
import math
import os
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from models.base import get_model, load_models, model_names
from models.layers import recurrent_kernels as kernels
from models.layers.causal import Context, ShortConvolution
from models.layers.delta_rule import delta_rule, gated_delta_rule
from models.layers.ssd import ssd

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and not CUDA
DEVICE = "cuda" if CUDA else "cpu"
HALF = torch.bfloat16 if CUDA else torch.float16  # the interpreter does not multiply in bf16
load_models()
STRONGEST = -math.exp(-0.5)
HERE = {name: importlib.util.find_spec(name) is not None for name in ("triton", "fla", "mamba_ssm", "causal_conv1d")}
needs_fla = pytest.mark.skipif(
    not (HERE["triton"] and HERE["fla"]), reason="needs Triton and fla-core: pip install '.[fla,kernels]'"
)


def case(**changes):
    usual = {"device": torch.device(DEVICE), "dtype": HALF, "length": 1024, "documents": False}
    return kernels.Case(**usual | changes)


# -- the choice ----------------------------------------------------------------------------------------------------------

RECURRENT = {"mamba2": "ssm", "zamba2": "ssm", "rene": "ssm", "rwkv7": "delta", "gated-delta-net": "delta", "lfm2": ""}
GPU = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "widths": (64, 64), "convolutions": [(1280, 4)]}


@pytest.fixture
def h100(monkeypatch):
    """A GPU, and packages that can be imported: those named."""

    def there(*packages, capability=(9, 0), version=(0, 6)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(kernels, "_fla_version", lambda: version)
        failure = lambda module, package, remedy: None if package in packages else f"it needs {package}: {remedy}"  # noqa: E731
        monkeypatch.setattr(kernels, "import_failure", failure)

    return there


def tiny(name, **changes):
    cls = get_model(name)
    shape = {"vocab_size": 64, "d_model": 32, "n_layers": 2, **changes}
    if name in ("rene", "lfm2", "zamba2"):
        shape = {"attention_head_dim": 16} | shape
    return cls(cls.Config(**{"head_dim": 32} | shape if name == "rwkv7" else shape))


@pytest.mark.parametrize("name", RECURRENT)
def test_a_cpu_computes_with_torch_and_a_run_says_so(name):
    line = tiny(name).describe_kernels()
    if RECURRENT[name]:
        why = "mamba-ssm: it needs CUDA; " if RECURRENT[name] == "ssm" else ""
        assert f"scan: torch ({why}fla: it needs CUDA)" in line
    assert ("convolution: torch (causal-conv1d: it needs CUDA; fla: it needs CUDA)" in line) == (name != "rwkv7")
    assert ("attention: sdpa (plain causal attention); " in line) == (name in ("lfm2", "zamba2", "rene"))


@pytest.mark.parametrize("name", model_names())
def test_an_unknown_kernel_is_refused_by_the_config(name):
    """attention_kernel of a hybrid was refused at the first forward pass only."""
    cls = get_model(name)
    for field in cls.kernel_fields:
        with pytest.raises(ValueError, match=rf"^{field} must be (one of )?auto, .*, not 'fast'$"):
            cls.Config(**{field: "fast"})
        for known in ("auto", "torch"):
            assert getattr(cls.Config(**{field: known}), field) == known


def test_a_kernel_that_cannot_run_here_is_refused_in_one_line(h100):
    with pytest.raises(ValueError, match=r"^scan_kernel fla cannot be used: it needs CUDA; use auto or torch$"):
        tiny("mamba2", scan_kernel="fla").describe_kernels()
    h100()
    for field, name, table, line in (
        ("scan_kernel", "fla", kernels.SSD, r"it needs fla-core: pip install 'crescendo-lm\[fla\]'"),
        ("scan_kernel", "mamba-ssm", kernels.SSD, r"it needs mamba-ssm: pip install --no-build-isolation mamba-ssm \(it compiles.*\)"),
        ("conv_kernel", "causal-conv1d", kernels.CONVOLUTION, "it needs causal-conv1d: pip install --no-build-isolation .*"),
        ("conv_kernel", "fla", kernels.CONVOLUTION, "it needs fla-core: pip install .*"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"^{field} {name} cannot be used: {line}; use auto or torch$"):
            kernels.choose(field, name, table, case(**GPU))


@pytest.mark.parametrize(
    ("table", "name", "changes", "line"),
    [
        ("SSD", "fla", {"dtype": torch.float64}, "it computes in fp32, bf16 and fp16, not float64"),
        ("SSD", "fla", {"documents": True}, "it needs the documents' lengths in CPU memory"),
        ("SSD", "fla", {"widths": (64, 8)}, "it computes heads of 16 to 256 channels, not 8"),
        ("SSD", "mamba-ssm", {"documents": True, "widths": (64, 8)}, None),
        ("DELTA_RULE", "fla", {"dtype": torch.float32}, "its authors do not support fp32"),
        ("GATED_DELTA_RULE", "fla", {"dtype": torch.float32}, None),
        ("CONVOLUTION", "causal-conv1d", {"convolutions": [(64, 4), (60, 4)]}, "it needs a multiple of 8 channels, not 60"),
        ("CONVOLUTION", "causal-conv1d", {"convolutions": [(64, 7)]}, "it computes convolutions of 2 to 4 tokens, not 7"),
        ("CONVOLUTION", "causal-conv1d", {"documents": True}, None),
        ("CONVOLUTION", "fla", {"convolutions": [(60, 7)], "widths": (8,)}, None),
    ],
)  # fmt: skip
def test_what_each_kernel_cannot_compute(h100, table, name, changes, line):
    h100("fla-core", "mamba-ssm", "causal-conv1d")
    one = {name: getattr(kernels, table)[name]}
    chosen, why, call = kernels.choose("scan_kernel", "auto", one, case(**GPU | changes))
    assert (chosen, call is None) == (("torch", True) if line else (name, False))
    assert why.startswith(f"{name}: {line}" if line else "one fused kernel")
    if line:
        with pytest.raises(ValueError, match=f"^scan_kernel {name} cannot be used: {line}.*; use auto or torch$"):
            kernels.choose("scan_kernel", name, one, case(**GPU | changes))


def test_old_gpus_and_old_packages_are_refused(h100):
    h100("fla-core", capability=(7, 5))
    assert kernels.choose("", "auto", kernels.DELTA_RULE, case(**GPU))[1] == "fla: it needs compute capability 8.0"
    h100("fla-core", version=(0, 5))
    assert kernels.choose("", "auto", kernels.SSD, case(**GPU))[1].endswith(
        "fla: it needs fla-core >= 0.6: pip install 'crescendo-lm[fla]'"
    )


def test_auto_takes_the_first_that_can(h100):
    h100("fla-core", "mamba-ssm")
    assert kernels.choose("", "auto", kernels.SSD, case(**GPU))[:2] == ("mamba-ssm", "one fused kernel")
    h100("fla-core")
    name, why, _ = kernels.choose("", "auto", kernels.SSD, case(**GPU))
    assert name == "fla" and why.startswith("mamba-ssm: it needs mamba-ssm: pip") and why.endswith("; one fused kernel")


@pytest.mark.parametrize("wanted", ["auto", "fla"])
def test_a_step_of_decoding_is_torchs(h100, wanted):
    h100("fla-core")
    table = {"fla": kernels.SSD["fla"]}
    assert kernels.choose("", wanted, table, case(**GPU, length=1)) == ("torch", "fla: fewer than 16 tokens", None)
    assert kernels.choose("", wanted, table, case(**GPU, length=16))[0] == "fla"


def test_a_package_whose_import_fails_is_refused_with_its_reason(tmp_path, monkeypatch):
    (tmp_path / "broken_kernels.py").write_text("raise OSError('undefined symbol\\nmore')")
    monkeypatch.syspath_prepend(tmp_path)
    found = kernels.import_failure("broken_kernels", "broken", "install it again")
    assert found == "broken is installed, but its import fails (undefined symbol): install it again"
    assert (
        kernels.import_failure("no_such_kernels.ops", "none", "remedy")
        == "it needs none, which is not installed: remedy"
    )


# -- what the packages are given, by stand-ins with their rules ------------------------------------------------------------


def test_causal_conv1d_gets_what_its_code_demands(monkeypatch):
    """Its checks of strides and types, from its csrc; numbers by torch. Document numbers have memory behind them."""

    def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, activation=None):
        assert x.stride(1) == 1 and x.shape[1] % 8 == 0 and x.stride(0) % 8 == 0 and x.stride(2) % 8 == 0
        assert seq_idx.dtype == torch.int32 and seq_idx.is_contiguous() and seq_idx.shape == (x.shape[0], x.shape[2])
        assert seq_idx.untyped_storage().nbytes() >= 4 * (seq_idx.numel() + kernels.BEHIND)
        module = ShortConvolution(*weight.shape, key="", silu=activation == "silu")
        module.load_state_dict({"weight": weight, "bias": bias})
        return module(x.mT, Context(seq_idx)).mT

    monkeypatch.setitem(sys.modules, "causal_conv1d", types.SimpleNamespace(causal_conv1d_fn=causal_conv1d_fn))
    module = ShortConvolution(16, 4, key="", silu=True)
    module.reset(torch.Generator().manual_seed(0))
    x, documents = torch.randn(2, 9, 30)[..., 3:19], torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
    found = module(x, Context(documents, convolution=kernels.convolution_of_causal_conv1d))
    assert torch.equal(found, module(x, Context(documents)))


def test_mamba_ssm_gets_decays_and_states_in_fp32(monkeypatch):
    def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, initial_states, seq_idx, return_final_states):
        assert {x.dtype, B.dtype, C.dtype} == {torch.bfloat16} and {dt.dtype, A.dtype} == {torch.float32}
        assert return_final_states and (seq_idx is None or seq_idx.dtype == torch.int32)
        return ssd(x, dt, A, B, C, initial_states, seq_idx)

    fake = types.SimpleNamespace(mamba_chunk_scan_combined=mamba_chunk_scan_combined)
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "mamba_ssm.ops.triton.ssd_combined"):
        monkeypatch.setitem(sys.modules, name, fake)
    DRAW.manual_seed(0)
    x, dt, A, B, C = of_ssd().values()
    given = x.bfloat16(), dt, A, B.bfloat16(), C.bfloat16()
    state, documents = torch.randn(ROWS, HEADS, VALUES, KEYS), torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    documents[:, 20:] = 1
    for more in ({"state": state}, {"documents": documents}, {"keep_state": False}):
        found, expected = kernels.ssd_of_mamba_ssm(*given, **more), ssd(*given, **more)
        assert torch.equal(found[0], expected[0]) and (found[1] is None) == (expected[1] is None)


def test_fla_never_mixes_documents():
    documents = torch.zeros(1, 4, dtype=torch.int64)
    for table in (kernels.SSD, kernels.DELTA_RULE, kernels.GATED_DELTA_RULE):
        with pytest.raises(ValueError, match="do not keep documents apart"):
            table["fla"].call(*[torch.zeros(1)] * (6 if table is kernels.DELTA_RULE else 5), documents=documents)


# -- equivalence ---------------------------------------------------------------------------------------------------------


def complete_interpreter():
    """What Triton's interpreter lacks of what its compiler does, and what fla takes for granted: a device to time the choices of
    the autotuner (the first is as good here), loop counters that can be converted, and `gather` under its own name."""
    import numpy
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.autotuner import Autotuner

    convert = interpreter._implicit_cvt

    def tensor_of(number, kind, dtype):
        return tl.tensor(interpreter.TensorHandle(numpy.array([number], kind), dtype), dtype)

    class Counter(int):
        def to(self, dtype):
            return tensor_of(int(self), numpy.int64, tl.int64).to(dtype)

    interpreter._implicit_cvt = lambda x: (
        tensor_of(x, numpy.float32, tl.float32) if isinstance(x, float) else convert(x)
    )
    Autotuner._bench = lambda self, *args, config, **options: [1.0, 1.0, 1.0]
    for name in ("simple_gla", "gated_delta_rule", "kda", "rwkv7"):
        importlib.import_module(f"fla.ops.{name}")
    for name, module in list(sys.modules.items()):
        if name.startswith(("fla.ops", "mamba_ssm.ops")):
            module.range = lambda *bounds: map(Counter, range(*map(int, bounds)))
            if hasattr(module, "gather"):
                module.gather = lambda *args, **options: tl.gather(*args, **options)


if INTERPRETED and HERE["triton"] and HERE["fla"]:
    complete_interpreter()


@needs_fla
@pytest.mark.slow
@pytest.mark.skipif(CUDA or INTERPRETED, reason="the kernels are tested in this process")
def test_the_kernels_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, "-k", "TestKernels"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-5000:]
    assert "passed" in done.stdout and "fla-core" not in done.stdout, done.stdout[-500:]


ROWS, LENGTH, HEADS, KEYS, VALUES = 1, 70, 2 if CUDA else 1, 16, 32
DRAW = torch.Generator()


def randn(*shape):
    return torch.randn(ROWS, LENGTH, *shape, generator=DRAW)


def rand(*shape):
    return torch.rand(ROWS, LENGTH, *shape, generator=DRAW)


def of_ssd():
    return {
        "x": randn(HEADS, VALUES),
        "dt": rand(HEADS),
        "A": -4 * torch.rand(HEADS, generator=DRAW),
        "B": randn(1, KEYS) / 4,
        "C": randn(1, KEYS) / 4,
    }


def of_delta_rule():
    removal, rate = F.normalize(randn(HEADS, KEYS), dim=-1), rand(HEADS, 1)
    log_w = STRONGEST * rand(HEADS, KEYS)
    return {"r": randn(HEADS, KEYS), "log_w": log_w, "k": randn(HEADS, KEYS) / 4, "v": randn(HEADS, VALUES), "a": -removal,
            "b": removal * rate}  # fmt: skip


def of_gated(decays, strongest=3.0):
    q, k = (F.normalize(randn(HEADS, KEYS), dim=-1) for _ in range(2))
    return {
        "q": q,
        "log_w": -strongest * rand(HEADS, decays),
        "k": k,
        "v": randn(HEADS, VALUES),
        "beta": rand(HEADS, 1),
    }


def bounded(function):
    return lambda *inputs, **options: function(*inputs, **options, least_log_w=STRONGEST)


# name -> (package, kernel, reference, inputs)
SCANS = {
    "mamba-ssm": ("mamba_ssm", kernels.ssd_of_mamba_ssm, ssd, of_ssd),
    "simple_gla": ("fla", kernels.ssd_of_fla, ssd, of_ssd),
    "rwkv7": ("fla", bounded(kernels.delta_rule_of_fla), delta_rule, of_delta_rule),
    "rwkv7, no bound": ("fla", kernels.delta_rule_of_fla, delta_rule, of_delta_rule),
    "gated": ("fla", kernels.gated_delta_rule_of_fla, gated_delta_rule, lambda: of_gated(1)),
    "kda": ("fla", kernels.gated_delta_rule_of_fla, gated_delta_rule, lambda: of_gated(KEYS)),
    "kda, strong": ("fla", kernels.gated_delta_rule_of_fla, gated_delta_rule, lambda: of_gated(KEYS, 60.0)),
}
FP32 = {"dt", "A", "log_w", "beta"}  # rates and decays, which no kernel rounds


def results(function, inputs, state, dtype, device, **options):
    """(outputs and last state, gradients of the inputs and of the state); in fp64 every number is what `dtype` holds of it."""
    leaves = {}
    for name, value in {**inputs, "state": state}.items():
        held = value if name in FP32 | {"state"} else value.to(dtype)
        wide = held.double() if function in (ssd, delta_rule, gated_delta_rule) else held
        leaves[name] = wide.to(device).detach().requires_grad_()
    *given, before = leaves.values()
    y, last = function(*given, state=before, **options)
    draw = torch.Generator().manual_seed(9)
    for_y, for_last = (torch.randn(x.shape, generator=draw).to(x) for x in (y, last))
    ((y * for_y).sum() + (last * for_last).sum()).backward()
    return {"y": y, "last": last, **{f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}}


def assert_near(found, expected, allowed):
    for name, reference in expected.items():
        error = (found[name].double().cpu() - reference.double().cpu()).norm() / reference.double().norm()
        assert found[name].shape == reference.shape and error <= allowed, f"{name}: {error:.1e} > {allowed:.1e}"


# On a CPU the interpreter takes seconds for each: all in fp32, some also in half precision.
CASES = [(name, dtype) for name in SCANS for dtype in (torch.float32, HALF)]
if not CUDA:
    CASES = [(name, torch.float32) for name in ("mamba-ssm", "simple_gla", "rwkv7", "gated", "kda, strong")]
    CASES += [("simple_gla", HALF), ("gated", HALF)]
MODELS = {
    "mamba2": {"state_size": 16, "ssm_head_dim": 16, "expand": 1},
    "rwkv7": {"head_dim": 16},
    "gated-delta-net": {"head_dim": 16, "expand_v": 1, "delta_heads": 1},
    "lfm2": {"attention_head_dim": 8, "n_layers": 2, "attention_every": 2},
}


class TestKernels:
    pytestmark = [
        pytest.mark.gpu("kernels"),
        needs_fla,
        pytest.mark.skipif(not (CUDA or INTERPRETED), reason="needs a CUDA device, or TRITON_INTERPRET=1"),
        pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # rwkv7's, in fp32
    ]

    @pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
    def test_kernel_is_the_recurrence(self, name, dtype):
        """A given state, two chunks, the last one short. In half precision some eight roundings of eps / 2 follow on each other: of
        scores, of the system's solution, of the state at a chunk's start and of the output, forth and back. In fp32, sums of
        log decays of up to 60 over 64 tokens are rounded before their differences are taken: 2^-24 64 60 / ln 2; with tensor cores
        TF32's eps of 2^-10 is more."""
        package, kernel, reference, make = SCANS[name]
        if package == "mamba_ssm" and kernels._mamba_refusal(case()):
            pytest.skip("needs mamba-ssm installed")
        DRAW.manual_seed(1)
        inputs, state = make(), torch.randn(ROWS, HEADS, VALUES, KEYS, generator=DRAW)
        allowed = 4 * (torch.finfo(dtype).eps if dtype != torch.float32 else 2**-10 if CUDA else 2**-14 / math.log(2))
        found = results(kernel, inputs, state, dtype, DEVICE)
        assert found["last"].dtype == torch.float32 and found["y"].dtype in (dtype, torch.float32)
        assert_near(found, results(reference, inputs, state, dtype, "cpu"), allowed)

    @pytest.mark.parametrize("package", ["causal-conv1d", "fla"])
    @pytest.mark.parametrize("silu", [False, True])
    def test_kernel_is_the_convolution(self, package, silu):
        """Of columns of a wider product, with the gain in fp32; two roundings to the dtype of x at most, and one of its gradient."""
        kernel = kernels.CONVOLUTION[package]
        if package != "fla" and kernel.refusal(case()):
            pytest.skip(f"needs {package} installed")
        DRAW.manual_seed(2)
        x, found = randn(3, 24).to(DEVICE, HALF).flatten(2), []
        for dtype, call in ((HALF, kernel.call), (torch.float64, None)):
            module = ShortConvolution(24, 4, key="", bias=package != "fla" or silu, silu=silu).to(DEVICE)
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view(parameter.shape))
            wide = x.to(dtype, copy=True).requires_grad_()
            module.to(torch.float64 if call is None else torch.float32)
            y = module(wide[..., 24:48], Context(convolution=call))
            y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y))
            gradients = {f"gradient of {name}": p.grad for name, p in module.named_parameters()}
            found.append({"y": y.detach(), "gradient of x": wide.grad, **gradients})
        assert_near(*found, 2 * torch.finfo(HALF).eps)

    @pytest.mark.parametrize("name", MODELS)
    def test_model_is_that_of_torch(self, name, monkeypatch):
        """Training, and decoding a text of which the kernels read the first part. fp32; LayerNorms of few channels amplify."""
        monkeypatch.setattr(kernels, "_device_refusal", lambda case: None)
        monkeypatch.setattr(kernels, "_fla_half_refusal", kernels._fla_refusal)
        monkeypatch.setitem(kernels.DELTA_RULE, "fla", kernels.DELTA_RULE["fla"]._replace(refusal=kernels._fla_refusal))
        cls, tokens = get_model(name), torch.randint(32, (1, 20), generator=torch.Generator().manual_seed(3))
        shape, found = {"vocab_size": 32, "d_model": 16, "n_layers": 1, **MODELS[name]}, []
        for kernel in ("torch", "fla"):
            chosen = {field: kernel for field in cls.kernel_fields if field != "attention_kernel"}
            model = cls(cls.Config(**shape, **chosen))
            model.init_weights(torch.Generator().manual_seed(0))
            for parameter in model.parameters():
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=DRAW.manual_seed(4))
            model = model.to(DEVICE)
            assert model.describe_kernels().count(f"{kernel} (asked for)") == len(chosen)
            loss = model(tokens.to(DEVICE), tokens.to(DEVICE)).loss
            loss.backward()
            state = model.new_state(1, None, torch.device(DEVICE), torch.float32)
            with torch.no_grad():
                for part in tokens.to(DEVICE).split([17, 3], dim=1):
                    logits = model(part, cache=state).logits
            gradients = {f"gradient of {key}": p.grad for key, p in model.named_parameters()}
            found.append({"loss": loss.detach(), "logits": logits, **gradients})
        assert_near(found[1], found[0], 0.05 if CUDA else 2**-10)
