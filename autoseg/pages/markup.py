"""Pieces of an HTML page from plain text.

What comes in as `str` is text and is escaped here; `Html` is done. A page holds all that it shows: pictures are
embedded, nothing is fetched and nothing is run, which its security policy also tells the browser.
"""

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Literal, NewType

Html = NewType("Html", str)
NOTHING = Html("")

GENERATOR = '<meta name="generator" content="autoseg report">'
"""By this a page is known as one of ours."""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
NUMBER = re.compile(r"-|[-+]?[\d.,]+( [%A-Za-z]+)?")
LONG, MIDDLING = 60, 16
"""Cells with more characters get a column of some width, also on a narrow screen."""


def paragraph(words: str, kind: Literal["", "missing", "problem"] = "") -> Html:
    """One paragraph; "missing" is what a run has not (yet), "problem" what cannot be shown."""
    return Html(f"<p{f' class={kind}' if kind else ''}>{escape(words)}</p>")


def heading(words: str) -> Html:
    """A heading within a section."""
    return Html(f"<h3>{escape(words)}</h3>")


def listing(items: Iterable[str]) -> Html:
    """Items with bullets; nothing for none."""
    inner = "".join(f"<li>{escape(each)}</li>" for each in items)
    return Html(f"<ul>{inner}</ul>" if inner else "")


def facts(pairs: Mapping[str, str]) -> Html:
    """Names with what they stand for; those that stand for nothing are left out."""
    inner = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs.items() if value)
    return Html(f"<dl>{inner}</dl>")


def preformatted(lines: Iterable[str]) -> Html:
    """Lines whose spaces count."""
    return Html(f"<pre tabindex=0>{escape(chr(10).join(lines))}</pre>")


def table(
    title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], groups: Sequence[tuple[str, int]] = ()
) -> Html:
    """A table whose first column names the rows; columns of numbers are set to the right.

    `groups` are headings above the headings, each with the number of columns that it spans.
    """
    numeric = [bool(rows) and all(NUMBER.fullmatch(row[k]) for row in rows) for k in range(len(headings))]
    above = "".join(f"<th scope=colgroup colspan={span}>{escape(name)}</th>" for name, span in groups)
    head = "".join(
        f"<th scope=col{' class=number' if right else ''}>{escape(name)}</th>"
        for name, right in zip(headings, numeric, strict=True)
    )
    body = "".join(f"<tr>{_cells(row, numeric)}</tr>" for row in rows)
    over = f"<tr>{above}</tr>" if above else ""
    shown = escape(title)
    return Html(
        f'<div class=wide role=region tabindex=0 aria-label="{shown}"><table><caption>{shown}</caption>'
        f"<thead>{over}<tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cells(row: Sequence[str], numeric: Sequence[bool]) -> str:
    first, *others = row
    marked = zip(others, numeric[1:], strict=True)
    rest = "".join(f"<td{_kind(cell, right)}>{escape(cell)}</td>" for cell, right in marked)
    return f"<th scope=row>{_breakable(first)}</th>{rest}"


def _kind(cell: str, right: bool) -> str:
    if right:
        return " class=number"
    return " class=long" if len(cell) > LONG else " class=middling" if len(cell) > MIDDLING else ""


def _breakable(name: str) -> str:
    """A name that may go on in another line behind its dots and underscores, where it is long."""
    parts = re.split(r"(?<=[._])", name) if len(name) > MIDDLING else [name]
    return "<wbr>".join(map(escape, parts))


def picture(png: bytes, alt: str, caption: str, beside: Html = NOTHING) -> Html:
    """An embedded PNG with its caption below; `beside` stands at its side where there is room."""
    code = base64.b64encode(png).decode()
    image = f'<img alt="{escape(alt)}" src="data:image/png;base64,{code}">'
    shown = f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"
    return Html(f"<div class=pair>{shown}{beside}</div>" if beside else shown)


def grid(parts: Iterable[Html]) -> Html:
    """Pictures side by side as far as there is room."""
    return Html(f"<div class=grid>{''.join(parts)}</div>")


def section(title: str, parts: Iterable[Html]) -> Html:
    """A part of the page, which its list of contents leads to."""
    return Html(f'<section id="{_anchor(title)}"><h2>{escape(title)}</h2>{"".join(parts)}</section>')


def page(title: str, subtitle: str, sections: Mapping[str, Html]) -> str:
    """The whole file; `sections` by their titles, see `section`."""
    contents = "".join(f'<li><a href="#{_anchor(each)}">{escape(each)}</a></li>' for each in sections)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{GENERATOR}\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p>"
        f"<nav aria-label=Contents><ul>{contents}</ul></nav></header>\n"
        f"<main>\n{chr(10).join(sections.values())}\n</main>\n</body>\n</html>\n"
    )


def _anchor(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")


STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1f24; --soft: #57606a; --line: #d5d9de; --shade: #f4f6f8;
  --link: #0b5cad; --warn: #8a4b00 }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171a; --ink: #e4e7ea; --soft: #a2abb5; --line: #3a4149; --shade: #1e2328; --link: #8cbcf2;
    --warn: #e8b06a }
}
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 74rem; margin: 0 auto; padding: 1rem; background: var(--page);
  color: var(--ink); overflow-wrap: anywhere }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0 }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .8rem; padding-bottom: .2rem; border-bottom: 2px solid var(--line) }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .5rem }
header p, figcaption, caption, dt { color: var(--soft) }
a { color: var(--link) }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; padding: 0; margin: 0 }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: .8rem 0 }
dd { margin: 0 }
.wide { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-size: .88rem; overflow-wrap: normal }
caption { text-align: left; padding: .2rem 0; font-weight: 600; overflow-wrap: anywhere }
th, td { padding: .25rem .7rem .25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) }
thead th { vertical-align: bottom; color: var(--soft); font-weight: 600 }
tbody th { font-weight: 500 }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.long { min-width: 13rem }
.middling { min-width: 6.5rem }
pre { overflow-x: auto; background: var(--shade); padding: .8rem; font-size: .78rem; line-height: 1.35 }
.missing { color: var(--soft) }
.problem { color: var(--warn); border-left: 3px solid; padding-left: .7rem }
figure { margin: 1rem 0 }
figcaption { font-size: .85rem; margin-top: .3rem }
img { max-width: 100%; height: auto; display: block }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 0 1.5rem }
.pair { display: flex; flex-wrap: wrap; gap: 0 2rem; align-items: flex-start }
.pair figure { flex: 0 1 auto; max-width: 100% }
.pair figcaption { max-width: 27rem }
@media (max-width: 34rem) { dl { grid-template-columns: 1fr } dt { margin-top: .4rem } }
@media print {
  :root { --page: #fff; --ink: #000; --soft: #444; --line: #bbb; --shade: #f4f6f8; --link: #000; --warn: #000 }
  body { max-width: none; padding: 0; font-size: 10pt }
  nav { display: none }
  .wide, pre { overflow: visible; white-space: pre-wrap }
  .wide, .number { white-space: normal }
  table { font-size: 7.5pt }
  pre { font-size: 6.5pt }
  th, td { padding-right: .4rem }
  .long, .middling { min-width: 0 }
  tr, figure, .pair { break-inside: avoid }
  h2, h3 { break-after: avoid }
}
"""
