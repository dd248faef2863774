"""Two whole models run beside each other: a base wrapped with its adapters, and the merged one.

    base ──► asked ──► wrapped ──► asked ──► merged here, rounded ──► asked ─┐
                                                                            ├──► ModelComparison
    merged model, after the base is gone ──► asked ─────────────────────────┘

All are asked in float32, or in float64 where weights are: what a 16-bit model loses in its own
arithmetic would hide more than what can go wrong in a merge. A correct merge into 16 bits is still
off by the rounding of the weights. Therefore there are two comparisons. One is with the wrapped
model, whose arithmetic is not that of any merge; its bounds are those of rounding. The other is
with a merge done here and rounded alike, to which nothing is left but the order of sums: any layer
left out of the thirty of a trained MiniLM is beyond its bounds many times over. Of deltas that were
rounded before they were added it sees what they do to a model of real size; in a tiny one nothing,
if they are less than some hundredths of the weights: one weight rounded otherwise does as much. The
comparison of layers sees all of them.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from vera_convert.adapter.opening import open_adapter
from vera_convert.base.onbase import ROUNDING_OF_DTYPE
from vera_convert.base.quantised import FLOATS
from vera_convert.conversion.projections import Meant
from vera_convert.draws.generator import Rounding, Variant
from vera_convert.hub.lookup import HubAccess
from vera_convert.merging.output import TORCH_DTYPES
from vera_convert.merging.parts import Tied
from vera_convert.verification.comparison import ModelComparison
from vera_convert.with_torch.layer import VeraLinear
from vera_convert.with_torch.loading import Blueprint, UnfitError, blueprint, built, guarded
from vera_convert.with_torch.model import VeraModel
from vera_convert.with_torch.parts import modules_of
from vera_convert.with_torch.sampling import Answers, Sample, answers, drawn_samples, text_samples


@dataclass(frozen=True, slots=True)
class Bounds:
    """How far a correct merge can be from the wrapped model, by the rounding of its weights.

    Attributes:
        difference: the largest difference, as a part of the largest value.
        kl: nats.
        top1: the share of positions at which the likeliest agree.
    """

    difference: float
    kl: float
    top1: float


BOUNDS: Mapping[torch.dtype, Bounds] = {
    torch.float64: Bounds(1e-10, 1e-12, 0.99),
    torch.float32: Bounds(1e-4, 1e-6, 0.99),
    torch.float16: Bounds(5e-2, 2e-3, 0.9),
    torch.bfloat16: Bounds(3e-1, 1e-1, 0.8),
}
"""By the dtype of the merged weights.

Random Llama, GPT-2, BERT, ViT models and a trained MiniLM come to 5e-7, 7e-4 and 5e-3 of the
largest value in float32, float16 and bfloat16; a random T5 with weights four times as large as
usual, which amplifies all noise, to 2e-5, 1.5e-2 and 1.4e-1. The bounds are at least twice that.
"""
_NOISE = 8
"""How much more than branches and merged weights differ, unrounded, two merges can."""
_UNITS = 16
"""As much again, in units of the last place of the largest value, where they hardly differ."""
_STRAYS = 8
"""Weights that two correct merges can round to different sides in any model, however small."""


@dataclass(frozen=True, slots=True)
class _How:
    """How the adapters were merged.

    Attributes:
        adapters: each one's folder and weight.
        dtype: what all float tensors became; None if each kept its own.
        tied: what became of a head that is the embedding.
        projections: which A and B are meant.
        variant: how they were drawn, where no fingerprint says it.
        key_map: pairs (OLD, NEW) that rename leading paths of their modules.
        rounding: of drawn A and B; None for what the base's dtype does to them.
        wider: the dtypes, in safetensors' names, of merged weights that are not rounded to the
            base's, by tensor.
    """

    adapters: Sequence[tuple[Path, float]]
    dtype: torch.dtype | None
    tied: Tied | None
    projections: Meant
    variant: Variant | None
    key_map: Sequence[tuple[str, str]]
    rounding: Rounding | None
    wider: Mapping[str, str]


@dataclass(frozen=True, slots=True, eq=False)
class _Ours:
    """What the base gave, and what the merged model is held against.

    Attributes:
        samples: what was asked.
        base: what the base alone gave.
        wrapped: what it gave with the adapters.
        unrounded: what it gave when they were merged here.
        remerged: what it gave when the merged weights were rounded, too.
        rounding: the coarsest dtype that an adapted weight was rounded to.
        wide: what all of it was computed in.
        weights: how many adapted weights there are.
        branches: how far the branches can differ from the merged weights, unrounded.
        is_called: whether the model calls its adapted layers.
        wrapped_is_merged: whether `wrapped` is what the model merged here gave.
    """

    samples: Sequence[Sample]
    base: Answers
    wrapped: Answers
    unrounded: Answers
    remerged: Answers
    rounding: torch.dtype
    wide: torch.dtype
    weights: int
    branches: float
    is_called: bool
    wrapped_is_merged: bool


def compare_models(
    adapters: Sequence[tuple[Path, float]],
    base_folder: Path,
    merged_folder: Path,
    *,
    samples: int,
    text: Path | None,
    dtype: str | None,
    tied: str | None,
    projections: str,
    generator: str | None,
    key_map: Sequence[tuple[str, str]],
    base_dtype: str | None = None,
    wider: Mapping[str, str] = MappingProxyType({}),
) -> ModelComparison:
    """Run the base with its adapters, and the merged model, and compare what they give.

    One model is in memory at a time, with 4 bytes for each of its parameters.

    Args:
        adapters: the folder and the weight of each, in the order in which they were merged.
        base_folder: the base's.
        merged_folder: the merged model's.
        samples: how many to run, at the most.
        text: UTF-8, of which the first lines are run; None for token ids, or images, that are
            drawn.
        dtype: what all float tensors became in the merge; None if each kept its own.
        tied: what became of an output head that is the embedding.
        projections: which A and B are meant.
        generator: how they were drawn, where no fingerprint says it.
        key_map: pairs (OLD, NEW) that rename leading paths of the adapters' modules.
        base_dtype: the dtype that drawn A and B are rounded to; None for that of the base.
        wider: the dtypes, in safetensors' names, of merged weights that are not rounded to the
            base's, by tensor.

    Raises:
        CheckpointError: an adapter or the base is malformed, or they do not belong together.
        UsageError: a text that cannot be used, or adapters that cannot be active together.
        SurroundingsError: transformers cannot build or run a model; a file cannot be read.
    """
    how = _How(
        adapters,
        getattr(torch, dtype) if dtype is not None else None,
        Tied(tied) if tied is not None else None,
        Meant(projections),
        Variant(generator) if generator is not None else None,
        key_map,
        ROUNDING_OF_DTYPE[base_dtype] if base_dtype is not None else None,
        wider,
    )
    with ExitStack() as stack:
        opened = [stack.enter_context(open_adapter(folder)) for folder, _ in adapters]
        base = blueprint(base_folder, label=str(base_folder), adapters=opened)
        labels = getattr(base.config, "num_labels", None)
    ours = _asked(base, how, samples, text)
    gc.collect()  # the next model is built when this one is gone, whatever refers to itself in it
    try:
        merged = blueprint(merged_folder, label=str(merged_folder), like=base.name)
        if labels is not None and labels != merged.config.num_labels:
            merged.config.num_labels = labels  # which a head that came with an adapter has
        theirs = answers(built(merged).to(ours.wide), ours.samples)
    except UnfitError as error:
        return _judged(base.name, ours, None, f"{error}")
    return _judged(base.name, ours, theirs)


# --- the base and what becomes of it -------------------------------------------------------------


def _asked(plan: Blueprint, how: _How, count: int, text: Path | None) -> _Ours:
    """Ask the base, the base with its adapters, and the base into which they are merged."""
    model = built(plan)
    with guarded(f"make samples for {plan.name}"):
        samples = _samples(plan, model, count, text)
    dtypes = {parameter.dtype for parameter in model.parameters()}
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    with _widened(model, wide):
        base = answers(model, samples)
    vera = _wrapped(model, how)
    named = {name: part for name, part in modules_of(vera.model) if isinstance(part, VeraLinear)}
    layers = [*named.values()]
    rounding = [
        how.dtype or _of_tensor(name, how.wider) or _stored(plan) or layer.weight.dtype
        for name, layer in named.items()
    ]
    vera.to(wide)
    wrapped = answers(vera, samples)
    vera.merge(check=False, tied=how.tied)
    unrounded = answers(vera, samples)
    branches = _difference(wrapped, unrounded)
    largest = BOUNDS[wide].difference * (unrounded.largest if unrounded.are_finite else 0.0)
    does_less = branches > largest and wrapped.are_finite and unrounded.are_finite
    if does_less:
        wrapped = unrounded
    weights = [layer.weight for layer in layers]
    merged = vera.unload()
    _round(zip(weights, rounding, strict=True))
    if how.dtype is not None:
        _round((tensor, how.dtype) for tensor in merged.state_dict(keep_vars=True).values())
    remerged = answers(merged, samples)
    coarsest = max([wide, *rounding], key=_eps)
    return _Ours(
        samples,
        base,
        wrapped,
        unrounded,
        remerged,
        coarsest,
        wide,
        weights=sum(weight.numel() for weight in weights),
        branches=min(branches, largest),
        # With a delta that the embedding shares a branch at the head always does less.
        is_called=not does_less or how.tied is Tied.ADD,
        wrapped_is_merged=does_less,
    )


def _samples(plan: Blueprint, model: nn.Module, count: int, text: Path | None) -> list[Sample]:
    if text is None:
        return drawn_samples(model, count)
    return text_samples(model, plan.base.location.fetched, text, count)


def _eps(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).eps)


@contextmanager
def _widened(model: nn.Module, wide: torch.dtype) -> Iterator[None]:
    """Let a model compute in a wider dtype inside the block; afterwards it is as it was."""
    before = {name: tensor.dtype for name, tensor in _named(model)}
    model.to(wide)
    try:
        yield
    finally:
        for name, tensor in _named(model):
            tensor.data = tensor.data.to(before[name])


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _wrapped(model: nn.Module, how: _How) -> VeraModel:
    """Wrap a model with the adapters, all of them active."""
    vera = VeraModel(model)
    names = [f"adapter_{place}" for place in range(len(how.adapters))]
    for name, (folder, weight) in zip(names, how.adapters, strict=True):
        vera.load_adapter(
            folder,
            adapter=name,
            projections=how.projections,
            variant=how.variant,
            rounding=how.rounding,
            key_map=how.key_map,
            access=HubAccess(offline=True),
        )
        for _, module in modules_of(vera.model):
            if isinstance(module, VeraLinear) and name in module.vera_lambda_b:
                module.vera_lambda_b[name].data.mul_(weight)
    vera.set_adapter(*names, trainable=False)
    vera.eval()
    return vera


def _stored(plan: Blueprint) -> torch.dtype | None:
    """Return the dtype of a file's matrices; None if there are several.

    In memory some layers are kept wider than they are stored and merged.
    """
    infos = [tensor.info for tensor in plan.base.tensors.values()]
    found = {info.dtype for info in infos if len(info.shape) == 2 and info.dtype in FLOATS}
    dtype: torch.dtype | None = (
        getattr(torch, TORCH_DTYPES[found.pop()]) if len(found) == 1 else None
    )
    return dtype


def _of_tensor(module: str, dtypes: Mapping[str, str]) -> torch.dtype | None:
    """Return the dtype of a module's weight; files name it with a path more or less."""
    weight = f".{module}.weight"
    for name, dtype in dtypes.items():
        if f".{name}".endswith(weight) or weight.endswith(f".{name}"):
            found: torch.dtype = getattr(torch, TORCH_DTYPES[dtype])
            return found
    return None


def _round(tensors: Iterable[tuple[Tensor, torch.dtype]]) -> None:
    """Round tensors to a dtype, and keep them in theirs."""
    for tensor, dtype in tensors:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype).to(tensor.dtype)


# --- judgement -----------------------------------------------------------------------------------


def _judged(name: str, ours: _Ours, theirs: Answers | None, why: str = "") -> ModelComparison:
    """Hold what the merged model gave against what it should give.

    Args:
        name: the class of both models.
        ours: what it should give.
        theirs: what it gave; None if it could not be asked.
        why: it could not.
    """
    wrapped, bounds = ours.wrapped, BOUNDS[ours.rounding]
    scale, chosen = wrapped.largest if wrapped.are_finite else 0.0, wrapped.are_logits
    found = ModelComparison(
        model_class=name,
        dtype=str(ours.rounding).removeprefix("torch."),
        samples=len(ours.samples),
        tokens=wrapped.positions,
        largest_difference=_difference(wrapped, theirs),
        remerged_difference=_difference(ours.remerged, theirs),
        kl=_divergence(wrapped, theirs) if chosen else None,
        top1=_agreement(wrapped, theirs) if chosen else None,
        effect=_difference(wrapped, ours.base),
        threshold_difference=bounds.difference * scale,
        threshold_remerged=_of_two_merges(ours, scale),
        threshold_kl=bounds.kl if chosen else None,
        # Of eight positions a single one would be too much.
        threshold_top1=min(bounds.top1, 1 - 1 / wrapped.positions) if chosen else None,
        wrapped=not ours.wrapped_is_merged,
        conclusive=True,
        passed=False,
        reason="",
    )
    wrong = why or next(_reasons(found, is_finite=wrapped.are_finite), "")
    nothing = "" if wrong else next(_inconclusive(found, ours), "")
    reason = wrong or nothing
    return replace(found, conclusive=not nothing, passed=not reason, reason=reason)


def _of_two_merges(ours: _Ours, scale: float) -> float:
    """Return how far two correct merges can be from each other.

    Their sums differ in the last bits. Of the weights a share then falls to another side when it
    is rounded, and moves by a whole unit, where rounding moved all of them by 0.29 in the mean.
    """
    share = _eps(ours.wide) / _eps(ours.rounding) + _STRAYS / ours.weights
    bound = (
        _UNITS * _eps(ours.wide) * scale
        + _NOISE * ours.branches
        + min(1.0, 4 * share**0.5) * _difference(ours.unrounded, ours.remerged)
    )
    return bound if math.isfinite(bound) else 0.0


def _inconclusive(found: ModelComparison, ours: _Ours) -> Iterator[str]:
    """Yield why nothing can be said of a merged model that is not known to be wrong."""
    if not ours.is_called:
        yield (
            "This model does not call its adapted layers but reads their weights, so the adapter "
            "does less to it than the merge does, and it cannot be held against the base with the "
            "adapter; it does what a merge that is done anew does."
        )
    if _difference(ours.remerged, ours.base) <= found.threshold_remerged:
        yield (
            f"The adapters change what the base gives by no more than {found.effect:.1e} for these "
            "samples, so that a merge without effect would pass as well."
        )


def _reasons(found: ModelComparison, *, is_finite: bool) -> Iterator[str]:
    """Yield why the two do not do the same, what says most first."""
    if not is_finite:
        yield "The base with its adapters gives values that are not finite: nothing can be said."
    if math.isinf(found.largest_difference):
        yield "The merged model gives values that are not finite, or of another shape."
    if found.remerged_difference > found.threshold_remerged:
        yield (
            "The merged model is not what this base and these adapters make when they are merged "
            f"again: it is off by {found.remerged_difference:.1e}, where sums in another order "
            f"explain {found.threshold_remerged:.1e}; the adapters make {found.effect:.1e}."
        )
    if found.largest_difference > found.threshold_difference:
        yield (
            f"The merged model is off by {found.largest_difference:.1e} from the base with its "
            f"adapters, where rounding to {found.dtype} explains {found.threshold_difference:.1e}."
        )
    if found.kl is not None and found.threshold_kl is not None and found.kl > found.threshold_kl:
        yield (
            f"The merged model's distributions diverge by {found.kl:.1e} nats from those of the "
            f"base with its adapters, where rounding to {found.dtype} explains "
            f"{found.threshold_kl:.1e}."
        )
    if (
        found.top1 is not None
        and found.threshold_top1 is not None
        and found.top1 < found.threshold_top1
    ):
        yield (
            f"The merged model finds the same likeliest at {found.top1:.1%} of the positions, "
            f"where {found.threshold_top1:.1%} are due with {found.dtype}."
        )


def _pairs(one: Answers, other: Answers | None) -> list[tuple[Tensor, Tensor]] | None:
    """Return what is to be compared of each sample; None if nothing can be."""
    if other is None or not (one.are_finite and other.are_finite):
        return None
    pairs = [*zip(one.values, other.values, strict=True)]
    return pairs if all(ours.shape == theirs.shape for ours, theirs in pairs) else None


def _difference(one: Answers, other: Answers | None) -> float:
    """Return the largest difference of two values; infinite where nothing can be compared."""
    pairs = _pairs(one, other)
    if pairs is None:
        return math.inf
    return max(float((ours - theirs).abs().max()) for ours, theirs in pairs)


def _divergence(one: Answers, other: Answers | None) -> float:
    """Return the largest mean divergence of a sample, from the first to the second, in nats."""
    pairs = _pairs(one, other)
    if pairs is None:
        return math.inf
    return max(_kl(ours, theirs) for ours, theirs in pairs)


def _kl(one: Tensor, other: Tensor) -> float:
    ours, theirs = (values.double().log_softmax(-1) for values in (one, other))
    return max(0.0, float((ours.exp() * (ours - theirs)).sum(-1).mean()))


def _agreement(one: Answers, other: Answers | None) -> float:
    """Return the share of positions at which the largest value is the same one."""
    pairs = _pairs(one, other)
    if pairs is None:
        return 0.0
    same = sum(int((ours.argmax(-1) == theirs.argmax(-1)).sum()) for ours, theirs in pairs)
    return same / one.positions
