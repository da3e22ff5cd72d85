"""The command line with a ``profile`` that goes wrong on rank 1 in the way that ``$FAILS`` says."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dynaconv.cli.app import main
from dynaconv.errors import DataError
from dynaconv.pipeline import registry
from dynaconv.pipeline.stage import StageContext
from dynaconv.profile.stage import ProfileStage


class Failing(ProfileStage):
    """Rank 0 waits for the other one, which never comes."""

    def run(self, context: StageContext) -> dict[str, Any]:
        if not context.ranks.main:
            if os.environ["FAILS"] == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise {"text": DataError("rank one read bad text", where="there"), "bug": ValueError("a slip")}[
                os.environ["FAILS"]
            ]
        context.ranks.barrier()
        return {}


if __name__ == "__main__":
    registry.STAGES["profile"] = "__main__:Failing"
    main()
