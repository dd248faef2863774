"""Match the layers of an adapter with the tensors of a base: one strategy for all layers.

A strategy fits only if the strategy gives every layer exactly one tensor, different layers have
different tensors, and every shape agrees. The strategies are tried in this order:

    names as they are ──► prefixes, renames ──► --key-map ──► the same with a tied head ──► refused
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from vera_convert import rules
from vera_convert.base.model import BaseModel
from vera_convert.base.orientation import Orientation
from vera_convert.base.quantized.recognize import Quantization
from vera_convert.base.quantized.targets import refusals
from vera_convert.base.quantized.unpack import unpacked
from vera_convert.base.renames import Strategy
from vera_convert.base.shared_layers import shared_block, shared_places
from vera_convert.base.strategies import (
    AS_THEY_ARE,
    hints,
    key_map_strategy,
    known_strategies,
    nearest,
)
from vera_convert.base.unsupported_layouts import Inside, Layers, other_layout
from vera_convert.base.vocabulary import resized_head, shared_embedding
from vera_convert.embeddings import is_output_head
from vera_convert.errors import CheckpointError
from vera_convert.rules import Finding
from vera_convert.targets.linear import Linear
from vera_convert.text import printable

_MOST_HINTS = 3
_MOST_TRIED = 32


@dataclass(frozen=True, slots=True)
class Match:
    """The base's tensor for each layer of an adapter.

    Attributes:
        strategy: leads from the path of a layer in the adapter to the path in the base's files.
        tensors: name of the base's tensor by module path, in the adapter's order.
        layers: size and orientation of each layer, by module path.
        tied: output heads without a tensor; `tensors` has the embedding's tensor for a tied head.
        parts: layers stored as a part of a tensor, or as several tensors, by module path.
    """

    strategy: Strategy
    tensors: Mapping[str, str]
    layers: Mapping[str, Linear]
    tied: frozenset[str] = frozenset()
    parts: Mapping[str, Inside] = field(default_factory=dict)

    @property
    def refusals(self) -> list[Finding]:
        """The reasons why a merge refuses layers; empty if every layer can be merged."""
        return [part.finding for part in self.parts.values() if part.first is None]


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
        base: the base; the match names tensors of the base's view, see `unpacked`.
        widest: columns of A, the most inputs of any layer; None if unknown.
        fan_in_fan_out: the field of the adapter's config, for a square tensor if base and
            other layers leave the orientation open.
        key_map: pairs (OLD, NEW) from the user, used if no known strategy fits.
        copies: the shapes of the base's weights in the adapter's file, for adapted layers, by
            module path. An output head has the shape of the copy, because the training can have
            resized the vocabulary.

    Raises:
        CheckpointError: no strategy fits all layers, or several strategies fit.
    """
    heads = {
        module: shape
        for module, shape in (copies or {}).items()
        if is_output_head(module, base.model_type)
        and len(shape) == 2
        and shape[0] == layers.get(module)
    }
    matcher = _Matcher(layers, base, heads, widest=widest, fan_in_fan_out=fan_in_fan_out)
    plain = matcher.try_out(AS_THEY_ARE)
    known: list[_Trial] = []
    given: list[_Trial] = []
    if plain.missing:
        known = [*map(matcher.try_out, known_strategies(layers, matcher.base))]
        given = [matcher.try_out(key_map_strategy(*pair)) for pair in dict.fromkeys(key_map)]
    found = matcher.choose(plain, known, given)
    if found.is_complete:
        return found.match
    tie = matcher.with_tied_head
    tied = matcher.choose(tie(plain), [*map(tie, known)], [*map(tie, given)])
    if tied.is_complete:
        return tied.match
    raise CheckpointError.of(matcher.refusal(found))


def embedding_of_head(module: str, match: Match, base: BaseModel) -> str | None:
    """Return the embedding with the tensor of an adapted output head; None if absent.

    A base can store head and embedding as two tensors although a loader uses a single tensor.
    """
    if module in match.tied:
        return match.tensors[module]
    if is_output_head(module, base.model_type) and base.tie_word_embeddings:
        name = match.tensors[module]
        return shared_embedding(base, name, *base.tensors[name].info.shape)
    return None


# --- trying strategies ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Trial:
    """The result of a strategy: a match of the layers with a tensor, and the problems."""

    match: Match
    missing: tuple[str, ...]
    problems: tuple[Finding, ...]

    @property
    def is_complete(self) -> bool:
        return not self.missing and not self.problems


class _Matcher:
    """Tries strategies on the layers of an adapter and a base.

    Attributes:
        base: the base, with packed weights by the names and shapes of plain weights.
    """

    def __init__(
        self,
        layers: Mapping[str, int],
        base: BaseModel,
        heads: Mapping[str, tuple[int, ...]],
        *,
        widest: int | None,
        fan_in_fan_out: bool,
    ) -> None:
        self._layers = layers
        self._unpacked = unpacked(base)
        self.base = self._unpacked.view
        self._heads = heads
        self._widest = widest
        self._fan_in_fan_out = fan_in_fan_out
        self._quantization = Quantization(self.base)
        self._orientation = Orientation(self.base)
        self._inside = Layers(self.base)

    def with_tied_head(self, trial: _Trial) -> _Trial:
        """Return the trial with the embedding in place of a missing, tied output head.

        A trial stays the same if another layer is missing or the head lacks an embedding.
        """
        heads = tuple(m for m in self._layers if is_output_head(m, self.base.model_type))
        if trial.missing != heads or len(heads) != 1 or self.base.tie_word_embeddings is False:
            return trial
        (head,) = heads
        own = trial.match.strategy.rename(head) or head
        embedding = shared_embedding(self.base, own, self._layers[head], self._widest)
        if embedding is None and head in self._heads:
            embedding = shared_embedding(self.base, own, None, self._heads[head][1])
        if embedding is None:
            return trial
        linear = self._linear(head, embedding)
        if linear.out_features != self._layers[head]:
            return trial
        rest = self.try_out(trial.match.strategy, without=head)
        tensors = {**rest.match.tensors, head: embedding}
        layers = {**rest.match.layers, head: linear}
        match = replace(
            rest.match,
            tensors={name: tensors[name] for name in self._layers},
            layers={name: layers[name] for name in self._layers if name in layers},
            tied=frozenset(heads),
        )
        return replace(rest, match=match)

    def choose(self, plain: _Trial, known: Sequence[_Trial], given: Sequence[_Trial]) -> _Trial:
        """Return the complete trial, or else the trial with most matches.

        Args:
            plain: the trial of unchanged names; counts alone if every layer has a tensor.
            known: the trials of known strategies.
            given: the trials of the user's key maps.

        Raises:
            CheckpointError: several strategies fit and match different tensors.
        """
        if not plain.missing:
            return plain
        own, mapped = _complete(known), [trial for trial in given if trial.is_complete]
        if len(mapped) == 1 and len(own) != 1:
            return mapped[0]
        if len(own) == 1 and (len(mapped) != 1 or mapped[0].match.tensors == own[0].match.tensors):
            return own[0]
        if own or mapped:
            fitting = " and ".join(trial.match.strategy.name for trial in [*own, *mapped])
            reason = f"all {len(self._layers):,} layers fit with each of: {fitting}."
            raise CheckpointError(rules.NAMES_AMBIGUOUS.at(self.base.location.label, reason))
        return max((plain, *known, *given), key=lambda trial: len(trial.match.tensors))

    def refusal(self, trial: _Trial) -> list[Finding]:
        """Explain why no strategy fits: counts, an unmatched name of each side, key maps."""
        if not trial.missing:
            return [*trial.problems]
        base, module, tensors = self.base, trial.missing[0], trial.match.tensors
        layout = other_layout(trial.missing, base)
        if layout is not None:
            return [layout]
        closest = next(iter(nearest(module, base)), "")
        strategy = trial.match.strategy.name
        under = "" if strategy == AS_THEY_ARE.name else f", with {strategy}"
        reason = (
            f"the base has tensors for {len(tensors)} of {len(self._layers)} layers{under}. "
            f'The adapter\'s "{printable(module)}" has none; the base has '
            f'"{printable(closest)}.weight".'
        )
        possible = {hint.key_map: hint for hint in hints(module, base)}
        fitting = [
            text
            for text, hint in islice(possible.items(), _MOST_TRIED)
            if (not tensors or _keeps_path(text)) and self.try_out(hint).is_complete
        ]
        if fitting:
            shown = " or ".join(f"--key-map {hint}" for hint in fitting[:_MOST_HINTS])
            reason += f" All would fit with {shown}."
        elif (twin := shared_block(module, base)) is not None:
            reason += (
                f' Several layers share one block, stored as "{printable(twin)}": a delta of one '
                "layer would change the others. Use the adapter with PEFT, without a merge."
            )
        elif resized := resized_head(module, self._layers[module], base):
            reason += resized
        elif tensors:
            reason += (
                " If the model class built this layer anew, no file holds its starting weights."
            )
        return [rules.NAMES_DIFFER.at(base.location.label, reason)]

    def try_out(self, strategy: Strategy, *, without: str | None = None) -> _Trial:
        """Apply a strategy to every layer but one, and compare names and shapes with the base."""
        modules = [module for module in self._layers if module != without]
        found = {module: self._weight(strategy, module) for module in modules}
        parts = self._parts(strategy, [module for module, name in found.items() if name is None])
        weights = {m: name or f"{strategy.rename(m) or m}.weight" for m, name in found.items()}
        parts |= dict(shared_places(weights, self._layers, self.base))
        places = {
            module: parts[module].tensors[0] if module in parts else found[module]
            for module in found
        }
        tensors = {module: name for module, name in places.items() if name is not None}
        missing = tuple(module for module in modules if module not in tensors)
        packed = [name for name in tensors.values() if self._quantization.is_packed(name)]
        whole = {module: name for module, name in tensors.items() if module not in parts}
        problems = [*_clashes(whole)]
        problems += refusals(self._unpacked, packed) or self._no_matrices(whole)
        layers: dict[str, Linear] = {}
        if not missing and not problems:
            conv1d = self._conv1d(whole)
            layers = {
                module: self._linear(module, whole[module], conv1d=conv1d[module])
                if module in whole
                else Linear(self._layers[module], parts[module].in_features)
                for module in tensors
            }
            problems = [*self._other_shapes(tensors, layers)]
        match = Match(strategy, tensors, layers, parts=parts)
        return _Trial(match, missing, tuple(problems))

    def _parts(self, strategy: Strategy, modules: Sequence[str]) -> dict[str, Inside]:
        """Return the proven places of layers inside shared tensors or in several tensors."""
        found = {
            module: self._inside.inside(module, self._layers[module], strategy.undo)
            for module in modules
        }
        packed = self._unpacked.formats
        return {
            module: place if packed.keys().isdisjoint(place.tensors) else replace(place, first=None)
            for module, place in found.items()
            if place is not None
        }

    def _weight(self, strategy: Strategy, module: str) -> str | None:
        """Return the name of a layer's weight in the base, packed or plain; None if absent."""
        path = strategy.rename(module)
        if path is None:
            return None
        # Some classes rename a weight and not its module.
        for name in (f"{path}.weight", strategy.rename(f"{module}.weight")):
            if name in self.base.tensors:
                return name
        return self._quantization.packed_weight(path)

    def _linear(self, module: str, name: str, *, conv1d: bool = False) -> Linear:
        """Return the size and orientation of a layer from a tensor of the base."""
        rows, columns = self.base.tensors[name].info.shape
        own = Linear(columns, rows, conv1d=True) if conv1d else Linear(rows, columns)
        outputs, inputs = self._heads.get(module, (0, 0))
        return own if inputs != own.in_features else own._replace(out_features=outputs)

    def _no_matrices(self, tensors: Mapping[str, str]) -> Iterator[Finding]:
        for name in tensors.values():
            shape = self.base.tensors[name].info.shape
            if len(shape) != 2:
                yield rules.NOT_A_MATRIX.in_tensor(
                    name, f"its shape is {shape}: {_kind_of_weight(name, shape)}."
                )

    def _other_shapes(
        self, tensors: Mapping[str, str], layers: Mapping[str, Linear]
    ) -> Iterator[Finding]:
        for module, layer in layers.items():
            outputs, inputs, values = layer.out_features, layer.in_features, self._layers[module]
            reason = ""
            if outputs != values:
                reason = f"it has {outputs:,} outputs and lambda_b has {values:,} values."
            elif self._widest is not None and inputs > self._widest:
                reason = f"it has {inputs:,} inputs and vera_A has {self._widest:,} columns."
            if reason:
                yield rules.SHAPES_DIFFER.at(printable(tensors[module]), reason)

    def _conv1d(self, tensors: Mapping[str, str]) -> dict[str, bool]:
        """Say for each module whether the module's tensor is stored as (in, out)."""
        found: dict[str, bool | None] = {}
        for module, name in tensors.items():
            rows, columns = self.base.tensors[name].info.shape
            found[module] = self._orientation.is_conv1d(name)
            if found[module] is None and rows != columns:
                found[module] = self._layers[module] == columns and module not in self._heads
        # If base and shape leave the orientation open, the layer is stored like the other layers.
        kinds = {each for each in found.values() if each is not None}
        usual = kinds.pop() if len(kinds) == 1 else self._fan_in_fan_out
        return {module: usual if each is None else each for module, each in found.items()}


def _clashes(tensors: Mapping[str, str]) -> Iterator[Finding]:
    owner: dict[str, str] = {}
    for module, name in tensors.items():
        first = owner.setdefault(name, module)
        if first != module:
            reason = f'"{printable(first)}" and "{printable(module)}" both match this tensor.'
            yield rules.NAMES_DIFFER.in_tensor(name, reason)


_CONVOLUTIONS = {3: "nn.Conv1d", 4: "nn.Conv2d", 5: "nn.Conv3d"}


def _kind_of_weight(name: str, shape: Sequence[int]) -> str:
    """Return the probable kind of layer behind a weight of other than two dimensions."""
    if len(shape) == 3 and "expert" in name:
        return "the weights of several experts in one tensor"
    if len(shape) in _CONVOLUTIONS:
        return f"probably the layer is a convolution ({_CONVOLUTIONS[len(shape)]}), not linear"
    return "the layer is no linear layer" + (", but perhaps a norm" if len(shape) == 1 else "")


def _complete(trials: Iterable[_Trial]) -> list[_Trial]:
    """Return the complete trials with distinct choices of tensors."""
    found: list[_Trial] = []
    for trial in trials:
        tensors = trial.match.tensors
        if trial.is_complete and all(tensors != other.match.tensors for other in found):
            found.append(trial)
    return found


def _keeps_path(key_map: str) -> bool:
    """Say whether a key map ``OLD=NEW`` only adds or only removes elements of a path.

    If other layers fit without a key map, a key map that replaces elements leads to another module.
    """
    old, new = (path.split(".") for path in key_map.split("=", 1))
    shorter, longer = sorted((old, new), key=len)
    rest = iter(longer)
    return all(not element or element in rest for element in shorter)
