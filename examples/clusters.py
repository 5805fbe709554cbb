"""Shows how clusters arise: nCLIP's loss on points of a plane and words, with and without its two regularisers.

    python -m examples.clusters docs/clusters

Takes a minute on two cores and draws the two figures of docs/clusters.md. An image is a point near one of twelve
places, its caption one of the two words for that place. The loss learns neither which words mean the same nor how
many places there are; it has 16 clusters to use.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from xclip_jax.losses.noncontrastive import Metrics, nclip
from xclip_jax.report.picture import EDGE, MUTED, Row, save

FIRST = ("cat", "car", "sea", "stone", "child", "ship", "road", "shop", "gift", "forest", "sofa", "film")
SECOND = ("kitten", "auto", "ocean", "rock", "kid", "boat", "street", "store", "present", "wood", "couch", "movie")
ANGLES = 2 * np.pi * np.arange(12) / 12
PLACES = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1)
SETTINGS = {"no regulariser": (0, 0), "sharpness only": (1, 0), "smoothness only": (0, 2), "both": (1, 2)}
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


def main(folder: str) -> None:
    """Train with each setting; print the last metrics, draw points and words, and the mutual information."""
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


if __name__ == "__main__":
    main(*sys.argv[1:])
