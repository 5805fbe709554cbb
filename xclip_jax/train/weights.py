"""The variables of a run's checkpoint or of other weights, and a new run's start from them: group `init`."""

import dataclasses
import functools
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
from xclip_jax.console import log0
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.errors import UserError
from xclip_jax.models.layers import stack_blocks, unstack_blocks
from xclip_jax.run_folder import RunFolder
from xclip_jax.train.build import Parts, build
from xclip_jax.train.checkpoint import Checkpointer
from xclip_jax.train.state import TrainState

Variables = Mapping[str, Any]

_SHOWN = 8  # tensors that an error lists by name

# What changes the meaning of weights and not their shapes.
_MEANING_KEYS = (
    "model.img.act", "model.img.eps", "model.img.pool", "model.img.pre_norm", "model.txt.act", "model.txt.eps",
    "data.tokenizer",
)  # fmt: skip


def load(path: str, step: int | None = None) -> tuple[ml_collections.ConfigDict, Parts, Variables, int]:
    """Load the config, parts, variables and step of a run's checkpoint or of other weights, on this machine's devices.

    A run's variables are those that it evaluates: the moving average where `eval.ema` says so.

    Args:
      path: a run's folder, or anything that `interop.read` knows; such weights are of step 0.
      step: which checkpoint of a run; the newest by default.

    Raises:
      UserError: neither a run nor weights, no checkpoint of that step, or one of another architecture.
    """
    if not epath.Path(path).exists():
        raise UserError(f"{path!r} does not exist; name the folder of a run, or a folder or file of weights.")
    run = RunFolder(path)
    config, variables = (_run_config(run), None) if run.is_run() else _read_foreign(path, step)
    # Layout and batch belong to the machine that trained, not to what was learned.
    config.mesh.update(data=-1, fsdp=1, model=1, strategy="dp")
    config.optim.microbatches, config.loss.chunk_size, config.loss.impl = 1, 0, "plain"
    config.data.batch = jax.device_count()
    parts = build(config)
    if variables is not None:
        return config, parts, _device_put_checked(variables, parts, path), 0
    if not run.checkpoints.exists():
        raise UserError(f"{run.path} holds no checkpoint; train it first, or name the folder of another run.")
    with Checkpointer(run.path, read_only=True) as checkpointer:
        state, _ = checkpointer.restore(parts.abstract, step)
    return config, parts, state.variables(ema=config.eval.ema), int(state.step)


def _run_config(run: RunFolder) -> ml_collections.ConfigDict:
    content = run.read_config()
    if content is None:
        raise UserError(f"{str(run.path)!r} is not a run's folder: it has no config.json; name the folder of a run.")
    config = schema.complete(content["config"])
    if run.tokenizer_file.exists():  # the file that the config names may be elsewhere now
        config.data.tokenizer = str(run.tokenizer_file)
    return config


def _read_foreign(path: str, step: int | None) -> tuple[ml_collections.ConfigDict, Variables]:
    if step is not None:
        raise UserError(f"{path} is not a run's folder, so it has no checkpoint of step {step}; leave --step out.")
    config, variables = interop.read(path)
    for note in config.pop("source")["notes"]:
        log0(f"{path}: {note}")
    return schema.complete({"steps": 1} | config), variables


def _device_put_checked(variables: Variables, parts: Parts, path: str) -> Variables:
    """`variables` on the devices, checked against the model that their config describes."""
    expected = flatten_dict(parts.abstract.variables(), sep="/")
    tensors = flatten_dict(dict(variables), sep="/")
    differing = sorted(expected.keys() ^ tensors.keys())
    differing += [name for name, x in expected.items() if name in tensors and x.shape != tensors[name].shape]
    if differing:
        raise UserError(f"{path}: tensors do not match its config: {', '.join(differing[:_SHOWN])}.")
    put = {name: jax.device_put(tensors[name], x.sharding) for name, x in expected.items()}
    return {"params": {}, "batch_stats": {}} | unflatten_dict(put, sep="/")


def read_initial(config: Config, abstract: TrainState) -> dict[str, np.ndarray]:
    """Read the tensors of `config.init.weights` that a new run's state has, in the shapes of the state.

    Prints lines on what is read, converted, left out and left at its random values.

    Args:
      config: of the run.
      abstract: shapes of its state.

    Returns:
      Flat {"params/img/...": array}.

    Raises:
      UserError: no weights, or tensors of other shapes.
    """
    where, target = config.init.weights, abstract.variables()
    source_config, _, variables, step = load(where)
    tensors, notes = convert_params(jax.device_get(variables), target, where)
    log0(f"starting from {where}, step {step}: {len(tensors)} of {len(flatten_dict(target))} tensors")
    for note in notes:
        log0(note)
    source, run = _meaning(source_config.to_dict()), _meaning(dataclasses.asdict(config))
    differing = [(key, source[key], run[key]) for key in source if source[key] != run[key]]
    if differing:
        settings = ", ".join(f"{key} ({a!r}, {b!r} in this run)" for key, a, b in differing)
        log0(f"WARNING: the weights of {where} were trained with different settings: {settings}")
    return tensors


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

    return state.replace(
        params=replaced("params", state.params),
        batch_stats=replaced("batch_stats", state.batch_stats),
        ema_params=None if state.ema_params is None else replaced("params", state.ema_params),
        ema_batch_stats=None if state.ema_params is None else replaced("batch_stats", state.ema_batch_stats),
    )


def _meaning(config: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the config keys without which the weights are useless though their shapes fit."""
    keys = flatten_dict(Preprocessing.from_config(config).to_config(), sep=".")
    return {key: functools.reduce(operator.getitem, key.split("."), config) for key in _MEANING_KEYS} | keys


def convert_params(source: Variables, target: Variables, where: str) -> tuple[dict[str, np.ndarray], list[str]]:
    """Convert variables to the layout of `target`, as far as it has them.

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
        template = target["params"][tower]
        blocks, expected = params[tower]["transformer"], template["transformer"]
        depth = _depth(blocks)
        if depth != _depth(expected):
            wrong.append(f"params/{tower}/transformer has {depth} blocks, expected {_depth(expected)}")
        elif ("blocks" in blocks) != ("blocks" in expected):
            blocks = unstack_blocks(blocks, depth) if "blocks" in blocks else stack_blocks(blocks, depth)
        positions = _convert_positions(params[tower]["positions"], template, tower, notes)
        params[tower] = params[tower] | {"transformer": blocks, "positions": positions}
    saved = flatten_dict(dict(source) | {"params": params}, sep="/")
    current = flatten_dict(dict(target), sep="/")
    tensors = {name: np.asarray(saved[name]) for name in current if name in saved}
    wrong += [
        f"{name} has shape {x.shape}, expected {tuple(current[name].shape)}"
        for name, x in tensors.items()
        if x.shape != tuple(current[name].shape)
    ]
    if wrong:
        suffix = f" (and {len(wrong) - _SHOWN} more)" if len(wrong) > _SHOWN else ""
        raise UserError(
            f"init.weights={where!r} has another architecture: {'; '.join(wrong[:_SHOWN])}{suffix}. Set the keys of "
            "model to those of the weights, or leave init.weights empty."
        )
    if missing := _group_by_prefix(current.keys() - saved.keys(), current):
        notes.append(f"not in {where}, so initialised at random: {', '.join(missing)}")
    if unused := _group_by_prefix(saved.keys() - current.keys(), saved):
        notes.append(f"in {where} and not in this run: {', '.join(unused)}")
    return tensors, notes


def _depth(blocks: Mapping[str, Any]) -> int:
    return len(jax.tree.leaves(blocks["blocks"])[0]) if "blocks" in blocks else len(blocks)


def _convert_positions(table: np.ndarray, template: Mapping[str, Any], tower: str, notes: list[str]) -> np.ndarray:
    """A position table (n, d) with as many rows as that of the tower `template`; itself where that is impossible."""
    n, expected = len(table), template["positions"].shape[0]
    if n == expected:
        return table
    if tower == "txt":
        if n < expected:
            raise UserError(
                f"init.weights has positions for texts of {n} tokens and model.txt.context_length is {expected}; set "
                f"it to {n} or less."
            )
        notes.append(f"text positions cut from {n} to {expected}")
        return table[:expected]
    extra = int("cls" in template)  # the class token's row comes first
    grid, new = math.isqrt(n - extra), math.isqrt(expected - extra)
    if grid**2 != n - extra:
        return table
    notes.append(f"image positions interpolated from {grid} x {grid} to {new} x {new}")
    square = table[extra:].reshape(grid, grid, -1)
    # Antialiased, which matters where the grid shrinks.
    square = np.asarray(jax.image.resize(square, (new, new, square.shape[-1]), "cubic", antialias=True))
    return np.concatenate([table[:extra], square.reshape(new**2, -1)])


def _group_by_prefix(names: set[str], variables: Mapping[str, Any]) -> list[str]:
    """`names` without collections; a head or tower of which all `variables` are named is one name."""

    def prefix(name: str) -> str:
        return name.split("/")[1]

    whole = {prefix(name) for name in names} - {prefix(name) for name in variables.keys() - names}
    return sorted({prefix(name) if prefix(name) in whole else name for name in names})
