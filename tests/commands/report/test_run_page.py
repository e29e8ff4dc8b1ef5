"""The page of a single run: every fact of its folder, one file, a script that a browser runs without a complaint."""

import base64
import hashlib
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from synthetic_runs import Experiment, write_run
from test_report_page import BROWSER, EVIL, Reader

from trainer.__main__ import dispatch
from trainer.checkpoint.manifest import MANIFEST
from trainer.commands.report.load import load_run
from trainer.commands.report.run_tables import checkpoints_table, config_table, read_plan, results_table
from trainer.commands.report.series import EVALUATIONS, POINTS, charts, read_columns, thinned
from trainer.core.files import sealed


def write_checkpoint(folder, step, value=None):
    """The manifest of a checkpoint, without tensors."""
    path = folder / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True)
    facts = {"format": 2, "step": step, "tokens": 512 * step, "files": {".metadata": {"bytes": 1 << 29, "xxh64": "0"}}}
    if value is not None:
        facts["validation"] = {"metric": "val_loss", "value": value}
    (path / MANIFEST).write_text(sealed(facts))


def write_everything(folder):
    """A run with all that a page shows, and hostile words wherever a folder may hold some."""
    write_run(folder, 3.0, sample=f"once </pre></script>{EVIL}\n</script>", start={"host": EVIL}, row={EVIL: 1.0})
    (folder / "plan.txt").write_text(
        "optim.lr               0.002  a rule <script>\nbatch.tokens_per_step    512  set\nmax_steps               50  told first\n"
        "parameters             4,848  counted\ntokens                25,600  whole run\nFLOPs per token        1,000  training\n"
        "memory, GiB             0.50  one device: weights 0.50\nnote: one\n"
    )
    for step, value in ((20, 3.5), (30, 2.9), (40, None)):
        write_checkpoint(folder, step, value)
    (folder / "checkpoints" / "step-00000010.damaged").mkdir()
    results = folder / "evaluation"
    results.mkdir()
    record = {
        "step": 40,
        "tasks": {"arc": {"accuracy": 0.5, "stderr": {"accuracy": 0.01}, "shots": 5}, EVIL: {"f1": 0.25}},
    }
    (results / "step-00000040.json").write_text(json.dumps(record))
    (results / "broken.json").write_text("{")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = write_everything(tmp_path_factory.mktemp("page") / "run")
    dispatch(["report", str(folder)])
    return folder / "report"


@pytest.fixture(scope="module")
def page(made):
    return (made / "report.html").read_text()


def test_a_single_run_has_a_page_of_its_own_and_several_have_not(tmp_path, made, page, capsys):
    assert {"report.html", "report.md", "report.json"} <= {path.name for path in made.iterdir()}
    assert 'id="charts"' in page and "Final table" not in page
    dispatch(
        ["report", str(write_run(tmp_path / "a")), str(write_run(tmp_path / "b", seed=2)), "--out", str(tmp_path / "o")]
    )
    assert "Final table" in (tmp_path / "o" / "report.html").read_text()
    assert "run" not in json.loads((tmp_path / "o" / "report.json").read_text())
    experiment = Experiment(tmp_path / "demo")
    experiment.arm("gpt2")
    experiment.run("gpt2", 3.0)
    dispatch(["report", str(experiment.write())])
    assert "Final table" in (tmp_path / "demo" / "report" / "report.html").read_text()


def test_html_markdown_and_json_hold_the_same_facts(made, page):
    body = json.loads((made / "report.json").read_text())["run"]
    rows, markdown = Reader(page).rows, (made / "report.md").read_text()
    assert body["state"] == "finished" and body["summary"]["validation loss"] == "3.0000"
    for title, table in body["tables"].items():
        assert table["header"] in rows and f"### {title}" in markdown
        assert all(row in rows for row in table["rows"])
    for caveat in body["caveats"]:
        assert caveat in " ".join(Reader(page).text)
    assert body["samples"][-1]["at"] == "step 40, final"
    data = json.loads(re.search(r'id="page-data">(.*?)</script>', page, re.DOTALL)[1])
    assert data["points"] == body["curves"]["steps"] and data["evaluations"] == body["curves"]["evaluations"]
    assert data["evaluations"]["val_loss"][-1] == 3.0 and len(data["points"]["loss"]) == 40


def test_each_value_has_its_reason(made):
    run = load_run(made.parent, "run")
    rows = {row[0]: row[1:] for row in config_table(run, read_plan(run)).rows}
    assert rows["optim.lr"] == ["0.002", "inferred", "a rule <script>"]
    assert rows["batch.tokens_per_step"][1] == "set" and "tokens of a step" in rows["batch.tokens_per_step"][2]
    assert rows["max_steps"] == ["40", "changed", "the plan of the first start had 50: told first"]
    assert rows["parameters"][:2] == ["None", "default"]  # the row of the plan is what the model has
    assert rows["evaluation.every"][1] == "set" and rows["evaluation.patience"][1] == "default"


def test_planned_stands_beside_measured(made):
    rows = {
        row[0]: row[1:]
        for row in json.loads((made / "report.json").read_text())["run"]["tables"]["Planned and measured"]["rows"]
    }
    assert rows["tokens"][:2] == ["25,600", "20,480"] and rows["parameters"][:2] == ["4,848", "4,848"]
    assert rows["memory of one device, GiB"][:2] == ["0.50", "0.00"] and rows["FLOPs of training"][0] == "2.56e+07"
    assert rows["tokens/s"][2] == "1,000 to 1,001"


def test_checkpoints_and_results_are_listed_and_what_is_damaged_is_told(made, page):
    run = load_run(made.parent, "run")
    rows = checkpoints_table(run).rows
    assert [(row[1], row[4], row[5]) for row in rows] == [
        ("40", "n/a", "newest"), ("30", "val_loss 2.9000", "best"), ("20", "val_loss 3.5000", ""), ("", "", "set aside"),
    ]  # fmt: skip
    assert rows[0][3] == "0.500"
    found = results_table(run).rows
    assert (
        found[0] == ["step-00000040.json", "40", "arc", "accuracy", "0.5", "0.01"] and ["arc", "shots"] == found[1][2:4]
    )
    assert any("broken.json" in note for note in run.notes) and "broken.json" in page
    path = made.parent / "checkpoints" / "step-00000020" / MANIFEST
    kept = path.read_text()
    path.write_text(kept.replace("3.5", "1.5"))
    assert [row[5] for row in checkpoints_table(run).rows] == ["newest", "best", "damaged", "set aside"]
    path.write_text(kept)


def test_one_script_of_ours_is_allowed_and_nothing_from_a_folder_is_obeyed(made, page):
    read = Reader(page)
    assert read.open == [] and len(read.ids) == len(set(read.ids))
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert len(scripts) == 1 and f"script-src 'sha256-{digest}'" in page and "default-src 'none'" in page
    assert [tag for tag, _ in read.tags].count("script") == 2 and "alert(1)</script>" not in page
    assert not {tag for tag, _ in read.tags} & {"link", "iframe", "img", "object", "base"}
    assert not re.search(r'(src|href)="(?!#)', page) and "@import" not in page and "url(http" not in page
    assert not [key for _, attributes in read.tags for key in attributes if key.startswith("on")]
    assert "\u202e" not in page and "\x1b" not in page and "\\u202e" in page
    assert "<script>" not in (made / "report.md").read_text().split("### Sample")[0].replace("\\<script>", "")


def test_a_long_run_stays_small_and_keeps_its_best_evaluation(tmp_path):
    """100,000 rows: each point is a mean with its extremes; the lowest validation loss is never thinned away."""
    folder = write_run(tmp_path / "r", 3.0, max_steps=10)
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    steps = 100_000
    losses = np.linspace(6, 3, steps)
    losses[4321] = 99.0
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            value = 2.5 if step == 77_770 else float(losses[step - 1]) if step % 10 == 0 else None
            file.write(
                json.dumps(
                    row | {"step": step, "tokens": 512 * step, "loss": float(losses[step - 1]), "val_loss": value}
                )
                + "\n"
            )
    columns = read_columns(folder / "metrics.jsonl")
    series = thinned(columns)
    points, evaluations = series["points"], series["evaluations"]
    assert series["every"] == 100 and len(points["loss"]) == POINTS and points["step"][-1] == steps
    assert points["loss_high"][43] == 99.0 and points["loss"][43] == pytest.approx(np.mean(losses[4300:4400]), rel=1e-5)
    assert len(evaluations["val_loss"]) <= EVALUATIONS + 1 and min(evaluations["val_loss"]) == 2.5
    assert evaluations["step"][-1] == steps
    assert len(json.dumps(series)) < 300_000


def test_what_is_not_finite_is_a_gap_and_odd_rows_are_left_out(tmp_path):
    folder = write_run(tmp_path / "r", 3.0, max_steps=4, evaluation__every=2)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    third = json.loads(lines[2]) | {"loss": None, "grad_norm": None, "note": "text", "huge": 10**400}
    (folder / "metrics.jsonl").write_text(
        "\n".join([*lines[:2], json.dumps(third), "no row", lines[3], lines[1]]) + "\n"
    )
    series = thinned(read_columns(folder / "metrics.jsonl"))
    assert series["points"]["step"] == [1, 2, 3, 4] and series["points"]["loss"][2] is None
    assert "note" not in series["points"] and "huge" not in series["points"]
    assert series["evaluations"]["step"] == [2, 4]
    assert {chart["id"] for chart in charts(series)} == {"loss", "bits", "lr", "norm", "speed", "epoch"}
    assert thinned(read_columns(tmp_path / "none")) == {"every": 1, "points": {}, "evaluations": {}}


def test_an_empty_run_has_a_page_too(tmp_path, capsys):
    folder = write_run(tmp_path / "r", 3.0, steps=0)
    dispatch(["report", str(folder)])
    page = (folder / "report" / "report.html").read_text()
    assert "unfinished" in page and 'id="charts"' not in page and Reader(page).open == []


def test_a_run_that_ended_early_says_so(tmp_path, capsys):
    folder = write_run(tmp_path / "r", 3.0, steps=20)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[-1] = json.dumps(json.loads(lines[-1]) | {"ended_early": "val_loss has not improved in 3 evaluations"})
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    dispatch(["report", str(folder), "--json"])
    body = json.loads(capsys.readouterr().out)["run"]
    assert body["state"] == "ended early"
    assert (
        "The run is unfinished: 20 of 40 steps, ended early: val_loss has not improved in 3 evaluations."
        in body["caveats"]
    )


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on PATH")
def test_a_browser_draws_the_curves_without_a_complaint(made, tmp_path):
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}",
        "--enable-logging=stderr",
    ]
    command += ["--v=0", "--virtual-time-budget=2000", "--dump-dom", (made / "report.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    for key in ("loss", "val_loss", "val_bits_per_byte", "lr", "grad_norm", "tokens_per_second"):
        (path,) = re.findall(rf'id="curve-{key}">.*?class="line" d="([^"]*)"', done.stdout)
        assert path.count("L") >= 3


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on PATH")
def test_a_reader_can_point_zoom_hide_and_choose(made):
    """In a real browser: values under the pointer, a zoomed axis, a hidden curve, another sample, a filtered config."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(20_000)
        told = []
        page.on("console", lambda message: told.append(message.text))
        page.on("pageerror", lambda error: told.append(str(error)))
        page.goto((made / "report.html").as_uri())
        box = page.locator("#chart-loss svg").bounding_box()

        def at(share):
            return box["x"] + 58 + share * (box["width"] - 70), box["y"] + 150

        page.mouse.move(*at(0.5))
        tip = page.locator("#chart-loss .tip")
        assert "step 20" in tip.inner_text() and "validation" in tip.inner_text()
        assert page.locator("#chart-lr .cursor line").count() == 1  # the cursor is in every chart
        whole = page.locator("#curve-loss .line").get_attribute("d")
        page.mouse.move(*at(0.25))
        page.mouse.down()
        page.mouse.move(*at(0.5), steps=4)
        page.mouse.up()
        zoomed = page.locator("#curve-loss .line").get_attribute("d")
        assert zoomed != whole and page.locator("#reset").is_visible()
        page.locator("#reset").click()
        assert page.locator("#curve-loss .line").get_attribute("d") == whole
        page.locator("#chart-loss .toggle").click()
        assert page.locator("#curve-loss .line").get_attribute("d") != whole
        page.locator("#chart-loss .key").nth(1).click()
        assert page.locator("#curve-val_loss").count() == 0
        page.locator('label:has(input[value="tokens"])').click()
        assert "training tokens" in page.locator("#chart-loss .axis").inner_html()
        page.locator("#chart-lr svg").focus()
        page.keyboard.press("ArrowRight")
        assert "step 1," in page.locator("#chart-lr .tip").inner_text()
        assert "step 40, final (2 of 2)" in page.locator("#sample-name").inner_text()
        page.locator("#sample-back").click()
        assert page.locator("#sample-text").inner_text() == "earlier"
        page.locator("#filter").fill("optim.lr")
        assert page.locator("#config-table tbody tr:visible").count() == 1
        assert told == []
        browser.close()
