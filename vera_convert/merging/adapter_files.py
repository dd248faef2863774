"""Sort the files beside an adapter, and read the facts that the files state about the model.

copied      tokenizer, chat template, generation config, and the modules of sentence-transformers
not merged  weights that another program trained beside the adapter
left out    everything else, such as the adapter's card
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vera_convert import rules
from vera_convert.adapter.folder import module_folders, side_files
from vera_convert.assembly.input_files import InputFile
from vera_convert.base.model import CONFIG_LIMIT, BaseModel
from vera_convert.base.side_files import is_other_weights, tokenizer_files
from vera_convert.errors import CheckpointError, SurroundingsError
from vera_convert.files.file_names import CARD_NAME
from vera_convert.files.reading import open_local
from vera_convert.files.strict_json import read_json
from vera_convert.hub.lookup import Location
from vera_convert.hub.repos import TOKENIZER_LIMIT
from vera_convert.rules import Finding
from vera_convert.text import printable

MODULES_NAME = "modules.json"
"""The file that lists the modules of a sentence-transformers model."""
_ROUTER_NAME = "router_config.json"
"""The file that lists the modules of a router, a model with a transformer for each task."""

_SINGLE = re.compile(
    r"generation_config\.json|chat_template\.(jinja|json)|additional_chat_templates/[^/]+"
    r"|(video_|image_)?(pre)?processor_config\.json|feature_extractor_config\.json"
    r"|config_sentence_transformers\.json|sentence_\w+_config\.json|modules\.json"
)
"""Files that decide how the model is used; each replaces the base's file of the same name."""
_MODULE_FOLDER = re.compile(r"\d+_\w+")
"""The name of a module's folder in sentence-transformers, such as ``1_Pooling``."""
_MOST_LABELS = 100_000


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """The files beside an adapter, and the facts about the trained model in the files.

    Attributes:
        tokenizer: the files of a complete tokenizer.
        copied: the other files to copy.
        unmerged: weights that a merge does not understand.
        not_fetched: files that the merged model needs, too large to be fetched beside an adapter.
        left_out: files outside a model.
        pad_token_id: the token that fills up short texts; None if no file names the token.
        labels: the names of a classifier's labels; empty if no file names labels.
        is_module: whether the folder above lists the adapter as a module.
    """

    tokenizer: Mapping[str, InputFile]
    copied: Mapping[str, InputFile]
    unmerged: tuple[str, ...]
    not_fetched: tuple[str, ...]
    left_out: tuple[str, ...]
    pad_token_id: int | None
    labels: tuple[str, ...]
    is_module: bool

    @property
    def in_model(self) -> dict[str, InputFile]:
        """The files that the merged model takes, by name."""
        return {**self.tokenizer, **self.copied}

    def findings(self, place: str) -> Iterator[Finding]:
        """Yield a warning for each unmerged file and each file too large to fetch."""
        if self.is_module:
            yield rules.MODULES_ABOVE.at(place, "the folder above lists the adapter's folder.")
        yield from unmerged_findings(self.unmerged, place)
        for name in self.not_fetched:
            reason = f"{printable(name)} is too large to be fetched beside an adapter."
            yield rules.FILE_NOT_FETCHED.at(place, reason)

    def unused(self, place: str, written: Mapping[str, InputFile]) -> Iterator[Finding]:
        """Yield a warning for each file of an added adapter that the merged model lacks.

        Args:
            place: the added adapter's name in messages.
            written: the files beside the merged model, by name.
        """
        for name, file in self.in_model.items():
            if name not in written or not _same_bytes(file, written[name]):
                yield rules.FILE_OF_ADDED.at(place, f"{printable(name)} is not copied.")

    def over(self, base: Mapping[str, InputFile]) -> dict[str, InputFile]:
        """Return the files beside the merged model: the base's, with the adapter's in front.

        A tokenizer and the folder of a module are replaced whole.
        """
        folders = {name.partition("/")[0] for name in self.copied if "/" in name}
        replaced = {*(tokenizer_files(base) if self.tokenizer else ())}
        replaced |= {name for name in base if _is_in(folders, name)}
        kept = {name: file for name, file in base.items() if name not in replaced}
        return dict(sorted({**kept, **self.in_model}.items()))


def decides_outputs(name: str, names: Collection[str]) -> bool:
    """Return whether a file decides how the weights beside the file are used.

    Args:
        name: the name of the file.
        names: the names of all files of the folder.
    """
    return name in tokenizer_files(names) or bool(_SINGLE.fullmatch(name)) or "/" in name


def adapter_files(location: Location, base: BaseModel) -> AdapterFiles:
    """Sort the files beside an adapter.

    Args:
        location: the adapter's location, fetched.
        base: the base of the merge.
    """
    folder = location.fetched
    sides = side_files(folder, not_fetched=location.left_out)
    names, stated = sides.copied, _StatedFacts(folder, sides.copied)
    modules = stated.modules
    tokenizer = tokenizer_files(names)
    copied = [
        name
        for name in names
        if name not in tokenizer and (_SINGLE.fullmatch(name) or _is_in(modules, name))
    ]
    unmerged = _unmerged(names, tokenizer, modules)
    # The merge writes a new card for the merged model.
    used = {*tokenizer, *copied, *unmerged, CARD_NAME}
    needed = [
        name
        for name in sides.left_out
        if _is_in(modules, name) or PurePosixPath(name).name == "tokenizer.json"
    ]

    def files(chosen: Collection[str]) -> dict[str, InputFile]:
        return {name: InputFile.look(folder / name, within=folder) for name in chosen}

    return AdapterFiles(
        tokenizer=files(tokenizer),
        copied=files(copied),
        unmerged=unmerged,
        not_fetched=tuple(needed),
        left_out=(
            *(name for name in names if name not in used),
            *(name for name in sides.left_out if name not in needed),
        ),
        pad_token_id=stated.pad_token_id(),
        labels=stated.labels(base),
        is_module=_is_module(location),
    )


def unmerged_weights(location: Location, names: Sequence[str]) -> tuple[str, ...]:
    """Return the weights beside an adapter that neither PEFT nor sentence-transformers reads.

    Args:
        location: the adapter's location, fetched.
        names: the files beside the adapter.
    """
    return _unmerged(names, tokenizer_files(names), _StatedFacts(location.fetched, names).modules)


def _unmerged(
    names: Sequence[str], tokenizer: Collection[str], modules: Collection[str]
) -> tuple[str, ...]:
    return tuple(
        name
        for name in names
        if is_other_weights(name) and name not in tokenizer and not _is_in(modules, name)
    )


def _is_in(folders: Collection[str], name: str) -> bool:
    """Say whether a file lies in one of the folders, or below."""
    return "/" in name and name.partition("/")[0] in folders


def unmerged_findings(names: Sequence[str], place: str) -> Iterator[Finding]:
    """Yield a warning for each file of weights beside an adapter that the result lacks."""
    for name in names:
        yield rules.TRAINED_NOT_MERGED.at(place, f"{printable(name)} is left out.")


def _is_module(location: Location) -> bool:
    """Return whether the folder above is a sentence-transformers model with the module."""
    if location.repo_id is not None:
        above = PurePosixPath(location.subfolder).parent
        lists = {str(above / name) for name in (MODULES_NAME, _ROUTER_NAME)}
        return bool(location.subfolder) and not lists.isdisjoint(location.listed or ())
    folder = location.fetched.resolve()
    return folder.name in _StatedFacts(folder.parent, [MODULES_NAME, _ROUTER_NAME]).listed_modules


def _same_bytes(one: InputFile, other: InputFile) -> bool:
    """Say whether two files have the same bytes; a file that is only planned has only a size."""
    if one.size != other.size or not other.path.is_absolute():
        return one.size == other.size
    return one.same_bytes(other, one.size)


@dataclass(frozen=True, slots=True)
class _StatedFacts:
    """Facts about the trained model that the files of a folder state.

    Attributes:
        folder: the folder.
        names: the files of the folder.
    """

    folder: Path
    names: Collection[str]

    def _json(self, name: str, limit: int = CONFIG_LIMIT) -> object:
        """Return the value of a file; None if the file is missing or malformed."""
        if name in self.names:
            with (
                suppress(CheckpointError, SurroundingsError),
                open_local(self.folder / name, within=self.folder) as source,
            ):
                return read_json(source, limit=limit, pythons_numbers=True)[0]
        return None

    def _object(self, name: str) -> dict[str, object]:
        """Return the members of a file of the tokenizer; empty if the file holds no object."""
        found = self._json(name, TOKENIZER_LIMIT)
        return found if isinstance(found, dict) else {}

    @property
    def listed_modules(self) -> list[object]:
        """The folders that the lists of a sentence-transformers model name."""
        router = self._json(_ROUTER_NAME)
        types = router.get("types") if isinstance(router, dict) else None
        routed = types if isinstance(types, dict) else {}
        return [*(entry.get("path") for entry in _objects(self._json(MODULES_NAME))), *routed]

    @property
    def modules(self) -> frozenset[str]:
        """The folders of the modules of sentence-transformers."""
        listed, configured = self.listed_modules, module_folders(self.names)
        folders = {name.partition("/")[0] for name in self.names if "/" in name}
        return frozenset(
            each
            for each in folders
            if each in listed or (each in configured and _MODULE_FOLDER.fullmatch(each))
        )

    def labels(self, base: BaseModel) -> tuple[str, ...]:
        """Return the names of a classifier's labels, if a config names the labels."""
        config = self._json("config.json")
        if not isinstance(config, dict) or config.get("model_type") != base.model_type:
            return ()
        named = config.get("id2label")
        if not isinstance(named, dict) or len(named) > _MOST_LABELS:
            return ()
        found = [named.get(str(number)) for number in range(len(named))]
        labels = tuple(each for each in found if isinstance(each, str))
        return labels if len(labels) == len(found) == len({*labels}) else ()

    def pad_token_id(self) -> int | None:
        """Return the id of a tokenizer's padding token; None if no file names the token."""
        settings = self._object("tokenizer_config.json")
        token = settings.get("pad_token") or self._object("special_tokens_map.json").get(
            "pad_token"
        )
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            ids = self._ids(token, settings)
        else:
            ids = iter([self._object("config.json").get("pad_token_id")])
        return next((each for each in ids if type(each) is int and each >= 0), None)

    def _ids(self, token: str, settings: Mapping[str, object]) -> Iterator[object]:
        """Yield the ids that the files of a tokenizer give to a token, the best source first."""
        decoder = settings.get("added_tokens_decoder")
        for number, entry in (decoder if isinstance(decoder, dict) else {}).items():
            if isinstance(entry, dict) and entry.get("content") == token and number.isdecimal():
                yield int(number[:20])
        yield self._object("added_tokens.json").get(token)
        tokenizer = self._object("tokenizer.json")
        for entry in _objects(tokenizer.get("added_tokens")):
            if entry.get("content") == token:
                yield entry.get("id")
        model = tokenizer.get("model")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(vocabulary, dict):
            yield vocabulary.get(token)
        for number, entry in enumerate(vocabulary if isinstance(vocabulary, list) else []):
            if isinstance(entry, list) and entry[:1] == [token]:
                yield number
        yield self._object("vocab.json").get(token)


def _objects(value: object) -> list[dict[str, object]]:
    """Return the objects of a JSON list; empty for any other value."""
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []
