"""The parts that a page is made of. Every text goes through `text`: names, prompts and answers are anybody's."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Sequence
from html import escape
from typing import Any

LONGEST = 500  # letters of a prompt or an answer on the page
LINE_ENDS = re.compile("\r\n|[\r\v\f\x85\u2028\u2029]")
SIGNS = {"right": "✓ right", "wrong": "✗ wrong", "not_attempted": "– not attempted"}
# No script and no request, whatever stands in a text.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
# Pictures are drawn on white. In the dark they are inverted and their hues turned back, as are the dots of their
# colours, so that they still go together.
STYLE = """:root { color-scheme: light dark; --paper: #fff; --card: #f5f6f8; --ink: #1b1f24; --soft: #565f6a;
  --line: #d5d9df; --link: #0b57a4; --right: #17652f; --wrong: #b3261e; --none: #6c5100 }
@media (prefers-color-scheme: dark) {
  :root { --paper: #181818; --card: #232527; --ink: #e6e8eb; --soft: #a9b1bb; --line: #3c424a; --link: #8cbcf2;
    --right: #7fd99a; --wrong: #ff9d94; --none: #e3c26f }
  img, .dot { filter: invert(.905) hue-rotate(180deg) } }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 1200px; padding: 0 1rem 3rem; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.25 } h2 { font-size: 1.25rem; margin-top: 2.2em } h3 { font-size: 1.05rem }
.card h3 { font-size: 1rem; margin: 0 } a { color: var(--link) } nav a { margin-right: 1em }
p, li, h1, h3, td, th, summary { unicode-bidi: plaintext } img { display: block; width: 100%; height: auto }
.curve { max-width: 760px } .soft { color: var(--soft) } .said { white-space: pre-wrap }
summary { cursor: pointer; font-weight: 600; padding: .4em 0 }
.scroll { overflow-x: auto; overflow-wrap: normal; background:
  linear-gradient(to left, var(--paper) 2rem, transparent) 100% 0 / 4rem 100% local no-repeat,
  linear-gradient(to left, var(--line), transparent) 100% 0 / 1rem 100% scroll no-repeat }
table { border-collapse: collapse; font-size: .92rem }
th, td { padding: .3em .7em; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top }
th { color: var(--soft); font-weight: 600; vertical-align: bottom } th:first-child, td:first-child { text-align: left }
.scroll td { max-width: 26rem; overflow-wrap: break-word } .scroll .number { white-space: nowrap }
.card { background: var(--card); border-radius: 8px; padding: .8em 1em; margin: .8em 0 }
.card p { margin: .3em 0 } .card table { width: 100% } .card td, .card th { padding: .3em .4em; text-align: left }
.card th, .card td:not(.said), .run { white-space: nowrap } .card td:not(.said) { width: 1% }
.card tr:last-child td { border: 0 }
.right { color: var(--right) } .wrong { color: var(--wrong) } .not_attempted { color: var(--none) }
.dot { display: inline-block; width: .8em; height: .8em; border-radius: 50%; margin-right: .5em }
@media (max-width: 500px) { .card { padding: .7em .6em } .card td, .card th { padding: .3em .25em } }"""


def text(words: str, longest: int | None = None) -> str:
    """Text as HTML; without the control characters that it has no place for, and cut with a word on how much.

    Every kind of line end is one of HTML, as a browser shows some of them as nothing.
    """
    words = LINE_ENDS.sub("\n", words)
    cut = "" if longest is None or len(words) <= longest else f" … ({len(words) - longest:,} more letters)"
    kept = words[:longest] if cut else words
    return escape("".join(letter if letter >= " " or letter in "\n\t" else "\ufffd" for letter in kept) + cut)


def number(value: str | float) -> str:
    """A cell: text as it is, a number with four digits, a dash where it is NaN."""
    if isinstance(value, str) or math.isnan(value):
        return value if isinstance(value, str) else "–"
    return f"{value:,.0f}" if abs(value) >= 1000 or value % 1 == 0 else f"{value:.4g}"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], colours: Sequence[str] = ()) -> str:
    """A table without the columns that no row has a value of; `colours` are dots before its rows.

    Where it is wider than the page it scrolls within itself.
    """
    if not rows:
        return "<p>none</p>"
    cells = [[number(value) for value in row] for row in rows]
    kept = [i for i in range(len(header)) if any(row[i] != "–" for row in cells)]
    lines = ["".join(f'<th scope="col">{text(header[i])}</th>' for i in kept)]
    for place, row in enumerate(cells):
        dot = f'<b class="dot" style="background: {colours[place]}"></b>' if colours else ""
        start = f'<td class="run">{dot}' if colours else "<td>"
        cell = ["<td>" if isinstance(value, str) else '<td class="number">' for value in rows[place]]
        starts = [start if i == 0 else cell[i] for i in kept]
        lines.append("".join(f"{opened}{text(row[i])}</td>" for opened, i in zip(starts, kept, strict=True)))
    inside = "\n".join(f"<tr>{line}</tr>" for line in lines)
    name = f"table: {header[0]}, {len(rows)} rows"
    return f'<div class="scroll" role="region" aria-label="{text(name)}" tabindex="0"><table>\n{inside}\n</table></div>'


def picture(alt: str, wide: bytes, narrow: bytes | None = None, name: str = "") -> str:
    """A picture within the page, and another one in its place where the screen is narrow."""
    image = f'<img class="{name}" alt="{text(alt)}" src="{_data(wide)}">'
    if narrow is None:
        return image
    return f'<picture><source media="(max-width: 700px)" srcset="{_data(narrow)}">{image}</picture>'


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def details(title: str, *parts: str, is_open: bool = True) -> str:
    """What can be folded away."""
    return "\n".join([f"<details{' open' * is_open}><summary>{text(title)}</summary>", *parts, "</details>"])


def section(name: str, title: str, *parts: str) -> str:
    """A part of the page with its heading, which the links at the top lead to."""
    return "\n".join([f'<section id="{name}"><h2>{text(title)}</h2>', *parts, "</section>"])


def items(lines: Sequence[str]) -> str:
    """A list of sentences."""
    return "\n".join(["<ul>", *(f"<li>{text(line)}</li>" for line in lines), "</ul>"])


def outcome(kind: str) -> str:
    """An outcome in its colour, and by a sign and a word for who does not see it."""
    return f'<span class="{text(kind)}">{text(SIGNS.get(kind, kind or "–"))}</span>'


def card(prompt: str, reference: str, first: str, rows: Sequence[tuple[str, str, float, str]]) -> str:
    """A prompt with answers to it.

    Args:
        prompt, reference: as they are.
        first: what the first column is.
        rows: its cell, the answer, its confidence (NaN: not known) and its outcome.
    """
    lines = [f'<article class="card"><h3 class="said">{text(prompt, LONGEST)}</h3>']
    if reference:
        lines.append(
            f'<p><span class="soft">Reference:</span> <span class="said">{text(reference, LONGEST)}</span></p>'
        )
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in (first, "Answer", "Sure", "Outcome"))
    lines.append(f"<table><tr>{head}</tr>")
    for cell, answer, confidence, kind in rows:
        said = text(answer, LONGEST) or '<span class="soft">(nothing)</span>'
        sure = "–" if math.isnan(confidence) else f"{confidence:.0%}" if confidence >= 0.005 else "<1%"
        lines.append(f'<tr><td>{text(cell)}</td><td class="said">{said}</td><td>{text(sure)}</td>'
                     f"<td>{outcome(kind)}</td></tr>")  # fmt: skip
    return "\n".join([*lines, "</table></article>"])
