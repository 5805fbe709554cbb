"""Whether a model knows which captions are wrong: the AUC of exchanged against true pairs over a run's checkpoints.

    python -m studies.duel.mechanism RUN ARM FILE      # adds a line for each checkpoint to FILE

A pair is suspected by its own contrastive loss within blocks of pairs, by the cosine of its embeddings, and by the
cross-entropy of its distributions over clusters; each as far as the model has these outputs. Of the area under the ROC
curve 50 is chance: the probability, in percent, that an exchanged pair is suspected more than a true one.
"""

import pathlib
import sys
from typing import Any

import numpy as np
from scipy.special import log_softmax
from scipy.stats import rankdata

from xclip_jax.core import imports
from xclip_jax.core.run_folder import RunFolder
from xclip_jax.core.storage import strict_json
from xclip_jax.data import holdout, sources
from xclip_jax.evaluators.encoder import Encoder
from xclip_jax.models.two_towers import Variables
from xclip_jax.objectives.similarity import cluster_similarity
from xclip_jax.train import build, weights

PAIRS, BLOCK = 4096, 256


def auc(suspicion: np.ndarray, wrong: np.ndarray) -> float:
    """Return the area under the ROC curve in percent; ties count half.

    Args:
      suspicion: (n,), higher for pairs that are rather exchanged.
      wrong: bool (n,), which are; at least one is and one is not.
    """
    n, m = int(wrong.sum()), int((~wrong).sum())
    return float(100 * (rankdata(suspicion)[wrong].sum() - n * (n + 1) / 2) / (n * m))


def pair_losses(z_img: np.ndarray, z_txt: np.ndarray, scale: float, block: int = BLOCK) -> np.ndarray:
    """Return each pair's contrastive loss in nats, the mean of both directions, among the pairs of its block.

    Args:
      z_img, z_txt: embeddings of unit length, (n, e); row i a pair.
      scale: of the logits.
      block: pairs that are compared with each other.
    """
    losses = []
    for start in range(0, len(z_img), block):
        logits = scale * z_img[start : start + block] @ z_txt[start : start + block].T
        own = [np.diag(log_softmax(logits, axis=axis)) for axis in (0, 1)]
        losses.append(-np.mean(own, axis=0))
    return np.concatenate(losses)


def is_due(step: int, steps: int, every: int) -> bool:
    """Whether a checkpoint is due after this step, not one of an interruption or one just before the last."""
    return step == steps or (step % every == 0 and steps - step >= every)


def suspicions(
    encoder: Encoder, variables: Variables, images: list[np.ndarray], texts: list[str]
) -> dict[str, np.ndarray]:
    """Return {score: suspicion (n,)} of n pairs by the outputs that the model has."""
    img, txt = encoder.images(variables, images), encoder.texts(variables, texts)
    scores = {}
    if "embedding" in img:
        scale = float(np.exp(variables["params"]["log_scale"]))
        scores["loss"] = pair_losses(img["embedding"], txt["embedding"], scale)
        scores["cosine"] = -(img["embedding"] * txt["embedding"]).sum(axis=1)
    if clusters := cluster_similarity(encoder.similarities):
        p, q = (clusters.rows(features[clusters.feature]) for features in (img, txt))
        log_p, log_q = (np.log(np.maximum(x, np.finfo(np.float32).tiny)) for x in (p, q))
        scores["clusters"] = -0.5 * (p * log_q + q * log_p).sum(axis=1)
    return scores


def measure(folder: str, pairs: int = PAIRS) -> list[dict[str, Any]]:
    """Return "step", "pairs", "wrong" and the AUC by each score for each checkpoint of a run.

    Args:
      folder: of a run with `data.caption_noise`; of another run nothing is returned.
      pairs: of the training data, drawn at random and the same for all checkpoints.
    """
    lines: list[dict[str, Any]] = []
    images, texts, wrong = [], [], np.zeros(0, bool)
    for step in RunFolder(folder).steps():
        config, experiment, variables, _ = weights.load(folder, step)
        if not config.data.caption_noise:
            return []
        if not is_due(step, config.steps, config.checkpoint.every):
            continue
        if not images:
            opened = sources.open_sources(config.data)
            source = holdout.apply_controls(opened, config.data, config.seed)[0]
            assert isinstance(source, holdout.NoisyCaptions)
            chosen = np.random.default_rng(0).permutation(len(source))[:pairs]
            records = [source[int(i)] for i in chosen]
            images = [experiment.preprocessing(record["image"]) for record in records]
            texts, wrong = [record["text"][0] for record in records], source.donors[chosen] != chosen
        scores = suspicions(build.make_encoder(experiment), variables, images, texts)
        areas = {name: round(auc(score, wrong), 2) for name, score in scores.items()}
        lines.append({"step": step, "pairs": len(images), "wrong": int(wrong.sum()), **areas})
    return lines


if __name__ == "__main__":
    run, arm, file = sys.argv[1:]
    with imports.trusting(True):  # the run is the duel's own, and so are the modules that it names
        seed, measured = weights.load(run)[0].seed, measure(run)
    with pathlib.Path(file).open("a") as output:
        output.writelines(f"{strict_json({'arm': arm, 'seed': seed, **line})}\n" for line in measured)
