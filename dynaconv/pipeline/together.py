"""What ranks do while rank 0 runs the pipeline: wait for its orders, and run the stages that want them.

Lock, ledger, staging and publishing are rank 0's. Before a stage that is ``distributed`` it sends an :class:`Order`;
the others run the same stage on the same folders and wait for the next.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dynaconv.config import RunConfig
from dynaconv.errors import DynaconvError
from dynaconv.pipeline import registry
from dynaconv.pipeline.stage import StageContext
from dynaconv.progress import Progress
from dynaconv.ranks import Ranks
from dynaconv.threads import using

INTERRUPTED = 130


@dataclass(frozen=True)
class Order:
    """One stage to take part in: ``threads`` CPU threads on each rank, and what :class:`StageContext` has."""

    stage: str
    config: RunConfig
    inputs: Mapping[str, Path]
    folder: Path
    work: Path
    threads: int | None = None


@dataclass(frozen=True)
class End:
    """There is nothing more to do; the process ends with ``exit_code``."""

    exit_code: int


@contextmanager
def leading(ranks: Ranks) -> Iterator[None]:
    """Around all that rank 0 does: the others are let go at the end, with its exit code."""
    code = 1
    try:
        yield
        code = 0
    except DynaconvError as error:
        code = error.exit_code
        raise
    finally:
        if not ranks.broken:
            ranks.broadcast_object(End(code))


def follow(ranks: Ranks) -> int:
    """Takes part in the stages that rank 0 orders, until it lets go; the exit code. Prints nothing.

    A failure is left for rank 0 to say.
    """
    logging.getLogger("dynaconv").addHandler(logging.NullHandler())
    try:
        nothing: Order | End = End(0)
        while isinstance(order := ranks.broadcast_object(nothing), Order):
            with Progress(quiet=True) as progress, using(order.threads):
                context = StageContext(
                    order.config, order.inputs, order.folder, order.work, progress=progress, ranks=ranks
                )
                registry.load(order.stage).run(context)
        return order.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        ranks.report(error)
        return error.exit_code if isinstance(error, DynaconvError) else 1


@contextmanager
def in_step(ranks: Ranks) -> Iterator[None]:
    """Around a stage that all ranks run: where another fails, its error is raised here, not the silence after it.

    Raises:
        DynaconvError: Another rank's, or that one ended without a word.
    """
    try:
        yield
    except BaseException as error:
        ranks.broken = ranks.world > 1
        if ranks.world == 1 or isinstance(error, DynaconvError) or not isinstance(error, RuntimeError):
            raise
        told = ranks.reported()
        if told is None and not _connection_lost(error):
            raise
        hint = "its machine may have run out of memory: use fewer sequences at a time, or rerun to go on"
        raise (told or DynaconvError("another process ended without a word", hint=hint)) from error


def _connection_lost(error: RuntimeError) -> bool:
    import torch

    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error) or "NCCL" in str(error)
