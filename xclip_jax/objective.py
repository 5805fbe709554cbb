"""An objective: which losses a run minimises, with which weights. One key of the config chooses it.

    clip    softmax contrastive
    siglip  sigmoid contrastive
    nclip   non-contrastive
    xclip   w_clip * softmax contrastive + w_nclip * non-contrastive

and, to fine-tune one tower end to end on labelled items,

    classify    cross-entropy with soft targets, or squared error where there is but one "class"
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from xclip_jax.errors import UserError, one_of
from xclip_jax.losses import classification, contrastive, noncontrastive, ring

Array = jax.Array
OBJECTIVES = ("clip", "siglip", "nclip", "xclip")  # of pre-training


@dataclasses.dataclass(frozen=True)
class NclipConfig:
    """Group `objective.nclip`: the options of `losses.noncontrastive.nclip`; defaults are our choice.

    `target_tau` 0 stands for "the same as tau"; `center_momentum` is of balance "center".
    """

    target: str = "detach"
    tau: float = 1.0
    target_tau: float = 0.0
    sharpness: float = 1.0
    smoothness: float = 2.0
    balance: str = "none"
    center_momentum: float = 0.9


@dataclasses.dataclass(frozen=True)
class ClassifyConfig:
    """Group `objective.classify`, of fine-tuning.

    Attributes:
      tower: "img" or "txt", the one that is trained; the model has no other.
      classes: number of them; 1 fits the label itself, a number, by squared error.
      smoothing: of labels, see `classification.targets`.
      mixup, cutmix: parameters of their beta distributions, see `transforms.draw_mix`; 0 for without.
      head_std: of the classifier's initial weights.
    """

    tower: str = "img"
    classes: int = 0
    smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    head_std: float = 2e-5


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

    def __post_init__(self) -> None:
        one_of("objective.name", self.name, (*OBJECTIVES, "classify"))
        one_of("objective.nclip.target", self.nclip.target, noncontrastive.TARGETS)
        one_of("objective.nclip.balance", self.nclip.balance, noncontrastive.BALANCES)
        if self.nclip.tau <= 0 or self.nclip.target_tau < 0:
            raise UserError(f"objective.nclip.tau is {self.nclip.tau}; temperatures must be positive.")
        one_of("loss.impl", self.impl, ("plain", "ring"))
        if self.chunk and self.nclip.balance == "sinkhorn":
            raise UserError(
                "objective.nclip.balance='sinkhorn' normalises over the whole batch; set loss.chunk=0, or balance "
                "'none' or 'center'."
            )
        if self.classifies:
            self._check_classify()

    def _check_classify(self) -> None:
        options = self.classify
        one_of("objective.classify.tower", options.tower, ("img", "txt"))
        if options.classes < 1:
            raise UserError(f"objective.classify.classes is {options.classes}; give the number of classes of the data.")
        if (options.mixup or options.cutmix) and (options.tower == "txt" or options.classes == 1):
            raise UserError("objective.classify.mixup and .cutmix are of images in classes; set both to 0.")

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], loss: Mapping[str, Any] | None = None, mesh: Mesh | None = None
    ) -> "Objective":
        """The objective of config groups `objective` and `loss`, on `mesh`."""
        fields = dict(config)
        kinds = {"nclip": NclipConfig, "classify": ClassifyConfig}
        groups = {name: kind(**fields.get(name, {})) for name, kind in kinds.items()}
        return cls(**fields | groups, **dict(loss or {}), mesh=mesh)

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
        self, out: Mapping[str, Array], teacher: Mapping[str, Array] | None, state: Mapping[str, Array],
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
