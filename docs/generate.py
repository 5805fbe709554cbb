"""Write the pages and parts of pages that are made from the code: python -m docs.generate [--check]."""

import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from xclip_jax.config import schema
from xclip_jax.core import fields
from xclip_jax.core.errors import Parser, UserError, exit_with_message

ROOT = pathlib.Path(__file__).parents[1]
MADE = "Made by `python -m docs.generate`; a test verifies that it is current."
CHARTED = "pretrain:objective=clip,preset=B/16,batch=4096 v5e:4x8 data.length_groups=full mesh.strategy=zero1"
EXAMPLES = (
    "tests/extension/cyclip.py",
    "examples/superclip.py",
    "examples/matryoshka.py",
    "examples/distill.py",
    *(f"tests/extension/{name}.py" for name in ("euclidean", "greys", "json_lines", "conv_mixer", "status_file")),
)
COLORS = {"image": "#0072b2", "text": "#e69f00", "neither": "#999999"}


def config_page() -> str:
    """Return a table of keys, defaults, allowed values and doc strings for each group of the config."""
    lines = ["# All keys of a config", ""]
    lines += ["Each key is a flag, `--config.optim.lr=1e-3`, and names in a list need no quotes,"]
    lines += ["`--config.data.text_columns=title,alt`. The defaults are those that recipes start from; a recipe"]
    lines += [f"changes some of them, and `config.json` in a run's folder has the values of that run. {MADE}"]
    rows: dict[str, list[str]] = {}
    for name, default, allowed, doc in fields.describe(schema.Config):
        cells = (f"`{name}`", f"`{default!r}`", allowed, doc)
        row = f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
        rows.setdefault(name.rpartition(".")[0], []).append(row)
    for group, of_group in rows.items():
        lines += ["", f"## {group or 'The run'}", "", "| key | default | allowed | meaning |", "|---|---|---|---|"]
        lines += of_group
    return "\n".join(lines) + "\n"


def extend_page() -> str:
    """Return docs/extend.md with the code after each line `<!-- file: PATH -->`, and the lines of the examples."""
    page = (ROOT / "docs" / "extend.md").read_text()
    block = re.compile(r"(<!-- file: (\S+) -->\n).*?(<!-- /file -->)", re.DOTALL)
    page = block.sub(lambda m: f"{m[1]}\n```python\n{(ROOT / m[2]).read_text()}```\n\n{m[3]}", page)
    for path in EXAMPLES:
        lines = len((ROOT / path).read_text().splitlines())
        page = re.sub(rf"(\[`{pathlib.Path(path).name}`\]\(\S+\), )\d+", rf"\g<1>{lines}", page)
    return page


def examples_page() -> str:
    """Return the files that docs/extend.md explains."""
    lines = ["# Extensions: the whole files", "", f"[How to add them](extend.md) explains each. {MADE}"]
    for path in EXAMPLES:
        lines += ["", f"## {pathlib.Path(path).name}", "", f"`{path}`", ""]
        lines += [f"```python\n{(ROOT / path).read_text()}```"]
    return "\n".join(lines) + "\n"


def step_chart() -> str:
    """Return an SVG with the parts of a planned step as bars, from docs/plans.json."""
    plan = json.loads((ROOT / "docs" / "plans.json").read_text())[CHARTED]
    rows = [row for row in plan["roofline"]["parts"] if row["ms"] >= 1]
    rows.append({"part": "collectives, exposed", "neither": plan["roofline"]["exposed_ms"]})
    scale, top = 460 / max(row.get("ms", 0) for row in rows), 56
    height = top + 26 * len(rows) + 8
    title = f"A step of {plan['step_ms']:.0f} ms by part, the TPU compiler's estimate"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {height}" role="img" font-size="13" '
        f'font-family="system-ui, Segoe UI, Helvetica, Arial, sans-serif" fill="#222222"><title>{title}</title>',
        f'<rect width="720" height="{height}" fill="#ffffff"/>',
        f'<text x="12" y="22" font-size="16" font-weight="bold">{title}</text>',
    ]
    for i, (name, color) in enumerate(COLORS.items()):
        lines.append(f'<rect x="{200 + 90 * i}" y="34" width="10" height="10" fill="{color}"/>')
        lines.append(f'<text x="{215 + 90 * i}" y="44">{name}</text>')
    for i, row in enumerate(rows):
        x, y = 200.0, top + 26 * i
        lines.append(f'<text x="192" y="{y + 14}" text-anchor="end">{row["part"]}</text>')
        for name, color in COLORS.items():
            width = scale * row.get(name, 0)
            lines.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="18" fill="{color}"/>')
            x += width
        lines.append(f'<text x="{x + 6:.1f}" y="{y + 14}">{sum(row.get(name, 0) for name in COLORS):.1f}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def own_loop_notebook() -> str:
    """Return a notebook with the text and the code of docs/own_loop.md."""
    page = re.sub(r"\]\((\w[\w/]*\.md)", r"](../\1", (ROOT / "docs" / "own_loop.md").read_text())
    cells: list[dict[str, Any]] = []
    for i, part in enumerate(re.split(r"```python\n(.*?)```\n", page, flags=re.DOTALL)):
        if part.strip():
            cell = {"cell_type": ("markdown", "code")[i % 2], "id": f"own-loop-{i}", "metadata": {}}
            cells.append(cell | {"source": part.strip().splitlines(True)})
            if i % 2:
                cells[-1] |= {"execution_count": None, "outputs": []}
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


PAGES = {
    "docs/notebooks/own_loop.ipynb": own_loop_notebook,
    "docs/config.md": config_page,
    "docs/examples.md": examples_page,
    "docs/extend.md": extend_page,
    "docs/performance/step.svg": step_chart,
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
