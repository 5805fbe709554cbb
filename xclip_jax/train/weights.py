"""Load a run's checkpoint or other weights, and start a new run from them: group `init`."""

import dataclasses
import hashlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from xclip_jax import interop
from xclip_jax.config import schema
from xclip_jax.config.schema import Config
from xclip_jax.core import imports, storage
from xclip_jax.core.console import log0
from xclip_jax.core.errors import UserError
from xclip_jax.core.fields import as_dict
from xclip_jax.core.run_folder import RunReader
from xclip_jax.data import tokenizer
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.evaluators.results import digest
from xclip_jax.interop import hub
from xclip_jax.interop.hub import Place
from xclip_jax.models.tower import Tower
from xclip_jax.models.two_towers import TOWERS, Variables
from xclip_jax.objectives import LossConfig
from xclip_jax.parallel.mesh import replicated
from xclip_jax.parallel.sharding import MeshConfig
from xclip_jax.train.build import Experiment, build
from xclip_jax.train.checkpoint import Checkpointer
from xclip_jax.train.state import TrainState

_SHOWN = 8  # tensors that an error lists by name


class Origin(NamedTuple):
    """Step and commit of initial weights, as a run's config.json records them."""

    step: int = 0  # of the weights' run; 0 for other weights
    commit: str = ""  # of a repository of the Hub; "" for other places


class Loaded(NamedTuple):
    """A model on this machine's devices."""

    config: Config  # the run's, with batch and layout of this machine
    experiment: Experiment  # built from `config`
    variables: Variables  # to evaluate: the moving average if `eval.ema` is set
    step: int  # of the checkpoint; 0 for other weights
    classes: tuple[str, ...] | None  # class names of a fine-tuned model; None if there are none


def load(place: str | Place, step: int | None = None) -> Loaded:
    """Load the checkpoint of `step`, by default the newest, in a run's folder, or other weights for `interop.read`."""
    place = _existing(place)
    variables = None
    if place.run:
        config = run_config(place.run)
        classes = place.run.read_classes()
    elif step is not None:
        raise UserError(f"{place.name} is not a run's folder, so it has no checkpoint of step {step}; omit --step.")
    else:
        content, variables = interop.read(place)
        source = content.pop("source")
        classes = source.get("classes")
        for note in source["notes"]:
            log0(f"{place.name}: {note}")
        with imports.named_by(place.name):
            config = schema.resolve(schema.complete({"steps": 1} | content))
    # Layout and batch depend on the machine, not on the model.
    config = dataclasses.replace(
        config,
        mesh=MeshConfig(),
        loss=LossConfig(),
        optim=dataclasses.replace(config.optim, microbatches=1),
        data=dataclasses.replace(config.data, batch=jax.device_count()),
    )
    experiment = build(config)
    if variables is not None:
        variables = {"batch_stats": {}} | variables
        if jax.tree.map(np.shape, variables) != jax.tree.map(np.shape, experiment.abstract.variables()):
            raise UserError(f"{place.name}: tensors do not match its config; export the model again.")
        return Loaded(config, experiment, jax.device_put(variables, replicated(experiment.mesh)), 0, classes)
    # Unevaluated parts stay on disk; the rest is replicated, so that every process can read it.
    abstract = experiment.abstract
    average = config.eval.ema and abstract.ema_params is not None
    others = ("params", "batch_stats") if average else ("ema_params", "ema_batch_stats")
    abstract = dataclasses.replace(abstract, **dict.fromkeys(("opt_state", "loss_state", *others)))
    whole = replicated(experiment.mesh)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), abstract)
    with Checkpointer(place.path, read_only=True) as checkpointer:
        state, _ = checkpointer.restore(abstract, step)
    return Loaded(config, experiment, state.variables(ema=config.eval.ema), int(state.step), classes)


def _existing(place: str | Place) -> Place:
    place = hub.locate(place)
    with storage.os_errors(place.name):
        exists = place.path.exists()
    if not exists:
        remedy = "name the folder of a run, a folder or file of weights, or hf:ORG/NAME of the Hub"
        raise UserError(f"{place.name!r} does not exist; {remedy}.")
    return place


def adopt(config: ml_collections.ConfigDict, path: str) -> Config:
    """Set `config`'s towers, tokenizer and preprocessing to match the weights at `path`; return the weights' config."""
    place = _existing(path)
    source = _completed(place.run).to_dict() if place.run else interop.read(place)[0]
    groups = {name: source[name] for name in ("model", "objective", "data", "eval") if name in source}
    with imports.named_by(path):
        saved = schema.resolve(schema.complete({"steps": 1} | groups))
    for name in TOWERS:
        tower = config.model[name]
        # remat only affects how a tower is computed.
        tower.update(as_dict(getattr(saved.model, name)) | {"remat": tower.remat})
    config.model.plugins = saved.model.plugins
    config.model.embed = saved.model.embed  # a style may tie it to the width
    config.model.img.drop_path = 0.0
    prepare = Preprocessing.from_config(saved).to_config()
    config.eval.update(prepare["eval"])
    if saved.eval.resize_size and not saved.model.plugins:
        # The same view of an image, rounded up, also if an argument or a flag changes its size later.
        size = config.model.img.get_ref("image_size")
        config.eval.resize_size = -(-size * saved.eval.resize_size // saved.model.img.image_size)
    with config.ignore_type():  # a name, or a pair
        config.data.update(prepare["data"] | {"tokenizer": saved.data.tokenizer})
    return saved


def fingerprint(experiment: Experiment, variables: Variables) -> str:
    """Return a checksum of everything that determines features: weights, tokenizer, lengths and preprocessing.

    It does not depend on the device or on stacking of blocks, and is equal for a run and its export.
    """
    params = dict(variables["params"])
    for name in experiment.model.towers:
        params[name] = getattr(experiment.model, name).unrolled().convert(params[name])[0]
    number = 0
    for leaf in jax.tree.leaves({**variables, "params": params}):
        number = zlib.crc32(np.ascontiguousarray(leaf).data, number)
    return digest([number, experiment.context_length, experiment.image_size, _compatibility(experiment.config)])


def _completed(run: RunReader) -> ml_collections.ConfigDict:
    config = schema.complete((run.read_config() or {})["config"])
    # Files that the config names may have moved since.
    if config.data.tokenizer not in tokenizer.NAMES and run.tokenizer_file.exists():
        config.data.tokenizer = str(run.tokenizer_file)
    if config.eval.class_names and run.class_names_file.exists():
        config.eval.class_names = str(run.class_names_file)
    return config


def run_config(run: RunReader) -> Config:
    """Return the config in a run's folder, with the folder's copies of the tokenizer's file and of class names."""
    config = _completed(run)
    with imports.named_by(run.config_file):
        try:
            return schema.resolve(config)
        except UserError as error:
            raise UserError(f"{run.config_file}: {error}") from None


def read_initial(
    config: Config, abstract: TrainState, classes: Sequence[str] | None = None, step: int | None = None
) -> tuple[dict[str, np.ndarray], Origin]:
    """Read the tensors in `config.init.weights` for a new run's state, and print omissions and conversions.

    `abstract` has the shapes of the state. A classifier is left out unless its classes are `classes`, of the run's
    labelled data. If the weights are a run, `step` is the step of the checkpoint; the newest by default.

    Returns:
      Flat {"params/img/...": array}, and the step and commit of the weights.
    """
    where = config.init.weights
    place = hub.locate(where)  # once: a branch may move
    target = abstract.variables()
    source = load(place, step)
    model = source.experiment.model
    towers = {name: (getattr(model, name), config.model.tower(name)) for name in source.experiment.objective.towers}
    variables = jax.device_get(source.variables)
    params = dict(variables["params"])
    if "classifier" in params.keys() & target["params"] and source.classes != tuple(classes or ()):
        del params["classifier"]
        log0(f"the classifier of {where} is left out: its classes are unknown, or differ from this run's")
    tensors, notes = convert_params(variables | {"params": params}, target, towers, where)
    log0(f"starting from {where}, step {source.step}: {len(tensors)} of {len(flatten_dict(target))} tensors")
    for note in notes:
        log0(note)
    saved = _compatibility(source.config)
    settings = [
        f"{key} ({saved[key]!r}, {value!r} in this run)"
        for key, value in _compatibility(config).items()
        if key in saved and saved[key] != value
    ]
    if settings:
        log0(f"WARNING: the weights of {where} were trained with different settings: {', '.join(settings)}")
    return tensors, Origin(source.step, place.commit)


def init_from_weights(tensors: Mapping[str, np.ndarray], state: TrainState) -> TrainState:
    """Return a new run's `state` with the `tensors` from `read_initial`, in the state's layout.

    The moving average starts from the same parameters; the optimizer's moments stay zero.
    """

    def put(name: str, old: jax.Array) -> jax.Array:
        new = tensors.get(name)
        if new is None:
            return old
        # A copy, since each buffer is donated to the first step; each process fills the shards on its devices.
        return jax.make_array_from_callback(old.shape, old.sharding, lambda index: np.array(new[index], old.dtype))

    def replaced(collection: str, tree: Any) -> Any:
        flat = flatten_dict(tree, sep="/")
        return unflatten_dict({name: put(f"{collection}/{name}", old) for name, old in flat.items()}, sep="/")

    changes = {name: replaced(name, getattr(state, name)) for name in ("params", "batch_stats")}
    if state.ema_params is not None:
        changes |= {f"ema_{name}": replaced(name, getattr(state, f"ema_{name}")) for name in ("params", "batch_stats")}
    return dataclasses.replace(state, **changes)


def _compatibility(config: Config) -> dict[str, Any]:
    """Config values that must match for the weights to be usable, even if every shape fits."""
    towers = {name: config.model.tower(name) for name in TOWERS}
    keys = {f"model.{name}.{key}": getattr(tower, key) for name, tower in towers.items() for key in tower.meaning_keys}
    tokens = config.data.tokenizer
    if tokens not in tokenizer.NAMES:
        tokens = hashlib.sha256(tokenizer.read_file(tokens)).hexdigest()
    preprocessing = flatten_dict(Preprocessing.from_config(config).to_config(), sep=".")
    return keys | {"data.tokenizer": tokens} | preprocessing


def convert_params(
    source: Variables, target: Variables, towers: Mapping[str, tuple[Tower, Tower]], where: str
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Convert variables of `source` to the layout of `target`.

    Blocks are scanned or unrolled, position tables cut (texts) or interpolated (images), other towers left out.

    Args:
      source: NumPy arrays by collection ("params", "batch_stats"), see `TwoTowers.apply`.
      target: arrays or shapes.
      towers: {"img", "txt"}: pairs of the source's and the target's tower.
      where: name of the source in errors.

    Returns:
      Flat {"params/img/...": array with the target's shape}, and notes on changed and missing tensors.
    """
    notes, wrong = [], []
    params = dict(source["params"])
    for name, (saved_tower, tower) in towers.items():
        if name not in params or name not in target["params"]:  # of a fine-tuned model
            continue
        if type(saved_tower) is not type(tower):
            del params[name]
            saved = saved_tower.describe()
            current = tower.describe()
            notes.append(f"{name} is another tower: {saved} in {where}, {current} in this run")
            continue
        try:
            params[name], changed = tower.convert(params[name])
            notes += changed
        except UserError as error:
            wrong.append(f"params/{name}/{error}")
    saved = flatten_dict(dict(source) | {"params": params}, sep="/")
    current = flatten_dict(dict(target), sep="/")
    tensors = {name: np.asarray(saved[name]) for name in current if name in saved}
    wrong += [
        f"{name} has shape {x.shape}, expected {tuple(current[name].shape)}"
        for name, x in tensors.items()
        if x.shape != tuple(current[name].shape)
    ]
    if wrong:
        raise UserError(
            f"init.weights={where!r} has another architecture: {_listed(wrong)}. Set the keys of model and "
            "data.tokenizer to the weights' values, or leave init.weights empty."
        )
    missing = sorted(current.keys() - saved.keys())
    unused = sorted(saved.keys() - current.keys())
    if missing:
        notes.append(f"not in {where}, so initialised at random: {_listed(missing)}")
    if unused:
        notes.append(f"in {where} but not in this run: {_listed(unused)}")
    return tensors, notes


def _listed(items: Sequence[str]) -> str:
    return ", ".join(items[:_SHOWN]) + (f" (and {len(items) - _SHOWN} more)" if len(items) > _SHOWN else "")
