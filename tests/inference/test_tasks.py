"""lm-eval's tasks on the run's own model, against lm-eval's own model of transformers and against plain PyTorch."""

import json
import math
import shutil
import sys

import pytest
import torch
import yaml
from conftest import text_only_transformers, tiny_values, trainer
from task_files import NAMES, QUESTIONS, paradigms, write_tasks
from tiny_runs import WORLD, make

from trainer.commands import evaluate as verb
from trainer.core.errors import UserError
from trainer.data.tokenizers import Tokenizer
from trainer.inference.tasks import scoring
from trainer.inference.tasks.scoring import log_likelihoods
from trainer.inference.tasks.suite import Suite
from trainer.planning.parent import with_origin
from trainer.runs.opening import open_run

pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
LENGTH = 64  # of the tiny run's model
SIZES = {"vocab_size": 257, "initializer_range": 0.2}  # all ids of the tokenizer: ours never writes another
MODELS = {
    "GPT2LMHeadModel": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "LlamaForCausalLM": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    },
}


@pytest.fixture(scope="module")
def opened(finished):
    return open_run(str(finished), None, "cpu", "fp32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def by_hand(model, context, continuation, length=LENGTH):
    """(log-likelihood, whether it is greedy) of a continuation, in fp64, one request at a time."""
    tokens = (context + continuation)[-(length + 1) :]
    with torch.no_grad():
        logits = model(torch.tensor([tokens[:-1]])).logits[0, -len(continuation) :].double()
    targets = torch.tensor(continuation)
    nats = logits.log_softmax(-1).gather(1, targets[:, None]).sum().item()
    return nats, bool((logits.argmax(-1) == targets).all())


def test_log_likelihoods_are_those_of_a_plain_computation(opened, monkeypatch):
    """Of short and long contexts, of those that are cut, and of continuations that share what the model reads."""
    draw = torch.Generator().manual_seed(3)
    ids = lambda count: torch.randint(256, (count,), generator=draw).tolist()  # noqa: E731
    requests = [(ids(1 + 7 * i), ids(1 + i % 4)) for i in range(14)]
    shared = ids(9)
    requests += [(shared, [5]), (shared, [6]), (shared[:-1], [shared[-1], 7])]
    likeliest = opened.model(torch.tensor([shared])).logits[0, -1].argmax().item()
    requests.append((shared, [likeliest]))
    expected = [by_hand(opened.model, *request) for request in requests]
    assert expected[-1][1] and not expected[0][1]
    for most in (1, 100, 10_000):
        monkeypatch.setitem(scoring.BATCH_TOKENS, "cpu", most)
        found = log_likelihoods(opened, requests, LENGTH, WORLD)
        # Sums of up to 4 terms near 6 nats, each with some roundings of fp32.
        assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in expected], abs=1e-4)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        assert [nats.tokens for nats, _ in found] == [len(continuation) for _, continuation in requests]


def test_a_continuation_longer_than_the_context_is_refused(opened):
    with pytest.raises(UserError, match="^evaluation.sequence_length: 64 tokens .* a continuation has 65; raise it"):
        log_likelihoods(opened, [([1], [2] * 65)], LENGTH, WORLD)


def test_broken_weights_are_told(opened, monkeypatch):
    monkeypatch.setattr(opened, "predict", lambda *_, positions: torch.full((1, positions.shape[1], 300), math.nan))
    with pytest.raises(UserError, match="^tasks: the model gives log-probabilities that are NaN"):
        log_likelihoods(opened, [([1], [2])], LENGTH, WORLD)


# -- against lm-eval's own model of transformers -------------------------------------------------------------------------


def theirs_and_ours(kind, dataset, folder, monkeypatch):
    """lm-eval's HFLM of a random model of transformers, and our engine with its weights; the tokenizer."""
    transformers = text_only_transformers(monkeypatch)
    from lm_eval.models.huggingface import HFLM

    torch.manual_seed(0)
    config = getattr(transformers, kind.replace("LMHeadModel", "").replace("ForCausalLM", "") + "Config")
    model = getattr(transformers, kind)(config(**SIZES, **MODELS[kind])).eval()
    model.save_pretrained(folder / "m")
    file = str(dataset / "tokenizer.json")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=file, eos_token="<|endoftext|>")
    hflm = HFLM(pretrained=model, tokenizer=fast, batch_size=4, max_length=128)
    values = tiny_values(dataset, folder / "r", init_from=str(folder / "m"), max_steps=2)
    values = {key: value for key, value in values.items() if key not in ("model", "model_scale")}
    whole = with_origin(values, None, 1, WORLD.say)
    keys = ("init_from", "model", "parameters")
    run = make(dataset, folder / "r", model_scale=None, **{key: whole[key] for key in keys})
    run.begin()
    run.stream.close()
    return hflm, run.engine, Tokenizer.from_file(file)


def answers(suite):
    """(log-likelihood, whether it is greedy) of every request of a suite, by task, question and choice."""
    return {
        (name, request.doc_id, request.idx): request.resps[0]
        for name, task in suite.loaded["tasks"].items()
        for request in task.instances
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_figures_are_those_of_lm_evals_own_model(kind, tiny_dataset, folder, tmp_path, monkeypatch):
    """All tasks, with contexts that are cut (their 128 tokens are bytes) and with examples in the prompt."""
    hflm, engine, tokenizer = theirs_and_ours(kind, tiny_dataset, tmp_path, monkeypatch)
    names = [name for name in NAMES if name != "hellaswag_gpt2"]  # HFLM does not tell the number of tokens
    suite = Suite(names, str(folder), 3, 1)
    ours = suite.evaluate(engine, tokenizer, 128, WORLD)["tasks"]
    assert same_answers(suite, hflm, ours) > 3 * 67 * 2


def same_answers(suite, hflm, ours) -> int:
    """How many requests lm-eval's own model answers as ours did. ours: the figures of its tasks, from the answers in the suite."""
    from lm_eval.evaluator import evaluate

    from trainer.inference.tasks.suite import SHOT_SEED, quiet

    found = answers(suite)
    for task in suite.loaded["tasks"].values():
        task.set_fewshot_seed(SHOT_SEED)
    with quiet(40):
        theirs = evaluate(hflm, suite.loaded, limit=suite.limit, log_samples=False, bootstrap_iters=10)["results"]
    expected = answers(suite)
    assert found.keys() == expected.keys()
    for key, (nats, greedy) in expected.items():
        assert found[key][0] == pytest.approx(nats, abs=1e-4), key
        assert found[key][1] == greedy, key
    for name, figures in ours.items():
        for metric in ("acc", "acc_norm", "perplexity"):
            if f"{metric},none" in theirs[name]:
                assert figures[metric] == pytest.approx(theirs[name][f"{metric},none"], rel=1e-4)
                error = theirs[name][f"{metric}_stderr,none"]
                if metric != "perplexity":  # a bootstrap of other samples
                    assert figures["stderr"][metric] == pytest.approx(error)
    return len(found)


@pytest.mark.slow
def test_an_exported_run_has_the_same_figures_in_lm_eval(tiny_dataset, folder, tmp_path, monkeypatch):
    """Trained, evaluated and exported by the commands; lm-eval reads nothing but the exported folder."""
    pytest.importorskip("transformers", reason="needs Hugging Face transformers as the reference")
    values = tiny_values(tiny_dataset, tmp_path / "run", model={"name": "llama"}, max_steps=20, optim={"lr": 3e-2})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    names = ["lambada_openai", "arc_easy", "piqa", "winogrande"]
    asked = ["--tasks", ",".join(names), "--tasks_dir", folder, "--tasks_limit", "4", "--sequence_length", "64"]
    told = []
    for words in (
        ["train", tmp_path / "run.yaml"],
        ["export", tmp_path / "run", "--format", "hf", "--out", tmp_path / "out"],
        ["evaluate", tmp_path / "run", *asked, "--json"],
    ):
        done = trainer(*words)
        assert done.returncode == 0, done.stderr
        told.append(done.stdout)
    text_only_transformers(monkeypatch)
    from lm_eval.models.huggingface import HFLM

    hflm = HFLM(pretrained=str(tmp_path / "out"), device="cpu", dtype="float32", batch_size=4, max_length=64)
    suite = Suite(names, str(folder), 4, 0)
    opened = open_run(str(tmp_path / "run"), None, "cpu", "fp32")
    again = suite.evaluate(opened, opened.tokenizer, 64, WORLD)["tasks"]  # leaves its answers in the suite
    ours = json.loads(told[-1])["tasks"]
    assert {name: figures["acc"] for name, figures in ours.items()} == {name: again[name]["acc"] for name in ours}
    assert len({nats for nats, _ in answers(suite).values()}) > 20, "a model that knows nothing would agree by itself"
    # One question of arc_easy has a choice twice, which counts once.
    assert same_answers(suite, hflm, ours) == 4 + (4 * 4 - 1) + 4 * 2 + 4 * 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_texts_are_those_of_lm_evals_own_model(kind, tiny_dataset, tmp_path, monkeypatch):
    """Whole texts in windows of the context, and texts that the model writes."""
    from lm_eval.api.instance import Instance

    from trainer.inference.tasks.harness import LiveModel

    hflm, engine, tokenizer = theirs_and_ours(kind, tiny_dataset, tmp_path, monkeypatch)
    ours = LiveModel(engine, tokenizer, 128, WORLD)
    texts = ["the cat sat on a mat " * count for count in (1, 6, 20)]
    assert [len(tokenizer.encode(text)) for text in texts][1:] > [126, 400]
    rolled = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    with torch.no_grad():
        assert ours.loglikelihood_rolling(rolled) == pytest.approx(hflm.loglikelihood_rolling(rolled), abs=1e-3)
        options = {"until": ["e", "\n"], "max_gen_toks": 12}
        written = [Instance("generate_until", {}, (text, dict(options)), 0) for text in texts]
        assert ours.generate_until(written) == hflm.generate_until(written)


# -- the tasks -----------------------------------------------------------------------------------------------------------


def test_hellaswag_per_token_is_its_definition(opened, folder):
    """As GPT2_Reproduction: tokens of the context and of each ending by themselves, the mean loss of the ending's tokens."""
    suite = Suite(["hellaswag_gpt2"], str(folder), 0, None)
    found = suite.evaluate(opened, opened.tokenizer, 200, WORLD)["tasks"]["hellaswag_gpt2"]
    lines = (folder / "hellaswag" / "hellaswag_val_full.txt").read_text().splitlines()
    right, right_norm = 0, 0
    for first in range(0, len(lines), 6):
        activity, gold, *endings = lines[first : first + 6]
        context = opened.tokenizer.encode(activity.split(": ", 1)[1]).tolist()
        options = [opened.tokenizer.encode(" " + ending).tolist() for ending in endings]
        losses = [-by_hand(opened.model, context, tokens, 200)[0] for tokens in options]
        means = [loss / len(tokens) for loss, tokens in zip(losses, options, strict=True)]
        right += losses.index(min(losses)) == int(gold)
        right_norm += means.index(min(means)) == int(gold)
    assert (found["acc"], found["acc_norm"]) == (right / QUESTIONS, right_norm / QUESTIONS)
    assert found["documents"] == QUESTIONS and found["chance"] == 0.25


FORMS = {
    "hellaswag": ("Sailing: A b. Then he", [" one.", " two.", " three.", " four."], 2),
    "hellaswag_gpt2": ("A b. then he", [" one.", " two.", " three.", " four."], 2),
    "lambada_openai": ("a b", [" c"], None),
    "arc_easy": ("Question: a?\nAnswer:", [" b", " c", " d"], 1),
    "arc_challenge": ("Question: a?\nAnswer:", [" b", " c", " d"], 1),
    "piqa": ("Question: a\nAnswer:", [" b", " c"], 1),
    "boolq": ("a. b.\nQuestion: c?\nAnswer:", [" no", " yes"], 1),
    "copa": ("a because", ["  b.", "  c."], 1),
    "openbookqa": ("a", [" b", " c"], 1),
    "commonsense_qa": ("Question: a?\nA. b\nB. c\nC. d\nD. e\nAnswer:", [" A", " B", " C", " D"], 3),
    "social_iqa": ("Q: a. b?\nA:", [" c", " d"], 1),
    "winogrande": (["a b", "a c"], [" d."], 1),
    "wsc273": (["a b", "a c"], ["  d."], 1),
    "blimp": ("", [" a b.", " b a."], 0),
}


def write_forms(folder):
    (folder / "hellaswag_val_full.txt").write_text("Sailing: A b. then he\n2\none.\ntwo.\nthree.\nfour.\n")
    questions = {
        "lambada_test": {"text": "a b c"},
        "arc_easy": {"query": "Question: a?", "choices": ["b", "c", "b", "d"], "gold": 1},
        "piqa": {"query": "Question: a\n", "choices": ["b", "c"], "gold": 1},
        "boolq": {"query": "Passage: a. b.\nQuestion: c?", "choices": ["no", "yes"], "gold": 1},
        "copa": {"query": "a, because", "choices": ["b.", "c."], "gold": 1},
        "openbook_qa": {"query": "a", "choices": ["b", "c"], "gold": 1},
        "commonsense_qa": {
            "query": "Question: a?\nChoices:\nA. b\nB. c\nC. d\nD. e\nAnswer:",
            "choices": ["A", "B", "C", "D"],
            "gold": 3,
        },
        "siqa": {
            "query": "Context: a.\nQuestion: b?\nChoices:\nA. c\nB. d\nAnswer:",
            "choices": ["A", "B"],
            "gold": 1,
        },
        "winogrande": {"context_options": ["a b", "a c"], "continuation": "d.", "gold": 1},
        **{name: {"sentence_good": "a b.", "sentence_bad": "b a."} for name in paradigms()},
    }
    questions |= {"arc_challenge": questions["arc_easy"], "winograd_wsc": questions["winogrande"]}
    for name, question in questions.items():
        (folder / f"{name}.jsonl").write_text(json.dumps(question) + "\n")


def test_questions_have_the_form_of_lm_evals_own_tasks(opened, tmp_path):
    """What its YAML files and functions make of the same questions; BLiMP is read from files of its paradigms."""
    write_forms(tmp_path)
    assert set(FORMS) == set(NAMES) and len(paradigms()) == 67
    suite = Suite(NAMES, str(tmp_path), 0, None)
    suite.check(opened.tokenizer, LENGTH)
    for name, task in suite.loaded["tasks"].items():
        contexts, continuations, gold = FORMS[name.partition("::")[0]]
        asked = [request.args for request in task.instances]
        if isinstance(contexts, str):
            assert asked == [(contexts, text) for text in continuations], name
            assert gold is None or task.doc_to_target(task.instances[0].doc) == gold
        else:
            assert asked == [(text, continuations[0]) for text in contexts], name
            assert task.doc_to_text(task.instances[0].doc) == gold


COUNTS = {
    "hellaswag": 10_042,
    "hellaswag_gpt2": 10_042,
    "lambada_openai": 5153,
    "arc_easy": 2376,
    "arc_challenge": 1172,
}
COUNTS |= {"piqa": 1838, "winogrande": 1267, "boolq": 3270, "copa": 100, "openbookqa": 500, "commonsense_qa": 1221}
COUNTS |= {"social_iqa": 1954, "wsc273": 273}


@pytest.mark.slow
def test_the_published_files_are_read_whole(shared_data):
    suite = Suite(NAMES, str(shared_data / "eval"), 0, None)
    sizes = {name: len(task.eval_docs) for name, task in suite.loaded["tasks"].items()}
    assert {name: size for name, size in sizes.items() if "::" not in name} == COUNTS
    assert [size for name, size in sizes.items() if "::" in name] == [1000] * 67
    tasks = suite.loaded["tasks"]
    first = tasks["hellaswag"].eval_docs[0]
    assert first["query"] == "Roof shingle removal: A man is sitting on a roof. He" and first["gold"] == 3
    assert tasks["lambada_openai"].eval_docs[1]["answer"] == " Shane"
    # Contexts of ActivityNet, a third of all, end with the beginning of a sentence.
    lines = (shared_data / "eval" / "hellaswag" / "hellaswag_val_full.txt").read_text(encoding="utf-8").split("\n")
    changed = [one != two for one, two in zip(tasks["hellaswag"].eval_docs["query"], lines[:-1:6], strict=True)]
    assert sum(changed) == 3235 and not any("How to" in lines[6 * i] for i, one in enumerate(changed) if one)
    assert sum(len(one["choices"]) == 3 for one in tasks["arc_easy"].eval_docs) == 7


@pytest.mark.parametrize(
    "name, content, line",
    [
        ("hellaswag_val_full.txt", "a\n1\nb\n", "has 3 lines, and each of its documents is six lines"),
        ("hellaswag_val_full.txt", "a\n7\nb\nc\nd\ne\n", "line 1: expected a context, 0 to 3, and four endings"),
        ("hellaswag_val_full.txt", b"\xff\n", "is not UTF-8 at byte 0"),
        (
            "piqa.jsonl",
            '{"query": "a\\n", "choices": ["b", "c"], "gold": 2}\n',
            "line 1: is not a question of this task",
        ),
        ("copa.jsonl", '{"query": "a and", "choices": ["b", "c"], "gold": 0}\n', "line 1: is not a question"),
        ("lambada_test.jsonl", '{"text": "a b"}\n{"text": "one"}\n', "line 2: is not a question of this task"),
        ("siqa.jsonl", "no json\n", "line 1: is not a question of this task"),
        ("wsc.jsonl", "", "holds no winograd_wsc.jsonl, neither itself nor in a folder of it"),
        ("BLiMP.zip", "no zip", "cannot read data/.*jsonl"),
        ("adjunct_island.jsonl", "", "no questions"),
    ],
)
def test_wrong_data_are_one_line(tmp_path, name, content, line):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    task = {"hellaswag_val_full": "hellaswag", "lambada_test": "lambada", "wsc": "winograd_wsc"}
    task |= dict.fromkeys(("BLiMP", "adjunct_island"), "blimp")
    stem = name.partition(".")[0]
    with pytest.raises(UserError, match=f"^tasks_dir: .*{line}") as caught:
        Suite([task.get(stem, stem)], str(tmp_path), 0, None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"tasks": ["hellaswga"]}, "^tasks: there is no task 'hellaswga'; did you mean hellaswag\\?"),
        ({"tasks": [","]}, "^tasks: ',' names nothing; give names, or leave it out"),
        ({"tasks": ["piqa"], "tasks_dir": "/nowhere"}, "^tasks_dir: /nowhere is not a folder"),
        ({"tasks": ["piqa"], "text": "a.txt"}, "^tasks, metrics: need no data; leave out data.path and text"),
        ({"tasks": ["lambada"], "sequence_length": 1}, "^evaluation.sequence_length: 1 tokens are too few"),
    ],
)
def test_a_wrong_command_is_one_line(finished, folder, changes, line):
    config = verb.EvaluateConfig(run_dir=str(finished), device="cpu", **{"tasks_dir": str(folder), **changes})
    with pytest.raises(UserError, match=line):
        verb.run(config)


def test_a_missing_package_is_one_line(monkeypatch, folder):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="^tasks: lm-eval is not installed; `pip install 'crescendo-lm\\[lm-eval\\]'`"):
        Suite(["piqa"], str(folder), 0, None)


def test_the_verb_prints_and_keeps_the_figures(finished, folder, tmp_path, capfd):
    """JSON alone on stdout, and the same with a table in RUN/evaluation; the centred mean from the figures themselves."""
    run = shutil.copytree(finished, tmp_path / "run")
    config = verb.EvaluateConfig(run_dir=str(run), device="cpu", tasks=["boolq,arc_easy", "lambada"], shots=1)
    config.tasks_dir, config.tasks_limit, config.sequence_length = str(folder), 4, 200
    verb.run(config, True)
    printed = json.loads(capfd.readouterr().out)
    [file] = (run / "evaluation").glob("*.json")
    assert json.loads(file.read_text()) == printed and file.name.startswith("step-00000012-")
    tasks = printed["tasks"]
    assert list(tasks) == ["boolq", "arc_easy", "lambada_openai"] and printed["step"] == 12
    # Two of the first four questions of boolq are answered yes, so a guess is right in half of them; arc's second has three answers.
    assert [tasks[name]["chance"] for name in tasks] == pytest.approx([0.5, (3 / 4 + 1 / 3) / 4, 0])
    counted = [tasks["boolq"]["acc"], tasks["arc_easy"]["acc_norm"], tasks["lambada_openai"]["acc"]]
    centred = [
        (value - entry["chance"]) / (1 - entry["chance"]) for value, entry in zip(counted, tasks.values(), strict=True)
    ]
    assert printed["centred_mean"] == pytest.approx(sum(centred) / 3)
    assert all(entry["documents"] == 4 and entry["shots"] == 1 for entry in tasks.values())
    assert tasks["arc_easy"]["stderr"].keys() == {"acc", "acc_norm"} and printed["versions"]["lm_eval"]
    verb.run(config)
    table = capfd.readouterr().out
    assert f"{tasks['boolq']['acc']:.4f}" in next(line for line in table.splitlines() if line.startswith("| boolq"))
    written = sorted((run / "evaluation").glob("*.md"))
    assert len(written) == 2 and written[-1].read_text() == table


def test_a_run_that_wandb_records_gets_the_figures_in_its_summary(finished, folder, tmp_path, monkeypatch, capfd):
    """Under the id of the run, and beside the rows of its steps, which stay as they are."""
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "wandb-id").write_text("abc")
    begun, summary = [], {}

    class Service:
        Settings = dict
        init = staticmethod(lambda **settings: begun.append(settings) or Service)
        finish = staticmethod(lambda: None)

    Service.summary = summary
    monkeypatch.setitem(sys.modules, "wandb", Service)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    config = verb.EvaluateConfig(run_dir=str(run), device="cpu", tasks=["piqa"], tasks_dir=str(folder), tasks_limit=2)
    config.sequence_length = 200
    verb.run(config, True)
    assert not begun, "this run is not recorded by wandb"
    capfd.readouterr()
    recorded = open_run(str(run), None, "cpu", "fp32")
    recorded.config.log.wandb = "offline"
    monkeypatch.setattr("trainer.runs.opening.open_run", lambda *_: recorded)
    verb.run(config, True)
    found = json.loads(capfd.readouterr().out)["tasks"]["piqa"]
    assert summary == {
        "evaluate_task_piqa_acc": found["acc"],
        "evaluate_task_piqa_acc_norm": found["acc_norm"],
        "evaluate_step": 12,
    }
    assert [settings["id"] for settings in begun] == ["abc"]
