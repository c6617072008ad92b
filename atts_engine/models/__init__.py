"""Decoders, tokenizers and their loaders."""

from __future__ import annotations

from atts_engine.models.config import ModelConfig, RopeScaling
from atts_engine.models.decoder import Decoder, ForwardBatch
from atts_engine.models.description import Description, describe
from atts_engine.models.detokenizer import Detokenizer
from atts_engine.models.devices import resolve_device
from atts_engine.models.load import Model, builtin_fingerprints, load_model, resolve
from atts_engine.models.tokenizer import Tokenizer

__all__ = [
    "Decoder",
    "Description",
    "Detokenizer",
    "ForwardBatch",
    "Model",
    "ModelConfig",
    "RopeScaling",
    "Tokenizer",
    "builtin_fingerprints",
    "describe",
    "load_model",
    "resolve",
    "resolve_device",
]
