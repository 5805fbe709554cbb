"""What a run is doing now, in one small file of its folder: an example of a callback of another package."""

import jax

from xclip_jax.core.storage import write_json
from xclip_jax.train.callbacks import Callback


class StatusFile(Callback):
    """Keeps RUN/status.json, which a dashboard may poll: step, loss, and headlines of the last evaluation."""

    def on_start(self, run, step):
        """A run that resumes begins with the step that it resumes from."""
        self.run = run
        self.status = {"step": step, "steps": run.config.steps}
        self.write()

    def on_log(self, step, metrics):
        """The step and its loss."""
        self.write(step=step, loss=metrics["loss"])

    def on_evaluation(self, step, results):
        """The headlines alone."""
        self.write(**{result.name: result.value for result in results if result.headline})

    def on_end(self, run, variables, results):
        """The model may be used here: `variables` are what `run.encoder` takes."""
        self.write(done=True)

    def write(self, **values):
        """Several processes call all methods at the same steps, and one of them writes."""
        self.status |= values
        if jax.process_index() == 0:
            write_json(self.run.folder.path / "status.json", self.status)
