"""The variables of a run's checkpoint or of other weights, and a new run's start from them: group `init`."""

import dataclasses
import functools
import json
import math
import operator
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from xclip_jax import interop
from xclip_jax.config import schema
from xclip_jax.config.schema import Config
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.errors import UserError
from xclip_jax.interop.tensor_files import is_run
from xclip_jax.metrics import say
from xclip_jax.models.layers import stack_blocks, unstack_blocks
from xclip_jax.train.build import Parts, build
from xclip_jax.train.checkpoint import Checkpointer
from xclip_jax.train.state import TrainState

Variables = Mapping[str, Any]

# What weights mean without being seen in their shapes.
_MEANING = (
    "model.img.act", "model.img.eps", "model.img.pool", "model.img.pre_norm", "model.txt.act", "model.txt.eps",
    "data.tokenizer",
)  # fmt: skip


def load(path: str, step: int | None = None) -> tuple[ml_collections.ConfigDict, Parts, Variables, int]:
    """The config, parts, variables and step of a run's checkpoint or of other weights, on this machine's devices.

    A run's variables are those that it evaluates: the moving average where `eval.ema` says so.

    Args:
      path: a run's folder, or anything that `interop.read` knows; such weights are of step 0.
      step: which checkpoint of a run; the newest by default.

    Raises:
      UserError: no run and no weights there, no checkpoint of that step, or one that this code cannot read.
    """
    if not epath.Path(path).exists():
        raise UserError(f"{path!r} does not exist; name the folder of a run, or a folder or file of weights.")
    config, variables = (_run_config(path), None) if is_run(path) else _weights(path, step)
    # Layout and batch belong to the machine that trained, not to what was learned.
    config.mesh.update(data=-1, fsdp=1, model=1, strategy="dp")
    config.optim.microbatches, config.loss.chunk, config.loss.impl = 1, 0, "plain"
    config.data.batch = jax.device_count()
    parts = build(config)
    if variables is not None:
        return config, parts, _placed(variables, parts, path), 0
    folder = epath.Path(path)
    if not (folder / "checkpoints").exists():
        raise UserError(f"{folder} holds no checkpoint; train it first, or name the folder of another run.")
    with Checkpointer(folder, read_only=True) as checkpointer:
        state, _ = checkpointer.restore(parts.abstract, step)
    return config, parts, state.variables(ema=config.eval.ema), int(state.step)


def _run_config(path: str) -> ml_collections.ConfigDict:
    """Config of a run, which reads its own copy of a tokenizer file."""
    file, copy = epath.Path(path) / "config.json", epath.Path(path) / "tokenizer.json"
    try:
        config = schema.complete(json.loads(file.read_text())["config"])
        if copy.exists():
            config.data.tokenizer = str(copy)
        return config
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} cannot be read ({error}); name the folder of another run.") from error


def _weights(path: str, step: int | None) -> tuple[ml_collections.ConfigDict, Variables]:
    if step is not None:
        raise UserError(f"{path} is no run's folder, so it has no checkpoint of step {step}; leave --step out.")
    there, variables = interop.read(path)
    for note in there.pop("source")["notes"]:
        say(f"{path}: {note}")
    return schema.complete({"steps": 1} | there), variables


def _placed(variables: Variables, parts: Parts, path: str) -> Variables:
    """`variables` on the devices, checked against the model that their config describes."""
    wanted = parts.abstract.variables()
    here, there = flatten_dict(wanted, sep="/"), flatten_dict(dict(variables), sep="/")
    differing = sorted(here.keys() ^ there.keys())
    differing += [name for name, x in here.items() if name in there and x.shape != there[name].shape]
    if differing:
        raise UserError(f"{path} does not have the tensors that its config promises: {', '.join(differing[:8])}.")
    put = {name: jax.device_put(there[name], x.sharding) for name, x in here.items()}
    return {"params": {}, "batch_stats": {}} | unflatten_dict(put, sep="/")


def read_initial(config: Config, abstract: TrainState) -> dict[str, np.ndarray]:
    """Tensors of a new run's state that `config.init.weights` has, in the shapes of the state.

    Prints a line on what is taken, changed, left out and left fresh.

    Args:
      config: of the run.
      abstract: shapes of its state.

    Returns:
      Flat {"params/img/...": array}.

    Raises:
      UserError: nothing to read there, or tensors of other shapes.
    """
    where, target = config.init.weights, abstract.variables()
    source_config, _, variables, step = load(where)
    tensors, notes = fit(jax.device_get(variables), target, where)
    say(f"starting from {where}, step {step}: {len(tensors)} of {len(flatten_dict(target))} tensors")
    for note in notes:
        say(note)
    source, run = _meaning(source_config.to_dict()), _meaning(dataclasses.asdict(config))
    differing = [(key, source[key], run[key]) for key in source if source[key] != run[key]]
    if differing:
        settings = ", ".join(f"{key} ({a!r}, {b!r} in this run)" for key, a, b in differing)
        say(f"WARNING: the weights of {where} were trained with different settings: {settings}")
    return tensors


def start(tensors: Mapping[str, np.ndarray], state: TrainState) -> TrainState:
    """A new run's `state` with `tensors` of `read_initial`, in the state's own layout.

    The moving average starts from the same parameters; the optimizer's moments are still zero and stay so.
    """

    def replaced(collection: str, tree: Any) -> Any:
        # Copied, since each buffer is donated to the first step. Each process makes the shards of its own devices.
        def put(path: tuple[str, ...], old: jax.Array) -> jax.Array:
            new = tensors.get("/".join((collection, *path)))
            if new is None:
                return old
            return jax.make_array_from_callback(old.shape, old.sharding, lambda at: np.array(new[at], old.dtype))

        return unflatten_dict({path: put(path, old) for path, old in flatten_dict(tree).items()})

    return state.replace(
        params=replaced("params", state.params),
        batch_stats=replaced("batch_stats", state.batch_stats),
        ema_params=None if state.ema_params is None else replaced("params", state.ema_params),
        ema_batch_stats=None if state.ema_params is None else replaced("batch_stats", state.ema_batch_stats),
    )


def _meaning(config: Mapping[str, Any]) -> dict[str, Any]:
    """What weights mean, by config keys."""
    keys = flatten_dict(Preprocessing.from_config(config).to_config(), sep=".")
    return {key: functools.reduce(operator.getitem, key.split("."), config) for key in _MEANING} | keys


def fit(source: Variables, target: Variables, where: str) -> tuple[dict[str, np.ndarray], list[str]]:
    """What a model with variables like `target` can start from.

    Scanned and unrolled blocks are turned into one another, position tables of other sizes are cut (texts) or
    interpolated (images).

    Args:
      source: NumPy arrays by collection ("params", "batch_stats"), as `TwoTowers.apply` takes them.
      target: arrays or shapes.
      where: what errors call the source.

    Returns:
      Flat {"params/img/...": array of the target's shape}, and sentences on what was changed or is missing.

    Raises:
      UserError: tensors of other shapes, or another number of blocks.
    """
    notes, wrong = [], []
    params = dict(source["params"])
    for tower in ("img", "txt"):
        if tower not in params or tower not in target["params"]:  # of a fine-tuned model
            continue
        like = target["params"][tower]
        blocks, wanted = params[tower]["transformer"], like["transformer"]
        depth = _depth(blocks)
        if depth != _depth(wanted):
            wrong.append(f"params/{tower}/transformer has {depth} blocks there and {_depth(wanted)} here")
        elif ("blocks" in blocks) != ("blocks" in wanted):
            blocks = unstack_blocks(blocks, depth) if "blocks" in blocks else stack_blocks(blocks, depth)
        fitted = _fit_positions(params[tower]["positions"], like, tower, notes)
        params[tower] = params[tower] | {"transformer": blocks, "positions": fitted}
    there = flatten_dict(dict(source) | {"params": params}, sep="/")
    here = flatten_dict(dict(target), sep="/")
    found = {name: np.asarray(there[name]) for name in here if name in there}
    wrong += [
        f"{name} has shape {x.shape} there and {tuple(here[name].shape)} here"
        for name, x in found.items()
        if x.shape != tuple(here[name].shape)
    ]
    if wrong:
        more = f" (and {len(wrong) - 8} more)" if len(wrong) > 8 else ""
        raise UserError(
            f"init.weights={where!r} is of another architecture: {'; '.join(wrong[:8])}{more}. Set the keys of model "
            "to those of the weights, or leave init.weights empty."
        )
    if missing := _together(here.keys() - there.keys(), here):
        notes.append(f"not in {where}, so fresh: {', '.join(missing)}")
    if extra := _together(there.keys() - here.keys(), there):
        notes.append(f"in {where} and not in this run: {', '.join(extra)}")
    return found, notes


def _depth(blocks: Mapping[str, Any]) -> int:
    return len(jax.tree.leaves(blocks["blocks"])[0]) if "blocks" in blocks else len(blocks)


def _fit_positions(table: np.ndarray, like: Mapping[str, Any], tower: str, notes: list[str]) -> np.ndarray:
    """A position table (n, d) with as many rows as the tower `like` has; itself where that cannot be made."""
    n, wanted = len(table), like["positions"].shape[0]
    if n == wanted:
        return table
    if tower == "txt":
        if n < wanted:
            raise UserError(
                f"init.weights knows texts of {n} tokens and model.txt.length is {wanted}; set it to {n} or less."
            )
        notes.append(f"text positions cut from {n} to {wanted}")
        return table[:wanted]
    extra = int("cls" in like)  # the class token's row comes first
    grid, new = math.isqrt(n - extra), math.isqrt(wanted - extra)
    if grid**2 != n - extra:
        return table
    notes.append(f"image positions interpolated from {grid} x {grid} to {new} x {new}")
    square = table[extra:].reshape(grid, grid, -1)
    # Antialiased, which matters where the grid shrinks.
    square = np.asarray(jax.image.resize(square, (new, new, square.shape[-1]), "cubic", antialias=True))
    return np.concatenate([table[:extra], square.reshape(new**2, -1)])


def _together(names: set[str], among: Mapping[str, Any]) -> list[str]:
    """`names`, those that are all of a head or tower by its name alone; collections left out."""

    def top(name: str) -> str:
        return name.split("/")[1]

    whole = {top(name) for name in names} - {top(name) for name in among.keys() - names}
    return sorted({top(name) if top(name) in whole else name for name in names})
