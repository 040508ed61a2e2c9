"""Whether actions and rewards stand in the rows where they belong, from the data alone.

Action t is explained by the states around it, (s_t, s_{t+1}), at least as well as by those around
another step, be it through the policy that saw s_t or through the effect on s_{t+1}. If states
around the step before or after explain it clearly better, rows are shifted. Rewards: the same with
(s_t, u_t, s_{t+1}).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mpd_gym.types import Array

__all__ = ["SHIFTS", "Shift", "shifted_rows", "threshold_breaks"]

SHIFTS = ("", "late", "early")  # row t holds what belongs to step t, t - 1, t + 1
_PAIRS = (slice(None), slice(None)), (slice(-1), slice(1, None)), (slice(1, None), slice(-1))
_MOST_FEATURES = 700  # of a regression: no products beyond
_EXPLAINED, _BETTER, _MARGIN = 0.5, 0.5, 0.02  # unexplained shares at most; the gain at least
_RARELY, _ROUNDING = 0.1, 1e-4  # breaks of a threshold, to rewards that keep it; of distances


class Shift(NamedTuple):
    """Rows that belong to another step."""

    kind: int  # index into `SHIFTS`
    episodes: Array  # positions, in the order given
    recorded: float  # share of the variance there that stays unexplained
    shifted: float  # the same with rows shifted back


def shifted_rows(contexts: Sequence[Array], series: Sequence[Array]) -> Shift | None:
    """Find episodes whose rows are explained clearly better by the context of another step.

    Ridge regressions on every second episode are judged on the others.

    Args:
        contexts: What should explain each row, an array ``[T, p]`` for each episode, T >= 3.
        series: Actions or rewards, ``[T, m]`` each.

    Returns:
        The commonest shift; None if there is none, or too little data to tell.
    """
    rows = _standardized(series)
    x = _features(contexts, at_most=sum(map(len, rows)) // 6)
    if x is None or len(series) < 2 or not rows[0].size:
        return None
    targets = [np.stack([y[1:-1], y[2:], y[:-2]], axis=-1) for y in rows]  # [T - 2, m, kind]
    errors = _cross_fitted(x, targets)  # [episode, kind learned, kind judged]
    sizes = np.array([target[..., 0].size for target in targets])
    shares = np.diagonal(errors.sum(axis=0)) / sizes.sum()
    learned = _clearly_best(shares)
    if shares[learned] > _EXPLAINED:
        return None
    each = errors[:, learned] / np.maximum(sizes, 1)[:, None]
    found = np.array([_clearly_best(error) for error in each])
    found[sizes < 10 * rows[0].shape[1]] = 0
    if not learned:  # where most rows are right, shifted ones are explained worse than all of them
        found[each[:, 0] <= each[found == 0, 0].max(initial=0.0)] = 0
    if not found.any():
        return None
    kind = int(np.bincount(found, minlength=3)[1:].argmax()) + 1
    episodes = np.flatnonzero(found == kind)
    left = errors[episodes, learned].sum(axis=0) / sizes[episodes].sum()
    return Shift(kind, episodes, float(left[0]), float(left[kind]))


def threshold_breaks(
    distances: Sequence[Array], rewards: Sequence[Array]
) -> tuple[int, float, int, int] | None:
    """Find two-valued rewards that do not follow from a distance where nearly all others do.

    Args:
        distances: From achieved to desired goal after each step, ``[T]`` each.
        rewards: ``[T]`` each.

    Returns:
        Which of `SHIFTS` all have, the threshold, and the first episode and step that breaks it;
        None if rewards do not follow a threshold, or all do.
    """
    values = np.unique(np.hstack(rewards)) if rewards else np.empty(0)
    if len(values) != 2:
        return None
    found = None
    for kind, (there, here) in enumerate(_PAIRS):
        far = np.hstack([one[there] for one in distances])
        near = np.hstack([one[here] for one in rewards]) == values[1]
        order = far.argsort()
        hits = near[order].cumsum()
        wrong = np.arange(1, len(far) + 1) + hits[-1] - 2 * hits  # if only the first are near
        threshold = far[order[wrong.argmin()]]
        broken = ((far <= threshold) != near) & (np.abs(far - threshold) > _ROUNDING * threshold)
        if kind and not broken.any():
            return kind, float(threshold), 0, 0
        if not kind and not broken.any():
            return None
        if not kind and broken.sum() <= _RARELY * hits[-1]:
            ends, first = np.cumsum([len(one) for one in rewards]), int(broken.argmax())
            episode = int(np.searchsorted(ends, first, side="right"))
            found = 0, float(threshold), episode, first - int(ends[episode]) + len(rewards[episode])
    return found


def _standardized(pieces: Sequence[Array]) -> list[Array]:
    """The columns that vary, with mean 0 and deviation 1."""
    together = np.concatenate(pieces)
    mean, deviation = together.mean(axis=0), together.std(axis=0)
    varying = deviation > 1e-6 * np.abs(together).max(axis=0)
    return [(piece - mean)[:, varying] / deviation[varying] for piece in pieces]


def _features(contexts: Sequence[Array], at_most: int) -> list[Array] | None:
    """Inner rows with a constant, and squares and products where they are not too many."""
    x = [np.clip(rows[1:-1], -5, 5) for rows in _standardized(contexts)]
    first, second = np.triu_indices(x[0].shape[1])
    if 1 + x[0].shape[1] + len(first) <= min(at_most, _MOST_FEATURES):
        x = [np.hstack([rows, rows[:, first] * rows[:, second]]) for rows in x]
    elif x[0].shape[1] >= at_most:
        return None
    return [np.insert(rows, 0, 1.0, axis=1) for rows in x]


def _cross_fitted(x: Sequence[Array], targets: Sequence[Array]) -> Array:
    """Squared errors of each episode, by the shift that was learned and the one judged."""
    weights = []
    for fold in (0, 1):
        known, wanted = np.concatenate(x[fold::2]), np.concatenate(targets[fold::2])
        gram = known.T @ known
        gram += 1e-6 * np.trace(gram) / len(gram) * np.eye(len(gram))
        weights.append(np.linalg.solve(gram, known.T @ wanted.reshape(len(wanted), -1)))
    guesses = [(rows @ weights[1 - e % 2]).reshape(targets[e].shape) for e, rows in enumerate(x)]
    return np.stack([
        np.square(guess[..., :, None] - target[..., None, :]).sum(axis=(0, 1))
        for guess, target in zip(guesses, targets, strict=True)
    ])  # fmt: skip


def _clearly_best(shares: Array) -> int:
    """The shift with the least unexplained share if it is clearly below that as recorded."""
    best = int(shares.argmin())
    return best if shares[best] < min(_BETTER * shares[0], shares[0] - _MARGIN) else 0
