"""``python -m tests.helpers.fuzz MINUTES [ARGUMENT...]``: new examples for tests that draw them, until time is up.

Each round has a seed of its own. Where one fails, the seed that finds it again is printed.
"""

from __future__ import annotations

import os
import secrets
import shlex
import subprocess
import sys
import time


def main(minutes: float, arguments: list[str]) -> int:
    end = time.monotonic() + 60 * minutes
    rounds = 0
    while time.monotonic() < end:
        seed = secrets.randbelow(2**32)
        repeat = ["-m", "pytest", "-q", "-m", "hypothesis and not slow", f"--hypothesis-seed={seed}", *arguments]
        print(f"== round {rounds + 1}, seed {seed}, {(end - time.monotonic()) / 60:.1f} minutes left", flush=True)
        # A round is not cut short: what it would have found is not lost, and the last one may end late.
        environment = {**os.environ, "LOGQUANT_HYPOTHESIS": "fuzz"}
        workers = ["-n", "auto", "--maxprocesses", "8", "--max-worker-restart", "0", "-p", "no:cacheprovider"]
        # Four times the examples of `make test`, and often beside other work: ten minutes a test would not be a hang.
        command = [sys.executable, *repeat, *workers, "-o", "timeout=3600"]
        if subprocess.run(command, env=environment, check=False).returncode:
            again = shlex.join([sys.executable, *repeat])
            print(f"\nto repeat, with the failed test's name at the end:\nLOGQUANT_HYPOTHESIS=fuzz {again}")
            return 1
        rounds += 1
    print(f"nothing found in {rounds} rounds")
    return 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
