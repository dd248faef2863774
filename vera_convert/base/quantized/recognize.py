"""Recognize the quantized layers of a base by the base's files and config.

Each source alone is enough to refuse: files can be quantized while the config is silent, and a
loader can quantize 16-bit files because of the config.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import translate
from functools import lru_cache
from itertools import islice

from vera_convert.base.model import BaseModel
from vera_convert.base.quantized.formats import FORMATS
from vera_convert.base.quantized.layer_settings import (
    fitting_expressions,
    is_class,
    targets_of,
    texts,
)
from vera_convert.base.renames import other_names
from vera_convert.dtypes import FLOATS
from vera_convert.embeddings import is_output_head, is_table
from vera_convert.tables import table
from vera_convert.text import printable

CONFIG_FIELDS = ("quantization_config", "compression_config")
"""Members of a config, or of a part of the config, with settings of the quantization."""

_REFUSED = table(__file__, "refused.toml")
_METHODS: Mapping[str, str] = {each.method: each.label for each in FORMATS} | _REFUSED["methods"]
"""The name of a method for people, by its ``quant_method``; bitsandbytes has two."""
_KEPT_FIELDS = (
    "modules_to_not_convert",
    "llm_int8_skip_modules",
    "ignore",
    "ignored_layers",
    "exclude",
    "exclude_modules",
    "skip_modules",
    "linear_weights_not_to_quantize",
)
"""The fields in which methods list the modules that stay plain."""
_BY_CONFIG = ("bitsandbytes", "gptq", "awq")
"""Methods for which transformers builds quantized layers by the config alone."""
_PACKED = tuple(
    dict.fromkeys(
        (*(each.packed for each in FORMATS if each.packed != "weight"), *_REFUSED["packed"])
    )
)
"""Names that quantizers give to packed values of another shape than the layer's."""
_CODEBOOKS = ("centroids", "res_centroids", "outlier_centroids")
"""Parts of a quantized layer with a ``weight`` below the part's own name."""
_FP8 = frozenset(("F8_E4M3", "F8_E5M2"))
_SHAPED = FLOATS | _FP8 | {"I8", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "BOOL"}
"""Dtypes with one value in each element: the weight's shape is the layer's shape."""


def quantized_tensors(base: BaseModel) -> frozenset[str]:
    """Return the names of all tensors of quantized layers: weights, scales and other parts.

    No such tensor may be converted to another dtype.
    """
    quantization = Quantization(base)
    return frozenset(name for name in base.tensors if [*quantization.by_tensors(name)])


@lru_cache(maxsize=1024)
def kind_of_siblings(name: str) -> str | None:
    """Return the quantizer that writes a tensor of the name beside a weight, or None.

    Args:
        name: without the path of the layer, such as ``weight_scale``.
    """
    own = [each.label for each in FORMATS if each.has_sign(name)]
    if own:
        return " or ".join(own)
    signs: Mapping[str, str] = _REFUSED["signs"]
    return next((kind for pattern, kind in signs.items() if re.fullmatch(pattern, name)), None)


# --- tensors -------------------------------------------------------------------------------------


def layer_of(name: str) -> tuple[str, str]:
    """Split a tensor's name into the path of the layer and the rest.

    The parts of a weight keep the word weight: ``a.b`` and ``weight.absmax``.
    """
    start, inside, rest = name.partition(".weight.")
    if inside:
        return start, f"weight.{rest}"
    path, _, last = name.rpartition(".")
    before, _, part = path.rpartition(".")
    if last == "weight" and part in _CODEBOOKS:
        return before, f"{part}.weight"
    return path, last


class Quantization:
    """The signs of quantization in a base's files and config, for each tensor."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self._claims = [
            *islice(dict.fromkeys(map(_claim, sections(base.config))), _MOST_CLAIMS + 1)
        ]
        self._signs: dict[str, tuple[str, str]] = {}
        for name in base.tensors:
            path, rest = layer_of(name)
            kind = kind_of_siblings(rest)
            if kind is not None:
                self._signs.setdefault(path, (rest, kind))

    def packed_weight(self, path: str) -> str | None:
        """Return the packed part of a quantized layer that lacks a ``weight``.

        Args:
            path: the layer's, in the base's files.
        """
        sign = self._signs.get(path)
        ends = (*_PACKED, *(sign[:1] if sign else ()))
        names = (f"{path}.{end}" for end in ends)
        return next((name for name in names if name in self._base.tensors), None)

    def is_packed(self, name: str) -> bool:
        """Say whether a weight and the weight's layer differ in shape."""
        path, rest = layer_of(name)
        dtype = self._base.tensors[name].info.dtype
        if rest != "weight" or dtype not in _SHAPED:
            return True
        if self._signs.get(path, ("", ""))[0].startswith("weight."):
            return True  # the parts of packed values, which any dtype can store
        if dtype != "I8":
            return False
        methods = {claim.method for claim in self._claims}
        is_transposed = not methods.isdisjoint(_REFUSED["transposed"])
        return is_transposed or f"{path}.weight_scales" in self._base.tensors

    def of_all(self, names: Sequence[str]) -> dict[str, tuple[str, str]]:
        """Return kind and reason by name, for the quantized weights."""
        by_config = self._by_config(names)
        found = {}
        for name in names:
            reasons = [*self.by_tensors(name)]
            claim = by_config.get(name)
            if claim is not None:
                reasons.insert(0, (claim, "the config says so"))
            if reasons:
                found[name] = (reasons[0][0], ", ".join(reason for _, reason in reasons))
        return found

    def by_tensors(self, name: str) -> Iterator[tuple[str, str]]:
        """Yield kind and reason for each sign of quantization in the files."""
        path, rest = layer_of(name)
        sign = self._signs.get(path)
        dtype = self._base.tensors[name].info.dtype
        if rest == "weight" and dtype not in FLOATS:
            plain = "fp8" if dtype in _FP8 else "packed or integer values"
            yield sign[1] if sign else plain, f"its dtype is {dtype}"
        if sign and rest != "bias":
            where = "is its name" if sign[0] == rest else "lies beside it"
            yield kind_of_siblings(rest) or sign[1], f"{printable(sign[0])} {where}"

    def _by_config(self, names: Sequence[str]) -> dict[str, str]:
        """Return the method by name, for the weights that the config calls quantized."""
        claims = self._claims
        # Norms and biases have one dimension. A packed weight can have one too.
        names = [
            name
            for name in names
            if len(self._base.tensors[name].info.shape) > 1 or layer_of(name)[1] in _PACKED
        ]
        if not claims or not names:
            return {}
        if len(claims) > _MOST_CLAIMS:
            return dict.fromkeys(names, claims[0].method)
        known = other_names(self._base, (layer_of(name)[0] for name in names))
        patterns = dict.fromkeys(pattern for claim in claims for pattern in claim.patterns)
        every = [*dict.fromkeys(other for others in known.values() for other in others)]
        fitting = _fitting(patterns, every)
        if fitting is None:  # the search takes too long: taken as quantized
            return dict.fromkeys(names, claims[0].method)
        found: dict[str, str] = {}
        for name in names:
            others = known[layer_of(name)[0]]
            fits = frozenset[str]().union(*(fitting[other] for other in others))
            found.update((name, claim.method) for claim in claims if claim.covers(others, fits))
        return found


# --- the config ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Claim:
    """A config's statement that modules are quantized.

    Attributes:
        method: the method's name.
        kept: names of modules that stay plain: paths or parts of paths, with ``*``, or regular
            expressions.
        named: names of the quantized modules, likewise; None if all modules are quantized.
        takes_heads: whether output heads are quantized too.
    """

    method: str
    kept: frozenset[str]
    named: frozenset[str] | None
    takes_heads: bool

    @property
    def patterns(self) -> frozenset[str]:
        """All patterns."""
        return self.kept | (self.named or frozenset())

    def covers(self, names: Iterable[str], fits: frozenset[str]) -> bool:
        """Say whether a module is quantized, given the module's names in different releases.

        Args:
            names: the names of the module.
            fits: the patterns that fit any of the names.
        """
        # Quantizers leave heads and tables plain by default.
        if not self.takes_heads and any(is_output_head(name) or is_table(name) for name in names):
            return False
        return fits.isdisjoint(self.kept) and (
            self.named is None or not fits.isdisjoint(self.named)
        )


def sections(config: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    """Yield the parts of a config with settings of the model's quantization."""
    for name, part in config.items():
        if not isinstance(part, Mapping):
            continue
        if name in CONFIG_FIELDS:
            yield part
        else:
            yield from sections(part)


def method_of(section: Mapping[str, object]) -> str:
    """Return the method that a section of a config names, in the spelling of the formats."""
    if section.get("load_in_4bit") or section.get("load_in_8bit"):
        return "bitsandbytes"
    return str(section.get("quant_method") or "").lower().replace("compressed_", "compressed-")


def method_label(section: Mapping[str, object]) -> str:
    """Return the name of the method that a section of a config names, for people."""
    method = method_of(section)
    if method == "bitsandbytes":
        return f"bitsandbytes {'4' if section.get('load_in_4bit') else '8'}-bit"
    said = printable(str(section.get("quant_method") or "of an unnamed method"))
    return _METHODS.get(method, said)


def _claim(config: Mapping[str, object]) -> _Claim:
    kept = [text for field in _KEPT_FIELDS for text in texts(config.get(field))]
    rules = config.get("dynamic")
    if isinstance(rules, Mapping):
        kept += [f"re:{rule[2:]}" for rule in rules if rule.startswith("-:")]
    takes_heads = config.get("lm_head") is True
    return _Claim(method_label(config), frozenset(kept), _named(config), takes_heads)


def _named(config: Mapping[str, object]) -> frozenset[str] | None:
    """Return the quantized modules, where a config lists the modules."""
    if config.get("quant_method") == "mxfp4":
        return frozenset(("experts",))
    found = [*texts(config.get("modules_in_block_to_quantize"))]
    groups = config.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        found += targets_of(group)
    # "Linear" and the like are classes: a class covers more than a name can tell.
    return frozenset(found) if found and not any(map(is_class, found)) else None


def plain_by_config(base: BaseModel, paths: Sequence[str]) -> list[str]:
    """Return the packed layers that transformers builds as plain layers, because of the config.

    A text of a list fits from the beginning of a path to the end of a part, as an expression, or
    at the end of a path. A layer counts if all the layer's names fit.

    Args:
        base: the base.
        paths: the paths of the packed layers in the base's files.
    """
    section = next(sections(base.config), {})
    if method_of(section) not in _BY_CONFIG:
        return []
    fields = ("modules_to_not_convert", "llm_int8_skip_modules", "modules_in_block_to_quantize")
    skipped, skipped_too, packed = ({*texts(section.get(field))} for field in fields)
    skipped |= skipped_too
    names = other_names(base, paths)
    every = [*dict.fromkeys(name for others in names.values() for name in others)]
    expressions = {text: rf"(?:{text})(?:(?<=\.)|(?=\.|$))" for text in skipped}
    hits = fitting_expressions(expressions, every)
    if hits is None:
        return []
    plain = {name for name in every if hits[name]} | _ending(every, skipped)
    if packed:
        plain |= {*every} - _ending(every, packed)
    return [path for path, others in names.items() if plain.issuperset(others)]


def _ending(names: Iterable[str], endings: Collection[str]) -> set[str]:
    """Return the names that end with any of the endings."""
    lengths = {len(text) for text in endings}
    return {name for name in names if any(name[-length:] in endings for length in lengths)}


_MOST_CLAIMS = 32
"""The most different statements to read of a config: the work grows with the layers."""
_MOST_LOOKUPS = 20_000_000
"""The most parts of names to look up among plain patterns: some seconds of work."""


def _fitting(patterns: Iterable[str], names: Sequence[str]) -> dict[str, frozenset[str]] | None:
    """Return the patterns that fit each name, a part of the name, or the end of the name.

    Plain patterns cost one look-up for each part of a name, however many patterns there are; all
    others are under the limits of `patterns.search`.

    Returns:
        None if the search takes too long, or if a pattern is an invalid regular expression.
    """
    plain: dict[str, list[str]] = {}
    expressions = {}
    for pattern in patterns:
        text = pattern.removeprefix("re:")
        if text != pattern or re.search(r"[\\^$+(\[|]", text):
            expressions[pattern] = text
            continue
        text = text.removesuffix(".weight").strip(".")
        if "*" in text:
            expressions[pattern] = "|".join(map(translate, (text, f"{text}.*", f"*.{text}")))
        else:
            plain.setdefault(text, []).append(pattern)
    sizes = {text.count(".") + 1 for text in plain}
    lengths = {len(text) for text in plain}
    lookups = len(sizes) * sum(name.count(".") + 1 for name in names) + len(lengths) * len(names)
    if lookups > _MOST_LOOKUPS:
        return None
    found = fitting_expressions(expressions, names)
    if found is None:
        return None
    return {
        name: frozenset(fits)
        .union(*(plain.get(part, ()) for part in _parts(name, sizes)))
        .union(*(plain.get(name[-length:], ()) for length in lengths))
        for name, fits in found.items()
    }


def _parts(name: str, sizes: Iterable[int]) -> Iterator[str]:
    """Yield each part of a name with a number of elements among `sizes`."""
    elements = name.split(".")
    for size in sizes:
        for start in range(len(elements) - size + 1):
            yield ".".join(elements[start : start + size])
