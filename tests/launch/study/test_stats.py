from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.study.plan import Group
from launch.study.speed import growth
from launch.study.stats import baseline_of, by_choice, difference, mean_of, plan_difference, read_results, stderr


def result(losses: list[float], kind: str = "moba", seed: int = 0, full: float = 0.0) -> dict[str, Any]:
    def document(loss: float) -> dict[str, Any]:
        return {
            "loss": loss,
            "tokens": 8,
            "trailing": None if loss > 90 else loss / 2,
            "buckets": [loss, loss + 1],
        }

    plans = {"full": "full"} if kind == "full" else {"full": "full", "moba": "moba 32x3"}
    documents = [{name: document(loss + (full if name == "full" else 0.0)) for name in plans} for loss in losses]
    if kind == "full":
        documents = [{"full": document(loss)} for loss in losses]
    return {
        "group": "train", "seed": seed, "choices": {"attention": kind}, "plans": plans,
        "train": {"plans": [["main", plans[kind]]]},
        "losses": [{"documents": documents, "edges": [0, 4, 8]}],
    }  # fmt: skip


def test_difference_is_paired_and_both_errors_are_those_of_the_definition() -> None:
    ours = {0: result([1.0, 2.0, 6.0]), 1: result([1.2, 2.2, 6.2])}
    theirs = {0: result([0.9, 1.7, 5.9], "full"), 1: result([0.9, 1.7, 5.9], "full")}
    gap = difference(ours, theirs, 0, "loss")
    assert gap is not None
    assert gap.by_seed == pytest.approx((0.5 / 3, 1.1 / 3))
    assert gap.value == pytest.approx(1.6 / 6)
    assert gap.seeds == pytest.approx(0.1)  # half the distance of two values
    assert gap.documents == pytest.approx(stderr([0.2, 0.4, 0.2]))
    assert gap.resolved  # 0.267 against twice 0.1
    assert gap.signed == "+0.2667 (± documents 0.0667, seeds 0.1000)"


def test_one_seed_resolves_nothing() -> None:
    gap = difference({0: result([1.0, 2.0])}, {0: result([0.0, 1.0], "full")}, 0, "loss")
    assert gap is not None and gap.seeds is None and not gap.resolved


def test_no_common_seed_is_no_difference() -> None:
    assert difference({0: result([1.0])}, {1: result([1.0])}, 0, "loss") is None


def test_documents_without_trailing_tokens_are_left_out() -> None:
    assert mean_of({0: result([1.0, 99.0, 3.0])}, 0, "trailing").value == pytest.approx(1.0)
    assert mean_of({0: result([1.0, 3.0])}, 0, "1").value == pytest.approx(3.0)


def test_same_weights_read_both_ways() -> None:
    gap = plan_difference({0: result([1.0, 2.0], full=0.25)}, 0, "loss")
    assert gap is not None and gap.value == pytest.approx(-0.25)
    assert plan_difference({0: result([1.0], "full")}, 0, "loss") is None


def test_arms_stand_in_the_order_of_the_plan() -> None:
    group = Group(axes={"attention": {"moba": [], "full": []}}, baseline="attention=full")
    arms = by_choice([result([1.0], "full"), result([1.0], seed=2), result([1.0], seed=1)], "train", group)
    assert list(arms) == [("moba",), ("full",)] and sorted(arms[("moba",)]) == [1, 2]
    assert baseline_of(group, ("moba",)) == ("full",) and baseline_of(group, ("full",)) is None


def test_growth_is_the_exponent() -> None:
    assert growth([1, 2, 4, 8], [3.0, 12.0, 48.0, 192.0]) == pytest.approx(2.0)


def test_arms_cut_off_behind_their_losses_are_kept(tmp_path: Path) -> None:
    losses: list[dict[str, Any]] = [{}, {}]
    for folder, name, kept in (
        ("arms", "b", losses),
        ("unfinished", "a", losses),
        ("unfinished", "c", losses[:1]),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        result = {"arm": name, "group": "train", "starts": "", "losses": kept}
        (tmp_path / folder / f"{name}.json").write_text(json.dumps(result))
    (tmp_path / "unfinished" / "b.json").write_text((tmp_path / "arms" / "b.json").read_text())  # done since then
    assert [(r["arm"], r.get("cut", False)) for r in read_results(tmp_path)] == [("a", True), ("b", False)]
