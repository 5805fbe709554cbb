"""nCLIP's term: each modality's distribution over clusters is the pseudo-label of the other, without negatives."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from xclip_jax.core.fields import above, at_least, choice, key
from xclip_jax.losses import noncontrastive
from xclip_jax.models.heads import ClusterHead, Head, Heads
from xclip_jax.models.two_towers import ModelConfig
from xclip_jax.objectives.similarity import ClusterSimilarity
from xclip_jax.objectives.term import Arrays, Check, Curve, Health, LossConfig, Result, Term
from xclip_jax.parallel.sharding import FactoredLogits, Logits

Array = jax.Array
_SHUFFLE = 17  # folded into the step's key

# Thresholds of the checks [ours], from the trials behind the defaults (batch 256, k 1024, so ln b = 5.5).
# Stuck runs had 0.12-0.2 nats of mutual information, 2-4 % of ln b; the slowest successful run had 0.6, 11 %.
FLAT_SHARE = 0.06
# The run with few clusters (14 of 1024) had H(mean) = 3.1, 56 % of ln b; smooth runs are near or above ln b.
FEW_CLUSTERS_SHARE = 0.7
# Predictions are sharp if their entropy is below this fraction of their mean's entropy, which is nearly 1 at first.
SHARP_SHARE = 0.6
# Fraction of the range from chance to 1. The run that disagreed had 1 % equal argmax, with 0.5 % by chance.
AGREEMENT_ABOVE_CHANCE = 0.05


@dataclasses.dataclass(frozen=True)
class Nclip(Term):
    """Config group `objective.nclip`: options of `losses.noncontrastive.nclip`; the defaults are [ours]."""

    title: ClassVar[str] = "nCLIP"

    target: str = key("detach", "source of the pseudo-labels", choice(noncontrastive.TARGETS))
    tau: float = key(noncontrastive.TAU, "temperature of the cluster distributions", above(0))
    sharpness: float = key(1.0, "weight of the entropy of each pair's distribution", at_least(0))
    smoothness: float = key(2.0, "weight of the entropy of the batch's mean distribution", at_least(0))
    shuffle_targets: bool = key(False, "as a control, give each pair the pseudo-labels of another pair of its batch")

    @property
    def similarity(self) -> ClusterSimilarity:
        return ClusterSimilarity(self.tau)

    @property
    def teacher(self) -> bool:
        return self.target == "ema"

    def heads(self, model: ModelConfig, vocab: int) -> Heads:
        options = model.cluster_head
        heads = {}
        module = ClusterHead(**dataclasses.asdict(options), dtype=jnp.dtype(model.dtype))
        for tower, width in model.widths.items():
            layers = [width] + [options.hidden] * options.layers + [options.clusters]
            flops = 2 * sum(a * b for a, b in itertools.pairwise(layers))
            heads[f"clusters_{tower}"] = Head(module, tower, f"s_{tower}", ("train", "logits"), flops)
        return heads

    def draw(self, random_key: Array, inputs: dict[str, Any], size: int) -> dict[str, Any]:
        """Add "target_order" (b,) for shuffled targets: the index of the pair providing each pair's pseudo-labels."""
        if not self.shuffle_targets:
            return inputs
        # One random cycle through the batch, so that no pair gets its own.
        order = jax.random.permutation(jax.random.fold_in(random_key, _SHUFFLE), len(inputs["text"]))
        return inputs | {"target_order": jnp.zeros_like(order).at[order].set(jnp.roll(order, 1))}

    def __call__(
        self, out: Arrays, teacher: Arrays | None, state: Arrays, batch: Mapping[str, Any], *, chunk: int = 0
    ) -> Result:
        teacher = {} if teacher is None else teacher
        options = dataclasses.asdict(self)
        if options.pop("shuffle_targets"):
            # Targets of other pairs have no gradient, like a teacher's.
            options["target"] = "ema"
            logits = teacher if self.teacher else out
            options |= {f"teacher_{m}": _rows(logits[f"s_{m}"], batch["target_order"]) for m in self.towers}
        elif self.teacher:
            options |= {"teacher_img": teacher["s_img"], "teacher_txt": teacher["s_txt"]}
        return *noncontrastive.nclip(out["s_img"], out["s_txt"], chunk=chunk, **options), {}

    def conflicts_with(self, model: ModelConfig, loss: LossConfig) -> Iterator[str]:
        if self.shuffle_targets and self.target == "joint":
            yield "objective.nclip.shuffle_targets needs objective.nclip.target 'detach' or 'ema'"

    def progress(self, metrics: Mapping[str, float]) -> str:
        if "loss" not in metrics:
            return ""
        information = min(metrics["mutual_information_img"], metrics["mutual_information_txt"])
        clusters = min(metrics["clusters_img"], metrics["clusters_txt"])
        return f"{metrics['loss']:.3f} ({information:.2f} nats, {clusters:.0f} clusters)"

    def curves(self) -> tuple[Curve, ...]:
        levels = (("ln b", "ln_b"), ("ln k", "ln_k"))
        note = "b is the batch size, k the number of clusters."
        return (
            Curve("nCLIP loss", (("loss", "nCLIP"),), "nats"),
            Curve("Entropy of a prediction", _both("entropy"), "nats", levels, note),
        )

    def health(self, metrics: Mapping[str, float]) -> Health:
        """Check for the three known failures [ours]; the first hundred steps are always flat."""
        if "agreement" not in metrics:
            return Health()
        k, b = (round(math.exp(metrics[f"ln_{name}"])) for name in ("k", "b"))
        ceiling = min(math.log(k), math.log(b))  # largest possible information of a batch, nats
        if not ceiling:  # neither one cluster nor a batch of one pair can collapse
            return Health()

        def least(name: str) -> tuple[float, str]:
            return min((metrics[f"{name}_{m}"], m) for m in noncontrastive.MODALITIES)

        marginal, modality = least("marginal_entropy")
        few = Check(
            "few clusters",
            marginal,
            FEW_CLUSTERS_SHARE * ceiling,
            "Entropy of the mean prediction in nats; fails when nearly everything goes to a few clusters.",
            f"H(mean) of {modality} is {marginal:.2f} nats of {ceiling:.2f} possible, with "
            f"{metrics[f'clusters_{modality}']:.0f} of {k} clusters in use. Raise objective.nclip.smoothness (2 if "
            "objective.nclip.sharpness is 1).",
        )
        information, modality = least("mutual_information")
        flat = Check(
            "flat",
            information,
            FLAT_SHARE * ceiling,
            "Mutual information in nats; fails when the predictions of different pairs are alike.",
            f"mutual information of {modality} is {information:.3f} nats of {ceiling:.2f} possible. Past the first "
            "hundred steps, raise objective.nclip.sharpness to 1 and keep objective.nclip.smoothness above it (2), and "
            "set objective.nclip.tau between 0.5 and 1.",
            # A single used cluster has no mutual information either, but needs the other remedy.
            applies=not few.failed,
        )
        chance = 1 / max(metrics["clusters_img"], metrics["clusters_txt"], 1)
        sharp = [metrics[f"entropy_{m}"] < SHARP_SHARE * metrics[f"marginal_entropy_{m}"] for m in ("img", "txt")]
        agreement = Check(
            "disagreement",
            metrics["agreement"],
            chance + AGREEMENT_ABOVE_CHANCE * (1 - chance),
            "Share of pairs that agree; fails when an image and its text are sharp on different clusters.",
            f"predictions are sharp, yet image and text agree on {100 * metrics['agreement']:.1f} % of pairs (chance "
            f"is about {100 * chance:.1f} %). Lower optim.lr or objective.nclip.sharpness.",
            applies=any(sharp),
        )
        note = f"Of {k:,} clusters; a batch of {b:,} can use at most {min(k, b):,}."
        most = (("most", min(k, b)),)
        curves = (
            Curve("Mutual information", _both("mutual_information"), "nats", (("most", ceiling),), check=flat),
            Curve("Entropy of the mean prediction", _both("marginal_entropy"), "nats", check=few),
            Curve("Agreement of image and text", (("agreement", "pairs"),), "%", check=agreement),
            Curve("Clusters in use in a batch", _both("clusters"), levels=most, note=note),
        )
        summary = "Cluster heads can collapse in three ways. Red zones are the alarms, drawn for the last step."
        return Health(summary, (flat, few, agreement), curves)


def _rows(logits: Logits, order: Array) -> Logits:
    return dataclasses.replace(logits, x=logits.x[order]) if isinstance(logits, FactoredLogits) else logits[order]


def _both(name: str) -> tuple[tuple[str, str], ...]:
    return (f"{name}_img", "images"), (f"{name}_txt", "texts")
