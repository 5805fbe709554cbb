"""Build an experiment from a config: mesh, objective, model, optimizer, state and step."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh

from xclip_jax import optim
from xclip_jax.config.schema import Config, resolve
from xclip_jax.data import tokenizer
from xclip_jax.data.length_groups import WHOLE, LengthGroups
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.evaluators import prompts
from xclip_jax.evaluators.encoder import Encoder
from xclip_jax.evaluators.prompts import PROFILES, Profile
from xclip_jax.models.two_towers import TOWERS, ModelConfig, TwoTowers
from xclip_jax.objectives import Objective, make_objective
from xclip_jax.parallel import compiler, sharding
from xclip_jax.parallel.mesh import AXES, batch_sharding, batch_shards, check_batch, make_mesh, replicated
from xclip_jax.train import state
from xclip_jax.train.step import BatchNoise, TrainStep

if TYPE_CHECKING:
    from xclip_jax.data.loader import Transform


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Model, objective, optimizer and step for a config on devices, made by `build`."""

    config: Config
    layout: sharding.MeshLayout
    preprocessing: Preprocessing
    tokenizer: tokenizer.Tokenizer
    objective: Objective
    model: TwoTowers
    schedule: optim.Schedule
    init: Callable[..., state.TrainState]
    abstract: state.TrainState
    tx: optax.GradientTransformation
    batch_noise: BatchNoise
    length_groups: LengthGroups = WHOLE

    @property
    def mesh(self) -> Mesh:
        """The devices."""
        return self.layout.mesh

    @functools.cached_property
    def step(self) -> Callable[..., Any]:
        """(state, batch) -> (state, metrics), as a pure function."""
        config = self.config
        ema = config.ema
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract.params)
        if self.layout.strategy == "zero1":
            shardings = sharding.zero1_shardings(self.abstract.params, shardings, self.mesh)
        train_step = TrainStep(
            self.model,
            self.tx,
            self.objective,
            self.batch_noise,
            lambda step: optim.ema_momentum(step, config.steps, ema.start),
            config.optim.microbatches,
            lambda grads: jax.lax.with_sharding_constraint(grads, shardings),
            tuple(config.init.freeze),
            text_groups=self.length_groups.sizes(self.text_rows[0], self.context_length),
            steps=config.steps,
        )
        return sharding.layout_scope(self.layout)(train_step.step)

    @functools.cached_property
    def compiled(self) -> Any:
        """`step` under `jax.jit`: the state is donated and stays in its layout, the batch is sharded over the mesh."""
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract)
        return jax.jit(
            self.step,
            in_shardings=(shardings, batch_sharding(self.mesh)),
            out_shardings=(shardings, replicated(self.mesh)),
            donate_argnums=0,
            compiler_options=dict(compiler.options(list(self.mesh.devices.flat))),
        )

    @property
    def text_rows(self) -> tuple[int, int]:
        """(texts per device and microbatch, number of such groups in a step)."""
        draws = batch_shards(self.mesh) * self.config.optim.microbatches
        return self.config.data.batch // draws, draws

    def transform(self) -> "Transform":
        """Return the transform from records to rows of a batch with the objective's fields."""
        from xclip_jax.data.loader import Transform  # imports Grain for a quarter of a second, only for training

        fields = (*self.objective.fields, *["negatives"] * bool(self.config.data.negatives))
        return Transform(
            self.config.data, self.image_size, self.tokenizer, self.context_length, fields, self.objective.columns
        )

    @property
    def num_parameters(self) -> int:
        """Parameters of towers and heads; adapters count as part of their kernels."""
        return sum(x.size for x in jax.tree.leaves(self.abstract.variables()["params"]))

    @property
    def image_size(self) -> int:
        """Side of an image, pixels."""
        return self.model.img.image_size

    @property
    def context_length(self) -> int:
        """Tokens of a text."""
        return self.model.txt.context_length


def make_model(model: ModelConfig, objective: Objective, tokens: tokenizer.Tokenizer) -> TwoTowers:
    """The towers with the heads that `objective` needs and the vocabulary of `tokens`."""
    return TwoTowers(
        img=model.tower("img"),
        txt=model.tower("txt"),
        vocab=tokens.vocab_size,
        eot_id=tokens.eot_id,
        heads=objective.heads(model, tokens.vocab_size),
        towers=objective.towers,
        dtype=jnp.dtype(model.dtype),
    )


def build(
    config: ml_collections.ConfigDict | Config,
    devices: list[jax.Device] | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> Experiment:
    """Build an experiment on `devices` (default: all); only shapes are computed. `optimizer` replaces the config's.

    Raises:
      UserError: names every key with a forbidden value, or the part that exceeds the devices.
    """
    config = resolve(config)
    mesh = make_mesh({axis: getattr(config.mesh, axis) for axis in AXES}, devices)
    check_batch(config.data.batch, mesh, microbatches=config.optim.microbatches)
    if config.loss.chunk_size:
        check_batch(config.loss.chunk_size, mesh, "loss.chunk_size")
    objective = make_objective(config.objective, config.loss)
    preprocessing = Preprocessing.from_config(config)
    tokens = tokenizer.load(config.data.tokenizer)
    model = make_model(config.model, objective, tokens)
    towers = {name: getattr(model, name) for name in TOWERS}
    fixed = objective.towers if config.finetune.lora.rank else tuple(config.init.freeze)
    tx = optim.make_optimizer(config.optim, config.steps, towers) if optimizer is None else optimizer
    tx = optim.freeze(tx, fixed) if fixed else tx
    init = state.init_fn(
        model,
        tx,
        loss_state=objective.initial_state(config.model, tokens.vocab_size),
        ema=config.ema.momentum > 0 or objective.teacher,
        seed=config.seed,
        adapters=config.finetune.lora,
    )
    boxed = jax.eval_shape(init)
    layout = sharding.make_layout(boxed, mesh, config.mesh.strategy, config.data.batch)
    return Experiment(
        config=config,
        layout=layout,
        preprocessing=preprocessing,
        tokenizer=tokens,
        objective=objective,
        model=model,
        schedule=optim.schedule(config.optim, config.steps),
        init=init,
        abstract=state.abstract(boxed, layout),
        tx=tx,
        batch_noise=BatchNoise(config.data, preprocessing, objective, towers),
    )


def make_encoder(experiment: Experiment, classes: Sequence[str] | None = None) -> Encoder:
    """Return an encoder of the model in `experiment`; `classes` are the names of a fine-tuned model's classes."""
    return Encoder(
        experiment.model,
        experiment.tokenizer,
        experiment.preprocessing,
        experiment.mesh,
        experiment.objective.similarities,
        batches=(experiment.config.eval.batch,),
        classes=classes,
    )


def profile_of_run(config: Config, name: str = "openai", changes: Mapping[str, Any] | None = None) -> Profile:
    """Return the profile `name` with `changes` to its fields, and a run's templates and class names elsewhere."""
    changes = changes or {}
    class_names = "" if "names" in changes else config.eval.class_names
    own = {"templates": tuple(config.eval.templates), "names": prompts.read_class_names(class_names)}
    return dataclasses.replace(PROFILES[name], **{**own, **changes})
