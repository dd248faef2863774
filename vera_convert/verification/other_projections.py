"""Find out whether wrong tensors are right with the recorded options, or with other A and B."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from vera_convert.base.model import BaseModel
from vera_convert.conversion.projections import ProjectionSource
from vera_convert.dtypes import USUAL_OF_BASES
from vera_convert.errors import VeraConvertError
from vera_convert.verification.merge_inputs import GivenInputs, weight_files
from vera_convert.verification.provenance import MergeSettings
from vera_convert.verification.tensors import check_tensors

_SENTENCES = {
    ProjectionSource.KEY: (
        "It is right with A and B drawn from the key, as PEFT 0.11 to 0.20 merges: verify with "
        "--projections key"
    ),
    ProjectionSource.FILE: (
        "It is right with the stored A and B, as PEFT 0.21 merges if save_projection is true: "
        "verify with --projections file"
    ),
}


@dataclass(frozen=True, slots=True, eq=False)
class OtherProjections:
    """Compare wrong tensors with those of the recorded merge, and of other versions of PEFT.

    Attributes:
        given: the inputs of the merge.
        settings: the options of the merge.
        model: the merged model.
    """

    given: GivenInputs
    settings: MergeSettings
    model: BaseModel

    def explain(self, names: Sequence[str]) -> dict[str, str]:
        """Return the cause for each wrong tensor that is right with other options.

        Args:
            names: the wrong tensors, the worst first.
        """
        for projections, dtype in self._others():
            settings = replace(self.settings, projections=projections, base_dtype=dtype)
            # The two worst tensors rule out most of the others.
            if self.right(settings, names[:2]):
                sentence = _SENTENCES[projections]
                if dtype != self.settings.base_dtype:
                    sentence += f" --base-dtype {dtype}"
                return dict.fromkeys(self.right(settings, names), f"{sentence}.")
        return self._as_recorded(names)

    def _as_recorded(self, names: Sequence[str]) -> dict[str, str]:
        """Return the cause for each wrong tensor that is right with the options of the record."""
        provenance = self.given.provenance
        if provenance is None or not self.settings.given:
            return {}
        adapters = [replace(each, weight=None) for each in self.given.adapters]
        merge = replace(self, given=replace(self.given, adapters=adapters))
        options = sorted(f"--{name.replace('_', '-')}" for name in self.settings.given)
        sentence = (
            "It is right with the options that merge-provenance.json records, and wrong with the "
            f"given {' and '.join(options)}."
        )
        return dict.fromkeys(merge.right(provenance.settings, names), sentence)

    def _others(self) -> Iterator[tuple[ProjectionSource, str | None]]:
        own = self.settings.base_dtype
        for projections in (ProjectionSource.KEY, ProjectionSource.FILE):
            if projections is not self.settings.projections:
                yield projections, own
        for dtype in USUAL_OF_BASES:
            if dtype != own:
                yield ProjectionSource.KEY, dtype

    def right(self, settings: MergeSettings, names: Sequence[str]) -> list[str]:
        """Return the tensors that are right with these settings, if the first two are.

        Args:
            settings: the options of the merge.
            names: the tensors, the worst first.
        """
        try:
            with self.given.opened(settings) as merged:
                found = check_tensors(
                    {name: merged.expected[name] for name in names if name in merged.expected},
                    self.model,
                    weight_files(self.model),
                    wider_too=settings.dtype is None and not settings.recorded,
                    explain=lambda wrong: dict.fromkeys(wrong, "not with these"),
                )
        except VeraConvertError:  # the adapter has no such A and B
            return []
        right = {check.name for check in found.checks if check.passed}
        return [name for name in names if name in right] if right.issuperset(names[:2]) else []
