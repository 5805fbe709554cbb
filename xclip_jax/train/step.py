"""The train step: a pure function of (state, batch), compiled once for the whole mesh."""

from collections.abc import Callable, Collection
from typing import Any

import flax.linen as nn
import jax
import optax
from jax.sharding import Mesh

from xclip_jax.losses.rank import effective_rank
from xclip_jax.objectives import Objective
from xclip_jax.parallel.mesh import batch_sharding, replicated
from xclip_jax.train import gradcache
from xclip_jax.train.optim import project_scale
from xclip_jax.train.state import TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
Features = tuple[jax.Array | None, jax.Array | None]  # of images and of texts


def make_train_step(
    model: nn.Module,
    tx: optax.GradientTransformation,
    objective: Objective,
    draw: Callable[[jax.Array, Batch], Batch],
    preprocess: Callable[[Batch], jax.Array],
    momentum: Callable[[jax.Array], Any] | None = None,
    microbatches: int = 1,
    keep: Callable[[Any], Any] = lambda grads: grads,
    frozen: Collection[str] = (),
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The step as a pure function, not yet compiled.

    Args:
      model: a `TwoTowers`.
      tx: the optimizer.
      objective: what is minimised.
      draw: (key, batch) -> inputs, the batch with all that is random of it: arrays with a row for each sample.
      preprocess: inputs, or some of their rows -> normalised, augmented images.
      momentum: of the parameters' moving average, as a function of the step; needed where the state has one.
      microbatches: see `gradcache`.
      keep: holds gradients to the layout that the optimizer works in.
      frozen: towers whose gradient is zero and is not computed.

    Returns:
      step(state, {"image": uint8 (b, h, w, 3), "text": int32 (b, n)}) -> (state, metrics); the metrics are those of
      the parameters before the update, but for "update_norm", which is not finite where the new parameters are not. A
      batch has what `objective.fields` says.
    """

    def encode(params: Any, inputs: Batch) -> Features:
        variables = {"params": params | {tower: jax.lax.stop_gradient(params[tower]) for tower in frozen}}
        h_img = h_txt = None
        if "img" in objective.towers:
            dropped = (inputs.get("patches"), inputs.get("paths"))
            h_img = model.apply(variables, preprocess(inputs), *dropped, method="encode_image")
        if "txt" in objective.towers:
            h_txt = model.apply(variables, inputs["text"], method="encode_text")
        return h_img, h_txt

    def project(params: Any, batch_stats: Any, h: Features) -> tuple[Batch, Any]:
        variables = {"params": params, "batch_stats": batch_stats}
        out, moved = model.apply(
            variables, *h, train=True, logits=not objective.loss.chunk_size, mutable=["batch_stats"], method="project"
        )
        return out, moved.get("batch_stats", {})

    def teacher_forward(state: TrainState, inputs: Batch) -> tuple[Batch, Any]:
        # The average sees all patches and blocks, and normalises by the batch's own statistics.
        params = jax.lax.stop_gradient(state.ema_params)
        inputs = {key: value for key, value in inputs.items() if key not in ("patches", "paths")}
        h = gradcache.in_parts(encode, params, inputs, microbatches)
        return project(params, state.ema_batch_stats, h)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(state.seed), state.step)
        inputs = draw(key, batch)
        teacher, ema_batch_stats = teacher_forward(state, inputs) if objective.teacher else (None, None)

        # Encoders and heads are applied apart: the heads, with BatchNorm, and the losses are defined on the whole
        # batch, while the encoders may be run on parts of it.
        def loss(params: Any, h: Features) -> tuple[jax.Array, Any]:
            out, batch_stats = project(params, state.batch_stats, h)
            features = {name: x for name, x in zip(("img", "txt"), h, strict=True) if x is not None}
            out |= {f"h_{name}": x for name, x in features.items()}
            value, metrics, loss_state = objective(out, teacher, state.loss_state, inputs)
            metrics |= {f"rank/{name}": effective_rank(x) for name, x in features.items()}
            return value, (metrics, batch_stats, loss_state)

        differentiate = gradcache.value_and_grad(encode, loss, microbatches)
        (_, (metrics, batch_stats, loss_state)), grads = differentiate(state.params, inputs)
        grads = keep(grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = project_scale(optax.apply_updates(state.params, updates))
        ema_params = state.ema_params
        if ema_params is not None:
            rate = 1 - momentum(state.step)
            ema_params = optax.incremental_update(params, ema_params, rate)
            if not objective.teacher:  # whose own forward pass has made statistics already
                ema_batch_stats = optax.incremental_update(batch_stats, state.ema_batch_stats, rate)
        metrics |= {
            "grad_norm": optax.tree.norm(grads),
            "update_norm": optax.tree.norm(updates),
            "param_norm": optax.tree.norm(state.params),
        }
        new = state.replace(
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            ema_params=ema_params,
            ema_batch_stats=ema_batch_stats,
            loss_state=loss_state,
        )
        return new, metrics

    return step


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
