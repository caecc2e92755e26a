"""A thread that does not start: no memory for its stack, or too many threads. Without torch.

Both are the same error. What tells them apart is asked where it was met, while what filled the memory is still held:
the memory of a stack is to be had or not, and a thread with a small stack starts or not.
"""

from __future__ import annotations

import errno
import mmap
import resource
import threading

#: What Python and C++ say.
_NOT_STARTED = ("can't start new thread", "resource temporarily unavailable", "the system starts no thread")
_SMALL = 64 * 1024
#: Of a thread where the limit of stacks is infinite (glibc on x86-64).
_USUAL = 2 << 20


def is_of_a_thread(error: BaseException) -> bool:
    """Whether ``error`` says that a thread did not start."""
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _NOT_STARTED)


def no_room_for_stacks() -> bool:
    """Whether memory, and not their number, is what a thread does not start for."""
    return not _has_room(_stack_bytes()) or (limits_memory() and starts_a_thread())


def limits_memory() -> bool:
    """A limit on the memory of this process, and of those that it starts, is in force."""
    return any(
        resource.getrlimit(kind)[0] != resource.RLIM_INFINITY for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    )


def starts_a_thread() -> bool:
    """One with the smallest of stacks starts: there may be more threads."""
    before = threading.stack_size(_SMALL)
    try:
        thread = threading.Thread(target=_nothing)
        thread.start()
    except RuntimeError:
        return False
    finally:
        threading.stack_size(before)
    thread.join()
    return True


def _stack_bytes() -> int:
    limit = resource.getrlimit(resource.RLIMIT_STACK)[0]
    return threading.stack_size() or (_USUAL if limit == resource.RLIM_INFINITY else limit)


def _has_room(size_bytes: int) -> bool:
    try:
        mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        return False
    return True


def _nothing() -> None:
    pass
