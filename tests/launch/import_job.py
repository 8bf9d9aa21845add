"""A process of its own for test_import_hf.py: import a folder and print how far its memory grew, in bytes."""

from __future__ import annotations

import sys
from pathlib import Path

from launch.import_hf import import_hf


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def main() -> None:
    small, big, out, shard_bytes = sys.argv[1:]
    import_hf(Path(small), Path(out) / "small")  # what is loaded once, is loaded now
    Path("/proc/self/clear_refs").write_text("5")
    base = _status("VmRSS")
    import_hf(Path(big), Path(out) / "big", shard_bytes=int(shard_bytes))
    print(_status("VmHWM") - base)


if __name__ == "__main__":
    main()
