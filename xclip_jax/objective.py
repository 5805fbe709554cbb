"""An objective: which losses a run minimises, with which weights. One key of the config chooses it.

    clip    softmax contrastive
    siglip  sigmoid contrastive
    nclip   non-contrastive
    xclip   w_clip * softmax contrastive + w_nclip * non-contrastive

and, to fine-tune one tower end to end on labelled items,

    classify    cross-entropy with soft targets, or squared error where there is but one "class"
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from xclip_jax.config.fields import above, at_least, choice, fraction_below_one, key
from xclip_jax.losses import classification, contrastive, noncontrastive, ring

Array = jax.Array
OBJECTIVES = ("clip", "siglip", "nclip", "xclip")  # of pre-training


@dataclasses.dataclass(frozen=True)
class NclipConfig:
    """Config group `objective.nclip`: options of `losses.noncontrastive.nclip`; defaults are our choice."""

    target: str = key("detach", "where pseudo-labels come from", choice(noncontrastive.TARGETS))
    tau: float = key(1.0, "temperature of the cluster distributions", above(0))
    target_tau: float = key(0.0, "temperature of the targets; 0 for tau", at_least(0))
    sharpness: float = key(1.0, "weight of the entropy of each pair's distribution", at_least(0))
    smoothness: float = key(2.0, "weight of the entropy of the batch's mean distribution", at_least(0))
    balance: str = key("none", "how targets are spread over clusters", choice(noncontrastive.BALANCES))
    center_momentum: float = key(0.9, "of the running mean of logits, of balance 'center'", fraction_below_one())


@dataclasses.dataclass(frozen=True)
class ClassifyConfig:
    """Config group `objective.classify`: fine-tuning of one tower on labelled items."""

    tower: str = key("img", "the tower that is trained; the model has no other", choice(("img", "txt")))
    classes: int = key(0, "number of classes; 1 fits the label itself, a number, by squared error", at_least(0))
    smoothing: float = key(0.0, "label smoothing", fraction_below_one())
    mixup: float = key(0.0, "parameter of mixup's beta distribution; 0 for none", at_least(0))
    cutmix: float = key(0.0, "parameter of cutmix's beta distribution; 0 for none", at_least(0))
    head_std: float = key(2e-5, "standard deviation of the classifier's initial weights", at_least(0))


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Config group `objective`: what is minimised."""

    name: str = key("clip", "contrastive, non-contrastive, both, or fine-tuning", choice((*OBJECTIVES, "classify")))
    w_clip: float = key(0.3, "weight of the contrastive loss in xclip", at_least(0))
    w_nclip: float = key(0.7, "weight of the non-contrastive loss in xclip", at_least(0))
    nclip: NclipConfig = dataclasses.field(default_factory=NclipConfig)
    classify: ClassifyConfig = dataclasses.field(default_factory=ClassifyConfig)

    def conflicts(self) -> Iterator[str]:
        """Values that do not go together."""
        if self.name == "xclip" and not (self.w_clip or self.w_nclip):
            yield "w_clip and w_nclip are both 0; set one of them above 0"
        if self.name != "classify":
            return
        options = self.classify
        if options.classes < 1:
            yield f"classify.classes is {options.classes}; give the number of classes of the data"
        if (options.mixup or options.cutmix) and (options.tower == "txt" or options.classes == 1):
            yield "classify.mixup and .cutmix are of images in classes; set both to 0"


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Config group `loss`: how a loss is computed, which does not change its value."""

    impl: str = key("plain", "contrastive loss by gathered embeddings, or around a ring", choice(("plain", "ring")))
    chunk: int = key(0, "pairs that the non-contrastive loss takes at a time; 0 for all", at_least(0))


@dataclasses.dataclass(frozen=True)
class Objective:
    """Maps what `TwoTowers.project` returns to a scalar loss and metrics; pure.

    Attributes:
      name: one of `OBJECTIVES`, or "classify".
      w_clip, w_nclip: weights of the two losses of "xclip"; the other objectives have one loss of weight 1. With
        w_nclip = 0 "xclip" is CLIP with an idle cluster head: a control of equal parameter count.
      nclip: options of the non-contrastive loss.
      classify: options of fine-tuning.
      impl: form of the contrastive loss, "plain" (XLA gathers the embeddings) or "ring" (see `losses.ring`).
      chunk: pairs that the non-contrastive loss takes at a time; 0 for all.
      mesh: where the ring runs.
    """

    name: str
    w_clip: float = 0.3
    w_nclip: float = 0.7
    nclip: NclipConfig = dataclasses.field(default_factory=NclipConfig)
    classify: ClassifyConfig = dataclasses.field(default_factory=ClassifyConfig)
    impl: str = "plain"
    chunk: int = 0
    mesh: Mesh | None = None

    @classmethod
    def from_config(
        cls, config: ObjectiveConfig, loss: LossConfig = LossConfig(), mesh: Mesh | None = None
    ) -> "Objective":
        """The objective of config groups `objective` and `loss`, on `mesh`."""
        return cls(
            config.name, config.w_clip, config.w_nclip, config.nclip, config.classify, loss.impl, loss.chunk, mesh
        )

    @property
    def contrastive(self) -> bool:
        """Whether the model needs CLIP's projections and scale."""
        return self.name not in ("nclip", "classify")

    @property
    def clusters(self) -> bool:
        """Whether the model needs cluster heads."""
        return self.name in ("nclip", "xclip")

    @property
    def classifies(self) -> bool:
        """Whether this is fine-tuning: labelled items instead of pairs, one tower, a classifier."""
        return self.name == "classify"

    @property
    def towers(self) -> tuple[str, ...]:
        """The towers that are trained, of "img" and "txt"."""
        return (self.classify.tower,) if self.classifies else ("img", "txt")

    @property
    def fields(self) -> tuple[str, ...]:
        """What a batch is made of, of "image", "text" and "label"."""
        of = {"img": "image", "txt": "text"}
        return (*(of[tower] for tower in self.towers), *["label"] * self.classifies)

    @property
    def teacher(self) -> bool:
        """Whether targets come from an exponential moving average of the parameters."""
        return self.clusters and self.nclip.target == "ema"

    def initial_state(self, clusters: int) -> dict[str, Array]:
        """What the objective carries from step to step: running centers of `clusters` logits, where it uses them."""
        if not (self.clusters and self.nclip.balance == "center"):
            return {}
        return {"center_img": jnp.zeros(clusters), "center_txt": jnp.zeros(clusters)}

    def __call__(
        self,
        out: Mapping[str, Array],
        teacher: Mapping[str, Array] | None,
        state: Mapping[str, Array],
        inputs: Mapping[str, Any],
    ) -> tuple[Array, dict[str, Array], dict[str, Array]]:
        """The loss of one global batch.

        Args:
          out: from `TwoTowers.project`, rows of the global batch.
          teacher: the same of the teacher, exactly where `self.teacher`.
          state: from `initial_state` or the last call.
          inputs: of fine-tuning: "label" fp32 (b,), and of mixed images "share" and "other", see `transforms.mix`.

        Returns:
          fp32 scalar loss; metrics named "<loss>/<metric>" and "loss"; the next state.
        """
        terms, metrics, new_state = [], {}, dict(state)
        if self.contrastive:
            sigmoid = self.name == "siglip"
            z = (out["z_img"], out["z_txt"], out["scale"], *([out["bias"]] if sigmoid else []))
            if self.impl == "ring":
                loss, found = (ring.sigmoid if sigmoid else ring.softmax)(*z, mesh=self.mesh)
            else:
                loss, found = (contrastive.sigmoid if sigmoid else contrastive.softmax)(*z)
            weight = self.w_clip if self.name == "xclip" else 1.0
            terms.append(weight * loss)
            metrics |= {f"{'siglip' if sigmoid else 'clip'}/{key}": value for key, value in found.items()}
            metrics["clip/scale" if not sigmoid else "siglip/scale"] = out["scale"]
        if self.clusters:
            loss, found, new_state = self._nclip(out, teacher, state)
            weight = self.w_nclip if self.name == "xclip" else 1.0
            terms.append(weight * loss)
            metrics |= {f"nclip/{key}": value for key, value in found.items()}
        if self.classifies:
            loss, found = self._classify(out["logits"], inputs)
            terms.append(loss)
            metrics |= {f"classify/{key}": value for key, value in found.items()}
        loss = sum(terms)
        return loss, metrics | {"loss": loss}, new_state

    def _classify(self, logits: Array, inputs: Mapping[str, Any]) -> tuple[Array, dict[str, Array]]:
        classes, labels = self.classify.classes, inputs["label"]
        if classes == 1:
            loss = classification.squared_error(logits[:, 0], labels)
            return loss, {"loss": loss}
        labels = labels.astype(jnp.int32)
        target = classification.targets(labels, classes, self.classify.smoothing)
        if "other" in inputs:
            other = classification.targets(inputs["other"]["label"].astype(jnp.int32), classes, self.classify.smoothing)
            share = inputs["share"][:, None]
            target = share * target + (1 - share) * other
        loss = classification.cross_entropy(logits, target)
        return loss, {"loss": loss, "top1": (logits.argmax(axis=-1) == labels).mean()}

    def _nclip(
        self, out: Mapping[str, Array], teacher: Mapping[str, Array] | None, state: Mapping[str, Array]
    ) -> tuple[Array, dict[str, Array], dict[str, Array]]:
        options = dataclasses.asdict(self.nclip)
        momentum = options.pop("center_momentum")
        options["target_tau"] = options["target_tau"] or None
        if self.teacher:
            options |= {"teacher_img": teacher["s_img"], "teacher_txt": teacher["s_txt"]}
        loss, metrics = noncontrastive.nclip(out["s_img"], out["s_txt"], chunk=self.chunk, **options, **state)
        target = teacher if self.teacher else out
        moved = {
            key: noncontrastive.update_center(center, target[key.replace("center", "s")], momentum)
            for key, center in state.items()
        }
        return loss, metrics, moved
