"""Reports: one file, well formed, nothing from the network, nothing of a chain's text taken for markup."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from atts_engine.conformal import Mondrian
from atts_engine.evaluation import plots
from atts_engine.evaluation.chains_html import chain_text, chosen_problems, timeline, worst_chains
from atts_engine.evaluation.job import JobResult, job_settings, run_job
from atts_engine.evaluation.report import comparison_report, run_report
from atts_engine.evaluation.summary import comparison, figures
from atts_engine.pipeline import ATTSParams, Chain, Turn
from tests.fake_engine import FakeEngine, Silent, some_problems

PARAMS = ATTSParams(chains=4)
PROBLEMS = some_problems(4)
VOID = {"meta", "br", "path", "use", "rect", "line", "circle", "image", "stop", "link"}


class Page(HTMLParser):
    """Checks that elements nest, collects ids and texts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.tags: set[str] = set()
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]
        for name, value in attrs:
            assert name not in ("src", "onload", "onclick"), (tag, name)
            if name in ("href", "xlink:href"):
                assert value is not None and value.startswith("#"), value
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def job(strategy: str) -> JobResult:
    params = replace(PARAMS, strategy=strategy)
    calibrator = Mondrian(0.4)
    return asyncio.run(run_job(FakeEngine(), PROBLEMS, params, Silent(), calibrator=calibrator))


def settings() -> dict[str, object]:
    return job_settings("draft<model>", "target&model", "float32", PARAMS, {}, PROBLEMS)


def check(html: str) -> Page:
    read = Page(html)
    assert read.stack == []
    assert len(read.ids) == len(set(read.ids))
    assert "script" not in read.tags
    assert "url(http" not in html and "@import" not in html
    return read


def test_a_run_report_is_one_sound_file() -> None:
    result = job("atts")
    html = run_report(result, {**figures(result, PARAMS), "settings": settings()})
    words = " ".join(check(html).words)
    assert "draft<model>" in words
    assert "step 0 <b>&" in words
    for title in ("Spans taken over, by turn", "Spans taken over, by problem", "p-values", "Scores by verdict"):
        assert title in html
    assert not re.search(r"#0\d0\d0\d", html)


def test_a_comparison_report_has_every_strategy() -> None:
    params = {name: replace(PARAMS, strategy=name) for name in ("draft", "target", "atts")}
    results = {name: job(name) for name in params}
    found = {**comparison(results, params, str.__eq__), "settings": {name: settings() for name in params}}
    html = comparison_report(results, found)
    words = " ".join(check(html).words)
    assert "Accuracy of the answer" in html
    assert all(name in words for name in ("draft against target", "atts against target"))


def test_a_strategy_without_verdicts_has_a_report() -> None:
    result = job("draft")
    bare = replace(result, chains=tuple(replace(c, gold=None, turns=()) for c in result.chains))
    html = run_report(bare, {**figures(bare, PARAMS), "settings": settings()})
    check(html)
    assert "p-values" not in html


def test_without_matplotlib_the_page_says_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "can_plot", lambda: False)
    result = job("atts")
    html = run_report(result, {**figures(result, PARAMS), "settings": settings()})
    assert "atts-engine[eval]" in " ".join(check(html).words)


def test_the_timeline_covers_each_chain_without_overlap() -> None:
    turns = (
        Turn(0, "a", 1, 0.5, t_draft=1.0, t_verdict=1.5),
        Turn(1, "b", 1, 0.5, takeover=True, t_draft=2.0, t_verdict=2.5, t_target=4.0),
    )
    chain = Chain("p", 0, 0, None, None, 4.0, turns)
    boxes = [(float(x), float(w)) for x, w in re.findall(r'x="([\d.]+)" y="3" width="([\d.]+)"', timeline([chain]))]
    assert len(boxes) == 5
    assert all(x + w <= after for (x, w), (after, _) in zip(boxes, boxes[1:], strict=False))
    assert timeline([replace(chain, duration_s=0.0)]) == ""


def test_an_error_and_a_long_text_are_shown_with_care() -> None:
    chain = Chain("p", 0, 1, None, None, 1.0, (Turn(0, "x" * 10_000, 9),), error="<NaN>")
    html = chain_text(chain, None, opened=True)
    assert "&lt;NaN&gt;" in html and "[...]" in html and len(html) < 7000


def test_disputed_problems_come_first() -> None:
    def chain(problem: str, number: int, answer: str) -> Chain:
        return Chain(problem, 0, number, None, answer, 1.0, ())

    chains = [chain("p0", 0, "1"), chain("p0", 1, "1"), chain("p1", 0, "1"), chain("p1", 1, "2")]
    assert [p.id for p, _ in chosen_problems(PROBLEMS, chains, 1)] == ["p1"]


def test_worst_chains_are_wrong_ones_that_the_target_liked() -> None:
    problems = some_problems(2)

    def chain(problem: int, number: int, answer: str, *scores: float) -> Chain:
        turns = tuple(Turn(i, "a", 1, s) for i, s in enumerate(scores))
        return Chain(problems[problem].id, problem, number, "1", answer, 1.0, turns)

    chains = [
        chain(0, 0, "2", 0.1, 0.9),
        chain(0, 1, "2", 0.3, 0.4),
        chain(0, 2, "1", 0.0),
        chain(1, 0, "2"),
        chain(1, 1, "2", 0.2),
    ]
    found = worst_chains(problems, chains, lambda p, c: c.final_answer == "1", 5)
    assert [(p.id, c.chain) for p, c in found] == [(problems[1].id, 1), (problems[0].id, 1)]
    assert worst_chains(problems, chains, lambda p, c: None, 5) == []
    assert len(worst_chains(problems, chains, lambda p, c: False, 1)) == 1
