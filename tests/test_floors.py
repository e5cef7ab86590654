"""The rules of the house, checked on the source itself: who may import whom, who may print, how long things may be."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from autoseg.cli import app

PACKAGE = Path(__file__).parent.parent / "autoseg"
FILES = sorted(PACKAGE.rglob("*.py"))
FLOORS = {
    "record": 0, "records": 0, "specs": 0, "store": 0, "layout": 0, "events": 0, "errors": 0, "parallel": 0, "lanes": 0,
    "upgrades": 0,
    "image": 1, "network": 1, "scoring": 1,
    "planning": 2, "cases": 2, "pages": 2,
    "steps": 3,
    "arguments": 4, "cli": 4, "cli_scores": 4, "screen": 4, "tables": 4,
    "__init__": 5, "__main__": 5,
}  # fmt: skip
SHARED_ROOMS = {"records", "store", "layout", "events", "errors", "parallel", "cli", "screen", "__main__"}
SHARED_ROOMS |= {"record", "specs", "lanes", "arguments", "cli_scores", "upgrades", "tables"}
"""Files that lie side by side in autoseg/ itself: those of one floor may import each other."""
Sources = list[tuple[Path, ast.Module]]
SLOW = {"torch", "numpy", "scipy", "skimage", "SimpleITK", "matplotlib", "blosc2", "pydantic"}


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


@cache
def all_nodes(tree: ast.AST) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(tree))


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in all_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def run_at_import(tree: ast.AST) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported: none inside functions or `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.stmt):
            yield node
        yield from run_at_import(node)


def imported_at_top(tree: ast.AST) -> set[str]:
    statements = [node for node in run_at_import(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    return {name for node in statements for name, _ in imports(node)}


def forbidden(room: str, target: str) -> bool:
    if target == room:
        return False
    if room in SHARED_ROOMS and target in SHARED_ROOMS:
        return FLOORS[target] > FLOORS[room]
    return FLOORS[target] >= FLOORS[room]


@pytest.fixture(scope="module")
def sources() -> Iterator[Sources]:
    """The whole package, parsed once for all rules."""
    yield [(path, ast.parse(path.read_text())) for path in FILES]
    all_nodes.cache_clear()


def test_every_file_has_a_floor() -> None:
    unknown = [str(path) for path in FILES if room_of(path) not in FLOORS]
    assert not unknown, f"give these a floor in {Path(__file__).name}: {unknown}"


def test_a_file_imports_only_from_lower_floors_or_its_own_folder(sources: Sources) -> None:
    for path, tree in sources:
        for name, line in imports(tree):
            parts = name.split(".")
            if parts[0] != "autoseg" or name == "autoseg.__version__":
                continue
            if path.name == "__init__.py" and room_of(path) == "__init__":
                continue
            assert parts[1] in FLOORS, f"{path}:{line} imports {name}, which has no floor"
            assert not forbidden(room_of(path), parts[1]), f"{path}:{line} imports {name} from a floor it may not see"


def test_the_floor_rule_itself_refuses_what_it_should() -> None:
    assert forbidden("image", "network")
    assert forbidden("planning", "cases")
    assert forbidden("planning", "steps")
    assert forbidden("steps", "cli")
    assert forbidden("records", "image")
    assert not forbidden("steps", "network")
    assert not forbidden("cli", "screen")
    assert not forbidden("image", "image")


def test_a_file_directly_in_steps_is_a_command() -> None:
    names = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    files = {path.stem.replace("_", "-") for path in (PACKAGE / "steps").glob("*.py")} - {"--init--"}
    assert files == names


def test_torch_is_imported_at_the_top_only_in_network_and_steps(sources: Sources) -> None:
    for path, tree in sources:
        if room_of(path) in ("network", "steps"):
            continue
        for name in imported_at_top(tree):
            assert name.split(".")[0] != "torch", f"{path} imports torch when it is imported"
            assert not name.startswith("autoseg.network"), f"{path} imports {name}, which brings torch, at the top"


def test_nothing_below_the_screen_prints(sources: Sources) -> None:
    for path, tree in sources:
        for node in all_nodes(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("print", "input"), f"{path}:{node.lineno} talks to the terminal"
        if FLOORS[room_of(path)] < 4:
            brings = {name.split(".")[0] for name, _ in imports(tree)}
            assert not brings & {"rich", "typer"}, f"{path} imports {brings & {'rich', 'typer'}}"


def test_environment_variables_are_not_read(sources: Sources) -> None:
    for path, tree in sources:
        for node in all_nodes(tree):
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb"):
                line = path.read_text().splitlines()[node.lineno - 1]
                allowed = path.name == "parallel.py" and re.search("SLURM|setting|SETTINGS", line)
                assert allowed, f"{path}:{node.lineno} reads the environment: make it an option"


def test_functions_are_short_and_files_too(sources: Sources) -> None:
    for path, tree in sources:
        assert len(path.read_text().splitlines()) <= 400, f"{path} is longer than 400 lines"
        for node in all_nodes(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or 0) - node.body[0].lineno + 1
                assert length <= 60, f"{path}:{node.lineno} {node.name} has {length} lines"


def test_names_say_what_a_thing_is(sources: Sources) -> None:
    for path, tree in sources:
        assert not re.search(r"util|helper|common|manager|misc", path.stem), f"{path}: name it after what is in it"
        for node in all_nodes(tree):
            if isinstance(node, ast.ClassDef):
                assert not re.search(r"^Base|Mixin$|Manager$", node.name), f"{path}:{node.lineno} class {node.name}"


def test_modules_and_public_functions_explain_themselves(sources: Sources) -> None:
    for path, tree in sources:
        if not tree.body:
            continue
        assert ast.get_docstring(tree), f"{path} does not say what it is"
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}:{node.lineno} {node.name} has no docstring"


def test_arguments_are_never_checked_by_assert(sources: Sources) -> None:
    for path, tree in sources:
        for function in (node for node in all_nodes(tree) if isinstance(node, ast.FunctionDef)):
            arguments = {each.arg for each in (*function.args.args, *function.args.kwonlyargs)} - {"self"}
            for node in ast.walk(function):
                if isinstance(node, ast.Assert):
                    names = {each.id for each in ast.walk(node.test) if isinstance(each, ast.Name)}
                    assert not names & arguments, f"{path}:{node.lineno} asserts on an argument: raise UserError"


def test_nothing_executable_is_loaded_from_files(sources: Sources) -> None:
    for path, tree in sources:
        for name, line in imports(tree):
            first = name.split(".")[0]
            if name == "pickle.UnpicklingError":
                continue  # what a refusal is caught by
            assert first not in ("pickle", "dill", "joblib", "shelve", "marshal"), f"{path}:{line} imports {name}"
        for node in all_nodes(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called == "torch.load" and "weights_only=True" in {ast.unparse(each) for each in node.keywords}:
                    continue  # reads tensors and plain values and refuses the rest
                refused = ("torch.load", "torch.save", "eval", "exec")
                assert called not in refused, f"{path}:{node.lineno} calls {called}"


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    code = "import sys, autoseg.cli; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not SLOW & set(loaded)
