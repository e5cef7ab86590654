"""The documentation says what is true: links lead somewhere, and the README names every file."""

import importlib.util
import inspect
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
import typer
from markdown_it import MarkdownIt

import autoseg
from autoseg import cli
from autoseg.network import losses

COMMAND = re.compile(r"(?:taskset \S+ \S+ )?(autoseg .+)", re.DOTALL)
LONGEST_ROLE = 80
ROOT = Path(__file__).parent.parent


def script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def build() -> ModuleType:
    return script("docs/build.py")


@pytest.fixture(scope="module")
def tree(build: ModuleType) -> str:
    return str(build.tree())


def test_the_readme_names_every_file_of_the_package_with_its_role(tree: str) -> None:
    files = [path.relative_to(ROOT).as_posix() for path in (ROOT / "autoseg").rglob("*.py") if path.stat().st_size]
    assert [name for name in files if f"{name} " not in tree] == []
    assert tree in (ROOT / "README.md").read_text(), "run `make docs`: the tree in README.md is another"


def test_the_role_of_a_file_is_one_short_sentence(tree: str) -> None:
    """The first sentence of its docstring, of 80 characters at most."""
    roles = dict(line.split(maxsplit=1) for line in tree.splitlines()[1:-1])
    assert {path: role for path, role in roles.items() if len(role) > LONGEST_ROLE} == {}


def test_every_link_leads_somewhere(build: ModuleType) -> None:
    markdown = build.MarkdownIt("commonmark").enable("table")
    parsed = {page: markdown.parse(page.read_text()) for page in build.pages()}
    assert len(parsed) > 5
    assert [wrong for page in parsed for wrong in build.broken_links(page, parsed)] == []


def test_a_broken_link_is_found(build: ModuleType) -> None:
    page = ROOT / "docs" / "tour.md"
    text = "[a](nowhere.md) and [b](#no-heading) and [c](tour.md) and [d](#a-heading)\n\n# A heading"
    parsed = {page: build.MarkdownIt("commonmark").parse(text)}
    assert len(build.broken_links(page, parsed)) == 2


def test_every_decision_is_in_the_index() -> None:
    pages = {path.name for path in (ROOT / "docs" / "decisions").glob("*.md")} - {"index.md"}
    index = (ROOT / "docs" / "decisions" / "index.md").read_text()
    assert [name for name in sorted(pages) if f"({name})" not in index] == []


def test_every_loss_is_listed_with_its_options() -> None:
    page = (ROOT / "docs" / "reference" / "losses.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \|[^|]*\|(.*)\|$", page, re.MULTILINE))
    assert list(rows) == list(losses.LOSSES)
    for name, listed in rows.items():
        usual = losses.USUAL_RULE if name in losses.WEIGHTED else "none"
        for option, default in losses.options_of(name).items():
            shown = {True: "yes", False: "no"}[default] if isinstance(default, bool) else default
            shown = f"{shown:.4g}" if isinstance(shown, float) else usual if shown is None else shown
            assert f"`{option}` {shown}" in listed, f"{name}: {option} {shown}"


def test_every_argument_of_a_public_function_is_explained() -> None:
    functions = [getattr(autoseg, name) for name in autoseg.PUBLIC if name != "Predictor"]
    assert len(functions) > 10
    for function in functions:
        told, arguments = inspect.getdoc(function) or "", set(inspect.signature(function).parameters) - {"report"}
        assert [each for each in arguments if not re.search(rf"\b{each}\b", told)] == [], function.__qualname__


def test_a_measurement_without_its_data_says_what_they_are(tmp_path: Path) -> None:
    outside = script("bench/outside.py")
    assert outside.data_set(str(tmp_path)) == tmp_path
    with pytest.raises(SystemExit, match=r"nowhere: no such folder. Unpack Task04 \(Hippocampus\)"):
        outside.data_set(str(tmp_path / "nowhere"))


def commands_on(page: Path) -> tuple[list[str], list[str]]:
    """What a page shows of commands: the lines of its blocks, and what stands between backticks."""
    tokens = MarkdownIt("commonmark").enable("table").parse(page.read_text())
    blocks = [line for token in tokens if token.type in ("code_block", "fence") for line in token.content.splitlines()]
    spans = [child.content for token in tokens for child in token.children or () if child.type == "code_inline"]
    lines, hints = ([found[1] for each in texts if (found := COMMAND.fullmatch(each))] for texts in (blocks, spans))
    return lines, hints


PAGES = {page: commands_on(page) for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))}


WITH_COMMANDS = sorted(page for page, found in PAGES.items() if any(found))


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_is_understood(page: Path) -> None:
    """Those of a block as a whole; in the text, where most of a command may be left out, by their options."""
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    lines, spans = PAGES[page]
    for line in lines:
        _, name, *words = shlex.split(line, comments=True)
        commands[name].make_context(name, list(cli.with_resume_value(words)))  # raises where an option is unknown
    for span in spans:
        _, name, *words = shlex.split(span)
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert [word for word in words if word.startswith("-") and word.partition("=")[0] not in known] == [], span
