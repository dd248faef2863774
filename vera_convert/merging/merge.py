"""Merge adapters into a base: write a complete model, without PyTorch.

    open and match adapters and base ──> plan files and pieces ──> run in threads
        ──> read back ──> publish in one rename ──> report

The output appears after the complete merge has been read back. Peak memory is the same for any
number of shards and layers and for any size of a tensor. For weights of 16 bits, a merge takes
45 MiB, plus 4 r (in + out) bytes for A and B of each adapter, plus 17 MiB and 4 r w bytes for each
thread. The rank is r, and w is the width of the widest adapted weight.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vera_convert.arguments import Progress, instance, optional, path, progress_function
from vera_convert.assembly.pool import one_blas_thread
from vera_convert.base.facts import BaseOptions, base_options_of
from vera_convert.base.side_files import ModelFiles
from vera_convert.hub.lookup import HubAccess, hub_access_of
from vera_convert.merging.adapter_files import AdapterFiles
from vera_convert.merging.adapters import (
    AdapterSpec,
    MergedAdapter,
    find_adapters,
    repeated_findings,
)
from vera_convert.merging.inputs import open_inputs
from vera_convert.merging.job import MergeJob, MergeRun, is_merged
from vera_convert.merging.options import MergeOptions
from vera_convert.merging.output import FilePlan, file_plan, plan_merge
from vera_convert.merging.report import (
    ReplacedTensor,
    TensorReport,
    constant_findings,
    number_findings,
)
from vera_convert.publish.publishing import Output
from vera_convert.publish.signals import signals_raise
from vera_convert.rules import Finding
from vera_convert.text import short_repr

_COPY_SPEED = 1e9
"""The assumed speed of reading and writing, in bytes a second, for an estimate."""


@dataclass(frozen=True, slots=True)
class Merge:
    """The result of a merge, or the plan of a dry run.

    Attributes:
        base: the base's name, with the commit on the Hub.
        adapters: the adapters.
        out: the folder.
        files: the files except the provenance, the weights first.
        tensors: a report for each tensor that an adapter changes; empty for a dry run.
        replaced: the tensors that come from an adapter, with the size of the change.
        sides: the files beside the base, copied or left out.
        beside: the files beside the adapter, which replace the base's files.
        sha256: the checksum of each file, if asked for.
        needed: bytes of the output.
        free: free bytes on the disk of `out`.
        seconds: the duration; for a dry run an estimate.
        jobs: the number of threads.
        written: False for a dry run.
        findings: warnings and notes.
        resumed: shards that an earlier run had finished, if the merge continued the earlier run.
    """

    base: str
    adapters: tuple[MergedAdapter, ...]
    out: Path
    files: tuple[FilePlan, ...]
    tensors: tuple[TensorReport, ...]
    replaced: tuple[ReplacedTensor, ...]
    sides: ModelFiles
    beside: AdapterFiles
    sha256: Mapping[str, str]
    needed: int
    free: int
    seconds: float
    jobs: int
    written: bool
    findings: tuple[Finding, ...]
    resumed: int = 0

    __repr__ = short_repr

    @property
    def tokenizer(self) -> tuple[str, ...]:
        """The files of the adapter's tokenizer, which replace the base's."""
        return tuple(self.beside.tokenizer)


def merge(
    adapter: str | Path,
    out: str | Path,
    *,
    base: BaseOptions | str | Path | None = None,
    options: MergeOptions | None = None,
    revision: str | None = None,
    access: HubAccess | None = None,
    progress: Progress | None = None,
) -> Merge:
    """Write a complete model: a base with the deltas of one or more adapters in the weights.

    Args:
        adapter: a folder or a repo on the Hub.
        out: the folder to write.
        base: the base, and how to read it; None for the base that the adapter's config names.
        options: how to merge.
        revision: the adapter's branch, tag or commit on the Hub.
        access: how the Hub is reached.
        progress: called with the bytes written so far, and with the bytes of the output.

    Raises:
        CheckpointError: adapter or base is malformed, an adapter does not fit the base, or a
            result is not finite.
        UsageError: an option makes no sense; `out` exists, or overlaps an input.
        SurroundingsError: a file, a repo or the disk fails, or memory or space is short. If the
            finished shards are kept, `vera_convert.errors.is_resumable` is true for the error.

    Example:
        >>> from vera_convert import MergeOptions
        >>> merge("adapter", "merged", base="base", options=MergeOptions(weight=0.5)).written
        True
    """
    options = optional(instance, "options", MergeOptions, options) or MergeOptions()
    access = hub_access_of(access)
    progress = progress_function("progress", progress)
    base, place, started = base_options_of(base), path("out", out), time.monotonic()
    with signals_raise():
        specs = (AdapterSpec(adapter, options.weight, revision), *options.add)
        adapters = find_adapters(specs, access)
        folders = [each.folder for _, each in adapters if each.folder is not None]
        Output(place, is_merged, options.force, folders).check()
        with open_inputs(adapters, base, options, access) as inputs:
            job = MergeJob(plan_merge(inputs), place)
            free = job.output.free_space
            if not options.dry_run:
                run = job.run(progress)
                return _result(job, run, free, time.monotonic() - started)
            job.output.check()
            job.require_space(free)
            return _result(job, MergeRun(), free, _estimate(job))


def _result(job: MergeJob, run: MergeRun, free: int, seconds: float) -> Merge:
    plan, inputs = job.plan, job.plan.inputs
    label = inputs.base.model.location.label
    findings = [
        *inputs.findings,
        *repeated_findings(inputs.adapters),
        *plan.changes.findings,
        *plan.edits.findings,
        *constant_findings(plan.replaced),
        *number_findings(run.tensors, [each.weight for each in inputs.adapters], place=label),
    ]
    return Merge(
        base=label,
        adapters=tuple(map(MergedAdapter.of, inputs.adapters)),
        out=job.out,
        files=tuple(
            replace(file_plan(file), sha256=run.hashes.get(file.name)) for file in plan.files
        ),
        tensors=run.tensors,
        replaced=plan.replaced,
        sides=inputs.base.sides,
        beside=inputs.beside,
        sha256=run.hashes,
        needed=plan.size,
        free=free,
        seconds=seconds,
        jobs=job.threads,
        written=not inputs.options.dry_run,
        findings=tuple(dict.fromkeys(findings)),
        resumed=run.resumed,
    )


def _estimate(job: MergeJob) -> float:
    """Return an estimate of the duration in seconds, from the measured speed of a product."""
    operations = sum(file_plan(file).products for file in job.plan.files)
    seconds = 2 * job.plan.size / _COPY_SPEED
    return seconds + (operations / _product_speed() / job.threads if operations else 0.0)


def _product_speed() -> float:
    """Return the operations a second of one thread, in a product like the products of a merge."""
    left, right = np.ones((512, 256), np.float32), np.ones((256, 1024), np.float32)
    out = np.empty((512, 1024), np.float32)
    with one_blas_thread():
        np.matmul(left, right, out=out)
        start = time.perf_counter()
        np.matmul(left, right, out=out)
        return 2 * left.size * right.shape[1] / (time.perf_counter() - start)
