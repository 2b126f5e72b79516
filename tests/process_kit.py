"""Two processes of one run on this machine, as mlx.launch starts them."""

import json
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from helpers import ROOT, clean_environment

TIMEOUT = 300  # seconds: two that wait for each other would wait for ever


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def two_processes(tmp_path: Path) -> list[dict[str, str]]:
    """The environment of each of two processes on MLX's ring back end."""
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
    # A process's own order of sets once decided which gradients were averaged; with
    # these two seeds {"vision", "connector", "decoder"} has two orders.
    return [
        {"MLX_RANK": rank, "MLX_HOSTFILE": str(hosts), "PYTHONHASHSEED": seed}
        for rank, seed in (("0", "0"), ("1", "3"))
    ]


def start_two(
    tmp_path: Path,
    *args: object,
    cwd: Sequence[Path] = (ROOT, ROOT),
    second: Sequence[object] | None = None,
    **more: str,
) -> list[subprocess.Popen[str]]:
    """This Python with `args` in two processes. cwd: of each. second: the arguments of
    the second, where they are others."""
    commands = [args, args if second is None else second]
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=place,
            env=clean_environment(**environment, **more),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command, place, environment in zip(
            commands, cwd, two_processes(tmp_path), strict=True
        )
    ]


def ends_of(
    processes: list[subprocess.Popen[str]],
) -> list[subprocess.CompletedProcess[str]]:
    """How both ended; fails, and ends them, where they do not."""
    ends = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=TIMEOUT)
            ends.append(
                subprocess.CompletedProcess(process.args, process.returncode, out, err)
            )
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()
    return ends


def run_two(tmp_path: Path, *args: object, **settings):
    """`start_two`, and how both ended."""
    return ends_of(start_two(tmp_path, *args, **settings))
