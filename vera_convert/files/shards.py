"""Find the weight files of a model's folder, from the file names and the index."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from vera_convert import rules
from vera_convert.errors import CheckpointError, refuse
from vera_convert.files.file_names import CONFIG_NAME, clean_name, is_pickle
from vera_convert.rules import Finding
from vera_convert.text import and_more, listed, printable

PIPELINE = "model_index.json"
"""A file in the root of a diffusers pipeline, whose components are folders."""
_MAIN_COMPONENT = re.compile(r"(transformer|unet)(_\d+)?/")
"""The components of a pipeline to use if the adapter fits several."""
REDIRECTION = "transformers_weights"
"""The field of a config that names the file or the index of the weights."""

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
_USUAL = tuple(
    stem + suffix
    for stem in ("model", "diffusion_pytorch_model")
    for suffix in (INDEX_SUFFIX, SUFFIX)
)
"""The names of weights in transformers and diffusers, in the order of preference."""
_OTHER_FORMATS = (".gguf", ".onnx", ".h5", ".msgpack", ".ot", ".tflite", ".npz", ".pte", ".mlmodel")
_VARIANT = re.compile(
    r"(?:model|diffusion_pytorch_model)\.([^.-]+)(?:-\d{1,9}-of-\d{1,9})?"
    r"\.safetensors(?:\.index\.json)?",
    re.ASCII,
)
"""A file of a variant, such as ``fp16``, as transformers and diffusers name the file."""
_MISTRAL = re.compile(r"consolidated[.-].*")
"""The names that Mistral's own programs give to weight files."""
_TRAINING = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")
_SHARD = re.compile(r".*-\d{1,9}-of-(\d{1,9})\.safetensors", re.ASCII)


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The weight files of a model.

    Attributes:
        prefix: the component's folder inside a pipeline, such as ``transformer/``; else empty.
        index: the index of the shards, with the prefix; None if there is a single file.
        single: the single file, with the prefix; None if there is an index.
    """

    prefix: str
    index: str | None
    single: str | None

    @classmethod
    def of(cls, file: str, prefix: str = "") -> WeightFiles:
        """Return the weights behind a file, which is an index or the single file."""
        is_index = file.endswith(INDEX_SUFFIX)
        return cls(prefix, file if is_index else None, None if is_index else file)


def component_folders(names: Collection[str]) -> tuple[str, ...]:
    """Return the folders of a pipeline's components that have weights, sorted, each with a `/`.

    The result is empty if the folder is not a pipeline.
    """
    if PIPELINE not in names:
        return ()
    found = {name[: name.index("/") + 1] for name in names if name.endswith(SUFFIX) and "/" in name}
    return tuple(sorted(found))


def kind_of_component(folder: str) -> str:
    """Return a component's folder without the number: ``transformer`` for ``transformer_2/``."""
    return re.sub(r"_\d+$", "", folder.rstrip("/"))


def find_weights(
    names: Collection[str], *, place: str, component: str = "", named: str | None = None
) -> WeightFiles:
    """Find the index or the single file of a model; an index takes precedence.

    Args:
        names: all files, relative to the folder, with `/`.
        place: the folder's name for messages.
        component: the folder of the wanted component of a pipeline; empty if unknown.
        named: the file in the model's config, which transformers takes before all others.

    Raises:
        CheckpointError: no safetensors weights, or several candidates.
    """
    if named is not None:
        return _named(named, names, place=place)
    prefix = component or _main_component(names, place)
    top = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    top = {name for name in top if "/" not in name}
    usual = next((name for name in _USUAL if name in top), None)
    if usual is not None:
        return WeightFiles.of(prefix + usual, prefix)
    indexes = sorted(name for name in top if name.endswith(INDEX_SUFFIX))
    singles = sorted(
        name for name in top if name.endswith(SUFFIX) and not name.startswith("adapter_model")
    )
    if not singles and not indexes:
        paths = () if prefix else map(PurePosixPath, names)
        below = sorted({str(path.parent) for path in paths if path.name in _USUAL} - {"."})
        raise CheckpointError(_why_none(top, place + "/" + prefix if prefix else place, below))
    other_loader = _for_other_loaders(top, indexes or singles, place=place)
    if other_loader is not None:
        raise CheckpointError(other_loader)
    if len(indexes) == 1:
        return WeightFiles.of(prefix + indexes[0], prefix)
    lone = _SHARD.fullmatch(singles[0]) if len(singles) == 1 else None
    if indexes or len(singles) > 1 or (lone is not None and int(lone[1]) != 1):
        found = ", ".join(map(printable, (indexes or singles)[:3]))
        found += ", …" if len(indexes or singles) > 3 else ""
        reason = f"there is {found}, and no index for all."
        raise CheckpointError(rules.BASE_AMBIGUOUS.at(place, reason))
    return WeightFiles.of(prefix + singles[0], prefix)


def _for_other_loaders(top: Collection[str], found: Sequence[str], *, place: str) -> Finding | None:
    """Return the finding about files that loaders take only on request, or None.

    Args:
        top: all files of the folder.
        found: the indexes, or the weight files if there is no index.
        place: the folder's name for messages.
    """
    if all(map(_MISTRAL.fullmatch, found)):
        reason = f"there is {listed(found, 1)}, and no model.safetensors."
        return rules.BASE_FOR_MISTRAL.at(place, reason)
    if not all(map(_VARIANT.fullmatch, found)):
        return None
    variants = sorted({match[1] for name in top if (match := _VARIANT.fullmatch(name))})
    names = " and ".join(f'"{printable(variant)}"' for variant in variants[:3])
    said = f"only the variant {names}" if len(variants) == 1 else f"only the variants {names}"
    return rules.BASE_ONLY_VARIANT.at(place, f"there is {said}: {listed(found, 1)}.")


def named_weights(config: Mapping[str, object]) -> str | None:
    """Return the file or index that a model's config names; None if the config names nothing.

    transformers accepts only safetensors files in this field; diffusers ignores the field.
    """
    found = config.get(REDIRECTION)
    is_followed = isinstance(found, str) and found.endswith((SUFFIX, INDEX_SUFFIX))
    return str(found) if is_followed and "_class_name" not in config else None


def _named(named: str, names: Collection[str], *, place: str) -> WeightFiles:
    """Return the file or index in a config."""
    file = str(clean_name(named, place=f"{place}/config.json"))
    if file not in names:
        raise CheckpointError(rules.SHARD_MISSING.at(place, f"{printable(file)} is not there."))
    return WeightFiles.of(file)


def _main_component(names: Collection[str], place: str) -> str:
    found = [folder for folder in component_folders(names) if _MAIN_COMPONENT.fullmatch(folder)]
    if len(found) > 1:
        reason = f"the pipeline has {listed(found)}."
        raise CheckpointError(rules.BASE_AMBIGUOUS.at(place, reason))
    return found[0] if found else ""


def _why_none(top: Collection[str], place: str, below: Sequence[str]) -> Finding:
    """Return the finding about a folder without safetensors weights."""
    if CONFIG_NAME in top:
        return rules.BASE_IS_ADAPTER.at(place, f"there is {CONFIG_NAME} and no model.")
    pickled = sorted(name for name in top if is_pickle(name) and not name.startswith(_TRAINING))
    if pickled:
        reason = f"there is {printable(pickled[0])} and no safetensors file."
        return rules.BASE_PICKLED.at(place, reason)
    other = sorted(name for name in top if name.lower().endswith(_OTHER_FORMATS))
    if other:
        return rules.BASE_OTHER_FORMAT.at(place, f"there is {printable(other[0])}.")
    if below:
        reason = f"the weights lie in {listed(below)}: pass {place}/{printable(below[0])}."
    else:
        reason = "there is no model.safetensors and no index."
    return rules.BASE_WITHOUT_WEIGHTS.at(place, reason)


def read_weight_map(document: object, index: str, *, place: str) -> dict[str, str]:
    """Return the file of each tensor, by name in the model's folder.

    Args:
        document: the parsed index.
        index: the index's name; shards are named relative to the index's folder.
        place: the index's name for messages.

    Raises:
        CheckpointError: no map of names to clean names of safetensors files.
    """
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(rules.INDEX_MALFORMED.at(place, "weight_map is missing or empty."))
    folder = PurePosixPath(index).parent
    files: dict[object, str] = {}
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(SUFFIX):
            reason = f'"{printable(tensor)}" stands for another kind of file than safetensors.'
            raise CheckpointError(rules.INDEX_MALFORMED.at(place, reason))
        if file not in files:
            files[file] = str(folder / clean_name(file, place=place))
    return {tensor: files[file] for tensor, file in weight_map.items()}


def require_shards(files: Collection[str], names: Collection[str], *, place: str) -> None:
    """Raise `CheckpointError` with each file of an index that is missing in `names`."""
    missing = sorted(set(files).difference(names))
    reasons = (f"{printable(file)} is not there." for file in missing[:50])
    refuse(rules.SHARD_MISSING.at(place, reason) for reason in reasons)


def stray_weights(
    names: Collection[str], weights: WeightFiles, files: Collection[str]
) -> tuple[str, ...]:
    """Return the safetensors files that a loader could mistake for the model's, sorted.

    Files of an adapter, or of another component with a config, are left out.
    """
    configs = ("config.json", CONFIG_NAME)
    folders = {str(PurePosixPath(name).parent) for name in names if name.endswith(configs)}
    own = weights.prefix.rstrip("/") or "."

    def could_be_taken(name: str) -> bool:
        path = PurePosixPath(name)
        between = [str(folder) for folder in path.parents if str(folder) not in (own, ".")]
        below = name.startswith(weights.prefix) or "/" not in name
        return below and not path.name.startswith("adapter_model") and not folders & {*between}

    loose = (name for name in names if name.endswith(SUFFIX) and name not in files)
    return tuple(sorted(filter(could_be_taken, loose)))


def index_findings(
    weight_map: Mapping[str, str], shards: Mapping[str, Collection[str]], *, place: str
) -> list[Finding]:
    """Compare an index with the tensors in the shards.

    Args:
        weight_map: the index: file by tensor.
        shards: the names of the tensors by file.
        place: the name of the model in messages.

    Returns:
        One finding for each kind of difference, with the first tensor and the number of others.
    """
    files_of: dict[str, list[str]] = {}
    for file, tensors in shards.items():
        for tensor in tensors:
            files_of.setdefault(tensor, []).append(file)
    groups = {
        rules.TENSOR_NOT_IN_SHARD: [name for name in weight_map if name not in files_of],
        rules.TENSOR_MISPLACED: [
            name for name, file in weight_map.items() if file not in files_of.get(name, [file])
        ],
        rules.TENSOR_NOT_IN_INDEX: [name for name in files_of if name not in weight_map],
        rules.TENSOR_IN_TWO_SHARDS: [name for name, files in files_of.items() if len(files) > 1],
    }
    found = []
    for rule, names in groups.items():
        if names:
            first = f'"{printable(names[0])}"{and_more(len(names) - 1)}'
            found.append(rule.at(place, f"{first}{_where(names[0], weight_map, files_of)}."))
    return found


def _where(tensor: str, weight_map: Mapping[str, str], files_of: Mapping[str, list[str]]) -> str:
    """Return where the index puts a tensor, and which files hold the tensor."""
    places = []
    if tensor in weight_map:
        places.append(f"which the index puts into {printable(weight_map[tensor])}")
    if tensor in files_of:
        places.append(f"which lies in {listed(files_of[tensor])}")
    return f", {', and '.join(places)}" if places else ""
