"""Leaving a process without finalizing the interpreter."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from conf.constants import EXIT_REQUEUE

BUFFERED = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
SCRIPT = """
import os, sys
from conf.process import leave

class Bomb:  # stands for a thread that needs the interpreter while it is taken apart
    def __del__(self):
        os.abort()

bomb = Bomb()
sys.stdout.write("all of it")  # no newline, a pipe: still in the buffer
{leave}({code})
"""


@pytest.mark.parametrize("code", [0, 2, EXIT_REQUEUE])
def test_code_and_output_arrive_although_finalizing_would_abort(code: int) -> None:
    script = [sys.executable, "-c", SCRIPT.format(leave="leave", code=code)]
    ended = subprocess.run(script, capture_output=True, text=True, check=False, env=BUFFERED)
    assert (ended.returncode, ended.stdout) == (code, "all of it"), ended.stderr


def test_the_bomb_goes_off_otherwise() -> None:
    script = [sys.executable, "-c", SCRIPT.format(leave="sys.exit", code=0)]
    assert subprocess.run(script, capture_output=True, check=False).returncode == -signal.SIGABRT


def test_a_reader_that_has_gone_does_not_change_the_code() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    script = [sys.executable, "-c", SCRIPT.format(leave="leave", code=3)]
    ended = subprocess.run(script, stdout=writer, stderr=subprocess.PIPE, check=False, env=BUFFERED)
    os.close(writer)
    assert ended.returncode == 3, ended.stderr
