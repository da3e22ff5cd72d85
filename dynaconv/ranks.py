"""The processes of one run: who this one is, and the few collectives that training and measuring need.

Started by torchrun, DeepSpeed's launcher or ``--nproc``, each process finds its place in the environment
(:meth:`Ranks.from_environment`). Alone, every collective is a no-op. All ranks must call them in the same order.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import sys
import traceback
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

from dynaconv.errors import DynaconvError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Something = TypeVar("Something")
FAILURE = "dynaconv/failure"
SECONDS_TO_REPORT = 5.0
log = logging.getLogger("dynaconv")
PATIENCE = timedelta(days=7)  # other ranks wait as long as rank 0 carves, exports or downloads


@dataclass
class Ranks:
    """This process among all.

    Attributes:
        rank: From 0.
        world: How many there are.
        device: Where this one computes.
        broken: Whether this process left a stage that others may still be in: no collective will end any more.
    """

    rank: int
    world: int
    device: torch.device
    broken: bool = False

    @classmethod
    def single(cls, device: torch.device | str | None = None) -> Ranks:
        """One process alone; on the GPU where there is one, unless ``device`` says otherwise."""
        import torch

        return cls(0, 1, torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))

    @classmethod
    def from_environment(cls) -> Ranks:
        """This process's place by RANK, WORLD_SIZE and LOCAL_RANK; starts gloo, and NCCL where there are GPUs."""
        if not started_by_launcher():
            return cls.single()
        import torch
        import torch.distributed as dist

        gpu = torch.cuda.is_available()
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
        if gpu:
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=PATIENCE)
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which prints, writes and publishes."""
        return self.rank == 0

    def rows(self, count: int) -> tuple[int, int]:
        """This rank's share [start, stop) of ``count`` rows."""
        return self.rank * count // self.world, (self.rank + 1) * count // self.world

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks; a new tensor."""
        if self.world == 1:
            return values
        import torch.distributed as dist

        total = values.detach().clone()
        dist.all_reduce(total)
        return total

    def mean(self, values: Tensor, weight: float = 1.0) -> Tensor:
        """Mean over ranks, this one's ``values`` counting ``weight`` times; a new tensor."""
        if self.world == 1:
            return values
        weighted = self.sum((values * weight).double())
        return (weighted / self.sum(weighted.new_tensor(weight))).to(values.dtype)

    def barrier(self) -> None:
        """Waits until all ranks are here."""
        if self.world > 1:
            import torch

            self.sum(torch.zeros(()))

    def broadcast_object(self, thing: Something) -> Something:
        """Rank 0's ``thing``, on every rank."""
        if self.world == 1:
            return thing
        import torch
        import torch.distributed as dist

        box: list[Any] = [thing]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def close(self) -> None:
        """Ends the collectives, unless others may be stuck in one."""
        import torch.distributed as dist

        if dist.is_initialized() and not self.broken:
            dist.destroy_process_group()

    def report(self, error: BaseException) -> None:
        """Leaves ``error``, which ends this rank, for rank 0 to say; the first to be left is the one that counts."""
        with contextlib.suppress(Exception):  # rank 0 is gone already, and has said what there is to say
            if self.world > 1 and _store().add(f"{FAILURE}/count", 1) == 1:
                known = isinstance(error, DynaconvError)
                trace = "" if known else "".join(traceback.format_exception(error))
                _store().set(FAILURE, pickle.dumps((self.rank, error if known else None, trace)))

    def reported(self) -> DynaconvError | None:
        """What another rank left behind when it ended; ``None`` where this rank's own error is to blame.

        A collective ends in an error of torch's when another rank is gone, so this one looks why.
        """
        with contextlib.suppress(Exception):
            _store().wait([FAILURE], timedelta(seconds=SECONDS_TO_REPORT))
            rank, error, trace = pickle.loads(_store().get(FAILURE))
            log.info("rank %d ended: %s", rank, error or trace)
            if error is not None:
                return cast(DynaconvError, error)
            return DynaconvError(f"rank {rank} stopped on an error that is a bug", found=f"\n{trace}")
        return None


def _store() -> Any:
    import torch.distributed.distributed_c10d as c10d

    return c10d._get_default_store()


def leave(code: int) -> NoReturn:
    """Ends a rank's process, which has nothing left to do, with exit ``code``.

    At once: threads of gloo may still hold what they sent last, and one that lets go of it while the interpreter is
    being taken down aborts the process (pytorch/pytorch#179291), and the launcher then ends the other ranks as well.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def local_world() -> int:
    """Processes of this run on this machine."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1)) if started_by_launcher() else 1


def started_by_launcher() -> bool:
    """Whether this process is one of several that a launcher started."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ
