"""The rule between the exact paths: densities, thresholds from measurements, and what an unmeasured shape gets."""

import json

import pytest

from model.moba import triton_rule
from model.moba.triton_rule import RULE_FILE, Rule, Threshold, choose, density, explain, read_rule, thresholds


@pytest.mark.parametrize("seq_len", [1, 16, 50, 64, 100])
@pytest.mark.parametrize("block_size, topk", [(16, 1), (16, 2), (16, 4), (32, 3), (48, 9)])
def test_density_is_counted_pairs(seq_len, block_size, topk):
    selected = sum(i % block_size + 1 + min(topk - 1, i // block_size) * block_size for i in range(seq_len))
    assert density(seq_len, block_size, topk) == pytest.approx(selected / (seq_len * (seq_len + 1) // 2))


def _rows(block_size, times):
    return [
        {"seq_len": 8192, "documents": 1, "head_dim": 128, "block_size": block_size, "topk": topk,
         "density": density(8192, block_size, topk), "routed_ms": routed, "union_ms": union, "dense_ms": None}
        for topk, routed, union in times
    ]  # fmt: skip


def test_a_threshold_is_the_lowest_density_from_which_the_union_path_wins_everywhere():
    rows = _rows(512, [(5, 3.0, 4.5), (8, 4.2, 4.15), (6, 3.0, 2.0), (12, 5.0, 4.5), (14, 5.5, 4.5)])
    rows += _rows(1024, [(3, 2.0, 4.0), (7, 4.0, 3.95)])
    # at topk 8 the union path is ahead by less than the margin; what it won below that does not count
    assert thresholds(rows) == [
        Threshold(128, 512, 8192, False, density(8192, 512, 12)),
        Threshold(128, 1024, 8192, False, None),
    ]


RULE = Rule(
    "some GPU", (Threshold(128, 512, 8192, False, density(8192, 512, 12)), Threshold(128, 2048, 8192, False, None))
)


@pytest.mark.parametrize(
    "shape, path",
    [
        ({"topk": 12}, "union"),
        ({"topk": 13}, "union"),
        ({"topk": 11}, "routed"),
        ({"topk": 16}, "dense"),
        ({"topk": 15, "block_size": 512, "head_dim": 64}, "routed"),
        ({"seq_len": 4096, "topk": 7}, "union"),
        ({"seq_len": 65536, "topk": 120}, "routed"),  # eight times as long as anything measured
        ({"seq_len": 8192, "block_size": 128, "topk": 60}, "routed"),  # a quarter of the measured block size
        ({"block_size": 2048, "topk": 3}, "routed"),
        ({"seq_len": 16384, "documents": 2, "topk": 12}, "routed"),  # packed documents were not measured
    ],
    ids=str,
)
def test_choices(shape, path):
    shape = {"seq_len": 8192, "block_size": 512, "head_dim": 128, **shape}
    assert choose(**shape, rule=RULE).path == path


def test_the_stored_rule_reads_back_and_explains_itself_in_one_line(tmp_path):
    from eval.bench.rule import report
    from eval.files import write_json

    path = tmp_path / "rule.json"
    write_json(path, report(_rows(512, [(5, 3.0, 4.5), (12, 5.0, 4.5)]), "some GPU"))
    rule = read_rule(path)
    assert rule.thresholds == (Threshold(128, 512, 8192, False, density(8192, 512, 12)),)
    assert rule.origin.startswith("some GPU, 20")
    reason = choose(8192, 512, 12, 128, rule=rule).reason
    assert "density 0.9" in reason and "won from density 0.9" in reason and "some GPU" in reason
    assert "\n" not in explain(8192, 512, 3, 128)


def test_nothing_unmeasured_is_the_default(tmp_path):
    """Without a measurement every sparse shape takes the routed path, and the file says so."""
    stored = json.loads(RULE_FILE.read_text())
    assert stored["source"] == ("measured" if stored["rows"] else "not measured")
    path = tmp_path / "rule.json"
    path.write_text(json.dumps({**stored, "source": "not measured"}))
    rule = read_rule(path)
    for topk in (2, 8, 15):
        choice = choose(8192, 512, topk, 128, rule=rule)
        assert choice.path == "routed" and "not measured" in choice.reason
    assert choose(8192, 512, 16, 128, rule=rule).path == "dense"


def test_stored_thresholds_follow_from_the_stored_measurements():
    stored = json.loads(RULE_FILE.read_text())
    assert read_rule(RULE_FILE).thresholds == tuple(thresholds(stored["rows"]))


def test_the_backend_runs_the_path_that_the_rule_names(monkeypatch):
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    from model.moba import triton_backend, triton_common, triton_op, triton_union_op
    from model.moba.blocks import build_block_table
    from tests.model.moba.cases import borders

    if not triton_common.INTERPRETED:
        pytest.skip("the kernels of this process are compiled")
    ran = []
    for name, module in (("routed", triton_op), ("union", triton_union_op)):
        monkeypatch.setattr(module, "attend", lambda *args, name=name: ran.append(name))
    table = build_block_table(borders([64]), 64, 16)
    q = torch.zeros(64, 2, 16)
    ids = torch.full((64, 2, 1), -1, dtype=torch.int32)
    share = density(64, 16, 2)
    for start in (share + 0.01, share):
        rule = Rule("here", (Threshold(16, 16, 64, False, start),))
        choose.cache_clear()
        monkeypatch.setattr(triton_rule, "stored_rule", lambda rule=rule: rule)
        triton_backend.attend(q, q, q, ids, table, 0.25)
    choose.cache_clear()
    assert ran == ["routed", "union"]
