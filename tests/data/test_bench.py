import json
from pathlib import Path

from conf.schema import LoaderBenchConfig
from data.bench import bench
from launch import bench_loader


def test_rows_are_measured(tmp_path: Path) -> None:
    config = LoaderBenchConfig(
        tokens_per_s=2_000_000,
        seq_lens=[4096],
        set_tokens=[200_000],
        seconds=0.2,
        limit=1.0,
        out=str(tmp_path / "l"),
    )
    said: list[str] = []
    rows = bench(config, said.append)
    assert [row["packing"] for row in rows] == ["concat", "best_fit"] and len(said) == 2
    for row in rows:
        assert row["tokens_per_s"] > 0 and all(0 < share < 1 for share in row["waiting"].values())
        assert 150_000 < row["set_tokens"] < 400_000
    assert bench_loader.run(config) == 0
    report = json.loads((tmp_path / "l").read_text())
    assert report["largest_waiting_share"] == max(w for row in report["rows"] for w in row["waiting"].values())
    config.limit = 0.0
    assert bench_loader.run(config) == 1
