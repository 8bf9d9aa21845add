"""Two hosts on this machine: network namespaces with a cable between them, and nothing else they could reach.

`ssh` is a stand-in that starts its command in the namespace of the host named: the network between the workers is
real and can be cut, the line of the launcher to its hosts is a pipe and stays.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

SSH = """#!/bin/bash
# ssh OPTIONS HOST COMMAND
host="${{@: -2:1}}"
exec ip netns exec {prefix}-"${{host##*.}}" sh -c "${{@: -1}}"
"""


def missing() -> str:
    """Why there can be no network namespaces here; empty: there can."""
    if os.geteuid():
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "no ip here: `make cluster-tools` installs iproute2"
    name = f"longmoba-{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if done.returncode:
        return f"no network namespaces: {' '.join(done.stderr.split())}"
    _ip("netns", "del", name)
    return ""


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=30)


class Hosts:
    """Two hosts, 10.98.0.1 and 10.98.0.2; `env`: with the stand-in for ssh."""

    names = ("10.98.0.1", "10.98.0.2")

    def __init__(self, folder: Path) -> None:
        self._prefix = f"longmoba-{os.getpid()}"
        self.env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "GLOO_SOCKET_IFNAME": "eth0"}
        ssh = folder / "ssh"
        ssh.write_text(SSH.format(prefix=self._prefix))
        ssh.chmod(stat.S_IRWXU)

    def _space(self, host: int) -> str:
        return f"{self._prefix}-{host + 1}"

    def connect(self) -> None:
        spaces = [self._space(host) for host in range(2)]
        for space in spaces:
            _ip("netns", "add", space)
        _ip("link", "add", "eth0", "netns", spaces[0], "type", "veth", "peer", "name", "eth0", "netns", spaces[1])
        for name, space in zip(self.names, spaces, strict=True):
            _ip("-n", space, "addr", "add", f"{name}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", space, "link", "set", "eth0", "up")

    def cut(self, host: int) -> None:
        """Pull the cable at one host."""
        _ip("-n", self._space(host), "link", "set", "eth0", "down")

    def mend(self, host: int) -> None:
        _ip("-n", self._space(host), "link", "set", "eth0", "up")

    def remove(self) -> None:
        for host in range(2):
            subprocess.run(["ip", "netns", "del", self._space(host)], capture_output=True, timeout=30)


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """Hosts that go when the block is left. `folder`: gets the stand-in."""
    hosts = Hosts(folder)
    try:
        hosts.connect()
        yield hosts
    finally:
        hosts.remove()
