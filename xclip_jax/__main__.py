"""The command `xclip-jax COMMAND ...`, or `python -m xclip_jax COMMAND ...`: imports and runs one module."""

import runpy
import sys
from collections.abc import Sequence

import xclip_jax
from xclip_jax.core.console import COMMANDS
from xclip_jax.core.errors import Parser, exit_with_message
from xclip_jax.core.fields import nearest


def usage() -> str:
    """Return the help text: all commands with a line each."""
    rows = [f"  {name:<10} {doc}" for name, (_, doc) in COMMANDS.items()]
    end = "xclip-jax COMMAND --help shows the arguments of a command, xclip-jax --version the version."
    return "\n".join(["usage: xclip-jax COMMAND [ARGUMENTS]", "", *rows, "", end])


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command as `python -m MODULE` does, so that its arguments and child processes are the same.

    Args:
      argv: the command and its arguments; by default those of the process.
    """
    with exit_with_message():
        command, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
        if command in ("--help", "-h", "help"):
            print(usage())
        elif command == "--version":
            print(f"xclip_jax {xclip_jax.__version__}")
        elif command not in COMMANDS:
            near = nearest(command, ("--version", "--help") if command.startswith("-") else COMMANDS)
            what = "option" if command.startswith("-") else "command"
            sys.exit(f"error: unknown {what} {command!r}; did you mean {near!r}? See xclip-jax --help")
    if command in COMMANDS:
        sys.argv = [sys.argv[0], *arguments]
        Parser.program = f"xclip-jax {command}"
        try:
            runpy.run_module(COMMANDS[command][0], run_name="__main__", alter_sys=True)
        finally:
            Parser.program = None


if __name__ == "__main__":
    main()
