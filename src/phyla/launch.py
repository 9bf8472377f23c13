"""Several processes for one command: starting them, watching them, and a process's own place among them.

``--devices N`` starts the command N times, each with the environment that ``torchrun`` gives: RANK, WORLD_SIZE and so
on. A process that finds these joins the others (``joined``), whoever started it. The first one talks; of the others
only the message of one that failed is shown. When one ends with an error or is killed, the rest are stopped: what they
made so far lies in the run folder, and the same command goes on.
"""

import atexit
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NoReturn

from phyla.errors import InputError, LostProcessError

if TYPE_CHECKING:
    from phyla.training.device import Device
    from phyla.training.group import Group

LAUNCHED, SCRATCH = "PHYLA_LAUNCHED", "PHYLA_SCRATCH"
LOST = 3
"""Exit code of a started process that ends because another did: not the one to blame."""

INTERRUPTED, TERMINATED = 130, 143
GRACE = 5.0
"""Seconds in which processes may end by themselves, once one has, before they are stopped."""

_LOOK = 0.05  # seconds between two looks at the processes
_TAIL = 4000  # characters of a failed process's last words
_AGAIN = "give the same command again: it goes on where it was"


# ── a process among others ────────────────────────────────────────────────────────────────────────────────────────


def rank() -> int:
    """Return which process of a group this is, from 0; 0 where there is no group."""
    return _number("RANK", 0) if size() > 1 else 0


def size() -> int:
    """Return how many processes torchrun or ``--devices`` started; 1 where neither did."""
    return _number("WORLD_SIZE", 1)


def is_launched() -> bool:
    """Return whether ``launch`` started this process and watches it."""
    return LAUNCHED in os.environ


def wants_launch(devices: int | None) -> bool:
    """Return whether so many ``devices`` ask this process to start others, checked against those there are.

    Raises
    ------
    InputError
        torchrun has started another number of processes.
    """
    if devices is None or devices == size():
        return False
    if "WORLD_SIZE" in os.environ:
        raise InputError(f"--devices {devices} in one of {size()} processes that were started together (WORLD_SIZE)",
                         "leave out --devices: torchrun says how many")
    return True


def joined(name: str = "auto", precision: str = "auto", *, engine: str = "auto", batchnorm: str = "synced") -> "Device":
    """Return the device of this process and, where several were started, their group; see ``choose_device``.

    Each process of a machine takes a GPU of its own (cuda:0, cuda:1, ...), or all compute on the CPU.

    Raises
    ------
    InputError
        There are fewer GPUs than processes, or the processes cannot share the device.
    """
    from dataclasses import replace

    import torch

    from phyla.training.device import choose_device
    from phyla.training.group import join

    _check_environment()
    chosen = choose_device(name, precision, engine=engine, batchnorm=batchnorm)
    if size() == 1:
        return chosen
    device, local = chosen.device, _number("LOCAL_RANK", rank())
    if device.type not in ("cuda", "cpu") or device.index is not None:
        raise InputError(f"{size()} processes cannot share the device {device}", "use --device cuda or --device cpu")
    if device.type == "cpu":
        return replace(chosen, group=_left_at_exit(join("gloo")))
    here, found = _number("LOCAL_WORLD_SIZE", size()), torch.cuda.device_count()
    if max(here, local + 1) > found:
        raise InputError(f"{here} processes need a GPU each, and {found} CUDA devices were found",
                         f"use --devices {found}, or --device cpu")
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return replace(chosen, device=device, group=_left_at_exit(join("nccl", device=device)))


def _left_at_exit(group: "Group") -> "Group":
    """Return ``group``; it is left however Python ends, since a thread of it that still runs then is an abort."""
    from phyla.training.group import leave

    def end() -> None:
        with suppress(RuntimeError):  # of a connection that is broken already
            leave(group)

    atexit.register(end)
    return group


def follow_starter() -> None:
    """End this process as soon as the one that started it has, however that ended; by a thread that waits for it."""
    def wait() -> None:
        while os.read(0, 1):
            pass
        os._exit(TERMINATED)

    threading.Thread(target=wait, daemon=True).start()


def end(code: int) -> NoReturn:
    """End this process of a group at once: the others wait for it, and unloading PyTorch takes seconds."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    if "torch" in sys.modules:
        from phyla.training.group import Group, leave

        with suppress(RuntimeError):  # of a connection that is broken already
            leave(Group(rank(), size()))
    os._exit(code)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


def _check_environment() -> None:
    names = {"WORLD_SIZE"} if size() == 1 else {"WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}
    required = set() if size() == 1 else {"RANK", "MASTER_ADDR", "MASTER_PORT"}
    for name in sorted(names | required):
        text = os.environ.get(name)
        if (name in names and text is not None and not text.isdecimal()) or (name in required and not text):
            raise InputError(f"{name} in the environment is {text!r}, though processes were started together",
                             "start with --devices, or with torchrun")


# ── starting and watching ─────────────────────────────────────────────────────────────────────────────────────────


@dataclass(eq=False)
class _Child:
    """One of the processes; ``words`` is where what it says on stderr goes, None for the first: to the terminal."""

    rank: int
    process: "subprocess.Popen[bytes]"
    words: Path | None
    code: int | None = None
    was_stopped: bool = False

    def look(self) -> bool:
        """Return whether it has ended."""
        if self.code is None:
            self.code = self.process.poll()
        return self.code is not None

    @property
    def is_to_blame(self) -> bool:
        """Whether it ended, by itself and badly, and not because another had."""
        return self.code not in (None, 0, LOST) and not self.was_stopped

    def last_words(self) -> str:
        """Return the end of what it said on stderr; nothing for the first, whose words were seen."""
        if self.words is None:
            return ""
        lines = self.words.read_text(encoding="utf-8", errors="replace")[-_TAIL:].splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        return "\n".join(errors[-1:] or lines[-20:])


def launch(arguments: Sequence[str], n: int) -> int:
    """Run ``phyla ARGUMENTS`` as ``n`` processes of one group, and return the exit code of the whole.

    Raises
    ------
    LostProcessError
        One of them was killed, or failed without a word; the others were stopped.
    KeyboardInterrupt
        The user stopped them, and the first one did not say so itself.
    """
    with TemporaryDirectory(prefix="phyla-", ignore_cleanup_errors=True) as scratch, _terminating():
        children: list[_Child] = []
        environment = _environment(n, scratch)
        try:
            for number in range(n):
                children.append(_started(number, environment, arguments, Path(scratch)))
            _watch(children)
        except KeyboardInterrupt:
            _end(children, patience=GRACE)  # a terminal has told them, too
            if children and children[0].code == INTERRUPTED:
                return INTERRUPTED
            raise
        finally:
            _end(children)
        return _outcome(children)


def _environment(n: int, scratch: str) -> dict[str, str]:
    threads = str(max(1, _cores() // n))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    ours = {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, LAUNCHED: 1,
            SCRATCH: scratch}
    quiet = {"OMP_NUM_THREADS": threads, "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return quiet | os.environ | {name: str(value) for name, value in ours.items()}


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # on Linux: those that this process may use
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _started(number: int, environment: Mapping[str, str], arguments: Sequence[str], scratch: Path) -> _Child:
    command = [*_phyla(), *arguments]
    own = dict(environment) | {"RANK": str(number), "LOCAL_RANK": str(number)}
    if number == 0:
        return _Child(0, subprocess.Popen(command, env=own, stdin=subprocess.PIPE), None)
    words = scratch / f"stderr-{number}"
    with words.open("wb") as file:
        process = subprocess.Popen(command, env=own, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=file)
    return _Child(number, process, words)


def _phyla() -> list[str]:
    """Return the command that is phyla; it imports from the working folder only where the user let it, by python -m."""
    is_module = getattr(sys.modules["__main__"], "__spec__", None) is not None
    return [sys.executable, *([] if is_module else ["-P"]), "-m", "phyla"]


def _watch(children: Sequence[_Child]) -> None:
    """Return when all have ended, or one has and the others had time to follow it."""
    deadline: float | None = None
    while not all([child.look() for child in children]):
        first_failed = children[0].code not in (None, 0, LOST)
        if first_failed or (deadline is not None and time.monotonic() > deadline):
            return
        if deadline is None and (children[0].code == 0 or any(child.code for child in children)):
            deadline = time.monotonic() + GRACE
        time.sleep(_LOOK)


def _end(children: Sequence[_Child], *, patience: float = 0.0) -> None:
    """Wait ``patience`` seconds for processes to end, ask those that have not to, and then make them."""
    for seconds, stop in ((patience, "terminate"), (GRACE, "kill"), (GRACE, "")):
        deadline = time.monotonic() + seconds
        while not all([child.look() for child in children]) and time.monotonic() < deadline:
            time.sleep(_LOOK)
        for child in children:
            if not child.look() and stop:
                child.was_stopped = True
                getattr(child.process, stop)()
    for child in children:
        if child.process.stdin is not None:
            child.process.stdin.close()


def _outcome(children: Sequence[_Child]) -> int:
    first, n = children[0], len(children)
    if first.code == 0:
        return 0
    blamed = [child for child in children if child.is_to_blame]
    if first in blamed and first.code is not None and first.code > 0:
        return first.code  # and it has said why
    if not blamed:
        raise LostProcessError(f"the {n} processes lost the connection to each other and were stopped", _AGAIN)
    child = blamed[0]
    code = child.code or 1
    name = f"process {child.rank + 1} of {n} (rank {child.rank})"
    if code < 0:
        memory = "; a signal 9 that nobody sent means too little memory" if code == -9 else ""
        raise LostProcessError(f"{name} was killed (signal {-code}); the others were stopped", _AGAIN + memory)
    words = child.last_words()
    sys.stderr.write(words + "\n" if words else "")
    if words.startswith("error: "):
        return code
    raise LostProcessError(f"{name} failed; the others were stopped", _AGAIN)


@contextmanager
def _terminating() -> Iterator[None]:
    """Inside, a polite request to end reaches the processes, too: it ends this block as an exit does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(*_: object) -> None:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
