"""Values of a config that are allowed and seldom right, each with the reason."""

import math
from collections.abc import Iterator

import jax

from xclip_jax.commands.doctor.finding import Finding, warning
from xclip_jax.config.schema import Config
from xclip_jax.core.command_names import command
from xclip_jax.objectives import Objective, Report
from xclip_jax.objectives.clip import Contrastive
from xclip_jax.train.build import Experiment

# open_clip trains ViT-B at 1e-3 and batch 4096. Adam's rate goes with the root of the batch (arXiv 2205.10287). [ours]
# is how much above that is called high: the recipes here for small towers are at eight times.
_LR, _BATCH, _HIGH = 1e-3, 4096, 8.0
_HOUR = 3600
# [ours] Published runs compare with hundreds to thousands of others; the smallest recipe here has batches of 256.
_FEW_PAIRS = 128
# A device that encodes fewer pairs at once has matrices too small for it.
_FEW_ON_DEVICE = 8


def check_settings(experiment: Experiment, step_seconds: float | None, pairs: int | None = None) -> Iterator[Finding]:
    """Yield warnings about settings, or one line that says there are none.

    Args:
      experiment: of the run.
      step_seconds: of a step, or None where it was not timed.
      pairs: of the sources, or None where they are not known.
    """
    config = experiment.config
    findings = [
        *_schedule(config),
        *_batch(config, experiment.objective, pairs),
        *_evaluation(config, experiment.objective),
        *_saving(config, step_seconds),
    ]
    yield from findings or [Finding("settings", "schedule, batch, evaluations and checkpoints are as usual")]


def _schedule(config: Config) -> Iterator[Finding]:
    optim, steps = config.optim, config.steps
    if 3 * optim.warmup > 2 * steps:  # short runs are best with more than a half, see docs/study.md
        text = f"optim.warmup={optim.warmup:,} is more than two thirds of the {steps:,} steps"
        yield warning(
            "settings", f"{text}, which leaves little time at the peak rate", f"shorten it to {steps // 2:,} or less"
        )
    if not optim.warmup and not config.init.weights:
        text = "optim.warmup is 0, and Adam's first updates, of moments of few gradients, are as large as the last"
        yield warning("settings", text, f"set it to {max(steps // 20, 1):,}, or lower optim.lr")
    scaled = _LR * math.sqrt(config.data.batch / _BATCH)
    if optim.lr > 1.01 * _HIGH * scaled:  # rates are rounded
        text = (
            f"optim.lr={optim.lr:g} is {optim.lr / scaled:.0f} times the rate of {scaled:.2g} that root scaling gives "
            f"for data.batch={config.data.batch} ({_LR:g} at {_BATCH:,})"
        )
        yield warning("settings", text, f"lower it to {4 * scaled:.1g} or less, or raise data.batch")


def _batch(config: Config, objective: Objective, pairs: int | None) -> Iterator[Finding]:
    b, trained = config.data.batch, [term for name, term in objective.terms.items() if objective.weights[name]]
    larger = pairs is None or pairs >= 2 * b  # which the data allow
    if b < _FEW_PAIRS and larger and any(isinstance(term, Contrastive) for term in trained):
        text = f"data.batch={b}: the contrastive loss tells a pair from {b - 1} others, which is soon too easy"
        remedy = "raise it; optim.microbatches encodes a large batch in little memory"
        yield warning("settings", text, remedy)
    at_once = b // (jax.device_count() * config.optim.microbatches)
    if at_once < _FEW_ON_DEVICE and jax.devices()[0].platform != "cpu":
        text = f"a device encodes {at_once} pairs at a time, too few to keep it busy"
        yield warning("settings", text, "raise data.batch, lower optim.microbatches, or use fewer devices")


def _evaluation(config: Config, objective: Objective) -> Iterator[Finding]:
    steps, group = config.steps, config.eval
    if not group.sets and not group.final_sets:
        text = "eval.sets and eval.final_sets are empty, so nothing shows what the model can do"
        yield warning("settings", text, f"name a set; {command('evaluate')} --help lists them")
    elif not group.every or group.every >= steps or not group.sets:
        key = "eval.sets is empty" if not group.sets else f"eval.every={group.every} evaluates at the end alone"
        text = f"{key}, so that a run that goes wrong shows only then"
        yield warning("settings", text, f"set eval.sets and eval.every, such as {max(steps // 10, 1):,}")
    if group.ema and not (config.ema.on or objective.teacher):
        yield warning("settings", "eval.ema evaluates a moving average, and the run keeps none", "set ema.on=True")
    judged = [name for name, term in objective.terms.items() if type(term.report).health is not Report.health]
    if judged and config.log.collapse_warmup_steps >= steps:
        first = config.log.collapse_warmup_steps
        text = f"log.collapse_warmup_steps={first} is not below the {steps:,} steps, so no step warns of a failure"
        yield warning("settings", text, f"set it to {steps // 3:,}")


def _saving(config: Config, step_seconds: float | None) -> Iterator[Finding]:
    every, steps = config.checkpoint.every, config.steps
    interval = every if 0 < every < steps else steps
    if step_seconds and interval * step_seconds > _HOUR:
        hours = interval * step_seconds / _HOUR
        text = f"checkpoint.every={every} saves every {hours:.1f} h, which a kill or a power cut loses"
        yield warning("settings", text, f"set it to {max(int(_HOUR / 2 / step_seconds), 1):,}, half an hour")
    elif interval == steps and not step_seconds:
        text = f"checkpoint.every={every} saves at the end alone, and a kill or a power cut loses the run"
        yield warning("settings", text, f"set it to {max(steps // 10, 1):,}")
