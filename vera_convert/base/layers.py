"""Read the linear layers of a model from headers or from a config, for `count`."""

from __future__ import annotations

import os
from pathlib import Path

from vera_convert import rules
from vera_convert.base.model import read_base, read_config_file, read_model_config
from vera_convert.base.quantized.unpack import unpacked
from vera_convert.dtypes import FLOATS
from vera_convert.errors import CheckpointError, UsageError
from vera_convert.files.reading import open_local
from vera_convert.hub.lookup import HubAccess, locate
from vera_convert.targets.architectures import layers_from_config
from vera_convert.targets.linear import ModelLayers, layers_from_shapes
from vera_convert.text import printable


def layers_of_base(model: str, *, revision: str | None, access: HubAccess) -> ModelLayers:
    """Return a model's layers from the headers, or from the config if weights are absent.

    Raises:
        CheckpointError: the model is malformed, or the config's model type is unknown.
        SurroundingsError: finding or reading the model fails.
    """
    location = locate(model, kind="base", access=access, revision=revision)
    try:
        base = read_base(location, access)
    except CheckpointError as error:
        config = read_model_config(location, access)
        if error.findings[0].rule is not rules.BASE_WITHOUT_WEIGHTS or config is None:
            raise
        return layers_from_config(config)
    view = unpacked(base).view
    shapes = {name: tensor.info.shape for name, tensor in view.tensors.items()}
    layers = layers_from_shapes(shapes, model_type=base.model_type)
    dtypes = (view.tensors[f"{module}.weight"].info.dtype for module in layers.linear)
    return layers._replace(dtype=next(filter(FLOATS.__contains__, dtypes), layers.dtype))


def layers_of_config_file(path: Path) -> ModelLayers:
    """Return a model's layers from a ``config.json``.

    Raises:
        CheckpointError: the config is malformed, or the model type is unknown.
        UsageError: the path leads to a folder.
        SurroundingsError: reading the file fails.
    """
    if os.path.isdir(path):  # noqa: PTH112 -- Path's own can raise
        shown = printable(str(path))
        raise UsageError(
            f"--config {shown} is a folder: give the config.json, or the folder with --base."
        )
    with open_local(path) as source:
        return layers_from_config(read_config_file(source))
