"""Strategies by name, as they are written on a command line."""

from __future__ import annotations

import pytest

from atts_engine.errors import InputError
from atts_engine.pipeline import STRATEGIES, ATTSParams, parse_strategy, strategy_text
from atts_engine.pipeline.settings import SETTINGS, make_settings


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_has_defaults_and_a_source(name: str) -> None:
    assert isinstance(make_settings(name), SETTINGS[name])
    assert (SETTINGS[name].__doc__ or "").strip()
    assert parse_strategy(strategy_text(name, ())) == (name, ())
    assert ATTSParams(strategy=name).settings == make_settings(name)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("best", "strategy must be one of atts, "),
        ("atts:window=3", "the strategy atts has no option 'window'; it has none"),
        ("draft:window", "NAME:option=value"),
        ("draft:=3", "NAME:option=value"),
    ],
)
def test_what_cannot_be_read_is_named(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        parse_strategy(text)
