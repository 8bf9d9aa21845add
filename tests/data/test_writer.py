from pathlib import Path

import numpy as np

from data.writer import ShardWriter, is_heldout, write_split


def test_heldout_share_and_independence_of_other_documents() -> None:
    names = [f"file-{i}.py" for i in range(4000)]
    held = {name for name in names if is_heldout(name, 0.1)}
    assert 320 < len(held) < 480
    assert held < {name for name in names if is_heldout(name, 0.2)}  # a larger share only adds
    assert not any(is_heldout(name, 0.0) for name in names)


def test_summary_and_shards(tmp_path: Path) -> None:
    shards = []
    for number, lengths in enumerate(((1, 2, 3, 4), (5, 30), (), (8,))):
        writer = ShardWriter(tmp_path, f"train-{number:05d}.bin", np.dtype(np.uint32), masked=True)
        for length in lengths:
            writer.add(f"{number}-{length}", [70_000] * length, np.arange(length) % 2 == 0)
        shards.append(writer.finish())
    info, files = write_split(tmp_path, "train", shards)
    assert (info.documents, info.tokens, info.longest) == (7, 53, 30)
    assert info.shards == {"train-00000.bin": 10, "train-00001.bin": 35, "train-00003.bin": 8}
    assert info.length_histogram == {"1": 1, "2": 1, "4": 2, "8": 2, "32": 1}
    assert {path.name: path.stat().st_size for path in tmp_path.iterdir()} == {
        name: one.bytes for name, one in files.items()
    }
    assert np.fromfile(tmp_path / "train-00003.bin.loss", np.uint8).tolist() == [1, 0] * 4


def test_an_empty_split_has_no_files(tmp_path: Path) -> None:
    shard = ShardWriter(tmp_path, "heldout-00000.bin", np.dtype(np.uint16)).finish()
    info, files = write_split(tmp_path, "heldout", [shard])
    assert info.documents == 0 and not info.shards
    assert not files and not list(tmp_path.iterdir())
