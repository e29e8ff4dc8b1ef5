"""A folder with a few questions of every task, in the formats that trainer/inference/tasks/formats.py reads."""

import json
import zipfile
from pathlib import Path

from conftest import ROOT, words_text

QUESTIONS = 6
LOCAL = ROOT / "trainer" / "inference" / "tasks" / "local"
NAMES = ["hellaswag", "hellaswag_gpt2", "lambada_openai", "arc_easy", "arc_challenge", "piqa", "winogrande", "boolq"]
NAMES += ["copa", "openbookqa", "commonsense_qa", "social_iqa", "wsc273", "blimp"]


def words(seed: int, count: int = 5) -> str:
    return words_text(seed, count).strip().rstrip(".")


def hellaswag_lines(i: int) -> list[str]:
    """A question whose last sentence is to be completed; every second one is from WikiHow, where it is whole."""
    context = f"Sailing: {words(i).capitalize()}. {words(i + 50)}" + "." * (i % 2)
    return [context, str(i % 4), *(f"{words(10 * i + k, 3 + k)}." for k in range(4))]


def rows(name: str, i: int) -> dict:
    """The i-th question of llm-foundry's file of that name."""
    a, b, c, d = (words(100 * i + k, 2 + k) for k in range(4))
    return {
        "arc_easy": {"query": f"Question: {a}?", "choices": [b, c, b, d] if i == 1 else [a, b, c, d], "gold": i % 2},
        "piqa": {"query": f"Question: {a}\n", "choices": [b, c], "gold": i % 2},
        "boolq": {"query": f"Passage: {a}. {b}.\nQuestion: {c}?", "choices": ["no", "yes"], "gold": int(i > 1)},
        "copa": {"query": f"{a}, {('because', 'therefore')[i % 2]}", "choices": [f"{b}.", f"{c}."], "gold": i % 2},
        "openbook_qa": {"query": a, "choices": [a, b, c, d], "gold": i % 4},
        "commonsense_qa": {
            "query": f"Question: {a}?\nChoices:\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:",
            "choices": ["A", "B", "C", "D"],
            "gold": (0, 2, 2, 2, 1, 3)[i % 6],
        },
        "siqa": {
            "query": f"Context: {a}.\nQuestion: {b}?\nChoices:\nA. {c}\nB. {d}\nAnswer:",
            "choices": ["A", "B"],
            "gold": i % 2,
        },
        "winogrande": {"context_options": [f"{a} {b}", f"{a} {c}"], "continuation": f"{d}.", "gold": i % 2},
        "winograd_wsc": {
            "context_options": [f"{a} {b}", f"{a} {c}"],
            "continuation": "." if i == 1 else f"{d}.",
            "gold": i % 2,
        },
    }[name.replace("challenge", "easy")]


def write_tasks(folder: Path, questions: int = QUESTIONS) -> Path:
    """Write the files of all tasks into folders of `folder`."""
    for name in ("hellaswag", "lambada", "llm-foundry", "blimp"):
        (folder / name).mkdir(parents=True)
    lines = [line for i in range(questions) for line in hellaswag_lines(i)]
    (folder / "hellaswag" / "hellaswag_val_full.txt").write_text("\n".join(lines) + "\n")
    texts = [{"text": words(i, 12)} for i in range(questions)]
    write_rows(folder / "lambada" / "lambada_test.jsonl", texts)
    names = ("arc_easy", "arc_challenge", "piqa", "boolq", "copa", "openbook_qa", "commonsense_qa", "siqa")
    for name in (*names, "winogrande", "winograd_wsc"):
        write_rows(folder / "llm-foundry" / f"{name}.jsonl", [rows(name, i) for i in range(questions)])
    with zipfile.ZipFile(folder / "blimp" / "BLiMP.zip", "w") as archive:
        for number, name in enumerate(paradigms()):
            pairs = [
                {"sentence_good": f"{words(number + i)}.", "sentence_bad": f"{words(90 + number + i)}."}
                for i in range(questions)
            ]
            archive.writestr(f"data/{name}.jsonl", "".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


def paradigms() -> list[str]:
    lines = (LOCAL / "blimp.yaml").read_text().splitlines()
    return [line.removeprefix("  - task: ") for line in lines if line.startswith("  - task: ")]


def write_rows(path: Path, found: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
