"""Write the pages and parts of pages that are made from the code: python -m docs.generate [--check]."""

import ast
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence

from tests.torture import promises
from xclip_jax.config import schema
from xclip_jax.core import fields
from xclip_jax.core.errors import Parser, UserError, exit_with_message

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ("xclip_jax", "configs", "examples", "benchmarks", "launch", "docs")
MADE = "Made by `python -m docs.generate`; a test verifies that it is current."


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


def tree_page() -> str:
    """Return the tree of source files, each with the first line of its docstring."""
    lines = [line for name in FOLDERS for line in _tree(ROOT / name, 0)]
    return "\n".join(["# The tree", "", f"One line for each file, the first of its docstring. {MADE}", "", *lines, ""])


def extend_page() -> str:
    """Return docs/extend.md with the code of each file that a line `<!-- file: PATH -->` names."""
    return _filled("extend.md", r"file: (\S+)", "file", lambda path: f"```python\n{(ROOT / path).read_text()}```\n")


def reliability_page() -> str:
    """Return docs/reliability.md with the table of promises."""
    table = "\n".join(promises.table(promises.PROMISES))
    return _filled("reliability.md", "(promises)", "promises", lambda _: table)


def _filled(name: str, start: str, end: str, make: Callable[[str], str]) -> str:
    """Return a page with what `make` returns between its lines `<!-- START -->` and `<!-- /END -->`.

    Args:
      name: of the page in docs/.
      start: pattern with one group, the argument of `make`.
      end: the word of the line behind.
      make: returns the text between the two lines.

    Raises:
      UserError: the page has no such lines.
    """
    pattern = re.compile(rf"(<!-- {start} -->\n).*?(<!-- /{end} -->)", re.DOTALL)
    text, count = pattern.subn(lambda m: f"{m[1]}\n{make(m[2])}\n{m[3]}", (ROOT / "docs" / name).read_text())
    if not count:
        raise UserError(f"docs/{name} lacks the lines <!-- {start} --> and <!-- /{end} -->; restore them.")
    return text


PAGES = {
    "docs/config.md": config_page,
    "docs/extend.md": extend_page,
    "docs/reliability.md": reliability_page,
    "docs/tree.md": tree_page,
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
