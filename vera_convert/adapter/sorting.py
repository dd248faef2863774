"""Sort an adapter's tensors by the meaning of their names, and report every defect.

Every tensor is a lambda, one of the shared projections, a copy of these, or a replacement of a
tensor of the base. Any other tensor is a finding.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from vera_convert import rules
from vera_convert.adapter.adapter import (
    MAX_PROJECTION_BYTES,
    MAX_WIDTH,
    AdaptedLayer,
    StoredProjections,
)
from vera_convert.adapter.config import VeraConfig
from vera_convert.adapter.names import A_NAME, B_NAME, LAMBDAS, PREFIX, Names
from vera_convert.adapter.saved_modules import replacement_findings
from vera_convert.dtypes import FLOATS
from vera_convert.files.file_names import CONFIG_NAME, WEIGHTS_NAME
from vera_convert.files.tensorfile import TensorData
from vera_convert.rules import Finding, Rule, errors_of
from vera_convert.text import and_more, listed, printable

_MOST_SHOWN = 6
"""The most beginnings of names, or wrappers, in one message; a sound file has one."""
_WITHOUT_COPY = (
    "PEFT copied the base's packed weight, which is untrained. With PyTorch installed, remove "
    "the copy in the adapter's folder: python -c \"from safetensors import safe_open; from "
    "safetensors.torch import load_file, save_file; f = 'adapter_model.safetensors'; "
    "m = safe_open(f, 'pt').metadata(); t = load_file(f); "
    "save_file({k: t[k] for k in t if '.base_layer.' not in k}, f, metadata=m)\""
)
"""The remedy for the copy of a quantized head."""
_OF_ADAPTER = re.compile(r"base_model\.|vera_|lora_")
"""A part of every name in the file of an adapter."""


class SortedTensors(NamedTuple):
    """Tensors by meaning, with every defect, errors included."""

    layers: Mapping[str, AdaptedLayer]
    projections: StoredProjections | None
    repeated: tuple[TensorData, ...]
    replacements: tuple[TensorData, ...]
    findings: tuple[Finding, ...]
    unread: tuple[TensorData, ...] = ()
    """Copies of a saved head's bias, which PEFT writes and ignores."""

    @property
    def longest_b(self) -> int:
        """Length of the longest well-formed lambda_b."""
        shapes = (layer.lambda_b.shape for layer in self.layers.values())
        return max((shape[0] for shape in shapes if shape), default=0)


def sort_tensors(
    tensors: Sequence[TensorData], config: VeraConfig, *, values: bool = True
) -> SortedTensors:
    """Sort tensors by their names and check every tensor; nothing is raised.

    Args:
        tensors: all tensors of the file.
        config: the adapter's config.
        values: whether values may be read, to compare the copies of A and B.
    """
    if tensors and not any(map(_OF_ADAPTER.search, (tensor.name for tensor in tensors))):
        reason = f"no tensor belongs to an adapter; {printable(tensors[0].name)} is a model's."
        finding = rules.MODEL_AS_ADAPTER.in_file(WEIGHTS_NAME, reason)
        return SortedTensors({}, None, (), (), (finding,))
    names = Names.of((tensor.name for tensor in tensors), config)
    by_rule, lambdas, pair, repeated, others, unread = _by_name(tensors, names)
    findings = [*_misnamed_findings(by_rule, names), *_misnamed_targets(names, config)]
    layers = {
        module: AdaptedLayer(module, both["vera_lambda_b"], both["vera_lambda_d"])
        for module, both in lambdas.items()
        if len(both) == 2
    }
    if not lambdas and not by_rule:
        findings.append(rules.NO_LAMBDAS.in_file(WEIGHTS_NAME, "it holds no lambda."))
    findings += _unpaired(lambdas)
    findings += shape_findings(layers, pair, others, config)
    projections = StoredProjections(pair["vera_A"], pair["vera_B"]) if len(pair) == 2 else None
    has_errors = bool(errors_of(findings))
    findings += _presence(pair, repeated, config, renamed=bool(by_rule))
    if projections is not None and not has_errors:
        findings += _copies(projections, repeated, values=values)
    findings += replacement_findings(others, layers, config, renamed=bool(by_rule))
    return SortedTensors(
        layers, projections, tuple(repeated), tuple(others), tuple(findings), tuple(unread)
    )


class _ByName(NamedTuple):
    """Tensors by their names: misnamed tensors by rule, lambdas by module and kind."""

    misnamed: dict[Rule, list[str]]
    lambdas: dict[str, dict[str, TensorData]]
    pair: dict[str, TensorData]
    repeated: list[TensorData]
    others: list[TensorData]
    unread: list[TensorData]


def _by_name(tensors: Iterable[TensorData], names: Names) -> _ByName:
    found = _ByName({}, {}, {}, [], [], [])
    for tensor in tensors:
        module, _, last = tensor.name.rpartition(".")
        broken = names.broken_rule(tensor.name)
        if broken is not None:
            found.misnamed.setdefault(broken, []).append(tensor.name)
        elif tensor.name in (A_NAME, B_NAME):
            found.pair[last] = tensor
        elif last in LAMBDAS:
            found.lambdas.setdefault(module.removeprefix(PREFIX), {})[last] = tensor
        elif last in ("vera_A", "vera_B"):
            found.repeated.append(tensor)
        else:
            kind = found.unread if tensor.name in names.copies else found.others
            kind.append(tensor)
    return found


def _misnamed_findings(by_rule: Mapping[Rule, Sequence[str]], names: Names) -> Iterator[Finding]:
    """Yield one finding for each broken rule of names."""
    for rule, broken in by_rule.items():
        place = listed(broken, 1)
        if rule is rules.WRAPPER_IN_NAMES and names.begin_alike:
            yield rule.at(place, _foreign_reason(broken, names))
        elif rule is rules.ADAPTER_NAME_LEFT:
            adapters = sorted(
                frozenset().union(*(names.without_adapter(name)[1] for name in broken))
            )
            which = printable(", ".join(adapters))
            if len(adapters) > 1:
                yield rules.SEVERAL_ADAPTERS.at(place, f"the adapters are {which}.")
            else:
                yield rule.at(place, f'the name carries the adapter\'s name "{which}".')
        elif rule in (rules.WRAPPER_IN_NAMES, rules.PREFIX_MISSING) and not names.begin_alike:
            groups = [
                f"{len(group)} names of vectors begin with "
                + (f'"{printable(beginning)}"' if beginning else "the path of the layer")
                + f", such as {printable(group[0])}"
                for beginning, group in islice(names.beginnings.items(), _MOST_SHOWN)
            ]
            more = and_more(len(names.beginnings) - len(groups), "beginning")
            yield rules.PREFIX_MIXED.at(place, f"{'; '.join(groups)}{more}.")
        else:
            reasons = {
                rules.PREFIX_MISSING: f"the name does not begin with {PREFIX}",
                rules.OTHER_VERA: "plain VeRA has lambda_b, lambda_d, A and B only.",
            }
            yield rule.at(place, reasons.get(rule, "PEFT writes no tensor of this name for VeRA."))


def _foreign_reason(broken: Sequence[str], names: Names) -> str:
    """Name the foreign parts: the text before PEFT's prefix, and the wrappers."""
    parts = [names.parts(name) for name in broken]
    wrappers = sorted({wrapper for each in parts for wrapper in each.wrappers})
    fronts = sorted({each.front for each in parts} - {""})
    said = [
        f'"{printable(front)}." stands before the name that PEFT writes'
        for front in fronts[:_MOST_SHOWN]
    ]
    if len(fronts) > _MOST_SHOWN:
        said.append(f"{len(fronts) - _MOST_SHOWN:,} more texts stand before other names")
    if wrappers:
        shown = " and ".join(f'"{printable(wrapper)}"' for wrapper in wrappers[:_MOST_SHOWN])
        shown += and_more(len(wrappers) - _MOST_SHOWN)
        verb = "is" if len(wrappers) == 1 else "are"
        said.append(f"{shown} {verb} left over from a wrapper around the model")
    return f"{'; '.join(said)}."


def _misnamed_targets(names: Names, config: VeraConfig) -> Iterator[Finding]:
    for field, layers in (
        ("target_modules", config.target_modules),
        ("modules_to_save", config.modules_to_save),
    ):
        broken = [each for each in layers or () if names.parts(each).wrappers]
        if broken and isinstance(layers, tuple):
            place = f"adapter_config.json, {field}: {printable(broken[0])}"
            yield rules.WRAPPER_IN_NAMES.at(place, _foreign_reason(broken, names), file=CONFIG_NAME)


def _unpaired(lambdas: Mapping[str, Mapping[str, TensorData]]) -> Iterator[Finding]:
    for module, both in lambdas.items():
        if len(both) == 1:
            (present,) = both
            absent = "vera_lambda_d" if present == "vera_lambda_b" else "vera_lambda_b"
            yield rules.LAMBDA_UNPAIRED.at(printable(module), f"it has {present} but no {absent}.")


# --- projections ---------------------------------------------------------------------------------


def _presence(
    pair: Mapping[str, TensorData],
    repeated: Sequence[TensorData],
    config: VeraConfig,
    *,
    renamed: bool,
) -> Iterator[Finding]:
    if renamed:  # the pair can be among the misnamed tensors
        return
    if len(pair) == 1:
        (present,) = pair
        absent = "vera_B" if present == "vera_A" else "vera_A"
        yield rules.ONE_PROJECTION.in_file(WEIGHTS_NAME, f"it holds {present} but no {absent}.")
    elif not pair and repeated:
        yield rules.PROJECTIONS_PER_LAYER.in_tensor(
            repeated[0].name, f"{len(repeated)} such tensors, but no {A_NAME}."
        )
    elif not pair and config.save_projection:
        yield rules.PROJECTIONS_MISSING.at(
            WEIGHTS_NAME, f"save_projection is true, but there is no {A_NAME}."
        )
    elif pair and not config.save_projection:
        yield rules.PROJECTIONS_UNANNOUNCED.at(
            WEIGHTS_NAME, "save_projection is false, but A and B are stored."
        )


def _copies(
    pair: StoredProjections, repeated: Sequence[TensorData], *, values: bool
) -> Iterator[Finding]:
    same = same_tensor if values else _same_form
    twins = ((each, pair.A if each.name.endswith("vera_A") else pair.B) for each in repeated)
    unequal = [copy for copy, shared in twins if not same(copy, shared)]
    for copy in unequal:
        yield rules.PROJECTIONS_DIFFER.in_tensor(copy.name, "it differs from the shared matrix.")
    if repeated and not unequal:
        compared = "" if values else "; their values were not compared"
        reason = f"{len(repeated)} copies of A and B are stored{compared}."
        yield rules.PROJECTIONS_REPEATED.in_tensor(repeated[0].name, reason)


def same_tensor(first: TensorData, other: TensorData) -> bool:
    """Say whether two tensors have the same dtype, shape and bytes."""
    return _same_form(first, other) and all(
        a == b for a, b in zip(first.blocks(), other.blocks(), strict=True)
    )


def _same_form(first: TensorData, other: TensorData) -> bool:
    return first.dtype == other.dtype and first.shape == other.shape


# --- shapes and dtypes ----------------------------------------------------------------------------


def shape_findings(
    layers: Mapping[str, AdaptedLayer],
    pair: Mapping[str, TensorData],
    others: Sequence[TensorData],
    config: VeraConfig,
) -> Iterator[Finding]:
    """Yield a finding for each tensor of a wrong shape or dtype.

    Args:
        layers: the adapted layers.
        pair: the stored A and B by the last element of the name.
        others: the tensors in place of the base's tensors.
        config: the adapter's config.
    """
    trained = [t for layer in layers.values() for t in (layer.lambda_b, layer.lambda_d)]
    for tensor in (*trained, *pair.values()):
        if tensor.dtype not in FLOATS:
            yield rules.TENSOR_DTYPE.in_tensor(tensor.name, f"it is of type {tensor.dtype}.")
    for tensor in others:
        # Other buffers, such as counters, can be whole numbers.
        if tensor.name.endswith((".weight", ".bias")) and tensor.dtype not in FLOATS:
            found = rules.TENSOR_DTYPE.in_tensor(tensor.name, f"it is of type {tensor.dtype}.")
            is_copy = ".base_layer." in tensor.name
            yield found.with_remedy(_WITHOUT_COPY) if is_copy else found
    for tensor in (*trained, *pair.values(), *others):
        if 0 in tensor.shape:
            yield rules.EMPTY_TENSOR.in_tensor(tensor.name, f"its shape is {list(tensor.shape)}.")
    for layer in layers.values():
        yield from _lambda_shapes(layer, config.r)
    yield from _projection_shapes(pair, layers, config.r)
    kinds = {tensor.dtype for tensor in (*trained, *pair.values())}
    if len(kinds) > 1:
        yield rules.MIXED_DTYPES.in_file(WEIGHTS_NAME, f"they are {', '.join(sorted(kinds))}.")


def _lambda_shapes(layer: AdaptedLayer, rank: int) -> Iterator[Finding]:
    for tensor in (layer.lambda_b, layer.lambda_d):
        if len(tensor.shape) == 2 and tensor.shape[1] == 1:
            yield rules.LAMBDA_COLUMN.in_tensor(tensor.name, f"its shape is {list(tensor.shape)}.")
        elif len(tensor.shape) != 1:
            yield rules.LAMBDA_SHAPE.in_tensor(tensor.name, f"its shape is {list(tensor.shape)}.")
    found = layer.lambda_d.shape[0] if layer.lambda_d.shape else 1
    if 0 not in layer.lambda_d.shape and found != rank:
        yield rules.LAMBDA_D_LENGTH.in_tensor(
            layer.lambda_d.name, f"it has {found} values, but r is {rank}."
        )


def _projection_shapes(
    pair: Mapping[str, TensorData], layers: Mapping[str, AdaptedLayer], rank: int
) -> Iterator[Finding]:
    for name, axis in (("vera_A", 0), ("vera_B", 1)):
        tensor = pair.get(name)
        if tensor is None or 0 in tensor.shape:
            continue
        if len(tensor.shape) != 2 or tensor.shape[axis] != rank:
            expected = f"({rank}, inputs)" if axis == 0 else f"(outputs, {rank})"
            yield rules.PROJECTION_SHAPE.at(
                tensor.name, f"its shape is {list(tensor.shape)}, expected {expected}."
            )
        elif axis == 1:
            yield from _too_short(tensor, layers)
        elif tensor.shape[1] > MAX_WIDTH:
            reason = f"it has {tensor.shape[1]:,} columns; the limit is {MAX_WIDTH:,}."
            yield rules.PROJECTIONS_TOO_LARGE.at(tensor.name, reason)
    total = sum(tensor.nbytes for tensor in pair.values())
    if total > MAX_PROJECTION_BYTES:
        yield rules.PROJECTIONS_TOO_LARGE.at(
            WEIGHTS_NAME, f"A and B take {total:,} bytes; the limit is {MAX_PROJECTION_BYTES:,}."
        )


def _too_short(B: TensorData, layers: Mapping[str, AdaptedLayer]) -> Iterator[Finding]:
    for layer in layers.values():
        if layer.lambda_b.shape and layer.out_features > B.shape[0]:
            yield rules.PROJECTION_TOO_SHORT.at(
                printable(layer.module),
                f"it has {layer.out_features} outputs, vera_B {B.shape[0]} rows.",
            )
