"""Two whole models run beside each other: a base wrapped with its adapters, and the merged one.

    base ──► asked ──► wrapped ──► asked ──► merged here, rounded ──► asked ─┐
                                                                            ├──► ModelComparison
    merged model, after the base is gone ──► asked ─────────────────────────┘

All are asked in float32, or in float64 where weights are: what a 16-bit model loses in its own
arithmetic would hide more than what can go wrong in a merge. A correct merge into 16 bits is still
off by the rounding of the weights. Therefore there are two comparisons. One is with the wrapped
model, whose arithmetic is not that of any merge. A merge done here and rounded alike measures what
rounding does to this very model and these samples, and that is the bound. The other comparison is
with that merge itself, to which nothing is left but the order of sums: any layer
left out of the thirty of a trained MiniLM is beyond its bounds many times over. Of deltas that were
rounded before they were added it sees what they do to a model of real size; in a tiny one nothing,
if they are less than some hundredths of the weights: one weight rounded otherwise does as much. The
comparison of layers sees all of them.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from vera_convert.adapter.opening import open_adapter
from vera_convert.conversion.projections import ProjectionSource
from vera_convert.draws.generator import Rounding, Variant, rounding_on_base
from vera_convert.dtypes import FLOATS, NAMES
from vera_convert.hub.lookup import HubAccess
from vera_convert.merging.changes import Tied
from vera_convert.verification.model_comparison import ModelComparison, ModelJob, Stage, Tell
from vera_convert.with_torch.build import Blueprint, UnfitError, blueprint, built, guarded
from vera_convert.with_torch.layer import VeraLinear
from vera_convert.with_torch.model import VeraModel
from vera_convert.with_torch.modules import modules_of
from vera_convert.with_torch.samples import Answers, Sample, answers, drawn_samples, text_samples

_NOISE_OF_ORDER: Mapping[torch.dtype, float] = {torch.float64: 1e-10, torch.float32: 1e-4}
"""How far sums in another order can bring a model off, as a part of its largest value.

Random Llama, GPT-2, BERT, ViT models and a trained MiniLM come to 5e-7 in float32; a random T5 with
weights four times as large as usual, which amplifies all noise, to 2e-5.
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
    projections: ProjectionSource
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


def compare_models(job: ModelJob, tell: Tell = lambda _stage, _done, _of: None) -> ModelComparison:
    """Run the base with its adapters, and the merged model, and compare what they give.

    One model is in memory at a time, with 4 bytes for each of its parameters.

    Args:
        job: the models and how they were merged.
        tell: told at the beginning of each stage.

    Raises:
        CheckpointError: an adapter or the base is malformed, or they do not belong together.
        UsageError: a text that cannot be used, or adapters that cannot be active together.
        SurroundingsError: transformers cannot build or run a model; a file cannot be read.
    """
    how = _how(job)
    tell(Stage.BUILD, 0, 0)
    with ExitStack() as stack:
        opened = [stack.enter_context(open_adapter(folder)) for folder, _ in job.adapters]
        base = blueprint(job.base, label=str(job.base), adapters=opened)
        labels = getattr(base.config, "num_labels", None)
    ours = _asked(base, how, job, tell)
    gc.collect()  # the next model is built when this one is gone, whatever refers to itself in it
    runs = _Runs(tell, len(ours.samples), model=4)
    tell(Stage.BUILD, runs.done, runs.of)
    try:
        merged = blueprint(job.merged, label=str(job.merged), like=base.name)
        if labels is not None and labels != merged.config.num_labels:
            merged.config.num_labels = labels  # which a head that came with an adapter has
        theirs = answers(built(merged).to(ours.wide), ours.samples, runs.begin)
    except UnfitError as error:
        return _judged(base.name, ours, None, f"{error}")
    return _judged(base.name, ours, theirs)


def _how(job: ModelJob) -> _How:
    return _How(
        job.adapters,
        getattr(torch, job.dtype) if job.dtype is not None else None,
        Tied(job.tied) if job.tied is not None else None,
        ProjectionSource(job.projections),
        Variant(job.generator) if job.generator is not None else None,
        job.key_map,
        rounding_on_base(job.base_dtype) if job.base_dtype is not None else None,
        job.wider,
    )


_MODELS = 5
"""The models that are run: base, wrapped, merged here, rounded, and the merged one."""


@dataclass(slots=True)
class _Runs:
    """Counts the runs of models on samples, and tells of each."""

    tell: Tell
    samples: int
    model: int = 0

    @property
    def done(self) -> int:
        return self.model * self.samples

    @property
    def of(self) -> int:
        return _MODELS * self.samples

    def begin(self, sample: int) -> None:
        self.tell(Stage.RUN, self.done + sample, self.of)

    def merges(self) -> None:
        self.tell(Stage.MERGE, self.done, self.of)

    def of_next_model(self) -> Callable[[int], None]:
        """Go on to the next model, and return what tells of its runs."""
        begin = replace(self).begin
        self.model += 1
        return begin


# --- the base and what becomes of it -------------------------------------------------------------


def _asked(plan: Blueprint, how: _How, job: ModelJob, tell: Tell) -> _Ours:
    """Ask the base, the base with its adapters, and the base into which they are merged."""
    model = built(plan)
    tell(Stage.TEXT, 0, 0)
    with guarded(f"make samples for {plan.name}"):
        samples = _samples(plan, model, job.samples, job.text)
    runs = _Runs(tell, len(samples))
    dtypes = {parameter.dtype for parameter in model.parameters()}
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    with _widened(model, wide):
        base = answers(model, samples, runs.of_next_model())
    runs.merges()
    vera = _wrapped(model, how)
    named = {name: part for name, part in modules_of(vera.model) if isinstance(part, VeraLinear)}
    layers = [*named.values()]
    rounding = [
        how.dtype or _of_tensor(name, how.wider) or _stored(plan) or layer.weight.dtype
        for name, layer in named.items()
    ]
    vera.to(wide)
    wrapped = answers(vera, samples, runs.of_next_model())
    runs.merges()
    vera.merge(check=False, tied=how.tied)
    unrounded = answers(vera, samples, runs.of_next_model())
    branches = _difference(wrapped, unrounded)
    largest = _NOISE_OF_ORDER[wide] * (unrounded.largest if unrounded.are_finite else 0.0)
    does_less = branches > largest and wrapped.are_finite and unrounded.are_finite
    if does_less:
        wrapped = unrounded
    weights = [layer.weight for layer in layers]
    merged = vera.unload()
    _round(zip(weights, rounding, strict=True))
    if how.dtype is not None:
        _round((tensor, how.dtype) for tensor in merged.state_dict(keep_vars=True).values())
    remerged = answers(merged, samples, runs.of_next_model())
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
    dtype: torch.dtype | None = getattr(torch, NAMES[found.pop()]) if len(found) == 1 else None
    return dtype


def _of_tensor(module: str, dtypes: Mapping[str, str]) -> torch.dtype | None:
    """Return the dtype of a module's weight; files name it with a path more or less."""
    weight = f".{module}.weight"
    for name, dtype in dtypes.items():
        if f".{name}".endswith(weight) or weight.endswith(f".{name}"):
            found: torch.dtype = getattr(torch, NAMES[dtype])
            return found
    return None


def _round(tensors: Iterable[tuple[Tensor, torch.dtype]]) -> None:
    """Round tensors to a dtype, and keep them in theirs."""
    for tensor, dtype in tensors:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype).to(tensor.dtype)


# --- judgment -----------------------------------------------------------------------------------


def _judged(name: str, ours: _Ours, theirs: Answers | None, why: str = "") -> ModelComparison:
    """Hold what the merged model gave against what it should give.

    Args:
        name: the class of both models.
        ours: what it should give.
        theirs: what it gave; None if it could not be asked.
        why: it could not.
    """
    wrapped = ours.wrapped
    scale, chosen = wrapped.largest if wrapped.are_finite else 0.0, wrapped.are_logits
    of_order = _of_two_merges(ours, scale)
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
        threshold_difference=_finite(_difference(wrapped, ours.remerged) + of_order),
        threshold_remerged=of_order,
        threshold_kl=_kl_of_rounding(ours, of_order) if chosen else None,
        threshold_top1=_agreement_of_rounding(ours, of_order) if chosen else None,
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
    return _finite(bound)


def _finite(bound: float) -> float:
    return bound if math.isfinite(bound) else 0.0


def _kl_of_rounding(ours: _Ours, of_order: float) -> float:
    """Return how far a correct merge can diverge from the wrapped model, in nats.

    The model merged here diverges by what rounding does. Logits that are off by no more than t from
    its own diverge by no more than t * t / 2 from them, and roots of divergences add up nearly.
    """
    roots = math.sqrt(_finite(_divergence(ours.wrapped, ours.remerged))) + of_order / math.sqrt(2)
    return 2 * roots * roots + _eps(ours.wide)


def _agreement_of_rounding(ours: _Ours, of_order: float) -> float:
    """Return at how many of the positions a correct merge finds the same likeliest at least.

    As many as the model merged here, but for those at which sums in another order can decide.
    """
    agreement = _agreement(ours.wrapped, ours.remerged)
    open_ones = 0
    for values in ours.remerged.values:
        first, second = values.topk(2, -1).values.unbind(-1)
        open_ones += int((first - second <= 2 * of_order).sum())
    return max(0.0, agreement - open_ones / ours.remerged.positions)


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
