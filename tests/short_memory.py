"""A process with little memory left, for tests of what happens then."""

import resource
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def little_memory(size_bytes):
    """This process gets at most ``size_bytes`` more, whatever asks."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (int(status["VmData"].split()[0]) * 1024 + size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
