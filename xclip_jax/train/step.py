"""The train step: a pure function of (state, batch), compiled once for the whole mesh."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from xclip_jax import optim
from xclip_jax.data import transforms
from xclip_jax.data.config import DataConfig
from xclip_jax.data.length_groups import LengthOrder, Sizes
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.losses.noncontrastive import effective_rank
from xclip_jax.models import lora
from xclip_jax.models.tower import Tower
from xclip_jax.models.two_towers import TOWERS, TwoTowers
from xclip_jax.objectives import Objective
from xclip_jax.parallel import compiler, sharding
from xclip_jax.train.state import TrainState

NOISE = "noise"  # key of {tower: its random inputs} among the inputs of a step


@dataclasses.dataclass(frozen=True)
class BatchNoise:
    """Samples the random inputs of a whole batch, which can then be applied to any part of it.

    The objective and the towers ({"img", "txt"}) add random inputs, such as mixup partners and dropped branches.
    """

    data: DataConfig
    preprocessing: Preprocessing
    objective: Objective
    towers: Mapping[str, Tower]

    def sample(self, random_key: jax.Array, batch: dict[str, jax.Array]) -> dict[str, Any]:
        """Return the batch with its random inputs, arrays with one row per sample.

        Each use folds another number into the step's key: 0 flips and colours, 1 mixup, 2 stochastic depth, 3 the text
        tower, above 15 custom terms and shuffled targets.
        """
        b = len(next(iter(batch.values())))
        inputs = dict(batch)
        if "image" in batch:
            key = jax.random.fold_in(random_key, 0)
            inputs |= transforms.sample_augmentations(key, b, flip=self.data.flip_prob, color=self.data.color_jitter)
        inputs = self.objective.draw(random_key, inputs, self.preprocessing.size)
        keys = {"img": random_key, "txt": jax.random.fold_in(random_key, 3)}
        noise = {name: self.towers[name].sample_noise(keys[name], b) for name in self.objective.towers}
        if "negatives" in batch:  # each caption and its k negatives, (b, 1 + k, n)
            inputs["texts"] = jnp.concatenate([batch["text"][:, None], batch["negatives"]], axis=1)
            drawn = self.towers["txt"].sample_noise(keys["txt"], inputs["texts"].shape[1] * b)
            noise["txt"] = {name: x.reshape(b, -1, *x.shape[1:]) for name, x in drawn.items()}
        return inputs | {NOISE: noise}

    def apply(self, inputs: dict[str, Any]) -> jax.Array:
        """Return the normalised, augmented images (b, h, w, 3) of inputs or some of their rows."""
        images = transforms.augment(inputs["image"], inputs)
        images = transforms.normalize(images, self.preprocessing.mean, self.preprocessing.std)
        return transforms.mix(images, self.apply(inputs["other"]), inputs) if "other" in inputs else images


def all_finite(*trees: Any) -> jax.Array:
    """Whether all floating-point values of `trees` are finite, bool ()."""
    floats = [x for x in jax.tree.leaves(trees) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(x).all() for x in floats]).all()


def _is_schedule(node: Any) -> bool:
    """Whether this is the state of a schedule in optax, for learning rate or weight decay: a counter."""
    return getattr(node, "_fields", ()) == ("count",)


def with_step(state: TrainState, step: int | jax.Array) -> TrainState:
    """Return `state` with another step in its own counter, and with its schedules moved by the difference.

    The schedules of a user's optimizer may have counted fewer steps than `state.step`, such as in `optax.MultiSteps`.
    """

    def move(node: Any) -> Any:
        if not _is_schedule(node):
            return node
        return node._replace(count=node.count + jnp.asarray(step - state.step, node.count.dtype))

    return dataclasses.replace(
        state,
        step=jnp.full_like(state.step, step),
        opt_state=jax.tree.map(move, state.opt_state, is_leaf=_is_schedule),
    )


Batch = dict[str, jax.Array]
Inputs = dict[str, Any]
Metrics = dict[str, jax.Array]
Features = tuple[Any, ...]  # h_img and h_txt, None for a missing tower; of negatives (b * k, d)


@dataclasses.dataclass(frozen=True, eq=False)
class TrainStep:
    """The train step as a pure function, `step`, and everything it needs besides state and batch.

    Attributes:
      momentum: momentum of the parameters' moving average as a function of the step.
      microbatches: see `_features`.
      constrain_grads: constrains gradients to the optimizer's layout.
      frozen: towers that do not change.
      steps: updates of the whole run; terms get the fraction done as "progress".
      text_groups: ((rows, tokens), ...) per device and microbatch, see `length_groups`; empty if texts are not cut.
    """

    model: TwoTowers
    tx: optax.GradientTransformation
    objective: Objective
    batch_noise: BatchNoise
    momentum: Callable[[jax.Array], Any]
    microbatches: int = 1
    constrain_grads: Callable[[Any], Any] = lambda grads: grads
    frozen: tuple[str, ...] = ()
    text_groups: Sizes = ()
    steps: int = 1

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Update the state on a batch of the fields `objective.fields`, such as {"image": uint8 (b, h, w, 3)}.

        All metrics but "update_norm" belong to the parameters before the update. If the loss, the gradients or running
        values are not finite, only the step is counted, and the metric "skipped" is true; otherwise the update is
        finite, by the bounds of group `optim`.
        """
        key = jax.random.fold_in(jax.random.key(state.seed), state.step)
        inputs = self.batch_noise.sample(key, batch)
        (value, (metrics, batch_stats, ema_batch_stats, loss_state)), grads = self._gradients(state, inputs)
        grads = self.constrain_grads(grads)
        norms = {"grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(state.params)}
        accept = all_finite(value, norms, batch_stats, ema_batch_stats, loss_state)

        def update() -> tuple[TrainState, jax.Array]:
            updates, opt_state = self.tx.update(grads, state.opt_state, state.params)
            params = self.objective.constrain(optax.apply_updates(state.params, updates))
            new = dataclasses.replace(
                state, params=params, batch_stats=batch_stats, opt_state=opt_state, loss_state=loss_state
            )
            if state.ema_params is not None:
                rate = 1 - self.momentum(state.step)
                # A teacher's pass has already averaged the statistics.
                teacher = self.objective.teacher
                average = optax.incremental_update
                new = dataclasses.replace(
                    new,
                    ema_params=average(params, state.ema_params, rate),
                    ema_batch_stats=ema_batch_stats if teacher else average(batch_stats, state.ema_batch_stats, rate),
                )
            return new, optax.tree.norm(updates)

        # A branch costs nothing; a choice between old and new values would be a pass over both.
        new, update_norm = jax.lax.cond(accept, update, lambda: (with_step(state, state.step + 1), jnp.zeros(())))
        new = dataclasses.replace(new, step=state.step + 1)
        return new, metrics | norms | {"update_norm": update_norm, "skipped": ~accept}

    def _gradients(self, state: TrainState, inputs: Inputs) -> tuple[tuple[jax.Array, Any], Any]:
        """Return ((loss, (metrics, batch_stats, ema_batch_stats, loss_state)), gradients), of cut texts if they fit."""
        if not self.text_groups:
            return self._differentiate(state, inputs, None)
        texts = inputs.get("texts", inputs["text"])
        order = LengthOrder.from_tokens(texts, self.model.eot_id, self.text_groups, self.microbatches)
        # All devices compute the same branch.
        (value, (metrics, *rest)), grads = jax.lax.cond(
            order.fits,
            lambda: self._differentiate(state, inputs, order),
            lambda: self._differentiate(state, inputs, None),
        )
        return (value, (metrics | {"text/cut": order.fits.astype(jnp.float32)}, *rest)), grads

    def _differentiate(
        self, state: TrainState, inputs: Inputs, order: LengthOrder | None
    ) -> tuple[tuple[jax.Array, Any], Any]:
        """See `_gradients`; texts are in the groups of `order`, or whole."""
        teacher, ema_batch_stats = self._teach(state, inputs, order) if self.objective.teacher else (None, None)

        def loss(params: Any) -> tuple[jax.Array, Any]:
            h = self._features(params, inputs, order)
            out, batch_stats = self._project(params, state.batch_stats, h)
            features = {name: x for name, x in zip(("img", "txt"), h, strict=False) if x is not None}
            out |= {f"h_{name}": x for name, x in features.items()}
            value, metrics, loss_state = self.objective(out, teacher, state.loss_state, self._batch(state, inputs))
            metrics |= {f"rank/{name}": effective_rank(x) for name, x in features.items()}
            return value, (metrics, batch_stats, ema_batch_stats, loss_state)

        return jax.value_and_grad(loss, has_aux=True)(state.params)

    def _batch(self, state: TrainState, inputs: Inputs) -> Inputs:
        """Inputs of the terms, see `Term.__call__`; unread ones are not computed."""
        ends = {"text_end": jnp.argmax(inputs["text"] == self.model.eot_id, axis=1)} if "text" in inputs else {}
        return inputs | ends | {"progress": state.step / self.steps}

    def _features(self, params: Any, inputs: Inputs, order: LengthOrder | None) -> Features:
        """Return the features of the whole batch, encoded in `microbatches` parts: GradCache (arXiv 2101.06983).

        With several parts only the features are kept, and the backward pass encodes each part again. Heads, with
        BatchNorm over the global batch, and losses see all features at once, so the gradient equals the whole batch's
        up to rounding. The mean of the parts' gradients would belong to another objective: contrastive losses compare
        pairs across parts, and nCLIP's smoothness is the entropy of a mean. All randomness is in `inputs`.
        """
        inputs = inputs | {"text": inputs.get("texts", inputs.get("text"))}
        if order is not None:  # groups the texts, and the random inputs of their tower
            noise = inputs.get(NOISE, {})
            split = {name: order.split(x) for name, x in noise.get("txt", {}).items()}
            inputs = inputs | {"text": order.split(inputs["text"], cut=True), NOISE: noise | {"txt": split}}
        if self.microbatches > 1:
            h_img, h_txt = sharding.map_microbatches(self._encode, params, inputs, self.microbatches)
        else:
            h_img, h_txt = self._encode(params, inputs)
        h_txt = h_txt if order is None else order.join(h_txt)
        if "texts" not in inputs:
            return h_img, h_txt
        return h_img, h_txt[:, 0], h_txt[:, 1:].reshape(-1, h_txt.shape[-1])

    def _encode(self, params: Any, inputs: Inputs) -> Features:
        """Return the features h_img and, of texts (..., n), h_txt (..., d); a tuple if the texts are in groups."""
        merged: Any = lora.merged(params)
        if self.frozen:
            merged = optim.stop_frozen(merged, self.frozen)
        variables = {"params": merged}
        noise = {"img": {}, "txt": {}} | inputs.get(NOISE, {})
        h_img = h_txt = None
        if "img" in self.objective.towers:
            images = self.batch_noise.apply(inputs)
            h_img = self.model.apply(variables, images, **noise["img"], method="encode_image")
        overlaps = sharding.platform() == "tpu" and self.objective.towers == TOWERS
        if overlaps and "txt" in params and "txt" not in self.frozen:
            # Texts go first in the backward pass: the gradient of the token table, the largest sum over devices, is
            # summed while gradients of images are computed.
            h_img, variables["params"]["txt"] = compiler.ordered_after_small(h_img, variables["params"]["txt"])
        if "txt" in self.objective.towers:

            def encode(text: jax.Array, *noises: jax.Array) -> jax.Array:
                rows: Any = [x.reshape(-1, *x.shape[text.ndim - 1 :]) for x in (text, *noises)]
                named = dict(zip(noise["txt"], rows[1:], strict=True))
                h: Any = self.model.apply(variables, rows[0], **named, method="encode_text")
                return h.reshape(*text.shape[:-1], -1)

            h_txt = jax.tree.map(encode, inputs["text"], *noise["txt"].values())
        if overlaps:
            # Else the compiler spreads a gather of one tower's features over all operations of the other.
            h_img, h_txt = jax.lax.optimization_barrier((h_img, h_txt))
        return h_img, h_txt

    def _project(self, params: Any, batch_stats: Any, h: Features) -> tuple[dict[str, Any], Any]:
        variables = {"params": params, "batch_stats": batch_stats}
        logits = not self.objective.loss.chunk_size
        out, new = self.model.apply(variables, *h, train=True, logits=logits, mutable=["batch_stats"], method="project")
        return out, new.get("batch_stats", {})

    def _teach(self, state: TrainState, inputs: Inputs, order: LengthOrder | None) -> tuple[dict[str, Any], Any]:
        params = jax.lax.stop_gradient(state.ema_params)
        inputs = {key: value for key, value in inputs.items() if key not in (NOISE, "texts")}
        return self._project(params, state.ema_batch_stats, self._features(params, inputs, order))
