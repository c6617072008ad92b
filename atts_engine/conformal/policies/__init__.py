"""Budget policies: at which level a problem's spans are tested, so that its count of takeovers holds."""

from __future__ import annotations

from collections.abc import Callable

from atts_engine.conformal.errors import CalibrationError
from atts_engine.conformal.policies.base import Policy, Threshold
from atts_engine.conformal.policies.exact_count import ExactCount
from atts_engine.conformal.policies.top_b import TopB

__all__ = ["POLICIES", "ExactCount", "Policy", "Threshold", "TopB", "make_policy"]

_BY_NAME: dict[str, Callable[[float], Threshold | ExactCount | TopB]] = {
    Threshold.name: Threshold,
    "exact-count": ExactCount,
    "exact-count-dlr": lambda alpha: ExactCount(alpha, optimal=True),
    TopB.name: TopB,
}

POLICIES = tuple(_BY_NAME)


def make_policy(name: str, alpha: float) -> Threshold | ExactCount | TopB:
    """A policy by name; `CalibrationError` lists the names there are."""
    if name not in _BY_NAME:
        raise CalibrationError(f"no policy {name!r} in this version; there are {', '.join(_BY_NAME)}")
    return _BY_NAME[name](alpha)
