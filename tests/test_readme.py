"""What the guides show is what works."""

import json
import re
import runpy
import sys

import pytest
import torch
from compare_stub import STUB
from conftest import ROOT, text_only_transformers, tiny_values, words_text

from models.layers.mlp import ACTIVATIONS
from trainer.__main__ import dispatch, import_plugins
from trainer.commands.train import run
from trainer.runs.metrics import read_rows

GUIDES = sorted(
    str(path.relative_to(ROOT))
    for folder in ("", "models/", "launch/", "configs/", "trainer/**/")
    for path in ROOT.glob(f"{folder}*.md")
)


def blocks(file, language):
    """The code blocks of a guide in that language; "" for those that name none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / file).read_text(), re.DOTALL | re.MULTILINE)
    return [code for name, code in found if name == language]


# What makes a run of a guide's command a matter of a second.
TINY = (
    "--max_steps 2 --precision fp32 --batch.tokens_per_step 256 --batch.tokens_per_microbatch 256 --batch.sequence_length 32 "
    "--batch.sequence_start auto --batch.sequence_double_every auto --optim.warmup_steps 1 --evaluation.every 0 "
    "--evaluation.max_tokens 256 --log.demo_tokens 2 --log.sample_tokens 0 --checkpoint.every 0"
).split()
SPEED = {"tokens_per_second": {"median": 1000.0}, "peak_memory_bytes": 2**30}  # of a bench that is not made
SMALL = "--model.d_model 32 --model.n_layers 1".split()


PARSED_ALONE = ("serve", "export")  # tests/commands runs them: one does not end, the other takes half a minute


def commands(file="README.md"):
    """The lines of the blocks of `file` that are commands."""
    starts = ("python -m ", "launch/", "NPROC_PER_NODE", "sbatch ", "curl ")
    found = [line for block in blocks(file, "") for line in block.splitlines() if line.startswith(starts)]
    assert found
    return found


@pytest.fixture
def workplace(tiny_dataset, tmp_path, monkeypatch):
    """A current folder with what the commands of the README expect there; the tables of layers stay as they were."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trainer.data.prepare._cores", lambda: 1)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "quickstart").symlink_to(tiny_dataset)
    (tmp_path / "shakespeare.txt").write_text("ROMEO: " + words_text(0, 5000))
    (tmp_path / "mytexts").mkdir()
    for i in range(3):
        (tmp_path / "mytexts" / f"{i}.txt").write_text(words_text(i, 1000))
    (tmp_path / "silu.py").write_text(blocks("README.md", "python")[0])
    yield tmp_path
    sys.modules.pop("silu", None)
    ACTIVATIONS.pop("silu", None)


def test_every_command_of_the_readme_that_needs_one_cpu_is_run(workplace, capfd, monkeypatch):
    """In order, in one folder, and tiny; the model of shakespeare.yaml is that of the file. Comparisons train with a stub."""
    done = []
    (workplace / "data" / "quickstart-1024").symlink_to(workplace / "data" / "quickstart")
    (workplace / "stub.py").write_text(STUB)
    monkeypatch.setattr("trainer.commands.compare.queue.TRAIN", [sys.executable, "-IS", "stub.py"])
    monkeypatch.setattr("trainer.commands.compare.estimate.Speeds.measured", lambda *_: SPEED)
    for line in commands():
        words = line.split("&& ")[-1].split()
        if words[:3] != ["python", "-m", "trainer"] or "configs/hlb.yaml" in words or words[3] in PARSED_ALONE:
            continue
        verb = words[3]
        monkeypatch.setattr(
            sys, "argv", words[2:]
        )  # `compare` names its folder after its spec, and reports its command
        more = TINY if verb == "train" else ["--max_new_tokens", "2"] if verb == "generate" else []
        if verb == "compare":
            more = ["--common.batch.sequence_length", "64", "--common.data.tokenizer", "bytes"]  # of the tiny dataset
        if verb == "train" and "configs/quickstart.yaml" in words:
            more = [*more, *SMALL]
        if verb == "train" and not any(word.endswith(".yaml") for word in words):
            more = ["--max_steps", "3"]
        dispatch([*words[3:], *more])
        done.append(verb)
    assert done.count("train") == 5 and {"evaluate", "generate", "report"} < set(done) and done.count("compare") == 2
    made = {path.name.partition("-2")[0] for path in (workplace / "runs").iterdir()}
    assert made == {"quickstart", "low-lr", "shakespeare", "silu", "compare-mlp", "report"}
    assert (workplace / "runs" / "compare-mlp" / "report" / "report.html").is_file()
    assert len(read_rows(workplace / "runs" / "low-lr" / "metrics.jsonl")) == 3
    own = re.search(r"`(train configs/shakespeare.yaml [^`]*)`", (ROOT / "README.md").read_text())[1].split()
    dispatch([*own, *TINY])
    assert (workplace / "data" / "mine").is_dir() and (workplace / "runs" / "mine" / "metrics.jsonl").is_file()


def test_every_other_command_of_the_readme_is_parsed(workplace, capsys):
    """What needs a GPU, a cluster, a network or a launcher, or does not end: the script is there, and takes these keys."""
    (workplace / "data" / "quickstart").unlink()
    parsed = 0
    for line in commands():
        words = line.split("&& ")[-1].split()
        if words[0] == "curl":
            assert words[1:3] == ["-o", "shakespeare.txt"] and words[3].startswith("https://raw.githubusercontent.com/")
            continue
        if line == "python -m pytest":  # this is it
            continue
        script = next((word for word in words if word.startswith("launch/")), None)
        if script is not None:
            assert (ROOT / script).is_file()
            words = ["train", *words[words.index(script) + 1 :]]
        elif "configs/hlb.yaml" in words or words[3] in PARSED_ALONE:
            words = words[3:]
        else:
            continue
        dispatch([*words, *(("--device", "cpu") if words[0] == "train" else ()), "--print_config"])
        parsed += 1
    assert parsed == 6


def test_the_plan_of_the_readme_and_its_table(capsys):
    text = (ROOT / "README.md").read_text()
    assert "`python -m trainer plan --model_scale 2`" in text
    rows = re.findall(r"^\| ([\d.]+) \| ([\d,]{6,}) \| (\d+) \| (\d+) \|", text, re.M)
    assert len(rows) == 4
    for scale, parameters, width, layers in rows[:2]:  # tests/recipes/test_scaling.py has them all
        dispatch(["plan", "--model_scale", scale, "--json"])
        plan = json.loads(capsys.readouterr().out)
        assert [plan["params"], plan["d_model"], plan["n_layers"]] == [
            int(n.replace(",", "")) for n in (parameters, width, layers)
        ]


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 260


def test_shakespeare(shared_data, workplace, capfd):
    """The config as it is, on the text it is made for, for a few steps: 65 characters, a tenth held out."""
    (workplace / "shakespeare.txt").write_bytes((shared_data / "tinyshakespeare" / "input.txt").read_bytes())
    few = "--max_steps 3 --evaluation.max_tokens 2048 --log.demo_tokens 4 --device cpu".split()
    dispatch(["train", str(ROOT / "configs" / "shakespeare.yaml"), *few])
    said = capfd.readouterr().err
    assert "tokenizer chars: 67 ids" in said and "1,003,85" in said
    rows = read_rows(workplace / "runs" / "shakespeare" / "metrics.jsonl")
    assert len(rows) == 3 and rows[0]["loss"] > rows[-1]["loss"]


@pytest.mark.parametrize("number, flags", [(0, ["--model.mlp", "silu"]), (1, ["--model.attention", "temperature"])])
def test_the_variants_of_the_guide_train(number, flags, tiny_dataset, workplace, monkeypatch):
    from models.layers.attention import HEADS

    code = blocks("models/README.md", "python")[number]
    assert number or code == blocks("README.md", "python")[0]
    (workplace / "variant.py").write_text(code)
    options = [*TINY, *SMALL, "--data.path", str(tiny_dataset), "--run_dir", "run"]
    dispatch(["train", "--plugin", "variant.py", "--model.name", "llama", *flags, *options])
    assert len(read_rows(workplace / "run" / "metrics.jsonl")) == 2
    HEADS.pop("temperature", None)


def test_the_model_of_the_guide_trains(tiny_dataset, tmp_path, monkeypatch):
    code = blocks("models/README.md", "python")[2]
    assert len([line for line in code.splitlines() if line.strip()]) <= 11, "ten lines and a title"
    (tmp_path / "gpt2_silu.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    import_plugins(["gpt2_silu"])
    run(tiny_values(tiny_dataset, tmp_path / "run", model={"name": "gpt2-silu"}, max_steps=3))
    assert len(read_rows(tmp_path / "run" / "metrics.jsonl")) == 3
    from models.base import _REGISTRY

    del _REGISTRY["gpt2-silu"], sys.modules["gpt2_silu"], ACTIVATIONS["silu"]


@pytest.mark.parametrize("number, name", [(3, "LLAMA"), (4, "GPT2")])
def test_the_weights_of_the_guide_give_the_same_logits(number, name, tmp_path, monkeypatch):
    transformers = text_only_transformers(monkeypatch)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    sizes = {
        "LLAMA": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"num_key_value_heads": 2, "rope_theta": 500.0, "rms_norm_eps": 1e-3, "initializer_range": 0.2},
        "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "initializer_range": 0.2},
    }
    kind = {"LLAMA": "Llama", "GPT2": "GPT2"}[name]
    config = getattr(transformers, f"{kind}Config")(vocab_size=97, **sizes[name])
    torch.manual_seed(0)
    model = getattr(transformers, {"LLAMA": "LlamaForCausalLM", "GPT2": "GPT2LMHeadModel"}[name])(config)
    model.save_pretrained(tmp_path)
    code = blocks("models/README.md", "python")[number]
    # Where transformers is imported first, this is what keeps it from a torchvision that does not fit.
    assert code.index('sys.modules["torchvision"] = None') < code.index("from transformers")
    (tmp_path / "guide.py").write_text(code.replace(f'"{name}"', repr(str(tmp_path))))
    found = runpy.run_path(str(tmp_path / "guide.py"))
    tokens = torch.randint(97, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = found["ours"](tokens).logits, found["theirs"].eval()(tokens).logits
    # fp32 sums of some hundred terms in another order.
    assert (ours - theirs).abs().max() < 1e-4 < theirs.std()


@pytest.mark.parametrize("file", GUIDES)
def test_links_and_files_exist(file):
    text = (ROOT / file).read_text()
    assert "@@" not in text
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (ROOT / file).parent.joinpath(target).exists(), target
    for config in re.findall(r"configs/[\w.+-]+\.yaml", text):
        assert (ROOT / config).exists(), config


def test_commands_use_known_keys():
    """Every --key on a `python -m trainer` line of a guide is a key of that verb."""
    from trainer.commands import find_verbs
    from trainer.core.settings import free_sections, leaf_keys

    verbs = find_verbs()
    found = 0
    for file in GUIDES:
        for verb, rest in re.findall(r"-m trainer (\w+)([^`\n]*)", (ROOT / file).read_text()):
            if verb not in verbs:
                continue
            for key in re.findall(r"--([\w.]+)", rest):
                known = [*leaf_keys(verbs[verb].config), "help", "json", "print_config", "plugin"]
                free = tuple(f"{section}." for section in free_sections(verbs[verb].config))
                assert key in known or key.startswith(free), (file, verb, key)
                found += 1
    assert found > 5
