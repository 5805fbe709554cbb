"""Write the pages and parts of pages that are made from the code: python -m docs.generate [--check]."""

import pathlib
import re
from collections.abc import Sequence

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
    pattern = re.compile(r"(<!-- file: (\S+) -->\n).*?(<!-- /file -->)", re.DOTALL)
    page = (ROOT / "docs" / "extend.md").read_text()
    return pattern.sub(lambda m: f"{m[1]}\n```python\n{(ROOT / m[2]).read_text()}```\n\n{m[3]}", page)


PAGES = {
    "docs/config.md": config_page,
    "docs/extend.md": extend_page,
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
