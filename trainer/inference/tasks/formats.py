"""Local files of questions as datasets of lm-eval: `custom_dataset` of the tasks in `local` names a function of this module.

Each function gets the folder that --tasks_dir names, and returns {"test": documents}. Prompts are turned into the form of lm-eval's
own tasks as far as the files allow; trainer/inference/README.md says where they do not.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from trainer.core.errors import UserError
from trainer.core.files import system_error
from trainer.core.text import printable

Document = dict[str, Any]
HELLASWAG = "hellaswag_val_full.txt"
CONNECTION = re.compile(r"(.*), (because|therefore)", re.DOTALL)
# The end of a sentence before one that begins with a small letter: its beginning is HellaSwag's ctx_b.
SENTENCE = re.compile(r"[.!?][\"')]* +(?=[a-z])")
ENDED = re.compile(r"[.!?][\"')]*$")
SOCIAL = re.compile(r"Context: (.*)\nQuestion: (.*)\nChoices:\nA\. (.*)\nB\. (.*)\nAnswer:")


def hellaswag(tasks_dir: str, **more: Any) -> Any:
    """hellaswag_val_full.txt in the form of lm-eval: the last sentence, which the endings complete, begins with a capital letter."""

    def in_form(document: Document) -> Document:
        context = document["query"]
        whole = ENDED.search(context) or ": How to " in context  # of WikiHow
        begins = 0 if whole else max((found.end() for found in SENTENCE.finditer(context)), default=0)
        if begins:
            document["query"] = context[:begins] + context[begins:].capitalize()
        return document

    return dataset(map(in_form, hellaswag_lines(tasks_dir)), HELLASWAG)


def hellaswag_contexts(tasks_dir: str, **more: Any) -> Any:
    """hellaswag_val_full.txt in the form of GPT2_Reproduction: the context as it is, without the name of the activity."""
    documents = hellaswag_lines(tasks_dir)
    return dataset((one | {"query": one["query"].partition(": ")[2]} for one in documents), HELLASWAG)


def hellaswag_lines(tasks_dir: str) -> Iterator[Document]:
    """The documents of HELLASWAG: six lines each, "activity: context", the index of the right ending, four endings."""
    path = find(tasks_dir, HELLASWAG)
    lines = read(path).decode("utf-8").split("\n")
    if lines and not lines[-1]:
        lines.pop()
    if not lines or len(lines) % 6:
        raise UserError(f"tasks_dir: {printable(path)} has {len(lines)} lines, and each of its documents is six lines")
    for first in range(0, len(lines), 6):
        query, gold, *choices = lines[first : first + 6]
        if gold not in ("0", "1", "2", "3") or not query or not all(choices):
            raise UserError(
                f"tasks_dir: {printable(path)}, line {first + 1}: expected a context, 0 to 3, and four endings"
            )
        yield {"query": query, "choices": choices, "gold": int(gold)}


def lambada(tasks_dir: str, **more: Any) -> Any:
    """lambada_test.jsonl of OpenAI: {"text": ...}, whose last word is the answer."""

    def in_form(row: Document) -> Document:
        context, space, word = row["text"].rpartition(" ")
        if not (context and word):
            raise KeyError
        return {"query": context, "answer": space + word}

    return from_rows(tasks_dir, "lambada_test.jsonl", in_form)


def arc(tasks_dir: str, file: str, **more: Any) -> Any:
    """ARC. A question of three answers repeats one of them here; it is left out."""

    def in_form(row: Document) -> Document:
        choices = list(dict.fromkeys(row["choices"]))
        return {"query": row["query"] + "\nAnswer:", "choices": choices, "gold": choices.index(chosen(row))}

    return from_rows(tasks_dir, file, in_form)


def piqa(tasks_dir: str, **more: Any) -> Any:
    return from_rows(tasks_dir, "piqa.jsonl", lambda row: choice(row, row["query"].rstrip("\n") + "\nAnswer:"))


def boolq(tasks_dir: str, **more: Any) -> Any:
    """BoolQ. lm-eval's passages begin with the title of their article; these do not."""
    return from_rows(
        tasks_dir, "boolq.jsonl", lambda row: choice(row, row["query"].removeprefix("Passage: ") + "\nAnswer:")
    )


def copa(tasks_dir: str, **more: Any) -> Any:
    """COPA. lm-eval joins the sentences without a comma, and has two spaces before the answer: one is the task's delimiter."""

    def in_form(row: Document) -> Document:
        found = CONNECTION.fullmatch(row["query"])
        if found is None:
            raise KeyError
        return choice(row | {"choices": [f" {text}" for text in row["choices"]]}, f"{found[1]} {found[2]}")

    return from_rows(tasks_dir, "copa.jsonl", in_form)


def openbook_qa(tasks_dir: str, **more: Any) -> Any:
    return from_rows(tasks_dir, "openbook_qa.jsonl", lambda row: choice(row, row["query"]))


def commonsense_qa(tasks_dir: str, **more: Any) -> Any:
    """CommonsenseQA with four of its five answers."""
    return from_rows(
        tasks_dir, "commonsense_qa.jsonl", lambda row: choice(row, row["query"].replace("\nChoices:\n", "\n"))
    )


def siqa(tasks_dir: str, **more: Any) -> Any:
    """Social IQa with two of its three answers. The file asks for A or B; as in lm-eval the answer's text is asked for."""

    def in_form(row: Document) -> Document:
        found = SOCIAL.fullmatch(row["query"])
        if found is None:
            raise KeyError
        context, question, *answers = found.groups()
        return choice(row | {"choices": answers}, f"Q: {context} {question}\nA:")

    return from_rows(tasks_dir, "siqa.jsonl", in_form)


def winogrande(tasks_dir: str, **more: Any) -> Any:
    return from_rows(tasks_dir, "winogrande.jsonl", completed)


def winograd(tasks_dir: str, **more: Any) -> Any:
    """WSC273. As in lm-eval there are two spaces before the continuation: one is the task's delimiter, one is in the text."""

    def in_form(row: Document) -> Document:
        document = completed(row)
        space = " " if document["continuation"][0] not in ".,;:!?'" else ""
        return document | {"continuation": space + document["continuation"]}

    return from_rows(tasks_dir, "winograd_wsc.jsonl", in_form)


def blimp(tasks_dir: str, file: str, **more: Any) -> Any:
    """A paradigm of BLiMP, from BLiMP.zip or from a file of its own."""

    def in_form(row: Document) -> Document:
        return choice({"choices": [row["sentence_good"], row["sentence_bad"]], "gold": 0}, "")

    archive = found_in(tasks_dir, "BLiMP.zip")
    if archive is None:
        return from_rows(tasks_dir, file, in_form, "BLiMP.zip or ")
    try:
        with zipfile.ZipFile(archive) as files:
            content = files.read(f"data/{file}")
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"tasks_dir: {printable(archive)}: cannot read data/{file} ({printable(error, 200)})") from None
    name = f"{printable(archive)}, data/{file}"
    return dataset(rows_of(content, name, in_form), name)


# -- parts ---------------------------------------------------------------------------------------------------------------


def choice(row: Document, query: str) -> Document:
    """A question with answers to choose from."""
    chosen(row)
    return {"query": query, "choices": row["choices"], "gold": row["gold"]}


def chosen(row: Document) -> str:
    """The right answer of a row. Raises KeyError if it has none."""
    choices, gold = row["choices"], row["gold"]
    texts = isinstance(choices, list) and all(isinstance(text, str) and text for text in choices)
    if not texts or type(gold) is not int or not 0 <= gold < len(choices):
        raise KeyError
    return choices[gold]


def completed(row: Document) -> Document:
    """A continuation that follows one of several contexts."""
    document = choice({"choices": row["context_options"], "gold": row["gold"]}, "")
    if not row["continuation"].strip():
        raise KeyError
    return {"contexts": document["choices"], "gold": document["gold"], "continuation": row["continuation"].strip()}


def from_rows(tasks_dir: str, file: str, in_form: Callable[[Document], Document], instead: str = "") -> Any:
    """The rows of a .jsonl file in the folder. instead: the other file that would do, for the message if there is none."""
    path = find(tasks_dir, file, instead)
    return dataset(rows_of(read(path), printable(path), in_form), printable(path))


def rows_of(content: bytes, name: str, in_form: Callable[[Document], Document]) -> Iterator[Document]:
    for number, line in enumerate(content.splitlines(), 1):
        try:
            yield in_form(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(
                f"tasks_dir: {name}, line {number}: is not a question of this task (JSON with the expected fields)"
            ) from None


def find(tasks_dir: str, file: str, instead: str = "") -> Path:
    """The file of that name. UserError if there is none; instead: another name that would do, for that message."""
    found = found_in(tasks_dir, file)
    if found is None:
        raise UserError(
            f"tasks_dir: {printable(tasks_dir)} holds no {instead}{file}, neither itself nor in a folder of it; "
            "without tasks_dir, lm-eval fetches its own data"
        )
    return found


def found_in(tasks_dir: str, file: str) -> Path | None:
    """The file of that name in the folder, or in a folder of it."""
    folder = Path(tasks_dir)
    return next((path for path in (folder / file, *sorted(folder.glob(f"*/{file}"))) if path.is_file()), None)


def read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        content.decode("utf-8")
        return content
    except OSError as error:
        raise system_error(error, f"tasks_dir: {printable(path)}: cannot be read") from None
    except UnicodeDecodeError as error:
        raise UserError(f"tasks_dir: {printable(path)}: is not UTF-8 at byte {error.start}") from None


def dataset(documents: Iterable[Document], name: str) -> Any:
    """What lm-eval expects of a custom dataset. UserError, which names the file, if there are no documents."""
    import datasets

    found = list(documents)
    if not found:
        raise UserError(f"tasks_dir: {name} holds no questions")
    return {"test": datasets.Dataset.from_list(found)}
