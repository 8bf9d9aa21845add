"""Parts of a set: several processes, and going on after a kill."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import data.parts
from conf.errors import UserError
from conf.schema import ReadConfig, TokenizerConfig
from data.folder import Unfinished
from data.manifest import MANIFEST_FILE
from data.prepare import prepare
from data.store import TokenStore

RECORDS = 400
SMALL_PARTS = 4000
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "records.jsonl"
    lines = [json.dumps({"text": f"record {i}: " + "some words " * (i % 17)}) for i in range(RECORDS)]
    lines[7] = "broken"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.parts, "PART_BYTES", SMALL_PARTS)


@pytest.fixture(scope="module")
def words(source: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenizerConfig:
    out = tmp_path_factory.mktemp("words") / "set"
    prepare(out, str(source), 0.1, TokenizerConfig(train_vocab_size=304), progress=False)
    return TokenizerConfig(path=str(out / "tokenizer"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_number_of_processes_changes_nothing(source: Path, words: TokenizerConfig, tmp_path: Path) -> None:
    one = prepare(tmp_path / "one", str(source), 0.1, words, progress=False, workers=1)
    two = prepare(tmp_path / "two", str(source), 0.1, words, progress=False, workers=2)
    assert one == two and files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert len(one.splits["train"].shards) > 8 and one.skipped == {"not valid JSON": 1}
    assert not any(name.startswith(("part-", "plan")) for name in files_of(tmp_path / "one"))


def die(number: int, units: object) -> None:
    """As a worker that the kernel ends for its memory."""
    os.kill(os.getpid(), signal.SIGKILL)


KILLED = """
import sys, time
import data.parts, data.pool
from pathlib import Path
from conf.schema import TokenizerConfig
from data.prepare import prepare
data.parts.PART_BYTES = int(sys.argv[4])
real = data.pool.run_part
def slow(*args):
    real(*args)
    time.sleep(0.1)
data.pool.run_part = slow
prepare(Path(sys.argv[1]), sys.argv[2], 0.1, TokenizerConfig(path=sys.argv[3]), progress=False, workers=1)
"""


def test_after_a_kill_finished_parts_are_not_done_again(
    source: Path, words: TokenizerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, tmp = tmp_path / "set", tmp_path / ".tmp-set"
    arguments = [sys.executable, "-c", KILLED, str(out), str(source), words.path, str(SMALL_PARTS)]
    child = subprocess.Popen(arguments, cwd=ROOT)
    while len(list(tmp.glob("part-*.json"))) < 3:
        assert child.poll() is None
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    finished = {path.name.split(".")[0] for path in tmp.glob("part-*.json")}
    assert not out.exists() and len(finished) >= 3

    done: list[int] = []
    real = data.parts.run_part
    monkeypatch.setattr("data.pool.run_part", lambda job, n, *rest: (done.append(n), real(job, n, *rest)))
    prepare(out, str(source), 0.1, words, progress=False, workers=1)
    assert done and not {f"part-{n:05d}" for n in done} & finished
    assert len(done) + len(finished) == len(
        json.loads((out / MANIFEST_FILE).read_text())["splits"]["train"]["shards"]
    )
    prepare(tmp_path / "fresh", str(source), 0.1, words, progress=False)
    assert files_of(out) == files_of(tmp_path / "fresh")
    TokenStore(out, "train").verify()


def test_finished_parts_of_another_source_are_not_used(
    source: Path, words: TokenizerConfig, tmp_path: Path
) -> None:
    mine = tmp_path / "records.jsonl"
    mine.write_bytes(source.read_bytes())
    real, calls = data.parts.run_part, []

    def dying(*args: object) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        real(*args)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("data.pool.run_part", dying)
        prepare(tmp_path / "set", str(mine), 0.1, words, progress=False, workers=1)
    assert len(list((tmp_path / ".tmp-set").glob("part-*.json"))) == 3
    mine.write_text(json.dumps({"text": "all new"}))
    manifest = prepare(tmp_path / "set", str(mine), 0.0, words, progress=False)
    assert manifest.splits["train"].documents == 1
    assert not (tmp_path / ".tmp-set").exists()


def test_a_dead_worker_is_told_and_what_is_done_stays(
    source: Path, words: TokenizerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.pool.work", die)
    with pytest.raises(Unfinished, match="a worker process died"):
        prepare(tmp_path / "set", str(source), 0.1, words, progress=False, workers=2)
    assert (tmp_path / ".tmp-set" / "tokenizer").is_dir()


def test_a_broken_stream_names_its_place_and_goes_on(
    words: TokenizerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "streamed"
    folder.mkdir()
    (folder / "train-a.jsonl").write_text("".join(f'{{"text": "a{i}"}}\n' for i in range(3)))
    (folder / "train-b.jsonl").write_text('{"text": "b0"}\n{broken\n')
    arguments = (tmp_path / "set", f"hub:{folder}", 0.0, words, False)
    with pytest.raises(Unfinished, match=r"hub:.*cannot be read.*goes on with what is finished"):
        prepare(*arguments, workers=1)
    (part,) = (tmp_path / ".tmp-set").glob("part-*.json")
    made = part.stat().st_mtime_ns
    (folder / "train-b.jsonl").write_text('{"text": "b0"}\n')
    manifest = prepare(*arguments, workers=1)
    assert manifest.splits["train"].documents == 4
    first = tmp_path / "set" / "train-00000.bin"
    assert first.stat().st_mtime_ns <= made  # not written again


def test_fatal_names_the_place(source: Path, words: TokenizerConfig, tmp_path: Path) -> None:
    strict = ReadConfig(on_error="fatal")
    with pytest.raises(UserError, match=r"records\.jsonl:8: not valid JSON"):
        prepare(tmp_path / "set", str(source), 0.1, words, progress=False, read=strict, workers=2)
    assert not list(tmp_path.iterdir())
    prepare(tmp_path / "set", str(source), 0.1, words, progress=False)
    with pytest.raises(UserError, match="1 bad records skipped"):
        prepare(tmp_path / "set", str(source), 0.1, words, progress=False, read=strict)


def test_a_changed_source_is_told(
    source: Path, words: TokenizerConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.txt").write_text(name * 9)

    def made() -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            prepare(tmp_path / "set", str(folder), 0.0, words, progress=False)
        return [record.getMessage() for record in caplog.records]

    assert made() == made() == []
    (folder / "a.txt").write_text("longer than it was")
    (folder / "b.txt").unlink()
    (folder / "d.txt").write_text("new")
    (message,) = made()
    assert "1 changed (first: a.txt), 1 added (first: d.txt), 1 gone (first: b.txt)" in message
