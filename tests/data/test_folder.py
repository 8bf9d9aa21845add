import threading
import time
from pathlib import Path

import pytest

from data.folder import exclusive_sibling, publish


def test_published_whole(tmp_path: Path) -> None:
    out = tmp_path / "new" / "set"
    with exclusive_sibling(out) as tmp:
        (tmp / "x").write_text("1")
        assert not out.exists()
        publish(tmp, out)
    assert (out / "x").read_text() == "1"
    assert [path.name for path in out.parent.iterdir()] == ["set"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), exclusive_sibling(tmp_path / "set") as tmp:
        (tmp / "x").write_text("1")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_leftovers_of_a_kill_are_cleared(tmp_path: Path) -> None:
    (tmp_path / ".tmp-set" / "tokenizer").mkdir(parents=True)
    (tmp_path / ".tmp-set" / "train-00000.bin").write_text("old")
    with exclusive_sibling(tmp_path / "set") as tmp:
        assert not list(tmp.iterdir())


def test_a_full_folder_is_never_replaced(tmp_path: Path) -> None:
    out = tmp_path / "set"
    out.mkdir()
    (out / "mine").write_text("1")
    with pytest.raises(OSError), exclusive_sibling(out) as tmp:
        publish(tmp, out)
    assert [path.name for path in tmp_path.iterdir()] == ["set"] and (out / "mine").exists()


def test_the_second_waits_for_the_first(tmp_path: Path) -> None:
    events: list[str] = []

    def second() -> None:
        with exclusive_sibling(tmp_path / "set") as tmp:
            events.append(f"second in, empty: {not list(tmp.iterdir())}, published: {(tmp_path / 'set').exists()}")

    with exclusive_sibling(tmp_path / "set") as tmp:
        (tmp / "x").write_text("1")
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        events.append("first done")
        publish(tmp, tmp_path / "set")
    thread.join(timeout=10)
    assert events == ["first done", "second in, empty: True, published: True"]
    assert (tmp_path / "set" / "x").exists() and not (tmp_path / ".tmp-set").exists()
