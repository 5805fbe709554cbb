"""Config -> the parts of a run. What training, evaluation and planning have in common."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh

from xclip_jax.config.schema import Config, resolve
from xclip_jax.data import tokenizer, transforms
from xclip_jax.data.loader import DataConfig
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.models.two_towers import TwoTowers
from xclip_jax.objectives import Objective, make_objective
from xclip_jax.parallel import sharding
from xclip_jax.parallel.mesh import AXES, check_batch, make_mesh
from xclip_jax.train import optim, state, step


@dataclasses.dataclass(frozen=True)
class Parts:
    """Everything of a run that follows from its config and its devices."""

    config: Config
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
    def image_size(self) -> int:
        """Side of an image, pixels."""
        return self.model.img["image_size"]

    @property
    def context_length(self) -> int:
        """Tokens of a text."""
        return self.model.txt["context_length"]


def make_model(config: Config, objective: Objective, tokens: tokenizer.Tokenizer) -> TwoTowers:
    """The towers with the heads that `objective` needs and the vocabulary of `tokens`."""
    model = config.model
    return TwoTowers(
        img=dataclasses.asdict(model.img),
        txt=dataclasses.asdict(model.txt) | {"vocab": tokens.vocab_size, "eot_id": tokens.eot_id},
        heads=objective.heads(model, tokens.vocab_size),
        towers=objective.towers,
        dtype=jnp.dtype(model.dtype),
    )


def build(config: ml_collections.ConfigDict | Config, devices: list[jax.Device] | None = None) -> Parts:
    """All parts, on `devices` (default: all). Nothing is computed yet but shapes.

    Raises:
      UserError: names every key whose value is not allowed, or what does not fit the devices.
    """
    config = resolve(config)
    mesh = make_mesh({axis: getattr(config.mesh, axis) for axis in AXES}, devices)
    strategy, data, ema = config.mesh.strategy, config.data, config.ema
    layout = sharding.Layout(mesh, strategy)
    microbatches = config.optim.microbatches
    check_batch(data.batch, mesh, parts=microbatches, parts_key="optim.microbatches")
    if config.loss.chunk_size:
        check_batch(config.loss.chunk_size, mesh, "loss.chunk_size")
    objective = make_objective(config.objective, config.loss, mesh)
    prepare = Preprocessing.from_config(dataclasses.asdict(config))
    tokens = tokenizer.load(data.tokenizer)
    model = make_model(config, objective, tokens)
    frozen = tuple(config.init.frozen)
    tx = optim.make_optimizer(config.optim, config.steps, frozen)
    init = state.init_fn(
        model,
        tx,
        image_size=config.model.img.image_size,
        text_length=config.model.txt.context_length,
        loss_state=objective.initial_state(config.model, tokens.vocab_size),
        ema=ema.on or objective.teacher,
        seed=config.seed,
    )

    patches = (config.model.img.image_size // config.model.img.patch) ** 2

    def draw(key: jax.Array, batch: dict[str, jax.Array]) -> dict[str, Any]:
        if "image" not in batch:
            return batch
        b, (key_image, key_patches) = len(batch["image"]), jax.random.split(key)
        inputs = batch | transforms.sample_augmentations(key_image, b, flip=data.flip_prob, color=data.color_jitter)
        inputs = objective.draw(key, inputs, config.model.img.image_size)
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
            model,
            tx,
            objective,
            draw,
            preprocess,
            momentum,
            microbatches,
            lambda grads: jax.lax.with_sharding_constraint(grads, at),
            frozen,
        )
        return sharding.use(layout)(made)

    train_step = make_step(tx)
    return Parts(
        config=config,
        mesh=mesh,
        data=data,
        preprocessing=prepare,
        tokenizer=tokens,
        objective=objective,
        model=model,
        schedule=optim.schedule(config.optim, config.steps),
        init=init,
        abstract=abstract,
        make_step=make_step,
        step=train_step,
        compiled=step.compile_step(train_step, abstract, mesh),
    )
