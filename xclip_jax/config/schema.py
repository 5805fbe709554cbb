"""All config keys of a run: one frozen dataclass of the modules' groups, checked as a whole.

Recipes change values of `default()`, a locked `ConfigDict`; `resolve` turns it into a `Config`.
"""

import dataclasses
import json
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Unpack

import ml_collections
from flax.traverse_util import flatten_dict

from xclip_jax.core import fields
from xclip_jax.core.errors import UserError, redact
from xclip_jax.core.fields import Check, Facts, at_least, between, choice, group, key, not_empty
from xclip_jax.core.imports import class_name
from xclip_jax.data.config import DataConfig
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.data.transforms import INTERPOLATIONS, RESIZE_MODES
from xclip_jax.models.lora import LoraConfig
from xclip_jax.models.two_towers import TOWERS, ModelConfig
from xclip_jax.objectives import LossConfig, ObjectiveConfig, make_objective, with_terms
from xclip_jax.optim import EmaConfig, OptimConfig
from xclip_jax.parallel.sharding import MeshConfig

__all__ = [
    "CheckpointConfig",
    "Config",
    "EvalConfig",
    "FinetuneConfig",
    "InitConfig",
    "LogConfig",
    "complete",
    "default",
    "resolve",
]

TRACKERS = ("tensorboard", "wandb", "trackio")
_TRACKERS = Check(
    f"names among {', '.join(map(repr, TRACKERS))}, or 'package.module:Class'",
    lambda value: all(name in TRACKERS or class_name(name) == name for name in value),
)
_CLASSES = Check("names of the form 'package.module:Class'", lambda value: all(class_name(x) == x for x in value))
_TEMPLATES = Check("texts with {c}, where the name of the class goes", lambda value: all("{c}" in x for x in value))
_FROZEN = Check("names among 'img', 'txt'", lambda value: set(value) <= set(TOWERS))


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Config group `init`: initial weights of a new run."""

    weights: str = key("", "folder of a run, or weights of another project, as hf:ORG/NAME; empty: random parameters")
    freeze: Sequence[str] = key((), "towers to freeze", _FROZEN)


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """Config group `finetune`: changes to initial weights."""

    lora: LoraConfig = group(LoraConfig)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Config group `eval`: evaluations during a run."""

    sets: Sequence[str] = key((), "sets to evaluate every `eval.every` steps, and at the end", evaluation="sets")
    sets_at_end: Sequence[str] = key((), "further sets to evaluate only at the end", evaluation="sets")
    every: int = key(0, "steps between two evaluations; 0: only at the end", at_least(0))
    batch: int = key(256, "items to encode at once", at_least(1))
    ema: bool = key(False, "evaluate the moving average of the parameters, if the run has one", evaluation="model")
    report: bool = key(
        False, "make report.html, and picture.png of classified images or clusters, at the end", compared=False
    )
    resize: str = key("shortest", "how images are made square", choice(RESIZE_MODES), evaluation="model")
    resize_size: int = key(0, "side before the crop; 0 for model.img.image_size", at_least(0), evaluation="model")
    interpolation: str = key("bicubic", "how images are resized", choice(INTERPOLATIONS), evaluation="model")
    templates: Sequence[str] = key((), "prompts for your labelled images; empty: one", _TEMPLATES, evaluation="sets")
    class_names: str = key("", "JSON file {label: name} of your classes; empty: the labels", evaluation="sets")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Config group `log`: metrics and warnings."""

    trackers: Sequence[str] = key(("tensorboard",), "trackers of metrics, in addition to metrics.jsonl", _TRACKERS)
    callbacks: Sequence[str] = key((), "classes of other packages to call during training", _CLASSES)
    every: int = key(
        20, "steps between two lines of metrics; 0: only step 1, checkpoints, evaluations and the end", at_least(0)
    )
    stall_limit: float = key(1800.0, "seconds without progress until the run ends; 0: never", at_least(0))


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Config group `checkpoint`."""

    every: int = key(1000, "steps between two checkpoints; 0: only at the end", at_least(0))
    keep: int = key(3, "number of newest checkpoints to keep", at_least(1))


@dataclasses.dataclass(frozen=True)
class Config:
    """The whole config of a run, made by `resolve`."""

    run: str = key("runs/new", "folder of the run, also at gs://", not_empty(), resume="free", compared=False)
    seed: int = key(0, "seed of initial parameters, data order and augmentation", between(0, 2**32 - 1), card="seed")
    steps: int = key(0, "number of updates of the whole run", at_least(1))
    init: InitConfig = group(InitConfig)
    finetune: FinetuneConfig = group(FinetuneConfig)
    mesh: MeshConfig = group(MeshConfig, resume="free")
    model: ModelConfig = group(ModelConfig)
    objective: ObjectiveConfig = group(ObjectiveConfig)
    optim: OptimConfig = group(OptimConfig)
    loss: LossConfig = group(LossConfig, resume="free")
    ema: EmaConfig = group(EmaConfig)
    data: DataConfig = group(DataConfig)
    eval: EvalConfig = group(EvalConfig, resume="free")
    log: LogConfig = group(LogConfig, resume="free", compared=False)
    checkpoint: CheckpointConfig = group(CheckpointConfig, resume="free", compared=False)

    @property
    def alarm_step(self) -> int:
        """First step with warnings of a collapse or plateau; the first hundred steps are always flat."""
        return min(500, max(self.steps // 2, 100))

    def conflicts(self) -> Iterator[str]:
        """Yield values of different groups that exclude each other."""
        optim = self.optim
        checkpoint = self.checkpoint
        if optim.schedule != "constant" and optim.lr_end > optim.lr:
            yield f"optim.lr_end {optim.lr_end:g} is above optim.lr {optim.lr:g}, the peak; lower it, as to 0"
        rewinds = optim.on_bad_steps == "rewind"
        if rewinds and checkpoint.keep < 2:
            yield "optim.on_bad_steps 'rewind' may need the checkpoint before the newest; raise checkpoint.keep to 2"
        if rewinds and not checkpoint.every:
            yield "optim.on_bad_steps 'rewind' needs checkpoints before the end; set checkpoint.every to 1 or more"
        if optim.warmup >= self.steps:
            remedy = "shorten it with --config.optim.warmup=N, or give the recipe its length (steps= or epochs=)"
            yield f"optim.warmup={optim.warmup} must be below the {self.steps} steps of the run; {remedy}"
        batch = self.data.batch
        for name, parts in (("optim.microbatches", optim.microbatches), ("loss.chunk_size", self.loss.chunk_size)):
            if parts and batch % parts:
                yield f"{name}={parts} must divide data.batch={batch}"
        objective = make_objective(self.objective)
        for term in objective.terms.values():
            yield from term.conflicts_with(self.model, self.loss)
        if self.data.negatives and not any(term.uses_negatives for term in objective.terms.values()):
            yield "data.negatives is for objectives with the term clip or siglip; add one of them, or set it to 0"
        towers = [self.model.tower(name) for name in objective.towers]
        if optim.layer_decay != 1 and all(tower.num_layers == 1 for tower in towers):
            types = " and ".join(type(tower).__name__ for tower in towers)
            yield f"optim.layer_decay is {optim.layer_decay}, and {types} has no layers to tell apart; set it to 1"
        try:
            Preprocessing.from_config(self)
        except UserError as error:
            yield str(error).removesuffix(".")
        yield from self._tuning_conflicts(objective.towers)

    def _tuning_conflicts(self, names: Sequence[str]) -> Iterator[str]:
        """Yield values of `init`, `finetune` and `optim` that exclude each other, for the towers `names`."""
        frozen = self.init.freeze
        lora = self.finetune.lora
        if {*frozen} - {*names}:
            yield f"init.freeze is {frozen}; the model only has the {names[0]} tower"
        if lora.rank and not self.init.weights:
            yield "finetune.lora.rank adapts given weights, and init.weights is empty; name weights, or set it to 0"
        if lora.rank and {*names} <= {*frozen}:
            yield "finetune.lora.rank adapts towers, and init.freeze freezes all of them; leave one of the two out"
        if self.optim.name == "muon" and (lora.rank or {*names} <= {*frozen}):
            freezing = "finetune.lora.rank" if lora.rank else "init.freeze"
            yield f"optim.name is 'muon', and {freezing} freezes all its kernels; set it to 'adamw', and lower optim.lr"


def default() -> ml_collections.ConfigDict:
    """Return every key with its default, locked: unknown keys cannot be set."""
    return ml_collections.ConfigDict(fields.as_dict(Config())).lock()


def keys_where(**facts: Unpack[Facts]) -> tuple[str, ...]:
    """Return the dotted keys of a run's config with all of `facts`, in declaration order."""
    return fields.keys_where(Config, **facts)


def resolve(config: ml_collections.ConfigDict | Mapping[str, Any] | Config) -> Config:
    """Check a config as a whole and return it as a `Config`; absent keys have their defaults.

    Raises:
      UserError: all unknown keys, and all wrong values with the allowed ones.
    """
    if isinstance(config, Config):
        return config
    faults: list[str] = []
    values = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    resolved = fields.read_group(Config, values, "", faults)
    if faults:
        count = f"{len(faults)} values of the config are wrong:\n  " if len(faults) > 1 else ""
        raise UserError(count + "\n  ".join(map(fields.sentence, faults)))
    return resolved


def complete(values: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """Return a locked config of `values`, for example from a run's config.json, with defaults for all other keys.

    Lists become tuples, because JSON has no tuples and `ConfigDict` keeps types. `resolve` reports unknown keys.
    """

    def fill(expected: Any, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return fields.with_tuples(given)
        if not dataclasses.is_dataclass(expected):
            return {name: fill(None, value) for name, value in given.items()}
        hints = typing.get_type_hints(expected)
        defaults = fields.as_dict(expected())
        return defaults | {name: fill(hints.get(name), value) for name, value in given.items()}

    if isinstance(values.get("objective"), Mapping):
        values = {**values, "objective": with_terms(values["objective"])}
    return ml_collections.ConfigDict(fill(Config, values)).lock()


def to_dict(config: Config) -> dict[str, Any]:
    """Return a nested dict of JSON's types for files and pages, without passwords and signatures in addresses."""
    return redact(json.loads(json.dumps(fields.as_dict(config))))


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """{"optim": {"lr": 1}} -> {"optim.lr": 1}; tuples become JSON's lists."""
    return flatten_dict(json.loads(json.dumps(config)), sep=".")
