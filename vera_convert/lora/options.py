"""The options of a conversion to LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vera_convert.arguments import (
    dtype_name,
    number,
    one_of,
    optional,
    require_flags,
    set_checked,
    whole_number,
)
from vera_convert.base.facts import BaseOptions
from vera_convert.conversion.projections import ProjectionSource
from vera_convert.draws.generator import Variant
from vera_convert.errors import ConflictError, ParameterError
from vera_convert.lora.engines import Engine, EngineName, engines

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""The dtypes in which a LoRA can be stored, with safetensors' names."""


@dataclass(frozen=True, slots=True)
class LoraOptions:
    """The options of a conversion to LoRA.

    Attributes:
        engine: the engine of the LoRA.
        dtype: the dtype of the factors: ``float32``, ``bfloat16`` or ``float16``.
        rank: the rank of the LoRA; None for the exact LoRA.
        max_error: the largest relative error of a layer's delta; the smallest rank that keeps to
            this error in every layer is taken.
        accept_error: write a LoRA even if the relative error of a layer is above 0.5.
        fill_layers: write a LoRA of zeros for the layers that the engine wants and the adapter
            does not have.
        drop_head: leave out modules_to_save and trained biases.
        projections: the source of A and B: ``auto``, ``file`` or ``key``.
        generator: how A and B are drawn if no fingerprint says so.
        check: read the written weights back and compare every byte.
        dry_run: plan and measure, and write nothing.
        force: replace a LoRA of this command.

    Example:
        >>> LoraOptions(engine="vllm", rank=64).rank
        64
    """

    engine: EngineName = EngineName.PEFT
    dtype: str = "float32"
    rank: int | None = None
    max_error: float | None = None
    accept_error: bool = False
    fill_layers: bool = False
    drop_head: bool = False
    projections: ProjectionSource = ProjectionSource.AUTO
    generator: Variant | None = None
    check: bool = False
    dry_run: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        flags = ("accept_error", "fill_layers", "drop_head", "check", "dry_run", "force")
        require_flags(**{name: getattr(self, name) for name in flags})
        set_checked(
            self,
            engine=one_of("engine", EngineName, self.engine),
            dtype=_stored_dtype(self.dtype),
            rank=optional(whole_number, "rank", self.rank),
            max_error=optional(_share, "max_error", self.max_error),
            projections=one_of("projections", ProjectionSource, self.projections),
            generator=optional(one_of, "generator", Variant, self.generator),
        )
        if self.rank is not None and self.max_error is not None:
            sentence = "{} and {} exclude each other: give one of them."
            raise ConflictError(sentence, "rank", "max_error")

    @property
    def target(self) -> Engine:
        """The engine of the LoRA."""
        return engines()[self.engine]

    @property
    def stored(self) -> str:
        """The dtype of the factors, as safetensors names it."""
        return DTYPES[self.dtype]

    def record(self, base: BaseOptions) -> Mapping[str, object]:
        """Return the options behind the bytes of the output, as a JSON object."""
        return {
            "for": self.engine,
            "dtype": self.dtype,
            "rank": self.rank,
            "max_error": self.max_error,
            "fill_layers": self.fill_layers,
            "drop_head": self.drop_head,
            "projections": self.projections,
            "generator": self.generator,
            "base_dtype": base.dtype,
            "key_map": [f"{old}={new}" for old, new in base.key_map],
        }


def _stored_dtype(value: object) -> str:
    found = dtype_name("dtype", value)
    if found not in DTYPES:
        raise ParameterError("dtype", f"is {found}: a LoRA can be stored in {', '.join(DTYPES)}.")
    return found


def _share(name: str, value: object) -> float:
    share = number(name, value)
    if not 0 <= share < 1:
        raise ParameterError(name, f"is {share:g}: give a share of the delta, from 0 to below 1.")
    return share
