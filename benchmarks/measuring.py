"""Time and peak memory of functions, measured side by side."""

from __future__ import annotations

import ctypes
import platform
import statistics
import time
from collections.abc import Callable, Mapping

from torch.profiler import ProfilerActivity, profile


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, instead of returning it to the system and faulting it in again at the next call.

    Otherwise page faults dominate code that makes many large temporaries, and would flatter what is compared with it.
    """
    if platform.libc_ver()[0] != 'glibc':
        return
    libc = ctypes.CDLL(None)
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # names of mallopt(3)
    for option, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 64 * 2**20)):
        libc.mallopt(option, value)


def cpu_seconds(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median processor time of each function, in seconds.

    The functions take turns, so that whatever else the machine does falls on all of them alike; processor time of this
    process is not charged for waiting.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.process_time()
            function()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_bytes(function: Callable[[], object]) -> int:
    """Largest number of bytes that torch's CPU allocator held at once for a function, beyond what was there before."""
    function()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    held = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == '[memory]']
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
