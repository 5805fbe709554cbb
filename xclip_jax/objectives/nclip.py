"""nCLIP's term: each modality's distribution over clusters is the pseudo-label of the other, without negatives."""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from xclip_jax.core.fields import above, at_least, choice, fraction_below_one, key
from xclip_jax.losses import noncontrastive
from xclip_jax.losses.logits import FactoredLogits, Logits
from xclip_jax.models.heads import Heads, cluster_heads
from xclip_jax.models.two_towers import ModelConfig
from xclip_jax.objectives.base import LossConfig, Result, Term
from xclip_jax.objectives.display import Curve, Health, Level, Light
from xclip_jax.objectives.similarity import ClusterSimilarity

Array = jax.Array
_SHUFFLE = 17  # folded into the step's key

# Thresholds of `diagnose` [ours], read off the trials that chose the defaults (batch 256, k 1024, so ln b = 5.5).
# Stuck runs had 0.12-0.2 nats of mutual information, 2-4 % of ln b; the slowest run that trained had 0.6, 11 %.
FLAT_SHARE = 0.06
# The run with few clusters (14 of 1024) had H(mean) = 3.1, 56 % of ln b; smooth runs are near or above ln b.
FEW_CLUSTERS_SHARE = 0.7
# Sharp: the entropy of single predictions is at most this share of their mean's; a fresh model has nearly 1.
SHARP_SHARE = 0.6
# The run that disagreed had 1 % equal argmax, chance being 0.5 %; counted above chance, as a share of what is left.
AGREEMENT_ABOVE_CHANCE = 0.05


@dataclasses.dataclass(frozen=True)
class Nclip(Term):
    """Config group `objective.nclip`: options of `losses.noncontrastive.nclip`; defaults are our choice."""

    title: ClassVar[str] = "nCLIP"

    target: str = key("detach", "where pseudo-labels come from", choice(noncontrastive.TARGETS))
    tau: float = key(noncontrastive.TAU, "temperature of the cluster distributions", above(0))
    target_tau: float = key(0.0, "temperature of the targets; 0 for tau", at_least(0))
    sharpness: float = key(1.0, "weight of the entropy of each pair's distribution", at_least(0))
    smoothness: float = key(2.0, "weight of the entropy of the batch's mean distribution", at_least(0))
    balance: str = key("none", "how targets are spread over clusters", choice(noncontrastive.BALANCES))
    center_momentum: float = key(0.9, "of the running mean of logits, of balance 'center'", fraction_below_one())
    shuffle_targets: bool = key(False, "a control: each pair has the pseudo-labels of another one of its batch")

    @property
    def similarity(self) -> ClusterSimilarity:
        """The likeness of the cluster distributions."""
        return ClusterSimilarity(self.tau)

    @property
    def teacher(self) -> bool:
        """Whether the target is "ema"."""
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
        """Return `__call__` with `loss.chunk_size` pairs at a time."""
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
        """Compute the loss, see `Term.__call__`. With `chunk` above 0 that number of pairs is processed at a time."""
        teacher = {} if teacher is None else teacher
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
        """Options that need the whole batch at once, with a loss in chunks, and shuffled targets with a gradient."""
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
        """Warnings of `diagnose`; none without its metrics."""
        return diagnose(metrics) if metrics.keys() >= _MEASURES else []

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
        levels = (Level("ln b", "ln_b"), Level("ln k", "ln_k"))
        note = "b is the batch size, k the number of clusters."
        return (
            Curve("nCLIP loss", (("loss", "nCLIP"),), "nats"),
            Curve("Cluster entropies", entropies, "nats", levels, note),
        )

    def health(self, metrics: Mapping[str, float]) -> Health | None:
        """Indicators of the three failures of `diagnose`."""
        if not metrics.keys() >= _MEASURES:
            return None
        summary = (
            "Cluster heads can collapse in three ways; each has a measure, a threshold and a remedy. Red zones are the "
            "alarms, drawn for the last step."
        )
        return Health(summary, _lights(metrics), _health_curves(metrics))

    def recipe(self, model: ModelConfig) -> dict[str, Any]:
        """Options of the cluster heads."""
        return {f"model.cluster_head.{key}": x for key, x in dataclasses.asdict(model.cluster_head).items()}

    def describe(self, model: ModelConfig) -> str:
        """The distributions over clusters."""
        return f"distributions of images and texts over {model.cluster_head.clusters:,} clusters"

    def export_note(self, missing: Collection[str]) -> str:
        """What a model loses without its cluster heads."""
        lost = {"clusters_img", "clusters_txt"} & set(missing)
        return "without cluster heads the model assigns no clusters" if lost else ""


_MEASURES = frozenset(
    f"{name}_{tower}"
    for name in ("entropy", "marginal_entropy", "mutual_information", "clusters")
    for tower in ("img", "txt")
) | {"agreement", "ln_b", "ln_k"}


def _sizes(metrics: Mapping[str, float]) -> dict[str, int]:
    """Number of clusters k and batch size b."""
    return {name: round(math.exp(metrics[f"ln_{name}"])) for name in ("k", "b")}


def _ceiling(metrics: Mapping[str, float]) -> float:
    """Nats of information that a batch can have about the clusters."""
    return min(math.log(size) for size in _sizes(metrics).values())


def _agreement_levels(metrics: Mapping[str, float]) -> tuple[float, float]:
    """Share of pairs that agree by chance, and below which there is an alarm."""
    chance = 1 / max(metrics["clusters_img"], metrics["clusters_txt"], 1)
    return chance, chance + AGREEMENT_ABOVE_CHANCE * (1 - chance)


def _share(part: float, whole: float) -> float:
    """part / whole; 0 where the whole is, as ln 1 of one cluster or of a batch of one pair."""
    return part / whole if whole else 0.0


def diagnose(metrics: Mapping[str, float]) -> list[str]:
    """Return warnings, each with its remedy, where the metrics of `losses.noncontrastive.nclip` show a known failure.

    The failures [ours]: flat (predictions do not distinguish pairs), few clusters, and disagreement (image and text
    are sharp, on different clusters). A model's first hundred steps are always flat: diagnose later.

    Args:
      metrics: as Python floats, all of `_MEASURES`. NaN gives no warning.
    """
    if not (ceiling := _ceiling(metrics)):  # no information to lose
        return []
    information, name = min((metrics[f"mutual_information_{m}"], m) for m in noncontrastive.MODALITIES)
    marginal, narrow = min((metrics[f"marginal_entropy_{m}"], m) for m in noncontrastive.MODALITIES)
    sharp = any(
        metrics[f"entropy_{m}"] < SHARP_SHARE * metrics[f"marginal_entropy_{m}"] for m in noncontrastive.MODALITIES
    )
    chance, agreed = _agreement_levels(metrics)
    warnings = []
    # One collapsed cluster also has no mutual information, but flat's remedy (sharpen) would be the wrong one.
    if marginal < FEW_CLUSTERS_SHARE * ceiling:
        warnings.append(
            f"few clusters: H(mean) of {narrow} is {marginal:.2f} nats of {ceiling:.2f} possible, with "
            f"{metrics[f'clusters_{narrow}']:.0f} of {_sizes(metrics)['k']} clusters in use. Raise "
            "objective.nclip.smoothness (2 where objective.nclip.sharpness is 1)."
        )
    elif information < FLAT_SHARE * ceiling:
        warnings.append(
            f"flat: mutual information of {name} is {information:.3f} nats of {ceiling:.2f} possible. Past the first "
            "hundred steps, raise objective.nclip.sharpness to 1 and keep objective.nclip.smoothness above it (2), "
            "set objective.nclip.tau between 0.5 and 1, and set model.cluster_head.last_norm to false."
        )
    if sharp and metrics["agreement"] < agreed:
        warnings.append(
            f"disagreement: predictions are sharp, yet image and text agree on {100 * metrics['agreement']:.1f} % of "
            f"pairs (chance is about {100 * chance:.1f} %). Lower optim.lr or objective.nclip.sharpness, and set "
            "model.cluster_head.last_norm to false."
        )
    return warnings


def _lights(metrics: Mapping[str, float]) -> tuple[Light, ...]:
    k, ceiling = _sizes(metrics)["k"], _ceiling(metrics)
    information, marginal, used = (
        min(metrics[f"{name}_img"], metrics[f"{name}_txt"])
        for name in ("mutual_information", "marginal_entropy", "clusters")
    )
    flat, few = FLAT_SHARE * ceiling, FEW_CLUSTERS_SHARE * ceiling
    most, agreement = max(math.log(k), ceiling), metrics["agreement"]
    chance, agreed = _agreement_levels(metrics)
    impossible = "" if ceiling else "One cluster, or a batch of one pair, cannot collapse."
    return (
        Light(
            "flat",
            "Fails when the predictions of different pairs are alike.",
            f"{information:.2f} nats of mutual information, of {ceiling:.2f} possible; the alarm is below {flat:.2f}.",
            _share(information, ceiling),
            FLAT_SHARE,
            impossible,
        ),
        Light(
            "few clusters",
            "Fails when nearly everything goes to a few clusters.",
            f"{marginal:.2f} nats of entropy of the mean prediction, the alarm is below {few:.2f}; at least {used:.0f} "
            f"of {k:,} clusters in use in a batch.",
            _share(marginal, most),
            _share(few, most),
            impossible,
        ),
        Light(
            "disagreement",
            "Fails when an image and its text are sharp on different clusters.",
            f"{100 * agreement:.1f} % of pairs agree; chance is about {100 * chance:.1f} %, and the alarm below "
            f"{100 * agreed:.1f} %.",
            agreement,
            agreed,
            impossible,
        ),
    )


def _health_curves(metrics: Mapping[str, float]) -> tuple[Curve, ...]:
    def both(name: str) -> tuple[tuple[str, str], ...]:
        return (f"{name}_img", "images"), (f"{name}_txt", "texts")

    sizes, ceiling = _sizes(metrics), _ceiling(metrics)
    most = min(sizes.values())
    flat, few = (share * ceiling for share in (FLAT_SHARE, FEW_CLUSTERS_SHARE))
    _, agreed = _agreement_levels(metrics)
    note = f"Of {sizes['k']:,} clusters; a batch of {sizes['b']:,} can use at most {most:,}."
    return (
        Curve(
            "Mutual information",
            both("mutual_information"),
            "nats",
            (Level("alarm", flat, alarm=True), Level("most", ceiling)),
        ),
        Curve("Entropy of the mean prediction", both("marginal_entropy"), "nats", (Level("alarm", few, alarm=True),)),
        Curve("Agreement of image and text", (("agreement", "pairs"),), "%", (Level("alarm", agreed, alarm=True),)),
        Curve("Clusters in use in a batch", both("clusters"), levels=(Level("most", most),), note=note),
    )


def _rows(logits: Logits, order: Array) -> Logits:
    """The rows `order` of logits."""
    return dataclasses.replace(logits, x=logits.x[order]) if isinstance(logits, FactoredLogits) else logits[order]
