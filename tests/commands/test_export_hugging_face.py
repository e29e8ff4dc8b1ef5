"""`export --format hf`: transformers loads the folder without this package, and computes what the run computes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import PATIENCE, ROOT, SHARED_DATA, error_line, tiny_values, trainer
from huggingface_hub import ModelCard
from processes import forked_trainer
from safetensors.torch import load_file, save_file

from models.base import get_model, load_models, model_names
from models.counting import build_on_meta
from trainer.checkpoint import format as checkpoint
from trainer.commands import export, plugins
from trainer.commands.export import ExportConfig, carried, hugging_face, self_test
from trainer.commands.export.source import find_source
from trainer.commands.export.tokenizer_files import chat_template
from trainer.core.config import PrepareConfig, RunConfig
from trainer.core.errors import UserError
from trainer.core.settings import build
from trainer.data.prepare import prepare
from trainer.data.records import Conversations
from trainer.data.stream import find_dataset
from trainer.engine.meta import build_meta
from trainer.planning.model import written_out
from trainer.planning.parent import find_parent
from trainer.planning.plan import resolve
from trainer.runs.folder import write_start
from trainer.runtime.distributed import World

pytest.importorskip("transformers", reason="needs Hugging Face transformers")


def make_run(dataset: Path, folder: Path, model: str, **fields) -> Path:
    """A run folder as `train` leaves it, with weights so large that the logits differ."""
    load_models()
    if hasattr(get_model(model).Config, "init_std"):
        fields["init_std"] = 0.02  # what is added below then decides: no token that is generated was a close call
    values = tiny_values(dataset, folder, model={"name": model, **fields}, model_scale=0.02, batch__sequence_start=64)
    plan = resolve(build(RunConfig, values), find_dataset(build(RunConfig, values).data))
    own = build_meta(plan.model_class, plan.model_config).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(1)
    own.init_weights(generator)
    with torch.no_grad():
        for parameter in own.parameters():  # norms, biases and what starts at zero too
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    held = {f"model.{name}": tensor for name, tensor in own.state_dict().items()}
    checkpoint.save(folder / "checkpoints", 3, held, {"tokens": 1536}, World(), checkpoint.retention(1, 0))
    write_start(folder, plan.config, "plan", dataset, print, device="CPU")
    return folder


@pytest.fixture
def later(monkeypatch):
    """Exports are not loaded at once: `check` loads all of them in one process."""
    cases: list = []

    def remember(folder, expected):
        cases.append([folder, expected])
        return 0.0

    def check() -> dict[str, float]:
        for case in cases:
            case[0] = case[0].with_name(case[0].name.removesuffix(".tmp"))
        return {case[0].name: error for case, error in zip(cases, self_test.check_all(cases), strict=True)}

    monkeypatch.setattr(hugging_face, "check_loaded", remember)
    check.cases = cases
    return check


def exported(run: Path, out: Path, **keys) -> Path:
    export.run(ExportConfig(run_dir=str(run), format="hf", out=str(out), **keys))
    return out


NATIVE = {"gpt2", "llama", "mamba2", "minimal-sota", "transformer", "transformer++", "zamba2"}


@pytest.mark.slow
def test_every_architecture_gives_its_logits_without_this_package(tiny_dataset, tmp_path, later):
    load_models()
    names = [name for name in model_names() if get_model(name).__module__.startswith("models.")]
    for name in names:
        fields = {"d_model": 64, "n_layers": 1} if name in ("rwkv7", "zamba2") else {}  # these have no smaller shape
        fields |= {"hybrid_every": 1} if name == "zamba2" else {}
        exported(make_run(tiny_dataset, tmp_path / f"run-{name}", name, **fields), tmp_path / name)
    heads = make_run(tiny_dataset, tmp_path / "run-heads", "llama", n_predict=3, qk_norm=True, unpadded_vocab=257)
    exported(heads, tmp_path / "heads", dtype="bf16")
    exported(make_run(tiny_dataset, tmp_path / "run-bitnet", "llama", linear="bitnet"), tmp_path / "bitnet")
    errors = later()
    for (folder, expected), (name, error) in zip(later.cases, errors.items(), strict=True):
        assert expected.logits[..., :257].std() > 0.1, "logits this small would agree by themselves"
        assert expected.sure and expected.written, f"{name}: nothing was generated and compared"
        code = (folder / "modeling_crescendo.py").exists()
        assert code == (name not in NATIVE | {"heads"}), name
        assert error == 0 or not code, f"{name}: its own code gives other bits"
    assert json.loads((tmp_path / "heads" / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
    assert load_file(tmp_path / "heads" / "model.safetensors")["lm_head.weight"].shape[0] == 257


@pytest.mark.slow
def test_as_a_command(tiny_dataset, tmp_path):
    run = make_run(tiny_dataset, tmp_path / "run", "hlb")
    (run / "curves.png").write_bytes(b"a picture")
    done = trainer("export", run, "--format", "hf", "--license", "apache-2.0", "--out", tmp_path / "my.model-1")
    assert done.returncode == 0, done.stderr
    assert "because no class of transformers computes Hlb: load it with trust_remote_code=True" in done.stderr
    assert "logits differ by at most 0.0e+00" in done.stderr
    out = tmp_path / "my.model-1"
    card = ModelCard.load(out / "README.md")
    assert card.data.license == "apache-2.0" and card.data.library_name == "transformers"
    assert "custom_code" in card.data.tags and "(curves.png)" in card.text
    assert (out / "curves.png").read_bytes() == b"a picture"
    before = (out / "model.safetensors").read_bytes()
    again = forked_trainer("export", run, "--format", "hf", "--out", out)
    assert "exists already" in error_line(again) and (out / "model.safetensors").read_bytes() == before


@pytest.mark.slow
def test_what_gives_other_logits_is_refused_and_removed(tiny_dataset, tmp_path, monkeypatch):
    """Two weights of the same shape change places after they were written."""
    run = make_run(tiny_dataset, tmp_path / "run", "llama")
    write = hugging_face.write_weights

    def swapped(source, layout, out):
        write(source, layout, out)
        held = load_file(out / "model.safetensors")
        a, b = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "kv")
        held[a], held[b] = held[b].clone(), held[a].clone()
        save_file(held, out / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(hugging_face, "write_weights", swapped)
    found = r"^format: (what was written gives other logits in transformers \(by|transformers reads another model .*generate writes)"
    with pytest.raises(UserError, match=found):  # the text is compared first, where no near tie decides it
        exported(run, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_what_transformers_prints_is_no_answer(tmp_path, monkeypatch):
    said = "import sys; open(sys.argv[1], 'w').write('[1, 2]'); print('a remark of transformers 5')"
    monkeypatch.setattr(self_test, "LOAD", said)
    assert self_test.loaded([], tmp_path) == [1, 2]


CHAT = [
    {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "so be it"}]}
    for i in range(40)
]


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, pytest.param(True, id="files")])
def test_every_tokenizer_encodes_the_same(tiny_dataset, tmp_path, later, shared):
    texts = tiny_dataset.parent / "texts"
    kinds = {"chars": "chars", "learned": "train-bpe:300"}
    if shared:
        if not SHARED_DATA.is_dir():
            pytest.skip("needs the folder shared/data beside the checkout")
        kinds = {name: str(SHARED_DATA / "tokenizers" / name) for name in ("gpt2", "gpt-neox-20b")}
    for name, tokenizer in kinds.items():
        keys = {"source": str(texts), "tokenizer": tokenizer, "out": str(tmp_path / name), "sample_length": 64}
        prepare(PrepareConfig(**keys, workers=1, validation_fraction=0.1), lambda line: None)
        exported(
            make_run(tmp_path / name, tmp_path / f"run-{name}", "llama", d_model=16, n_layers=1),
            tmp_path / f"out-{name}",
        )
    for template in () if shared else ("chat", "plain"):
        (tmp_path / f"{template}.jsonl").write_text("\n".join(map(json.dumps, CHAT)))
        keys = {
            "source": str(tmp_path / f"{template}.jsonl"),
            "tokenizer": "bytes",
            "records": "chat",
            "chat_template": template,
        }
        prepare(
            PrepareConfig(**keys, out=str(tmp_path / template), sample_length=64, workers=1, validation_fraction=0.2),
            lambda line: None,
        )
        exported(
            make_run(tmp_path / template, tmp_path / f"run-{template}", "llama", n_layers=1),
            tmp_path / f"out-{template}",
        )
    later()
    prompts = [expected.prompt for _, expected in later.cases]
    assert prompts == (
        [None, None] if shared else [None, None, "<|user|>\nWhat is 2 + 2?\n<|assistant|>\n", "What is 2 + 2?"]
    )


def test_chat_templates_write_what_training_read():
    """Jinja's text and that of trainer/data/records.py, of whole conversations."""
    jinja2 = pytest.importorskip("jinja2", reason="transformers renders chat templates with jinja2")

    def refuse(message):
        raise ValueError(message)

    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    long = [
        {"role": "system", "content": "  be\nbrief "},
        *({"role": role, "content": f" {role}:\n\n{i} "} for i in range(2) for role in ("user", "assistant")),
    ]
    for name, messages in (
        ("chat", long),
        ("plain", long[1:3]),
        ("chat", [{"role": "system", "content": ""}, *long[1:]]),
    ):
        template = environment.from_string(chat_template(name))
        written = template.render(messages=messages, eos_token="</s>")
        row = json.dumps({"messages": messages}).encode()
        (segments,) = Conversations("chat", name).documents(row, "a:1")
        assert written == "".join(part.text + "</s>" * part.closed for part in segments)
        asked = template.render(
            messages=messages[1:2] if name == "chat" else messages[:1], eos_token="</s>", add_generation_prompt=True
        )
        user = messages[1 if name == "chat" else 0]["content"]
        assert asked == Conversations("chat", name).prompt(user)
    chat, plain = (environment.from_string(chat_template(name)) for name in ("chat", "plain"))
    for template, messages, words in (
        (chat, [{"role": "user", "content": "a <|assistant|> b"}], "a message holds the text <|assistant|>"),
        (chat, [{"role": "tool", "content": "a"}], "the role must be one of system, user, assistant"),
        (plain, long, "one prompt of the user and one answer"),
    ):
        with pytest.raises(ValueError, match=words.replace("|", r"\|")):
            template.render(messages=messages, eos_token="</s>")


@pytest.mark.parametrize("model, format", [("llama", "hf"), ("ngpt", "hf"), ("tokenformer", "safetensors")])
def test_a_run_begins_with_what_was_exported(tiny_dataset, tmp_path, later, model, format):
    run = make_run(tiny_dataset, tmp_path / "run", model)
    export.run(ExportConfig(run_dir=str(run), format=format, out=str(tmp_path / "out")))
    source = find_source(str(run), None, "evaluation", "auto", print)
    parent = find_parent(str(tmp_path / "out"), print)
    model_class, config = written_out(build(RunConfig, {"model": parent.model}))
    before = {name: tensor for name, tensor in source.each()}
    after = dict(parent.weights("evaluation", model_class, config, World()))
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    if model != "llama":
        assert model_class is source.model_class and config == source.model_class.Config(**source.fields)
    tokenizer = find_dataset(build(RunConfig, tiny_values(tiny_dataset, tmp_path)).data).tokenizer
    parent.check_tokenizer(tokenizer, tiny_dataset, None)
    assert parent.data["tokenizer"] == str(tmp_path / "out")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"crescendo_model": "nobody"}, "out/config.json: model.name: 'nobody' is not known"),
        ({"crescendo_config": None}, "has no text in 'crescendo_model', or no object in 'crescendo_config'"),
        ({"crescendo_config": {"d_modle": 3}}, "out/config.json: unknown key model.d_modle"),
    ],
)
def test_a_config_that_someone_changed_is_one_line(tiny_dataset, tmp_path, later, change, words):
    out = exported(make_run(tiny_dataset, tmp_path / "run", "ngpt"), tmp_path / "out")
    file = out / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError) as error:
        find_parent(str(out), print)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_weights_that_are_missing_or_left_over_are_named(tiny_dataset, tmp_path, later):
    out = exported(make_run(tiny_dataset, tmp_path / "run", "ngpt"), tmp_path / "out")
    held = load_file(out / "model.safetensors")
    parent = find_parent(str(out), print)
    model = build_on_meta(*written_out(build(RunConfig, {"model": parent.model})))
    name = next(iter(dict(model.named_parameters())))
    for changed, words in (
        (
            {key: value for key, value in held.items() if key != f"network.{name}"},
            f"lacks the weights 'network.{name}'",
        ),
        (held | {"network.more": torch.zeros(1)}, "the model has no place for more"),
        (held | {f"network.{name}": torch.zeros(3)}, rf"network.{name} is \(3,\), not "),
    ):
        save_file(changed, out / "model.safetensors")
        with pytest.raises(UserError, match=words):
            dict(parent.each(model))


def test_the_card_says_what_the_run_was(tiny_dataset, tmp_path, later):
    run = make_run(tiny_dataset, tmp_path / "run", "llama")
    row = {
        "step": 3,
        "tokens": 1536,
        "loss": 2.5,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "val_loss": 2.25,
        "val_bits_per_byte": 3.2,
    }
    row |= {
        "tokens_per_second": 1.0,
        "mfu": None,
        "sequence_length": 64,
        "batch_multiplier": 1,
        "seconds": 12.0,
        "epoch": 0.1,
    }
    later_row = {**row, "step": 6, "val_loss": 1.0, "task_piqa_acc": 0.9}
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(one) + "\n" for one in (row | {"task_piqa_acc": 0.5}, later_row))
    )
    card = ModelCard.load(exported(run, tmp_path / "out", license="my-own-1.0") / "README.md")
    assert card.data.to_dict() == {
        "license": "other",
        "license_name": "my-own-1.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["crescendo", "llama"],
    }
    info = find_source(str(run), None, "evaluation", "auto", print).info
    for words in (
        info.fingerprint,
        "2.2500",
        "3.2000",
        "| task_piqa_acc",
        "0.5000",
        "adamw",
        " 3, 1,536 |",
        "bytes, 257 ids",
    ):
        assert words in card.text, words
    assert "0.9000" not in card.text, "the figure of a later step"
    assert r"`<\|endoftext\|>` ends documents |" in card.text, "a bar would begin another cell"
    unknown = ModelCard.load(exported(run, tmp_path / "two") / "README.md")
    assert unknown.data.license == "unknown" and "nobody stated one" in unknown.text


def test_weights_in_bf16(tiny_dataset, tmp_path, later):
    out = exported(make_run(tiny_dataset, tmp_path / "run", "gpt2"), tmp_path / "out", dtype="bf16")
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_mistakes_are_one_line(tiny_dataset, tmp_path, monkeypatch):
    run = make_run(tiny_dataset, tmp_path / "run", "llama")
    for config, words in (
        (ExportConfig(run_dir=str(run), license="mit"), "^license: is for the model card of --format hf"),
        (
            ExportConfig(run_dir=str(run), format="hf", license="MIT License"),
            "^license: 'MIT License' is no identifier",
        ),
    ):
        with pytest.raises(UserError, match=words):
            export.run(config)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="^format: hf needs the package transformers; run `pip install"):
        export.run(ExportConfig(run_dir=str(run), format="hf"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


# -- the code that goes along ------------------------------------------------------------------------------------------


def test_code_needs_only_torch_and_transformers(tmp_path):
    """What transformers requires before it runs a file: all packages that it imports outside of `try`."""
    from transformers.dynamic_module_utils import get_imports, get_relative_imports

    load_models()
    for name in ("hlb", "modded"):
        files = carried.code_files(get_model(name), "1.0")
        for file, text in files.items():
            assert "/" not in file, "transformers copies no folders"
            (tmp_path / file).write_text(text)
            assert {f"{found}.py" for found in get_relative_imports(tmp_path / file)} <= files.keys()
            assert set(get_imports(tmp_path / file)) <= {"torch", "transformers", *sys.stdlib_module_names}, file
        copied = {f"{found}.py" for found in get_relative_imports(tmp_path / "modeling_crescendo.py")}
        assert copied == files.keys() - {"modeling_crescendo.py"}, "it copies only what this file imports"


PLUGIN = '''
import os; import models_beside as helper
from models import counting
from models.base import register
from models.layers.mlp import ACTIVATIONS, Activation
from models.presets import Llama

ACTIVATIONS["halved"] = Activation(1, helper.halved)


@register("beside-llama")
class Beside(Llama):
    """Llama with half of each output."""

    def logits(self, hidden):
        return helper.halved(super().logits(hidden))
'''


WITH_PLUGIN = """
import sys
sys.path[:0] = ["tests", "tests/commands"]
from pathlib import Path
from test_export_hugging_face import exported, make_run
from trainer.commands.plugins import import_plugin
plugin, dataset, place = map(Path, sys.argv[1:])
import_plugin(str(plugin))
exported(make_run(dataset, place / "run", "beside-llama", mlp="halved"), place / "out")
"""


@pytest.mark.slow
def test_a_plug_in_goes_along_with_the_file_beside_it(tiny_dataset, tmp_path):
    (tmp_path / "my_plugin.py").write_text(PLUGIN)
    (tmp_path / "models_beside.py").write_text("def halved(x):\n    return 0.5 * x\n")
    words = [sys.executable, "-c", WITH_PLUGIN, tmp_path / "my_plugin.py", tiny_dataset, tmp_path]
    done = subprocess.run(list(map(str, words)), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert "because no class of transformers computes Beside" in done.stderr
    assert "logits differ by at most 0.0e+00" in done.stderr
    files = {path.name for path in (tmp_path / "out").glob("crescendo_plugin_*")}
    assert files == {"crescendo_plugin_my_plugin.py", "crescendo_plugin_models_beside.py"}


@pytest.mark.parametrize(
    "begin, words",
    [
        ("from trainer.core import text\n", "tied.py, which imports trainer.core"),
        ("import models.layers.mlp\n", "tied.py, line 1: write `from ... import`"),
    ],
)
def test_a_plug_in_that_cannot_go_along_is_named(tmp_path, monkeypatch, begin, words):
    monkeypatch.setattr(plugins, "_IMPORTED", {})
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(sys.modules, "tied", None)  # so that the module is gone afterwards
    (tmp_path / "tied.py").write_text(begin + "from models.presets import Llama\n\n\nclass Mine(Llama):\n    pass\n")
    module = plugins.import_plugin(str(tmp_path / "tied.py"))
    with pytest.raises(UserError, match=f"^format: .*{words}"):
        carried.code_files(module.Mine, "1.0")


def test_the_run_of_an_export_keeps_its_config(tiny_dataset, tmp_path, later):
    """Kernels of the training machine do not go along."""
    run = make_run(tiny_dataset, tmp_path / "run", "blagpt")
    config = run / "config.yaml"
    values = yaml.safe_load(config.read_text())
    values["model"]["attention_kernel"] = "flash"
    config.write_text(yaml.safe_dump(values))
    out = exported(run, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["crescendo_config"]["attention_kernel"] == "auto"
