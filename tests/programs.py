"""Programs beside a test, in processes of their own: on simulated devices, several at once, or to be killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).parent


def on_devices(count: int, **others: str) -> dict[str, str]:
    """An environment with so many CPU devices; `others` are further variables."""
    return {**os.environ, "JAX_PLATFORMS": "cpu", "TQDM_DISABLE": "1",
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}", **others}


def run_together(programs: Sequence[tuple[Mapping[str, str], Sequence[str | Path]]]) -> None:
    """Runs all programs at once, each an environment and Python's arguments; fails with what one that fails says."""
    started = [subprocess.Popen([sys.executable, *arguments], text=True, env=environment, cwd=HERE,
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
               for environment, arguments in programs]
    try:
        for process in started:
            _, errors = process.communicate(timeout=400)
            assert process.returncode == 0, errors
    finally:
        for process in started:
            process.kill()


def free_address() -> str:
    """host:port for the coordinator of several processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


class Forks:
    """Runs of a program that serves (see training_runs.py) in forked processes, one at a time."""

    def __init__(self, errors: Path, program: Sequence[str | Path], environment: Mapping[str, str]):
        self.errors, self.running = errors, None
        with errors.open("w") as file:
            self.server = subprocess.Popen([sys.executable, *program], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                           stderr=file, text=True, env=environment, cwd=HERE)

    def start(self, call: str, **arguments) -> int:
        """The number of the process."""
        self.server.stdin.write(json.dumps({"call": call, **arguments}, default=str) + "\n")
        self.server.stdin.flush()
        self.running = int(self.server.stdout.readline())
        return self.running

    def ended(self) -> int:
        """The exit status, once it has ended."""
        status, self.running = int(self.server.stdout.readline()), None
        return status

    def whole(self, call: str, **arguments) -> None:
        self.start(call, **arguments)
        assert self.ended() == 0, self.errors.read_text()

    def refused(self, call: str, **arguments) -> str:
        """What it says before it ends with an error."""
        before = self.errors.stat().st_size
        self.start(call, **arguments)
        assert self.ended() == 1
        return self.errors.read_bytes()[before:].decode()

    def kill(self) -> int:
        os.kill(self.running, signal.SIGKILL)
        return self.ended()

    def stop(self) -> None:
        self.server.stdin.close()
        self.server.wait()
        self.server.stdout.close()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "nothing happened for a minute"
        time.sleep(0.0005)


def killed(program: str, *arguments: str | Path, after: int) -> list[str]:
    """The first lines that a program in Python says, so many; then it is killed."""
    with subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True) as process:
        said = [process.stdout.readline() for _ in range(after)]
        process.kill()
    return said
