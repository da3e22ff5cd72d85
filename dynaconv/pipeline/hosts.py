"""``python -P -m dynaconv.pipeline.hosts``: DeepSpeed's launcher, without what it takes from the current folder.

It puts the current folder in front of PYTHONPATH on every machine, and reads ``.deepspeed_env`` there, whose lines a
shell runs. Both would run code of whoever made the folder. ``.deepspeed_env`` in the home folder still counts.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def main() -> None:
    """Runs the launcher on this process's arguments."""
    from deepspeed.launcher import multinode_runner, runner

    users = os.environ.get("PYTHONPATH")
    extended = os.pathsep.join([os.path.abspath("."), *([] if users is None else [users])])  # noqa: PTH100
    add_export = multinode_runner.MultiNodeRunner.add_export

    def add_users_own(self: Any, name: str, value: str) -> None:
        if (name, value) == ("PYTHONPATH", extended):
            if not users:
                return
            value = users
        add_export(self, name, value)

    multinode_runner.MultiNodeRunner.add_export = add_users_own
    runner.DEEPSPEED_ENVIRONMENT_PATHS = [str(Path.home())]
    runner.main()


if __name__ == "__main__":
    main()
