"""The process that builds and runs models for `verify`: one job comes in, one result goes out.

stdin    the job, in one line; when the pipe closes, the parent is gone, and this process ends
stdout   a line of JSON at the beginning of each stage, and one with the result or the failure
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

from vera_convert.errors import VeraConvertError
from vera_convert.verification.model_comparison import INSTEAD, Stage
from vera_convert.verification.running import job_of, printable_reason


def main() -> None:
    """Do the job that stdin holds, and end the process."""
    document = json.loads(sys.stdin.buffer.readline())
    answer = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print is no answer
    _limit(document["memory"])
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def say(said: Mapping[str, object]) -> None:
        os.write(answer, json.dumps(said).encode() + b"\n")

    def tell(stage: Stage, done: int, of: int) -> None:
        say({"stage": stage, "done": done, "of": of})

    try:
        from vera_convert.with_torch.compare import compare_models

        say({"result": asdict(compare_models(job_of(document), tell))})
    except VeraConvertError as error:
        say({"error": str(error)})
    except MemoryError:
        say({"error": f"memory is too short to run the models. {INSTEAD}"})
    except BaseException as error:  # noqa: BLE001 -- libraries raise panics that are no Exception
        say({"error": f"the models could not be run: {printable_reason(error)}. {INSTEAD}"})
    os._exit(0)  # no library's clean-up can hang


def _limit(memory: int) -> None:
    """Limit the memory of this process, as far as the system can, and leave no core files."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        # Private memory alone: libraries reserve far more addresses than they use.
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # if memory runs out, this one ends


def _end_with_parent() -> None:
    """End this process when the parent has gone."""
    while sys.stdin.buffer.read(1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
