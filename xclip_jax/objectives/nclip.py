"""nCLIP's term: each modality's distribution over clusters is the pseudo-label of the other, without negatives."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from xclip_jax.config.fields import above, at_least, choice, fraction_below_one, key
from xclip_jax.logits import Factors, Logits
from xclip_jax.losses import noncontrastive
from xclip_jax.models.heads import Heads, cluster_heads
from xclip_jax.models.two_towers import ModelConfig
from xclip_jax.objectives.base import Curve, LossConfig, Result, Term

Array = jax.Array
_SHUFFLE = 17  # folded into the step's key


@dataclasses.dataclass(frozen=True)
class Nclip(Term):
    """Config group `objective.nclip`: options of `losses.noncontrastive.nclip`; defaults are our choice."""

    title: ClassVar[str] = "nCLIP"
    similarity: ClassVar[str | None] = "cross_entropy"

    target: str = key("detach", "where pseudo-labels come from", choice(noncontrastive.TARGETS))
    tau: float = key(1.0, "temperature of the cluster distributions", above(0))
    target_tau: float = key(0.0, "temperature of the targets; 0 for tau", at_least(0))
    sharpness: float = key(1.0, "weight of the entropy of each pair's distribution", at_least(0))
    smoothness: float = key(2.0, "weight of the entropy of the batch's mean distribution", at_least(0))
    balance: str = key("none", "how targets are spread over clusters", choice(noncontrastive.BALANCES))
    center_momentum: float = key(0.9, "of the running mean of logits, of balance 'center'", fraction_below_one())
    shuffle_targets: bool = key(False, "a control: each pair has the pseudo-labels of another one of its batch")

    @property
    def teacher(self) -> bool:
        """With target "ema"."""
        return self.target == "ema"

    def heads(self, model: ModelConfig, vocab: int) -> Heads:
        """A cluster head on each tower."""
        return cluster_heads(model.cluster_head, model.widths, dtype=jnp.dtype(model.dtype))

    def initial_state(self, model: ModelConfig, vocab: int) -> dict[str, Array]:
        """Running centers of the logits, with balance "center"."""
        if self.balance != "center":
            return {}
        return {f"center_{tower}": jnp.zeros(model.cluster_head.clusters) for tower in self.towers}

    def draw(self, random_key: Array, inputs: dict[str, Any], size: int) -> dict[str, Any]:
        """With shuffled targets "target_order" (b,): whose pseudo-labels each pair has, never its own."""
        if not self.shuffle_targets:
            return inputs
        # One cycle through the whole batch, in random order.
        order = jax.random.permutation(jax.random.fold_in(random_key, _SHUFFLE), len(inputs["text"]))
        return inputs | {"target_order": jnp.zeros_like(order).at[order].set(jnp.roll(order, 1))}

    def in_form(self, loss: LossConfig, mesh: Mesh | None) -> Callable[..., Result]:
        """With `loss.chunk_size` pairs at a time."""
        return functools.partial(self.__call__, chunk=loss.chunk_size)

    def __call__(
        self,
        out: Mapping[str, Array],
        teacher: Mapping[str, Array] | None,
        state: Mapping[str, Array],
        batch: Mapping[str, Any],
        *,
        chunk: int = 0,
    ) -> Result:
        """See `Term.__call__`. With a `chunk` so many pairs are taken at a time."""
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        momentum = options.pop("center_momentum")
        options["target_tau"] = options["target_tau"] or None
        if options.pop("shuffle_targets"):
            # Targets from elsewhere are a teacher's, whichever model made them: neither gets a gradient.
            logits, options["target"] = teacher if self.teacher else out, "ema"
            options |= {f"teacher_{m}": _rows(logits[f"s_{m}"], batch["target_order"]) for m in self.towers}
        elif self.teacher:
            options |= {"teacher_img": teacher["s_img"], "teacher_txt": teacher["s_txt"]}
        centers = {name: state[name] for name in ("center_img", "center_txt") if name in state}
        loss, metrics = noncontrastive.nclip(out["s_img"], out["s_txt"], chunk=chunk, **options, **centers)
        target = teacher if self.teacher else out
        moved = {
            name: noncontrastive.update_center(center, target[name.replace("center", "s")], momentum)
            for name, center in centers.items()
        }
        return loss, metrics, moved

    def problems(self, model: ModelConfig, loss: LossConfig) -> Iterator[str]:
        """Options that need the whole batch at once, where the loss takes a part of it at a time."""
        if self.shuffle_targets and self.target == "joint":
            yield (
                "objective.nclip.shuffle_targets takes targets without a gradient; set objective.nclip.target to "
                "'detach' or 'ema'"
            )
        if loss.chunk_size and self.balance == "sinkhorn":
            yield (
                "objective.nclip.balance='sinkhorn' normalises over the whole batch; set loss.chunk_size=0, or balance "
                "'none' or 'center'"
            )
        if loss.chunk_size and model.cluster_head.last_norm:
            yield "model.cluster_head.last_norm needs all logits at once; set loss.chunk_size=0, or it to False"

    def alarms(self, metrics: Mapping[str, float]) -> list[str]:
        """See `losses.noncontrastive.diagnose`."""
        k, b = (round(math.exp(metrics[name])) for name in ("ln_k", "ln_b"))
        return noncontrastive.diagnose(metrics, k=k, b=b)

    def progress(self, metrics: Mapping[str, float]) -> str:
        """The loss, mutual information and clusters in use, of the worse modality."""
        if "loss" not in metrics:
            return ""
        information = min(metrics["mutual_information_img"], metrics["mutual_information_txt"])
        clusters = min(metrics["clusters_img"], metrics["clusters_txt"])
        return f"{metrics['loss']:.3f} ({information:.2f} nats, {clusters:.0f} clusters)"

    def curves(self) -> tuple[Curve, ...]:
        """Loss and entropies."""
        entropies = (
            ("entropy_img", "one image"),
            ("entropy_txt", "one text"),
            ("marginal_entropy_img", "mean of images"),
            ("marginal_entropy_txt", "mean of texts"),
        )
        return (
            Curve("nCLIP loss", (("loss", "nCLIP"),), "nats"),
            Curve("Cluster entropies", entropies, "nats", ("ln_b", "ln b")),
        )

    def recipe(self, model: ModelConfig) -> dict[str, Any]:
        """Its options and those of the cluster heads."""
        groups = {"objective.nclip": self, "model.cluster_head": model.cluster_head}
        return {f"{name}.{key}": x for name, group in groups.items() for key, x in dataclasses.asdict(group).items()}


def _rows(logits: Logits, order: Array) -> Logits:
    """The rows `order` of logits."""
    return logits.replace(x=logits.x[order]) if isinstance(logits, Factors) else logits[order]
