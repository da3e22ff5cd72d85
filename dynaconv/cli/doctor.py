"""``dynaconv doctor``: what this machine has, and what that means."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import typer

from dynaconv.artifacts.files import size_text
from dynaconv.cli.output import say
from dynaconv.cli.table import Column, print_table
from dynaconv.errors import ArtifactError
from dynaconv.version import __version__

FINE, NOTE, WRONG = "ok", "-", "wrong"
OPTIONAL = {
    "triton": ("GPU kernels can be compiled", "not here; needed only on an NVIDIA or AMD GPU"),
    "numba": (
        "dials save time on this CPU",
        "not here; without it a low dial is slow on a CPU: pip install 'dynaconv[cpu]'",
    ),
    "deepspeed": ("fine-tuning may use it", "not here; fine-tuning runs in plain torch"),
}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        state: ``ok``, ``-`` (worth knowing) or ``wrong``.
        name: What was looked at.
        words: What was found and what it means.
    """

    state: str
    name: str
    words: str


def doctor() -> None:
    """Say what is installed, which devices there are, and what is missing. Exit code 3 when something is wrong."""
    findings = [*_python(), *_packages(), *_optional(), *_devices(), *_storage()]
    columns = (Column("", words=True), Column("", words=True), Column("", words=True, wraps=32))
    print_table(columns, ([found.state, found.name, found.words] for found in findings))
    wrong = [found.name for found in findings if found.state == WRONG]
    if wrong:
        raise ArtifactError(f"this machine cannot run dynaconv yet: {', '.join(wrong)}", hint="see the lines above")
    say("Everything that dynaconv needs is here.")
    raise typer.Exit(0)


def _python() -> Iterator[Finding]:
    enough = sys.version_info >= (3, 11)
    yield Finding(FINE, "dynaconv", f"{__version__} in {Path(__file__).resolve().parents[1]}")
    yield Finding(FINE if enough else WRONG, "python", f"{platform.python_version()} ({sys.executable})")
    yield Finding(FINE, "system", f"{platform.platform()}, {platform.machine()}")


def _packages() -> Iterator[Finding]:
    """Every package dynaconv requires, with the version that is here."""
    from packaging.requirements import Requirement

    try:
        required = [Requirement(line) for line in metadata.requires("dynaconv") or []]
    except metadata.PackageNotFoundError:
        yield Finding(NOTE, "packages", "dynaconv is not installed (running from a folder): versions are not checked")
        return
    for requirement in required:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Finding(WRONG, requirement.name, f"missing: pip install '{requirement}'")
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        words = version if fits else f"{version}, too old: pip install '{requirement}'"
        yield Finding(FINE if fits else WRONG, requirement.name, words)


def _optional() -> Iterator[Finding]:
    for name, (there, absent) in OPTIONAL.items():
        if find_spec(name) is None:
            yield Finding(NOTE, name, absent)
        else:
            yield Finding(FINE, name, f"{metadata.version(name)}: {there}")
    key = "WANDB_API_KEY" in os.environ or _has_wandb_login()
    words = "a key is set: fine-tuning logs online (finetune.wandb=off to stop it)" if key else "no key: logs offline"
    yield Finding(FINE if key else NOTE, "wandb key", words)


def _has_wandb_login() -> bool:
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    return netrc.is_file() and "api.wandb.ai" in netrc.read_text(encoding="utf-8", errors="replace")


def _devices() -> Iterator[Finding]:
    try:
        import torch
    except Exception as error:  # a broken install fails in many ways, and this command is there to say so
        yield Finding(WRONG, "torch", f"cannot be imported: {error}")
        return
    yield Finding(FINE, "cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    if not torch.cuda.is_available():
        yield Finding(NOTE, "gpu", "none that torch can use: everything runs on the CPU")
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield Finding(FINE, f"gpu {index}", f"{device.name}, {size_text(device.total_memory)}")


def _storage() -> Iterator[Finding]:
    from dynaconv.memory import available_bytes
    from dynaconv.train.defaults import cache_folder

    memory = available_bytes()
    if memory is not None:
        yield Finding(FINE, "memory", f"{size_text(memory)} available")
    yield Finding(FINE, "disk", f"{size_text(shutil.disk_usage(Path.cwd()).free)} free in {Path.cwd()}")
    cache = cache_folder()
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    writable = there.is_dir() and os.access(there, os.W_OK)
    words = f"{cache}, for the embedded default" if writable else f"{cache} cannot be written: set DYNACONV_CACHE"
    yield Finding(FINE if writable else WRONG, "cache", words)
