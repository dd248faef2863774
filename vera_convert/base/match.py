"""Match the layers of an adapter with the tensors of a base: all layers by one strategy, or none.

A strategy fits only if every layer then has exactly one tensor, no two layers have the same tensor,
and every shape agrees. The strategies are tried in this order:

    names as they are ──► prefixes, renames ──► --key-map ──► refused, with the key maps that fit
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from vera_convert.base.model import BaseModel, Orientation
from vera_convert.base.quantized.recognize import Quantization
from vera_convert.base.quantized.targets import refusals
from vera_convert.base.quantized.unpack import Unpacked, unpacked
from vera_convert.base.strategies import (
    AS_THEY_ARE,
    Strategy,
    hints,
    key_map_strategy,
    known_strategies,
    nearest,
)
from vera_convert.base.unsupported_layouts import other_layout
from vera_convert.base.vocabulary import shared_embedding
from vera_convert.embeddings import is_output_head
from vera_convert.errors import CheckpointError
from vera_convert.rules import (
    NAMES_AMBIGUOUS,
    NAMES_DIFFER,
    NOT_A_MATRIX,
    SHAPES_DIFFER,
    Finding,
)
from vera_convert.text import printable

_MOST_FINDINGS = 50
_MOST_HINTS = 3
_MOST_TRIED = 32


@dataclass(frozen=True, slots=True)
class Match:
    """The base's tensor for each layer of an adapter.

    Attributes:
        strategy: the name of the strategy.
        tensors: name of the base's tensor by module path, in the adapter's order.
        shapes: outputs and inputs of each layer, by module path.
        conv1d: the modules whose tensor is stored as (in, out).
        tied: output heads without a tensor; `tensors` has the embedding's tensor for such a head.
        rename: the strategy's function, from the path in the adapter to the path in the files.
        undo: the inverse; None if the adapter's model has no such layer.
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
    copies: Mapping[str, tuple[int, ...]] | None = None,
) -> Match:
    """Return the base's tensor for each adapted layer.

    Args:
        layers: length of lambda_b by module path.
        base: the base; the tensors of the match are those of its view, see `unpacked`.
        widest: columns of A, the most inputs of any layer; None if not known.
        fan_in_fan_out: the field of the adapter's config, for a square tensor whose orientation
            neither the base nor another layer tells.
        key_map: pairs (OLD, NEW) from the user, used if no known strategy fits.
        copies: the shapes of the base's weights that the adapter stores for adapted layers, by
            module path. An output head has the shape of the copy, because the training can have
            resized the vocabulary.

    Raises:
        CheckpointError: no strategy fits all layers, or several strategies fit.
    """
    heads = {
        module: (shape[0], shape[1])
        for module, shape in (copies or {}).items()
        if is_output_head(module) and len(shape) == 2 and shape[0] == layers.get(module)
    }
    matcher = _Matcher(unpacked(base), widest, fan_in_fan_out, heads)
    trial = _choose(matcher, layers, key_map)
    if trial.is_complete:
        return _match(trial, layers, matcher, tied={})
    tied = _tied_heads(matcher, layers, key_map)
    if tied is None:
        raise CheckpointError.of(_refusal(matcher, layers, trial))
    return _match(tied[0], layers, matcher, tied=tied[1])


def embedding_of_head(module: str, match: Match, base: BaseModel) -> str | None:
    """Return the embedding whose tensor an adapted output head shares; None if there is none.

    A base can store head and embedding as two tensors although a loader uses one tensor for both.
    """
    if module in match.tied:
        return match.tensors[module]
    if is_output_head(module) and base.tie_word_embeddings:
        return shared_embedding(base, *base.linear_shape(match.tensors[module], conv1d=False))
    return None


# --- trying them ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Trial:
    """The result of a strategy: complete, or with the problems found."""

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

    def __init__(
        self,
        whole: Unpacked,
        widest: int | None,
        fan_in_fan_out: bool,  # noqa: FBT001
        heads: Mapping[str, tuple[int, int]],
    ) -> None:
        self.whole = whole
        self.base = whole.view
        self.quantization = Quantization(whole.view)
        self.widest = widest
        self.fan_in_fan_out = fan_in_fan_out
        self.heads = heads
        self.orientation = Orientation(whole.view)

    def try_out(self, strategy: Strategy, layers: Mapping[str, int]) -> _Trial:
        """Apply a strategy to every layer and compare names and shapes with the base."""
        found = {module: self._weight(strategy.rename(module)) for module in layers}
        tensors = {module: name for module, name in found.items() if name is not None}
        missing = tuple(module for module in layers if module not in tensors)
        packed = [name for name in tensors.values() if self.quantization.is_packed(name)]
        problems = [*self._clashes(tensors)]
        problems += refusals(self.whole, packed) or self._no_matrices(tensors)
        if missing or problems:
            return _Trial(strategy, tensors, missing, tuple(problems), {}, frozenset())
        conv1d = self._conv1d(tensors, layers)
        shapes = {
            module: self.shape(module, name, conv1d=module in conv1d)
            for module, name in tensors.items()
        }
        problems = [*self._other_shapes(tensors, shapes, layers)]
        return _Trial(strategy, tensors, (), tuple(problems), shapes, conv1d)

    def shape(self, module: str, name: str, *, conv1d: bool = False) -> tuple[int, int]:
        """Return the outputs and inputs of a layer that matches a tensor of the base."""
        own, copy = self.base.linear_shape(name, conv1d=conv1d), self.heads.get(module)
        return own if copy is None or copy[1] != own[1] else copy

    def _weight(self, path: str | None) -> str | None:
        """Return the name of a layer's weight in the base, packed or plain; None if absent."""
        name = f"{path}.weight"
        if path is None or name in self.base.tensors:
            return None if path is None else name
        return self.quantization.packed_weight(path)

    def _clashes(self, tensors: Mapping[str, str]) -> Iterator[Finding]:
        owner: dict[str, str] = {}
        for module, name in tensors.items():
            first = owner.setdefault(name, module)
            if first != module:
                reason = f'"{printable(first)}" and "{printable(module)}" both match this tensor.'
                yield NAMES_DIFFER.in_tensor(name, reason)

    def _no_matrices(self, tensors: Mapping[str, str]) -> Iterator[Finding]:
        for name in tensors.values():
            shape = self.base.tensors[name].info.shape
            if len(shape) != 2:
                yield NOT_A_MATRIX.in_tensor(
                    name, f"its shape is {shape}: {_kind_of_weight(name, shape)}."
                )

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
                told = layers[module] == columns and module not in self.heads
            if told is None:
                open_questions.append(module)
            else:
                found[module] = told
        # If neither the base nor a shape tells, the layer is stored as the other layers are.
        kinds = set(found.values())
        kind = kinds.pop() if len(kinds) == 1 else self.fan_in_fan_out
        found |= dict.fromkeys(open_questions, kind)
        return frozenset(module for module, told in found.items() if told)


_CONVOLUTIONS = {3: "nn.Conv1d", 4: "nn.Conv2d", 5: "nn.Conv3d"}


def _kind_of_weight(name: str, shape: Sequence[int]) -> str:
    """Return the kind of layer that a weight of other than two dimensions probably belongs to."""
    if len(shape) == 3 and "expert" in name:
        return "the weights of several experts in one tensor"
    if len(shape) in _CONVOLUTIONS:
        return f"probably the layer is a convolution ({_CONVOLUTIONS[len(shape)]}), not linear"
    return "the layer is no linear layer" + (", but perhaps a norm" if len(shape) == 1 else "")


def _choose(
    matcher: _Matcher, layers: Mapping[str, int], key_map: Sequence[tuple[str, str]]
) -> _Trial:
    """Return the complete trial, or the trial with most matches if no trial is complete.

    Raises:
        CheckpointError: several strategies fit and match different tensors.
    """
    plain = matcher.try_out(AS_THEY_ARE, layers)
    if not plain.missing:
        return plain
    others = known_strategies(layers, matcher.base)
    trials = [matcher.try_out(strategy, layers) for strategy in others]
    mapped = [matcher.try_out(key_map_strategy(*pair), layers) for pair in dict.fromkeys(key_map)]
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
    """Return the complete trials, one for each distinct choice of tensors."""
    found: list[_Trial] = []
    for trial in trials:
        if trial.is_complete and all(trial.tensors != other.tensors for other in found):
            found.append(trial)
    return found


def _tied_heads(
    matcher: _Matcher, layers: Mapping[str, int], key_map: Sequence[tuple[str, str]]
) -> tuple[_Trial, dict[str, str]] | None:
    """Return the trial of all other layers, and the embedding, if only an output head fails."""
    heads = {module: size for module, size in layers.items() if is_output_head(module)}
    if len(heads) != 1 or matcher.base.tie_word_embeddings is False:
        return None
    rest = {module: size for module, size in layers.items() if module not in heads}
    trial = _choose(matcher, rest, key_map)
    (head, size), *_ = heads.items()
    if not trial.is_complete or f"{trial.strategy.rename(head)}.weight" in matcher.base.tensors:
        return None
    embedding = shared_embedding(matcher.base, size, widest=matcher.widest)
    if embedding is None and head in matcher.heads:
        embedding = shared_embedding(matcher.base, None, widest=matcher.heads[head][1])
    if embedding is None or matcher.shape(head, embedding)[0] != size:
        return None
    return trial, {head: embedding}


def _match(
    trial: _Trial, order: Iterable[str], matcher: _Matcher, *, tied: Mapping[str, str]
) -> Match:
    tensors = {**trial.tensors, **tied}
    shapes = {**trial.shapes, **{head: matcher.shape(head, name) for head, name in tied.items()}}
    return Match(
        strategy=trial.strategy.name,
        tensors={module: tensors[module] for module in order},
        shapes={module: shapes[module] for module in order},
        conv1d=trial.conv1d,
        tied=frozenset(tied),
        rename=trial.strategy.rename,
        undo=trial.strategy.undo,
    )


def _refusal(matcher: _Matcher, layers: Mapping[str, int], trial: _Trial) -> list[Finding]:
    """Explain why no strategy fits: counts, one unmatched name of each side, fitting key maps."""
    if not trial.missing:
        return [*trial.problems[:_MOST_FINDINGS]]
    base, module = matcher.base, trial.missing[0]
    known = other_layout(trial.missing, base)
    if known is not None:
        return [known]
    closest = next(iter(nearest(module, base)), "")
    reason = (
        f"the base has tensors for {len(trial.tensors)} of {len(layers)} layers "
        f"({trial.strategy.name}). "
        f'The adapter\'s "{printable(module)}" has none; the base has '
        f'"{printable(closest)}.weight".'
    )
    possible = {hint.key_map: hint for hint in hints(module, base)}
    fitting = [
        text
        for text, hint in islice(possible.items(), _MOST_TRIED)
        if (not trial.tensors or _keeps_path(text)) and matcher.try_out(hint, layers).is_complete
    ]
    if fitting:
        shown = " or ".join(f"--key-map {hint}" for hint in fitting[:_MOST_HINTS])
        reason += f" All would fit with {shown}."
    elif (twin := _shared_block(module, base)) is not None:
        reason += (
            f' Several layers share one block, stored as "{printable(twin)}": a delta of one layer '
            "would change the others. Use the adapter with PEFT, without a merge."
        )
    elif trial.tensors:
        reason += " If the model class built this layer anew, no file holds its starting weights."
    return [NAMES_DIFFER.at(base.location.label, reason)]


def _shared_block(module: str, base: BaseModel) -> str | None:
    """Return the tensor of the block that several layers share, as in Zamba2; None without it."""
    if "shared" not in module:
        return None
    path = re.compile(re.sub(r"\d+", r"\\d+", re.escape(f"{module}.weight")))
    return next(filter(path.fullmatch, base.tensors), None)


def _keeps_path(key_map: str) -> bool:
    """Say whether a key map ``OLD=NEW`` only adds or only removes elements of a path.

    If other layers fit without a key map, a key map that replaces elements leads to another module.
    """
    old, new = (path.split(".") for path in key_map.split("=", 1))
    shorter, longer = sorted((old, new), key=len)
    rest = iter(longer)
    return all(not element or element in rest for element in shorter)
