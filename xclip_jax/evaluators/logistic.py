"""Logistic regression for many penalties at once: L-BFGS in JAX, with scikit-learn's objective.

For each C the objective, in nats, is  mean_i [-log softmax(x_i W + b)_(y_i)] + |W|^2 / (2 C n).  This is the objective
of `sklearn.linear_model.LogisticRegression` divided by C n; the bias is not penalised. For two classes scikit-learn
has one vector w, the difference of the two logits' weights, and the penalty |w|^2 / (2 C n). The columns of W with the
least penalty are -w / 2 and w / 2, with |W|^2 = |w|^2 / 2: doubling the penalty on W gives the same objective.
All C share each pass over the features. A label may be shared among classes: its loss is the mean over the shares.

Three things save time without changing the solution. Logits are linear in W, so line searches need no product with
the features. Features are centred (the bias compensates) and rotated to their principal axes, where the Hessian's
diagonal is known up to a factor and serves as the preconditioner. Converged problems are dropped.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xclip_jax.core import console
from xclip_jax.core.errors import UserError

HISTORY, _ITERATIONS = 10, 1000
_SCORES = 1 << 27  # logits in memory at once (about four fp32 arrays); more values of C are solved in turns
_SMALL = 1 << 24  # number of logits up to which keeping converged problems is cheaper than recompiling
_ROUND = 4  # iterations between checks for convergence
_BLOCK = 1 << 22  # numbers in a block of features
_STALLED = 1e-10  # smallest promised improvement of a step, relative to the objective

State = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Fit:
    """Solutions, one per C."""

    weights: np.ndarray  # fp32 (cs, d, classes)
    bias: np.ndarray  # fp32 (cs, classes); its mean over classes is zero
    objective: np.ndarray  # (cs,), see the module's docstring

    def logits(self, x: np.ndarray) -> np.ndarray:
        """Return the logits (cs, n, classes) of features (n, d)."""
        return np.einsum("nd,cdk->cnk", x, self.weights, optimize=True) + self.bias[:, None]


def fit(
    x: np.ndarray, y: np.ndarray, cs: np.ndarray | Sequence[float], classes: int, *, tolerance: float = 1e-5
) -> Fit:
    """Fit every C in `cs`.

    Args:
      x: features fp32 (n, d).
      y: classes int (n,) below `classes`, or shares of the classes (n, classes), rows of sum 1. A class may be empty.
      cs: inverse strengths of the penalty, above 0, like scikit-learn's for the occurring classes.
      classes: number of classes.
      tolerance: maximum absolute component of the gradient at a solution, like scikit-learn's `tol` (default 1e-4).
    """
    x = np.asarray(x, np.float32)
    y = np.asarray(y)
    cs = np.asarray(cs, np.float64)
    n, d = x.shape
    occurring = len(np.unique(y)) if y.ndim == 1 else np.count_nonzero(y.any(axis=0))
    penalty = 2.0 if occurring == 2 else 1.0
    rotated, mean, spectrum, axes = _rotate(x)
    labels = jnp.asarray(y, jnp.int32 if y.ndim == 1 else jnp.float32)
    back = jnp.asarray(np.block([[axes, mean[:, None]], [np.zeros((1, d)), np.ones((1, 1))]]), jnp.float32)
    # The diagonal of softmax's Hessian is p (1 - p), initially about 1 / classes.
    curvature = np.append(np.maximum(spectrum, 0), 1.0) / classes
    fits = []
    group = max(1, _SCORES // (n * classes))
    for start in range(0, len(cs), group):
        ridge = np.outer(np.append(np.ones(d), 0.0), penalty / (n * cs[start : start + group]))  # (d + 1, cs)
        scale = 1 / (curvature[:, None] + ridge)
        fits.append(_solve(rotated, labels, back, ridge, scale, classes, tolerance))
    w = np.concatenate([w for w, _ in fits], axis=1).transpose(1, 0, 2)  # (cs, d + 1, classes)
    weights = np.einsum("de,cek->cdk", axes, w[:, :-1], optimize=True)
    bias = w[:, -1] - np.einsum("d,cdk->ck", mean, weights)
    bias -= bias.mean(axis=1, keepdims=True)
    objective = np.concatenate([objective for _, objective in fits])
    return Fit(weights.astype(np.float32), bias.astype(np.float32), objective)


def _rotate(x: np.ndarray) -> tuple[jax.Array, np.ndarray, np.ndarray, np.ndarray]:
    """Return x (n, d), centred and along its principal axes, with a column of ones; and mean, spectrum and axes.

    Works in blocks, without another copy of `x`.
    """
    n, d = x.shape
    mean = x.mean(axis=0, dtype=np.float64)
    step = max(1, _BLOCK // d)
    if not np.isfinite(mean).all():
        raise UserError("a probe's features are not finite: the model diverged.")
    gram = np.zeros((d, d))
    for start in range(0, n, step):
        centred = (x[start : start + step] - mean).astype(np.float32)
        gram += centred.T @ centred
    spectrum, axes = np.linalg.eigh(gram / n)
    rotated = np.empty((n, d + 1), np.float32)
    narrow = axes.astype(np.float32)
    rotated[:, d] = 1
    for start in range(0, n, step):
        rotated[start : start + step, :d] = (x[start : start + step] - mean).astype(np.float32) @ narrow
    return jax.device_put(rotated, may_alias=True), mean, spectrum, axes


def _solve(
    x: jax.Array, y: jax.Array, back: jax.Array, ridge: np.ndarray, scale: np.ndarray, classes: int, tolerance: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return weights (d + 1, cs, classes) and objective (cs,); `ridge` and `scale` are (d + 1, cs)."""
    d, count = ridge.shape
    history = jnp.zeros((HISTORY, d, count, classes), jnp.float32)
    # With zero weights every class has probability 1 / classes.
    wrong = 1 / classes - np.asarray(_target(y, classes))
    g = np.repeat((np.asarray(x).T @ wrong / len(x))[:, None], count, axis=1)
    state = {
        "ridge": jnp.asarray(ridge, jnp.float32)[..., None],
        "scale": jnp.asarray(scale, jnp.float32)[..., None],
        "w": jnp.zeros((d, count, classes), jnp.float32),
        "z": jnp.zeros((len(x), count, classes), jnp.float32),
        "g": jnp.asarray(g),
        "s": history,
        "y": history,
        "rho": jnp.zeros((HISTORY, count), jnp.float32),
        "done": jnp.zeros(count, bool),
        "value": jnp.full(count, np.log(classes), jnp.float32),
        "iteration": jnp.zeros((), int),
    }
    alive = np.arange(count)
    weights = np.zeros((d, count, classes), np.float32)
    objective = np.zeros(count)
    for _ in range(0, _ITERATIONS, _ROUND):
        console.report_progress(all_processes=False)  # the number of rounds depends on rounding
        state = _iterate(x, y, back, state, tolerance)
        keep = np.flatnonzero(~np.asarray(state["done"]))
        last = not len(keep) or int(state["iteration"]) >= _ITERATIONS
        # Each new shape is compiled: drop only large problems, and only if at least a quarter has converged.
        if last or (4 * len(keep) <= 3 * len(alive) and state["z"].size > _SMALL):
            weights[:, alive] = np.asarray(state["w"])
            objective[alive] = np.asarray(state["value"])
            if last:
                break
            alive = alive[keep]
            state |= {key: jnp.take(state[key], keep, axis=axis) for key, axis in _AXIS_OF_CS.items()}
    return weights, objective


_AXIS_OF_CS = {"ridge": 1, "scale": 1, "w": 1, "z": 1, "g": 1, "s": 2, "y": 2, "rho": 1, "done": 0, "value": 0}
_matmul = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return (a * b).sum(axis=(0, 2))


def _label_logits(z: jax.Array, y: jax.Array) -> jax.Array:
    """Return the labels' logits (n, cs) from z (n, cs, classes), for shared labels the mean over the shares."""
    if y.ndim == 1:
        return jnp.take_along_axis(z, y[:, None, None], axis=2)[..., 0]
    return (z * y[:, None]).sum(axis=2)


def _target(y: jax.Array, classes: int) -> jax.Array:
    return jax.nn.one_hot(y, classes) if y.ndim == 1 else y


def _gradient(x: jax.Array, y: jax.Array, z: jax.Array, w: jax.Array, ridge: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return objective (cs,) and gradient (d, cs, classes) at the logits z (n, cs, classes) of w."""
    n, _, k = z.shape
    value = (jax.nn.logsumexp(z, axis=2) - _label_logits(z, y)).mean(axis=0) + _dot(ridge * w, w) / 2
    wrong = jax.nn.softmax(z, axis=2) - _target(y, k)[:, None]
    return value, _matmul("nd,nck->dck", x, wrong) / n + ridge * w


def _direction(state: State) -> jax.Array:
    """Return L-BFGS's direction for each C by the two-loop recursion; empty pairs of the history have rho 0."""
    newest = (state["iteration"] - 1 - jnp.arange(HISTORY)) % HISTORY

    def down(j: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        q, alphas = carry
        i = newest[j]
        alpha = state["rho"][i] * _dot(state["s"][i], q)
        return q - alpha[:, None] * state["y"][i], alphas.at[j].set(alpha)

    def up(j: int, r: jax.Array) -> jax.Array:
        i = newest[HISTORY - 1 - j]
        beta = state["rho"][i] * _dot(state["y"][i], r)
        return r + (alphas[HISTORY - 1 - j] - beta)[:, None] * state["s"][i]

    q, alphas = jax.lax.fori_loop(0, HISTORY, down, (state["g"], jnp.zeros_like(state["rho"])))
    y, rho = state["y"][newest[0]], state["rho"][newest[0]]
    gamma = jnp.where(rho > 0, 1 / jnp.maximum(rho * _dot(y * state["scale"], y), 1e-30), 1.0)
    return -jax.lax.fori_loop(0, HISTORY, up, gamma[:, None] * state["scale"] * q)


def _search(y: jax.Array, state: State, p: jax.Array, zp: jax.Array, slope: jax.Array) -> jax.Array:
    """Return steps (cs,) along p at which the slope is half as steep or less: Newton's method within a bracket.

    Only slopes are compared: near the solution values are too coarse in fp32.
    """
    toward_labels = _label_logits(zp, y).mean(axis=0)
    wp = _dot(state["ridge"] * state["w"], p)
    pp = _dot(state["ridge"] * p, p)

    def derivatives(t: jax.Array) -> tuple[jax.Array, jax.Array]:
        prob = jax.nn.softmax(state["z"] + t[:, None] * zp, axis=2)
        first = (prob * zp).sum(axis=2)
        second = (prob * zp * zp).sum(axis=2) - first**2
        return first.mean(axis=0) - toward_labels + wp + t * pp, second.mean(axis=0) + pp

    def body(carry: Any) -> Any:
        t = carry["t"]
        first, second = derivatives(t)
        ok = carry["ok"] | (jnp.abs(first) <= 0.5 * jnp.abs(slope))
        low = jnp.where(first < 0, t, carry["low"])
        high = jnp.where(first < 0, carry["high"], t)
        new = t - first / jnp.maximum(second, 1e-30)
        middle = jnp.where(jnp.isinf(high), 4 * t, (low + high) / 2)
        new = jnp.where((new > low) & (new < jnp.minimum(high, 10 * t)), new, middle)
        return {"t": jnp.where(ok, t, new), "ok": ok, "low": low, "high": high, "i": carry["i"] + 1}

    bracket = {"low": jnp.zeros_like(slope), "high": jnp.full_like(slope, jnp.inf)}
    start: dict[str, Any] = {"t": jnp.ones_like(slope), "ok": state["done"], "i": 0} | bracket
    return jax.lax.while_loop(lambda carry: (~carry["ok"]).any() & (carry["i"] < 12), body, start)["t"]


@jax.jit
def _iterate(x: jax.Array, y: jax.Array, back: jax.Array, state: State, tolerance: float) -> State:
    """Return the state after up to `_ROUND` iterations; converged problems do not change."""
    stop = jnp.minimum(state["iteration"] + _ROUND, _ITERATIONS)

    def body(state: State) -> State:
        p = _direction(state)
        slope = _dot(state["g"], p)
        steepest = jnp.abs(_matmul("de,eck->dck", back, state["g"])).max(axis=(0, 2))
        done = state["done"] | (steepest <= tolerance) | (-slope <= _STALLED * state["value"]) | ~jnp.isfinite(slope)
        state = state | {"done": done}
        p = jnp.where(done[:, None], 0, p)
        zp = _matmul("nd,dck->nck", x, p)
        t = jnp.where(done, 0, _search(y, state, p, zp, slope))
        s = t[:, None] * p
        w, z = state["w"] + s, state["z"] + t[:, None] * zp
        value, g = _gradient(x, y, z, w, state["ridge"])
        change = g - state["g"]
        sy = _dot(s, change)
        slot = state["iteration"] % HISTORY
        return state | {
            "w": w,
            "z": z,
            "g": g,
            "value": value,
            "iteration": state["iteration"] + 1,
            "s": state["s"].at[slot].set(s),
            "y": state["y"].at[slot].set(change),
            "rho": state["rho"].at[slot].set(jnp.where(sy > 0, 1 / jnp.maximum(sy, 1e-37), 0)),
        }

    return jax.lax.while_loop(lambda s: (~s["done"]).any() & (s["iteration"] < stop), body, state)
