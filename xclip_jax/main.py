"""The command `xclip-jax COMMAND ...`: imports and runs one module.

`python -m xclip_jax.main COMMAND ...` does the same, and `python -m xclip_jax.main --config ...` trains.
"""

import difflib
import runpy
import sys
from collections.abc import Sequence

from absl import logging

from xclip_jax.core import __version__
from xclip_jax.core.errors import Parser, end_at_once, exit_with_message

COMMANDS = {  # modules of `xclip_jax.commands`
    "train": "train a model by a recipe, or resume a run",
    "evaluate": "evaluate a run or weights of another project, or compare two runs",
    "embed": "write embeddings of images or texts to a file",
    "export": "write weights for transformers, open_clip, ONNX or safetensors",
    "plan": "show memory, traffic and time of a run before its start",
    "doctor": "check a run before its start, or inspect the folder of one",
    "report": "write the page of a run",
    "serve": "search a folder of images by text on a page in the browser",
    "check": "check image-text pairs before training",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command like `python -m MODULE`; `argv` replaces the arguments of the process."""
    end_at_once()  # before the slow imports of a command
    command, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("--help", "-h", "help"):
        with exit_with_message():
            rows = [f"  {name:<10} {doc}" for name, doc in COMMANDS.items()]
            print("usage: xclip-jax COMMAND [ARGUMENTS]", "", *rows, "", sep="\n")
            print("xclip-jax COMMAND --help shows a command's arguments, xclip-jax --version the version.")
        return
    if command == "--version":
        print(f"xclip_jax {__version__}")
        return
    if command.startswith("-"):
        arguments = [command, *arguments]
        command = "train"
    if command not in COMMANDS:
        (near,) = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0)
        sys.exit(f"error: unknown command {command!r}; did you mean {near!r}? See xclip-jax --help")
    logging.set_verbosity(logging.ERROR)  # users cannot act on warnings of libraries
    sys.argv = [sys.argv[0], *arguments]
    Parser.program = f"xclip-jax {command}"
    try:
        runpy.run_module(f"xclip_jax.commands.{command}", run_name="__main__", alter_sys=True)
    finally:
        Parser.program = None


if __name__ == "__main__":
    main()
