"""Describe two models to run side by side, and the result of the run. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path

from vera_convert.verification.provenance import MergeSettings

INSTEAD = "To compare the weights alone, run verify with --layers-only."
"""The advice if a model cannot be run."""
SAMPLES = 8
"""How many sequences both models are run on by default."""


def missing_packages(*names: str) -> str:
    """Return the missing packages, in words; empty if all are installed."""
    missing = [name for name in names if find_spec(name.replace("-", "_")) is None]
    return " and ".join(filter(None, (", ".join(missing[:-1]), *missing[-1:])))


class Stage(StrEnum):
    """The stages of running the models."""

    START = "start"
    """Load torch and transformers."""
    BUILD = "build"
    """Read a config and weights, and build a model."""
    TEXT = "text"
    """Load a tokenizer, and turn the text into token ids."""
    RUN = "run"
    """Run a model on one sample."""
    MERGE = "merge"
    """Wrap the base with the adapters, or merge the adapters into the base."""


Tell = Callable[[Stage, int, int], None]
"""Called when a stage begins, with the samples run on all models so far, and with the total."""


@dataclass(frozen=True, slots=True)
class ModelJob:
    """A base with adapters, and the merged model or the LoRA to compare.

    Attributes:
        adapters: the folder and the weight of each adapter, in the order of the merge.
        base: the folder of the base.
        found: the folder of the merged model, or of the LoRA.
        weights: the bytes of the larger model's weights, which decide the limits of a run.
        samples: how many samples to run at most.
        lines: the lines of text to run; None for token ids, or images, drawn at random.
        settings: the options of the merge.
        is_lora: whether `found` is a LoRA, which PEFT loads on the base.
        wider: for each merged weight that is rounded to a wider dtype than the base's, the dtype in
            safetensors' names, by the name of the tensor.
        quantizer: the package that runs the quantized base as stored; empty for no such run.
        not_quantized: the reason against a run of the quantized base as stored; else empty.
    """

    adapters: tuple[tuple[Path, float], ...]
    base: Path
    found: Path
    weights: int
    samples: int = SAMPLES
    lines: tuple[str, ...] | None = None
    settings: MergeSettings = field(default_factory=MergeSettings)
    is_lora: bool = False
    wider: Mapping[str, str] = field(default_factory=dict)
    quantizer: str = ""
    not_quantized: str = ""

    @property
    def models(self) -> int:
        """How many models are run."""
        return 7 if self.quantizer else 5


@dataclass(frozen=True, slots=True)
class QuantizedComparison:
    """A merged model compared with the quantized base, which has the adapter in PEFT.

    All differences are root mean squares of differences of logits, or of last hidden states.

    Attributes:
        libraries: the libraries of the run, with versions.
        dtype: the dtype in which the quantized base computes; empty without a run.
        difference: the difference between the merged model and the quantized base.
        threshold: the limit: the effect of computing in `dtype`.
        effect: the difference between the base alone and the base with the adapter.
        not_compared: the reason against a run of the quantized base; else empty.
    """

    libraries: str = ""
    dtype: str = ""
    difference: float = 0.0
    threshold: float = 0.0
    effect: float = 0.0
    not_compared: str = ""

    @property
    def passed(self) -> bool:
        """Whether the difference is within the limit, or was not measured."""
        return bool(self.not_compared) or self.difference <= self.threshold


@dataclass(frozen=True, slots=True)
class ModelComparison:
    """A merged model, or a LoRA in PEFT, compared with the base that is wrapped with the adapters.

    All differences are differences of logits. A model without logits is compared by its last hidden
    states, and has neither `kl` nor `top1`. If the merged model's output is not finite, or the
    model cannot be loaded, the differences are infinite. For a LoRA, "merged" stands for the base
    with the LoRA in PEFT, and "merged again" for the base with the LoRA's factors without PEFT.

    Attributes:
        model_class: the class of both models in transformers.
        dtype: the dtype that the merged weights are rounded to, as torch calls it. The models
            compute in a wider dtype.
        samples: how many sequences, or images, were run.
        tokens: at how many positions the two were compared.
        largest_difference: the largest difference between the two.
        remerged_difference: the largest difference between the merged model and a model that torch
            merged and rounded again. This shows errors that rounding hides from the number above.
        kl: the largest mean Kullback-Leibler divergence of a sample, in nats.
        top1: the share of positions with the same token of the largest logit.
        effect: the largest difference between the base alone and the base with the adapters, which
            is the error of a merge without effect.
        threshold_difference: the limit of `largest_difference`.
        threshold_remerged: the limit of `remerged_difference`.
        threshold_kl: the limit of `kl`.
        threshold_top1: the lower limit of `top1`.
        wrapped: whether `largest_difference` compares with the wrapped base. If a head's delta goes
            to the embedding as well, or if the model does not call its adapted layers, the wrapped
            base computes something else; then the merged model is compared with our own merge
            before rounding.
        conclusive: whether a failure proves the merged model wrong.
        passed: whether the merged model computes the same as the wrapped base.
        reason: why `passed` is false; else empty.
        quantized: the comparison with the quantized base; None if the merge dequantized no base.
    """

    model_class: str
    dtype: str
    samples: int
    tokens: int
    largest_difference: float
    remerged_difference: float
    kl: float | None
    top1: float | None
    effect: float
    threshold_difference: float
    threshold_remerged: float
    threshold_kl: float | None
    threshold_top1: float | None
    wrapped: bool
    conclusive: bool
    passed: bool
    reason: str
    quantized: QuantizedComparison | None = None
