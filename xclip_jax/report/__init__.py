"""Reports of a run: a picture, and an HTML page."""

import typing

if typing.TYPE_CHECKING:
    from xclip_jax.train.callbacks import Callback


def callback() -> "Callback":
    """Return the callback that writes the report of a run: `trainer.run(config, [xclip_jax.report.callback()])`."""
    from xclip_jax.report.page import ReportWriter  # imports the trainer's modules, which take a while

    return ReportWriter()
