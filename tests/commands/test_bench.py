"""`bench` and its two companions: made-up numbers and clocks check what is reported, tiny runs that all of it works."""

import importlib.util
import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import ROOT, error_line, text_only_transformers, tiny_values, trainer
from processes import forked_trainer

from models.base import get_model
from models.hugging_face import load_llama_weights, load_openai_weights
from trainer.commands.bench import BenchConfig, clock, turns
from trainer.commands.bench.baselines import (
    COUNTERPARTS,
    BareLoop,
    EagerBaseline,
    NanoGptBaseline,
    baselines,
    counterpart,
)
from trainer.commands.bench.clock import PhaseClock, covered, peak_memory
from trainer.commands.bench.curves import curves_of
from trainer.commands.bench.data import rate_of
from trainer.commands.bench.report import MISSING, distribution, ratio, train_report
from trainer.commands.bench.variants import Candidate, Record, comparable, label, leaving_out, run_config, variants
from trainer.core.config import RunConfig
from trainer.core.errors import UserError
from trainer.core.settings import build
from trainer.core.text import markdown_table
from trainer.data.stream import find_dataset
from trainer.planning.plan import resolve
from trainer.runtime.device import PEAK, peak_flops
from trainer.runtime.distributed import World

CPU = torch.device("cpu")


# -- the sweep -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["device", "data.threads"])
def test_what_one_process_has_once_is_not_compared(key):
    with pytest.raises(UserError, match=f"^sweep: one process cannot compare several values of {key}"):
        comparable({key: ["1", "2"]})


def test_changes_are_laid_on_top_of_the_config():
    config = build(BenchConfig, {"seed": 3, "engine": {"strategy": "ddp"}, "sweep": ["x"], "rounds": 2})
    run = run_config(config, {"engine.compile": "true", "model.n_layers": "2", "batch.tokens_per_step": "auto"})
    assert type(run) is RunConfig
    assert (run.seed, run.engine.strategy, run.engine.compile) == (3, "ddp", True)
    assert run.model == {"name": "hlb", "n_layers": "2"} and run.batch.tokens_per_step is None
    with pytest.raises(UserError, match=r"engine\.compile: expected true\|false, got 'perhaps'"):
        run_config(config, {"engine.compile": "perhaps"})


def test_labels_are_short_where_that_is_clear():
    assert label({"engine.compile": "true", "seed": "1"}) == "compile=true seed=1"
    assert label({"batch.sequence_length": "64", "evaluation.sequence_length": "32"}) == (
        "batch.sequence_length=64 evaluation.sequence_length=32"
    )


# -- numbers ---------------------------------------------------------------------------------------------------------


def test_a_distribution_has_median_and_interquartile_spread():
    found = distribution([100.0, 90.0, 110.0, 50.0, 120.0])
    assert found["median"] == 100 and found["spread"] == pytest.approx(0.2)  # quartiles 90 and 110
    assert distribution([7.0]) == {"median": 7.0, "spread": None, "samples": [7.0]}


def test_in_turns_the_ratio_is_taken_round_by_round():
    base, other = Record(rates=[100.0, 50.0, 10.0]), Record(rates=[200.0, 100.0, 20.0])
    base.beside = other.beside = base.rates
    assert ratio(other, base) == pytest.approx(2) and ratio(base, other) == pytest.approx(0.5)


class Made(Candidate):
    """A candidate of made-up speed on a machine that becomes slower with every visit."""

    kind = "trainer"
    drift = 100.0

    def __init__(self, name, speed=1.0, memory=None):
        super().__init__(name, None, None, World(), CPU)
        self.speed, self.memory = speed, memory

    def needs(self):
        return self.memory

    def close(self):
        Made.drift -= 10


def test_one_by_one_drift_of_the_machine_cancels_out(monkeypatch):
    monkeypatch.setattr(Made, "drift", 100.0)
    monkeypatch.setattr(turns, "start", lambda one: None)
    monkeypatch.setattr(turns, "look_inside", lambda one, config: None)
    monkeypatch.setattr(turns, "turn", lambda one, steps: one.speed * Made.drift)
    first, second, third = candidates = [Made("first"), Made("second", 2.0), Made("third", 0.5)]
    turns.measure(candidates, BenchConfig(rounds=2), together=False)
    assert first.record.rates == [100, 100, 80, 80, 60, 60]
    assert second.record.rates == [180, 180] and second.record.beside == [90, 90]
    # The drift is linear in the visits, so the mean of the first before and after is what it would have had in between.
    assert ratio(second.record, first.record) == pytest.approx(2)
    assert ratio(third.record, second.record) == pytest.approx(0.25)


def test_in_turns_all_are_warmed_up_and_none_is_always_first(monkeypatch):
    order = []
    monkeypatch.setattr(turns, "start", lambda one: None)
    monkeypatch.setattr(turns, "look_inside", lambda one, config: None)
    monkeypatch.setattr(turns, "turn", lambda one, steps: order.append(one.name) or 1.0 * len(order))
    candidates = [Made("a"), Made("b")]
    turns.measure(candidates, BenchConfig(rounds=2), together=True)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert [one.record.rates for one in candidates] == [[4, 5], [3, 6]]
    assert candidates[1].record.beside == [4, 5]


class Unable(Made):
    """A candidate whose first step its machine cannot do."""

    error: Exception = ValueError("kernel x cannot be used: no")

    def step(self):
        raise self.error

    def build(self):
        self.built = True

    def close(self):
        self.built = False


@pytest.mark.parametrize("together", [True, False])
def test_what_cannot_run_here_is_left_out(monkeypatch, capsys, together):
    start = turns.start
    monkeypatch.setattr(turns, "start", lambda one: start(one) if isinstance(one, Unable) else None)
    monkeypatch.setattr(turns, "look_inside", lambda one, config: None)
    monkeypatch.setattr(turns, "turn", lambda one, steps: one.speed)
    candidates = [Made("a"), Unable("b"), Made("c", 2.0)]
    notes = turns.measure(candidates, BenchConfig(rounds=2), together)
    assert notes == ["b left out: kernel x cannot be used: no"] and notes[0] in capsys.readouterr().err
    assert [bool(one.record.rates) for one in candidates] == [True, False, True]
    assert candidates[2].record.beside[:2] == [1, 1] and not candidates[1].built
    with pytest.raises(UserError, match="^kernel x cannot be used: no$"):
        turns.measure([Unable("b"), Made("c")], BenchConfig(rounds=2), together)


def test_what_a_gpu_has_no_memory_for_is_left_out(monkeypatch):
    """But not with several processes, of which some may have had room and wait."""
    told = "CUDA out of memory. Tried to allocate 9 GiB.\nIf reserved but unallocated memory is large try setting"
    monkeypatch.setattr(Unable, "error", torch.OutOfMemoryError(told))
    start = turns.start
    monkeypatch.setattr(turns, "start", lambda one: start(one) if isinstance(one, Unable) else None)
    monkeypatch.setattr(turns, "look_inside", lambda one, config: None)
    monkeypatch.setattr(turns, "turn", lambda one, steps: one.speed)
    notes = turns.measure([Made("a"), Unable("b")], BenchConfig(rounds=1), together=False)
    assert notes == ["b left out: CUDA out of memory. Tried to allocate 9 GiB"]
    several = Unable("b")
    several.world = World(0, 2)
    with pytest.raises(torch.OutOfMemoryError):
        turns.measure([Made("a"), several], BenchConfig(rounds=1), together=False)


def test_what_cannot_be_resolved_is_left_out(tiny_dataset, tmp_path):
    """But not a value that no machine could take: that is a mistake."""
    values = tiny_values(tiny_dataset, tmp_path / "run")
    dataset = find_dataset(build(RunConfig, values).data)

    def found(*sweep):
        return variants(build(BenchConfig, values | {"sweep": list(sweep)}), dataset, World(), CPU)

    able, notes = found("engine.strategy=single,hsdp,fsdp")
    assert [one.name for one in able] == ["strategy=single", "strategy=fsdp"]
    assert len(notes) == 1 and notes[0].startswith("strategy=hsdp left out: engine.")
    with pytest.raises(UserError, match="^engine"):
        found("engine.strategy=hsdp,single")
    with pytest.raises(UserError, match="perhaps"):
        found("engine.compile=false,perhaps")


def test_all_are_held_at_once_only_where_they_fit():
    two = [Made(name, memory={"weights": 30, "activations": 10, "total": 40}) for name in "ab"]
    assert turns.fit_together(two, 70 / turns.ROOM)  # both hold 30, one at a time 10 more
    assert not turns.fit_together(two, 69 / turns.ROOM)


def test_compiled_code_is_not_shared_by_several_shapes():
    def shaped(compile, tokens):
        one = Made("")
        batch = SimpleNamespace(sequence_length=64, tokens_per_microbatch=tokens)
        one.plan = SimpleNamespace(
            config=SimpleNamespace(model={"name": "hlb"}, batch=batch, engine=SimpleNamespace(compile=compile))
        )
        return one

    assert turns.share_compiled_code([shaped(True, 64), shaped(False, 128)])
    assert not turns.share_compiled_code([shaped(False, 64), shaped(False, 128)])
    assert not turns.share_compiled_code([shaped(True, 64), shaped(False, 64)])


def test_overlapping_collectives_count_once():
    assert covered([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 1.8)]) == 4.0
    assert covered([]) == 0


def test_phases_are_told_apart(monkeypatch):
    now = 0.0
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now)

    def work(milliseconds):
        nonlocal now
        now += milliseconds / 1000

    class Loop:
        module = torch.nn.Identity()

        def read(self):
            work(1)

        def backward(self):
            self.module(work(0))
            work(4)

        def update(self):
            work(8)

        def step(self):
            self.read()
            for _ in range(2):
                self.backward()
            self.update()
            work(16)

    loop, watched = Loop(), PhaseClock(CPU)
    loop.module.forward = lambda _: work(2)
    watched.watch(loop, "read", "data")
    watched.watch(loop, "backward", "backward")
    watched.watch(loop, "update", "optimiser")
    watched.watch_module(loop.module, "forward")
    expected = {"data": 1, "forward": 4, "backward": 8, "optimiser": 8, "other": 16, "step": 37}
    assert watched.measure(loop.step, 3) == pytest.approx(expected)
    loop.module = lambda _: None  # replayed: nobody sees where the forward pass ends
    expected = {"data": 1, "forward": None, "backward": 8, "optimiser": 8, "other": 16, "step": 33}
    assert watched.measure(loop.step, 3) == pytest.approx(expected)


def test_peak_memory_counts_what_is_held_at_a_time():
    with peak_memory(CPU) as peak:
        first = torch.empty(250_000)  # 1 MB
        second = first + first
        del second
        third = first + first
    del third
    assert peak.bytes == 2_000_000


def test_a_rate_ends_with_the_data():
    calls = []
    assert rate_of(lambda: calls.append(1) or 10, most=25) > 0
    assert len(calls) == 3


# -- peaks and reports -----------------------------------------------------------------------------------------------


def test_peaks_are_known_by_exact_name_and_type_or_not_at_all(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert (peak_flops(gpu, "bf16"), peak_flops(gpu, "pure_bf16"), peak_flops(gpu, "fp32")) == (
        989.4e12,
        989.4e12,
        494.7e12,
    )
    assert peak_flops(gpu, "bf16", float8=True) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200 NVL")
    assert peak_flops(gpu, "bf16") is None
    assert peak_flops(CPU, "bf16") is None
    assert all(peaks["bf16"] > peaks["tf32"] for peaks in PEAK.values())


def made_candidate(name, kind, rates):
    config = build(
        RunConfig,
        {
            "model": {"name": "gpt2", "d_model": 64, "n_layers": 1, "n_heads": 1, "max_context": 64},
            "data": {"tokenizer": "bytes", "sample_length": 64},
            "device": "cpu",
            "precision": "fp32",
        },
    )
    one = Made(name, memory={"weights": 2**29, "total": 3 * 2**28})
    one.kind, one.plan = kind, resolve(config)
    one.record = Record(rates, [100.0, 100.0], 1.5, 2**30, 0, dict.fromkeys(("step", *clock.PHASES), 1.0))
    one.record.phases_ms["communication"] = None
    return one


def test_a_report_from_made_up_numbers(tmp_path, monkeypatch, capsys):
    config = BenchConfig(bench_dir=str(tmp_path / "new" / "folder"), rounds=2)
    pair = [made_candidate("gpt2", "trainer", [100.0, 100.0]), made_candidate("bare loop", "baseline", [50.0, 50.0])]
    report = train_report(config, pair, True, ["a note"])
    report.publish(as_json=True)
    body = json.loads(capsys.readouterr().out)
    ours, bare = body["rows"]
    assert (body["format"], body["kind"], body["order"], body["notes"]) == (1, "train", "in turns", ["a note"])
    assert ours["ratio"] == {"bare loop": 2.0} and ours["mfu"] is None and ours["peak_flops"] is None
    assert ours["expected_memory_bytes"]["total"] == 3 * 2**28 and bare["expected_memory_bytes"] is None
    assert ours["config"]["model"]["d_model"] == 64 and bare["kind"] == "baseline"
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == ["bench.json", "bench.md", "bench.png"]
    assert json.loads((folder / "bench.json").read_text()) == body
    table = (folder / "bench.md").read_text()
    cells = dict(zip(*([c.strip() for c in line.split("|")] for line in table.splitlines()[2:5:2]), strict=True))
    assert (cells["MFU"], cells["communication"], cells["/ bare loop"]) == (MISSING, MISSING, "2.000")
    assert (cells["peak GiB"], cells["expected"]) == ("1.000", "0.750")
    assert "'CPU', fp32: n/a" in table and "- a note" in table

    # The same with a peak: 100 tokens/s x FLOPs per token over the peak.
    monkeypatch.setattr("trainer.commands.bench.report.peak_flops", lambda device, precision, float8: 1e12)
    body = train_report(config, pair, True, []).body
    assert body["rows"][0]["mfu"] == pytest.approx(100 * ours["flops_per_token"] / 1e12)


def test_a_swept_number_is_drawn_as_lines(tmp_path, monkeypatch):
    """Microseconds a token over the number with the most values; text and short sweeps stay bars."""
    swept = []
    for length, rate in (("256", 1000.0), ("512", 500.0), ("1024", 250.0)):
        for model in ("gpt2", "llama"):
            one = made_candidate(f"{model} {length}", "trainer", [rate, rate])
            one.details = {"batch.sequence_length": length, "model.name": model}
            swept.append(one)
    curves = curves_of(swept)
    step = swept[0].plan.config.batch.tokens_per_step
    assert curves.key == "batch.sequence_length"
    assert curves.lines["step"]["name=llama"] == [(256, 1000), (512, 2000), (1024, 4000)]
    assert curves.lines["forward"]["name=gpt2"] == [(length, 1e3 / step) for length in (256, 512, 1024)]
    assert curves_of(swept[:4]) is None and curves_of([swept[0]]) is None

    drawn = []
    monkeypatch.setattr("trainer.commands.bench.report.draw", lambda *_: drawn.append("bars"))
    config = BenchConfig(bench_dir=str(tmp_path), rounds=2)
    train_report(config, swept, True, []).publish(as_json=True)
    assert not drawn and (tmp_path / "bench.png").stat().st_size > 5000


def test_tables_line_up():
    assert markdown_table([["", "x"], ["long name", "1,000"]]) == [
        "|           |     x |",
        "| --------- | ----: |",
        "| long name | 1,000 |",
    ]


# -- the verbs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_config(tiny_dataset, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_values(tiny_dataset, tmp_path / "run")))
    return path


def bench(*words):
    done = forked_trainer("bench", *words, "--rounds", "2", "--steps_per_round", "1", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_bench_compares_every_combination_and_the_bare_loop(tiny_config, tmp_path):
    folder = tmp_path / "bench"
    sweep = ["--sweep", "engine.strategy=single,fsdp", "--sweep", "batch.sequence_length=32,64"]
    body = bench(tiny_config, "--bench_dir", folder, *sweep)
    names = ["strategy=single sequence_length=32", "strategy=single sequence_length=64"]
    names += ["strategy=fsdp sequence_length=32", "strategy=fsdp sequence_length=64", "bare loop"]
    assert [row["name"] for row in body["rows"]] == names
    assert (body["order"], body["device"], body["processes"]) == ("in turns", "CPU", 1)
    assert {"command", "versions", "git"} <= set(body["environment"])
    for row in body["rows"]:
        assert len(row["tokens_per_second"]["samples"]) == 2 and row["tokens_per_second"]["median"] > 0
        assert row["ratio"].keys() == {"bare loop", names[0]}
        assert set(row["phases_ms"]) == {*clock.PHASES, "other", "step", "communication"}
        assert all(row["phases_ms"][phase] > 0 for phase in (*clock.PHASES, "step"))
        assert row["peak_memory_bytes"] > 12 * row["parameters"]  # weights and moments in fp32
        assert row["first_step_seconds"] > 0 and row["recompilations"] == 0 and row["mfu"] is None
    lengths = [row["config"]["batch"]["sequence_length"] for row in body["rows"]]
    assert lengths == [32, 64, 32, 64, 32]
    assert {row["config"]["batch"]["sequence_start"] for row in body["rows"]} == {32, 64}
    assert {row["config"]["batch"]["n_max"] for row in body["rows"]} == {1}
    assert sorted(path.name for path in folder.iterdir()) == ["bench.json", "bench.md", "bench.png"]
    assert not (tmp_path / "run").exists()
    assert "engine.strategy" in error_line(forked_trainer("bench", tiny_config, "--sweep", "engine.strategy=hsdp"))
    assert "no counterpart of hlb" in error_line(forked_trainer("bench", tiny_config, "--baselines", "transformers"))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
def test_compiled_shapes_go_one_by_one_beside_transformers(tiny_config, tmp_path):
    gpt2 = {"name": "gpt2", "d_model": 32, "n_layers": 1, "n_heads": 2, "max_context": 64}
    words = [word for key, value in gpt2.items() for word in (f"--model.{key}", str(value))]
    sweep = [
        "--engine.compile",
        "true",
        "--baselines",
        "transformers",
        "--sweep",
        "batch.tokens_per_microbatch=128,256",
    ]
    body = bench(tiny_config, *words, *sweep, "--bench_dir", tmp_path / "bench")
    assert body["order"] == "one by one"
    first, second, theirs = body["rows"]
    assert theirs["name"] == "transformers"
    assert "GPT2LMHeadModel, attention sdpa" in theirs["details"]["what"]
    assert len(first["tokens_per_second"]["samples"]) == 6  # before, between and after the two others
    assert len(second["tokens_per_second"]["samples"]) == 2
    assert all(row["recompilations"] == 0 for row in body["rows"])
    assert set(second["ratio"]) == {"transformers", "tokens_per_microbatch=128"}


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
@pytest.mark.parametrize(
    "name, changes",
    [
        *((name, {}) for name in COUNTERPARTS),
        ("llama", {"n_kv_heads": 1}),
        ("llama", {"tied": True}),
        ("gpt2", {"d_hidden": 48, "mlp": "relu2"}),
    ],
)
def test_counterparts_compute_what_ours_does(name, changes, monkeypatch):
    text_only_transformers(monkeypatch)
    cls = get_model(name)
    ours = cls(
        cls.Config(**{"vocab_size": 97, "d_model": 32, "n_layers": 2, "n_heads": 2, "max_context": 16, **changes})
    )
    theirs = counterpart(name, ours.config).eval()
    load = {"gpt2": load_openai_weights, "llama": load_llama_weights}[name]
    ours.init_weights()
    load(ours, theirs.state_dict())
    tokens = torch.randint(97, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (ours(tokens).logits - theirs(tokens).logits).abs().max() < 1e-5


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
@pytest.mark.parametrize(
    "name, changes",
    [
        ("gpt2", {"qk_norm": True}),
        ("gpt2", {"mlp": "swiglu"}),
        ("gpt2", {"attention_softcap": 9.0}),
        ("gpt2", {"head_dim": 8}),
        ("llama", {"window": 4}),
        ("llama", {"mlp": "geglu"}),
    ],
)
def test_what_has_no_counterpart_is_left_out(name, changes, monkeypatch):
    """Most of these switches have no parameters that would tell the models apart."""
    text_only_transformers(monkeypatch)
    shape = {"vocab_size": 97, "d_model": 32, "n_layers": 2, "n_heads": 2, "max_context": 16}
    notes = []
    with leaving_out("transformers", False, notes, World()):
        counterpart(name, get_model(name).Config(**(shape | changes)))
    assert notes and notes[0].startswith(f"transformers left out: transformers' {name} ")


@pytest.mark.parametrize("name", ["hlb", "gpt2"])
def test_the_eager_baseline_computes_the_same_loss(name, tiny_dataset, tmp_path):
    """From whole logits, where our own loop has none."""
    model = {"name": name, "d_model": 32, "n_layers": 1} | ({"n_heads": 2, "max_context": 64} if name == "gpt2" else {})
    config = build(RunConfig, tiny_values(tiny_dataset, tmp_path / "run", model=model, precision="fp32"))
    dataset = find_dataset(config.data)
    losses = []
    for kind in (BareLoop, EagerBaseline):
        baseline = kind("baseline", resolve(config, dataset), dataset, World(), torch.device("cpu"))
        baseline.build()
        losses.append(baseline.forward(baseline.read()[:2]).item())
        assert baseline.needs()["total"] > 0
        baseline.close()
    # fp32 sums of some hundred terms in another order.
    assert losses[1] == pytest.approx(losses[0], rel=3e-5) and losses[0] > 0


def gpt2_124m_made_tiny(dataset, run_dir, **model):
    """The plan of configs/gpt2-124m.yaml on a CPU, with a model and batch of a thousandth, and its dataset."""
    values = yaml.safe_load((ROOT / "configs" / "gpt2-124m.yaml").read_text())
    values["model"] |= {"d_model": 32, "n_layers": 2, "n_heads": 2, "max_context": 64} | model
    values["batch"] = {"tokens_per_step": 256, "tokens_per_microbatch": 128, "sequence_length": 64}
    values |= {"data": {"path": str(dataset)}, "device": "cpu", "precision": "fp32", "run_dir": str(run_dir)}
    config = build(RunConfig, values)
    dataset = find_dataset(config.data)
    return resolve(config, dataset), dataset


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_computes_what_ours_does(bias, tiny_dataset, tmp_path):
    """Also with weights that training has moved: at first all biases are zero and all gains one."""
    plan, dataset = gpt2_124m_made_tiny(tiny_dataset, tmp_path / "run", bias=bias)
    ours, theirs = (kind("", plan, dataset, World(), CPU) for kind in (BareLoop, NanoGptBaseline))
    ours.build()
    theirs.build()
    weights = ours.model.state_dict()
    torch.testing.assert_close(dict(theirs.model.state_dict()), dict(weights), rtol=0, atol=0)
    generator = torch.Generator().manual_seed(0)
    for weight in weights.values():
        weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    theirs.model.load_state_dict(weights)

    rows = ours.read()
    # The longest sums, over the vocabulary or over all tokens, in another order.
    tolerance = max(plan.model_config.vocab_size, rows.numel()) * torch.finfo(torch.float32).eps
    losses = []
    for one in (ours, theirs):
        losses.append(one.forward(rows).item())
        one.backward(rows, last=True)
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)
    gradients = [{name: p.grad for name, p in one.model.named_parameters()} for one in (ours, theirs)]
    difference = torch.stack([(gradients[1][name] - g).norm() for name, g in gradients[0].items()]).norm()
    norm = torch.stack([g.norm() for g in gradients[0].values()]).norm()
    assert gradients[0].keys() == gradients[1].keys() and difference < tolerance * norm
    for one in (ours, theirs):
        one.close()


@pytest.mark.parametrize(
    "switch",
    [{"mlp": "gelu_tanh"}, {"norm_eps": 1e-6}, {"qk_norm": True}, {"tied": False}, {"n_kv_heads": 1}, {"head_dim": 8}],
    ids=str,
)
def test_what_nanogpt_does_not_have_is_left_out(switch, tiny_dataset, tmp_path):
    notes = []
    baseline = NanoGptBaseline("nanogpt", *gpt2_124m_made_tiny(tiny_dataset, tmp_path / "run", **switch), World(), CPU)
    with leaving_out("nanogpt", False, notes, World()):
        baseline.build()
    assert len(notes) == 1 and notes[0].startswith("nanogpt left out: nanogpt ")


def test_nanogpt_stands_beside_gpt2_only():
    """It is there on request, and its plan counts all logits: in fp32, 4 bytes each for the logits, their logarithms and gradients."""
    gpt2, llama = made_candidate("gpt2", "trainer", []), made_candidate("llama", "trainer", [])
    llama.plan.config.model["name"] = "llama"
    bare, nanogpt = baselines(BenchConfig(baselines=["bare", "nanogpt"]), gpt2)
    logits = gpt2.plan.config.batch.tokens_per_microbatch * gpt2.plan.model_config.vocab_size
    assert nanogpt.needs()["total"] == bare.needs()["total"] + 12 * logits
    with pytest.raises(
        UserError, match="^baselines: nanogpt has the shape of gpt2 only, not of llama; use --baselines bare$"
    ):
        baselines(BenchConfig(baselines=["nanogpt"]), llama)


@pytest.mark.slow
def test_two_processes_see_their_communication(tiny_config, tmp_path):
    words = ["bench", tiny_config, "--sweep", "engine.strategy=ddp,fsdp", "--rounds", "1", "--steps_per_round", "2"]
    done = forked_trainer(*words, "--json", "--bench_dir", tmp_path / "bench", ranks=2)
    assert done.returncode == 0, done.stderr
    body = json.loads(done.stdout)
    assert body["processes"] == 2
    assert [row["name"] for row in body["rows"]] == ["strategy=ddp", "strategy=fsdp", "bare loop"]
    assert all(row["phases_ms"]["communication"] > 0 for row in body["rows"])


@pytest.mark.slow
def test_bench_data_compares_loader_and_training(tiny_config, tmp_path):
    body = bench("data", tiny_config, "--bench_dir", tmp_path / "bench")
    cold, warm, tokenizer, training = body["rows"]
    assert body["kind"] == "data"
    assert [row["name"] for row in body["rows"]] == ["loader, cold", "loader, warm", "tokenizer", "training, hlb"]
    consumed = training["tokens_per_second"]["median"]
    for row in (cold, warm):
        assert row["ratio"] == pytest.approx(row["tokens_per_second"]["median"] / consumed)
        assert row["megabytes_per_second"] == pytest.approx(2e-6 * row["tokens_per_second"]["median"])  # uint16
    assert tokenizer["megabytes_per_second"] > 0
    assert sorted(path.name for path in (tmp_path / "bench").iterdir()) == ["bench.json", "bench.md"]
    assert "one configuration" in error_line(forked_trainer("bench", "data", tiny_config, "--sweep", "seed=1,2"))


@pytest.mark.slow
def test_bench_checkpoint_cleans_up(tiny_config, tmp_path):
    folder = tmp_path / "disk"
    (folder / "checkpoints").mkdir(parents=True)  # as in a run's folder: not bench's to touch
    body = bench("checkpoint", tiny_config, "--bench_dir", folder, "--sweep", "checkpoint.asynchronous=false,true")
    assert [row["name"] for row in body["rows"]] == ["asynchronous=false", "asynchronous=true"]
    for row in body["rows"]:
        seconds = {name: times["median"] for name, times in row["seconds"].items()}
        assert set(seconds) == {"waiting", "saving", "loading", "plain_writing", "plain_reading"}
        assert seconds["waiting"] <= seconds["saving"] and min(seconds.values()) > 0
        assert row["bytes"] > 0 and row["saving_ratio"] > 0 and row["loading_ratio"] > 0
    assert sorted(path.name for path in folder.iterdir()) == ["bench.json", "bench.md", "checkpoints"]


def test_words_that_are_no_verb_are_configs():
    assert "dta: no such config file" in error_line(trainer("bench", "dta"))
