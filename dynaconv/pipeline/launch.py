"""Starts a command once a rank, and brings all ranks down with the first that fails.

On one machine the processes are started here, with the environment that torchrun gives; over several, DeepSpeed's
launcher starts them. Either way this process waits, hands signals on, and ends with rank 0's exit code. No process
imports what lies in the current folder (``python -P``), which may be anyone's: ``PYTHONPATH`` holds as it is.
"""

from __future__ import annotations

import math
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
from dynaconv.errors import ArtifactError, ConfigError, DynaconvError
from dynaconv.ranks import started_by_launcher

SECONDS_TO_END = 25.0  # what the others get to notice that one is gone, and to say so
PROGRAM = "dynaconv.cli.app"


def wanted(engine: EngineConfig) -> bool:
    """Whether this command should run on several ranks, and does not yet."""
    return (engine.nproc > 1 or engine.hostfile is not None) and not started_by_launcher()


def start(arguments: Sequence[str], engine: EngineConfig) -> int:
    """Runs ``dynaconv ARGUMENTS`` on all ranks; the exit code.

    Raises:
        ConfigError: The hostfile cannot be read, or there is no DeepSpeed to read it.
        ArtifactError: No process could be started.
        DynaconvError: One ended early, and none of them said why.
    """
    if engine.hostfile is not None:
        return _wait([_popen(_over_hosts(arguments, engine), {"PYTHONSAFEPATH": "1"})])  # for those it starts
    command = [sys.executable, "-P", "-m", PROGRAM, *arguments]
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
    launcher = [sys.executable, "-P", "-m", "dynaconv.pipeline.hosts", "--hostfile", path, "--no_local_rank"]
    count = ["--num_gpus", str(engine.nproc)] if engine.nproc > 1 else []
    return [*launcher, *count, "--module", PROGRAM, *arguments]


def _popen(command: Sequence[str], more: dict[str, str], *, alone: bool = False) -> subprocess.Popen[bytes]:
    stdin = subprocess.DEVNULL if alone else None
    try:
        return subprocess.Popen(command, env={**os.environ, **more}, stdin=stdin)
    except OSError as error:
        raise ArtifactError("a process for another rank could not be started", found=error) from error


def _wait(processes: list[subprocess.Popen[bytes]]) -> int:
    """Waits for all; once one fails, the others have a while to end by themselves.

    Raises:
        DynaconvError: One was killed or ended, and rank 0, which alone says why, could not.
    """
    signalled: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        signalled.append(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    # An interrupt from the keyboard reaches every process of the terminal: each ends, and this one says nothing.
    handlers: dict[int, Any] = {signal.SIGTERM: hand_on, signal.SIGINT: lambda number, frame: signalled.append(number)}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        first = _first_to_fail(processes)
    finally:
        _kill(processes)
        for number, handler in before.items():
            signal.signal(number, handler)
    main = processes[0].returncode
    if first is None or main > 0:
        return main  # rank 0 has said what there is to say
    code = processes[first].returncode
    if signalled:
        return code if code > 0 else 128 - code
    raise _ended_early(first, code, len(processes))


def _first_to_fail(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Waits until all have ended, or for :data:`SECONDS_TO_END` from the first that did; which one failed first.

    One that ends without an error while rank 0 goes on has failed too: rank 0 lets the others go when all is done.
    """
    ended: list[int] = []  # ranks, in the order in which they ended
    deadline = math.inf
    while len(ended) < len(processes) and time.monotonic() < deadline:
        time.sleep(0.05)
        codes = [process.poll() for process in processes]  # every one is asked: any may end first
        ended += [rank for rank, code in enumerate(codes) if code is not None and rank not in ended]
        if ended and deadline == math.inf:
            deadline = time.monotonic() + SECONDS_TO_END
    failed = [rank for rank in ended if processes[rank].returncode]
    return next(iter(failed), None if 0 in ended else ended[0])


def _ended_early(rank: int, code: int, world: int) -> DynaconvError:
    what = "DeepSpeed's launcher was ended" if world == 1 else f"rank {rank} of {world} ended before the others"
    found = f"exit status {code}" if code >= 0 else f"killed by {_signal_name(-code)}"
    hint = "its machine may have run out of memory: use fewer processes or sequences at a time; rerun to go on"
    error = DynaconvError(what, found=found, hint=hint)
    error.exit_code = (code or 1) if code >= 0 else 128 - code
    return error


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in {*signal.Signals} else f"signal {number}"


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
