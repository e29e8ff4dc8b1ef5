"""The page of one run as one HTML file: its own script and style sheet are in it, and nothing from outside is asked for.

The Content-Security-Policy allows this one script, by its hash, and no address. Data stand in the page as JSON, which no browser runs.
Without scripts (or on paper) the tables, the last sample and a static figure remain.
"""

from __future__ import annotations

import base64
import hashlib
import json
from html import escape
from pathlib import Path

from trainer.commands.report.html import inline, table_of, text_of
from trainer.commands.report.page import Page, RunDetails
from trainer.commands.report.style import style
from trainer.core.text import printable_lines

HERE = Path(__file__).parent
COLOURS = 8
AXES = (("step", "steps"), ("tokens", "tokens"), ("seconds", "seconds"))


def render(page: Page, run: RunDetails) -> str:
    """The whole file."""
    script = (HERE / "run_page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    own = "\n".join(f".c{i} {{ --own: var(--arm-{i}); }}" for i in range(COLOURS))
    sheet = style() + "\n" + (HERE / "run_page.css").read_text(encoding="utf-8").replace("OWN", own)
    parts = _parts(run)
    links = "".join(f'<a href="#{name}">{text_of(title)}</a>' for name, (title, _) in parts.items())
    sections = "\n".join(
        f'<section id="{name}">\n<h2>{text_of(title)}</h2>\n{body}\n</section>' for name, (title, body) in parts.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{text_of(page.title)}</title>
<style>
{sheet}
</style>
</head>
<body>
<main>
<header>
<h1>{text_of(run.name)}<span class="state {escape(run.state)}">{text_of(run.state)}</span></h1>
{"".join(f'<p class="lead">{text_of(line)}</p>' for line in run.lead)}
<p class="made">{text_of(page.made)}</p>
</header>
<dl class="tiles">{_tiles(run)}</dl>
{_caveats(run)}
<nav aria-label="parts of the page">{links}</nav>
{sections}
</main>
<script type="application/json" id="page-data">{_data(run)}</script>
<script>{script}</script>
</body>
</html>
"""


def _parts(run: RunDetails) -> dict[str, tuple[str, str]]:
    """Id of a part of the page -> (title, what stands in it). Parts without content are left out."""
    parts = {"curves": ("Curves", _curves(run)), "samples": ("Samples", _samples(run))}
    for title, table in run.tables.items():
        name = title.lower().replace(" ", "-")
        if name == "configuration":
            parts["config"] = (title, _config(table_of(table)))
        elif table.rows:
            parts[name] = (title, table_of(table))
    text = escape(printable_lines("\n".join(run.commands)))
    parts["commands"] = ("Commands", f"<pre>{text}</pre>" if text else "")
    return {name: part for name, part in parts.items() if part[1]}


def _tiles(run: RunDetails) -> str:
    return "".join(
        f'<div class="tile"><dt>{text_of(name)}</dt><dd class="value">{text_of(value)}</dd><dd class="more">{text_of(more)}</dd></div>'
        for name, value, more in run.tiles
    )


def _caveats(run: RunDetails) -> str:
    lines = "".join(f"<li>{text_of(line)}</li>" for line in run.caveats)
    return f'<div class="caveats"><h3>Caveats</h3><ul>{lines}</ul></div>' if lines else ""


def _curves(run: RunDetails) -> str:
    """The controls, and the place where the script draws. A static figure for readers without scripts."""
    if not run.charts:
        return ""
    axes = "".join(
        f'<label><input type="radio" name="axis" value="{key}"{" checked" if key == "step" else ""}>{word}</label>'
        for key, word in AXES
    )
    static = next((figure for figures in run.figures.values() for figure in figures), None)
    fallback = "" if static is None else f"<noscript><figure style='display:block'>{inline(static)}</figure></noscript>"
    every = run.series["every"]
    means = (
        f" A point is the mean of {every} steps; the band goes from the lowest to the highest loss of them."
        if every > 1
        else ""
    )
    return f"""<div class="controls">
<fieldset><legend>x axis</legend>{axes}</fieldset>
<button type="button" class="toggle" id="log-x" aria-pressed="false">log x</button>
<label class="range">smoothing <input type="range" id="smooth" min="0" max="0.99" step="0.01" value="0.6"><output id="smooth-value">0.60</output></label>
<button type="button" class="button" id="reset" hidden>whole run</button>
</div>
<div id="charts"></div>
{fallback}
<p class="note">Point at a curve to read its values; drag to zoom in, double-click to see the whole run. With the keyboard: arrow keys move
the cursor, Escape zooms out.{means}</p>"""


def _samples(run: RunDetails) -> str:
    if not run.samples:
        return ""
    header, text = run.samples[-1]
    return f"""<div class="sample-bar"><button type="button" class="button" id="sample-back" aria-label="earlier sample">&#8592;</button>
<input type="range" id="sample" min="0" max="{len(run.samples) - 1}" value="{len(run.samples) - 1}" aria-label="sample">
<button type="button" class="button" id="sample-on" aria-label="later sample">&#8594;</button></div>
<p class="note" id="sample-name">{text_of(header)}</p>
<pre id="sample-text" tabindex="0">{escape(printable_lines(text))}</pre>"""


def _config(table: str) -> str:
    return f"""<div class="filter-bar"><input type="search" id="filter" placeholder="filter, such as optim" aria-label="filter the keys">
<label><input type="checkbox" id="with-defaults"> also defaults</label><span id="filter-count" role="status"></span></div>
<div id="config-table">{table}</div>"""


def _data(run: RunDetails) -> str:
    """What the script reads. A < is written as an escape of JSON, so nothing in it can end the element."""
    samples = [[header, printable_lines(text)] for header, text in run.samples]
    content = {**run.series, "charts": run.charts, "samples": samples}
    return json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
