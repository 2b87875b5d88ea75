"""The real agent, whose probes the benchmark switches on and off: ``python -m bench.switchable KEY=VALUE ...``.

Reads one command per line, ``attach``, ``detach`` or ``statistics``, and answers each with a line (the last: JSON).
Everything else is ``agent.runtime.Agent`` as ``spanloom run`` runs it.
"""

from __future__ import annotations

import json
import os
import sys
import threading

from agent import config as configuration
from agent.runtime import Agent


def main() -> int:
    agent = Agent(configuration.load(None, sys.argv[1:], os.environ))
    agent.start()
    agent.tls.stop(60)
    agent.capture.detach()
    loop = threading.Thread(target=agent.run)
    loop.start()
    print("ready", flush=True)
    for line in sys.stdin:
        command = line.strip()
        if command == "attach":
            agent.capture.forget_connections()
            agent.capture.attach([os.getpid()])
            if agent.config.capture.tls:
                agent.tls.start()
            print("attached", flush=True)
        elif command == "detach":
            agent.tls.stop(60)
            agent.capture.detach()
            print("detached", flush=True)
        elif command == "statistics":
            statistics = {
                one.name: (one.run_count, one.run_time_ns) for one in agent.capture.statistics() if one.run_count
            }
            print(json.dumps({"programs": statistics, "counters": agent.capture.counters()}), flush=True)
    agent.stop()
    loop.join()
    agent.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
