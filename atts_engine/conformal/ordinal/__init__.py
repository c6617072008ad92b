"""Ordinal prediction sets and the early verdicts they allow (docs/ordinal.md)."""

from atts_engine.conformal.ordinal.adaptive_mass import OrdinalAPS, mass_before
from atts_engine.conformal.ordinal.bins import RankBins
from atts_engine.conformal.ordinal.evidence import belief_intervals, beliefs, evidence_of
from atts_engine.conformal.ordinal.expanding_prefix import ExpandingPrefix
from atts_engine.conformal.ordinal.fixed_sequence import FixedSequence
from atts_engine.conformal.ordinal.judge import midpoint, snap_interval, snapped_labels
from atts_engine.conformal.ordinal.minimum_length import MinimumLength, minimum_length_interval
from atts_engine.conformal.ordinal.normalised import GroupNormaliser, NormalisedSets
from atts_engine.conformal.ordinal.ordinal_logistic import OrdinalLogistic
from atts_engine.conformal.ordinal.predictor import Predictor, PrefixTable
from atts_engine.conformal.ordinal.registry import PREDICTORS, SET_METHODS, make_predictor, make_sets
from atts_engine.conformal.ordinal.regularised_window import RegularisedWindow, regularised_scores
from atts_engine.conformal.ordinal.sets import OrdinalSets, ScoredSets
from atts_engine.conformal.ordinal.unimodal import ProbabilityThreshold
from atts_engine.conformal.ordinal.unimodal_head import UnimodalHead, unimodal_probabilities
from atts_engine.conformal.ordinal.verdict import EarlyVerdict, Side, early_verdict, side

__all__ = [
    "PREDICTORS",
    "SET_METHODS",
    "EarlyVerdict",
    "ExpandingPrefix",
    "FixedSequence",
    "GroupNormaliser",
    "MinimumLength",
    "NormalisedSets",
    "OrdinalAPS",
    "OrdinalLogistic",
    "OrdinalSets",
    "Predictor",
    "PrefixTable",
    "ProbabilityThreshold",
    "RankBins",
    "RegularisedWindow",
    "ScoredSets",
    "Side",
    "UnimodalHead",
    "belief_intervals",
    "beliefs",
    "early_verdict",
    "evidence_of",
    "make_predictor",
    "make_sets",
    "mass_before",
    "midpoint",
    "minimum_length_interval",
    "regularised_scores",
    "side",
    "snap_interval",
    "snapped_labels",
    "unimodal_probabilities",
]
