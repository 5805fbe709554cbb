"""Contrastive terms: CLIP's softmax and SigLIP's sigmoid loss of all pairs of the batch."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax

from xclip_jax.core.fields import between, choice, fraction_below_one, key
from xclip_jax.losses import contrastive
from xclip_jax.models.heads import Head, Heads, Projection, Scalar
from xclip_jax.models.two_towers import ModelConfig
from xclip_jax.objectives.similarity import CosineSimilarity
from xclip_jax.objectives.term import Arrays, Check, Curve, Health, LossConfig, Result, Term

# [ours] On the plateau the loss is within this share of a blind guess; successful runs are a tenth below after warm-up.
PLATEAU_SHARE = 0.01
# Batch fields whose equal rows are matching pairs, by the value of `positives`.
_KEYS = {"pair": "", "caption": "text_key", "image": "image_key"}


@dataclasses.dataclass(frozen=True)
class Contrastive(Term):
    """A loss of all pairs of the batch: the common part of softmax and sigmoid."""

    uses_negatives: ClassVar[bool] = True
    form: ClassVar[str] = "clip"  # a function of `losses.contrastive`
    outputs: ClassVar[tuple[str, ...]] = ("z_img", "z_txt", "scale")  # its arguments
    initial_scale: ClassVar[float] = 1 / 0.07  # of the logits
    gce_q = 0.0  # of `Clip`

    positives: str = key(
        "pair", "matches of a pair: only itself, or pairs with the same caption or image", choice(_KEYS)
    )

    @property
    def fields(self) -> tuple[str, ...]:
        """Images, texts and the hash shared by matching pairs, if any."""
        return (*super().fields, *filter(None, [_KEYS[self.positives]]))

    @property
    def similarity(self) -> CosineSimilarity:
        return CosineSimilarity()

    def heads(self, model: ModelConfig, vocab: int) -> Heads:
        dtype = jax.numpy.dtype(model.dtype)
        e = model.embed
        heads: dict[str, Head | Scalar] = {}
        for tower, width in model.widths.items():
            projection = Projection(e, dtype, model.style(tower).project_bias)
            heads[f"proj_{tower}"] = Head(projection, tower, f"z_{tower}", flops=2 * e * width)
        if not model.style("img").project_img:  # features are the embeddings
            heads["proj_img"] = Head(Projection(0, dtype), "img", "z_img")
        heads["log_scale"] = Scalar("scale", math.log(self.initial_scale), jax.numpy.exp)
        if "bias" in self.outputs:
            heads["bias"] = Scalar("bias", -10.0)
        return heads

    def __call__(
        self, out: Arrays, teacher: Arrays | None, state: Arrays, batch: Mapping[str, Any], *, chunk: int = 0
    ) -> Result:
        loss_of = getattr(contrastive, self.form)
        options = self._options(batch)
        if "negatives" in batch:
            exist = jax.numpy.any(batch["negatives"] != batch["text"][:, None], axis=2).reshape(-1)
            options["exists"] = jax.numpy.pad(exist, (len(batch["text"]), 0), constant_values=True)
            out = {**out, "z_txt": jax.numpy.concatenate([out["z_txt"], out["negative_z_txt"]])}
        loss, metrics = loss_of(*(out[name] for name in self.outputs), **options, chunk=chunk)
        return loss, metrics | {"scale": out["scale"]}, {}

    def _options(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of the loss, including batch-dependent parts of its target."""
        options = dataclasses.asdict(self)
        key = _KEYS[options.pop("positives")]
        return options | ({"keys": batch[key]} if key else {})

    def flops(self, model: ModelConfig, batch: int) -> float:
        return 2 * batch * model.embed

    def chance_loss(self, metrics: Mapping[str, float], less: float = 0.0) -> float:
        """Return the loss of the best input-independent guess, its cross-entropy reduced by the fraction `less`."""
        return (1 - less) * metrics["ln_b"]

    def alarms(self, metrics: Mapping[str, float]) -> list[str]:
        empty = "negatives: no pair of the batch has one. Check data.negative_columns."
        return super().alarms(metrics) + [empty] * (metrics.get("negatives") == 0)

    def curves(self) -> tuple[Curve, ...]:
        accuracy = (("acc_img", "image to text"), ("acc_txt", "text to image"))
        note = "ln b, with b the batch size, is the loss of CLIP for a guess that does not depend on the inputs."
        loss = Curve(f"{self.title} loss", (("loss", "contrastive"),), "nats", (("ln b", "ln_b"),), note)
        if self.gce_q:
            note = "A blind guess does not depend on the inputs."
            loss = loss._replace(unit="", levels=(("blind guess", "blind"),), note=note)
        return (
            loss,
            Curve("Accuracy within the batch", accuracy, "%", note="Share whose best match is their own partner."),
            Curve("Logit scale", (("scale", "scale"),)),
        )

    def health(self, metrics: Mapping[str, float]) -> Health:
        """Check whether the loss has left the plateau of equal embeddings for all inputs."""
        blind = self.chance_loss(metrics) if metrics.keys() >= {"loss", "ln_b"} else 0.0
        if not blind:  # a single pair leaves nothing to guess
            return Health()
        loss = metrics["loss"]
        least = self.chance_loss(metrics, PLATEAU_SHARE)
        check = Check(
            "plateau",
            max(0.0, 1 - loss / blind),  # 0 for a NaN loss, which fails
            1 - least / blind,
            "Share by which the loss is below a blind guess; fails when all inputs have much the same embedding, where "
            "the gradient vanishes.",
            f"the loss is {loss:.3f}, no better than {blind:.3f} of a guess that does not depend on the inputs. "
            "Lengthen optim.warmup or lower optim.lr.",
        )
        return Health("A contrastive loss can stay at the value of a blind guess for a while, or for ever.", (check,))


@dataclasses.dataclass(frozen=True)
class Clip(Contrastive):
    """Config group `objective.clip`: options of `losses.contrastive.clip`."""

    title: ClassVar[str] = "CLIP"
    max_scale: ClassVar[float] = 100.0  # of the logits; arXiv 2103.00020, section 2.5

    label_smoothing: float = key(0.0, "fraction of the target spread over the batch", fraction_below_one())
    gce_q: float = key(0.0, "generalised cross-entropy: loss (1 - p^q) / q of a pair; 0 for -ln p", between(0, 1))

    def _options(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        options = super()._options(batch)
        options["q"] = options.pop("gce_q")
        return options

    def constrain(self, params: Any) -> Any:
        """Limit the logit scale to `max_scale`.

        With clipping in the forward pass the gradient would vanish, and the scale could not leave the bound again.
        """
        return params | {"log_scale": jax.numpy.minimum(params["log_scale"], math.log(self.max_scale))}

    def chance_loss(self, metrics: Mapping[str, float], less: float = 0.0) -> float:
        """Return the loss of equal logits: ln b, with negatives more for images, or `contrastive.robust` of both."""
        share = 1 - less * (1 - self.label_smoothing)
        texts = metrics["ln_b"] + math.log1p(metrics.get("negatives", 0.0))
        return sum(float(contrastive.robust(share * x, self.gce_q)) for x in (texts, metrics["ln_b"])) / 2

    def conflicts_with(self, model: ModelConfig, loss: LossConfig) -> Iterator[str]:
        if self.gce_q and (self.label_smoothing or self.positives != "pair"):
            yield "objective.clip.gce_q is for one target per pair; set label_smoothing to 0, and positives to 'pair'"

    def progress(self, metrics: Mapping[str, float]) -> str:
        blind = f"blind {metrics['blind']:.2f}" if "blind" in metrics else f"ln b {metrics.get('ln_b', 0):.2f}"
        return super().progress(metrics) + f" ({blind})" * ("loss" in metrics)


@dataclasses.dataclass(frozen=True)
class Siglip(Contrastive):
    """Sigmoid contrastive loss with CLIP's heads and a logit bias, see `losses.contrastive.siglip`."""

    title: ClassVar[str] = "SigLIP"
    form: ClassVar[str] = "siglip"
    outputs: ClassVar[tuple[str, ...]] = ("z_img", "z_txt", "scale", "bias")
    initial_scale: ClassVar[float] = 10.0

    def chance_loss(self, metrics: Mapping[str, float], less: float = 0.0) -> float:
        """Return the loss of the logit ln(n / (b - n)) for each image with all b texts, if n of them match."""
        b = round(math.exp(metrics["ln_b"])) * (1 + metrics.get("negatives", 0.0))
        n = metrics.get("positives", 1.0)
        return (1 - less) * (n * math.log(b / n) + (b - n) * math.log(b / (b - n))) if b > n else 0.0
