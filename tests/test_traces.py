"""Problem and trace files: what is written is read, and what is malformed is named with its line."""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from atts_engine.errors import InputError
from atts_engine.evaluation.jsonl import JsonlWriter, read_lines
from atts_engine.evaluation.traces import chain_to_json, has_tokens, read_chains, read_problems
from atts_engine.pipeline.records import Chain, ChunkScore, Problem, Turn

CHUNKS = (ChunkScore(2, 0.125, 1.5), ChunkScore(3, 0.25, 0.0625))
TURNS = (
    Turn(0, "first, ", 3, 0.25, math.exp(0.25), 0.5, 0.75, True, "no: second\n", 4, 0.1, 0.2, 0.3, CHUNKS),
    Turn(1, "\u00fc \\boxed{5}", 7, None, None, None, None, False, None, 0, 0.4, 0.0, 0.0),
)
CHAIN = Chain("p-1", 3, 2, "5", "5", 1.5, TURNS, "atts", "answer", None, {"seed": 7})


def _write(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_chains_come_back_as_they_were(tmp_path: Path) -> None:
    failed = replace(CHAIN, chain=3, final_answer=None, gold=None, finish="error", error="NaN score", turns=())
    path = tmp_path / "chains.jsonl"
    with JsonlWriter(path) as writer:
        for chain in (CHAIN, failed):
            writer.write(chain_to_json(chain))
    assert read_chains(path) == [CHAIN, failed]
    zipped = tmp_path / "chains.jsonl.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert read_chains(zipped) == [CHAIN, failed]


def test_texts_can_be_left_out(tmp_path: Path) -> None:
    record = chain_to_json(CHAIN, texts=False)
    assert [t["draft_chars"] for t in record["turns"]] == [7, 11]
    assert [t["target_chars"] for t in record["turns"]] == [11, 0]
    (read,) = read_chains(_write(tmp_path / "chains.jsonl", json.dumps(record)))
    assert [t.score for t in read.turns] == [t.score for t in CHAIN.turns]
    assert [t.draft for t in read.turns] == ["", ""]


def test_schema_of_a_written_chain() -> None:
    record = chain_to_json(CHAIN)
    assert {"problem_id", "problem_index", "chain", "gold", "final_answer", "duration_s", "turns"} <= record.keys()
    for turn in record["turns"]:
        assert {"turn", "draft", "ppl", "percentile", "takeover", "target"} <= turn.keys()
    (turn,) = chain_to_json(replace(CHAIN, turns=(replace(TURNS[0], ppl=None),)))["turns"]
    assert turn["ppl"] == math.exp(0.25)


def test_a_trace_without_scores_and_counts_of_tokens(tmp_path: Path) -> None:
    """The schema of the published recordings: perplexities and texts only."""
    record = chain_to_json(CHAIN)
    for turn in record["turns"]:
        for name in ("score", "p_value", "draft_tokens", "target_tokens", "t_draft", "t_verdict", "t_target"):
            del turn[name]
    (read,) = read_chains(_write(tmp_path / "chains.jsonl", json.dumps(record)))
    assert [t.score for t in read.turns] == [0.25, None]
    assert not has_tokens(read)
    assert has_tokens(CHAIN)
    assert "draft_tokens" not in chain_to_json(read)["turns"][0]


def test_chunks_are_read_where_they_were_written(tmp_path: Path) -> None:
    record = chain_to_json(CHAIN)
    assert record["turns"][0]["chunks"] == [
        {"n": 2, "score": 0.125, "draft_score": 1.5}, {"n": 3, "score": 0.25, "draft_score": 0.0625}
    ]  # fmt: skip
    assert "chunks" not in record["turns"][1]
    for absent in ({"chunks": None}, {"chunks": []}, {}):
        record["turns"][0].pop("chunks", None)
        record["turns"][0] |= absent
        (read,) = read_chains(_write(tmp_path / "chains.jsonl", json.dumps(record)))
        assert read.turns[0] == replace(TURNS[0], chunks=())


def _spoilt(**changes: Any) -> str:
    return json.dumps({**chain_to_json(CHAIN), **changes})


def _spoilt_turn(**changes: Any) -> str:
    record = chain_to_json(CHAIN)
    return json.dumps({**record, "turns": [{**record["turns"][0], **changes}]})


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not valid JSON"),
        ("[1]", "must be a JSON object, not list"),
        (_spoilt(problem_id=None), "'problem_id' is missing"),
        (_spoilt(problem_id=["a"]), "'problem_id' must be a string"),
        (_spoilt(problem_index="0"), "'problem_index' must be an integer"),
        (_spoilt(chain=True), "'chain' must be an integer"),
        (_spoilt(duration_s=None), "'duration_s' is missing"),
        (_spoilt(turns=None), "'turns' must be a list of objects"),
        (_spoilt(turns=[1]), "'turns' must be a list of objects"),
        (_spoilt_turn(takeover="yes"), r"turns\[0\]: field 'takeover' must be true or false"),
        (_spoilt_turn(ppl=0), "'ppl' must be above 0"),
        (_spoilt_turn(ppl=float("nan")), "'ppl' must be finite"),
        (_spoilt_turn(score=float("inf")), "'score' must be finite"),
        (_spoilt_turn(turn=None), "'turn' must be an integer"),
        (_spoilt_turn(chunks=[{"n": 2, "score": 1}]), r"turns\[0\], chunks\[0\]: field 'draft_score' is missing"),
        (_spoilt_turn(chunks=[{"n": 2, "score": 1, "draft_score": 1}] * 2), r"rising 'n' from 1 on, not \[2, 2\]"),
        (_spoilt_turn(chunks=[{"n": 0, "score": 1, "draft_score": 1}]), r"rising 'n' from 1 on, not \[0\]"),
    ],
)
def test_a_malformed_line_is_named_by_its_number(tmp_path: Path, line: str, reason: str) -> None:
    path = _write(tmp_path / "chains.jsonl", json.dumps(chain_to_json(CHAIN)), "", line)
    with pytest.raises(InputError, match=f"chains.jsonl, line 3.*{reason}") as caught:
        read_chains(path)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file: .*none.jsonl"):
        read_chains(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="cannot be read"):
        read_chains(tmp_path)
    with pytest.raises(InputError, match="holds no chains"):
        read_chains(_write(tmp_path / "empty.jsonl"))
    line = json.dumps(chain_to_json(CHAIN)).encode() + b"\n"
    for name, content in (("a.jsonl.gz", b"no gzip"), ("b.jsonl.gz", gzip.compress(line * 9)[:-9])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="cannot be read"):
            read_chains(tmp_path / name)
    (tmp_path / "c.jsonl").write_bytes(b'{"a": "\xff"}\n')
    with pytest.raises(InputError, match="not UTF-8"):
        read_chains(tmp_path / "c.jsonl")


def test_a_torn_last_line_is_dropped_on_request_only(tmp_path: Path) -> None:
    path = tmp_path / "chains.jsonl"
    whole = json.dumps(chain_to_json(CHAIN)) + "\n"
    path.write_text(whole + whole[:40], encoding="utf-8")
    with pytest.raises(InputError, match="line 2: not valid JSON"):
        read_chains(path)
    assert read_chains(path, allow_torn_tail=True) == [CHAIN]
    with JsonlWriter(path, append=True) as writer:
        writer.write(chain_to_json(CHAIN))
    assert read_chains(path) == [CHAIN, CHAIN]
    path.write_text(whole[:40], encoding="utf-8")
    assert read_chains(path, allow_torn_tail=True) == []
    JsonlWriter(path, append=True).close()
    assert path.read_bytes() == b""


def test_a_long_torn_line_is_cut_whole(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "' + b"x" * 200_000)
    JsonlWriter(path, append=True).close()
    assert path.read_bytes() == b'{"a": 1}\n'


def test_every_line_is_on_disk_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with JsonlWriter(path) as writer:
        for i in range(3):
            writer.write({"i": i})
            assert [line.integer("i") for line in read_lines(path)] == list(range(i + 1))
        with pytest.raises(ValueError, match="JSON"):
            writer.write({"i": float("nan")})


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot write to"):
        JsonlWriter(tmp_path / "none" / "log.jsonl")
    with pytest.raises(InputError, match="cannot write to"):
        JsonlWriter(tmp_path, append=True)


def test_problems(tmp_path: Path) -> None:
    path = _write(
        tmp_path / "problems.jsonl",
        '{"id": "a", "problem": "1+1?", "answer": "2"}',
        '{"id": 7, "problem": "Why?"}',
        '{"id": "c", "problem": "2+2?", "answer": 4}',
    )
    expected = [Problem("a", "1+1?", "2", 0), Problem("7", "Why?", None, 1), Problem("c", "2+2?", "4", 2)]
    assert read_problems(path) == expected
    assert read_problems(path, 2) == expected[:2]
    assert read_problems(path, 99) == expected
    with pytest.raises(InputError, match="limit on problems must be 1 or more"):
        read_problems(path, 0)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"id": "b"}', "field 'problem' is missing"),
        ('{"problem": "?"}', "field 'id' is missing"),
        ('{"id": "b", "problem": " "}', "field 'problem' is empty"),
        ('{"id": "a", "problem": "?"}', "id 'a' was used by an earlier line"),
        ('{"id": "b", "problem": "?", "answer": [2]}', "field 'answer' must be a string"),
        ("nonsense", "not valid JSON"),
    ],
)
def test_a_malformed_problem_is_named_by_its_line(tmp_path: Path, line: str, reason: str) -> None:
    path = _write(tmp_path / "problems.jsonl", '{"id": "a", "problem": "1+1?"}', line)
    with pytest.raises(InputError, match=f"problems.jsonl, line 2: {reason}"):
        read_problems(path)
    assert len(read_problems(path, 1)) == 1


def test_no_problems_at_all(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no problems"):
        read_problems(_write(tmp_path / "problems.jsonl", ""))


def test_shared_problem_sets_are_read(shared: Path) -> None:
    sizes = {p.stem: len(read_problems(p)) for p in sorted((shared / "data" / "problems").glob("*.jsonl"))}
    assert sizes["math500"] == 500
    assert sizes["aime24"] == 30
    assert len(read_problems(shared / "data" / "problems" / "math500.jsonl", 100)) == 100
