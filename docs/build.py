"""Writes the README's tree, turns all Markdown into HTML in site/, and fails at a link that leads nowhere."""

import ast
import html
import itertools
import re
import sys
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parent.parent
SITE = ROOT / "site"
ROOT_DEPTH = len(ROOT.parts) + 2
TREE_BEGINS, TREE_ENDS = "<!-- tree", "<!-- end of tree"
STYLE = (
    "body{font:16px/1.55 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem}"
    "pre,code{background:#f4f4f4}pre{padding:.8rem;overflow:auto}table{border-collapse:collapse}"
    "td,th{border:1px solid #ccc;padding:.2rem .6rem;text-align:left}img{max-width:100%}"
)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def headings(tokens: list[Token]) -> set[str]:
    pairs = itertools.pairwise(tokens)
    return {anchor(text.content) for opening, text in pairs if opening.type == "heading_open"}


def links(tokens: list[Token]) -> list[str]:
    inline = [child for token in tokens for child in token.children or ()]
    found = [str(child.attrs.get("href") or child.attrs.get("src") or "") for child in inline]
    return [link for link in found if link and not re.match(r"[a-z]+:", link)]


def broken_links(page: Path, parsed: dict[Path, list[Token]]) -> list[str]:
    wrong = []
    for link in links(parsed[page]):
        name, _, fragment = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (fragment and target in parsed and fragment not in headings(parsed[target])):
            wrong.append(f"{page.relative_to(ROOT)}: {link} leads nowhere")
    return wrong


def render(page: Path, tokens: list[Token], markdown: MarkdownIt) -> None:
    for opening, text in itertools.pairwise(tokens):
        if opening.type == "heading_open":
            opening.attrs["id"] = anchor(text.content)
    body = markdown.renderer.render(tokens, markdown.options, {})
    body = re.sub(r'(href="(?![a-z]+:)[^"#]*)\.md(["#])', r"\1.html\2", body)
    target = (SITE / page.relative_to(ROOT)).with_suffix(".html")
    target.parent.mkdir(parents=True, exist_ok=True)
    title = html.escape(page.stem if page.stem != "README" else "autoseg")
    target.write_text(f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>{body}")


def tree() -> str:
    """The package, a line per file with the first sentence of its docstring."""
    lines = []
    for path in sorted((ROOT / "autoseg").rglob("*.py"), key=lambda each: (len(each.parts) > ROOT_DEPTH, each)):
        described = ast.get_docstring(ast.parse(path.read_text()))
        if described:
            first = re.split(r"(?<=[.!?])\s", " ".join(described.split()))[0].rstrip(".")
            lines.append(f"{path.relative_to(ROOT).as_posix():44} {first}")
    return "```\n" + "\n".join(lines) + "\n```"


def write_tree() -> None:
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(TREE_BEGINS)
    note, rest = rest.split("\n", 1)
    after = rest.split(TREE_ENDS)[1]
    readme.write_text(f"{before}{TREE_BEGINS}{note}\n{tree()}\n{TREE_ENDS}{after}")


def copy_pictures() -> None:
    for picture in (ROOT / "docs").rglob("*.png"):
        target = SITE / picture.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(picture.read_bytes())


def main() -> int:
    write_tree()
    markdown = MarkdownIt("commonmark").enable("table")
    parsed = {page: markdown.parse(page.read_text()) for page in pages()}
    wrong = [each for page in parsed for each in broken_links(page, parsed)]
    for page, tokens in parsed.items():
        render(page, tokens, markdown)
    copy_pictures()
    print("\n".join([*wrong, f"{len(parsed)} pages in {SITE.name}/, {len(wrong)} broken links"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
