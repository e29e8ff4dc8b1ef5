"""Rows of conversations and of preferences: exactly the answers are marked, and wrong rows are told."""

import json

import numpy as np
import pytest
from conftest import open_split

from trainer.commands.data import marked
from trainer.core.config import PrepareConfig
from trainer.core.errors import UserError
from trainer.data.dataset import LOSS_MASK, DatasetInfo
from trainer.data.prepare import prepare
from trainer.data.readers import BadRow
from trainer.data.records import Conversations, conversations_of
from trainer.data.tokenizers import Tokenizer

SYSTEM, USER, ASSISTANT = ({"role": role, "content": role[0] * 2} for role in ("system", "user", "assistant"))
END = "<|endoftext|>"


def say(role, content):
    return {"role": role, "content": content}


def prepared(tmp_path, rows, records="chat", **options):
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"tokenizer": "bytes", "workers": 1, **options}
    prepare(PrepareConfig(source=str(source), out=str(tmp_path / "out"), records=records, **options), lambda line: None)
    return tmp_path / "out"


def shown(folder, split="train"):
    """The documents of a split as text, answers in [[ ]]."""
    opened = open_split(folder, split)
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
    ends = np.cumsum(opened.lengths())
    tokens, answers = (opened.read(0, int(ends[-1]), column) for column in ("tokens", LOSS_MASK))
    return [marked(tokenizer, tokens[a:b], answers[a:b]) for a, b in zip([0, *ends], ends, strict=False)]


def test_the_answers_of_a_conversation_are_marked(tmp_path):
    talk = [
        say("system", "S"),
        say("user", "hi"),
        say("assistant", "yes?"),
        say("user", "4"),
        say("assistant", "ünd 5"),
    ]
    rows = [{"messages": talk}, {"prompt": "p", "completion": "held out"}, {"prompt": "p\n", "completion": " c"}]
    folder = prepared(tmp_path, rows, sample_length=7)
    assert shown(folder) == [
        f"<|system|>\nS\n<|user|>\nhi\n<|assistant|>\n[[yes?{END}]]<|user|>\n4\n<|assistant|>\n[[ünd 5{END}]]",
        f"<|user|>\np\n\n<|assistant|>\n[[ c{END}]]",
    ]
    assert shown(folder, "validation") == [f"<|user|>\np\n<|assistant|>\n[[held out{END}]]"]
    info = DatasetInfo.load(folder)
    assert (info.records, info.splits["train"].documents, info.arguments["chat_template"]) == ("chat", 2, "chat")
    assert conversations_of(info, "here").prompt("hi") == "<|user|>\nhi\n<|assistant|>\n"


def test_a_merge_that_would_cross_the_seam_does_not(tmp_path):
    """`ab` is one token of this BPE. Where a prompt ends with a and its completion begins with b there are two tokens."""
    rows = [{"prompt": "xa", "completion": "bab"}, {"prompt": "ab", "completion": "ab"}] + [
        {"prompt": "ab" * 30, "completion": "ab"}
    ] * 3
    folder = prepared(tmp_path, rows, chat_template="plain", tokenizer="train-bpe:258")
    split, tokenizer = open_split(folder), Tokenizer.from_file(folder / "tokenizer.json")
    ab = tokenizer.encode("ab").tolist()
    assert len(ab) == 1
    first = int(split.lengths()[0])
    x, a, b = (int(tokenizer.encode(letter)[0]) for letter in "xab")
    assert split.read(0, first).tolist() == [x, a, b, *ab, tokenizer.eot_id]
    assert split.read(0, first, LOSS_MASK).tolist() == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_changes_nothing(tmp_path, workers):
    rows = [{"prompt": f"{i} " * 3, "chosen": "c" * (i % 7 + 1), "rejected": "r" * 9} for i in range(40)]
    folder = prepared(tmp_path, rows, "preference", workers=workers)
    pairs = [f"[[{'c' * (i % 7 + 1)}{END}]]" for i in range(40) if i != 1]
    found = shown(folder)
    assert len(found) % 2 == 0 and len(found) + len(shown(folder, "validation")) == 80
    assert all(
        better[: better.index("[[")] == worse[: worse.index("[[")]
        for better, worse in zip(found[::2], found[1::2], strict=True)
    )
    assert {text[text.index("[[") :] for text in found[::2]} <= set(pairs)


def pair_of(row):
    return [
        "".join(f"[{part.text}]" if part.answer else part.text for part in document)
        for document in Conversations("preference", "chat").documents(json.dumps(row).encode(), "here")
    ]


def test_the_prompt_of_a_pair_of_lists_is_their_common_beginning():
    first, second = say("assistant", "one"), say("assistant", "two")
    again = [say("user", "more"), say("assistant", "end")]
    expected = ["<|user|>\nuu\n<|assistant|>\n[one]", "<|user|>\nuu\n<|assistant|>\n[two]"]
    assert pair_of({"chosen": [USER, first], "rejected": [USER, second]}) == expected
    assert pair_of({"prompt": [USER], "chosen": [first], "rejected": [second]}) == expected
    assert pair_of({"prompt": "uu", "chosen": "one", "rejected": "two"}) == expected
    shared = pair_of({"chosen": [USER, first, *again], "rejected": [USER, first, again[0], say("assistant", "no")]})
    assert shared[0] == "<|user|>\nuu\n<|assistant|>\none<|user|>\nmore\n<|assistant|>\n[end]"


WRONG = [
    ("chat", {"text": "a"}, "has neither messages nor a prompt"),
    ("chat", ["a"], "expected a JSON object"),
    ("chat", {"prompt": "a"}, "field 'completion' is missing"),
    ("chat", {"prompt": "a", "completion": ""}, "field 'completion' is empty"),
    ("chat", {"prompt": 3, "completion": "a"}, "field 'prompt' holds int"),
    ("chat", {"messages": []}, "is not a list of messages"),
    (
        "chat",
        {"messages": [USER, {"role": "tool", "content": "x"}]},
        "message 2 of 'messages' has not one of the roles",
    ),
    ("chat", {"messages": [USER, say("assistant", None)]}, r"field 'messages\[2\].content' is missing"),
    ("chat", {"messages": [USER]}, "the roles in 'messages' are user; after"),
    ("chat", {"messages": [SYSTEM]}, "the roles in 'messages' are system; after"),
    ("chat", {"messages": [ASSISTANT, USER]}, "must alternate"),
    ("chat", {"messages": [USER, SYSTEM, ASSISTANT]}, "must alternate"),
    ("chat", {"prompt": "<|user|>", "completion": "a"}, r"a message of the user holds the text <\|user\|>"),
    ("chat", {"prompt": "\ud800", "completion": "a"}, "half a surrogate pair"),
    ("preference", {"prompt": "a", "chosen": "b"}, "field 'rejected' is missing"),
    ("preference", {"chosen": "b", "rejected": "c"}, "has no prompt for its field 'chosen'"),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
    (
        "preference",
        {"chosen": [USER, ASSISTANT], "rejected": [SYSTEM, USER, ASSISTANT]},
        "do not part at an answer",
    ),
    ("preference", {"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT, USER, ASSISTANT]}, "do not part at"),
]


@pytest.mark.parametrize("records, row, why", WRONG)
def test_a_wrong_row_is_one_line_or_left_out(tmp_path, records, row, why):
    good = [{"prompt": "p", "completion": "c", "chosen": "c", "rejected": letter} for letter in "abd"]
    with pytest.raises(BadRow, match=f"rows.jsonl:3: .*{why}"):
        prepared(tmp_path, [*good[:2], row, good[2]], records)
    assert len(shown(prepared(tmp_path, [*good[:2], row, good[2]], records, on_bad_row="skip"))) in (2, 4)


def test_plain_joins_one_prompt_and_one_answer(tmp_path):
    with pytest.raises(BadRow, match="chat_template plain joins one prompt and one answer"):
        prepared(tmp_path, [{"messages": [SYSTEM, USER, ASSISTANT]}] * 3, chat_template="plain")
    rows = [{"messages": [USER, ASSISTANT]}] * 3
    assert shown(prepared(tmp_path, rows, chat_template="plain"))[0] == f"uu[[aa{END}]]"


def test_files_without_rows_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    config = PrepareConfig(source=str(tmp_path / "a.txt"), out=str(tmp_path / "out"), tokenizer="bytes", records="chat")
    with pytest.raises(
        UserError, match="records: chat needs rows of JSON, .parquet or hf://, but .*a.txt is none of them"
    ):
        prepare(config, lambda line: None)
    with pytest.raises(UserError, match="document_start: with records chat each row is a document"):
        prepared(tmp_path, [{"prompt": "a", "completion": "b"}], document_start="x")


def test_parquet_gives_the_same_as_rows_of_json(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"messages": [say("user", f"é{i}"), say("assistant", "a" * i)]} for i in range(1, 5)]
    expected = shown(prepared(tmp_path, rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    config = PrepareConfig(
        source=str(tmp_path / "rows.parquet"),
        out=str(tmp_path / "second"),
        tokenizer="bytes",
        records="chat",
        workers=1,
    )
    prepare(config, lambda line: None)
    assert shown(tmp_path / "second") == expected


def test_text_has_no_template(tiny_dataset):
    info = DatasetInfo.load(tiny_dataset)
    with pytest.raises(UserError, match="here: its data are text without a chat template"):
        conversations_of(info, "here")
