"""From the layers of an adapter to the tensors of a base: one way for all of them, or none.

An adapter's keys follow the names in memory of the library that trained it; the base's files keep
their own. A strategy says how the one becomes the other. It counts only if every layer then hits
exactly one tensor, no two the same, and every shape agrees; nothing is ever matched in part.

    as they are ──► prefix added or removed, renames ──► --key-map ──► refused, with what would fit
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from itertools import islice, takewhile

from vera_convert.base.model import BaseModel, Orientation
from vera_convert.base.quantized.recognize import is_packed, packed_weight, quantized_targets
from vera_convert.base.renames import model_types, views
from vera_convert.base.unsupported_layouts import other_layout
from vera_convert.embeddings import is_embedding, is_output_head
from vera_convert.errors import CheckpointError
from vera_convert.rules import (
    HEAD_TIED,
    NAMES_AMBIGUOUS,
    NAMES_DIFFER,
    NOT_A_MATRIX,
    REPLACEMENT_CLASH,
    SHAPES_DIFFER,
    Finding,
)
from vera_convert.text import printable

ADAPTER_PREFIX = "base_model.model."
BASE_PREFIXES = frozenset(
    """
    model transformer backbone text_model vision_model
    albert bart beit bert bit blip clip convbert data2vec_audio data2vec_text data2vec_vision
    deberta deit dinov2 distilbert electra ernie esm gpt_neox hubert layoutlm layoutlmv3 led
    longformer mpnet nomic_bert rembert roberta roformer segformer siglip speecht5 swin swinv2
    vilt vit vit_mae wav2vec2 wavlm
    """.split()  # noqa: SIM905 - words read best as a text
)
"""What transformers' classes with a head call the model below it, beside the model type itself."""

_MOST_FINDINGS = 50
_MOST_HINTS = 3
_MOST_TRIED = 32


@dataclass(frozen=True, slots=True)
class Strategy:
    """A way in which an adapter's module path becomes that of a tensor on disk.

    Attributes:
        name: how output and messages call it.
        rename: from the module's path in the adapter to its path in the base's files; None for a
            name that is of another strategy.
        undo: the other way round; None for what the adapter's model does not have.
        key_map: the OLD=NEW that does the same; empty if there is none.
    """

    name: str
    rename: Callable[[str], str | None]
    undo: Callable[[str], str | None]
    key_map: str = ""


AS_THEY_ARE = Strategy("names as they are", str, str)


@dataclass(frozen=True, slots=True)
class Match:
    """Each layer of an adapter with its tensor of the base.

    Attributes:
        strategy: what was done to the names, in words.
        tensors: name of the base's tensor by module path, in the adapter's order.
        shapes: outputs and inputs of each layer, by module path.
        conv1d: the modules whose tensor is stored as (in, out).
        tied: the modules that are an output head without a tensor of its own; theirs is the
            embedding's.
        rename: the strategy as a function of a module's path.
        undo: the other way round; None for what the adapter's model does not have.
    """

    strategy: str
    tensors: Mapping[str, str]
    shapes: Mapping[str, tuple[int, int]]
    conv1d: frozenset[str]
    tied: frozenset[str]
    rename: Callable[[str], str | None]
    undo: Callable[[str], str | None]


def match_modules(
    layers: Mapping[str, int],
    base: BaseModel,
    *,
    widest: int | None = None,
    fan_in_fan_out: bool = False,
    key_map: Sequence[tuple[str, str]] = (),
    allow_tied: bool = False,
) -> Match:
    """Find the tensor of each adapted layer.

    Args:
        layers: length of lambda_b by module path.
        base: the base.
        widest: columns of A, which no layer's inputs exceed; None if not known.
        fan_in_fan_out: the adapter's config; decides where nothing else tells a square tensor's
            orientation.
        key_map: pairs (OLD, NEW) from the user; one that fits all is taken where no other way does.
        allow_tied: match an output head that shares the embedding's tensor, not refuse it.

    Raises:
        CheckpointError: no strategy fits all layers, or more than one; or a head is tied.
    """
    matcher = _Matcher(base, widest, fan_in_fan_out)
    trial = _choose(matcher, layers, key_map)
    if trial.is_complete:
        return _match(trial, layers, base, heads={})
    tied = _tied_heads(matcher, layers, key_map)
    if tied is None:
        raise CheckpointError.of(_refusal(matcher, layers, trial))
    rest, heads = tied
    if not allow_tied:
        head, embedding = next(iter(heads.items()))
        reason = f'the layer "{printable(head)}" has no tensor but {printable(embedding)}.'
        raise CheckpointError(HEAD_TIED.at(base.location.label, reason))
    return _match(rest, layers, base, heads=heads)


def match_replacements(names: Iterable[str], match: Match, base: BaseModel) -> dict[str, str]:
    """Return the tensor of the base that each tensor of the adapter replaces.

    Args:
        names: of heads, biases and other saved modules, as they stand in the adapter's file.
        match: what was found for the adapter's layers; its strategy is used here too.
        base: the base. A tensor that it does not have (a head that is new) keeps its plain name.

    Raises:
        CheckpointError: two of them replace the same tensor.
    """
    targets: dict[str, str] = {}
    owners: dict[str, str] = {}
    # Layers may fit as they are although the module beside them is called otherwise.
    ways: list[Callable[[str], str | None]] = [
        match.rename,
        str,
        *(view.path_on_disk for view in views(base)),
    ]
    for name in names:
        module, _, parameter = name.removeprefix(ADAPTER_PREFIX).rpartition(".")
        module = re.sub(r"(^|\.)base_layer$", "", module)
        paths = (path for way in ways if (path := way(module)) is not None)
        there = (".".join(filter(None, (path, parameter))) for path in paths)
        plain = ".".join(filter(None, (module, parameter)))
        target = next(filter(base.tensors.__contains__, there), plain)
        first = owners.setdefault(target, name)
        if first != name:
            reason = f'"{printable(first)}" and "{printable(name)}" both replace it.'
            raise CheckpointError(REPLACEMENT_CLASH.at(printable(target), reason))
        targets[name] = target
    return targets


def embedding_rows(base: BaseModel) -> int | None:
    """Return how many words the base's embedding has; None if it is not known which that is."""
    rows = {
        tensor.info.shape[0]
        for name, tensor in base.tensors.items()
        if is_embedding(name.removesuffix(".weight")) and len(tensor.info.shape) == 2
    }
    return rows.pop() if len(rows) == 1 else None


def shared_embedding(base: BaseModel, shape: tuple[int, int]) -> str | None:
    """Return the one embedding of this shape, which a head of the same shape can share."""
    return _embedding(base, shape[0], shape[1])


def embedding_of_head(module: str, match: Match, base: BaseModel) -> str | None:
    """Return the embedding whose tensor an adapted output head shares; None if it shares none.

    A head can be stored beside its embedding, and a loader takes one of them for both all the same.
    """
    if module in match.tied:
        return match.tensors[module]
    if is_output_head(module) and base.tie_word_embeddings:
        return shared_embedding(base, match.shapes[module])
    return None


# --- strategies ----------------------------------------------------------------------------------


def moved(old: str, new: str, module: str) -> str:
    """Replace the leading path `old` by `new`, element by element; other modules stay."""
    if old and module != old and not module.startswith(f"{old}."):
        return module
    rest = module[len(old) :].lstrip(".") if old else module
    return ".".join(filter(None, (new, rest)))


def _put_back(old: str, new: str, path: str) -> str | None:
    """Undo `moved`."""
    module = moved(new, old, path)
    return module if moved(old, new, module) == path else None


def _known_strategies(layers: Iterable[str], base: BaseModel) -> Iterator[Strategy]:
    """Yield prefixes, renamings between releases of transformers, and the one upon the other."""
    names = {name.partition(".")[0] for name in base.tensors}
    yield from _prefix_strategies(layers, names, base)
    for view in views(base):
        renaming = Strategy(view.name, view.path_on_disk, view.in_memory.get)
        yield renaming
        names = {path.partition(".")[0] for path in view.on_disk}
        for prefix in _prefix_strategies(layers, names, base):
            yield _both(prefix, renaming)


def _both(first: Strategy, second: Strategy) -> Strategy:
    """Return what the second strategy makes of what the first makes of a path."""

    def rename(module: str) -> str | None:
        between = first.rename(module)
        return None if between is None else second.rename(between)

    def undo(path: str) -> str | None:
        between = second.undo(path)
        return None if between is None else first.undo(between)

    name = f"{first.name}, {second.name}"
    return Strategy(name, rename, undo)


def _prefix_strategies(
    layers: Iterable[str], in_base: AbstractSet[str], base: BaseModel
) -> Iterator[Strategy]:
    """Yield the prefixes that a class with a head adds to the names of the model below it."""
    own = {(kind or "").replace("-", "_") for kind in model_types(base.config)}
    known = (BASE_PREFIXES | own) - {""}
    in_adapter = {module.partition(".")[0] for module in layers}
    for prefix in sorted(known & in_base):
        yield _key_map_strategy("", prefix, name=f'prefix "{printable(prefix)}." added')
    for prefix in sorted(known & in_adapter):
        yield _key_map_strategy(prefix, "", name=f'prefix "{printable(prefix)}." removed')


def _key_map_strategy(old: str, new: str, *, name: str = "") -> Strategy:
    text = printable(f"{old}={new}")
    return Strategy(
        name or f"--key-map {text}", partial(moved, old, new), partial(_put_back, old, new), text
    )


def _hints(module: str, base: BaseModel) -> Iterator[Strategy]:
    """Yield renames that would bring `module` to a tensor with the longest end in common."""
    for path in _nearest(module, base):
        shared = _common_end(path, module)
        ours, theirs = module.split("."), path.split(".")
        if shared:
            old, new = (
                ".".join(ours[: len(ours) - shared]),
                ".".join(theirs[: len(theirs) - shared]),
            )
            yield _key_map_strategy(old, new)


def _nearest(module: str, base: BaseModel) -> list[str]:
    """Return the matrices of the base whose paths end most like that of `module`."""
    lengths = {
        name.removesuffix(".weight"): _common_end(name.removesuffix(".weight"), module)
        for name, tensor in base.tensors.items()
        if name.endswith(".weight") and len(tensor.info.shape) == 2
    }
    best = max(lengths.values(), default=0)
    return [path for path, length in lengths.items() if length == best]


def _common_end(one: str, other: str) -> int:
    """Count the path elements in which two paths agree, from the end."""
    pairs = zip(reversed(one.split(".")), reversed(other.split(".")), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


# --- trying them ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Trial:
    """What a strategy came to: complete, or what is wrong with it."""

    strategy: Strategy
    tensors: Mapping[str, str]
    missing: tuple[str, ...]
    problems: tuple[Finding, ...]
    shapes: Mapping[str, tuple[int, int]]
    conv1d: frozenset[str]

    @property
    def is_complete(self) -> bool:
        return not self.missing and not self.problems


class _Matcher:
    """Tries strategies on one base."""

    def __init__(self, base: BaseModel, widest: int | None, fan_in_fan_out: bool) -> None:  # noqa: FBT001
        self.base = base
        self.widest = widest
        self.fan_in_fan_out = fan_in_fan_out
        self.orientation = Orientation(base)

    def try_out(self, strategy: Strategy, layers: Mapping[str, int]) -> _Trial:
        """Apply a strategy to every layer and hold names and shapes against the base."""
        found = {module: self._weight(strategy.rename(module)) for module in layers}
        tensors = {module: name for module, name in found.items() if name is not None}
        missing = tuple(module for module in layers if module not in tensors)
        packed = [name for name in tensors.values() if is_packed(self.base, name)]
        problems = [*self._clashes(tensors)]
        quantized = quantized_targets(self.base, packed) if packed else []
        problems += quantized or self._no_matrices(tensors)
        if missing or problems:
            return _Trial(strategy, tensors, missing, tuple(problems), {}, frozenset())
        conv1d = self._conv1d(tensors, layers)
        shapes = {
            module: self.base.linear_shape(name, conv1d=module in conv1d)
            for module, name in tensors.items()
        }
        problems = [*self._other_shapes(tensors, shapes, layers)]
        return _Trial(strategy, tensors, (), tuple(problems), shapes, conv1d)

    def _weight(self, path: str | None) -> str | None:
        """Return the weight of a layer in the base's files, packed or not, if there is one."""
        name = f"{path}.weight"
        if path is None or name in self.base.tensors:
            return None if path is None else name
        return packed_weight(self.base, path)

    def _clashes(self, tensors: Mapping[str, str]) -> Iterator[Finding]:
        owner: dict[str, str] = {}
        for module, name in tensors.items():
            first = owner.setdefault(name, module)
            if first != module:
                reason = f'"{printable(first)}" and "{printable(module)}" both lead to it.'
                yield NAMES_DIFFER.at(printable(name), reason)

    def _no_matrices(self, tensors: Mapping[str, str]) -> Iterator[Finding]:
        for name in tensors.values():
            shape = self.base.tensors[name].info.shape
            if len(shape) != 2:
                yield NOT_A_MATRIX.at(printable(name), f"its shape is {shape}.")

    def _other_shapes(
        self,
        tensors: Mapping[str, str],
        shapes: Mapping[str, tuple[int, int]],
        layers: Mapping[str, int],
    ) -> Iterator[Finding]:
        for module, (outputs, inputs) in shapes.items():
            place = printable(tensors[module])
            if outputs != layers[module]:
                reason = f"it has {outputs:,} outputs and lambda_b has {layers[module]:,} values."
                yield SHAPES_DIFFER.at(place, reason)
            elif self.widest is not None and inputs > self.widest:
                reason = f"it has {inputs:,} inputs and vera_A has {self.widest:,} columns."
                yield SHAPES_DIFFER.at(place, reason)

    def _conv1d(self, tensors: Mapping[str, str], layers: Mapping[str, int]) -> frozenset[str]:
        """Return the modules whose tensors are stored as (in, out)."""
        found: dict[str, bool] = {}
        open_questions = []
        for module, name in tensors.items():
            rows, columns = self.base.tensors[name].info.shape
            told = self.orientation.is_conv1d(name)
            if told is None and rows != columns:
                told = layers[module] == columns
            if told is None:
                open_questions.append(module)
            else:
                found[module] = told
        # What neither the base nor a shape tells is of the one kind that its neighbors are of.
        kinds = set(found.values())
        kind = kinds.pop() if len(kinds) == 1 else self.fan_in_fan_out
        found |= dict.fromkeys(open_questions, kind)
        return frozenset(module for module, told in found.items() if told)


def _choose(
    matcher: _Matcher, layers: Mapping[str, int], key_map: Sequence[tuple[str, str]]
) -> _Trial:
    """Return the one complete trial, or the one that came nearest.

    Raises:
        CheckpointError: several fit and change different tensors.
    """
    plain = matcher.try_out(AS_THEY_ARE, layers)
    if not plain.missing:
        return plain
    others = _known_strategies(layers, matcher.base)
    trials = [matcher.try_out(strategy, layers) for strategy in others]
    mapped = [matcher.try_out(_key_map_strategy(*pair), layers) for pair in dict.fromkeys(key_map)]
    known, given = _complete(trials), [trial for trial in mapped if trial.is_complete]
    if len(given) == 1 and len(known) != 1:
        return given[0]
    if len(known) == 1 and (len(given) != 1 or given[0].tensors == known[0].tensors):
        return known[0]
    if known or given:
        fitting = " and ".join(trial.strategy.name for trial in [*known, *given])
        reason = f"all {len(layers):,} layers fit with each of: {fitting}."
        raise CheckpointError(NAMES_AMBIGUOUS.at(matcher.base.location.label, reason))
    return max((plain, *trials, *mapped), key=lambda trial: len(trial.tensors))


def _complete(trials: Iterable[_Trial]) -> list[_Trial]:
    """Return the complete trials, one for each different choice of tensors."""
    found: list[_Trial] = []
    for trial in trials:
        if trial.is_complete and all(trial.tensors != other.tensors for other in found):
            found.append(trial)
    return found


def _tied_heads(
    matcher: _Matcher, layers: Mapping[str, int], key_map: Sequence[tuple[str, str]]
) -> tuple[_Trial, dict[str, str]] | None:
    """If only an output head has no tensor, return the trial of the rest, and the embedding."""
    heads = {module: size for module, size in layers.items() if is_output_head(module)}
    if len(heads) != 1 or matcher.base.tie_word_embeddings is False:
        return None
    rest = {module: size for module, size in layers.items() if module not in heads}
    trial = _choose(matcher, rest, key_map)
    (head, size), *_ = heads.items()
    if not trial.is_complete or f"{trial.strategy.rename(head)}.weight" in matcher.base.tensors:
        return None
    embedding = _embedding(matcher.base, size, matcher.widest)
    return (trial, {head: embedding}) if embedding is not None else None


def _embedding(base: BaseModel, rows: int, widest: int | None) -> str | None:
    """Return the one table of `rows` words that a head can share."""
    found = [
        name
        for name, tensor in base.tensors.items()
        if is_embedding(name.removesuffix(".weight"))
        and len(tensor.info.shape) == 2
        and tensor.info.shape[0] == rows
        and (widest is None or tensor.info.shape[1] <= widest)
    ]
    # T5 and BART store the copies of both stacks beside the one that they share.
    shared = [name for name in found if name.endswith("shared.weight")]
    return (shared or found)[0] if len(shared or found) == 1 else None


def _match(
    trial: _Trial, order: Iterable[str], base: BaseModel, *, heads: Mapping[str, str]
) -> Match:
    tensors = {**trial.tensors, **heads}
    head_shapes = {module: base.linear_shape(name, conv1d=False) for module, name in heads.items()}
    shapes = {**trial.shapes, **head_shapes}
    return Match(
        strategy=trial.strategy.name,
        tensors={module: tensors[module] for module in order},
        shapes={module: shapes[module] for module in order},
        conv1d=trial.conv1d,
        tied=frozenset(heads),
        rename=trial.strategy.rename,
        undo=trial.strategy.undo,
    )


def _refusal(matcher: _Matcher, layers: Mapping[str, int], trial: _Trial) -> list[Finding]:
    """Say why nothing fits: counts, one unmatched name of each side, and what would fit."""
    if not trial.missing:
        return [*trial.problems[:_MOST_FINDINGS]]
    base, module = matcher.base, trial.missing[0]
    known = other_layout(trial.missing, base)
    if known is not None:
        return [known]
    nearest = next(iter(_nearest(module, base)), "")
    reason = (
        f"{len(trial.tensors)}/{len(layers)} layers have a tensor there ({trial.strategy.name}). "
        f'The adapter\'s "{printable(module)}" has none; the base has '
        f'"{printable(nearest)}.weight".'
    )
    hints = {hint.key_map: hint for hint in _hints(module, base)}
    fitting = [
        text
        for text, hint in islice(hints.items(), _MOST_TRIED)
        if matcher.try_out(hint, layers).is_complete
    ]
    if fitting:
        shown = " or ".join(f"--key-map {hint}" for hint in fitting[:_MOST_HINTS])
        reason += f" All would fit with {shown}."
    return [NAMES_DIFFER.at(base.location.label, reason)]
