"""Terms of the duel that the package does not have: nCLIP with a schedule and a running marginal, and a second head."""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from xclip_jax.core.fields import at_least, choice, fraction_below_one, key
from xclip_jax.losses import contrastive
from xclip_jax.models.heads import ClusterHead, Head, Heads, Scalar, l2_normalize
from xclip_jax.models.two_towers import ModelConfig
from xclip_jax.objectives import Term
from xclip_jax.objectives.nclip import Nclip
from xclip_jax.objectives.similarity import CosineSimilarity, unit
from xclip_jax.objectives.term import Arrays, Result

Array = jax.Array
SCHEDULES = ("constant", "early", "late")
POSITIVES = ("pair", "caption")


@dataclasses.dataclass(frozen=True)
class ScheduledNclip(Nclip):
    """nCLIP whose weight changes over the run, with smoothness by a running marginal [ours].

    With u the share of `horizon` that is over, the loss is multiplied by 1 ("constant"), 2 (1 - u) ("early": the
    clusters first, the contrast later) or 2 u ("late"), whose mean over the run is 1.

    The running marginal m <- momentum m + (1 - momentum) mean_i p_i is a constant in the gradient: smoothness is
    -sum_k mean_i(p_ik) log m_k, a cross-entropy. With momentum 0 value and gradient are the same as with the
    entropy of the batch's mean.
    """

    schedule: str = key("constant", "how the weight changes over the run", choice(SCHEDULES))
    horizon: int = key(1, "steps of the run", at_least(1))
    momentum: float = key(0.0, "momentum of the running marginal; 0 for the batch's own", fraction_below_one())

    def initial_state(self, model: ModelConfig, vocab: int) -> dict[str, Array]:
        """The step, and the marginals of both modalities, uniform at the start."""
        k = model.cluster_head.clusters
        marginals = {f"marginal_{tower}": jnp.full(k, 1 / k) for tower in self.towers}
        return super().initial_state(model, vocab) | marginals | {"nclip_step": jnp.zeros(())}

    def __call__(
        self, out: Arrays, teacher: Arrays | None, state: Arrays, batch: Mapping[str, Any], *, chunk: int = 0
    ) -> Result:
        """Compute the loss, see `Term.__call__`; `chunk` is refused by nCLIP, whose logits are not factored here."""
        own: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(Nclip)}
        plain = dataclasses.replace(Nclip(**own), smoothness=0.0)
        loss, metrics, centers = plain(out, teacher, state, batch, chunk=chunk)
        marginals = {}
        for tower in self.towers:
            mean = jax.nn.softmax(out[f"s_{tower}"].astype(jnp.float32) / self.tau).mean(axis=0)
            running = self.momentum * state[f"marginal_{tower}"] + (1 - self.momentum) * mean
            marginals[f"marginal_{tower}"] = jax.lax.stop_gradient(running)
            log_m = jnp.log(jnp.maximum(marginals[f"marginal_{tower}"], jnp.finfo(jnp.float32).tiny))
            loss = loss + self.smoothness / 2 * jnp.sum(mean * log_m)
        u = jnp.minimum(state["nclip_step"] / self.horizon, 1.0)
        weight = {"constant": jnp.ones(()), "early": 2 * (1 - u), "late": 2 * u}[self.schedule]
        metrics |= {"loss": loss, "weight": weight}
        return weight * loss, metrics, centers | marginals | {"nclip_step": state["nclip_step"] + 1}


class SecondSimilarity(CosineSimilarity):
    """The cosine of outputs of the second head, which are normalised first."""

    name: ClassVar[str] = "second"
    reads: ClassVar[str] = "second"
    scale: ClassVar[str | None] = "second_scale"

    def rows(self, output: Any) -> Any:
        """Outputs of unit length, (m, k) -> (m, k)."""
        return unit(output)

    def scores(self, img: Any, txt: Any) -> dict[str, Any]:
        """Cosines of outputs (n, k) and rows (m, k)."""
        return super().scores(unit(img), txt)


@dataclasses.dataclass(frozen=True)
class SecondHead(Term):
    """A second contrastive loss (arXiv 2103.00020) on MLP heads of the size of cluster heads: a control [ours]."""

    title: ClassVar[str] = "second contrastive head"

    label_smoothing: float = key(0.0, "share of the target that is spread over the batch", fraction_below_one())
    positives: str = key("pair", "what pairs of a batch match: themselves, or others of one caption", choice(POSITIVES))

    @property
    def fields(self) -> tuple[str, ...]:
        """As of CLIP's term."""
        return (*super().fields, "text_key") if self.positives == "caption" else super().fields

    @property
    def similarity(self) -> SecondSimilarity:
        return SecondSimilarity()

    def heads(self, model: ModelConfig, vocab: int) -> Heads:
        """An MLP like a cluster head on each tower, and a logit scale."""
        options = model.cluster_head
        module = ClusterHead(**dataclasses.asdict(options), dtype=jnp.dtype(model.dtype))
        heads: dict[str, Head | Scalar] = {
            "second_log_scale": Scalar("second_scale", math.log(model.scale_init), jnp.exp)
        }
        for tower, width in model.widths.items():
            layers = [width] + [options.hidden] * options.layers + [options.clusters]
            flops = 2 * sum(a * b for a, b in itertools.pairwise(layers))
            heads[f"second_{tower}"] = Head(module, tower, f"second_{tower}", ("train",), flops)
        return heads

    def constrain(self, params: Any) -> Any:
        """Hold the logit scale at 100 or below, as CLIP's."""
        return params | {"second_log_scale": jnp.minimum(params["second_log_scale"], math.log(100.0))}

    def __call__(self, out: Arrays, teacher: Arrays | None, state: Arrays, batch: Mapping[str, Any]) -> Result:
        """Compute the loss, see `Term.__call__`."""
        z_img, z_txt = (l2_normalize(out[f"second_{tower}"]) for tower in self.towers)
        keys = batch["text_key"] if self.positives == "caption" else None
        options: dict[str, Any] = {"label_smoothing": self.label_smoothing, "keys": keys}
        loss, metrics = contrastive.softmax(z_img, z_txt, out["second_scale"], **options)
        return loss, metrics, {}
