"""Build and run models for `verify` in a separate process: read a job, write a result.

stdin    the job, in one line; when the pipe closes, the parent has ended, and this process ends
stdout   a line of JSON at the start of each stage, and a last line with the result or the error
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from vera_convert.errors import UsageError, VeraConvertError
from vera_convert.verification.model_comparison import INSTEAD, Stage
from vera_convert.verification.running import job_of, printable_reason


def main() -> None:
    """Do the job from stdin, and end the process."""
    document = json.loads(sys.stdin.buffer.readline())
    answer = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # libraries print to nowhere
    _limit(document.pop("memory"))
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def say(said: Mapping[str, object]) -> None:
        os.write(answer, json.dumps(said).encode() + b"\n")

    def tell(stage: Stage, done: int, of: int) -> None:
        say({"stage": stage, "done": done, "of": of})

    try:
        from vera_convert.with_torch.compare import compare_lora, compare_models

        job = job_of(document)
        compared = compare_lora(job, tell) if job.is_lora else compare_models(job, tell)
        say({"result": asdict(compared)})
    except VeraConvertError as error:
        say({"error": str(error), "is_usage": isinstance(error, UsageError)})
    except MemoryError:
        say({"error": f"memory ran out while running the models. {INSTEAD}"})
    except BaseException as error:  # noqa: BLE001 -- a panic is no Exception
        say({"error": f"the models could not be run: {printable_reason(error)}. {INSTEAD}"})
    os._exit(0)  # skips the clean-up of libraries, which can hang


def _limit(memory: int) -> None:
    """Limit the memory of this process if the system can, and write no core files."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        # Only private memory counts: libraries reserve far more addresses than memory.
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    with suppress(OSError):
        # If memory runs out, the system ends this process first.
        Path("/proc/self/oom_score_adj").write_text("1000")


def _end_with_parent() -> None:
    """End this process when the parent has ended."""
    while sys.stdin.buffer.read(1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
