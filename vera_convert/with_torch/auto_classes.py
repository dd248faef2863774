"""Find the classes of transformers for a config, and the class of an adapter's training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from vera_convert.adapter.adapter import Adapter
from vera_convert.base.model import BaseModel
from vera_convert.verification.model_files import loaders


def classes_of(config: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return the classes that the Auto classes list for a config's type, by name."""
    from transformers.models.auto import modeling_auto

    found: dict[str, Any] = {}
    for name in dir(modeling_auto):
        auto = getattr(modeling_auto, name)
        if name.startswith("AutoModel") and isinstance(auto, type):
            found |= {model.__name__: model for model in _listed_by(auto, config)}
    return found


def _listed_by(auto: Any, config: Any) -> tuple[Any, ...]:  # noqa: ANN401
    mapping = getattr(auto, "_model_mapping", None)
    if mapping is None or type(config) not in mapping:
        return ()
    given = mapping[type(config)]
    return tuple(given) if isinstance(given, (list, tuple)) else (given,)


def trained_on(adapters: Iterable[Adapter], base: BaseModel, config: Any) -> Iterator[str]:  # noqa: ANN401
    """Yield the classes of the training; the config's classes come first.

    The Auto class of a task can list several classes.
    """
    import transformers

    for adapter in adapters:
        described = adapter.config.auto_mapping or {}
        if described.get("base_model_class"):
            yield str(described["base_model_class"])
        (auto,) = loaders("auto_classes").get(adapter.config.task_type or "", [None])
        if auto == "AutoModel" and all(f"{name}.weight" in base.tensors for name in adapter.layers):
            yield from base.class_names  # any class can be trained for features
        if auto is not None:
            names = [model.__name__ for model in _listed_by(getattr(transformers, auto), config)]
            yield from (name for name in base.class_names if name in names)
            yield from names
