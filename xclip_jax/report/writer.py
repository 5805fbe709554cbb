"""The report as a callback of the trainer: report.html and picture.png at the end of a run."""

from collections.abc import Sequence

import jax

from xclip_jax.core.console import command, log0
from xclip_jax.evaluators.results import Result
from xclip_jax.models.two_towers import Variables
from xclip_jax.report import html, picture
from xclip_jax.train.callbacks import Callback
from xclip_jax.train.job import Job


class ReportWriter(Callback):
    """Writes the report of a run that has `eval.report` set; one that fails does not affect a run of one process."""

    def on_end(self, job: Job, variables: Variables, results: Sequence[Result]) -> None:
        """Write the report, or print the reason of a failure."""
        del results  # the page reads them from the folder
        run = job.config.run
        if not job.config.eval.report:
            return
        try:
            _write(job, variables)
        except Exception as error:
            if jax.process_count() > 1:
                raise  # the others would wait for this process in the next batch
            log0(f"no report: {type(error).__name__}: {error}; {command('report')} {run} tries again")


def _write(job: Job, variables: Variables) -> None:
    config, folder = job.config, job.folder
    specs = (*config.eval.final_sets, *config.eval.sets)
    examples = html.make(folder.path, job.experiment, job.encoder, variables, specs)
    log0(f"report: {folder.report_file}")
    if jax.process_index() == 0 and (examples.named or examples.clusters):
        objective = job.experiment.objective
        title = f"What {objective.title} learned in {config.steps} steps of {config.data.batch} pairs"
        picture.draw(folder.picture_file, examples, title=title)
        log0(f"picture: {folder.picture_file}")
