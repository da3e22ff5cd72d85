"""``--nproc`` and ``--hostfile``: one command on several processes, of which rank 0 alone has a say."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import typer

from dynaconv.cli.request import Request
from dynaconv.ranks import Ranks, started_by_launcher

Nproc = Annotated[
    int | None,
    typer.Option("--nproc", metavar="N", help="Processes, one a GPU; short for engine.nproc=N.", show_default=False),
]
Hostfile = Annotated[
    str | None,
    typer.Option(
        "--hostfile", metavar="FILE", help="Machines, as DeepSpeed's launcher reads them.", show_default=False
    ),
]


def with_ranks(overrides: Sequence[str] | None, nproc: int | None, hostfile: str | None) -> list[str]:
    """``overrides`` with what the two options are short for."""
    short = {"engine.nproc": nproc, "engine.hostfile": hostfile}
    return [*(overrides or ()), *(f"{key}={value}" for key, value in short.items() if value is not None)]


@contextmanager
def all_ranks() -> Iterator[Ranks | None]:
    """Around a command: rank 0 runs the block, the others follow it and leave; ``None`` for a process alone."""
    if not started_by_launcher():
        yield None
        return
    from dynaconv.pipeline.together import follow, leading

    ranks = Ranks.from_environment()
    try:
        if not ranks.main:
            raise typer.Exit(follow(ranks))
        with leading(ranks):
            yield ranks
    finally:
        ranks.close()


def launch_if_wanted(asked: Request) -> None:
    """Starts this command on all ranks that are asked for, and leaves with rank 0's exit code."""
    from dynaconv.pipeline.launch import start, wanted

    if wanted(asked.config.engine):
        raise typer.Exit(start(sys.argv[1:], asked.config.engine))
