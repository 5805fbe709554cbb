"""A trace of some steps by JAX's profiler, as `log.profile` asks for it."""

import contextlib
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
from etils import epath

from xclip_jax.core.console import log0
from xclip_jax.core.errors import describe
from xclip_jax.core.run_folder import RunFolder

# Ends of the names that the profiler gives its files, and ends of those that the run gives them. The rest is the host's
# name there, which several processes may share, and the number of the process here.
_FILES = {
    ".xplane.pb": ".xplane.pb",
    ".trace.json.gz": ".trace.json.gz",
    "perfetto_trace.json.gz": ".perfetto.json.gz",
}


class StepTracer:
    """Calls the compiled step, each time under its number, and traces some of the calls.

    The trace is complete: it begins when the steps before have ended, and ends when the traced ones have. Each process
    writes its own files, PROFILE/plugins/profile/steps-START-STOP/process-N.*, into one session of XProf. What goes
    wrong with a trace is a warning.
    """

    def __init__(
        self,
        steps: Sequence[int],
        folder: RunFolder,
        pause: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        """Make a tracer.

        Args:
          steps: the first and the last that are traced, or nothing. Of a run that resumes in between, those that are
            left.
          folder: the run's.
          pause: context in which a trace is started and written.
        """
        self._steps = range(steps[0], steps[1] + 1) if steps else range(0)
        self._folder, self._pause = folder.profile, pause
        self._local: tempfile.TemporaryDirectory[str] | None = None

    def __call__(self, step: int, function: Callable[..., Any], *args: Any) -> Any:
        """Return `function(*args)`, the results of step number `step`."""
        if step in self._steps and self._local is None:
            jax.block_until_ready(args)
            with self._pause():
                self._start()
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            results = function(*args)
        if self._local is not None and step == self._steps[-1]:
            jax.block_until_ready(results)
            self.close()
        return results

    def close(self) -> None:
        """End and write a trace that is in progress, such as one that an interrupt cut short."""
        if self._local is None:
            return
        session = self._folder / "plugins" / "profile" / f"steps-{self._steps[0]}-{self._steps[-1]}"
        with self._pause(), self._local as local:
            try:
                jax.profiler.stop_trace()
                _publish(pathlib.Path(local), session)
            except Exception as error:
                log0(f"WARNING: the profile could not be written to {session}: {describe(error)}")
            else:
                log0(
                    f"profile of steps {self._steps[0]} to {self._steps[-1]}: {session}; open it with xprof --logdir "
                    f"{self._folder} (pip install xprof), or process-0.perfetto.json.gz at https://ui.perfetto.dev"
                )
        self._local, self._steps = None, range(0)

    def _start(self) -> None:
        options = jax.profiler.ProfileOptions()
        # Without Python's own calls: those of the threads that read data would slow the run down and fill the trace.
        options.python_tracer_level = 0
        local = tempfile.TemporaryDirectory(prefix="xclip_jax_profile_", ignore_cleanup_errors=True)
        try:
            jax.profiler.start_trace(local.name, create_perfetto_trace=True, profiler_options=options)
        except Exception as error:
            log0(f"WARNING: the steps of log.profile cannot be traced: {describe(error)}")
            self._steps = range(0)
            local.cleanup()
        else:
            self._local = local


def _publish(local: pathlib.Path, session: epath.Path) -> None:
    """Copy the files of a trace from a local disk, which the profiler wants, to the run's folder, maybe in a bucket."""
    session.mkdir(parents=True, exist_ok=True)
    for end, name in _FILES.items():
        for file in local.glob(f"plugins/profile/*/*{end}"):
            (session / f"process-{jax.process_index()}{name}").write_bytes(file.read_bytes())
