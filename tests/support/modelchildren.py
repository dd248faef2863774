"""Stand in for the child process that runs models.

The tests run this module with the job on stdin. The text of the first sample names the way in which
the process ends.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

RESULT = {
    "model_class": "Model",
    "dtype": "float32",
    "samples": 1,
    "tokens": 1,
    "largest_difference": float("inf"),
    "remerged_difference": 0.0,
    "kl": None,
    "top1": None,
    "effect": 1.0,
    "threshold_difference": 0.0,
    "threshold_remerged": 0.0,
    "threshold_kl": None,
    "threshold_top1": None,
    "wrapped": True,
    "conclusive": True,
    "passed": True,
    "reason": "",
    "quantized": None,
}


def send(**said: object) -> None:
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()


def main() -> None:
    job = json.loads(sys.stdin.buffer.readline())
    Path(job["found"], "pid").write_text(str(os.getpid()))
    Path(job["found"], "environment").write_text(json.dumps(dict(os.environ)))
    Path(job["found"], "path").write_text(json.dumps(sys.path))
    Path(tempfile.mkdtemp(), "left").write_text("a copy of a tokenizer")
    send(stage="run", done=1, of=5)
    match job["lines"][0]:
        case "answer":
            send(result={**RESULT, "tokens": job["memory"]})
        case "fail":
            send(error="it cannot be built.")
        case "usage":
            send(error="Leave --text out.", is_usage=True)
        case "abort":
            os.kill(os.getpid(), signal.SIGABRT)
        case "leave":
            sys.exit(7)
        case "noise":
            sys.stdout.write("what a library prints\n")
            sys.stdout.flush()
            time.sleep(600)
        case "sleep":
            time.sleep(600)
        case "mute":
            os.close(1)
            time.sleep(600)


if __name__ == "__main__":
    main()
