"""The train step: a pure function of (state, batch), compiled once for the whole mesh."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import optax
from jax.sharding import Mesh

from xclip_jax.losses.noncontrastive import effective_rank
from xclip_jax.objective import Objective
from xclip_jax.optim import project_scale
from xclip_jax.parallel.mesh import batch_sharding, replicated
from xclip_jax.state import TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def make_train_step(
    model: nn.Module,
    tx: optax.GradientTransformation,
    objective: Objective,
    preprocess: Callable[[jax.Array, jax.Array], jax.Array],
    momentum: Callable[[jax.Array], Any] | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The step as a pure function, not yet compiled.

    Args:
      model: a `TwoTowers`.
      tx: the optimizer.
      objective: what is minimised.
      preprocess: (uint8 images, key) -> normalised, augmented images.
      momentum: of the parameters' moving average, as a function of the step; needed where the state has one.

    Returns:
      step(state, {"image": uint8 (b, h, w, 3), "text": int32 (b, n)}) -> (state, metrics); the metrics are those of
      the parameters before the update.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key_image, key_dropout = jax.random.split(jax.random.fold_in(jax.random.key(state.seed), state.step))
        image, text = preprocess(batch["image"], key_image), batch["text"]
        # Encoders and heads are applied apart: the heads, with BatchNorm, and the losses are defined on the whole
        # batch, while the encoders may be run on parts of it.
        teacher = _teacher(model, state, image, text) if objective.teacher else None

        def loss_fn(params: Any) -> tuple[jax.Array, Any]:
            encoders = {"params": params}
            h_img = model.apply(encoders, image, train=True, rngs={"dropout": key_dropout}, method="encode_image")
            h_txt = model.apply(encoders, text, method="encode_text")
            variables = encoders | {"batch_stats": state.batch_stats}
            out, moved = model.apply(variables, h_img, h_txt, train=True, mutable=["batch_stats"], method="project")
            loss, metrics, loss_state = objective(out, teacher, state.loss_state)
            metrics |= {"rank/img": effective_rank(h_img), "rank/txt": effective_rank(h_txt)}
            return loss, (metrics, moved.get("batch_stats", {}), loss_state)

        grads, (metrics, batch_stats, loss_state) = jax.grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = project_scale(optax.apply_updates(state.params, updates))
        ema_params = state.ema_params
        if ema_params is not None:
            ema_params = optax.incremental_update(params, ema_params, 1 - momentum(state.step))
        metrics |= {"grad_norm": optax.tree.norm(grads), "param_norm": optax.global_norm(params)}
        new = state.replace(
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            ema_params=ema_params,
            loss_state=loss_state,
        )
        return new, metrics

    return step


def _teacher(model: nn.Module, state: TrainState, image: jax.Array, text: jax.Array) -> dict[str, jax.Array]:
    """Outputs of the averaged parameters on the same batch: all patches, and the batch's own BatchNorm statistics."""
    params = {"params": jax.lax.stop_gradient(state.ema_params)}
    h_img = model.apply(params, image, method="encode_image")
    h_txt = model.apply(params, text, method="encode_text")
    variables = params | {"batch_stats": state.batch_stats}
    out, _ = model.apply(variables, h_img, h_txt, train=True, mutable=["batch_stats"], method="project")
    return out


def compile_step(
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]], abstract: TrainState, mesh: Mesh
) -> Any:
    """`step` under `jax.jit`: state sharded as `abstract` says and donated, batch over the mesh, metrics everywhere."""
    state_shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(
        step,
        in_shardings=(state_shardings, batch_sharding(mesh)),
        out_shardings=(state_shardings, replicated(mesh)),
        donate_argnums=0,
    )
