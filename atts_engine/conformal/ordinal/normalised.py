"""Scores divided by their expected spread."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from atts_engine.conformal.errors import CalibrationError
from atts_engine.conformal.ordinal.checks import Bools, Floats, check_finite, check_positive
from atts_engine.conformal.ordinal.judge import snapped_labels
from atts_engine.conformal.ordinal.sets import ScoredSets


class NormalisedSets(ScoredSets):
    """Labels within threshold * (sigma + beta) of the expected label, both moments taken from the class probabilities:
    strangeness |k - mean| / (sigma + beta).

    The predictor was fitted on other data, so mean and sigma are frozen and exchangeability is kept. snap: an endpoint
    of the interval that lies within 0.1 of a label is moved to it (`judge.snap_interval`), which can only add a label.
    Guarantee: as `ScoredSets` (snap: at least). sigma constant over rows gives the sets of |k - mean|. Source:
    normalised conformal prediction, as in arXiv 2402.14080 (abstract; the formula is the common one of Papadopoulos et
    al., 2002, and Lei et al., JASA 2018).
    """

    def __init__(self, alpha: float, *, beta: float = 0.1, snap: bool = False) -> None:
        super().__init__(alpha)
        self.beta = check_positive(beta, "beta")
        self.snap = snap

    def strangeness(self, probabilities: Floats) -> Floats:
        mean, scale = self._moments(probabilities)
        return np.abs(np.arange(probabilities.shape[1]) - mean[:, None]) / scale[:, None]

    def members(self, probabilities: Floats) -> Bools:
        kept = super().members(probabilities)
        if not self.snap or not np.isfinite(self.threshold):
            return kept
        mean, scale = self._moments(probabilities)
        reach = self.threshold * scale
        return kept | snapped_labels(mean - reach, mean + reach, low=0, high=probabilities.shape[1] - 1)

    def _moments(self, f: Floats) -> tuple[Floats, Floats]:
        labels = np.arange(f.shape[1], dtype=np.float64)
        # Not a matrix product: a row's bits must not depend on how many rows there are.
        mean = (f * labels).sum(axis=1)
        variance = (f * (labels - mean[:, None]) ** 2).sum(axis=1)
        return mean, np.sqrt(variance) + self.beta


@dataclass(frozen=True, slots=True)
class GroupNormaliser:
    """(score - mu_g) / (sigma_g + beta) with mu and sigma frozen from other data, by group (task, turn, ...).

    A fixed transformation, applied to calibration and test alike, keeps scores exchangeable; moments taken from the
    calibration scores themselves would not.
    """

    mean: dict[Hashable, float]
    sigma: dict[Hashable, float]
    beta: float

    @classmethod
    def fit(cls, scores: npt.ArrayLike, groups: Sequence[Hashable], *, beta: float = 0.1) -> Self:
        """Moments of `scores` float[N] by `groups` (N of them). `CalibrationError` for an empty input, a group with
        fewer than 2 scores, lengths that differ; `ScoreError` for a score that is not finite."""
        x = check_finite(scores, "scores")
        if len(x) != len(groups) or len(x) == 0:
            raise CalibrationError(f"there are {len(x)} scores for {len(groups)} groups; give one each, at least one")
        members: dict[Hashable, list[float]] = {}
        for group, score in zip(groups, x.tolist()):
            members.setdefault(group, []).append(score)
        for group, held in members.items():
            if len(held) < 2:
                raise CalibrationError(f"group {group!r} needs 2 or more scores for a spread, it has 1")
        return cls(
            {group: float(np.mean(held)) for group, held in members.items()},
            {group: float(np.std(held, ddof=1)) for group, held in members.items()},
            check_positive(beta, "beta"),
        )

    def __call__(self, scores: npt.ArrayLike, groups: Sequence[Hashable]) -> Floats:
        """Normalised scores float64[N]; `CalibrationError` for a group without moments, otherwise as `fit`."""
        x = check_finite(scores, "scores")
        if len(x) != len(groups):
            raise CalibrationError(f"there are {len(x)} scores for {len(groups)} groups; give one each")
        for group in groups:
            if group not in self.mean:
                raise CalibrationError(
                    f"group {group!r} has no frozen moments (known: {', '.join(map(repr, self.mean))})"
                )
        mean = np.asarray([self.mean[group] for group in groups], dtype=np.float64)
        sigma = np.asarray([self.sigma[group] for group in groups], dtype=np.float64)
        return (x - mean) / (sigma + self.beta)
