"""The page of `report`: the same facts in HTML, Markdown and JSON, all text escaped, figures that a browser draws."""

import contextlib
import html
import html.parser
import io
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from conftest import ROOT, tiny_values
from synthetic_runs import TOKENIZER, Experiment, simple_comparison, sweep, write_run

from trainer.__main__ import dispatch
from trainer.commands.report.figures import band_of, rate_figures, spread
from trainer.commands.report.markdown import escape
from trainer.commands.report.study import read_studies
from trainer.commands.report.tables import difference_table
from trainer.core.errors import UserError

EVIL = "<script>alert(1)</script>|`*x*\u202e\x1b[31m$y$"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The report of a comparison in which much went wrong, and the names are hostile."""
    experiment = simple_comparison(tmp_path_factory.mktemp("report") / "demo")
    experiment.content["rule"] = EVIL
    experiment.arm(EVIL)
    sweep(experiment, EVIL, 3.0, model__d_model=24)
    for seed, state in ((1, "finished"), (2, "diverged"), (3, "failed")):
        experiment.run(
            EVIL, 3.05, seed, state=state, message=f"seed {seed}: {EVIL}", model__d_model=24,
            sample=f"</pre>{EVIL}\n```\n# no heading", start={"host": EVIL},
        )  # fmt: skip
    experiment.arm("huge", refused=f"needs 900 GiB {EVIL}", learning_rate=None, bracketed=None)
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        dispatch(["report", str(experiment.write()), "--target", "2.95"])
    (experiment.folder / "report" / "stdout").write_text(shown.getvalue())
    return experiment.folder / "report"


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "report.html").read_text()


class Reader(html.parser.HTMLParser):
    """Tags with their attributes, ids, the text of each table row, and whether every tag is closed in order."""

    VOID = {"meta", "input", "br", "hr", "img", "link"}

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.ids, self.open, self.rows, self.text = [], [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for key, value in attributes if key == "id"]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for key, value in attributes if key == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_the_page_is_well_formed_and_holds_nothing_from_outside(page):
    read = Reader(page)
    assert read.open == []
    assert len(read.ids) == len(set(read.ids)) > 50
    names = {tag for tag, _ in read.tags}
    assert not names & {"script", "link", "iframe", "img", "object", "base"}
    values = [str(value) for _, attributes in read.tags for key, value in attributes.items()]
    assert not [value for value in values if "//" in value] and "url(http" not in page and "@import" not in page
    assert not [key for _, attributes in read.tags for key in attributes if key.startswith("on")]
    inner = {value[1:] for tag, attributes in read.tags for key, value in attributes.items() if key == "xlink:href"}
    inner |= set(re.findall(r"url\(#([^)]+)\)", page))
    assert inner and inner <= set(read.ids)  # what a figure refers to is in it, also beside other figures


def test_nothing_from_a_folder_is_obeyed(folder, page):
    """Neither as HTML nor as Markdown; control characters and marks of direction become escapes."""
    for name in ("report.html", "report.md"):
        lines = (folder / name).read_text().splitlines()
        text = "\n".join(
            line for line in lines if not line.startswith("    ")
        )  # Markdown shows those lines as they are
        assert "<script>" not in text.replace("\\<script>", "") and "\u202e" not in text and "\x1b" not in text
        assert "\\u202e" in text and "\\x1b" in text
    tables = [line for line in (folder / "report.md").read_text().splitlines() if line.startswith("| ")]
    cells = {len(re.findall(r"(?<!\\)\|", line)) for line in tables if "alert" in line}
    assert len(cells) >= 2  # of several tables, each row as wide as its header
    for i, line in enumerate(tables):
        if line.startswith("| ---"):
            width = len(re.findall(r"(?<!\\)\|", tables[i - 1]))
            assert len(re.findall(r"(?<!\\)\|", tables[i + 1])) == width
    assert "&lt;/pre&gt;&lt;script&gt;" in page


@pytest.mark.parametrize("words, escaped", [
    ("d_model=16, 3.25", "d_model=16, 3.25"), ("_a_ *b* `c`", r"\_a\_ \*b\* \`c\`"), ("a|b [c](d)", r"a\|b \[c\](d)"),
    ("p < 0.01, <b> &lt; a & b", r"p < 0.01, \<b> \&lt; a & b"), ("# a", r"\# a"), ("- a", r"\- a"), ("-0.1", "-0.1"),
    ("1. a", r"1\. a"), ("1.5", "1.5"), ("> a", r"\> a"), ("a\nb\u202e", "a\\\\nb\\\\u202e"),
])  # fmt: skip
def test_markdown_is_escaped_where_it_would_act(words, escaped):
    assert escape(words) == escaped


def test_html_markdown_and_json_say_the_same(folder, page):
    body = json.loads((folder / "report.json").read_text())
    (study,) = body["studies"]
    text = " ".join(Reader(page).text)
    markdown = (folder / "report.md").read_text()
    llama = next(arm for arm in study["arms"] if arm["name"] == "llama")
    assert llama["claim"] == "better" and llama["difference"]["n"] == 3 and llama["difference"]["mean"] < -0.09
    for caveat in study["caveats"]:
        assert caveat["text"] in text and escape(caveat["text"]) in markdown
    for arm in study["arms"]:
        assert arm["verdict"] in text and escape(arm["verdict"]) in markdown
    row = next(row for row in Reader(page).rows if row[:2] == ["llama", "3 of 3"])
    assert row[2] == f"{llama['mean']:.4f}" and row[5] == f"{llama['difference']['mean']:+.4f}" and row[6] == "better"
    assert {run["state"] for run in study["runs"]} == {"finished", "diverged", "failed"}
    assert body["target"] == 2.95 and body["level"] == 0.01


def test_the_terminal_shows_verdicts_tables_and_caveats(folder):
    shown, markdown = (folder / "stdout").read_text(), (folder / "report.md").read_text()
    assert shown.startswith("# Comparison demo") and "### Final table" in shown and "### Caveats" in shown
    assert shown.strip().splitlines()[-1] in markdown and "**llama is better than gpt2 by" in shown
    assert "### Environment" in markdown and "### Environment" not in shown


def test_figures_are_the_same_for_the_same_data(folder):
    (study,) = read_studies([str(folder.parent)], None)
    (figure,) = rate_figures(study, "s0")
    assert figure.svg == (folder / f"{figure.stem}.svg").read_text()


def test_what_went_wrong_stands_in_the_page(page):
    text = " ".join(Reader(page).text)
    assert "seed 2: <script>alert(1)" in text and "Diverged: " in text and "Failed: " in text
    assert "Refused: huge: needs 900 GiB" in text and "no claim: huge has no finished run" in text
    assert "python -m trainer train one.yaml --seed 1" in text and "python -m trainer compare demo.yaml" in text
    assert "f" * 64 in text and "0123456789ab" in text


def test_only_differences_between_configs_are_shown(folder, page):
    rows = {row[0]: row[1:] for row in Reader(page).rows}
    assert rows["model.name"][:2] == ["gpt2", "llama"] and rows["model.d_model"][:3] == ["16", "16", "24"]
    assert "max_steps" not in rows and "seed" not in rows and "optim.lr" not in rows


def test_a_key_that_only_one_model_has_is_left_out_and_counted(tmp_path):
    """But a key in which two arms differ is shown."""
    folders = [write_run(tmp_path / "gpt2"), write_run(tmp_path / "other", model__n_heads=4)]
    (study,) = read_studies([str(folder) for folder in folders], None)
    assert [row[0] for row in difference_table(study).rows] == ["model.n_heads"]
    for key in ("n_heads", "norm"):
        del study.arms[1].example.values[f"model.{key}"]
    table = difference_table(study)
    assert table.rows == [] and table.notes[-1] == "2 keys are not shown that only some models have, with equal values"


def curves(page: str) -> dict[str, list[str]]:
    """id of a curve -> the paths in it."""
    found = re.findall(r'<g id="([\w-]+-curve-\d+)">(.*?)</g>', page, re.DOTALL)
    return {name: re.findall(r' d="([^"]*)"', inner) for name, inner in found}


def check_curves(page: str) -> None:
    """Each arm with a finished run has a curve in each figure, of more than one point."""
    found = curves(page)
    for kind in ("validation", "training"):
        for axis in ("tokens", "tokens-log", "flops", "flops-log", "seconds"):
            assert {f"s0-0_05-{kind}-{axis}-curve-{i}" for i in range(3)} <= set(found)
    assert {f"s0-learning-rate-0_05-curve-{i}" for i in range(3)} <= set(found)
    for paths in found.values():
        assert max(path.count("L") for path in paths) >= 1  # a line from one point to another; a dot has curves alone


def test_every_arm_has_a_curve_in_every_figure(folder, page):
    check_curves(page)
    files = sorted(folder.glob("*.svg"))
    assert len(files) == 11
    for file in files:
        root = ElementTree.fromstring(file.read_text())
        assert root.tag.endswith("svg") and f"({file.name})" in (folder / "report.md").read_text()


def test_the_name_of_an_arm_is_shown_as_it_is(tmp_path, capsys):
    """Also if it looks like a colour or an id of a figure, or if the font of the measurements lacks its letters."""
    names = ["fill: #0072b2", 'id="a"', "\u4e2d\u6587", "_hidden", "$x$"]
    experiment = Experiment(tmp_path / "demo")
    experiment.content["baseline"] = names[0]
    for i, name in enumerate(names):
        experiment.arm(name)
        experiment.run(name, 3.0 - 0.01 * i)
    dispatch(["report", str(experiment.write())])
    page = (experiment.folder / "report" / "report.html").read_text()
    shown = {text.strip() for text in re.findall(r"<text[^>]*>([^<]*)</text>", page)}
    assert {html.unescape(name) for name in names} <= {html.unescape(text) for text in shown}
    assert "Warning" not in capsys.readouterr().err


def test_the_band_is_from_the_lowest_to_the_highest_seed(tmp_path):
    """On the part of the axis that all seeds cover."""
    for seed, end in ((1, 3.0), (2, 2.0), (3, 2.5)):
        write_run(tmp_path / f"{seed}", end, seed=seed, evaluation__every=10 if seed < 3 else 20)
    (study,) = read_studies([str(tmp_path)], None)
    x, middle, low, high = band_of(study.arms[0], "validation", "tokens")
    assert x.tolist() == [20 * 512, 30 * 512, 40 * 512]
    assert (middle[-1], low[-1], high[-1]) == (2.5, 2.0, 3.0) and np.all((low <= middle) & (middle <= high))
    assert band_of(study.arms[0], "validation", "flops") is not None


def test_between_tokenizers_the_curves_are_in_bits_per_byte(tmp_path, capsys):
    """Nats per token of two tokenizers have no common axis: validation is drawn in bits per byte, training not at all."""
    write_run(tmp_path / "one", 3.0)
    write_run(
        tmp_path / "two",
        3.0,
        seed=2,
        data={"tokenizer": {**TOKENIZER, "sha256": "b" * 64}},
        row={"val_bits_per_byte": 1.5},
    )
    dispatch(["report", str(tmp_path), "--out", str(tmp_path / "page")])
    figures = {path.name for path in (tmp_path / "page").glob("*.svg")}
    assert figures and not [name for name in figures if "training" in name]
    drawn = "".join((tmp_path / "page" / name).read_text() for name in figures)
    assert "loss, bits per byte" in drawn and "nats per token" not in drawn
    one = read_studies([str(tmp_path / "two")], None)[0].arms[0]
    assert band_of(one, "validation", "tokens", "bits")[1][-1] == 1.5


def test_labels_of_near_learning_rates_do_not_touch():
    """Arms whose rates differ by a percent share a label; a sweep by factors of two has all of its own."""
    sweep = [1e-3 * 2**i for i in range(6)]
    assert spread(sweep) == sweep
    assert spread(sorted(rate * (1 + off) for rate in sweep for off in (0, 0.004, 0.01))) == sweep
    assert spread([1e-3]) == [1e-3]


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on PATH")
def test_a_browser_draws_the_page_without_a_complaint(folder, tmp_path):
    """Its console is empty, and the document it made has every curve."""
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}",
        "--enable-logging=stderr",
    ]
    command += ["--v=0", "--virtual-time-budget=2000", "--dump-dom", (folder / "report.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "</html>" in done.stdout
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    check_curves(done.stdout)


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on PATH")
def test_the_browser_of_the_test_above_would_complain(tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text(
        '<!DOCTYPE html><meta http-equiv="Content-Security-Policy" content="default-src \'none\'"><script>x()</script>'
    )
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}",
        "--enable-logging=stderr",
    ]
    done = subprocess.run([*command, "--v=0", "--dump-dom", bad.as_uri()], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" in done.stderr


# -- the verb --------------------------------------------------------------------------------------------------------------


def test_old_runs_and_new_ones_make_one_report(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "one")
    frozen = [str(ROOT / "tests" / "frozen" / release / "run") for release in ("0.1.0", "0.2.0", "0.3.0")]
    dispatch(["report", *frozen, "runs/one", "--json"])
    printed = capsys.readouterr()
    (made,) = (tmp_path / "runs").glob("report-*")
    assert json.loads(printed.out) == json.loads((made / "report.json").read_text())
    assert f"{made.relative_to(tmp_path)}: report.html, report.md, report.json" in printed.err
    (study,) = json.loads(printed.out)["studies"]
    assert len(study["runs"]) == 3 and any("is the same run as" in note for note in study["notes"])


def test_a_comparison_of_which_nothing_has_run_yet_is_reported(tmp_path, capsys):
    experiment = Experiment(tmp_path / "demo")
    experiment.arm("gpt2")
    experiment.arm("llama")
    experiment.run("gpt2", None, state="waiting")
    dispatch(["report", str(experiment.write())])
    shown = capsys.readouterr().out
    assert "Not started yet: 0-lr0.002-seed1" in shown and "0 of 3" in shown


def test_wrong_words_are_refused(tmp_path):
    for words, told in (
        (["report"], "name run folders or comparisons"),
        (["report", str(tmp_path), "--basline", "x"], "unknown key basline; did you mean baseline?"),
        (["report", str(tmp_path), "--target", "-1"], "target: -1.0 is too small"),
    ):
        with pytest.raises(UserError) as caught:
            dispatch(words)
        assert told in str(caught.value) and "\n" not in str(caught.value)


def test_help_of_report_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['trainer', 'report', '--help']; import trainer.__main__ as m; m.main(); "
        "heavy = {'torch', 'numpy', 'matplotlib', 'scipy', 'mpmath'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)


@pytest.mark.slow
def test_real_runs_are_reported(tiny_dataset, tmp_path, capsys):
    """Two arms, trained for four steps."""
    from trainer.commands.train import run

    for name in ("gpt2", "llama"):
        values = tiny_values(tiny_dataset, tmp_path / name, max_steps=4, model={"name": name}, evaluation__every=2)
        values["batch"] |= {"sequence_start": "auto", "sequence_double_every": "auto"}
        values["log"]["sample_tokens"] = 8
        run(values)
    capsys.readouterr()
    dispatch(["report", str(tmp_path), "--out", str(tmp_path / "out"), "--json"])
    (study,) = json.loads(capsys.readouterr().out)["studies"]
    assert {arm["name"]: sorted(arm["values"]) for arm in study["arms"]} == {"gpt2": ["0"], "llama": ["0"]}
    assert study["notes"] == [] and all(run["state"] == "finished" and run["flops"] > 0 for run in study["runs"])
    assert {"few_seeds", "not_swept", "one_scale"} <= {caveat["rule"] for caveat in study["caveats"]}
