"""RULER's metrics on cases worked out by hand."""

from __future__ import annotations

import pytest

from eval.ruler.score import (
    clean,
    effective_length,
    match_all,
    match_part,
    mean_score,
    score_task,
    weighted_means,
)


def test_match_all_is_the_mean_share_of_references() -> None:
    predictions = ["a: 1111111 and 2222222", "nothing", "3333333"]
    references = [["1111111", "2222222"], ["1111111"], ["3333333", "4444444", "5555555", "6666666"]]
    assert match_all(predictions, references) == pytest.approx(round((1 + 0 + 0.25) / 3 * 100, 2)) == 41.67


def test_match_part_is_the_best_reference_not_their_mean() -> None:
    assert match_part(["Paris, France"], [["paris", "Lutetia", "the city"]]) == 100.0
    assert match_part(["Paris", "London"], [["Paris", "Lutetia"], ["Rome"]]) == 50.0


def test_case_is_ignored_and_substrings_count() -> None:
    assert match_all(["the XYZAB-chain"], [["xyzab"]]) == 100.0


def test_predictions_are_cleaned_first() -> None:
    assert clean(" \t a\x00b\x1fc\n ") == "a\nb\nc"
    assert score_task("vt", ["AB\x00CDE"], [["ABCDE"]]) == 0.0  # a control character is a line end, not nothing
    assert score_task("vt", ["\x01ABCDE\x01"], [["ABCDE"]]) == 100.0


def test_question_answering_is_scored_by_part() -> None:
    texts, references = ["yes, it is"], [["yes", "certainly"]]
    assert score_task("qa_1", texts, references) == 100.0
    assert score_task("fwe", texts, references) == 50.0


def test_summary_numbers() -> None:
    assert mean_score({"a": 90.0, "b": 80.0, "c": 70.0}) == 80.0
    assert mean_score({}) is None
    assert weighted_means({4096: 90.0, 8192: 60.0, 16384: 30.0}) == (50.0, 70.0)
    assert effective_length({4096: 95.0, 8192: 85.6, 16384: 85.5, 32768: 90.0}) == 8192
    assert effective_length({4096: 85.0}) is None
