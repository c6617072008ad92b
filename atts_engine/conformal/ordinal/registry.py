"""Set methods and predictors by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from atts_engine.conformal.errors import CalibrationError
from atts_engine.conformal.ordinal.adaptive_mass import OrdinalAPS
from atts_engine.conformal.ordinal.expanding_prefix import ExpandingPrefix
from atts_engine.conformal.ordinal.fixed_sequence import FixedSequence
from atts_engine.conformal.ordinal.minimum_length import MinimumLength
from atts_engine.conformal.ordinal.normalised import NormalisedSets
from atts_engine.conformal.ordinal.ordinal_logistic import OrdinalLogistic
from atts_engine.conformal.ordinal.predictor import Predictor, PrefixTable
from atts_engine.conformal.ordinal.regularised_window import RegularisedWindow
from atts_engine.conformal.ordinal.sets import OrdinalSets
from atts_engine.conformal.ordinal.unimodal import ProbabilityThreshold
from atts_engine.conformal.ordinal.unimodal_head import UnimodalHead

_SETS: Mapping[str, Callable[[float], OrdinalSets]] = MappingProxyType(
    {
        "fixed-sequence": FixedSequence,
        "fixed-sequence-class": partial(FixedSequence, per_class=True),
        "ordinal-aps": OrdinalAPS,
        "min-length": MinimumLength,
        "min-length-regularised": partial(MinimumLength, penalty=0.05),
        "copoc": ProbabilityThreshold,
        "expanding-prefix": ExpandingPrefix,
        "eraps": RegularisedWindow,
        "normalised": NormalisedSets,
        "normalised-snapped": partial(NormalisedSets, snap=True),
    }
)
_PREDICTORS: Mapping[str, Callable[[], Predictor]] = MappingProxyType(
    {"table": PrefixTable, "logistic": OrdinalLogistic, "unimodal": UnimodalHead}
)

SET_METHODS = tuple(_SETS)
"""Names that `make_sets` takes. "copoc" is meant for the probabilities of the predictor "unimodal"."""

PREDICTORS = tuple(_PREDICTORS)
"""Names that `make_predictor` takes."""


def make_sets(name: str, alpha: float) -> OrdinalSets:
    """An uncalibrated method with its default settings; `CalibrationError` lists the names there are, and for alpha
    outside (0, 1)."""
    if name not in _SETS:
        raise CalibrationError(f"no set method {name!r}; there are {', '.join(_SETS)}")
    return _SETS[name](alpha)


def make_predictor(name: str) -> Predictor:
    """An unfitted predictor with its default settings; `CalibrationError` lists the names there are."""
    if name not in _PREDICTORS:
        raise CalibrationError(f"no predictor {name!r}; there are {', '.join(_PREDICTORS)}")
    return _PREDICTORS[name]()
