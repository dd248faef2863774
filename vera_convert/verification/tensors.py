"""A merged model held against base and adapters, tensor by tensor, without loading either.

    headers ──► what must be there ──► blocks of rows, by threads ──► numbers of each tensor

Memory is that of a few blocks for each thread, and of A and B, whatever the size of a tensor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from threadpoolctl import threadpool_limits

from vera_convert.assembly.inputs import InputFile
from vera_convert.assembly.jobs import Crew, default_jobs
from vera_convert.base.model import BaseModel
from vera_convert.files.reading import printable
from vera_convert.rules import (
    MERGED_TENSOR_CHANGED,
    MERGED_TENSOR_FORM,
    MERGED_TENSOR_MISSING,
    MERGED_TENSOR_UNKNOWN,
    MERGED_WEIGHT_WRONG,
    Finding,
)
from vera_convert.verification.expected import Expected, Kind
from vera_convert.verification.hints import hint
from vera_convert.verification.judging import Judge, Judgement, judge_bytes, judge_conversion
from vera_convert.verification.pairs import Buffers, Pair, pairs_of

_MOST_FINDINGS = 50
_MOST_HINTS = 12
"""Tensors whose values are looked at again to say what went wrong, the worst first."""

Progress = Callable[[int, int], None]
Job = tuple[Pair, int, int]


@dataclass(frozen=True, slots=True)
class TensorCheck:
    """What holding one tensor against what it must be came to.

    Attributes:
        name: its name.
        kind: what the merge does to it.
        dtype: its dtype in the merged model, in safetensors' names.
        shape: its shape.
        judgement: what its values came to.
        hint: what went wrong with it, as far as its values tell; empty if they do not.
    """

    name: str
    kind: Kind
    dtype: str
    shape: tuple[int, ...]
    judgement: Judgement
    hint: str = ""

    @property
    def passed(self) -> bool:
        """Whether it is what it must be."""
        return not self.judgement.wrong

    @property
    def where(self) -> str:
        """The place of the value that is off the most, as an index."""
        assert self.judgement.worst is not None  # noqa: S101 -- asked of a tensor that is wrong
        index, places = self.judgement.worst.index, list[int]()
        for size in reversed(self.shape):
            index, place = divmod(index, size)
            places.insert(0, place)
        return str(places)

    def finding(self) -> Finding:
        """Return what is wrong with it."""
        found, worst = self.judgement, self.judgement.worst
        assert worst is not None  # noqa: S101 -- asked of a tensor that is wrong
        values = f"its value at {self.where} is {worst.found!r} where {worst.expected!r} is due"
        count = f"{found.wrong:,} of {found.values:,} values are wrong"
        if self.kind is Kind.ADDED:
            reason = f"{count}, by up to {found.ulps:.3g} last bits; {values}."
            reason += f" {self.hint}" if self.hint else ""
            return MERGED_WEIGHT_WRONG.at(printable(self.name), reason)
        return MERGED_TENSOR_CHANGED.at(printable(self.name), f"{count}; {values}.")


@dataclass(frozen=True, slots=True)
class MergedTensors:
    """What holding all tensors of a merged model against what they must be came to.

    Attributes:
        checks: of every tensor that was compared, in the order of the base.
        findings: what is wrong, the worst first.
        nbytes: how many bytes of the merged model were compared.
        jobs: threads.
    """

    checks: tuple[TensorCheck, ...]
    findings: tuple[Finding, ...]
    nbytes: int
    jobs: int


def check_tensors(
    expected: Mapping[str, Expected],
    merged: BaseModel,
    files: Mapping[str, InputFile],
    *,
    jobs: int | None = None,
    progress: Progress = lambda _done, _of: None,
) -> MergedTensors:
    """Hold every tensor of a merged model against what it must be.

    Args:
        expected: what must be there, by name.
        merged: the merged model.
        files: its weight files, by name.
        jobs: threads; None for one for each core, four at most.
        progress: told now and then how many bytes have been compared, and of how many.

    Raises:
        SurroundingsError: a file cannot be read, or changed meanwhile.
    """
    pairs = pairs_of(expected, merged, files)
    count = jobs or default_jobs()
    judgements = _Comparison(pairs, count, progress).run()
    found = {pair.expected.name: check for pair, check in _checks(pairs, judgements)}
    checks = tuple(found[name] for name in expected if name in found)
    return MergedTensors(
        checks,
        (*_differences(expected, merged), *_worst_first(checks)),
        sum(pair.nbytes for pair in pairs),
        count,
    )


def _worst_first(checks: Sequence[TensorCheck]) -> Iterator[Finding]:
    """Yield what is wrong, the tensor that is off the most first."""
    wrong = [check for check in checks if not check.passed]
    wrong.sort(key=lambda check: (-check.judgement.excess, -check.judgement.wrong))
    yield from (check.finding() for check in wrong[:_MOST_FINDINGS])


def _checks(
    pairs: Sequence[Pair], judgements: Mapping[str, Judgement]
) -> Iterator[tuple[Pair, TensorCheck]]:
    """Yield the check of each tensor, with a hint for the worst."""
    added = [pair for pair in pairs if pair.expected.kind is Kind.ADDED]
    wrong = [pair for pair in added if judgements[pair.expected.name].wrong]
    wrong.sort(key=lambda pair: -judgements[pair.expected.name].excess)
    hints = {
        pair.expected.name: hint(pair, judgements[pair.expected.name])
        for pair in wrong[:_MOST_HINTS]
    }
    for pair in pairs:
        tensor = pair.expected
        judgement = judgements[tensor.name]
        yield (
            pair,
            TensorCheck(
                tensor.name,
                tensor.kind,
                tensor.dtype,
                tensor.shape,
                judgement,
                hints.get(tensor.name, ""),
            ),
        )


def _differences(expected: Mapping[str, Expected], merged: BaseModel) -> Iterator[Finding]:
    """Yield what the headers alone show."""
    missing = [name for name in expected if name not in merged.tensors]
    for name in missing[:_MOST_FINDINGS]:
        more = f" ({len(missing):,} are missing)" if len(missing) > 1 else ""
        reason = f"{merged.location.label} has no tensor of this name{more}."
        yield MERGED_TENSOR_MISSING.at(printable(name), reason)
    unknown = [name for name in merged.tensors if name not in expected]
    for name in unknown[:_MOST_FINDINGS]:
        reason = "neither the base nor an adapter has a tensor that belongs there."
        yield MERGED_TENSOR_UNKNOWN.at(printable(name), reason)
    for name, tensor in expected.items():
        there = merged.tensors.get(name)
        if there is None or (there.info.dtype, there.info.shape) == (tensor.dtype, tensor.shape):
            continue
        reason = (
            f"it is {there.info.dtype} {list(there.info.shape)} where "
            f"{tensor.dtype} {list(tensor.shape)} is due."
        )
        yield MERGED_TENSOR_FORM.at(printable(name), reason)


class _Comparison:
    """The work of the threads: blocks in, numbers of each tensor out."""

    def __init__(self, pairs: Sequence[Pair], jobs: int, progress: Progress) -> None:
        self._pairs = pairs
        self._jobs = jobs
        self._progress = progress
        self._lock = threading.Lock()
        self._judgements = {pair.expected.name: Judgement() for pair in pairs}
        self._done = 0
        self._of = sum(pair.nbytes for pair in pairs)

    def run(self) -> dict[str, Judgement]:
        blocks = ((pair, *block) for pair in self._pairs for block in pair.blocks())
        with threadpool_limits(1, user_api="blas"), Crew[Job](self._jobs, self._worker) as crew:
            crew.run(blocks, tell=lambda: self._progress(self._done, self._of))
        return self._judgements

    def _worker(self) -> Callable[[Job], None]:
        """Return what compares one block, with the buffers of one thread."""
        buffers = Buffers()
        judges: dict[str, Judge] = {}

        def work(job: Job) -> None:
            pair, first, last = job
            tensor = pair.expected
            if tensor.terms and tensor.name not in judges:
                judges.clear()
                judges[tensor.name] = Judge(tensor)
            judgement = _compared(pair, first, last, buffers, judges.get(tensor.name))
            with self._lock:
                self._judgements[tensor.name] += judgement
                self._done += last - first if tensor.is_carried else _bytes(pair, first, last)

        return work


def _bytes(pair: Pair, first: int, last: int) -> int:
    return (last - first) * pair.expected.row_bytes[1]


def _compared(
    pair: Pair, first: int, last: int, buffers: Buffers, judge: Judge | None
) -> Judgement:
    tensor = pair.expected
    if tensor.is_carried:
        found, wanted = pair.raw(first, last, buffers)
        return judge_bytes(found, wanted, tensor.dtype, first)
    found, stored = pair.rows(first, last, buffers)
    if judge is None:
        return judge_conversion(tensor, stored, found, first)
    return judge.judge(stored, found, first)
