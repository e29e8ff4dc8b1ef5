"""Sampling: cached equals uncached, batches equal singles, padding never appears, and every knob does what it says."""

import io
import json
import re

import pytest
import tokenizers
import torch
from test_recurrent_models import FORMS, recurrent_model

from models.base import get_model, load_models, model_names
from models.presets import Gpt2
from trainer.commands.generate import write
from trainer.core.errors import UserError
from trainer.data.tokenizers import Tokenizer, get_tokenizer
from trainer.inference import decoding as g
from trainer.inference.reader import CHECKED_TOKENS, why_not_incremental
from trainer.inference.sampling import Noise, Sampling, choose, penalised, seen_mask

load_models()
VOCAB = 50  # of 64 rows


SIZES = {"zamba2": 300_000}  # parameters, of a model that cannot be as small as the others


class Runner:
    """factor: of the initial weights. With 3 the logits are far from uniform, so that argmax has no ties."""

    def __init__(self, name, factor=3):
        cls = get_model(name)
        config = cls.config_for_scale(0.05, 64, SIZES.get(name, 60_000))
        self.model = cls(config)
        self.model.init_weights(torch.Generator().manual_seed(1))
        for parameter in self.model.parameters():
            parameter.data.mul_(factor)
        self.device, self.precision = torch.device("cpu"), "fp32"

    def autocast(self):
        return torch.autocast("cpu", enabled=False)

    def agree(self, value):
        return value

    def predict(self, tokens, documents=None, cache=None):
        return self.model(tokens, documents=documents, cache=cache).logits


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


class Given(Runner):
    """Generates with a model that is there already."""

    def __init__(self, model):
        self.model, self.device, self.precision = model, torch.device("cpu"), "fp32"


@pytest.mark.parametrize("form", FORMS)
def test_a_recurrent_model_reads_prompts_of_several_lengths_together(form):
    draw, runner = torch.Generator().manual_seed(2), Given(recurrent_model(form))
    prompts = [torch.randint(VOCAB, (length,), generator=draw).tolist() for length in (1, 70, 33, 2)]
    together = g.generate(runner, prompts, 5, VOCAB, temperature=0)
    assert together == [g.generate(runner, [prompt], 5, VOCAB, temperature=0)[0] for prompt in prompts]


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


def test_events_name_each_new_token_with_its_log_probability(runner):
    """Of the model's own distribution, whatever the sampling options are; nothing for the token that ends a text."""
    prompts, events = [[3], [1, 4, 1, 5, 9, 2]], []
    options = {"temperature": 0.5, "top_k": 10, "repetition_penalty": 1.3}
    plain = g.generate(runner, prompts, 12, VOCAB, **options)
    end = plain[0][5]
    new = g.generate(runner, prompts, 12, VOCAB, end=end, on_token=events.append, alternatives=3, **options)
    assert new == [row[: row.index(end)] if end in row else row for row in plain]
    for row, prompt in enumerate(prompts):
        mine = [event for event in events if event.row == row]
        assert [event.token for event in mine] == new[row]
        with torch.no_grad():
            logits = runner.model(torch.tensor([prompt + new[row]])).logits[0, len(prompt) - 1 :, :VOCAB]
        for event, scores in zip(mine, logits.log_softmax(-1), strict=False):
            assert event.log_probability == pytest.approx(scores[event.token].item(), abs=1e-3)
            best = scores.topk(3)
            assert [token for token, _ in event.alternatives] == best.indices.tolist()
            assert [value for _, value in event.alternatives] == pytest.approx(best.values.tolist(), abs=1e-3)
    events.clear()
    assert g.generate(runner, prompts, 3, VOCAB, on_token=events.append, **options) == [row[:3] for row in plain]
    assert all(event.log_probability is None and event.alternatives == () for event in events) and len(events) == 6
    events.clear()
    g.generate(runner, [[3]], 1, VOCAB, on_token=events.append, alternatives=0)
    assert events[0].log_probability < 0 and events[0].alternatives == ()


def test_a_cancelled_text_is_what_was_made_until_then(runner):
    plain, events = g.generate(runner, [[3], [6, 5]], 12, VOCAB), []
    new = g.generate(runner, [[3], [6, 5]], 12, VOCAB, on_token=events.append, cancelled=lambda: len(events) >= 7)
    assert new == [plain[0][:4], plain[1][:3]]
    assert g.generate(runner, [[3]], 12, VOCAB, cancelled=lambda: True) == [[]]


def draws(count=4000, **options):
    logits = torch.log(torch.tensor([0.5, 0.25, 0.15, 0.1])).expand(count, 4)
    noise = torch.empty(count, 4).exponential_(generator=torch.Generator().manual_seed(0))
    tokens = choose(logits, Sampling(**options), noise).tolist()
    return [tokens.count(i) / count for i in range(4)]


def test_sampling_frequencies():
    # Five standard errors of a share of 4000 draws are 0.04 at most.
    assert draws() == pytest.approx([0.5, 0.25, 0.15, 0.1], abs=0.04)
    assert draws(temperature=0.5) == pytest.approx([0.725, 0.181, 0.065, 0.029], abs=0.04)
    assert draws(top_k=2) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=0.04)
    assert draws(top_p=0.74) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=0.04)
    assert draws(top_p=0.76) == pytest.approx([5 / 9, 5 / 18, 1 / 6, 0], abs=0.04)
    assert draws(min_p=0.4) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=0.04)
    assert draws(top_k=2, min_p=0.6, count=50) == [1, 0, 0, 0]
    assert draws(top_p=1e-9, count=50) == [1, 0, 0, 0]
    assert draws(temperature=0, count=5) == [1, 0, 0, 0]


def test_the_penalty_of_repetition_is_ctrls():
    logits, device = torch.tensor([2.0, -2.0, 0.0, 1.0]), torch.device("cpu")
    assert penalised(logits, 2.0, seen_mask([[0, 1, 0]], 4, device)[0]).tolist() == [1.0, -4.0, 0.0, 1.0]
    both = choose(logits.expand(2, 4), Sampling(0, repetition_penalty=4.0), seen=seen_mask([[0], [3]], 4, device))
    assert both.tolist() == [3, 0], "each text has its own"
    before, after = logits.softmax(-1), penalised(logits, 1.3, seen_mask([[0, 1, 2]], 4, device)[0]).softmax(-1)
    assert (after[3] > before[3]) and logits.tolist() == [2.0, -2.0, 0.0, 1.0]


@pytest.mark.parametrize("vocab", [4, 65, 50_257])
def test_on_a_cpu_the_numbers_are_those_of_multinomial(vocab):
    """So a seed gives the texts that it gave in crescendo-lm 0.3.0, which drew with torch.multinomial, text by text."""
    noise, how = Noise(7, 2, vocab, torch.device("cpu")), Sampling(temperature=0.8, top_k=40)
    old = [torch.Generator().manual_seed(7), torch.Generator().manual_seed(8)]
    logits = torch.randn(2, vocab, generator=torch.Generator().manual_seed(1))
    best = (logits / 0.8).topk(min(40, vocab)).values[:, -1:]
    for place in range(20):
        probabilities = (logits / 0.8).masked_fill(logits / 0.8 < best, -torch.inf).softmax(-1)
        expected = [
            int(torch.multinomial(row, 1, generator=draw)) for row, draw in zip(probabilities, old, strict=True)
        ]
        assert choose(logits, how, noise.at([place, place])).tolist() == expected


def test_a_prompts_tokens_are_penalised_and_texts_repeat_less(runner):
    prompt = [3, 1, 4, 1, 5]
    plain = g.generate(runner, [prompt], 20, VOCAB, temperature=0)[0]
    assert g.generate(runner, [prompt], 20, VOCAB, temperature=0, repetition_penalty=1.0)[0] == plain
    never = g.generate(runner, [prompt], 20, VOCAB, temperature=0, repetition_penalty=1e6)[0]
    assert len(set(prompt + never)) == len(set(prompt)) + 20, "each token is a new one"


def test_pieces_of_a_text_are_those_of_the_whole(runner):
    pieces = []
    [text] = g.complete(runner, Letters(), ["abc"], 20, [], temperature=0, show=pieces.append)
    assert "".join(pieces) == text and len(pieces) >= len(text), "one at a time"
    stop, pieces = text[1:3], []
    [cut] = g.complete(runner, Letters(), ["abc"], 20, [stop], temperature=0, show=pieces.append)
    assert "".join(pieces) == cut == text[: text.index(stop)]


def test_a_character_or_stop_string_in_the_making_is_held_back():
    stable = g.Stable(["END", "\n\n"])
    assert [stable.more(text) for text in ("a\ufffd", "a\u20ac", "a\u20acE", "a\u20acEN")] == ["a", "\u20ac", "", ""]
    assert stable.more("a\u20acENx\n") == "ENx"
    assert stable.more("a\u20acENx\n\nmore") == ""
    assert stable.more("a\u20acENx\n\nmore", ended=True) == ""


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


@pytest.mark.parametrize("limit", [1, 7, 8])
@pytest.mark.parametrize("cached", [True, False])
def test_past_its_context_a_model_drops_the_first_half_of_what_it_sees(limit, cached):
    """By position alone: also in a batch, without a cache, and with a prompt that is too long itself."""
    runner, said = Runner("gpt2"), []
    if not cached:
        runner = runner_of(Declared)
    runner.model.max_context, step = limit, max(1, limit // 2)
    long = [[n % VOCAB for n in range(1, 32)], [3, 1]]
    calls = counted_tokens(runner)
    new = g.generate(runner, long, 20, VOCAB, temperature=0, say=said.append)
    read = sum(calls)
    for prompt, continued in zip(long, new, strict=True):
        ids = list(prompt)
        for _ in range(20):
            begin = 0
            while len(ids) - begin > limit:
                begin += step
            with torch.no_grad():
                ids.append(int(runner.model(torch.tensor([ids[begin:]])).logits[0, -1, :VOCAB].argmax()))
        assert continued == ids[len(prompt) :]
    assert (
        said[-1]
        == f"text: longer than the model's context of {limit} tokens: whenever it is full, only its last half is kept"
    )
    assert len(said) == (1 if cached else 2)
    if cached and limit > 1:
        # Each of 50 tokens once, what stays at most each `step` tokens again, and the trial's.
        assert read <= 50 + 50 // step * limit + 2 * CHECKED_TOKENS


def counted_tokens(runner):
    """Tokens that each pass of the model computes, from now on."""
    calls, predict = [], runner.predict

    def counting(tokens, **options):
        calls.append(tokens.shape[1])
        return predict(tokens, **options)

    runner.predict = counting
    return calls


# -- models that take no cache ----------------------------------------------------------------------------------------------


class Convolution(Gpt2):
    """Mixes each token with the one before it, and knows nothing of a cache."""

    def context(self, tokens, documents, cache):
        return super().context(tokens, documents, None)

    def trunk(self, x, tables, context, cache):
        return super().trunk(x + x.roll(1, dims=1) * (context.positions > 0)[:, None], tables, context, None)


class Refusing(Gpt2):
    def forward(self, tokens, targets=None, documents=None, cache=None, reduction="mean"):
        if cache is not None:
            raise NotImplementedError("no cache yet")
        return super().forward(tokens, targets, documents, None, reduction)


class Declared(Convolution):
    decodes_incrementally = False


def runner_of(model_class):
    runner = Runner("gpt2")
    model = model_class(runner.model.config)
    model.load_state_dict(runner.model.state_dict())
    runner.model = model
    return runner


@pytest.mark.parametrize(
    "model_class, why",
    [
        (Convolution, r"with a cache the model's logits differ by \d"),
        (Refusing, r"with a cache the model fails \(NotImplementedError: no cache yet\)"),
        (Declared, "the model says that it does not decode incrementally"),
    ],
)
def test_a_model_that_takes_no_cache_gets_its_whole_context_and_that_is_said_once(model_class, why):
    runner, said = runner_of(model_class), []
    for _ in range(2):
        new = g.generate(runner, [[5, 3, 1], [4]], 12, VOCAB, temperature=0, say=said.append)
        assert new == [greedy_without_cache(runner.model, prompt, 12) for prompt in ([5, 3, 1], [4])]
    assert len(said) == 1 and re.match(f"text: the whole context is computed again for every token: {why}", said[0])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "pure_bf16"])
@pytest.mark.parametrize("name", [name for name in model_names() if get_model(name).__module__.startswith("models.")])
def test_rounding_is_no_reason_to_compute_the_whole(name, precision):
    runner = Runner(name, factor=1)  # with 3, bf16 alone changes tokenformer's logits by a third of their size
    runner.precision = precision
    runner.model.eval()
    if precision == "pure_bf16":
        runner.model.bfloat16()
    runner.autocast = lambda: torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    assert why_not_incremental(runner, VOCAB) == ""


# -- text -----------------------------------------------------------------------------------------------------------------


def word_tokenizer(decoder):
    """Words, joined again by a decoder that leaves out the space before the first."""
    words = ["[UNK]", "to", "be", "or", "not", "##ing", "."]
    content = json.loads(
        tokenizers.Tokenizer(
            tokenizers.models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
        ).to_str()
    )
    content |= {"pre_tokenizer": {"type": "Whitespace"}, "decoder": decoder}
    return Tokenizer(json.dumps(content).encode(), "words")


def test_the_space_before_a_continuation_is_kept():
    words = word_tokenizer({"type": "WordPiece", "prefix": "##", "cleanup": True})
    ids = words.encode("to be or not to be").tolist()
    assert g.continuation(words, ids[:4], ids[4:]) == " to be"
    assert g.continuation(words, ids[:2], [5, 6]) == "ing."
    assert g.continuation(words, [], ids[:2]) == "to be"
    assert g.continuation(words, ids * 9, ids[:2]) == " to be"


def test_characters_that_the_prompt_cuts_are_completed():
    spelled = get_tokenizer("bytes")
    ids = spelled.encode("a\u20ac\u20ac").tolist()
    assert g.continuation(spelled, ids[:3], ids[3:]) == "\u20ac\u20ac"
    assert g.continuation(spelled, spelled.encode("\u20ac" * 9).tolist(), ids[1:]) == "\u20ac\u20ac"


def test_a_stop_string_may_begin_with_that_space(runner):
    words = word_tokenizer({"type": "WordPiece", "prefix": "##", "cleanup": False})
    [text] = g.complete(runner, words, ["to be"], 6, [], temperature=0)
    stop = " " + text.split()[0]
    assert text.startswith(" ") and g.complete(runner, words, ["to be"], 6, [stop], temperature=0) == [""]


def test_a_prompt_that_is_not_text_is_one_line(runner):
    with pytest.raises(UserError, match="^prompt: is not valid UTF-8 text"):
        g.complete(runner, Letters(), ["ab\udc80"], 1, [])


def test_stdout_of_another_encoding_gets_question_marks(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", out)
    write("caf\u00e9\n")
    out.flush()
    assert out.buffer.getvalue() == b"caf?\n"


# -- weights in shards ------------------------------------------------------------------------------------------------------


# By these DeepSpeed leaves weights whole that are as few as here.
ZERO3_KEEPS = ("param_persistence_threshold", "max_reuse_distance", "prefetch_bucket_size")


def counted_by_fsdp(monkeypatch) -> list:
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    gathers: list = []
    unshard = FSDPParamGroup._to_unsharded
    monkeypatch.setattr(FSDPParamGroup, "_to_unsharded", lambda group: gathers.append(group) or unshard(group))
    return gathers


def counted_by_zero3(monkeypatch) -> list:
    from deepspeed.runtime.zero import partition_parameters

    gathers: list = []
    gather = partition_parameters._no_gather_coalesced
    monkeypatch.setattr(
        partition_parameters, "_no_gather_coalesced", lambda weights: gathers.append(weights) or gather(weights)
    )
    return gathers


@pytest.mark.parametrize("strategy, counted", [("fsdp", counted_by_fsdp), ("zero3", counted_by_zero3)])
def test_text_gathers_shards_once_and_trains_on_as_without(monkeypatch, tmp_path, strategy, counted, capsys):
    from trainer.engine import base
    from trainer.testing.strategies import engine_of, group_of_one, losses_of
    from trainer.testing.subject import Subject

    subject = Subject("gpt2", get_model("gpt2"))
    settings = {"strategy": strategy}
    if strategy == "zero3":
        (tmp_path / "zero3.json").write_text(
            json.dumps({"zero_optimization": {f"stage3_{key}": 0 for key in ZERO3_KEEPS}})
        )
        settings["deepspeed_config"] = str(tmp_path / "zero3.json")
    found = {}
    with group_of_one():
        gathers = counted(monkeypatch)  # one process gathers from nobody, but makes shards whole as it would then
        for free in (10**12, 0):
            monkeypatch.setattr(base, "free_bytes", lambda device, local_size, free=free: free)
            with engine_of(subject, strategy, engine=settings) as engine:
                blocks = len(engine.model.blocks())
                losses = losses_of(engine, subject, 0, 1)
                counts = []
                for tokens in (10, 20):
                    gathers.clear()
                    with engine.gathered():
                        new = g.generate(engine, [[1, 2, 3]], tokens, VOCAB, temperature=0)
                    counts.append(len(gathers))
                gathers.clear()
                losses += losses_of(engine, subject, 1, 3)
                found[free] = new, losses, len(gathers)
            if free:
                assert max(counts) <= blocks + 1
            else:
                assert counts[0] > 10 * blocks and counts[1] > counts[0] + 9 * blocks
    assert found[10**12] == found[0]
    assert capsys.readouterr().err.count("text: weights are gathered again for every token") == 1
