from pathlib import Path

import numpy as np

from data.writer import SplitWriter, is_heldout


def test_heldout_share_and_independence_of_other_documents() -> None:
    names = [f"file-{i}.py" for i in range(4000)]
    held = {name for name in names if is_heldout(name, 0.1)}
    assert 320 < len(held) < 480
    assert held < {name for name in names if is_heldout(name, 0.2)}  # a larger share only adds
    assert not any(is_heldout(name, 0.0) for name in names)


def test_summary_and_shards(tmp_path: Path) -> None:
    writer = SplitWriter(tmp_path, "train", np.dtype(np.uint32), shard_tokens=10)
    for number, length in enumerate((1, 2, 3, 4, 5, 30, 8)):
        writer.add(str(number), [70_000] * length)
    info = writer.finish()
    assert (info.documents, info.tokens, info.longest) == (7, 53, 30)
    assert list(info.shards.values()) == [10, 35, 8]  # closed once full, never inside a document
    assert info.length_histogram == {"1": 1, "2": 1, "4": 2, "8": 2, "32": 1}
    assert {name: (tmp_path / name).stat().st_size for name in writer.files} == {
        name: one.bytes for name, one in writer.files.items()
    }


def test_an_empty_split_has_no_files(tmp_path: Path) -> None:
    writer = SplitWriter(tmp_path, "heldout", np.dtype(np.uint16))
    assert writer.finish().documents == 0
    assert not writer.files and not list(tmp_path.iterdir())
