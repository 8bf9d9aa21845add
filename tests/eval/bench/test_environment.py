"""The commit stored beside a measurement is a hash, wherever the sources were copied to."""

import subprocess

import pytest

from eval.bench.environment import COMMIT_FILE, COMMIT_VARIABLE, commit

ONE, TWO = "1" * 40, "2" * 40


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv(COMMIT_VARIABLE, raising=False)


def _git(folder, *arguments):
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    command = ["git", *identity, "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_a_checkout_names_its_commit(tmp_path, monkeypatch):
    _git(tmp_path, "init", "-q")
    _git(tmp_path, "commit", "-q", "--allow-empty", "-m", "first")
    monkeypatch.setenv(COMMIT_VARIABLE, ONE)
    assert commit(tmp_path) == _git(tmp_path, "rev-parse", "--verify", "HEAD")


def test_a_history_that_the_sources_have_left_behind_comes_last(tmp_path, monkeypatch):
    _git(tmp_path, "init", "-q")
    (tmp_path / "a.py").write_text("one\n")
    _git(tmp_path, "add", "a.py")
    _git(tmp_path, "commit", "-q", "-m", "first")
    head = _git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "a.py").write_text("two\n")
    assert commit(tmp_path) == head
    monkeypatch.setenv(COMMIT_VARIABLE, ONE)
    assert commit(tmp_path) == ONE


def test_a_repository_without_commits_or_around_the_sources_is_no_answer(tmp_path, monkeypatch):
    _git(tmp_path, "init", "-q")
    assert commit(tmp_path) == "unknown"  # git itself would print HEAD
    _git(tmp_path, "commit", "-q", "--allow-empty", "-m", "of another project")
    copied = tmp_path / "copied"
    copied.mkdir()
    assert commit(copied) == "unknown"
    (copied / COMMIT_FILE).write_text(TWO + "\n")
    assert commit(copied) == TWO
    monkeypatch.setenv(COMMIT_VARIABLE, ONE)
    assert commit(copied) == ONE
    monkeypatch.setenv(COMMIT_VARIABLE, "HEAD")
    assert commit(copied) == TWO
