"""Compare the tensors of a merged model with the expected tensors, without loading a model.

    headers ──► expected tensors ──► blocks of rows, in threads ──► a result for each tensor

Memory holds a few blocks for each thread, and A and B, for a tensor of any size.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vera_convert import rules
from vera_convert.arguments import Progress, no_progress
from vera_convert.assembly.pool import WorkerPool, default_jobs, one_blas_thread
from vera_convert.base.model import BaseModel
from vera_convert.merging.base_files import BaseFiles
from vera_convert.merging.changes import Kind, MergedTensor
from vera_convert.rules import Finding
from vera_convert.text import listed
from vera_convert.verification.comparator import (
    LIMIT,
    Comparator,
    Comparison,
    compare_bytes,
    compare_conversion,
)
from vera_convert.verification.diagnosis import cause
from vera_convert.verification.pairs import Block, Buffers, Pair, blocks_of, new_buffers, pairs_of

_MOST_CAUSES = 64
"""For how many wrong tensors, the worst first, a cause is looked for."""

Explain = Callable[[Sequence[str]], Mapping[str, str]]
"""Takes the names of wrong tensors, the worst first, and returns known causes by name."""


@dataclass(frozen=True, slots=True)
class TensorCheck:
    """The result of comparing a tensor.

    Attributes:
        name: the name of the tensor.
        kind: how the merge changes the tensor.
        dtype: the dtype in the merged model, in safetensors' names.
        shape: the shape.
        comparison: the result of comparing the values.
        cause: a sentence about the cause of errors; empty if the values prove no cause.
    """

    name: str
    kind: Kind
    dtype: str
    shape: tuple[int, ...]
    comparison: Comparison
    cause: str = ""

    @property
    def passed(self) -> bool:
        """Whether no value is wrong."""
        return not self.comparison.wrong

    def finding(self) -> Finding:
        """Return the finding for a wrong tensor."""
        found, worst = self.comparison, self.comparison.worst
        assert worst is not None  # noqa: S101 -- only for a wrong tensor
        where = [int(place) for place in np.unravel_index(worst.index, self.shape)]
        values = f"the value at {where} is {worst.found!r} instead of {worst.expected!r}"
        count = f"{found.wrong:,} of {found.values:,} values differ"
        if self.kind is Kind.ADDED:
            reason = f"{count}, by up to {found.ulps:.3g} ULP; {values}."
            reason += f" {self.cause}" if self.cause else ""
            return rules.MERGED_WEIGHT_WRONG.in_tensor(self.name, reason)
        return rules.MERGED_TENSOR_CHANGED.in_tensor(self.name, f"{count}; {values}.")


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
        limit: the largest allowed `Comparison.excess`.
    """

    checks: tuple[TensorCheck, ...]
    findings: tuple[Finding, ...]
    nbytes: int
    jobs: int
    wider: Mapping[str, str]
    limit: float = LIMIT

    @property
    def moved(self) -> bool:
        """Whether any weight with a delta differs from the base's weight."""
        return any(check.comparison.moved for check in self.checks)

    @property
    def reported(self) -> list[TensorCheck]:
        """Return every tensor, except correct tensors that the merge leaves unchanged."""
        return [check for check in self.checks if check.kind is not Kind.SAME or not check.passed]

    @property
    def worst_first(self) -> list[TensorCheck]:
        """Return the wrong tensors, the largest error first."""
        return _worst_first(self.checks)


def check_tensors(
    expected: Mapping[str, MergedTensor],
    merged: BaseFiles,
    *,
    wider_too: bool,
    explain: Explain,
    jobs: int | None = None,
    progress: Progress = no_progress,
) -> MergedTensors:
    """Compare every tensor of a merged model with the expected tensor.

    Args:
        expected: the expected tensors, by name.
        merged: the merged model.
        wider_too: whether a wider dtype than expected is allowed.
        explain: called first for the causes of wrong tensors with deltas.
        jobs: the number of threads; None for the number of cores, four at most.
        progress: called with the compared bytes, and with the total.

    Raises:
        SurroundingsError: a file cannot be read, or changed meanwhile.
    """
    pairs = pairs_of(expected, merged, wider_too=wider_too)
    jobs = jobs or default_jobs()
    comparisons = _comparisons(pairs, jobs, progress)
    again = _in_expected_dtype(pairs, comparisons, expected)
    for name, comparison in _comparisons(again, jobs, no_progress).items():
        if not comparison.wrong:
            pairs[name], comparisons[name] = again[name], comparison
    causes = _causes(pairs, comparisons, explain)
    compared = {name: pairs[name] for name in expected if name in pairs}
    checks = tuple(
        TensorCheck(
            name,
            pair.expected.kind,
            pair.found.dtype,
            pair.expected.shape,
            comparisons[name],
            causes.get(name, ""),
        )
        for name, pair in compared.items()
    )
    wider = {
        name: pair.expected.dtype
        for name, pair in compared.items()
        if pair.found.dtype != expected[name].dtype
    }
    nbytes = sum(pair.found.nbytes for pair in pairs.values())
    findings = (
        *_other_forms(expected, merged.model, wider),
        *_only_in_one(expected, merged.model),
        *(check.finding() for check in _worst_first(checks)),
    )
    return MergedTensors(checks, findings, nbytes, jobs, wider)


def _worst_first(checks: Sequence[TensorCheck]) -> list[TensorCheck]:
    """Return the wrong tensors, the largest error first."""
    wrong = [check for check in checks if not check.passed]
    return sorted(wrong, key=lambda check: (-check.comparison.excess, -check.comparison.wrong))


def _in_expected_dtype(
    pairs: Mapping[str, Pair],
    comparisons: Mapping[str, Comparison],
    expected: Mapping[str, MergedTensor],
) -> dict[str, Pair]:
    """Return the wrong tensors in a wider dtype, to be compared in the expected dtype.

    A model that was merged in 16 bits can be saved in 32.
    """
    return {
        name: replace(pair, expected=expected[name])
        for name, pair in pairs.items()
        if pair.expected.kind is Kind.ADDED
        and pair.expected.dtype != expected[name].dtype
        and comparisons[name].wrong
    }


def _causes(
    pairs: Mapping[str, Pair], comparisons: Mapping[str, Comparison], explain: Explain
) -> dict[str, str]:
    """Return the causes of wrong tensors with deltas, by name, if the values prove a cause."""
    wrong = [
        name
        for name, pair in pairs.items()
        if pair.expected.kind is Kind.ADDED and comparisons[name].wrong
    ]
    wrong.sort(key=lambda name: -comparisons[name].excess)
    causes = {**explain(wrong)} if wrong else {}
    rest = [name for name in wrong[:_MOST_CAUSES] if name not in causes]
    return causes | {name: cause(pairs[name], comparisons[name]) for name in rest}


def _other_forms(
    expected: Mapping[str, MergedTensor], merged: BaseModel, wider: Collection[str]
) -> Iterator[Finding]:
    """Yield the tensors of another dtype than expected, and of another shape."""
    for name, tensor in expected.items():
        there = merged.tensors.get(name)
        if there is None:
            continue
        if there.info.dtype != tensor.dtype:
            rule = rules.MERGED_TENSOR_WIDER if name in wider else rules.MERGED_TENSOR_FORM
            reason = f"the dtype is {there.info.dtype} instead of {tensor.dtype}."
            yield rule.in_tensor(name, reason)
        if there.info.shape != tensor.shape:
            reason = f"its shape is {list(there.info.shape)} instead of {list(tensor.shape)}."
            yield rules.MERGED_TENSOR_FORM.in_tensor(name, reason)


def _only_in_one(expected: Mapping[str, MergedTensor], merged: BaseModel) -> Iterator[Finding]:
    """Yield notes on buffers, then findings for missing tensors, then for unknown tensors."""
    gone = {name: tensor for name, tensor in expected.items() if name not in merged.tensors}
    extra = {name: t.info for name, t in merged.tensors.items() if name not in expected}
    same = {name: tensor for name, tensor in gone.items() if tensor.kind in _UNCHANGED}
    lost = {name: t for name, t in same.items() if is_buffer(name, t.dtype, t.shape)}
    won = {name: info for name, info in extra.items() if is_buffer(name, info.dtype, info.shape)}
    for names, owner in ((lost, "merged model"), (won, "base")):
        if names:
            place = listed(names, 1, noun="buffer")
            yield rules.MERGED_BUFFER.at(place, f"not stored in the {owner}.")
    no_tensor = f"{merged.location.label} has no tensor of this name."
    for name in gone:
        if name not in lost:
            yield rules.MERGED_TENSOR_MISSING.in_tensor(name, no_tensor)
    no_source = "neither the base nor an adapter has a tensor for this name."
    for name in extra:
        if name not in won:
            yield rules.MERGED_TENSOR_UNKNOWN.in_tensor(name, no_source)


_UNCHANGED = (Kind.SAME, Kind.CONVERTED)
_WHOLE = frozenset(("I64", "I32", "I16", "I8", "U8", "BOOL"))
_COUNTED_BUFFERS = frozenset(("position_ids", "token_type_ids", "relative_position_index"))


def is_buffer(name: str, dtype: str, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor is a buffer, which models compute even if a file has the buffer.

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


def _comparisons(pairs: Mapping[str, Pair], jobs: int, progress: Progress) -> dict[str, Comparison]:
    """Compare all blocks in threads, and add up the results for each tensor, by name."""
    found = {name: Comparison() for name in pairs}
    done, total = 0, sum(pair.found.nbytes for pair in pairs.values())
    lock = threading.Lock()

    def worker() -> Callable[[Block], None]:
        """Return a function that compares a block, with the buffers and operands of a thread."""
        buffers, comparators = new_buffers(), dict[str, Comparator]()

        def work(block: Block) -> None:
            nonlocal done
            results = [*_compared(block, buffers, comparators)]
            with lock:
                for pair, comparison in zip(block.run, results, strict=True):
                    found[pair.expected.name] += comparison
                done += block.nbytes

        return work

    if pairs:
        with one_blas_thread(), WorkerPool[Block](jobs, worker) as pool:
            pool.run(blocks_of(pairs.values()), tell=lambda: progress(done, total))
    return found


def _compared(
    block: Block, buffers: Buffers, comparators: dict[str, Comparator]
) -> Iterator[Comparison]:
    """Yield the result for each tensor of a block.

    Args:
        block: the block.
        buffers: the buffers to read copied bytes into.
        comparators: the comparator of the current tensor by name; a new tensor replaces the old.
    """
    pair, first, last = block.run[0], block.first, block.last
    tensor = pair.expected
    if tensor.is_copied:
        found, wanted = pair.raw(first, last, buffers)
        end = 0
        for each in block.run:
            start, end = end, min(end + each.found.nbytes, len(found))
            yield compare_bytes(found[start:end], wanted[start:end], each.expected.dtype, first)
        return
    found, stored = pair.rows(first, last)
    if not tensor.terms:
        yield compare_conversion(tensor, stored, found, first)
        return
    if tensor.name not in comparators:
        comparators.clear()
        comparators[tensor.name] = Comparator(tensor)
    yield comparators[tensor.name].compare(stored, found, first)
