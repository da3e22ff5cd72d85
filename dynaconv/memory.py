"""How much memory this process has used, and how much there is.

The figure is the high-water mark of resident pages, the interpreter and its libraries included. On Linux it can be set
back to the present size, so each stage gets its own; elsewhere it only ever grows, and a stage's figure is that of the
run so far. Pages of mapped files count as resident while they are in memory.
"""

from __future__ import annotations

import os
import re
import resource
import sys
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_HIGH_WATER_MARK = "5"  # see proc_pid_clear_refs(5)


def peak_rss_bytes() -> int:
    """High-water mark of this process's resident memory, in bytes, since the start or the last reset."""
    mark = _field(STATUS, "VmHWM")
    if mark is not None:
        return mark
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


def rss_bytes() -> int:
    """Resident memory of this process now, in bytes; the high-water mark where the present size is not known."""
    return _field(STATUS, "VmRSS") or peak_rss_bytes()


def reset_peak() -> bool:
    """Sets the high-water mark back to the present size; ``False`` where the system does not allow it."""
    try:
        CLEAR.write_text(RESET_HIGH_WATER_MARK)
    except OSError:
        return False
    return True


def available_bytes() -> int | None:
    """Memory that can be used without swapping, in bytes; ``None`` where the system does not say."""
    available = _field(Path("/proc/meminfo"), "MemAvailable")
    if available is None and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return available


def _field(path: Path, name: str) -> int | None:
    """A ``name: 123 kB`` line of a /proc file, in bytes."""
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found.group(1)) * 1024 if found else None
