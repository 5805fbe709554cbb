"""The train step: a pure function of (state, batch), compiled once for the whole mesh."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from xclip_jax.losses.noncontrastive import effective_rank
from xclip_jax.models.two_towers import TOWERS, TwoTowers
from xclip_jax.objectives import Objective
from xclip_jax.parallel import compiler, sharding
from xclip_jax.parallel.mesh import batch_sharding, replicated
from xclip_jax.train import gradcache, guard
from xclip_jax.train.augment import NOISE, Augment
from xclip_jax.train.length_groups import LengthOrder, Sizes
from xclip_jax.train.state import TrainState

Batch = dict[str, jax.Array]
Inputs = dict[str, Any]
Metrics = dict[str, jax.Array]
Features = tuple[Any, Any]  # h_img and h_txt; None of a tower that the model does not have


@dataclasses.dataclass(frozen=True, eq=False)
class TrainStep:
    """What a step needs beside state and batch, and the step itself, `step`, as a pure function; not yet compiled.

    Attributes:
      model: the towers and heads.
      tx: the optimizer.
      objective: what is minimised.
      augment: samples what is random in a batch.
      momentum: of the parameters' moving average, as a function of the step; needed where the state has one.
      microbatches: see `gradcache`.
      constrain_grads: holds gradients to the layout that the optimizer works in.
      frozen: towers whose gradient is zero and is not computed.
      spikes: refuses steps of a gradient that is too large, if there is such a bound.
      text_groups: ((rows, tokens), ...) in which a device encodes the texts of a microbatch, see `length_groups`; none
        where texts are not cut.
    """

    model: TwoTowers
    tx: optax.GradientTransformation
    objective: Objective
    augment: Augment
    momentum: Callable[[jax.Array], Any]
    microbatches: int = 1
    constrain_grads: Callable[[Any], Any] = lambda grads: grads
    frozen: tuple[str, ...] = ()
    spikes: guard.SpikeFilter | None = None
    text_groups: Sizes = ()

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """(state, {"image": uint8 (b, h, w, 3), "text": int32 (b, n)}) -> (state, metrics).

        The metrics are those of the parameters before the update, but for "update_norm". Where the loss, the gradients
        or running values are not finite, only the step is counted, and metric "skipped" is true; an update is finite
        where these are, by the bounds of group `optim`. A batch has what `objective.fields` says.
        """
        key = jax.random.fold_in(jax.random.key(state.seed), state.step)
        inputs = self.augment.sample(key, batch)
        (value, (metrics, batch_stats, ema_batch_stats, loss_state)), grads = self._gradients(state, inputs)
        grads = self.constrain_grads(grads)
        norms = {"grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(state.params)}
        accept = guard.all_finite(value, norms, batch_stats, ema_batch_stats, loss_state)
        if self.spikes:
            calm, metrics["grad_norm_mean"], moved = self.spikes(state.loss_state, norms["grad_norm"])
            accept, loss_state = accept & calm, loss_state | moved

        def update() -> tuple[TrainState, jax.Array]:
            updates, opt_state = self.tx.update(grads, state.opt_state, state.params)
            params = self.objective.constrain(optax.apply_updates(state.params, updates))
            ema_params, new_ema_batch_stats = self._average(state, params, batch_stats, ema_batch_stats)
            new = dataclasses.replace(
                state,
                params=params,
                batch_stats=batch_stats,
                opt_state=opt_state,
                ema_params=ema_params,
                ema_batch_stats=new_ema_batch_stats,
                loss_state=loss_state,
            )
            return new, optax.tree.norm(updates)

        # A branch costs nothing, where a choice between the old and the new values is a pass over both.
        new, update_norm = jax.lax.cond(accept, update, lambda: (state, jnp.zeros(())))
        new = guard.at_step(new, state.step + 1)
        return new, metrics | norms | {"update_norm": update_norm, "skipped": ~accept}

    def _gradients(self, state: TrainState, inputs: Inputs) -> tuple[tuple[jax.Array, Any], Any]:
        """((loss, (metrics, batch_stats, ema_batch_stats, loss_state)), gradients), with texts cut where they fit."""
        if not self.text_groups:
            return self._differentiate(state, inputs, None)
        order = LengthOrder.from_tokens(inputs["text"], self.model.eot_id, self.text_groups, self.microbatches)
        # One of the two is computed, the same on all devices.
        (value, (metrics, *rest)), grads = jax.lax.cond(
            order.fits,
            lambda: self._differentiate(state, inputs, order),
            lambda: self._differentiate(state, inputs, None),
        )
        return (value, (metrics | {"text/cut": order.fits.astype(jnp.float32)}, *rest)), grads

    def _differentiate(
        self, state: TrainState, inputs: Inputs, order: LengthOrder | None
    ) -> tuple[tuple[jax.Array, Any], Any]:
        """The same as `_gradients`, with texts in the groups of `order`, or whole."""
        teacher, ema_batch_stats = self._teach(state, inputs, order) if self.objective.teacher else (None, None)

        # Encoders and heads are applied apart: the heads, with BatchNorm, and the losses are defined on the whole
        # batch, while the encoders may be run on parts of it.
        def loss(params: Any, h: Features) -> tuple[jax.Array, Any]:
            h = _joined(h, order)
            out, batch_stats = self._project(params, state.batch_stats, h)
            features = {name: x for name, x in zip(("img", "txt"), h, strict=True) if x is not None}
            out |= {f"h_{name}": x for name, x in features.items()}
            value, metrics, loss_state = self.objective(out, teacher, state.loss_state, inputs)
            metrics |= {f"rank/{name}": effective_rank(x) for name, x in features.items()}
            return value, (metrics, batch_stats, ema_batch_stats, loss_state)

        value_and_grad = gradcache.value_and_grad(self._encode, loss, self.microbatches)
        return value_and_grad(state.params, _grouped(inputs, order))

    def _encode(self, params: Any, inputs: Inputs) -> Features:
        """Features; those of texts as a tuple where the texts are groups."""
        variables = {"params": params | {tower: jax.lax.stop_gradient(params[tower]) for tower in self.frozen}}
        noise = {"img": {}, "txt": {}} | inputs.get(NOISE, {})
        h_img = h_txt = None
        if "img" in self.objective.towers:
            images = self.augment.apply(inputs)
            h_img = self.model.apply(variables, images, **noise["img"], method="encode_image")
        overlaps = sharding.platform() == "tpu" and self.objective.towers == TOWERS
        if overlaps and "txt" in params and "txt" not in self.frozen:
            # Texts go first in the backward pass: the gradient of the token table, the largest sum over devices of all,
            # is summed while gradients of images are computed.
            h_img, variables["params"]["txt"] = compiler.ordered_after_small(h_img, variables["params"]["txt"])
        if "txt" in self.objective.towers:
            h_txt = jax.tree.map(
                lambda text, *noises: self.model.apply(
                    variables, text, **dict(zip(noise["txt"], noises, strict=True)), method="encode_text"
                ),
                inputs["text"],
                *noise["txt"].values(),
            )
        if overlaps:
            # The compiler would spread a gather of one tower's features over all operations of the other.
            h_img, h_txt = jax.lax.optimization_barrier((h_img, h_txt))
        return h_img, h_txt

    def _project(self, params: Any, batch_stats: Any, h: Features) -> tuple[dict[str, Any], Any]:
        """What the heads write, and the new statistics of BatchNorm."""
        variables = {"params": params, "batch_stats": batch_stats}
        logits = not self.objective.loss.chunk_size
        out, new = self.model.apply(variables, *h, train=True, logits=logits, mutable=["batch_stats"], method="project")
        return out, new.get("batch_stats", {})

    def _teach(self, state: TrainState, inputs: Inputs, order: LengthOrder | None) -> tuple[dict[str, Any], Any]:
        """What the moving average makes of the batch: without random inputs of towers, with statistics of its own."""
        params = jax.lax.stop_gradient(state.ema_params)
        inputs = {key: value for key, value in inputs.items() if key != NOISE}
        h = gradcache.encode_microbatches(self._encode, params, _grouped(inputs, order), self.microbatches)
        return self._project(params, state.ema_batch_stats, _joined(h, order))

    def _average(self, state: TrainState, params: Any, batch_stats: Any, ema_batch_stats: Any) -> tuple[Any, Any]:
        """The moving average after the step: parameters and statistics, of which a teacher has made its own already."""
        if state.ema_params is None:
            return None, ema_batch_stats
        rate = 1 - self.momentum(state.step)
        ema_params = optax.incremental_update(params, state.ema_params, rate)
        if not self.objective.teacher:
            ema_batch_stats = optax.incremental_update(batch_stats, state.ema_batch_stats, rate)
        return ema_params, ema_batch_stats


def _grouped(inputs: Inputs, order: LengthOrder | None) -> Inputs:
    """`inputs` with a tuple of groups in place of texts, and of their tower's random inputs."""
    if order is None:
        return inputs
    noise = inputs.get(NOISE, {})
    split = {name: order.split(x) for name, x in noise.get("txt", {}).items()}
    return inputs | {"text": order.split(inputs["text"], cut=True), NOISE: noise | {"txt": split}}


def _joined(h: Features, order: LengthOrder | None) -> Features:
    """Features with those of texts in the order of the batch."""
    return h if order is None else (h[0], order.join(h[1]))


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
        compiler_options=dict(compiler.options(list(mesh.devices.flat))),
    )
