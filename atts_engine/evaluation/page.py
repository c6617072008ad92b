"""The page that a report is written on: one self-contained HTML file, light and dark, for phone and print."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

CSS = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5d6878; --line: #dde2ea; --back: #f5f6f9; --card: #ffffff;
  --draft: #2468c8; --target: #b85c00; --taken: #a8329e; --kept: #2c8a5b; --bad: #c0392b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9f1; --soft: #98a4b5; --line: #323b49; --back: #12161d;
  --card: #1a2029; --draft: #6cabff; --target: #f0a04b; --taken: #e07fd6; --kept: #5fc796; --bad: #ff7b6b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 18px 60px; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 40px 0 12px; }
.lead { color: var(--soft); margin: 6px 0 22px; max-width: 78ch; }
.cards { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.card, figure, .panel { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 14px 16px; }
.card b { display: block; font-size: 1.55rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.card span, .card small { color: var(--soft); font-size: .84rem; display: block; }
.plots { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); }
figure { margin: 0; break-inside: avoid; } figure svg { width: 100%; height: auto; display: block; }
figcaption { color: var(--soft); font-size: .84rem; margin-top: 8px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 12px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; font-size: .84rem; } th:first-child, td:first-child { text-align: left; }
tr:last-child td { border-bottom: 0; } .note { color: var(--soft); font-size: .88rem; margin: 10px 0 0; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font: 13.5px/1.65 ui-monospace, Consolas, monospace;
  margin: 10px 0 0; }
.draft { color: var(--draft); } .target { color: var(--target); }
.text .target {
  border-bottom: 2px solid color-mix(in srgb, var(--target) 45%, transparent); }
.mark { font: 600 11px/1 system-ui, sans-serif; padding: 2px 6px; border-radius: 9px; margin: 0 3px;
  white-space: nowrap; border: 1px solid currentColor; }
.kept { color: var(--kept); } .taken { color: var(--taken); } .bad { color: var(--bad); }
details { margin: 10px 0; } summary { cursor: pointer; } summary::marker { color: var(--soft); }
.problem { color: var(--soft); white-space: pre-wrap; overflow-wrap: anywhere; margin: 8px 0 0; }
.legend span { margin-right: 16px; } .legend { color: var(--soft); font-size: .88rem; margin: 0 0 10px; }
.timeline { width: 100%; height: auto; display: block; } .timeline text { fill: var(--soft); font-size: 11px; }
pre { overflow-x: auto; font-size: .84rem; color: var(--soft); }
@media (max-width: 700px) { th, td { padding: 6px 8px; font-size: .84rem; }
  .scroll th:first-child, .scroll td:first-child { position: sticky; left: 0; background: var(--card);
    white-space: normal; min-width: 7.5em; max-width: 11em; overflow-wrap: anywhere; } }
@media print { body { background: #fff; font-size: 12px; } main { padding: 0; max-width: none; }
  .scroll { overflow: visible; } th, td { padding: 3px 5px; font-size: 9px; white-space: normal; }
  .card, figure { break-inside: avoid; } .plots { grid-template-columns: 1fr 1fr; } tr { break-inside: avoid; } }
"""


def page(title: str, lead: str, sections: list[tuple[str | None, str]]) -> str:
    """The whole file. `sections`: (heading or None, markup); title and lead are plain text."""
    body = "\n".join(f"<section>{f'<h2>{escape(h)}</h2>' if h else ''}{markup}</section>" for h, markup in sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>\n{body}\n</main>\n</body>\n</html>\n'
    )


def cards(items: list[tuple[str, str, str]]) -> str:
    """Figures as cards: (name, value, small print)."""
    return (
        '<div class="cards">'
        + "".join(
            f'<div class="card"><span>{escape(name)}</span><b>{escape(value)}</b><small>{escape(small)}</small></div>'
            for name, value, small in items
        )
        + "</div>"
    )


def table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], notes: Sequence[str]) -> str:
    """A table in a panel that scrolls sideways on a phone."""
    head = "".join(f"<th>{escape(c)}</th>" for c in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    below = "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    return f'<div class="panel"><div class="scroll"><table><tr>{head}</tr>{body}</table></div>{below}</div>'
