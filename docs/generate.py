"""Write the pages and parts of pages that are made from the code: python -m docs.generate [--check]."""

import pathlib
import re
from collections.abc import Callable, Sequence

from tests.torture import promises
from xclip_jax.config import schema
from xclip_jax.core import fields
from xclip_jax.core.errors import Parser, UserError, exit_with_message

ROOT = pathlib.Path(__file__).parents[1]
MADE = "Made by `python -m docs.generate`; a test verifies that it is current."


def config_page() -> str:
    """Return a table of keys, defaults, allowed values and doc strings for each group of the config."""
    lines, group = ["# All keys of a config", ""], None
    lines += ["Each key is a flag, `--config.optim.lr=1e-3`, and names in a list need no quotes,"]
    lines += ["`--config.data.text_keys=title,alt`. The defaults are those that recipes start from; a recipe"]
    lines += [f"changes some of them, and `config.json` in a run's folder has the values of that run. {MADE}"]
    for name, default, allowed, doc in fields.describe(schema.Config):
        if name.rpartition(".")[0] != group:
            group = name.rpartition(".")[0]
            lines += ["", f"## {group or 'The run'}", "", "| key | default | allowed | meaning |", "|---|---|---|---|"]
        cells = (f"`{name}`", f"`{default!r}`", allowed, doc)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


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
