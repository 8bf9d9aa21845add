import threading
import time
from pathlib import Path

import pytest

from conf.errors import UserError
from data.folder import Unfinished, clear, exclusive_sibling, publish


def test_published_whole(tmp_path: Path) -> None:
    out = tmp_path / "new" / "set"
    with exclusive_sibling(out) as tmp:
        (tmp / "x").write_text("1")
        assert not out.exists()
        publish(tmp, out)
    assert (out / "x").read_text() == "1"
    assert [path.name for path in out.parent.iterdir()] == ["set"]


def test_bad_input_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError), exclusive_sibling(tmp_path / "set") as tmp:
        (tmp / "x").write_text("1")
        raise UserError("no")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, Unfinished])
def test_what_was_done_before_a_fault_is_found_again(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), exclusive_sibling(tmp_path / "set"):
        raise error
    assert not list(tmp_path.iterdir())  # nothing was done
    with pytest.raises(error), exclusive_sibling(tmp_path / "set") as tmp:
        (tmp / "tokenizer").mkdir()
        (tmp / "x").write_text("1")
        raise error
    with exclusive_sibling(tmp_path / "set") as tmp:
        assert {path.name for path in tmp.iterdir()} == {"tokenizer", "x"}
        clear(tmp)
        assert not list(tmp.iterdir())
    assert not list(tmp_path.iterdir())


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
