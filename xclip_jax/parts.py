"""Config -> the parts of a run. What training, evaluation and planning have in common."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh

from xclip_jax import optim, state, step
from xclip_jax.data import tokenizer, transforms
from xclip_jax.data.loader import DataConfig
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.errors import UserError, one_of
from xclip_jax.models.two_towers import TwoTowers
from xclip_jax.objective import Objective
from xclip_jax.parallel import sharding
from xclip_jax.parallel.mesh import check_batch, make_mesh


@dataclasses.dataclass(frozen=True)
class EmaConfig:
    """Group `ema`: a moving average of the parameters; kept where `on`, or where the objective's targets need it."""

    on: bool = False
    momentum: float = 0.996
    schedule: str = "cosine"


@dataclasses.dataclass(frozen=True)
class Parts:
    """Everything of a run that follows from its config and its devices."""

    mesh: Mesh
    data: DataConfig
    preprocessing: Preprocessing
    tokenizer: tokenizer.Tokenizer
    objective: Objective
    model: TwoTowers
    schedule: optim.Schedule
    init: Callable[[], state.TrainState]
    abstract: state.TrainState
    make_step: Callable[[optax.GradientTransformation], Callable[..., Any]]
    step: Callable[..., Any]
    compiled: Any

    @property
    def size(self) -> int:
        """Side of an image, pixels."""
        return self.model.img["size"]

    @property
    def length(self) -> int:
        """Tokens of a text."""
        return self.model.txt["length"]


def _group(kind: type, config: ml_collections.ConfigDict, name: str) -> Any:
    try:
        return kind(**config[name].to_dict())
    except TypeError as error:
        raise UserError(f"config group {name!r}: {error}.") from error


def make_model(
    config: ml_collections.ConfigDict, objective: Objective, tokens: tokenizer.Tokenizer
) -> TwoTowers:
    """The towers with the heads that `objective` needs and the vocabulary of `tokens`."""
    group, options = config.model.to_dict(), objective.classify
    one_of("model.dtype", group["dtype"], ("float32", "bfloat16"))
    try:
        return TwoTowers(
            img=group["img"],
            txt=group["txt"] | {"vocab": tokens.vocab_size, "eot_id": tokens.eot_id},
            embed=group["embed"] if objective.contrastive else 0,
            scale_init=group["scale_init"],
            bias_init=group["bias_init"] if objective.name == "siglip" else None,
            cluster_head=group["cluster_head"] if objective.clusters else None,
            classifier={"classes": options.classes, "std": options.head_std} if objective.classifies else None,
            towers=objective.towers,
            dtype=jnp.dtype(group["dtype"]),
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"config group 'model': {error}.") from error


def build(config: ml_collections.ConfigDict, devices: list[jax.Device] | None = None) -> Parts:
    """All parts, on `devices` (default: all). Nothing is computed yet but shapes.

    Raises:
      UserError: a value that does not fit, with its key.
    """
    sizes = config.mesh.to_dict()
    strategy = sizes.pop("strategy")
    mesh = make_mesh(sizes, devices)
    layout = sharding.Layout(mesh, strategy)
    data = _group(DataConfig, config, "data")
    microbatches = config.optim.microbatches
    check_batch(data.batch, mesh, parts=microbatches, parts_key="optim.microbatches")
    if chunk := config.loss.chunk:
        if data.batch % chunk:
            raise UserError(f"loss.chunk={chunk} must divide data.batch={data.batch}.")
        check_batch(chunk, mesh, "loss.chunk")
    prepare = Preprocessing.from_config(config)
    one_of("data.resample", data.resample, transforms.RESAMPLE)
    optim_config = _group(optim.OptimConfig, config, "optim")
    ema = _group(EmaConfig, config, "ema")
    objective = Objective.from_config(config.objective.to_dict(), config.loss.to_dict(), mesh)
    tokens = tokenizer.load(data.tokenizer)
    model = make_model(config, objective, tokens)
    frozen = tuple(config.init.frozen)
    for tower in frozen:
        one_of("init.frozen", tower, objective.towers)
    tx = optim.make_optimizer(optim_config, config.steps, frozen)
    init = state.init_fn(
        model,
        tx,
        image_size=config.model.img.size,
        text_length=config.model.txt.length,
        loss_state=objective.initial_state(config.model.cluster_head.clusters),
        ema=ema.on or objective.teacher,
        seed=config.seed,
    )

    patches, mixed = (config.model.img.size // config.model.img.patch) ** 2, objective.classify

    def draw(key: jax.Array, batch: dict[str, jax.Array]) -> dict[str, Any]:
        if "image" not in batch:
            return batch
        b, (key_image, key_patches) = len(batch["image"]), jax.random.split(key)
        inputs = batch | transforms.draw(key_image, b, flip=data.flip, color=data.color)
        if objective.classifies and (mixed.mixup or mixed.cutmix):
            inputs["other"] = jax.tree.map(lambda x: x[::-1], inputs)
            key_mix = jax.random.fold_in(key, 1)
            inputs |= transforms.draw_mix(key_mix, b, config.model.img.size, mixed.mixup, mixed.cutmix)
        if model.img["patch_dropout"]:
            inputs["patches"] = jax.random.uniform(key_patches, (b, patches))
        if model.img.get("drop_path"):
            inputs["paths"] = jax.random.uniform(jax.random.fold_in(key, 2), (b, model.img["depth"], 2))
        return inputs

    def preprocess(inputs: dict[str, Any]) -> jax.Array:
        images = transforms.augment(inputs["image"], inputs)
        images = transforms.normalize(images, prepare.mean, prepare.std)
        return transforms.mix(images, preprocess(inputs["other"]), inputs) if "other" in inputs else images

    def momentum(at: jax.Array) -> Any:
        return optim.ema_momentum(at, config.steps, ema.momentum, ema.schedule)

    abstract = state.abstract(init, mesh, strategy)
    at = jax.tree.map(lambda x: x.sharding, abstract.params)
    if strategy == "zero1":
        at = sharding.split_moments(abstract.params, at, mesh)

    def make_step(tx: optax.GradientTransformation) -> Callable[..., Any]:
        made = step.make_train_step(
            model, tx, objective, draw, preprocess, momentum, microbatches,
            lambda grads: jax.lax.with_sharding_constraint(grads, at), frozen,
        )
        return sharding.use(layout)(made)

    train_step = make_step(tx)
    return Parts(
        mesh=mesh,
        data=data,
        preprocessing=prepare,
        tokenizer=tokens,
        objective=objective,
        model=model,
        schedule=optim.schedule(optim_config, config.steps),
        init=init,
        abstract=abstract,
        make_step=make_step,
        step=train_step,
        compiled=step.compile_step(train_step, abstract, mesh),
    )
