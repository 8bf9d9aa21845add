from __future__ import annotations

import math

import pytest

from conf.schema import ModelConfig
from launch.study.laws import dense_flops, fit, laws, size_gap, use_of_context
from launch.study.stats import Arms, Json
from model.flops import matmul_parameters

MODEL = {"vocab_size": 64, "intermediate_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}


def result(hidden: int, loss: float) -> Json:
    document = {"full": {"loss": loss, "trailing": loss, "tokens": 10, "buckets": [loss + 1, loss, loss]}}
    return {
        "model": {**MODEL, "hidden_size": hidden},
        "train": {"steps": [[500, 5.0, None], [1000, 4.0, None]], "plans": [["main", "full"]], "stages": {}},
        "plans": {"full": "full"},
        "losses": [{"seq_len": 8, "trailing": 2, "edges": [0, 2, 5, 8], "documents": [document, document]}],
    }


def test_flops_are_six_per_parameter_and_token() -> None:
    one = result(32, 4.0)
    assert dense_flops(one) == 6.0 * matmul_parameters(ModelConfig(**one["model"])) * 1000
    assert dense_flops({**one, "start": one}) == 2 * dense_flops(one)


def test_a_power_law_is_found_again_with_its_error_over_seeds() -> None:
    arms: Arms = {}
    for size, hidden in (("s", 16), ("m", 32), ("l", 64)):
        compute = dense_flops(result(hidden, 0.0))
        arms[size, "full"] = {seed: result(hidden, 20 * compute**-b) for seed, b in ((0, 0.1), (1, 0.12))}
        arms[size, "moba"] = {0: result(hidden, 10 * compute**0.1)}
    found = laws(arms)
    assert set(found) == {"full"}  # a loss that grows with compute has no law
    assert found["full"].exponent == pytest.approx(0.11, abs=2e-3)
    assert found["full"].error == pytest.approx(0.01)
    assert found["full"].worst < 2e-3
    gaps = [
        arms[size, "moba"][0]["losses"][0]["documents"][0]["full"]["loss"]
        - arms[size, "full"][0]["losses"][0]["documents"][0]["full"]["loss"]
        for size in "sml"
    ]
    assert size_gap(arms).startswith(f"{sum(gaps) / 3:+.4f} ± ") and size_gap(arms).endswith("(3 pairs)")
    assert [pair[:2] for pair in use_of_context(arms)] == [("s", 0), ("m", 0), ("l", 0)]
    assert [pair[3] for pair in use_of_context(arms)] == pytest.approx(gaps)
    assert use_of_context(arms)[0][2] == pytest.approx(1.0)
    del arms["l", "full"]
    assert not laws(arms)  # two sizes are always on a line


def test_fit_is_exact_on_a_line_of_logarithms() -> None:
    scale, exponent = fit([1e3, 1e5, 1e8], [7 * c**-0.25 for c in (1e3, 1e5, 1e8)])
    assert scale == pytest.approx(7) and exponent == pytest.approx(0.25)
    assert math.isfinite(scale)
