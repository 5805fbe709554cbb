"""The variables of a run's checkpoint or of other weights, and a new run's start from them: group `init`."""

import dataclasses
import hashlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from xclip_jax import interop
from xclip_jax.config import schema
from xclip_jax.config.schema import Config
from xclip_jax.core import imports
from xclip_jax.core.console import log0
from xclip_jax.core.errors import UserError
from xclip_jax.core.run_folder import RunFolder
from xclip_jax.data import tokenizer
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.evaluators.results import digest
from xclip_jax.interop import hub
from xclip_jax.models.tower import Tower
from xclip_jax.models.two_towers import TOWERS, Variables
from xclip_jax.objectives import LossConfig
from xclip_jax.parallel.mesh import replicated
from xclip_jax.parallel.sharding import MeshConfig
from xclip_jax.train.build import Experiment, build
from xclip_jax.train.checkpoint import Checkpointer
from xclip_jax.train.state import TrainState

_SHOWN = 8  # tensors that an error lists by name


def load(path: str, step: int | None = None) -> tuple[Config, Experiment, Variables, int]:
    """Load the config, experiment, variables and step of a checkpoint or of other weights, on this machine's devices.

    A run's variables are those that it evaluates: the moving average where `eval.ema` says so.

    Args:
      path: a run's folder, or anything that `interop.read` knows, which has step 0.
      step: which checkpoint of a run; the newest by default.
    """
    place = hub.resolve(path)
    if not epath.Path(place).exists():
        remedy = "name the folder of a run, a folder or file of weights, or hf:ORG/NAME of the Hub"
        raise UserError(f"{str(path)!r} does not exist; {remedy}.")
    run = RunFolder(place)
    config, variables = (run_config(run), None) if run.is_run() else _read_foreign(path, place, step)
    # Layout and batch belong to the machine that trained, not to what was learned.
    config = dataclasses.replace(
        config,
        mesh=MeshConfig(),
        loss=LossConfig(),
        optim=dataclasses.replace(config.optim, microbatches=1),
        data=dataclasses.replace(config.data, batch=jax.device_count()),
    )
    experiment = build(config)
    if variables is not None:
        return config, experiment, _device_put_checked(variables, experiment, path), 0
    if not run.checkpoints.exists():
        raise UserError(f"{run.path} holds no checkpoint; train it first, or name the folder of another run.")
    with Checkpointer(run.path, read_only=True) as checkpointer:
        state, _ = checkpointer.restore(_evaluated(experiment), step)
    return config, experiment, state.variables(ema=config.eval.ema), int(state.step)


def pin(path: str) -> tuple[str, dict[str, str]]:
    """Return the path of `hub.pin`, and {"commit": its commit} for records of what is computed with the weights."""
    pinned = hub.pin(path)
    return pinned, {"commit": pinned.rpartition("@")[2]} if hub.is_hub(pinned) else {}


def adopt(config: ml_collections.ConfigDict, path: str) -> Config:
    """Set the towers, tokenizer and preprocessing of a config to those that weights were trained with.

    Returns:
      The config of the weights.

    Raises:
      UserError: no weights, or ones that cannot be read.
    """
    place = epath.Path(hub.resolve(path))
    if not place.exists():
        raise UserError(
            f"weights={path} does not exist; the recipe takes its towers from there, also when its run resumes. Put "
            f"the weights back; to resume with another copy, name it here and add --config.init.weights={path}."
        )
    run = RunFolder(str(place))
    source = _completed(run).to_dict() if run.is_run() else interop.read(path)[0]
    groups = {name: source[name] for name in ("model", "objective", "data", "eval") if name in source}
    with imports.named_by(path):
        saved = schema.resolve(schema.complete({"steps": 1} | groups))
    for name in ("img", "txt"):
        tower = config.model[name]
        # How a tower is computed does not depend on the weights.
        tower.update(dataclasses.asdict(getattr(saved.model, name)) | {"scan": tower.scan, "remat": tower.remat})
    config.model.plugins = saved.model.plugins
    config.model.img.patch_dropout = config.model.img.drop_path = 0.0
    prepare = Preprocessing.from_config(saved).to_config()
    config.eval.update(prepare["eval"])
    if saved.eval.resize_size and not saved.model.plugins:
        # The same view of an image at a size that an argument or a flag may set later, rounded up.
        size = config.model.img.get_ref("image_size")
        config.eval.resize_size = -(-size * saved.eval.resize_size // saved.model.img.image_size)
    with config.ignore_type():  # a name, or a pair
        config.data.update(prepare["data"] | {"tokenizer": saved.data.tokenizer})
    return saved


def read_classes(path: str) -> tuple[str, ...] | None:
    """Return the classes that a model was fine-tuned on, or None if there are none or they have no names."""
    place = hub.resolve(path)
    run = RunFolder(place)
    return run.read_classes() if run.is_run() else interop.read_classes(place)


def fingerprint(experiment: Experiment, variables: Variables) -> str:
    """Return a checksum of all that decides a model's features: weights, tokenizer, lengths and preprocessing.

    It is the same on every kind of device, for stacked blocks and unrolled ones, and for a run and its export.
    """
    params = dict(variables["params"])
    for name in experiment.model.towers:
        params[name] = getattr(experiment.model, name).convert(params[name])[0]
    number = 0
    for leaf in jax.tree.leaves({**variables, "params": params}):
        number = zlib.crc32(np.ascontiguousarray(leaf).data, number)
    return digest([number, experiment.context_length, experiment.image_size, _meaning(experiment.config)])


def _completed(run: RunFolder) -> ml_collections.ConfigDict:
    config = schema.complete((run.read_config() or {})["config"])
    # The file that the config names may be elsewhere now.
    if config.data.tokenizer not in tokenizer.NAMES and run.tokenizer_file.exists():
        config.data.tokenizer = str(run.tokenizer_file)
    return config


def run_config(run: RunFolder) -> Config:
    """Return the config in a run's folder, with the folder's copy of a tokenizer file; raise `UserError`."""
    config = _completed(run)
    with imports.named_by(run.config_file):
        try:
            return schema.resolve(config)
        except UserError as error:
            raise UserError(f"{run.config_file}: {error}") from None


def _read_foreign(path: str, place: str, step: int | None) -> tuple[Config, Variables]:
    if step is not None:
        raise UserError(f"{path} is not a run's folder, so it has no checkpoint of step {step}; leave --step out.")
    config, variables = interop.read(place)
    for note in config.pop("source")["notes"]:
        log0(f"{path}: {note}")
    with imports.named_by(path):
        return schema.resolve(schema.complete({"steps": 1} | config)), variables


def _device_put_checked(variables: Variables, experiment: Experiment, path: str) -> Variables:
    """`variables` on the devices, checked against the model that their config describes."""
    expected = flatten_dict(experiment.abstract.variables(), sep="/")
    tensors = flatten_dict(dict(variables), sep="/")
    shapes = [{name: tuple(x.shape) for name, x in part.items()} for part in (expected, tensors)]
    if differing := sorted({name for name, _ in shapes[0].items() ^ shapes[1].items()}):
        raise UserError(f"{path}: tensors do not match its config: {_listed(differing)}.")
    put = {name: jax.device_put(tensors[name], replicated(experiment.mesh)) for name in expected}
    return {"params": {}, "batch_stats": {}} | unflatten_dict(put, sep="/")


def _evaluated(experiment: Experiment) -> TrainState:
    """The abstract arrays of what is evaluated, each whole on all devices: every process can read their values."""
    whole = replicated(experiment.mesh)
    state = experiment.abstract
    average = experiment.config.eval.ema and state.ema_params is not None
    others = ("params", "batch_stats") if average else ("ema_params", "ema_batch_stats")
    state = dataclasses.replace(state, **dict.fromkeys(("opt_state", "loss_state", *others)))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), state)


def read_initial(
    config: Config, abstract: TrainState, classes: Sequence[str] | None = None
) -> tuple[dict[str, np.ndarray], int]:
    """Read the tensors of `config.init.weights` that a new run's state has, and print what is left out or converted.

    Args:
      config: of the run.
      abstract: shapes of its state.
      classes: classes of its labelled data; a classifier of other classes is left out.

    Returns:
      Flat {"params/img/...": array}, and the step of the run that these are from, 0 for other weights.
    """
    where = config.init.weights
    target = abstract.variables()
    tensors, notes, source_config, step = _convert_given(config, target, classes)
    log0(f"starting from {where}, step {step}: {len(tensors)} of {len(flatten_dict(target))} tensors")
    for note in notes:
        log0(note)
    saved = _meaning(source_config)
    current = _meaning(config)
    differing = [key for key in saved if key in current and saved[key] != current[key]]
    if differing:
        settings = ", ".join(f"{key} ({saved[key]!r}, {current[key]!r} in this run)" for key in differing)
        log0(f"WARNING: the weights of {where} were trained with different settings: {settings}")
    return tensors, step


def _convert_given(
    config: Config, target: Variables, classes: Sequence[str] | None, step: int | None = None
) -> tuple[dict[str, np.ndarray], list[str], Config, int]:
    """Return `convert_params` of `config.init.weights`, of `step` or the newest, with the weights' config and step."""
    where = config.init.weights
    pinned = hub.pin(where)
    source_config, source, variables, step = load(pinned, step)
    towers = {name: (getattr(source.model, name), config.model.tower(name)) for name in source.objective.towers}
    variables = jax.device_get(variables)
    if "classifier" in target["params"].keys() & variables["params"] and read_classes(pinned) != tuple(classes or ()):
        variables = variables | {"params": {k: x for k, x in variables["params"].items() if k != "classifier"}}
        log0(f"the classifier of {where} is left out: it is not known to have the classes of this run")
    return *convert_params(variables, target, towers, where), source_config, step


def read_given(path: str, config: Config, tuned: Variables) -> dict[str, np.ndarray]:
    """Return the tensors that a tuned run started from, converted as at its start, for `mix`.

    Args:
      path: the run's folder.
      config: of the run, as `load` returns it.
      tuned: the run's variables.

    Returns:
      Flat {"params/img/...": array}; heads that the given weights lack are absent.

    Raises:
      UserError: the run started from random parameters, or its `init.weights` cannot be read any more.
    """
    where = config.init.weights
    if not where:
        raise UserError(
            f"{path} did not start from given weights (init.weights is empty), so there is nothing to mix; leave "
            "--mix out."
        )
    record = (None if hub.is_hub(path) else RunFolder(path).read_config()) or {}
    if "init_commit" in record:  # a branch of the Hub may have moved since, and a run gone on
        pinned = f"{where.partition('@')[0]}@{record['init_commit']}"
        config = dataclasses.replace(config, init=dataclasses.replace(config.init, weights=pinned))
    try:
        tensors, *_ = _convert_given(config, tuned, read_classes(hub.pin(path)), record.get("init_step"))
    except UserError as error:
        raise UserError(f"--mix needs the weights that {path} started from: {error}") from error
    if missing := sorted(flatten_dict(dict(tuned), sep="/").keys() - tensors.keys()):
        log0(f"not in {where}, so tuned in every mix: {_listed(missing)}")
    return tensors


def check_mix(share: float) -> float:
    """Return the share of tuned weights in a mix; raise `UserError` unless it is from 0 to 1."""
    if not 0 <= share <= 1:
        raise UserError(f"--mix is {share:g}; expected numbers from 0 (given weights) to 1 (tuned weights).")
    return share


def mix(given: Mapping[str, np.ndarray], tuned: Variables, share: float) -> Variables:
    """Return (1 - share) * given + share * tuned of every tensor, as WiSE-FT does (arXiv 2109.01903).

    Args:
      given: result of `read_given`; tensors that it lacks stay tuned.
      tuned: variables of the run.
      share: of the tuned weights, from 0 (exactly given) to 1 (exactly tuned).
    """
    if share == 1:
        return tuned

    def mixed(name: str, x: Any) -> Any:
        if name not in given:
            return x
        value = np.float32(1 - share) * given[name] + np.float32(share) * np.asarray(x)
        return jax.device_put(value, x.sharding)

    flat = flatten_dict(dict(tuned), sep="/", keep_empty_nodes=True)
    return unflatten_dict({name: mixed(name, x) for name, x in flat.items()}, sep="/")


def init_from_weights(tensors: Mapping[str, np.ndarray], state: TrainState) -> TrainState:
    """Return a new run's `state` with `tensors` of `read_initial`, in the state's own layout.

    The moving average starts from the same parameters; the optimizer's moments stay zero.
    """

    def replaced(collection: str, tree: Any) -> Any:
        # Copied, since each buffer is donated to the first step. Each process makes the shards of its own devices.
        def put(path: tuple[str, ...], old: jax.Array) -> jax.Array:
            new = tensors.get("/".join((collection, *path)))
            if new is None:
                return old
            return jax.make_array_from_callback(old.shape, old.sharding, lambda index: np.array(new[index], old.dtype))

        return unflatten_dict({path: put(path, old) for path, old in flatten_dict(tree).items()})

    return dataclasses.replace(
        state,
        params=replaced("params", state.params),
        batch_stats=replaced("batch_stats", state.batch_stats),
        ema_params=None if state.ema_params is None else replaced("params", state.ema_params),
        ema_batch_stats=None if state.ema_params is None else replaced("batch_stats", state.ema_batch_stats),
    )


def _meaning(config: Config) -> dict[str, Any]:
    """Values of the config keys without which the weights are useless though their shapes fit."""
    towers = {name: config.model.tower(name) for name in TOWERS}
    keys = {f"model.{name}.{key}": getattr(tower, key) for name, tower in towers.items() for key in tower.meaning_keys}
    if (tokens := config.data.tokenizer) not in tokenizer.NAMES:
        tokens = hashlib.sha256(tokenizer.read_file(tokens)).hexdigest()
    preprocessing = flatten_dict(Preprocessing.from_config(config).to_config(), sep=".")
    return keys | {"data.tokenizer": tokens} | preprocessing


def convert_params(
    source: Variables, target: Variables, towers: Mapping[str, tuple[Tower, Tower]], where: str
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Convert variables to the layout of `target`, as far as it has them.

    Scanned and unrolled blocks are turned into one another, position tables of other sizes are cut (texts) or
    interpolated (images). A tower of another type is left out.

    Args:
      source: NumPy arrays by collection ("params", "batch_stats"), as `TwoTowers.apply` takes them.
      target: arrays or shapes.
      towers: {"img", "txt"}: the towers of source and target.
      where: what errors call the source.

    Returns:
      Flat {"params/img/...": array of the target's shape}, and sentences on what was changed or is missing.
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
            f"init.weights={where!r} has another architecture: {_listed(wrong)}. Set the keys of "
            "model and data.tokenizer to what the weights have, or leave init.weights empty."
        )
    if missing := current.keys() - saved.keys():
        notes.append(f"not in {where}, so initialised at random: {_listed(sorted(missing))}")
    if unused := saved.keys() - current.keys():
        notes.append(f"in {where} and not in this run: {_listed(sorted(unused))}")
    return tensors, notes


def _listed(items: Sequence[str]) -> str:
    return ", ".join(items[:_SHOWN]) + (f" (and {len(items) - _SHOWN} more)" if len(items) > _SHOWN else "")
