"""Adapters written in PEFT's format, all of a model or none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from vera_convert.adapter.config import CONFIG_NAME, VeraConfig
from vera_convert.adapter.folder import AdapterContent, is_vera, write_adapter
from vera_convert.adapter.tensors import WEIGHTS_NAME
from vera_convert.files.tensorfile import from_array
from vera_convert.publish.publishing import staged_folder
from vera_convert.with_torch.arrays import to_array

DEFAULT = "default"
"""The adapter that lies in the folder itself."""


def config_text(config: VeraConfig) -> bytes:
    """Return the bytes of ``adapter_config.json`` as PEFT writes them.

    ``peft_version`` is left out where the config has none: it names the PEFT that wrote a file.
    """
    document = {**asdict(config), "peft_type": "VERA", "inference_mode": True}
    if config.peft_version is None:
        del document["peft_version"]
    return json.dumps(document, indent=2, sort_keys=True).encode()


def write_adapters(
    out: Path, adapters: Mapping[str, tuple[VeraConfig, Mapping[str, Tensor]]], *, force: bool
) -> None:
    """Write adapters as PEFT does, all or none, and compare what came to lie on the disk.

    Args:
        out: the folder; `DEFAULT` goes into it, each other adapter into a subfolder of its name.
        adapters: by name, the config and the tensors by the names that they get in the file.
        force: replace a folder that holds nothing but adapters.

    Raises:
        UsageError: `out` exists and may not be replaced.
        SurroundingsError: the disk fails.
    """
    with staged_folder(out, force=force, is_own=_holds_adapters_only) as staging:
        for name, (config, tensors) in adapters.items():
            folder = staging if name == DEFAULT else staging / name
            folder.mkdir(exist_ok=True)
            content = AdapterContent(
                tensors=[from_array(key, to_array(tensor)) for key, tensor in tensors.items()],
                metadata={"format": "pt"},
                config_text=config_text(config),
                folder=folder,
                not_fetched=(),
                check_unchanged=lambda: None,
            )
            write_adapter(content, folder)


def _holds_adapters_only(folder: Path) -> bool:
    """Whether a folder holds what `write_adapters` writes and nothing else."""
    names = {CONFIG_NAME, WEIGHTS_NAME}
    return all(
        entry.name in names or (entry.is_dir() and is_vera(entry) and _holds_adapters_only(entry))
        for entry in folder.iterdir()
    )
