"""Shows how clusters arise, and what a contrastive term adds: nCLIP and xCLIP on points of a plane and words.

    python -m examples.clusters [docs/clusters]

Takes two minutes on two cores and draws the two figures of docs/clusters.md. An image is a point near one of twelve
places, its caption one of the two words for that place. The loss learns neither which words mean the same nor how
many places there are; it has 16 clusters to use. In the second part points lie on eight sides of each place, and
captions name the side: 96 things, which 16 clusters cannot tell apart.
"""

import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from xclip_jax import losses
from xclip_jax.losses.noncontrastive import Metrics, nclip
from xclip_jax.report.picture import EDGE, MUTED, Row, save

FIRST = ("cat", "car", "sea", "stone", "child", "ship", "road", "shop", "gift", "forest", "sofa", "film")
SECOND = ("kitten", "auto", "ocean", "rock", "kid", "boat", "street", "store", "present", "wood", "couch", "movie")
ANGLES = 2 * np.pi * np.arange(12) / 12
PLACES = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1)
SETTINGS = {"no regulariser": (0, 0), "sharpness only": (1, 0), "smoothness only": (0, 2), "both": (1, 2)}
SIDES = 8  # of a place, in the second part
COLORS = [f"hsl({(i * 97.5) % 360:.0f},75%,{(38, 52)[i % 2]}%)" for i in range(16)]  # of the clusters
LINES = (MUTED, "#d55e00", "#0072b2", "#009e73")  # of the settings
TOWERS = {  # each ends in logits over the clusters
    "img": nn.Sequential([nn.Dense(64), nn.gelu, nn.Dense(64), nn.gelu, nn.LayerNorm(), nn.Dense(len(COLORS))]),
    "txt": nn.Sequential([nn.Embed(24, 64), nn.Dense(64), nn.gelu, nn.LayerNorm(), nn.Dense(len(COLORS))]),
}


def pairs(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Draw a batch of 256 points (b, 2) and the numbers of their words (b,)."""
    place = rng.integers(0, 12, 256)
    return {"img": PLACES[place] + rng.normal(0, 0.07, (256, 2)), "txt": place + 12 * rng.integers(0, 2, 256)}


def cluster_logits(params: Any, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Apply both towers. (b, 2) and (b,) -> (b, 16) each."""
    return {name: jnp.asarray(tower.apply(params[name], batch[name])) for name, tower in TOWERS.items()}


def train(sharpness: float, smoothness: float, steps: int = 400) -> tuple[Any, list[dict[str, float]]]:
    """Train both towers from scratch; return their parameters and the metrics of each step."""
    rng = np.random.default_rng(0)
    optimizer = optax.adam(3e-3)

    def loss(params: Any, batch: dict[str, np.ndarray]) -> tuple[jax.Array, Metrics]:
        logits = cluster_logits(params, batch)
        return nclip(logits["img"], logits["txt"], sharpness=sharpness, smoothness=smoothness)

    @jax.jit
    def step(params: Any, state: Any, batch: dict[str, np.ndarray]) -> tuple[Any, Any, Metrics]:
        gradients, metrics = jax.grad(loss, has_aux=True)(params, batch)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, metrics

    params: Any = {name: tower.init(jax.random.key(0), pairs(rng)[name]) for name, tower in TOWERS.items()}
    state = optimizer.init(params)
    history = []
    for _ in range(steps):
        params, state, metrics = step(params, state, pairs(rng))
        history.append({name: float(value) for name, value in metrics.items()})
    return params, history


class Tower(nn.Module):
    """Features of points (b, 2) or texts (b,), with a head for embeddings (b, 32) and one for clusters (b, 16)."""

    @nn.compact
    def __call__(self, inputs: np.ndarray) -> tuple[jax.Array, jax.Array]:
        x = nn.Dense(64)(inputs) if inputs.ndim == 2 else nn.Embed(24 * SIDES, 64)(inputs)
        x = nn.LayerNorm()(nn.gelu(nn.Dense(64)(nn.gelu(x))))
        embeddings = nn.Dense(32)(x)
        return embeddings / jnp.linalg.norm(embeddings, axis=1, keepdims=True), nn.Dense(len(COLORS))(x)


def heads(params: Any, inputs: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Return a tower's embeddings and cluster logits."""
    tower: Any = Tower()
    return tower.apply(params, inputs)


def things(rng: np.random.Generator, count: int = 256) -> dict[str, np.ndarray]:
    """Draw points (count, 2) on one of eight sides of a place, and the numbers of their texts (count,)."""
    place = rng.integers(0, 12, count)
    side = rng.integers(0, SIDES, count)
    angle = 2 * np.pi * side / SIDES
    offset = 0.12 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    points = PLACES[place] + offset + rng.normal(0, 0.02, (count, 2))
    return {"img": points, "txt": (place + 12 * rng.integers(0, 2, count)) * SIDES + side}


def compare(name: str, steps: int = 1000) -> tuple[float, float, float]:
    """Train one objective on things; return what it tells apart.

    Returns:
      Fraction of points whose nearest text names the right thing, and the right place; and the mutual information of
      the points' clusters and their places in nats.
    """
    rng = np.random.default_rng(0)
    optimizer = optax.adam(3e-3)

    def loss(params: Any, batch: dict[str, np.ndarray]) -> jax.Array:
        z_img, s_img = heads(params["img"], batch["img"])
        z_txt, s_txt = heads(params["txt"], batch["txt"])
        contrast = losses.clip(z_img, z_txt, jnp.exp(params["log_scale"]))[0]
        clusters = losses.nclip(s_img, s_txt)[0]
        return (name != "nclip") * contrast + (name != "clip") * clusters

    @jax.jit
    def step(params: Any, state: Any, batch: dict[str, np.ndarray]) -> tuple[Any, Any]:
        updates, state = optimizer.update(jax.grad(loss)(params, batch), state)
        return optax.apply_updates(params, updates), state

    params: Any = {t: Tower().init(jax.random.key(0), things(rng)[t]) for t in ("img", "txt")}
    params["log_scale"] = jnp.log(10.0)
    state = optimizer.init(params)
    for _ in range(steps):
        params, state = step(params, state, things(rng))
    test = things(np.random.default_rng(1), 2000)
    z_img, s_img = heads(params["img"], test["img"])
    z_txt, s_txt = heads(params["txt"], np.arange(24 * SIDES))
    by_clusters = jax.nn.softmax(s_img) @ jax.nn.log_softmax(s_txt).T
    scores = by_clusters if name == "nclip" else z_img @ z_txt.T  # nCLIP trains no embeddings
    found = np.asarray(scores.argmax(1)) % (12 * SIDES)
    right = test["txt"] % (12 * SIDES)
    table = np.zeros((len(COLORS), 12))
    np.add.at(table, (np.asarray(s_img.argmax(1)), right // SIDES), 1 / len(right))
    independent = table.sum(1, keepdims=True) * table.sum(0)
    seen = table > 0
    information = (table[seen] * np.log(table[seen] / independent[seen])).sum()
    return float((found == right).mean()), float((found // SIDES == right // SIDES).mean()), float(information)


def main(folder: str = "docs/clusters") -> None:
    """Train with each setting; print the last metrics, draw points and words, and the mutual information."""
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    planes = Row(470)
    curves = Row(340)
    curves.text(60, 32, "Mutual information of images and clusters in nats, over 400 steps", 22, bold=True)
    for value in (0, 1, 2):
        curves.box(60, 310 - 100 * value, 1496, 1, EDGE)
        curves.text(50, 316 - 100 * value, str(value), 16, MUTED, anchor="rs")
    for i, (name, weights) in enumerate(SETTINGS.items()):
        params, history = train(*weights)
        print(f"{name}: " + ", ".join(f"{metric} {value:.2f}" for metric, value in history[-1].items()))
        points = pairs(np.random.default_rng(1))["img"]
        logits = cluster_logits(params, {"img": points, "txt": np.arange(24)})
        colors = {tower: [COLORS[k] for k in values.argmax(1)] for tower, values in logits.items()}
        planes.text(200 + 400 * i, 32, name, 22, bold=True, anchor="ms")
        for (x, y), color in zip(points, colors["img"], strict=True):
            planes.box(197 + 400 * i + 115 * x, 242 - 115 * y, 6, 6, color, radius=3)
        for n, (word, color) in enumerate(zip(FIRST + SECOND, colors["txt"], strict=True)):
            x, y = PLACES[n % 12] * 165
            planes.text(200 + 400 * i + x, 240 - y + 18 * (n // 12), word, 15, color, anchor="ms")
        for t, metrics in enumerate(history):
            height = 100 * metrics["mutual_information_img"]
            curves.box(60 + 3.6 * t, 308 - height, 4, 4, LINES[i], radius=2)
        curves.text(1556, 302 - height - 18 * (i == 2), name, 16, LINES[i], anchor="rs")
    save(f"{folder}/words.png", [planes])
    save(f"{folder}/information.png", [curves])
    for name in ("clip", "nclip", "xclip"):
        thing, place, information = compare(name)
        print(f"{name}: thing {thing:.1%}, place {place:.1%}, clusters' information {information:.2f} nats")


if __name__ == "__main__":
    main(*sys.argv[1:])
