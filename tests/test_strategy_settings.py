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
        ("draft:window=3", "the strategy draft has no option 'window'; it has none"),
        ("atts:window=3", "the strategy atts has no option 'window'; it has span, scorer"),
        ("rsd:threshold=1.5", "threshold must be a number from 0 to 1, not 1.5"),
        ("rsd:gate=often", "gate must be one of threshold, conformal, not 'often'"),
        ("spec-reason:judge=me", "judge must be one of target, task, not 'me'"),
        ("spec-reason:expected=2", "expected must be true or false, not 2"),
        ("atts:span=page", "span must be one of tokens, step, not 'page'"),
        ("atts:scorer=luck", "scorer must be one of mean-nll, "),
        ("draft:window", "NAME:option=value"),
        ("draft:=3", "NAME:option=value"),
    ],
)
def test_what_cannot_be_read_is_named(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        parse_strategy(text)
