"""Write the adapters of a model in PEFT's format, all or none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from vera_convert.adapter.config import VeraConfig
from vera_convert.adapter.folder import AdapterContent, is_vera, write_adapter
from vera_convert.errors import UsageError
from vera_convert.files.file_names import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME
from vera_convert.files.tensorfile import from_array
from vera_convert.publish.filesystem import is_empty
from vera_convert.publish.publishing import Output, explained, updated_folder
from vera_convert.with_torch.arrays import to_array

DEFAULT = "default"
"""The name of the adapter in the folder itself."""


def config_text(config: VeraConfig) -> bytes:
    """Return the bytes of ``adapter_config.json`` as PEFT writes the file.

    ``peft_version`` names the PEFT that wrote a file, and is never added to a config.
    """
    document = {**asdict(config), "peft_type": "VERA", "inference_mode": True}
    if config.peft_version is None:
        del document["peft_version"]
    return json.dumps(document, indent=2, sort_keys=True, default=_listed).encode()


def _listed(value: object) -> list[object]:
    """Return a set of names as a list; PEFT accepts sets."""
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    raise UsageError(
        f"the config holds an object of the class {type(value).__name__}, which no "
        "adapter_config.json can hold: give texts, numbers and lists."
    )


def write_adapters(
    out: Path,
    adapters: Mapping[str, tuple[VeraConfig, Mapping[str, Tensor]]],
    *,
    force: bool,
    update: bool,
) -> None:
    """Write adapters as PEFT does, and read the files back.

    Args:
        out: the folder for the adapter `DEFAULT`; each other adapter gets a subfolder of its name.
            Missing parents are made.
        adapters: by name, the config and the tensors by their names in the file.
        force: replace a folder that holds only adapters, and keep its README.md.
        update: replace files of the same names, one by one, and keep all others; otherwise the
            complete folder appears at once, or not at all.

    Raises:
        UsageError: `out` exists and must not be replaced.
        SurroundingsError: the disk fails.
    """
    with explained(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    if update:
        for name in adapters:
            with updated_folder(out if name == DEFAULT else out / name) as staging:
                _write_adapter(staging, *adapters[name])
        return
    empty = _is_empty(out)
    with Output(out, _holds_adapters_only, force=force or empty).staged() as staging:
        for name, contents in adapters.items():
            folder = staging if name == DEFAULT else staging / name
            folder.mkdir(exist_ok=True)
            _write_adapter(folder, *contents)
        if not empty and (card := out / CARD_NAME).is_file():
            shutil.copyfile(card, staging / CARD_NAME)


def _write_adapter(folder: Path, config: VeraConfig, tensors: Mapping[str, Tensor]) -> None:
    content = AdapterContent(
        tensors=[from_array(key, to_array(tensor)) for key, tensor in tensors.items()],
        metadata={"format": "pt"},
        config_text=config_text(config),
        folder=folder,
        not_fetched=(),
        check_unchanged=lambda: None,
    )
    write_adapter(content, folder)


def _is_empty(out: Path) -> bool:
    return out.is_dir() and not out.is_symlink() and is_empty(out)


def _holds_adapters_only(folder: Path) -> bool:
    """Return whether a folder holds only files that `write_adapters` and PEFT write."""
    names = {CONFIG_NAME, WEIGHTS_NAME, CARD_NAME}
    return all(
        entry.name in names or (entry.is_dir() and is_vera(entry) and _holds_adapters_only(entry))
        for entry in folder.iterdir()
    )
