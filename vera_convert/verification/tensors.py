"""A merged model held against base and adapters, tensor by tensor, without loading either.

    headers ──► what must be there ──► blocks of rows, by threads ──► numbers of each tensor

Memory is that of a few blocks for each thread, and of A and B, whatever the size of a tensor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

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
    Comparator,
    Comparison,
    compare_bytes,
    compare_conversion,
)
from vera_convert.verification.diagnosis import hint
from vera_convert.verification.expected import Expected, Kind
from vera_convert.verification.pairs import Buffers, Pair, Run, pairs_of, runs_of

_MOST_FINDINGS = 50
_MOST_HINTS = 64
"""Tensors whose values are looked at again to say what went wrong, the worst first."""

Progress = Callable[[int, int], None]
Explain = Callable[[Sequence[str]], Mapping[str, str]]
"""Takes the names of wrong tensors, the worst first, and gives what happened to some of these."""
Job = tuple[Run, int, int]


@dataclass(frozen=True, slots=True)
class TensorCheck:
    """What holding one tensor against what it must be came to.

    Attributes:
        name: its name.
        kind: what the merge does to it.
        dtype: its dtype in the merged model, in safetensors' names.
        shape: its shape.
        judgment: what its values came to.
        hint: what went wrong with it, as far as its values tell; empty if they do not.
        rounded: the dtype that its values were rounded to, which can be narrower than its own.
    """

    name: str
    kind: Kind
    dtype: str
    shape: tuple[int, ...]
    judgment: Comparison
    hint: str = ""
    rounded: str = ""

    @property
    def passed(self) -> bool:
        """Whether it is what it must be."""
        return not self.judgment.wrong

    @property
    def where(self) -> str:
        """The place of the value that is off the most, as an index."""
        assert self.judgment.worst is not None  # noqa: S101 -- asked of a tensor that is wrong
        index, places = self.judgment.worst.index, list[int]()
        for size in reversed(self.shape):
            index, place = divmod(index, size)
            places.insert(0, place)
        return str(places)

    def finding(self) -> Finding:
        """Return what is wrong with it."""
        found, worst = self.judgment, self.judgment.worst
        assert worst is not None  # noqa: S101 -- asked of a tensor that is wrong
        values = f"its value at {self.where} is {worst.found!r} where {worst.expected!r} is due"
        count = f"{found.wrong:,} of {found.values:,} values are wrong"
        if self.kind is Kind.ADDED:
            reason = f"{count}, by up to {last_bits_text(found.ulps)}; {values}."
            reason += f" {self.hint}" if self.hint else ""
            return MERGED_WEIGHT_WRONG.in_tensor(self.name, reason)
        return MERGED_TENSOR_CHANGED.in_tensor(self.name, f"{count}; {values}.")


@dataclass(frozen=True, slots=True)
class MergedTensors:
    """What holding all tensors of a merged model against what they must be came to.

    Attributes:
        checks: of every tensor that was compared, in the order of the base.
        wider: the dtype that the values of each added tensor were rounded to whose dtype in the
            merged model is wider than that of the base, by name.
        findings: what is wrong, the worst first.
        nbytes: how many bytes of the merged model were compared.
        jobs: threads.
        unlisted: how many tensors are wrong beyond those that have a finding, which are bounded.
    """

    checks: tuple[TensorCheck, ...]
    findings: tuple[Finding, ...]
    nbytes: int
    jobs: int
    wider: Mapping[str, str]
    unlisted: int = 0

    @property
    def moved(self) -> bool:
        """Whether any weight that a delta is added to is another than the base's."""
        return any(check.judgment.moved for check in self.checks)

    @property
    def worst_first(self) -> list[TensorCheck]:
        """Return the tensors that are wrong, the one that is off the most first."""
        wrong = [check for check in self.checks if not check.passed]
        return sorted(wrong, key=lambda check: (-check.judgment.excess, -check.judgment.wrong))


def last_bits_text(count: float) -> str:
    """Return a number of last bits in words."""
    return f"{count:.3g} last bit{'' if count == 1 else 's'}"


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
    """Hold every tensor of a merged model against what it must be.

    Args:
        expected: what must be there, by name.
        merged: the merged model.
        files: its weight files, by name.
        jobs: threads; None for one for each core, four at most.
        wider_too: whether a wider dtype than the expected one is no error.
        progress: told now and then how many bytes have been compared, and of how many.
        explain: asked what happened to wrong tensors that deltas are added to, before values tell.

    Raises:
        SurroundingsError: a file cannot be read, or changed meanwhile.
    """
    pairs = pairs_of(expected, merged, files, wider_too=wider_too)
    count = jobs or default_jobs()
    judgments = _Comparison(pairs, count, progress).run()
    pairs = _rounded_before(pairs, judgments, expected, count)
    found = {pair.expected.name: check for pair, check in _checks(pairs, judgments, explain)}
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
    judgments: dict[str, Comparison],
    expected: Mapping[str, Expected],
    jobs: int,
) -> list[Pair]:
    """Return the pairs, of those that are wrong in a wider dtype the ones that hold narrow values.

    A model that was merged in 16 bits can be saved in 32. Judgments of such are replaced.
    """
    again = [
        replace(pair, expected=expected[pair.expected.name])
        for pair in pairs
        if pair.expected.kind is Kind.ADDED
        and pair.expected.dtype != expected[pair.expected.name].dtype
        and judgments[pair.expected.name].wrong
    ]
    if not again:
        return [*pairs]
    found = _Comparison(again, jobs, lambda _done, _of: None).run()
    narrow = {pair.expected.name: pair for pair in again if not found[pair.expected.name].wrong}
    judgments.update({name: found[name] for name in narrow})
    return [narrow.get(pair.expected.name, pair) for pair in pairs]


def _checks(
    pairs: Sequence[Pair], judgments: Mapping[str, Comparison], explain: Explain
) -> Iterator[tuple[Pair, TensorCheck]]:
    """Yield the check of each tensor, with a hint for the worst."""
    added = [pair for pair in pairs if pair.expected.kind is Kind.ADDED]
    wrong = [pair for pair in added if judgments[pair.expected.name].wrong]
    wrong.sort(key=lambda pair: -judgments[pair.expected.name].excess)
    hints = {**explain([pair.expected.name for pair in wrong])} if wrong else {}
    for pair in wrong[:_MOST_HINTS]:
        if pair.expected.name not in hints:
            hints[pair.expected.name] = hint(pair, judgments[pair.expected.name])
    for pair in pairs:
        tensor = pair.expected
        judgment = judgments[tensor.name]
        yield (
            pair,
            TensorCheck(
                tensor.name,
                tensor.kind,
                pair.found,
                tensor.shape,
                judgment,
                hints.get(tensor.name, ""),
                tensor.dtype,
            ),
        )


def _other_dtypes(
    expected: Mapping[str, Expected], merged: BaseModel, compared: MergedTensors
) -> Iterator[Finding]:
    """Yield one finding for all tensors that have one dtype in the place of another."""
    others: dict[tuple[str, str], list[str]] = {}
    for name, tensor in expected.items():
        there = merged.tensors.get(name)
        if there is not None and there.info.dtype != tensor.dtype:
            others.setdefault((there.info.dtype, tensor.dtype), []).append(name)
    for (found, due), names in sorted(others.items(), key=lambda item: -len(item[1])):
        more = f"{and_more(len(names) - 1)} are" if len(names) > 1 else " is"
        rule = MERGED_TENSOR_WIDER if names[0] in compared.wider else MERGED_TENSOR_FORM
        yield rule.in_tensor(names[0], f"it{more} {found} where {due} is due.")


def _other_shapes(expected: Mapping[str, Expected], merged: BaseModel) -> Iterator[Finding]:
    for name, tensor in expected.items():
        there = merged.tensors.get(name)
        if there is not None and there.info.shape != tensor.shape:
            reason = f"it is {list(there.info.shape)} where {list(tensor.shape)} is due."
            yield MERGED_TENSOR_FORM.in_tensor(name, reason)


def _only_in_one(expected: Mapping[str, Expected], merged: BaseModel) -> list[list[Finding]]:
    """Return a note for each kind of buffers, then what is missing, then what is unknown."""
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
            "neither the base nor an adapter has a tensor that belongs there.",
        )
        for name in extra
        if name not in buffers_of_one
    ]
    return [notes, missing, unknown]


_UNCHANGED = (Kind.SAME, Kind.CONVERTED)
_WHOLE = frozenset(("I64", "I32", "I16", "I8", "U8", "BOOL"))
_COUNTED_BUFFERS = frozenset(("position_ids", "token_type_ids", "relative_position_index"))


def is_buffer(name: str, dtype: str, shape: tuple[int, ...]) -> bool:
    """Say whether a tensor is one that models make themselves, whatever is stored of it.

    Args:
        name: its name.
        dtype: its dtype, in safetensors' names.
        shape: its shape.
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


class _Comparison:
    """The work of the threads: blocks in, numbers of each tensor out."""

    def __init__(self, pairs: Sequence[Pair], jobs: int, progress: Progress) -> None:
        self._pairs = pairs
        self._jobs = jobs
        self._progress = progress
        self._lock = threading.Lock()
        self._judgments = {pair.expected.name: Comparison() for pair in pairs}
        self._done = 0
        self._of = sum(pair.nbytes for pair in pairs)

    def run(self) -> dict[str, Comparison]:
        blocks = (block for run in runs_of(self._pairs) for block in _blocks(run))
        with one_blas_thread(), WorkerPool[Job](self._jobs, self._worker) as pool:
            pool.run(blocks, tell=lambda: self._progress(self._done, self._of))
        return self._judgments

    def _worker(self) -> Callable[[Job], None]:
        """Return what compares one block, with the buffers of one thread."""
        buffers = Buffers()
        judges: dict[str, Comparator] = {}

        def work(job: Job) -> None:
            run, first, last = job
            if len(run) > 1:
                judgments = _compared_run(run, last, buffers)
                with self._lock:
                    self._judgments.update(judgments)
                    self._done += last
                return
            (pair,) = run
            tensor = pair.expected
            if tensor.terms and tensor.name not in judges:
                judges.clear()
                judges[tensor.name] = Comparator(tensor)
            judgment = _compared(pair, first, last, buffers, judges.get(tensor.name))
            with self._lock:
                self._judgments[tensor.name] += judgment
                self._done += last - first if tensor.is_carried else _bytes(pair, first, last)

        return work


def _blocks(run: Run) -> Iterator[Job]:
    """Yield the blocks of a tensor alone; a run of several is one block of bytes."""
    if len(run) > 1:
        yield run, 0, sum(pair.nbytes for pair in run)
        return
    for first, last in run[0].blocks():
        yield run, first, last


def _compared_run(run: Run, size: int, buffers: Buffers) -> dict[str, Comparison]:
    """Compare tensors whose bytes lie one after the other."""
    found, wanted = run[0].raw(0, size, buffers)
    if np.array_equal(found, wanted):
        return {pair.expected.name: Comparison(pair.expected.count) for pair in run}
    judgments, at = {}, 0
    for pair in run:
        bytes_of = slice(at, at + pair.nbytes)
        judgments[pair.expected.name] = compare_bytes(
            found[bytes_of], wanted[bytes_of], pair.expected.dtype, 0
        )
        at += pair.nbytes
    return judgments


def _bytes(pair: Pair, first: int, last: int) -> int:
    return (last - first) * pair.row_bytes


def _compared(
    pair: Pair, first: int, last: int, buffers: Buffers, judge: Comparator | None
) -> Comparison:
    tensor = pair.expected
    if tensor.is_carried:
        found, wanted = pair.raw(first, last, buffers)
        return compare_bytes(found, wanted, tensor.dtype, first)
    found, stored = pair.rows(first, last, buffers)
    if judge is None:
        return compare_conversion(tensor, stored, found, first)
    return judge.judge(stored, found, first)
