"""Starts a command once a rank, and brings all ranks down with the first that fails.

On one machine the processes are started here, with the environment that torchrun gives; over several, DeepSpeed's
launcher starts them. Either way this process waits, hands signals on, and ends with rank 0's exit code.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

from dynaconv.config import EngineConfig
from dynaconv.errors import ArtifactError, ConfigError
from dynaconv.ranks import started_by_launcher

SECONDS_TO_END = 30.0  # what the others get to notice that one is gone, and to say so
PROGRAM = "dynaconv.cli.app"


def wanted(engine: EngineConfig) -> bool:
    """Whether this command should run on several ranks, and does not yet."""
    return (engine.nproc > 1 or engine.hostfile is not None) and not started_by_launcher()


def start(arguments: Sequence[str], engine: EngineConfig) -> int:
    """Runs ``dynaconv ARGUMENTS`` on all ranks; the exit code.

    Raises:
        ConfigError: The hostfile cannot be read, or there is no DeepSpeed to read it.
        ArtifactError: No process could be started.
    """
    if engine.hostfile is not None:
        return _wait([_popen(_over_hosts(arguments, engine), {})])
    command = [sys.executable, "-m", PROGRAM, *arguments]
    shared = {
        "WORLD_SIZE": str(engine.nproc),
        "LOCAL_WORLD_SIZE": str(engine.nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // engine.nproc)),
    }
    started: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(engine.nproc):
            started.append(_popen(command, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, alone=rank > 0))
    except BaseException:
        _kill(started)
        raise
    return _wait(started)


def _over_hosts(arguments: Sequence[str], engine: EngineConfig) -> list[str]:
    from importlib.util import find_spec

    path = str(engine.hostfile)
    if not os.path.isfile(path):  # noqa: PTH113
        raise ConfigError("the hostfile cannot be read", where=path, expected="lines such as: host slots=8")
    if find_spec("deepspeed") is None:
        hint = "pip install 'dynaconv[deepspeed]', or start the command on all machines with torchrun"
        raise ConfigError("a hostfile needs DeepSpeed's launcher, and deepspeed is not installed", hint=hint)
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", path, "--no_local_rank"]
    count = ["--num_gpus", str(engine.nproc)] if engine.nproc > 1 else []
    return [*launcher, *count, "--module", PROGRAM, *arguments]


def _popen(command: Sequence[str], more: dict[str, str], *, alone: bool = False) -> subprocess.Popen[bytes]:
    stdin = subprocess.DEVNULL if alone else None
    try:
        return subprocess.Popen(command, env={**os.environ, **more}, stdin=stdin)
    except OSError as error:
        raise ArtifactError("a process for another rank could not be started", found=error) from error


def _wait(processes: list[subprocess.Popen[bytes]]) -> int:
    """Waits for all; once one fails, the others have a while to end by themselves."""

    def hand_on(number: int, frame: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    # An interrupt from the keyboard reaches every process of the terminal: each ends, and this one says nothing.
    handlers: dict[int, Any] = {signal.SIGTERM: hand_on, signal.SIGINT: lambda number, frame: None}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    deadline, first = None, 0
    try:
        while any(process.poll() is None for process in processes):
            time.sleep(0.05)
            codes = [process.returncode for process in processes if process.returncode]
            if codes and deadline is None:
                deadline, first = time.monotonic() + SECONDS_TO_END, codes[0]
            if deadline is not None and time.monotonic() > deadline:
                _kill(processes)
    finally:
        _kill(processes)
        for number, handler in before.items():
            signal.signal(number, handler)
    codes = [process.returncode for process in processes]
    code = codes[0] if codes[0] > 0 else first or next((code for code in codes if code), 0)
    return code if code >= 0 else 128 - code


def _kill(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()
    for process in processes:
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
