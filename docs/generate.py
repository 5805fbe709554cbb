"""Write docs/config.md and parts of other pages, made from the code: python -m docs.generate [--check]."""

import ast
import pathlib
import re
from collections.abc import Iterator, Sequence

from benchmarks import promises
from xclip_jax.config import fields, schema
from xclip_jax.errors import Parser, UserError, exit_with_message

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ("xclip_jax", "configs", "examples", "benchmarks", "launch", "docs")
TREE_STARTS, TREE_ENDS = "<!-- --8<-- [start:tree] -->", "<!-- --8<-- [end:tree] -->"
PROMISES_START, PROMISES_END = "<!-- promises -->", "<!-- /promises -->"
MADE = "Made by `python -m docs.generate`; a test holds it current."


def config_page() -> str:
    """Return a table of keys, defaults, allowed values and doc strings for each group of the config."""
    lines, group = ["# All keys of a config", ""], None
    lines += ["Each key is a flag, `--config.optim.lr=1e-3`. The defaults are those that recipes start from; a recipe"]
    lines += [f"changes some of them, and `config.json` in a run's folder has the values of that run. {MADE}"]
    for name, default, allowed, doc in fields.describe(schema.Config):
        if name.rpartition(".")[0] != group:
            group = name.rpartition(".")[0]
            lines += ["", f"## {group or 'The run'}", "", "| key | default | allowed | meaning |", "|---|---|---|---|"]
        cells = (f"`{name}`", f"`{default!r}`", allowed, doc)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _markdown(text: str) -> str:
    """Escape brackets, which would be links."""
    return re.sub(r"([\[\]<>])", r"\\\1", text)


def summary(path: pathlib.Path) -> str:
    """Return the first line of a module's docstring, or of the comment that begins a shell or YAML file."""
    text = path.read_text()
    if path.suffix == ".py":
        return (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
    comment = re.search(r"^# (?!shellcheck)(.+)", text, re.MULTILINE)
    return comment[1] if comment else ""


def _tree(folder: pathlib.Path, depth: int) -> Iterator[str]:
    init = folder / "__init__.py"
    about = summary(init) if init.exists() else ""
    yield f"{'    ' * depth}- **{folder.name}/**{' ' + _markdown(about) if about else ''}"
    files = (path for path in folder.iterdir() if path.suffix in (".py", ".sh", ".yaml") and path != init)
    for path in sorted(files):
        yield f"{'    ' * (depth + 1)}- `{path.name}` {_markdown(summary(path))}"
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and any(path.glob("*.py"))):
        yield from _tree(inner, depth + 1)


def contributing_page() -> str:
    """Return CONTRIBUTING.md with the tree of source files, each with the first line of its docstring."""
    before, start, rest = (ROOT / "CONTRIBUTING.md").read_text().partition(TREE_STARTS)
    _, end, after = rest.partition(TREE_ENDS)
    if not (start and end):
        raise UserError(f"CONTRIBUTING.md lacks the lines {TREE_STARTS} and {TREE_ENDS}; restore them.")
    lines = [line for name in FOLDERS for line in _tree(ROOT / name, 0)]
    tree = "\n".join([f"One line a file, its docstring's first. {MADE}", "", *lines])
    return f"{before}{start}\n\n{tree}\n\n{end}{after}"


def reliability_page() -> str:
    """Return docs/reliability.md with the table of promises."""
    before, start, rest = (ROOT / "docs" / "reliability.md").read_text().partition(PROMISES_START)
    _, end, after = rest.partition(PROMISES_END)
    if not (start and end):
        raise UserError(f"docs/reliability.md lacks the lines {PROMISES_START} and {PROMISES_END}; restore them.")
    return "\n".join([f"{before}{start}", "", *promises.table(promises.PROMISES), f"{end}{after}"])


PAGES = {
    "docs/config.md": config_page,
    "CONTRIBUTING.md": contributing_page,
    "docs/reliability.md": reliability_page,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Write the pages, or compare them with the files."""
    parser = Parser(prog="python -m docs.generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page is not current")
    check = parser.parse_args(argv).check
    with exit_with_message():
        for name, make in PAGES.items():
            path = ROOT / name
            if not check:
                path.write_text(make())
            elif path.read_text() != make():
                raise UserError(f"{name} is not current; run python -m docs.generate")


if __name__ == "__main__":
    main()
