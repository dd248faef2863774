"""Run whole models in a child process with limits on memory and time.

    job ──► child: config, tokenizer, weights, models ──► result
                │ reports each stage
    parent: ends the child at a limit, and removes the temporary files

Configs, tokenizers and weights come from strangers. A library can use up
memory, run for hours, or end the process; then only the child ends.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from vera_convert.arguments import Progress, no_progress
from vera_convert.errors import SurroundingsError, UsageError
from vera_convert.text import printable
from vera_convert.verification.model_comparison import (
    INSTEAD,
    ModelComparison,
    ModelJob,
    QuantizedComparison,
    Stage,
)
from vera_convert.verification.provenance import MergeSettings

_CHILD = "vera_convert.with_torch.child"
"""The module that the child process runs."""
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Limit:
    """The time that a stage may take: a number of seconds, and more for each GiB of weights."""

    seconds: float
    seconds_per_gib: float = 0.0


@dataclass(frozen=True, slots=True)
class Limits:
    """The memory and time of the child: for two builds, two merges, and five runs of each sample.

    Attributes:
        memory: bytes for a model of any size; torch and transformers take half a GiB.
        memory_per_core: bytes added for each core: libraries reserve memory for each thread.
        memory_factor: bytes added for each byte of the weights. A 16-bit model runs in 32 bits,
            and is briefly in memory twice while it is built: six times the bytes of the weights.
        times: other times for stages than those of the table below.
    """

    memory: int = 4 * _GIB
    memory_per_core: int = _GIB // 16
    memory_factor: float = 8.0
    times: Mapping[Stage, Limit] | None = None


_STAGES: Mapping[Stage, tuple[str, Limit]] = {
    Stage.START: ("loading torch and transformers", Limit(300)),
    Stage.BUILD: ("building a model", Limit(180, 240)),
    Stage.TEXT: ("turning the text into token ids", Limit(60)),
    Stage.RUN: ("running a model on a sample", Limit(60, 60)),
    Stage.MERGE: ("merging the adapters again", Limit(180, 120)),
}
"""The words for each stage, and the time: far more than the stage takes on two slow cores with a
disk that reads 5 MB/s."""
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "USE_HUB_KERNELS": "NO",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "TORCH_COMPILE_DISABLE": "1",
}
"""The child uses no network, fetches and compiles no kernels, and computes on the CPU."""
_KEPT_BACK = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HUGGINGFACE_HUB_TOKEN",
    "OPENBLAS_NUM_THREADS",  # a limit of the program, which would slow PyTorch down on Arm
)
_LONGEST_LINE = 1 << 20
_LOOK_EVERY = 0.1
"""Seconds between two looks at the child, and the time to answer a signal to the parent."""


def run_models(
    job: ModelJob,
    *,
    progress: Progress = no_progress,
    limits: Limits | None = None,
) -> ModelComparison:
    """Run the base with adapters and the merged model in a child process, and compare the outputs.

    Args:
        job: the models, and the options of the merge.
        progress: called with the samples run on all models so far, and with the total.
        limits: the memory and the time of the child.

    Raises:
        UsageError: the models cannot use the text.
        SurroundingsError: the models cannot be built or run within the limits.
    """
    limits = limits or Limits()
    with TemporaryDirectory(prefix="vera-convert-") as scratch, _started(scratch) as child:
        cores = limits.memory_per_core * (os.cpu_count() or 1)
        memory = int(limits.memory + cores + limits.memory_factor * job.weights)
        _send(child, {**asdict(job), "memory": memory})
        progress(0, job.models * job.samples)
        return _result(child, job.weights, limits, progress)


@contextmanager
def _started(scratch: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start the child, and end the child when the block ends."""
    if not sys.executable:
        raise SurroundingsError(f"no Python interpreter was found to run a model. {INSTEAD}")
    kept = {name: value for name, value in os.environ.items() if name not in _KEPT_BACK}
    # With -P no file of the working directory replaces a module.
    path = os.pathsep.join(dict.fromkeys(os.path.abspath(p) for p in sys.path if p))  # noqa: PTH100
    environment = {**kept, **_ENVIRONMENT, "PYTHONPATH": path}
    environment |= dict.fromkeys(("TMPDIR", "TEMP", "TMP"), scratch)
    child = subprocess.Popen(  # noqa: S603 -- our own module, and no shell
        [sys.executable, "-P", "-m", _CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,  # Ctrl-C reaches the parent, which ends the child
    )
    try:
        yield child
    finally:
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            with suppress(OSError):
                pipe.close()  # type: ignore[union-attr] # both were asked for


def _send(child: subprocess.Popen[bytes], document: Mapping[str, object]) -> None:
    """Write a line to the child, and leave the pipe open: the child ends when the pipe closes."""
    assert child.stdin is not None  # noqa: S101 -- asked for
    with suppress(BrokenPipeError):  # the reader reports how the child ended
        child.stdin.write(json.dumps(document, default=_plain).encode() + b"\n")
        child.stdin.flush()


def _plain(value: Any) -> object:  # noqa: ANN401 -- a value of a job
    """Return a set as a list and a path as a text, for JSON."""
    return sorted(value) if isinstance(value, frozenset) else os.fspath(value)


def _result(
    child: subprocess.Popen[bytes], weights: int, limits: Limits, progress: Progress
) -> ModelComparison:
    """Read the messages of the child, and return its result.

    Raises:
        UsageError: the call is at fault.
        SurroundingsError: the child failed, died, or took too long.
    """
    assert child.stdout is not None  # noqa: S101 -- asked for
    lines: queue.Queue[bytes] = queue.Queue()
    threading.Thread(target=_read, args=(child.stdout, lines), daemon=True).start()
    stage, begun = Stage.START, time.monotonic()
    while True:
        words, usual = _STAGES[stage]
        limit = (limits.times or {}).get(stage, usual)
        seconds = limit.seconds + limit.seconds_per_gib * weights / _GIB
        try:
            line = lines.get(timeout=_LOOK_EVERY)
        except queue.Empty:
            if time.monotonic() <= begun + seconds:
                continue
            raise SurroundingsError(
                f"{words} was stopped: it took longer than {seconds:,.0f} s, the limit "
                f"for weights of this size. {INSTEAD}"
            ) from None
        said = _document(line)
        if said is None:
            raise _died(child, words)
        if "result" in said:
            return _comparison(said["result"])
        if "error" in said:
            kind = UsageError if said.get("is_usage") else SurroundingsError
            raise kind(str(said["error"]))
        stage, begun = Stage(said["stage"]), time.monotonic()
        if said["of"]:
            progress(said["done"], said["of"])


def _died(child: subprocess.Popen[bytes], doing: str) -> SurroundingsError:
    child.kill()  # of a child that closed its output and lives on
    status = child.wait()
    how = f"with status {status}"
    if status < 0:
        names = {number.value: number.name for number in signal.Signals}
        how = f"by signal {names.get(-status, -status)}"
    return SurroundingsError(
        f"the process that runs the models ended {how} while it was {doing}. Either memory ran "
        f"out, or a file of the model makes a library fail. {INSTEAD}"
    )


def _comparison(result: dict[str, Any]) -> ModelComparison:
    quantized = result["quantized"]
    if quantized is not None:
        quantized = QuantizedComparison(**quantized)
    return ModelComparison(**{**result, "quantized": quantized})


def _read(pipe: IO[bytes], lines: queue.Queue[bytes]) -> None:
    """Put each line into the queue, and an empty line at the end."""
    with suppress(OSError, ValueError):  # the pipe was closed
        while line := pipe.readline(_LONGEST_LINE):
            lines.put(line)
    lines.put(b"")


def _document(line: bytes) -> dict[str, Any] | None:
    """Return the JSON object of a line; None at the end, or for a line of a library."""
    try:
        document = json.loads(line)
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def job_of(document: Mapping[str, Any]) -> ModelJob:
    """Return the job that the parent wrote to the child; its choices are plain strings."""
    settings = MergeSettings(**document["settings"])
    folders = {name: Path(document[name]) for name in ("base", "found")}
    adapters = tuple((Path(folder), weight) for folder, weight in document["adapters"])
    return ModelJob(**{**document, **folders, "adapters": adapters, "settings": settings})


def printable_reason(error: BaseException) -> str:
    """Return the first line of a library's error message."""
    return printable(f"{type(error).__name__}: {error}".partition("\n")[0].rstrip(".: "))
