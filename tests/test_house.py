"""The shape of the package: who imports whom, how long files and functions are, and how they read."""

import ast
import pathlib
import re
import tokenize
from collections.abc import Iterator

import pytest

from xclip_jax.config import schema

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = "xclip_jax"

# Rooms from the ground up: a module may import from its own room and from rooms before it. A room is a folder, a
# module of the top level, or a folder in a folder that has its own place in the list.
ROOMS = (
    "core",
    "parallel",
    "processes",
    "losses",
    "data",
    "data.readers",
    "models",
    "objectives",
    "optim",
    "config",
    "interop",
    "evaluators",
    "evaluators.sets",
    "demo",
    "train",
    "model",
    "report",
    "commands",
    "main",
)
MOST_FLOORS = 9  # a room stands one floor above the highest room that it imports
MOST_ARROWS = 79  # pairs of a room and another that it imports

MOST_LINES = {"file": 400, "function": 80}
# Constructions of a dense dialect, several times rarer in optax, flax, orbax and grain. Most per 10,000 words of
# docstrings and comments; a ceiling may fall, never rise.
ENGLISH = {
    r"\bthat (?:is|are|was|were|has|have)\b": 2.5,
    r"\bwhat\b": 1.5,
    r"\b(?:an?|one|two|\d+|each|\w+s) an? (?:step|epoch|line|row|sample|device|chip|host|core|file|class|run|process|"
    r"pair|image|text|second|hour|token|term|table|set)\b": 5.5,
    r"(?<!their )(?<!its )(?<!your )(?<!our )(?<!my )(?<!his )(?<!'s )\bown\b": 1.0,
    r"\bwhere (?:it|they|there|nothing|no|that|this|one|both|all|some)\b": 0.5,
    r"\bas in\b": 1.0,
    r"\b(?:is|are) no\b": 0.3,
    r"\b(?:those of|that of|of which|in place of|beside|alone|anew|is of|are of)\b": 2.0,
}
# Per 1,000 lines of the package.
MOST_NESTED = 0.1
MOST_WALRUS = 0.6


def sources(*folders: str) -> list[pathlib.Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def module_name(path: pathlib.Path) -> str:
    """ "" for the package itself, "train.loop" for its modules."""
    parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def tree(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(path: pathlib.Path, modules: set[str]) -> Iterator[str]:
    """Modules of the package that a file imports, at its top or in a function."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            # `from a import b` names a module or what a module defines.
            names = [name if name.removeprefix(f"{PACKAGE}.") in modules else str(node.module) for name in names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name.removeprefix(f"{PACKAGE}.") for name in names if name.startswith(f"{PACKAGE}."))


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """Imports of each module, but for the package's own __init__: it loads the public names when they are used."""
    files = {module_name(path): path for path in sources(PACKAGE)}
    return {name: set(imported(path, set(files))) - {name} for name, path in files.items() if name}


def room(module: str) -> str:
    names = [name for name in ROOMS if f"{module}.".startswith(f"{name}.")]
    assert names, f"put the room of {module} into ROOMS in {__file__}"
    return max(names, key=len)


def rooms(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Rooms that each room imports."""
    links: dict[str, set[str]] = {room(module): set() for module in graph}
    for module, targets in graph.items():
        links[room(module)] |= {room(target) for target in targets} - {room(module)}
    return links


def floors(links: dict[str, set[str]]) -> dict[str, int]:
    numbers: dict[str, int] = {}
    for name in ROOMS:
        numbers[name] = 1 + max((numbers[target] for target in links[name]), default=0)
    return numbers


def circle(links: dict[str, set[str]]) -> list[str]:
    """One circle of a graph, or []."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for target in sorted(links.get(node, ())):
            if circular := visit(target, [*path, node]):
                return circular
        done.add(node)
        return []

    return next((circular for node in sorted(links) if (circular := visit(node, []))), [])


def test_every_room_exists(graph):
    assert set(ROOMS) == set(rooms(graph))


def test_no_import_goes_upwards(graph):
    upwards = [
        f"{module} imports {target}"
        for module, targets in graph.items()
        for target in targets
        if ROOMS.index(room(target)) > ROOMS.index(room(module))
    ]
    assert not upwards


@pytest.mark.parametrize("path", sources(PACKAGE, "configs"), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_imports_the_studies(path):
    """They are a guest outside the wheel: what they need of the package is open to everybody's package."""
    imports = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [name for node in imports for name in [getattr(node, "module", ""), *(alias.name for alias in node.names)]]
    assert not [name for name in names if name and name.split(".")[0] == "studies"]


def test_floors_and_arrows_are_few(graph):
    links = rooms(graph)
    assert max(floors(links).values()) <= MOST_FLOORS and sum(map(len, links.values())) <= MOST_ARROWS


def test_no_circle(graph):
    assert circle(graph) == []
    assert circle(rooms(graph)) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_files_and_functions_are_short():
    lengths = {}
    for path in sources(PACKAGE, "configs", "studies"):
        name = path.relative_to(ROOT).as_posix()
        if (lines := len(path.read_text().splitlines())) > MOST_LINES["file"]:
            lengths[name] = lines
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > MOST_LINES["function"]:
                    lengths[f"{name}:{node.name}"] = lines
    assert lengths == {}


def modules(*folders: str) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in sources(*folders)]


every_module = pytest.mark.parametrize("name", modules(PACKAGE, "configs", "studies", "examples", "benchmarks"))


@every_module
def test_no_loop_is_over_a_set(name):
    """Its order depends on the process: processes would trace different programs, and find none in their cache."""
    loops = [node.iter for node in ast.walk(tree(ROOT / name)) if isinstance(node, ast.For | ast.comprehension)]
    assert not [ast.unparse(it) for it in loops if isinstance(it, ast.Set | ast.SetComp)]
    called = [it.func.id for it in loops if isinstance(it, ast.Call) and isinstance(it.func, ast.Name)]
    assert not {"set", "frozenset"} & set(called)


def prose(path: pathlib.Path) -> Iterator[str]:
    """Yield the docstrings and comments of a file."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""
    with path.open() as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type == tokenize.COMMENT:
                yield token.string.lstrip("# ")


def test_prose_of_the_package_is_plain_english():
    text = " ".join(line for path in sources(PACKAGE) for line in prose(path)).lower()
    words = len(re.findall(r"[a-z']+", text))
    rates = {pattern: round(1e4 * len(re.findall(pattern, text)) / words, 1) for pattern in ENGLISH}
    assert {pattern: rate for pattern, rate in rates.items() if rate > ENGLISH[pattern]} == {}


def test_a_line_has_one_statement():
    """No `a, b = f(), g()`, hardly a conditional inside a conditional, and few names bound inside an expression."""
    packed, nested, walrus, lines = [], 0, 0, 0
    for path in sources(PACKAGE):
        lines += len(path.read_text().splitlines())
        for node in ast.walk(tree(path)):
            walrus += isinstance(node, ast.NamedExpr)
            if isinstance(node, ast.IfExp):
                nested += any(isinstance(other, ast.IfExp) for other in ast.walk(node) if other is not node)
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
                values = node.value.elts if isinstance(node.value, ast.Tuple) else []
                if any(isinstance(part, ast.Call) for value in values for part in ast.walk(value)):
                    packed.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert packed == []
    assert 1000 * nested / lines <= MOST_NESTED
    assert 1000 * walrus / lines <= MOST_WALRUS


CONFIG_KEYS = {name for name, *_ in schema.fields.describe(schema.Config)}
CONFIG_GROUPS = {f"{name.rpartition('.')[0]}." for name in CONFIG_KEYS}


@pytest.mark.parametrize("name", modules(PACKAGE))
def test_no_list_of_config_keys(name):
    """Facts about keys stand in their declarations: who adds a key need not know of a list elsewhere."""
    lists = [node for node in ast.walk(tree(ROOT / name)) if isinstance(node, ast.Tuple | ast.List | ast.Set)]
    for node in lists:
        words = {item.value for item in node.elts if isinstance(item, ast.Constant)}
        assert len({word for word in words & (CONFIG_KEYS | CONFIG_GROUPS) if "." in word}) < 3, ast.unparse(node)


PROSE = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("path", PROSE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_prose_is_plain_english(path):
    assert re.findall(r".*\b(?:whoever|anew)\b.*", path.read_text(), re.IGNORECASE) == []
