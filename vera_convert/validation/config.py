"""Check a well-formed config for values that some releases or users cannot use."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from vera_convert import rules
from vera_convert.adapter.config import VeraConfig
from vera_convert.adapter.saved_modules import SavedModules, replaced_name
from vera_convert.embeddings import may_be_resized
from vera_convert.files.file_names import CONFIG_NAME
from vera_convert.files.tensorfile import TensorData
from vera_convert.hub.repo_name import is_repo_id, is_revision
from vera_convert.rules import Finding
from vera_convert.text import printable

_COPY_IS_FINE = "No action is needed: PEFT stores the base's weight of an adapted head."


def config_findings(config: VeraConfig, unsound: Collection[str]) -> Iterator[Finding]:
    """Yield findings for the base's name, and for fields rejected by some releases.

    Args:
        config: the config.
        unsound: the names of fields already reported as wrong.
    """
    name = config.base_model_name_or_path
    if {"base_model_name_or_path", "revision"} & {*unsound}:
        pass
    elif not name:
        yield rules.BASE_UNNAMED.in_file(CONFIG_NAME, "base_model_name_or_path is empty.")
    elif not is_repo_id(name):
        reason = f"base_model_name_or_path is {printable(name)}, which is not a repo on the Hub."
        yield rules.BASE_IS_PATH.in_file(CONFIG_NAME, reason)
    elif config.revision is not None and not is_revision(config.revision):
        reason = f"revision is {printable(config.revision)}, which is not a valid revision in git."
        yield rules.REVISION_INVALID.in_file(CONFIG_NAME, reason)
    elif config.revision is None:
        yield rules.REVISION_MISSING.in_file(CONFIG_NAME, f"revision is null; the base is {name}.")
    for reason in _by_version(config):
        yield rules.FIELD_BY_VERSION.in_file(CONFIG_NAME, reason)


def _by_version(config: VeraConfig) -> Iterator[str]:
    if isinstance(config.layers_pattern, tuple) and config.layers_pattern:
        yield "layers_pattern is a list; PEFT 0.13 and earlier accept only a text."
    if config.layers_pattern and config.layers_to_transform in (0, ()):
        yield (
            "layers_to_transform is 0 or empty, with a layers_pattern; PEFT 0.14 to 0.20 read this "
            "as missing and refuse the adapter."
        )
    if config.bias not in ("none", "all", "vera_only"):
        yield (
            f"bias is {printable(config.bias)}; PEFT before 0.18 accepts only none, all and "
            "vera_only."
        )


def undeclared_embeddings(
    config: VeraConfig, replacements: Iterable[TensorData]
) -> Iterator[Finding]:
    """Yield a note for each saved embedding or head missing in the config.

    Args:
        config: the config.
        replacements: the tensors in place of the base's tensors.
    """
    saved = SavedModules(config)
    for tensor in replacements:
        module, _, parameter = replaced_name(tensor.name).rpartition(".")
        if parameter == "weight" and may_be_resized(module) and not saved.of(module):
            reason = f"it replaces {printable(replaced_name(tensor.name))} of the base model."
            found = rules.EMBEDDING_UNDECLARED.in_tensor(tensor.name, reason)
            is_copy = ".base_layer." in tensor.name
            yield found.with_remedy(_COPY_IS_FINE) if is_copy else found
