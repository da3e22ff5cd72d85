"""``dynaconv profile``, ``carve``, ``finetune``, ``calibrate`` and ``export``: one stage of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from dynaconv.cli.convert import AsJson, Overrides
from dynaconv.cli.listing import print_stages
from dynaconv.cli.output import print_json
from dynaconv.cli.ranks import Hostfile, Nproc, all_ranks, launch_if_wanted, with_ranks
from dynaconv.cli.request import request_of

HELP = {
    "importance": "Run calibration text through the dense model: what may be left out of a smaller one.",
    "profile": "Run calibration text through the dense model: neuron importance, difficulty curves.",
    "carve": "Order the neurons, cut them into blocks, and set up routers without training.",
    "finetune": "Tune weights and routers at sampled budgets.",
    "calibrate": "Solve the dial's thresholds; measure quality and cost at each budget, the parent beside them.",
    "export": "Write the folder that stock transformers loads, and check it in a clean process.",
}

DISTRIBUTED = ("profile", "finetune", "calibrate")

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")]
Again = Annotated[bool, typer.Option("--redo", help="Make it again though it is there, and drop what came of it.")]


def _command(stage: str) -> Callable[..., None]:
    def alone(run: RunFolder, overrides: Overrides = None, redo: Again = False, as_json: AsJson = False) -> None:
        run_one(stage, run, overrides or [], redo=redo, as_json=as_json)

    def together(
        run: RunFolder,
        overrides: Overrides = None,
        redo: Again = False,
        as_json: AsJson = False,
        nproc: Nproc = None,
        hostfile: Hostfile = None,
    ) -> None:
        run_one(stage, run, with_ranks(overrides, nproc, hostfile), redo=redo, as_json=as_json)

    command: Callable[..., None] = together if stage in DISTRIBUTED else alone
    command.__doc__ = HELP[stage]
    return command


def run_one(stage: str, folder: Path, overrides: list[str], *, redo: bool, as_json: bool) -> None:
    """Runs one stage of the run in ``folder`` and prints where the run stands then."""
    from dynaconv.artifacts.run import Run
    from dynaconv.pipeline.runner import run_stage
    from dynaconv.pipeline.status import status
    from dynaconv.progress import Progress

    with all_ranks() as ranks:
        asked = request_of(folder, overrides)
        asked.check()
        if stage in DISTRIBUTED:
            launch_if_wanted(asked)
        run = Run.create(asked.run)
        with Progress(quiet=as_json) as progress:
            run_stage(asked.config, run, stage, redo=redo, progress=progress, ranks=ranks)
        if as_json:
            print_json(status(run))
        else:
            print_stages(status(run))


COMMANDS = {stage: _command(stage) for stage in HELP}
