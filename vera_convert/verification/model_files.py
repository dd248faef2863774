"""Check the files of a merged model that decide how a loader reads its tensors.

files     a file that is loaded instead of the weights, an adapter, the weights in another format
config    equal to the base's, except fields that a merge or transformers changes
tie       whether head and embedding share a tensor
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from vera_convert import rules
from vera_convert.assembly.input_files import InputFile
from vera_convert.base.model import BaseModel
from vera_convert.base.quantized.recognize import CONFIG_FIELDS
from vera_convert.base.side_files import ModelFiles
from vera_convert.base.tied import SCALE, SCALED_BY_A_FIELD, always_ties_stacks, scales_logits
from vera_convert.files.file_names import CONFIG_NAME
from vera_convert.files.shards import named_weights
from vera_convert.merging.adapter_files import decides_outputs
from vera_convert.merging.base_files import BaseFiles, own_heads
from vera_convert.merging.changes import Changes
from vera_convert.merging.inputs import MergeInputs
from vera_convert.merging.model_config import ConfigEdits, label_count
from vera_convert.rules import Finding
from vera_convert.tables import table
from vera_convert.text import and_more, listed, printable

_MOST_NAMED = 8


def loaders(section: str) -> Mapping[str, Sequence[str]]:
    """Return facts about the loaders of models, by name: see ``model_files.toml``."""
    facts = table(__file__, "model_files.toml")[section]
    return {name: words.split() for name, words in facts.items()}


# --- files ---------------------------------------------------------------------------------------


def file_findings(names: Collection[str], model: BaseModel, sides: ModelFiles) -> Iterator[Finding]:
    """Yield findings for files that do not belong into a merged model's folder.

    Args:
        names: all files of the folder.
        model: the merged model.
        sides: the other files of the folder, by kind.
    """
    place = model.location.label
    taken = _taken_before(names, model)
    for name in taken:
        reason = f"a loader reads {printable(name)} instead of {printable(_own(model))}."
        yield rules.LOADED_INSTEAD.at(place, reason)
    config = model.prefix + CONFIG_NAME
    if config in names:
        yield rules.ADAPTER_IN_MERGED.at(place, f"there is {printable(config)}.")
    others = [name for name in sides.other_weights if name not in taken]
    others += [name for name in sides.adapter if config not in names]
    if others:
        yield rules.MERGED_OTHER_WEIGHTS.at(place, f"there is {_some(others)}.")
    # The stray files above are errors; the others are warnings.
    strays = tuple(name for name in model.strays if name not in taken)
    yield from replace(model, strays=strays).findings


def _taken_before(names: Collection[str], model: BaseModel) -> list[str]:
    """Return the files that a loader reads instead of the files read here."""
    if named_weights(model.config) is not None:
        return []  # the config names the files that were read
    is_diffusers = bool(model.prefix) or "_class_name" in model.config
    library = "diffusers" if is_diffusers else "transformers"
    order = [model.prefix + name for name in loaders("weights")[library]]
    own = _own(model)
    earlier = order[: order.index(own)] if own in order else order
    return [name for name in earlier if name in names and [*model.files] != [name]]


def _own(model: BaseModel) -> str:
    return model.index if model.index is not None else next(iter(model.files), "")


def _some(names: Collection[str]) -> str:
    return listed(names, _MOST_NAMED)


def copied_findings(
    model: BaseModel, names: Collection[str], wanted: Mapping[str, InputFile]
) -> Iterator[Finding]:
    """Yield a finding for each file of other bytes than the merge copies, or without a copy.

    Files without effect on outputs, like a license, may differ. Files that were not fetched are
    not compared.

    Args:
        model: the merged model.
        names: all files of the folder.
        wanted: the files that the merge copies, by name.
    """
    folder, place = model.location.fetched, model.location.label
    for name, file in wanted.items():
        if not decides_outputs(name, wanted):
            continue
        if name not in names:
            yield rules.MERGED_FILE_DIFFERS.at(place, f"{printable(name)} is missing.")
        elif (folder / name).exists():
            own = InputFile.look(folder / name, within=folder)
            if own.size != file.size or not own.same_bytes(file, own.size):
                yield rules.MERGED_FILE_DIFFERS.at(place, f"{printable(name)} has other bytes.")


# --- the config ----------------------------------------------------------------------------------

_LABELS = ("id2label", "label2id", "num_labels")


@dataclass(frozen=True, slots=True)
class _Difference:
    """A field with another value than the merge writes; None stands for a missing field."""

    path: tuple[str, ...]
    wanted: object
    found: object

    def __str__(self) -> str:
        found, wanted = (
            "missing" if each is None else printable(str(each)[:60])
            for each in (self.found, self.wanted)
        )
        return f"{printable('.'.join(self.path))} is {found} instead of {wanted}"

    @property
    def is_default(self) -> bool:
        """Whether only the merged model has the field, and the value is null, false, 0 or empty."""
        return self.wanted is None and not self.found

    @property
    def decides(self) -> bool:
        """Whether both values are known, and the value changes the computation."""
        config = loaders("config")
        if self.wanted is None or self.found is None or self.path[-1] in config["renamed"]:
            return False
        return any(re.fullmatch("|".join(config["decides"]), name) for name in self.path)


def config_findings(
    model: BaseModel, inputs: MergeInputs, edits: ConfigEdits, *, is_copied: bool
) -> Iterator[Finding]:
    """Yield how the config of a merged model differs from the base's.

    A merge by vera-convert copies the config and changes only the fields that the adapters
    require, so any other difference is an error. transformers saves other sets of fields; there,
    only a different value for a field that changes the computation is an error.

    Args:
        model: the merged model.
        inputs: the base and the adapters of the merge.
        edits: the changes that the adapters require.
        is_copied: whether vera-convert wrote the config.
    """
    base, tasks = inputs.base.model, [each.adapter.config.task_type for each in inputs.adapters]
    place = f"{model.location.label}/config.json"
    if not base.config:
        return
    if not model.config:
        reason = "it is missing or empty, so no loader knows the model of the weights."
        yield rules.MERGED_CONFIG_DIFFERS.at(place, reason)
        return
    free = {*loaders("config")["free"], *(CONFIG_FIELDS if inputs.base.packed is not None else ())}
    expected, found_config = edits.of_value(base.config), dict(model.config)
    if base.model_type in SCALED_BY_A_FIELD and not is_copied:
        # transformers 5 adds the field to a config without the field.
        expected.setdefault(SCALE, scales_logits(base))
        found_config[SCALE] = scales_logits(model)
    found = [
        each for each in _differences(expected, found_config, free) if each.path not in edits.open
    ]
    other_labels = label_count(model.config) != label_count(expected)
    if edits.sets_labels and not other_labels and not inputs.options.labels:
        found = [each for each in found if each.path[0] not in _LABELS]
    wrong = [
        each
        for each in found
        if is_copied
        or (edits.sets_labels and other_labels and each.path[0] in _LABELS)
        or each.decides
        or _is_of_another_task(each, tasks)
    ]
    if wrong:
        yield rules.MERGED_CONFIG_DIFFERS.at(place, f"{_listed(wrong)}.")
    rest = [each for each in found if each not in wrong and not each.is_default]
    if rest:
        yield rules.MERGED_CONFIG_RESAVED.at(
            place, f"{_some(['.'.join(e.path) for e in rest])} differ."
        )


def _differences(
    wanted: Mapping[str, object],
    found: Mapping[str, object],
    free: Collection[str],
    path: tuple[str, ...] = (),
) -> Iterator[_Difference]:
    for name in dict.fromkeys((*wanted, *found)):
        one, other = wanted.get(name), found.get(name)
        if name in free or one is other or one == other:  # NaN is only identical, never equal
            continue
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _differences(one, other, free, (*path, name))
        else:
            yield _Difference((*path, name), one, other)


def _is_of_another_task(difference: _Difference, tasks: Collection[str | None]) -> bool:
    """Return whether the named class fits none of the adapters' task types."""
    if difference.path != ("architectures",) or difference.wanted is None or None in tasks:
        return False
    found = difference.found if isinstance(difference.found, list) else []
    ends = tuple(end for task in tasks for end in loaders("classes").get(task or "", [""]))
    return bool(found) and not any(str(name).endswith(ends) for name in found)


def _listed(differences: Collection[_Difference]) -> str:
    return "; ".join(map(str, islice(differences, 3))) + and_more(len(differences) - 3)


# --- head and embedding --------------------------------------------------------------------------


def tie_findings(
    merged: BaseFiles, base: BaseModel, changes: Changes, *, is_ours: bool
) -> Iterator[Finding]:
    """Yield a finding if a loader would wrongly tie, or not tie, head and embedding.

    Args:
        merged: the merged model.
        base: the base.
        changes: the changes that the adapters make to the base.
        is_ours: whether vera-convert wrote the merged model.
    """
    wanted = False if changes.unties else base.tie_word_embeddings
    found = merged.model.tie_word_embeddings
    place = f"{merged.model.location.label}/config.json"
    is_kept = changes.unties and changes.keeps_scale
    if not is_ours and not wanted and always_ties_stacks(merged.model) and (is_kept or found):
        # transformers 5 saves such a config: it ties what is stored once, and scales by a field.
        yield from _read_otherwise(merged, place)
        return
    is_known = changes.unties or None not in (wanted, found)
    if is_known and found != wanted:
        value = "missing" if found is None else str(found).lower()
        reason = f"tie_word_embeddings is {value} instead of {str(wanted).lower()}."
        yield rules.MERGED_TIE.at(place, reason)
    elif wanted is None and found:
        for head in own_heads(merged):
            reason = (
                f"tie_word_embeddings is true, the base does not set the field, and "
                f"{printable(head)} differs from the embedding."
            )
            yield rules.MERGED_TIE.at(place, reason)


def _read_otherwise(merged: BaseFiles, place: str) -> Iterator[Finding]:
    """Yield a warning that transformers 4 computes other outputs with a model of transformers 5."""
    if merged.model.tie_word_embeddings is False:
        reason = "transformers 4 does not multiply the decoder's output by d_model^-0.5, because "
        reason += (
            f"it reads tie_word_embeddings (false) alone. transformers 5 reads {SCALE} (true)."
        )
        yield rules.MERGED_FOR_TRANSFORMERS_5.at(place, reason)
        return
    for head in own_heads(merged):
        reason = f"transformers 4 ties {printable(head)} to the embedding, because "
        reason += "tie_word_embeddings is not false. transformers 5 loads the stored head."
        yield rules.MERGED_FOR_TRANSFORMERS_5.at(place, reason)
