"""The style sheet of the HTML page."""

from __future__ import annotations

from trainer.commands.report.figures import COLOURS

MOST_TABS = 8
# COLOURS for a dark page: the same hues, lighter.
DARK = ("#5ab4f0", "#ff8a3d", "#2fd3a4", "#f09ccb", "#e8c547", "#a5d8ff", "#d8d8d8", "#c3a3f5")

SHEET = """
:root { --page: #ffffff; --ink: #1b1f24; --soft: #5b6570; --line: #d9dee3; --panel: #f5f7f9; --warn: #fff7e0; --edge: #d99a00;
  --good: #00704f; --bad: #a83c00; LIGHT }
@media (prefers-color-scheme: dark) { :root { --page: #14181c; --ink: #e7eaee; --soft: #a0abb6; --line: #343c45; --panel: #1d2329;
  --warn: #2b2513; --edge: #d9a520; --good: #3fd6a6; --bad: #ff9a5c; DARK } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 78rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .4rem; padding-top: 1rem; border-top: 1px solid var(--line); overflow-wrap: anywhere; }
h3 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
.made, .lead { color: var(--soft); margin: .1rem 0; overflow-wrap: anywhere; }
.verdicts { list-style: none; padding: 0; margin: 1rem 0; }
.verdicts li { padding: .45rem .8rem; margin: .3rem 0; background: var(--panel); border-left: 4px solid var(--line); overflow-wrap: anywhere; }
.verdicts .better { border-color: var(--good); font-weight: 600; }
.verdicts .worse { border-color: var(--bad); font-weight: 600; }
.caveats { background: var(--warn); border-left: 4px solid var(--edge); padding: .7rem 1rem; margin: 1rem 0; }
.caveats h3 { margin: 0 0 .2rem; }
.caveats ul { margin: 0; padding-left: 1.1rem; overflow-wrap: anywhere; }
.caveats li { margin: .25rem 0; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: separate; border-spacing: 0; font-size: .84rem; min-width: 100%; }
th, td { padding: .4rem .55rem; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; vertical-align: top; }
tbody tr:last-child > * { border-bottom: 0; }
thead th { background: var(--panel); font-weight: 600; }
tbody th { font-weight: 600; position: sticky; left: 0; background: var(--page); max-width: 16rem; white-space: normal; min-width: 5.5rem; }
thead th:first-child { position: sticky; left: 0; }
td { max-width: 34rem; }
td:last-child { white-space: normal; overflow-wrap: anywhere; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap !important; }
td.better { color: var(--good); font-weight: 600; }
td.worse { color: var(--bad); font-weight: 600; }
.notes { color: var(--soft); font-size: .82rem; margin: .5rem 0 0; padding-left: 1.1rem; }
.tabs { border: 1px solid var(--line); border-radius: 6px; padding: .6rem; }
.tabs input { position: absolute; opacity: 0; }
.tabs label { display: inline-block; padding: .25rem .7rem; margin: 0 .2rem .4rem 0; border: 1px solid var(--line); border-radius: 99px;
  font-size: .86rem; cursor: pointer; color: var(--soft); }
.tabs input:checked + label { color: var(--page); background: var(--ink); border-color: var(--ink); }
.tabs input:focus-visible + label { outline: 3px solid var(--arm-0); outline-offset: 1px; }
.tabs.single label { display: none; }
figure { display: none; margin: 0; overflow-x: auto; }
figure svg { display: block; width: 100%; min-width: 27rem; max-width: 54rem; height: auto; margin: 0 auto; color: var(--ink); }
figcaption { color: var(--soft); font-size: .82rem; margin-top: .3rem; }
SHOWN { display: block; }
details { border: 1px solid var(--line); border-radius: 6px; padding: .4rem .8rem; margin: .4rem 0; }
summary { cursor: pointer; font-weight: 600; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .82rem; margin: .5rem 0; unicode-bidi: plaintext; }
@media (max-width: 40rem) { main { padding: 1rem .7rem 3rem; } h1 { font-size: 1.35rem; } }
@media print { :root { --page: #fff; --ink: #000; --soft: #444; --line: #bbb; --panel: #f4f4f4; --warn: #fff; LIGHT }
  main { max-width: none; } .wide { overflow: visible; border: 0; } table { font-size: 7pt; } th, td { white-space: normal; padding: 2pt 3pt; }
  .number { white-space: normal !important; } .tabs label { display: none; } .tabs, tr, figure { break-inside: avoid; } h3 { break-after: avoid; }
  tbody th { position: static; } }
"""


def style() -> str:
    """The sheet, with the arms' colours and the rule that shows the figure of the chosen radio button."""
    light, dark = (" ".join(f"--arm-{i}: {colour};" for i, colour in enumerate(colours)) for colours in (COLOURS, DARK))
    shown = ", ".join(
        f".tabs input:nth-of-type({i}):checked ~ figure:nth-of-type({i})" for i in range(1, MOST_TABS + 1)
    )
    return SHEET.replace("LIGHT", light).replace("DARK", dark).replace("SHOWN", shown).strip()
