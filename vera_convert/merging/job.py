"""Run a planned merge: stage the files, read the files back, publish in one rename."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from vera_convert import rules
from vera_convert.assembly.addends import NotFiniteError, Numbers
from vera_convert.assembly.input_files import InputFile
from vera_convert.assembly.journal import Journal, finished_files
from vera_convert.assembly.pool import default_jobs
from vera_convert.assembly.writer import Assembler, Finished
from vera_convert.base.side_files import PROVENANCE_NAME
from vera_convert.errors import CheckpointError, SurroundingsError, mark_resumable
from vera_convert.merging.options import MergeOptions
from vera_convert.merging.output import MergePlan, check_staged
from vera_convert.merging.provenance import input_records, provenance_text, recorded_files, versions
from vera_convert.merging.report import TensorReport
from vera_convert.publish.publishing import Output, Staged, files_but
from vera_convert.rules import Finding
from vera_convert.text import printable

_BLOB = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")


def is_merged(folder: Path) -> bool:
    """Say whether a folder is a merged model, which ``--force`` may replace."""
    return (folder / PROVENANCE_NAME).is_file()


@dataclass(frozen=True, slots=True)
class MergeRun:
    """The outcome of a merge.

    Attributes:
        tensors: a report for each tensor that an adapter changes.
        hashes: the SHA-256 of each file, if the options ask for checksums.
        resumed: the number of shards that an earlier run had finished.
    """

    tensors: tuple[TensorReport, ...] = ()
    hashes: Mapping[str, str] = field(default_factory=dict)
    resumed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class MergeJob:
    """A planned merge, and the folder to write.

    Attributes:
        plan: the plan.
        out: the path of the folder to write.
    """

    plan: MergePlan
    out: Path

    @property
    def output(self) -> Output:
        """The folder to write, and the conditions for its replacement."""
        inputs = self.plan.inputs
        force = inputs.options.force
        return Output(self.out, is_merged, force, inputs.folders, self._strangers)

    @property
    def options(self) -> MergeOptions:
        """The options of the merge."""
        return self.plan.inputs.options

    @property
    def threads(self) -> int:
        """The number of threads."""
        return self.options.jobs or default_jobs()

    def _strangers(self, folder: Path) -> list[str]:
        """Return the files in an earlier output that neither merge wrote or writes."""
        written = {PROVENANCE_NAME, *(file.name for file in self.plan.files)}
        return files_but(folder, written | recorded_files(folder))

    def run(self, progress: Callable[[int, int], None]) -> MergeRun:
        """Run the merge.

        Raises:
            CheckpointError: a result is not finite.
            UsageError: `out` exists and may not be replaced, or `out` overlaps an input.
            SurroundingsError: the disk fails, memory or space is short, or an input changed.
        """
        plan, options = self.plan, self.options
        with (
            _enough_memory(),
            Assembler(
                plan.files, jobs=self.threads, check=options.check, device=options.device
            ) as assembler,
        ):
            product = options.device.product()
            with self._staged(product) as (folder, finished, on_finished):
                try:
                    results = finished | assembler.assemble(
                        folder,
                        finished=finished,
                        hashes=options.checksums or options.resume,
                        progress=lambda done: progress(done, plan.size),
                        on_finished=on_finished,
                    )
                except NotFiniteError as error:
                    raise CheckpointError(_not_finite(error)) from error
                reports = self._reports(results)
                wanted = results.items() if options.checksums else ()
                hashes = {name: each.sha256 for name, each in wanted if each.sha256}
                provenance = provenance_text(plan, reports, hashes, product)
                (folder / PROVENANCE_NAME).write_bytes(provenance)
                check_staged(folder, plan)
                plan.inputs.check_unchanged()
        return MergeRun(reports, hashes, len(finished))

    def require_space(self, free: int, *, there: int = 0) -> None:
        """Raise `SurroundingsError` if the output needs more space than is free.

        Args:
            free: free bytes on the disk.
            there: bytes of the output that an earlier run already wrote.
        """
        needed = self.plan.size
        if needed - there > free:
            kept = f", {there:,} of which are there already" if there else ""
            raise SurroundingsError(
                f"the merged model takes {needed:,} bytes{kept}, and {free:,} are free on the "
                f"disk of {printable(str(self.out))}. Free some space there, or choose an OUT on "
                "another disk."
            )

    # --- staging and continuing ------------------------------------------------------------------

    @contextmanager
    def _staged(
        self, product: str
    ) -> Iterator[tuple[Path, dict[str, Finished], Callable[[str, Finished], None]]]:
        """Yield the staging folder, the finished files, and a function for each new file."""
        with self.output.staged_run(continues=self.options.resume) as staged:
            journal, finished = None, dict[str, Finished]()
            if self.options.resume:
                journal, finished = self._continued(staged, product)

            def on_finished(name: str, each: Finished) -> None:
                staged.synced.add(staged.folder / name)
                if journal is not None and name in self._shards:
                    journal.add(name, each)
                    # A single file that is finished leaves nothing to continue.
                    staged.worth_keeping = len(self._shards) > 1

            try:
                there = sum((staged.folder / name).stat().st_size for name in finished)
                self.require_space(shutil.disk_usage(staged.folder).free, there=there)
                yield staged.folder, finished, on_finished
            except BaseException as error:
                if staged.worth_keeping:
                    mark_resumable(error)
                raise

    @property
    def _shards(self) -> frozenset[str]:
        return frozenset(self.plan.weights.headers)

    def _continued(self, staged: Staged, product: str) -> tuple[Journal, dict[str, Finished]]:
        """Return the finished files of an earlier run whose journal matches this merge."""
        identity = self._identity(product)
        left = finished_files(staged.journal, staged.folder, identity)
        finished = {name: each for name, each in left.items() if name in self._shards}
        staged.keep_only(finished)
        staged.worth_keeping = bool(finished)
        return Journal(staged.journal, staged.folder, identity, finished), finished

    def _identity(self, product: str) -> str:
        """Return the hash of everything that decides the bytes of the output."""
        inputs, base = self.plan.inputs, self.plan.inputs.base
        document = {
            "versions": versions(),
            "product": product,
            **input_records(inputs),
            "adapter_files": [_trace(matched.weights) for matched in inputs.adapters],
            "base_files": {
                name: _trace(base.files[name]) for name in (*base.model.files, *base.texts)
            },
            "outputs": [
                [file.name, file.size, sha256(file.head).hexdigest()] for file in self.plan.files
            ],
        }
        return sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()

    # --- the report ------------------------------------------------------------------------------

    def _reports(self, results: Mapping[str, Finished]) -> tuple[TensorReport, ...]:
        """Return a report for each tensor that an adapter changes, in the order of the files."""
        of_deltas: dict[str, Numbers] = {}
        for each in results.values():
            of_deltas |= each.numbers
        of_replaced: dict[str, Numbers] = {}
        for part in self.plan.replaced:
            if part.numbers is not None:
                of_replaced[part.name] = of_replaced.get(part.name, Numbers()) + part.numbers
        adapters, changes = self.plan.inputs.adapters, self.plan.changes
        replacing, reports = changes.replacing, []
        for tensor in self.plan.weights.tensors:
            name, terms = tensor.name, tensor.terms
            owners = [each for each in adapters if any(term.A is each.pair.A for term in terms)]
            if name in replacing:
                owners = [replacing[name].owner]
            elif name in changes.rows:
                owners += [each.owner for each in changes.rows[name].parts.values()]
            if owners:
                indexes = tuple(n for n, each in enumerate(adapters) if each in owners)
                numbers = (of_deltas if terms else of_replaced).get(name)
                reports.append(
                    TensorReport(name, tensor.dtype, tensor.shape, indexes, tensor.kind, numbers)
                )
        return tuple(reports)


def _trace(file: InputFile) -> list[object]:
    """Return the identity of an input file: the hash in the Hub's cache, or size and time."""
    real = Path(os.path.realpath(file.path))
    if "blobs" in (real.parent.name, real.parent.parent.name) and _BLOB.fullmatch(real.name):
        return [real.name]
    _, _, size, modified, _ = file.identity
    return [size, modified]


@contextmanager
def _enough_memory() -> Iterator[None]:
    """Raise `SurroundingsError` if there is too little memory for buffers or threads."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "start new thread" not in str(error):
            raise
        raise SurroundingsError(
            "there is not enough memory for the buffers or threads of a merge. Run it with fewer "
            "--jobs, or on a machine with more free memory."
        ) from error


def _not_finite(error: NotFiniteError) -> Finding:
    row, column = error.index
    where = f"at [{row}, {column}]" if error.tensor.terms else f"{row:,}"
    reason = f"its value {where} would not be finite."
    return rules.RESULT_NOT_FINITE.in_tensor(error.tensor.name, reason)
