"""Run a planned merge: stage the files, read the files back, publish in one rename."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from vera_convert.assembly.addends import NotFiniteError, Numbers
from vera_convert.assembly.input_files import InputFile
from vera_convert.assembly.journal import Journal, finished_files
from vera_convert.assembly.pool import default_jobs
from vera_convert.assembly.writer import Assembler, Finished, NewFile
from vera_convert.base.facts import BaseOptions
from vera_convert.base.side_files import PROVENANCE_NAME
from vera_convert.errors import CheckpointError, SurroundingsError, mark_resumable
from vera_convert.merging.changes import Changes
from vera_convert.merging.inputs import MergeInputs
from vera_convert.merging.model_config import ConfigEdits
from vera_convert.merging.options import MergeOptions
from vera_convert.merging.output import check_staged, files_beside
from vera_convert.merging.plan import WeightsPlan
from vera_convert.merging.provenance import (
    adapter_record,
    base_record,
    provenance_text,
    recorded_files,
    versions,
)
from vera_convert.merging.replaced import ReplacedTensor
from vera_convert.merging.report import TensorReport
from vera_convert.publish.publishing import Staged, files_but, staged_run
from vera_convert.rules import RESULT_NOT_FINITE, Finding
from vera_convert.text import printable

_BLOB = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")


def is_merged(folder: Path) -> bool:
    """Say whether a folder is a merged model, which ``--force`` may replace."""
    return (folder / PROVENANCE_NAME).is_file()


@dataclass(frozen=True, slots=True, eq=False)
class MergeJob:
    """A planned merge.

    Attributes:
        inputs: the adapters and the base.
        changes: the changes to the base.
        weights: the plan of the weight files.
        edits: the members of the base's config that change.
        replaced: the tensors that come from an adapter.
        files: all files except the provenance.
        out: the folder to write.
        base: the caller's options for the base.
        options: the options of the merge.
        free: free bytes on the disk of `out`, with the leftovers of killed runs.
    """

    inputs: MergeInputs
    changes: Changes
    weights: WeightsPlan
    edits: ConfigEdits
    replaced: tuple[ReplacedTensor, ...]
    files: tuple[NewFile, ...]
    out: Path
    base: BaseOptions
    options: MergeOptions
    free: int

    @property
    def jobs(self) -> int:
        """The number of threads."""
        return self.options.jobs or default_jobs()

    @property
    def needed(self) -> int:
        """The size of the output, in bytes."""
        return sum(file.size for file in self.files)

    def strangers(self, folder: Path) -> list[str]:
        """Return the files in an earlier output that neither merge wrote or writes."""
        written = {PROVENANCE_NAME, *(file.name for file in self.files)}
        return files_but(folder, written | recorded_files(folder))

    def run(
        self, progress: Callable[[int, int], None]
    ) -> tuple[tuple[TensorReport, ...], dict[str, str], int]:
        """Run the merge; return tensor reports, hashes, and the number of resumed shards.

        The hashes are the SHA-256 of the files, if the options ask for checksums. A shard is
        resumed if an earlier run finished the shard.

        Raises:
            CheckpointError: a result is not finite.
            UsageError: `out` exists and may not be replaced, or `out` overlaps an input.
            SurroundingsError: the disk fails, memory or space is short, or an input changed.
        """
        needed = self.needed
        with (
            _enough_memory(),
            Assembler(
                self.files, jobs=self.jobs, check=self.options.check, device=self.options.device
            ) as assembler,
        ):
            product = self.options.device.product()
            with self._staged(product) as (folder, finished, on_finished):
                try:
                    results = finished | assembler.assemble(
                        folder,
                        finished=finished,
                        hashes=self.options.checksums or self.options.resume,
                        progress=lambda done: progress(done, needed),
                        on_finished=on_finished,
                    )
                except NotFiniteError as error:
                    raise CheckpointError(_not_finite(error)) from error
                reports = self._reports(results)
                wanted = results.items() if self.options.checksums else ()
                hashes = {name: each.sha256 for name, each in wanted if each.sha256}
                provenance = self._provenance(reports, hashes, product)
                (folder / PROVENANCE_NAME).write_bytes(provenance)
                check_staged(folder, {file.name: file for file in self.files}, self.weights)
                self.inputs.check_unchanged()
        return reports, hashes, len(finished)

    def require_space(self, free: int, *, there: int = 0) -> None:
        """Raise `SurroundingsError` if the output needs more space than is free.

        Args:
            free: free bytes on the disk.
            there: bytes of the output that an earlier run already wrote.
        """
        if self.needed - there > free:
            kept = f", {there:,} of which are there already" if there else ""
            raise SurroundingsError(
                f"the merged model takes {self.needed:,} bytes{kept}, and {free:,} are free on the "
                f"disk of {printable(str(self.out))}. Free some space there, or choose an OUT on "
                "another disk."
            )

    # --- staging and continuing ------------------------------------------------------------------

    @contextmanager
    def _staged(
        self, product: str
    ) -> Iterator[tuple[Path, dict[str, Finished], Callable[[str, Finished], None]]]:
        """Yield the staging folder, the finished files, and a function for each new file."""
        with staged_run(
            self.out,
            continues=self.options.resume,
            force=self.options.force,
            inputs=self.inputs.folders,
            is_own=is_merged,
            strangers=self.strangers,
        ) as staged:
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
        return frozenset(file.name for file in self.weights.files)

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
        inputs = self.inputs
        files = {**inputs.files, **inputs.read_whole}
        document = {
            "versions": versions(),
            "product": product,
            "options": self.options.record(self.base),
            "adapters": [
                adapter_record(matched) | {"file": _trace(matched.weights)}
                for matched in inputs.adapters
            ],
            "base": base_record(inputs.base, inputs.files, inputs.texts),
            "files": {name: _trace(file) for name, file in sorted(files.items())},
            "outputs": [
                [file.name, file.size, sha256(file.head).hexdigest()] for file in self.files
            ],
        }
        return sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()

    # --- the report ------------------------------------------------------------------------------

    def _reports(self, results: Mapping[str, Finished]) -> tuple[TensorReport, ...]:
        """Return a report for each tensor that an adapter changes, in the order of the files."""
        numbers: dict[str, Numbers] = {}
        for each in results.values():
            numbers |= each.numbers
        adapters, changes = self.inputs.adapters, self.changes
        numbers |= {each.name: each.numbers for each in self.replaced if each.numbers is not None}
        reports = []
        for tensor in self.weights.tensors:
            terms = changes.terms.get(tensor.name, ())
            owners = [each for each in adapters if any(term.A is each.pair.A for term in terms)]
            kind = "added"
            replacement = changes.replaced.get(tensor.name) or changes.new.get(tensor.name)
            if replacement is not None:
                owners = [replacement.owner]
                kind = "replaced" if tensor.name in changes.replaced else "new"
            if owners:
                indexes = tuple(n for n, each in enumerate(adapters) if each in owners)
                found = numbers.get(tensor.name)
                reports.append(
                    TensorReport(tensor.name, tensor.dtype, tensor.shape, indexes, kind, found)
                )
        return tuple(reports)

    def _provenance(
        self, reports: Sequence[TensorReport], hashes: Mapping[str, str], product: str
    ) -> bytes:
        inputs, beside = self.inputs, files_beside(self.inputs)
        return provenance_text(
            adapters=[*map(adapter_record, inputs.adapters)],
            base=base_record(inputs.base, inputs.files, inputs.texts),
            options=self.options.record(self.base),
            product=product,
            tensors=reports,
            outputs=[
                {"name": file.name, "size": file.size}
                | ({"sha256": hashes[file.name]} if file.name in hashes else {})
                for file in self.files
            ],
            copied=[name for name, file in inputs.copied.items() if beside.get(name) is file],
            from_adapter=sorted({*inputs.beside.tokenizer, *inputs.beside.copied}),
        )


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
    return RESULT_NOT_FINITE.in_tensor(error.tensor.name, reason)
