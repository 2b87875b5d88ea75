"""Load from wrk that ends with a number of requests instead of a time.

In: a port, paths, and how many. Out: at least that many answered requests, each with a number of its own in the query
(``id=THREAD-NUMBER``). wrk leaves requests under way when it ends, so it may have sent a few more.
"""

from __future__ import annotations

import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.e2e.harness import clean_environment, wait_until

_SCRIPT = """
local threads = 0
function setup(thread) threads = threads + 1; thread:set("me", threads) end
function init(arguments)
  directory, share, paths = arguments[1], tonumber(arguments[2]), {}
  for index = 3, #arguments do paths[#paths + 1] = arguments[index] end
  sent, received = 0, 0
end
function request()
  sent = sent + 1
  local path = paths[sent % #paths + 1]
  return wrk.format("GET", path .. (path:find("?", 1, true) and "&" or "?") .. "id=" .. me .. "-" .. sent)
end
function response()
  received = received + 1
  if received == share then
    io.open(directory .. "/done-" .. me, "w"):close()
    wrk.thread:stop()
  end
end
"""


def run_wrk(
    port: int,
    paths: Sequence[str],
    requests: int,
    *,
    threads: int = 2,
    connections: int = 64,
    limit_seconds: int = 80,
    scheme: str = "http",
) -> None:
    """Send ``requests`` requests and a few more, over that many keep-alive connections."""
    with tempfile.TemporaryDirectory() as directory:
        script = Path(directory) / "numbered.lua"
        script.write_text(_SCRIPT)
        # wrk sleeps for its whole duration whatever its threads do; SIGINT wakes it.
        command = ["wrk", f"-t{threads}", f"-c{connections}", f"-d{limit_seconds}s", "--timeout", "30s"]
        command += [
            "-s",
            str(script),
            f"{scheme}://127.0.0.1:{port}",
            "--",
            directory,
            str(requests // threads),
            *paths,
        ]
        with subprocess.Popen(
            command,
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as wrk:
            try:
                wait_until(
                    lambda: wrk.poll() is not None or len(list(Path(directory).glob("done-*"))) == threads,
                    "wrk has its answers",
                    limit_seconds + 10,
                )
                wrk.send_signal(signal.SIGINT)
                output, _ = wrk.communicate(timeout=30)
            finally:
                wrk.kill()
        assert wrk.returncode == 0, output
        done = len(list(Path(directory).glob("done-*")))
        assert done == threads, f"only {done} of {threads} threads got their answers in {limit_seconds} s:\n{output}"
