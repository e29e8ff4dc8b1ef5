"""Sampling: cached equals uncached, batches equal singles, padding never appears, and every knob does what it says."""

import pytest
import torch

from models.base import get_model, load_models
from trainer import generate as g
from trainer.errors import UserError

load_models()
VOCAB = 50  # of 64 rows


class Runner:
    def __init__(self, name):
        cls = get_model(name)
        config = cls.config_for_scale(0.05, 64, 60_000)
        self.model = cls(config)
        self.model.init_weights(torch.Generator().manual_seed(1))
        for parameter in self.model.parameters():  # far from uniform, so that argmax has no ties
            parameter.data.mul_(3)
        self.device = torch.device("cpu")

    def autocast(self):
        return torch.autocast("cpu", enabled=False)

    def agree(self, value):
        return value


@pytest.fixture(params=["hlb", "gpt2"])
def runner(request):
    return Runner(request.param)


def greedy_without_cache(model, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1, :VOCAB]
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


def test_cached_greedy_equals_the_full_forward(runner):
    prompt = [3, 1, 4, 1, 5]
    assert g.generate(runner, [prompt], 20, VOCAB, temperature=0) == [greedy_without_cache(runner.model, prompt, 20)]


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_batch_is_its_prompts_alone(runner, temperature):
    prompts = [[3], [1, 4, 1, 5, 9, 2], [6, 5]]
    options = {"temperature": temperature, "top_k": 10}
    together = g.generate(runner, prompts, 12, VOCAB, seed=7, **options)
    alone = [g.generate(runner, [prompt], 12, VOCAB, seed=7 + i, **options)[0] for i, prompt in enumerate(prompts)]
    assert together == alone
    assert [len(new) for new in together] == [12, 12, 12]


def test_padded_ids_are_never_sampled(runner):
    with torch.no_grad():
        head = (getattr(runner.model, "head", None) or runner.model.embedding).weight
        head[VOCAB:] = head[:14] * 10  # the padding would win nearly always
    new = g.generate(runner, [[1], [2]], 40, VOCAB, temperature=2.0)
    assert all(token < VOCAB for row in new for token in row)


def test_end_of_text_ends_only_its_own_text(runner):
    free = g.generate(runner, [[1], [2]], 15, VOCAB, temperature=0)
    end = free[0][4]
    ended = g.generate(runner, [[1], [2]], 15, VOCAB, temperature=0, end=end)
    assert ended[0] == free[0][: free[0].index(end)]
    assert ended[1] == (free[1][: free[1].index(end)] if end in free[1] else free[1])


def test_zero_tokens(runner):
    assert g.generate(runner, [[1, 2]], 0, VOCAB) == [[]]


def draws(count=4000, **options):
    logits = torch.log(torch.tensor([0.5, 0.25, 0.15, 0.1]))
    generator = torch.Generator().manual_seed(0)
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **options}
    tokens = [
        g.sample(logits, options["temperature"], options["top_k"], options["top_p"], generator) for _ in range(count)
    ]
    return [tokens.count(i) / count for i in range(4)]


def test_sampling_frequencies():
    # Five standard errors of a share of 4000 draws are 0.04 at most.
    assert draws() == pytest.approx([0.5, 0.25, 0.15, 0.1], abs=0.04)
    assert draws(temperature=0.5) == pytest.approx([0.725, 0.181, 0.065, 0.029], abs=0.04)
    assert draws(top_k=2) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=0.04)
    assert draws(top_p=0.74) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=0.04)
    assert draws(top_p=0.76) == pytest.approx([5 / 9, 5 / 18, 1 / 6, 0], abs=0.04)
    assert draws(top_p=1e-9, count=50) == [1, 0, 0, 0]
    assert draws(temperature=0, count=5) == [1, 0, 0, 0]


def test_cut_at():
    assert g.cut_at("one two three", ["three", " two"]) == "one"
    assert g.cut_at("one", []) == "one"
    assert g.cut_at("one", ["x"]) == "one"


class Letters:
    vocab_size, eot_id = VOCAB, 49

    def encode(self, text):
        return torch.tensor([ord(c) - 97 for c in text])

    def decode(self, ids):
        return "".join(chr(97 + i) for i in ids)


def test_stop_strings_and_empty_prompts(runner):
    [text] = g.complete(runner, Letters(), ["abc"], 20, [], temperature=0)
    stop = text[3:5]
    assert g.complete(runner, Letters(), ["abc"], 20, [stop], temperature=0) == [text[: text.index(stop)]]
    assert len(g.complete(runner, Letters(), [""], 5, [], temperature=0)[0]) <= 5


def test_a_full_context_is_an_error():
    runner = Runner("gpt2")
    limit = runner.model.max_context
    with pytest.raises(UserError, match=f"max_new_tokens: .* exceed the model's context of {limit}"):
        g.complete(runner, Letters(), ["abc"], limit, [])
