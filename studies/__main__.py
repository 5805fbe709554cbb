"""Runs a study by its name: python -m studies photographs --list."""

import sys

from absl import logging

from studies.photographs import command as photographs
from xclip_jax.core.errors import UserError, exit_with_message

STUDIES = {"photographs": photographs.main}


def main(words: list[str]) -> None:
    """Run the command of the study that the first word names."""
    name = words[0] if words else ""
    if name not in STUDIES:
        raise UserError(f"study {name!r} is unknown; run python -m studies NAME, NAME one of {', '.join(STUDIES)}.")
    STUDIES[name](words[1:])


if __name__ == "__main__":
    logging.set_verbosity(logging.ERROR)
    with exit_with_message():
        main(sys.argv[1:])
