"""Several processes for one command: who talks, who is to blame when one ends, and that none is left behind."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from commands import call
from phyla import launch
from phyla.errors import InputError, LostProcessError
from phyla.training.group import Group

GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", launch.LAUNCHED)
WAIT = "import time; time.sleep(60)"
posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals")


@pytest.fixture(autouse=True)
def no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in GROUP:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list["subprocess.Popen[bytes]"]:
    """Make small programs stand for phyla, and return the processes that were started, to look at."""
    held: list[subprocess.Popen[bytes]] = []
    real = launch._started

    def remembered(*arguments):
        child = real(*arguments)
        held.append(child.process)
        return child

    monkeypatch.setattr(launch, "_phyla", lambda: [sys.executable, "-S", "-c"])
    monkeypatch.setattr(launch, "_started", remembered)
    monkeypatch.setattr(launch, "GRACE", 0.5)
    return held


def by_rank(*programs: str) -> list[str]:
    """Return a program that is the n-th of the given ones in the process of rank n."""
    return [f"import os; exec({programs!r}[int(os.environ['RANK'])])"]


def all_ended(processes: list["subprocess.Popen[bytes]"]) -> bool:
    return all(process.poll() is not None for process in processes)


# ── starting ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_process_learns_its_place(tmp_path: Path, started, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(launch, "_cores", lambda: 7)
    program = (f"import json, os, pathlib; pathlib.Path({str(tmp_path)!r}, os.environ['RANK'])"
               ".write_text(json.dumps(dict(os.environ)))")
    assert launch.launch([program], 3) == 0
    told = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(3)]
    assert [(each["RANK"], each["LOCAL_RANK"]) for each in told] == [("0", "0"), ("1", "1"), ("2", "2")]
    assert {each["WORLD_SIZE"] for each in told} == {each["LOCAL_WORLD_SIZE"] for each in told} == {"3"}
    assert {each["MASTER_ADDR"] for each in told} == {"127.0.0.1"}
    assert len({each["MASTER_PORT"] for each in told}) == 1
    assert {each["OMP_NUM_THREADS"] for each in told} == {"2"}
    assert not Path(told[0][launch.SCRATCH]).exists()


def test_threads_that_were_chosen_stay(started, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert launch.launch(["import os, sys; sys.exit(os.environ['OMP_NUM_THREADS'] != '5')"], 2) == 0


def test_the_first_process_talks(started, capfd: pytest.CaptureFixture[str]) -> None:
    program = "import os, sys; print('out', os.environ['RANK']); print('err', os.environ['RANK'], file=sys.stderr)"
    assert launch.launch([program], 2) == 0
    assert capfd.readouterr() == ("out 0\n", "err 0\n")


def test_the_working_folder_is_not_imported_from_unless_the_user_does(monkeypatch: pytest.MonkeyPatch) -> None:
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "__spec__", None)
    assert launch._phyla() == [sys.executable, "-P", "-m", "phyla"]
    monkeypatch.setattr(main, "__spec__", object())
    assert launch._phyla() == [sys.executable, "-m", "phyla"]


# ── one ends ──────────────────────────────────────────────────────────────────────────────────────────────────────


@posix
@pytest.mark.parametrize(("rank", "number"), [(1, 9), (0, 9), (1, 15)])
def test_a_killed_process_stops_the_others_with_one_line(started, capfd, rank: int, number: int) -> None:
    programs = [WAIT, WAIT]
    programs[rank] = f"import os; os.kill(os.getpid(), {number})"
    with pytest.raises(LostProcessError) as raised:
        launch.launch(by_rank(*programs), 2)
    assert raised.value.message == (f"process {rank + 1} of 2 (rank {rank}) was killed (signal {number}); "
                                    "the others were stopped")
    assert raised.value.hint is not None and raised.value.hint.startswith("give the same command again")
    assert ("memory" in raised.value.hint) == (number == 9)
    assert all_ended(started) and capfd.readouterr() == ("", "")


def says(code: int, text: str) -> str:
    return f"import sys; sys.stderr.write({text!r}); sys.exit({code})"


def test_the_mistake_of_all_is_told_by_the_first(started, capfd) -> None:
    program = says(2, "error: no such folder\n")
    assert launch.launch([program], 2) == 2
    assert capfd.readouterr().err == "error: no such folder\n"


def test_the_first_may_come_to_the_mistake_later(started, capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "GRACE", 30.0)
    late = "import time; time.sleep(0.3);" + says(2, "error: no such folder\n")
    assert launch.launch(by_rank(late, says(2, "error: no such folder\n")), 2) == 2
    assert capfd.readouterr().err == "error: no such folder\n"


@pytest.mark.parametrize("first", [says(launch.LOST, ""), WAIT])
def test_the_mistake_of_another_is_shown(started, capfd, first: str) -> None:
    other = says(2, "some talk\nerror: b.png cannot be read. hint: mend it\n")
    assert launch.launch(by_rank(first, other), 2) == 2
    assert capfd.readouterr().err == "error: b.png cannot be read. hint: mend it\n"
    assert all_ended(started)


def test_a_failure_without_an_error_line_shows_its_last_words(started, capfd) -> None:
    with pytest.raises(LostProcessError, match=r"process 2 of 2 \(rank 1\) failed; the others were stopped"):
        launch.launch(by_rank(WAIT, "1 / 0"), 2)
    words = capfd.readouterr().err
    assert words.startswith("Traceback") and words.endswith("ZeroDivisionError: division by zero\n")
    assert all_ended(started)


def test_those_that_lost_another_are_not_to_blame(started) -> None:
    with pytest.raises(LostProcessError, match="the 2 processes lost the connection to each other"):
        launch.launch([says(launch.LOST, "")], 2)


def test_what_the_first_finished_is_finished(started) -> None:
    assert launch.launch(by_rank("", WAIT), 2) == 0
    assert all_ended(started)
    assert launch.launch(by_rank("", says(launch.LOST, "")), 2) == 0


# ── stopped from outside ──────────────────────────────────────────────────────────────────────────────────────────


def told_soon(number: int) -> None:
    threading.Timer(0.3, os.kill, (os.getpid(), number)).start()


@posix
def test_ctrl_c_stops_all(started) -> None:
    told_soon(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        launch.launch([WAIT], 2)
    assert len(started) == 2 and all_ended(started)


@posix
def test_after_ctrl_c_the_first_may_have_said_so(started) -> None:
    told_soon(signal.SIGINT)
    assert launch.launch([f"import time; time.sleep(0.5); raise SystemExit({launch.INTERRUPTED})"], 2) == 130


@posix
def test_a_request_to_end_ends_all(started) -> None:
    before = signal.getsignal(signal.SIGTERM)
    told_soon(signal.SIGTERM)
    with pytest.raises(SystemExit) as raised:
        launch.launch([WAIT], 2)
    assert raised.value.code == 143 and all_ended(started)
    assert signal.getsignal(signal.SIGTERM) == before


@posix
def test_one_that_does_not_listen_is_made_to_end(started) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + WAIT
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(SystemExit):
        launch.launch([deaf], 2)
    assert all_ended(started)


def test_processes_end_when_their_starter_does() -> None:
    program = f"from phyla.launch import follow_starter; follow_starter(); print('up', flush=True); {WAIT}"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline().strip() == b"up"
        time.sleep(0.1)
        assert process.poll() is None
        process.stdin.close()  # as when the starter is killed
        assert process.wait(timeout=20) == launch.TERMINATED


# ── a process among others ────────────────────────────────────────────────────────────────────────────────────────


def member(monkeypatch: pytest.MonkeyPatch, rank: int, size: int, **more: int) -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "x", "MASTER_PORT": 1, **more}.items():
        monkeypatch.setenv(name, str(value))


def test_alone_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (launch.rank(), launch.size(), launch.is_launched()) == (0, 1, False)
    monkeypatch.setenv("RANK", "3")  # of something else
    assert launch.rank() == 0


def test_a_command_starts_others_only_where_it_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [launch.wants_launch(devices) for devices in (None, 1, 2)] == [False, False, True]
    member(monkeypatch, 1, 2)
    assert [launch.wants_launch(devices) for devices in (None, 2)] == [False, False]
    with pytest.raises(InputError, match=r"--devices 3 in one of 2 processes .*leave out --devices"):
        launch.wants_launch(3)


@pytest.mark.parametrize(("name", "text"), [("WORLD_SIZE", "two"), ("RANK", ""), ("LOCAL_RANK", "-1"),
                                            ("MASTER_PORT", "")])
def test_an_environment_that_makes_no_sense_is_told(monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    member(monkeypatch, 0, 2)
    monkeypatch.setenv(name, text)
    monkeypatch.setattr(launch, "end", sys.exit)
    said = call("embed", "digits", "--device", "cpu")
    assert f"{name} in the environment is '{text}'" in said.error() and "torchrun" in said.err


def test_a_process_of_a_group_ends_at_once_with_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    program = ("import atexit, sys; from phyla import launch; atexit.register(lambda: print('late'));"
               "sys.stdout.write('said'); launch.end(3)")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (3, "said", "")


@pytest.fixture
def joins(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, torch.device | None]]:
    """Return the calls of ``join``, which then finds the process that the environment says."""
    calls: list[tuple[str, torch.device | None]] = []

    def join(backend, *, device=None):
        calls.append((backend, device))
        return Group(launch.rank(), launch.size())

    monkeypatch.setattr("phyla.training.group.join", join)
    return calls


def test_on_a_cpu_processes_meet_by_gloo(monkeypatch: pytest.MonkeyPatch, joins) -> None:
    member(monkeypatch, 1, 2)
    device = launch.joined("cpu", batchnorm="local")
    assert (device.device.type, device.group, device.synced) == ("cpu", Group(1, 2), False)
    assert device.label == f"2 x CPU, {torch.get_num_threads()} threads, fp32, local BatchNorm"
    assert joins == [("gloo", None)]


def test_one_process_has_no_group(joins) -> None:
    assert launch.joined("cpu").group == Group() and joins == []


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


def test_each_process_takes_a_gpu_of_its_machine(monkeypatch: pytest.MonkeyPatch, joins, four_gpus) -> None:
    member(monkeypatch, 6, 8, LOCAL_RANK=2, LOCAL_WORLD_SIZE=4)
    device = launch.joined(engine="graph")
    mine = torch.device("cuda", 2)
    assert (device.device, device.group, device.engine) == (mine, Group(6, 8), "graph")
    assert joins == [("nccl", mine)] and four_gpus == [mine]


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch, joins, four_gpus) -> None:
    member(monkeypatch, 1, 6)
    with pytest.raises(InputError, match=r"6 processes need a GPU each, and 4 CUDA devices were found.*--devices 4"):
        launch.joined()
    with pytest.raises(InputError, match="6 processes cannot share the device cuda:1"):
        launch.joined("cuda:1")
    assert joins == []
