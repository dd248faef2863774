"""Compare the tensors of a merged model with the expected tensors, without loading a model.

    headers ──► expected tensors ──► blocks of rows, in threads ──► a result for each tensor

Memory holds a few blocks for each thread, and A and B, whatever the size of a tensor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vera_convert.arguments import Progress
from vera_convert.assembly.input_files import InputFile
from vera_convert.assembly.pool import WorkerPool, default_jobs, one_blas_thread
from vera_convert.base.model import BaseModel
from vera_convert.rules import (
    MERGED_BUFFER,
    MERGED_TENSOR_CHANGED,
    MERGED_TENSOR_FORM,
    MERGED_TENSOR_MISSING,
    MERGED_TENSOR_UNKNOWN,
    MERGED_TENSOR_WIDER,
    MERGED_WEIGHT_WRONG,
    Finding,
)
from vera_convert.text import and_more, listed
from vera_convert.verification.comparator import (
    LIMIT,
    Comparator,
    Comparison,
    compare_bytes,
    compare_conversion,
)
from vera_convert.verification.diagnosis import cause
from vera_convert.verification.expected import Expected, Kind
from vera_convert.verification.pairs import Buffers, Pair, Run, pairs_of, runs_of

_MOST_FINDINGS = 50
_MOST_CAUSES = 64
"""For how many wrong tensors, the worst first, a cause is looked for."""

Explain = Callable[[Sequence[str]], Mapping[str, str]]
"""Takes the names of wrong tensors, the worst first, and returns the causes of some of these."""
Job = tuple[Run, int, int]


@dataclass(frozen=True, slots=True)
class TensorCheck:
    """The result of comparing one tensor.

    Attributes:
        name: the name of the tensor.
        kind: how the merge changes the tensor.
        dtype: the dtype in the merged model, in safetensors' names.
        shape: the shape.
        comparison: the result of comparing the values.
        cause: a sentence that names the cause of errors; empty if the values prove none.
        rounded: the dtype that the values were rounded to, which can be narrower than `dtype`.
    """

    name: str
    kind: Kind
    dtype: str
    shape: tuple[int, ...]
    comparison: Comparison
    cause: str = ""
    rounded: str = ""

    @property
    def passed(self) -> bool:
        """Whether no value is wrong."""
        return not self.comparison.wrong

    @property
    def where(self) -> str:
        """The index of the value with the largest error."""
        assert self.comparison.worst is not None  # noqa: S101 -- only for a wrong tensor
        index, places = self.comparison.worst.index, list[int]()
        for size in reversed(self.shape):
            index, place = divmod(index, size)
            places.insert(0, place)
        return str(places)

    def finding(self) -> Finding:
        """Return the finding for a wrong tensor."""
        found, worst = self.comparison, self.comparison.worst
        assert worst is not None  # noqa: S101 -- only for a wrong tensor
        values = f"the value at {self.where} is {worst.found!r} instead of {worst.expected!r}"
        count = f"{found.wrong:,} of {found.values:,} values differ"
        if self.kind is Kind.ADDED:
            reason = f"{count}, by up to {found.ulps:.3g} ULP; {values}."
            reason += f" {self.cause}" if self.cause else ""
            return MERGED_WEIGHT_WRONG.in_tensor(self.name, reason)
        return MERGED_TENSOR_CHANGED.in_tensor(self.name, f"{count}; {values}.")


@dataclass(frozen=True, slots=True)
class MergedTensors:
    """The result of comparing all tensors of a merged model.

    Attributes:
        checks: the result for every compared tensor, in the order of the base.
        findings: the errors, the worst first.
        nbytes: how many bytes of the merged model were compared.
        jobs: how many threads were used.
        wider: for each tensor with a wider dtype than expected, the dtype that its values were
            rounded to, by name.
        unlisted: how many wrong tensors have no finding, because `findings` is limited.
        limit: the largest allowed `Comparison.excess`.
    """

    checks: tuple[TensorCheck, ...]
    findings: tuple[Finding, ...]
    nbytes: int
    jobs: int
    wider: Mapping[str, str]
    unlisted: int = 0
    limit: float = LIMIT

    @property
    def moved(self) -> bool:
        """Whether any weight with a delta differs from the base's weight."""
        return any(check.comparison.moved for check in self.checks)

    @property
    def reported(self) -> list[TensorCheck]:
        """Return every tensor but those that equal the base's tensor, as they must."""
        return [check for check in self.checks if check.kind is not Kind.SAME or not check.passed]

    @property
    def worst_first(self) -> list[TensorCheck]:
        """Return the wrong tensors, the largest error first."""
        wrong = [check for check in self.checks if not check.passed]
        return sorted(wrong, key=lambda check: (-check.comparison.excess, -check.comparison.wrong))


def check_tensors(
    expected: Mapping[str, Expected],
    merged: BaseModel,
    files: Mapping[str, InputFile],
    *,
    jobs: int | None = None,
    wider_too: bool = False,
    progress: Progress = lambda _done, _of: None,
    explain: Explain = lambda _names: {},
) -> MergedTensors:
    """Compare every tensor of a merged model with the expected tensor.

    Args:
        expected: the expected tensors, by name.
        merged: the merged model.
        files: the model's weight files, by name.
        jobs: how many threads to use; None for one for each core, four at most.
        wider_too: whether a wider dtype than expected is allowed.
        progress: called with the bytes compared so far, and with their total.
        explain: called first for the causes of wrong tensors with deltas.

    Raises:
        SurroundingsError: a file cannot be read, or changed meanwhile.
    """
    pairs = pairs_of(expected, merged, files, wider_too=wider_too)
    count = jobs or default_jobs()
    comparisons = _Work(pairs, count, progress).run()
    pairs = _rounded_before(pairs, comparisons, expected, count)
    found = {pair.expected.name: check for pair, check in _checks(pairs, comparisons, explain)}
    checks = tuple(found[name] for name in expected if name in found)
    compared = MergedTensors(
        checks,
        (),
        sum(pair.nbytes for pair in pairs),
        count,
        {c.name: c.rounded for c in checks if c.dtype != expected[c.name].dtype},
    )
    kinds = [
        [*_other_dtypes(expected, merged, compared)],
        [*_other_shapes(expected, merged)],
        *_only_in_one(expected, merged),
        [check.finding() for check in compared.worst_first],
    ]
    listed = [finding for kind in kinds for finding in kind[:_MOST_FINDINGS]]
    return replace(compared, findings=tuple(listed), unlisted=sum(map(len, kinds)) - len(listed))


def _rounded_before(
    pairs: Sequence[Pair],
    comparisons: dict[str, Comparison],
    expected: Mapping[str, Expected],
    jobs: int,
) -> list[Pair]:
    """Compare wrong tensors in a wider dtype again, with values rounded to the expected dtype.

    A model that was merged in 16 bits can be saved in 32. Return the pairs, and replace the
    comparisons, of these tensors.
    """
    again = [
        replace(pair, expected=expected[pair.expected.name])
        for pair in pairs
        if pair.expected.kind is Kind.ADDED
        and pair.expected.dtype != expected[pair.expected.name].dtype
        and comparisons[pair.expected.name].wrong
    ]
    if not again:
        return [*pairs]
    found = _Work(again, jobs, lambda _done, _of: None).run()
    narrow = {pair.expected.name: pair for pair in again if not found[pair.expected.name].wrong}
    comparisons.update({name: found[name] for name in narrow})
    return [narrow.get(pair.expected.name, pair) for pair in pairs]


def _checks(
    pairs: Sequence[Pair], comparisons: Mapping[str, Comparison], explain: Explain
) -> Iterator[tuple[Pair, TensorCheck]]:
    """Yield the result for each tensor, with causes for the worst."""
    added = [pair for pair in pairs if pair.expected.kind is Kind.ADDED]
    wrong = [pair for pair in added if comparisons[pair.expected.name].wrong]
    wrong.sort(key=lambda pair: -comparisons[pair.expected.name].excess)
    causes = {**explain([pair.expected.name for pair in wrong])} if wrong else {}
    for pair in wrong[:_MOST_CAUSES]:
        if pair.expected.name not in causes:
            causes[pair.expected.name] = cause(pair, comparisons[pair.expected.name])
    for pair in pairs:
        tensor = pair.expected
        comparison = comparisons[tensor.name]
        yield (
            pair,
            TensorCheck(
                tensor.name,
                tensor.kind,
                pair.found,
                tensor.shape,
                comparison,
                causes.get(tensor.name, ""),
                tensor.dtype,
            ),
        )


def _other_dtypes(
    expected: Mapping[str, Expected], merged: BaseModel, compared: MergedTensors
) -> Iterator[Finding]:
    """Yield one finding for each pair of found and expected dtype."""
    others: dict[tuple[str, str], list[str]] = {}
    for name, tensor in expected.items():
        there = merged.tensors.get(name)
        if there is not None and there.info.dtype != tensor.dtype:
            others.setdefault((there.info.dtype, tensor.dtype), []).append(name)
    for (found, due), names in sorted(others.items(), key=lambda item: -len(item[1])):
        more = f"{and_more(len(names) - 1)} are" if len(names) > 1 else " is"
        rule = MERGED_TENSOR_WIDER if names[0] in compared.wider else MERGED_TENSOR_FORM
        yield rule.in_tensor(names[0], f"it{more} {found} instead of {due}.")


def _other_shapes(expected: Mapping[str, Expected], merged: BaseModel) -> Iterator[Finding]:
    for name, tensor in expected.items():
        there = merged.tensors.get(name)
        if there is not None and there.info.shape != tensor.shape:
            reason = f"its shape is {list(there.info.shape)} instead of {list(tensor.shape)}."
            yield MERGED_TENSOR_FORM.in_tensor(name, reason)


def _only_in_one(expected: Mapping[str, Expected], merged: BaseModel) -> list[list[Finding]]:
    """Return notes on buffers, then findings for missing tensors, then for unknown tensors."""
    gone = {name: tensor for name, tensor in expected.items() if name not in merged.tensors}
    extra = {name: t.info for name, t in merged.tensors.items() if name not in expected}
    lost = [n for n, t in gone.items() if t.kind in _UNCHANGED and is_buffer(n, t.dtype, t.shape)]
    won = [n for n, info in extra.items() if is_buffer(n, info.dtype, info.shape)]
    notes = []
    for buffers, said in (
        (lost, "not stored in the merged model"),
        (won, "not stored in the base"),
    ):
        if buffers:
            place = listed(buffers, 1, noun="buffer")
            notes.append(MERGED_BUFFER.at(place, f"{said}."))
    buffers_of_one = {*lost, *won}
    missing = [
        MERGED_TENSOR_MISSING.in_tensor(
            name, f"{merged.location.label} has no tensor of this name."
        )
        for name in gone
        if name not in buffers_of_one
    ]
    unknown = [
        MERGED_TENSOR_UNKNOWN.in_tensor(
            name,
            "neither the base nor an adapter has a tensor for this name.",
        )
        for name in extra
        if name not in buffers_of_one
    ]
    return [notes, missing, unknown]


_UNCHANGED = (Kind.SAME, Kind.CONVERTED)
_WHOLE = frozenset(("I64", "I32", "I16", "I8", "U8", "BOOL"))
_COUNTED_BUFFERS = frozenset(("position_ids", "token_type_ids", "relative_position_index"))


def is_buffer(name: str, dtype: str, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor is a buffer that models compute, whether it is stored or not.

    Args:
        name: the name.
        dtype: the dtype, in safetensors' names.
        shape: the shape.
    """
    owner, _, last = name.rpartition(".")
    if last in _COUNTED_BUFFERS:
        return dtype in _WHOLE
    if last in ("inv_freq", "original_inv_freq"):
        return len(shape) == 1
    if last == "masked_bias":
        return not shape or shape == (1,)
    of_attention = owner.rpartition(".")[2] in ("attn", "attention", "self_attn")
    is_mask = len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
    return last == "bias" and of_attention and is_mask


class _Work:
    """Compare blocks in threads, and add up the results for each tensor."""

    def __init__(self, pairs: Sequence[Pair], jobs: int, progress: Progress) -> None:
        self._pairs = pairs
        self._jobs = jobs
        self._progress = progress
        self._lock = threading.Lock()
        self._comparisons = {pair.expected.name: Comparison() for pair in pairs}
        self._done = 0
        self._of = sum(pair.nbytes for pair in pairs)

    def run(self) -> dict[str, Comparison]:
        blocks = (block for run in runs_of(self._pairs) for block in _blocks(run))
        with one_blas_thread(), WorkerPool[Job](self._jobs, self._worker) as pool:
            pool.run(blocks, tell=lambda: self._progress(self._done, self._of))
        return self._comparisons

    def _worker(self) -> Callable[[Job], None]:
        """Return a function that compares one block, with the buffers of one thread."""
        buffers = Buffers()
        comparators: dict[str, Comparator] = {}

        def work(job: Job) -> None:
            run, first, last = job
            if len(run) > 1:
                comparisons = _compared_run(run, last, buffers)
                with self._lock:
                    self._comparisons.update(comparisons)
                    self._done += last
                return
            (pair,) = run
            tensor = pair.expected
            if tensor.terms and tensor.name not in comparators:
                comparators.clear()
                comparators[tensor.name] = Comparator(tensor)
            comparison = _compared(pair, first, last, buffers, comparators.get(tensor.name))
            with self._lock:
                self._comparisons[tensor.name] += comparison
                self._done += last - first if tensor.is_copied else _bytes(pair, first, last)

        return work


def _blocks(run: Run) -> Iterator[Job]:
    """Yield the blocks of a single tensor; a run of several tensors is one block of bytes."""
    if len(run) > 1:
        yield run, 0, sum(pair.nbytes for pair in run)
        return
    for first, last in run[0].blocks():
        yield run, first, last


def _compared_run(run: Run, size: int, buffers: Buffers) -> dict[str, Comparison]:
    """Compare tensors whose bytes are adjacent."""
    found, wanted = run[0].raw(0, size, buffers)
    if np.array_equal(found, wanted):
        return {pair.expected.name: Comparison(pair.expected.count) for pair in run}
    comparisons, at = {}, 0
    for pair in run:
        bytes_of = slice(at, at + pair.nbytes)
        comparisons[pair.expected.name] = compare_bytes(
            found[bytes_of], wanted[bytes_of], pair.expected.dtype, 0
        )
        at += pair.nbytes
    return comparisons


def _bytes(pair: Pair, first: int, last: int) -> int:
    return (last - first) * pair.row_bytes


def _compared(
    pair: Pair, first: int, last: int, buffers: Buffers, comparator: Comparator | None
) -> Comparison:
    tensor = pair.expected
    if tensor.is_copied:
        found, wanted = pair.raw(first, last, buffers)
        return compare_bytes(found, wanted, tensor.dtype, first)
    found, stored = pair.rows(first, last, buffers)
    if comparator is None:
        return compare_conversion(tensor, stored, found, first)
    return comparator.compare(stored, found, first)
