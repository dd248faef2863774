"""What running two whole models beside each other needs, and what it showed. No torch in here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

INSTEAD = "verify --layers-only compares without building a model."
"""The way out if a model cannot be run."""


class Stage(StrEnum):
    """The kinds of work that running the models consists of."""

    START = "start"
    """torch and transformers are loaded."""
    BUILD = "build"
    """A config is read, weights are read, and a model is built."""
    TEXT = "text"
    """A tokenizer is loaded, and a text is made token ids."""
    RUN = "run"
    """A model is run on one sample."""
    MERGE = "merge"
    """The base is wrapped with the adapters, or the adapters are merged into the base."""


Tell = Callable[[Stage, int, int], None]
"""Is told that a stage begins, how many runs of a sample are done, and of how many."""


@dataclass(frozen=True, slots=True)
class ModelJob:
    """Two models to run beside each other, and how the merged one was made.

    Attributes:
        adapters: the folder and the weight of each, in the order in which they were merged.
        base: the folder of the base.
        merged: the folder of the merged model.
        samples: how many to run, at the most.
        text: UTF-8, of which the first lines are run; None for token ids, or images, that are
            drawn.
        dtype: what all float tensors became in the merge, as torch calls it; None if each kept its
            own.
        tied: what became of an output head that is the embedding.
        projections: which A and B are meant.
        generator: how A and B were drawn, if no fingerprint says it.
        key_map: pairs (OLD, NEW) that rename leading paths of the adapters' modules.
        base_dtype: the dtype that drawn A and B are rounded to; None for that of the base.
        wider: the dtypes, in safetensors' names, of merged weights that are not rounded to the
            base's, by tensor.
    """

    adapters: tuple[tuple[Path, float], ...]
    base: Path
    merged: Path
    samples: int
    text: Path | None = None
    dtype: str | None = None
    tied: str | None = None
    projections: str = "auto"
    generator: str | None = None
    key_map: tuple[tuple[str, str], ...] = ()
    base_dtype: str | None = None
    wider: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelComparison:
    """The merged model beside its base that is wrapped with the adapters.

    All differences are of logits; a model that gives none is compared by its last hidden states,
    and has no `kl` and no `top1`. What the merged model gives is infinitely far off where it is not
    finite or the model cannot be loaded.

    Attributes:
        model_class: the class of transformers that both are loaded as.
        dtype: what the merged weights are rounded to, as torch calls it; all is computed wider.
        samples: how many sequences, or images, were run.
        tokens: at how many positions the two were compared.
        largest_difference: the largest difference between the two.
        remerged_difference: the largest difference between the merged model and one that torch
            merged and rounded anew, which sees what rounding hides from the one above.
        kl: the largest mean Kullback-Leibler divergence of a sample, in nats.
        top1: the share of positions at which both hold the same token the likeliest.
        effect: the largest difference between the base alone and the base with the adapters: what a
            merge without effect would be off by.
        threshold_difference: what `largest_difference` may be.
        threshold_remerged: what `remerged_difference` may be.
        threshold_kl: what `kl` may be.
        threshold_top1: what `top1` must be at least.
        wrapped: whether the first comparison is with the wrapped model. It is not, but
            with the model merged here before it was rounded, where a head's delta goes to the
            embedding as well, which no branch does, or the model does not call its layers.
        conclusive: whether a failure means that the model is wrong; else nothing can be said.
        passed: whether the merged model does as the wrapped one.
        reason: why it does not; empty if it does.
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
