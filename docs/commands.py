"""List every command of the documentation: python -m docs.commands [TEXT ...].

    python -m docs.commands                        # each with its place
    python -m docs.commands docs/finetune.md       # those whose place or text has one of the words

They are in code blocks and in inline code of the pages, and in the heads of scripts and modules. The tests parse them
all, and `python -m tests.helpers.documented` runs them.
"""

import ast
import dataclasses
import pathlib
import re
import sys
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[1]
PAGES = ("*.md", "docs/**/*.md")
HEADS = ("examples/*.py", "configs/*.py", "benchmarks/*.py", "xclip_jax/main.py", "xclip_jax/commands/*.py",
         "docs/*.py", "studies/**/*.py", "tests/torture/*.py", "launch/*")  # fmt: skip
PROGRAMS = ("xclip-jax", "python", "pip", "bash", "sbatch", "kubectl", "gcloud", "torchrun", "tensorboard", "wandb",
            "xprof", "uv", "uvx", "git", "hf", "tfds", "cp", "rm", "cd", "cat", "iconv", "export", ".ci/run",
            ".")  # fmt: skip
_ASSIGNED = r"(?:[A-Z_]+=(?:'[^']*'|\"[^\"]*\"|\S)*\s+)*"
_COMMAND = re.compile(rf"{_ASSIGNED}(?:{'|'.join(map(re.escape, PROGRAMS))}) +\S|\.ci/run|FLAGS=|\(printf ")
_COMMENT = re.compile(r"""^((?:[^'"#]|'[^']*'|"[^"]*"|(?<=\S)\#)*?)(?:\s+#\s.*|\s+#$)?$""")


@dataclasses.dataclass(frozen=True)
class Block:
    """Commands that stand together, in the order of the page.

    Attributes:
      place: FILE:LINE of the first.
      commands: without comments and prompts, each in one line.
      mention: whether the commands are inline code, which may leave out arguments.
    """

    place: str
    commands: tuple[str, ...]
    mention: bool = False


def commands_of(text: str) -> tuple[str, ...]:
    """Return the commands of a code block; in one with prompts the other lines are output."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    lines = [line[2:] for line in lines if line.startswith("$ ")] or [line.strip() for line in lines]
    found = [_COMMENT.sub(r"\1", line).strip() for line in lines if _COMMAND.match(line)]
    return tuple(line for line in found if "..." not in line and "…" not in line)


def _inline(text: str) -> Iterator[tuple[int, str]]:
    """Yield position and text of inline code that is a command with at least one argument."""
    for match in re.finditer(r"(?<!`)`([^`]+)`(?!`)", text):
        code = " ".join(match[1].split())
        if len(re.sub(rf"^{_ASSIGNED}", "", code).split()) > 2 and not code.startswith("export "):
            yield match.start(), code


def _in_page(text: str) -> Iterator[tuple[int, str, bool]]:
    """Yield position, text and whether it is inline of the code of a page."""
    fence = re.compile(r"^( *)```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
    for match in fence.finditer(text):
        if match[2] in ("", "bash", "sh", "console"):
            yield match.start(3), match[3], False
    plain = fence.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    for match in re.finditer(r"(?<=\n\n)(?: {4,}\S.*\n)+", plain):
        yield match.start(), match[0], False
    for start, code in _inline(plain):
        yield start, code, True


def _in_head(path: pathlib.Path, text: str) -> Iterator[tuple[int, str, bool]]:
    """Yield the same of the docstring of a module, or of the comment at the top of a script."""
    if path.suffix == ".py":
        head = ast.get_docstring(ast.parse(text), clean=False) or ""
        start = text.find(head)
    else:
        match = re.search(r"(?:^#.*\n)+", text, re.MULTILINE)
        head = re.sub(r"^#", " ", match[0], flags=re.MULTILINE) if match else ""
        start = match.start() if match else 0
    optional = re.compile(r"(?<![.'\w-])\[[^][]*\]|(?<=\w)\[[:@][^][]*\]")
    for _ in range(2):  # one may be in another
        head = optional.sub("", head)
    for match in re.finditer(r"(?:^ {3,}\S.*\n)+", head, re.MULTILINE):
        yield start + match.start(), re.sub(r"(?<=\S) {2,}.*", "", match[0]), False
    for code_start, code in _inline(head):
        yield start + code_start, code, True
    first = re.search(r": ((?:xclip-jax|python -m|bash) \S+ [^\n,]*?)\.?$", head.partition("\n")[0])
    if first:
        yield start + first.start(1), first[1], True


def blocks() -> list[Block]:
    """Return the commands of all pages and heads; what several places repeat counts once."""
    found: dict[tuple[str, ...], Block] = {}
    for patterns in (PAGES, HEADS):
        for path in (path for pattern in patterns for path in sorted(ROOT.glob(pattern)) if path.is_file()):
            text = path.read_text()
            for start, code, mention in _in_page(text) if patterns is PAGES else _in_head(path, text):
                commands = commands_of(code)
                place = f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, start) + 1}"
                if commands:
                    found.setdefault(commands, Block(place, commands, mention))
    return list(found.values())


def main(words: list[str]) -> None:
    """Print the commands."""
    for block in blocks():
        for command in block.commands:
            line = f"{block.place}  {command}"
            if not words or any(word in line for word in words):
                print(line)


if __name__ == "__main__":
    main(sys.argv[1:])
