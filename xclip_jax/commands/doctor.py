"""Check a run before it is started, or look at one that is in progress or has ended.

    xclip-jax doctor --config RECIPE[:a=1,b=2] [--config.KEY=VALUE ...]
    xclip-jax doctor RUN

One line for each check: ok, warning or FAIL, with the remedy. The exit code is 1 if anything is a FAIL, else 0. Nothing
is written to the run's folder. Keys of a config are listed by xclip-jax train --help.
"""

import argparse
import contextlib
import dataclasses
import re
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from absl import flags, logging

from xclip_jax.core.errors import Parser, exit_with_message, public
from xclip_jax.core.imports import add_trust, trusting
from xclip_jax.core.storage import strict_json

if TYPE_CHECKING:
    from xclip_jax.train.checks import Finding

FAIL, WARNING = "FAIL", "warning"  # marks of `train.checks`, which imports JAX
_CONFIG = re.compile(r"--?(no)?config\b")


def _arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the arguments of the command, and the arguments of the config."""
    parser = Parser(prog="xclip-jax doctor", description=__doc__)
    before = any(_CONFIG.match(argument) for argument in argv)
    if not before:
        parser.add_argument("run", metavar="RUN", help="a run's folder; or --config RECIPE, of a run to be started")
    add_trust(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--samples", type=int, default=512, help="samples to read at least")
    parser.add_argument("--seconds", type=float, default=3.0, help="how long reading is measured for")
    doc = "compile the train step and time it; by default unless that takes minutes on this CPU"
    parser.add_argument("--step", choices=("auto", "always", "never"), default="auto", help=doc)
    options, rest = parser.parse_known_args(argv)
    strange = [argument for argument in rest if argument.startswith("-") and not _CONFIG.match(argument)]
    strange = [argument for argument in strange if not re.match(r"-[\d.]", argument)]  # values of a key
    if strange or (rest and not before):
        parser.error(f"unknown argument {(strange or rest)[0]!r}")
    if options.samples < 1 or not options.seconds >= 0:
        parser.error("--samples must be at least 1, and --seconds at least 0")
    return options, rest


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    logging.set_verbosity(logging.ERROR)
    options, rest = _arguments(sys.argv[1:] if argv is None else argv)
    # Imported once the arguments are right, as JAX and the trainer take a second, and while Ctrl-C ends the process.
    from xclip_jax.commands.diagnosis import check_run
    from xclip_jax.commands.preflight import Options, check_config
    from xclip_jax.config import load

    def check() -> Iterator["Finding"]:
        if "run" in options:
            yield from check_run(options.run)
        else:
            load.parse([sys.argv[0], *rest])
            yield from check_config(flags.FLAGS.config, Options(options.samples, options.seconds, options.step))

    out, findings = sys.stdout, []
    with exit_with_message(), trusting(options.trust):
        with contextlib.redirect_stdout(sys.stderr):  # what is checked prints lines of its own
            for finding in check():
                findings.append(finding)
                if not options.json:
                    print(public(finding.line()).encode("utf-8", "replace").decode(), file=out, flush=True)
        marks = [finding.mark for finding in findings]
        if options.json:
            rows = [dataclasses.asdict(x) for x in findings]
            rows = [row if row["values"] else {k: x for k, x in row.items() if k != "values"} for row in rows]
            print(strict_json(public({"ok": FAIL not in marks, "findings": rows}), indent=2))
        else:
            failures, warnings = marks.count(FAIL), marks.count(WARNING)
            plural = "" if warnings == 1 else "s"
            print(f"{len(marks)} checks: {failures} FAIL, {warnings} warning{plural}")
    return 1 if FAIL in marks else 0


if __name__ == "__main__":
    sys.exit(main())
