"""Work over cases in processes: all results, clear errors, no hang when a worker dies."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest

from autoseg.errors import UserError
from autoseg.parallel import (
    MOST_OPEN_FILES,
    allowed_cores,
    allowed_open_files,
    ctrl_c_later,
    over_cases,
    worker_context,
)

SLEEP_SECONDS = 60.0
"""Who is sooner was not waited for."""


def double(number: int) -> int:
    return 2 * number


def fail_at_three(number: int) -> int:
    if number == 3:
        raise ValueError("three")
    return number


def complain_at_three(number: int) -> int:
    if number == 3:
        raise UserError("case 3 is bad.", fix="Remove it.")
    return number


def die_at_three(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def leave_a_mark(folder_and_number: tuple[str, int]) -> int:
    folder, number = folder_and_number
    Path(folder, str(number)).touch()
    return number


def start_and_sleep(folder_and_number: tuple[str, int]) -> bytes:
    """Its first item gives more than a pipe holds at once."""
    folder, number = folder_and_number
    Path(folder, f"{number}-{os.getpid()}").touch()
    time.sleep(0.0 if number == 0 else SLEEP_SECONDS)
    return bytes(10_000_000)


@pytest.mark.parametrize("workers", [1, 2])
def test_every_item_comes_back_once_with_its_result(workers: int) -> None:
    found = dict(over_cases(double, range(20), workers, str))
    assert found == {k: 2 * k for k in range(20)}


@pytest.mark.parametrize("workers", [1, 2])
def test_no_items_give_no_results(workers: int) -> None:
    assert list(over_cases(double, [], workers, str)) == []


def test_an_error_in_a_worker_names_the_case() -> None:
    with pytest.raises(ValueError, match="three") as caught:
        list(over_cases(fail_at_three, range(6), 2, lambda k: f"case_{k}"))
    assert "while working on case_3" in "".join(caught.value.__notes__)


def test_a_user_error_keeps_its_fix_across_processes() -> None:
    with pytest.raises(UserError) as caught:
        list(over_cases(complain_at_three, range(6), 2, str))
    assert (caught.value.what, caught.value.fix) == ("case 3 is bad.", "Remove it.")


def test_a_killed_worker_ends_the_work_and_names_the_cases_under_way() -> None:
    with pytest.raises(UserError, match=r"worker process was killed.*case_3.*without a guard"):
        list(over_cases(die_at_three, range(6), 2, lambda k: f"case_{k}"))


def test_a_script_without_a_main_block_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("from autoseg.parallel import over_cases\nprint(len(list(over_cases(abs, [1, 2, 3], 2, str))))\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode != 0
    assert 'under `if __name__ == "__main__":`' in ended.stderr


def test_no_more_than_twice_the_workers_are_under_way(tmp_path: Path) -> None:
    results = over_cases(leave_a_mark, [(str(tmp_path), k) for k in range(50)], 2, str)
    next(results)
    time.sleep(0.5)
    assert len(list(tmp_path.iterdir())) <= 6
    results.close()  # type: ignore[attr-defined]


@pytest.mark.skipif(sys.platform != "linux", reason="processes are asked for in /proc")
def test_workers_are_gone_when_the_work_ends_early(tmp_path: Path) -> None:
    results = over_cases(start_and_sleep, [(str(tmp_path), k) for k in range(8)], 2, str)
    next(results)
    began = time.monotonic()
    while len(list(tmp_path.iterdir())) < 3 and time.monotonic() - began < 60:
        time.sleep(0.05)
    began = time.monotonic()
    results.close()  # type: ignore[attr-defined]
    assert time.monotonic() - began < SLEEP_SECONDS / 2
    workers = {int(path.name.partition("-")[2]) for path in tmp_path.iterdir()}
    assert not [pid for pid in workers if is_running(pid)]


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie that its parent, the fork server, has yet to collect."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


INTERRUPTED = """
import sys
from autoseg import __main__, cli
from autoseg.parallel import over_cases
from test_parallel import start_and_sleep
@cli.app.command()
def sleep(folder: str):
    with cli._watched():
        for _ in over_cases(start_and_sleep, [(folder, k) for k in range(8)], 2, str):
            pass
sys.argv.insert(1, "sleep")
__main__.main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="processes are asked for in /proc")
@pytest.mark.parametrize("pauses", [(), (0.05, 0.05), (0.3, 0.3)])
def test_ctrl_c_ends_command_and_workers_without_a_traceback(tmp_path: Path, pauses: tuple[float, ...]) -> None:
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    began = time.monotonic()
    while len(list(tmp_path.iterdir())) < 3 and time.monotonic() - began < 60:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    for pause in pauses:
        time.sleep(pause)
        process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=SLEEP_SECONDS / 2)
    assert "Traceback" not in said
    assert "Stopped" in said
    assert not [path for path in tmp_path.iterdir() if is_running(int(path.name.partition("-")[2]))]


@pytest.mark.skipif(sys.platform != "linux", reason="signals are asked for in /proc")
def test_the_server_of_workers_hears_no_ctrl_c_while_it_still_imports() -> None:
    worker_context(test_at_least_one_core_is_allowed, ())
    server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    [blocked] = [line for line in Path(f"/proc/{server}/status").read_text().splitlines() if "SigBlk" in line]
    assert int(blocked.split()[1], 16) & 1 << signal.SIGINT - 1
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_at_least_one_core_is_allowed() -> None:
    assert 1 <= allowed_cores() <= (os.cpu_count() or 1)


def test_the_limit_of_open_files_is_raised_as_far_as_allowed() -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    allowed_open_files.cache_clear()
    try:
        raised = allowed_open_files()
        assert raised == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        assert 256 < raised <= MOST_OPEN_FILES
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] == hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        allowed_open_files.cache_clear()


def test_ctrl_c_waits_until_a_worker_is_started() -> None:
    ended = False

    def start() -> None:
        nonlocal ended
        with ctrl_c_later():
            signal.raise_signal(signal.SIGINT)
            ended = True

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            start()
        assert ended
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
