"""Skipped steps: counted and recorded; too many in a row rewind or stop the run."""

from collections.abc import Mapping
from typing import NoReturn

import jax

from xclip_jax.core.console import log0
from xclip_jax.core.errors import Diverged
from xclip_jax.core.json_lines import JsonLines
from xclip_jax.data.ledger import BadSampleLog
from xclip_jax.train.checkpoint import Checkpointer
from xclip_jax.train.prepare import Run
from xclip_jax.train.state import TrainState
from xclip_jax.train.step import with_step

MOST_SKIPPED = 10  # in a row, before `optim.on_bad_steps` applies


class SkippedSteps:
    """Counts skipped steps and lists them in `file`, skipped_steps.jsonl.

    A line is {"step", "position": of its first sample in the run's order, "samples": their number, "loss", "grad_norm",
    "param_norm"}, with null for non-finite values, or {"step", "rewound_to": a checkpoint's step}. Checkpoints store
    the counters as "skipped" in `BadSampleLog.counters`.
    """

    def __init__(self, run: Run, start: int, ledger: BadSampleLog, checkpointer: Checkpointer) -> None:
        """Open the file of a run that starts or resumes at step `start`, with the ledger's counters."""
        self._run = run
        self._ledger = ledger
        self._checkpointer = checkpointer
        file = run.folder.skipped_steps_file
        self.file = JsonLines(file, lambda line: line["step"] <= start, writes=jax.process_index() == 0)
        self._checked = start
        self._skipped = False
        self.wasted: set[int] = set()  # steps that this process skipped or undid

    @property
    def _counters(self) -> Mapping[str, int]:
        return {"total": 0, "in_a_row": 0, "rewound": 0} | self._ledger.counters.get("skipped", {})

    @property
    def total(self) -> int:
        """Number of skipped steps of the run."""
        return self._counters["total"]

    @property
    def in_a_row(self) -> int:
        """Skipped steps since the last accepted step or rewind."""
        return self._counters["in_a_row"]

    @property
    def exceeded(self) -> bool:
        """Whether more steps in a row were skipped than `MOST_SKIPPED`."""
        return self.in_a_row > MOST_SKIPPED

    def check(self, step: int, metrics: Mapping[str, jax.Array]) -> bool:
        """Wait for `step`, the next or the last checked one; count it, and return whether it was skipped."""
        if step == self._checked:
            return self._skipped
        self._checked = step
        self._skipped = bool(metrics["skipped"])
        if not self._skipped:
            if self.in_a_row:
                self._count(in_a_row=0)
            return False
        values = {name: float(metrics[name]) for name in ("loss", "grad_norm", "param_norm")}
        reason = f"step {step} has values that are not finite, loss {values['loss']}, norm {values['grad_norm']}"
        config = self._run.config
        b = config.data.batch
        self._count(total=self.total + 1, in_a_row=self.in_a_row + 1)
        self.wasted.add(step)
        self.file.append({"step": step, "position": (step - 1) * b, "samples": b} | values)
        if self.in_a_row == config.steps or (self.exceeded and config.optim.on_bad_steps == "stop"):
            self._stop(f"{reason}, after {self.in_a_row - 1} skipped steps in a row, and is not saved")
        log0(f"WARNING: {reason}; the step is skipped, {self.in_a_row} in a row, {self.total} in all")
        return True

    def rewind(self, state: TrainState) -> TrainState:
        """Return the newest checkpoint before the skipped steps, as of the step of `state`, which is deleted.

        The steps since then are undone, and their samples are not read again: step, learning rate, samples and random
        numbers continue. A run killed before or after this resumes to the same end.
        """
        step = self._checked
        target = self._checkpoint_before(step - self.in_a_row)
        for x in jax.tree.leaves(state):
            x.delete()  # two states may not fit the devices
        restored, _ = self._checkpointer.restore(self._run.experiment.abstract, target)
        self.file.append({"step": step, "rewound_to": target})
        log0(
            f"WARNING: {self.in_a_row} steps in a row were skipped; the run goes back to the checkpoint of step "
            f"{target}, and on with the samples of step {step + 1}"
        )
        self.wasted.update(range(target + 1, step + 1))
        self._count(in_a_row=0, rewound=step)
        return with_step(restored, step)

    def _checkpoint_before(self, failed: int) -> int:
        """Return the newest whole checkpoint between the last rewind and `failed`, if possible not of an interrupt."""
        every = self._run.config.checkpoint.every
        usable = [step for step in self._checkpointer.steps() if self._counters["rewound"] < step < failed]
        for step in sorted(usable, key=lambda step: (bool(every) and step % every == 0, step), reverse=True):
            if self._checkpointer.find_fault(step) is None:
                return step
            log0(f"WARNING: the checkpoint of step {step} is damaged, and an older one is used")
        self._stop(f"steps {failed + 1} to {self._checked} are skipped, and no checkpoint is left to rewind to")

    def _stop(self, reason: str) -> NoReturn:
        saved = self._checkpointer.steps()
        last = f"the last checkpoint has step {saved[-1]}" if saved else "there is no checkpoint yet"
        self.file.flush()
        raise Diverged(
            f"{reason}; {last}. Lower optim.lr, lengthen optim.warmup or set optim.grad_clip_norm=1, under a different "
            "--config.run."
        )

    def _count(self, **changes: int) -> None:
        # A new dict, since the old one may be on its way to a checkpoint.
        self._ledger.counters = {**self._ledger.counters, "skipped": {**self._counters, **changes}}
