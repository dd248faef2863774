"""Compare the tables of the engines' classes with the installed engines.

If a table lacks names or has too many, the failed assertion shows these names.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import pkgutil
import typing
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from vera_convert.lora import pipeline_component
from vera_convert.lora.engines import EngineName, engines

# --- Diffusers -----------------------------------------------------------------------------------


def pipelines() -> Iterator[type[Any]]:
    """Return every pipeline class of Diffusers."""
    diffusers = pytest.importorskip("diffusers")
    for found in pkgutil.walk_packages(diffusers.pipelines.__path__, "diffusers.pipelines."):
        with suppress(Exception):  # some pipelines need further packages
            module = importlib.import_module(found.name)
            for each in vars(module).values():
                is_pipeline = inspect.isclass(each) and issubclass(
                    each, diffusers.DiffusionPipeline
                )
                if is_pipeline and each.__module__ == module.__name__:
                    yield each


def classes_in(annotation: Any) -> Iterator[type[Any]]:
    """Return the classes in the annotation of a parameter, which may be a union."""
    if inspect.isclass(annotation):
        yield annotation
    for part in typing.get_args(annotation):
        yield from classes_in(part)


def test_the_table_of_pipelines_without_a_loader_equals_diffusers() -> None:
    loaders = pytest.importorskip("diffusers.loaders")
    base = importlib.import_module("diffusers.loaders.lora_base").LoraBaseMixin
    found = set()
    for pipeline in pipelines():
        components = [
            kind
            for name, annotation in typing.get_type_hints(pipeline.__init__).items()
            for kind in classes_in(annotation)
            if name != "vae"
        ]
        takes_one = any(
            issubclass(kind, loaders.PeftAdapterMixin) or kind.__name__.startswith("CLIPTextModel")
            for kind in components
        )
        if takes_one and not issubclass(pipeline, base):
            found.add(pipeline.__name__.removesuffix("Pipeline"))
    assert found == {*pipeline_component.diffusers()["pipelines"].split()}


def test_the_table_of_components_without_a_loader_equals_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    for name in pipeline_component.diffusers()["components"].split():
        kind = getattr(diffusers, name)
        assert not issubclass(kind, diffusers.loaders.PeftAdapterMixin), name


# --- vLLM ----------------------------------------------------------------------------------------

OUTSIDE = {"Module", "Protocol"}
"""The classes of Python and PyTorch from which vLLM's models inherit."""


def registered(registry: Path) -> Iterator[tuple[str, str, str]]:
    """Return module and class of each architecture in vLLM's registry, except draft models."""
    for node in ast.parse(registry.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            table = ast.unparse(node.targets[0])
            if not table.endswith("_MODELS") or "SPECULATIVE" in table:
                continue
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                if key is not None and isinstance(value, ast.Tuple):
                    module, name = ast.literal_eval(value)[:2]
                    inside = module if "." in module else f"vllm.model_executor.models.{module}"
                    yield ast.literal_eval(key), inside, name


def bases_of_classes(root: Path) -> dict[str, dict[str, list[str]]]:
    """Return the names of the base classes of vLLM's models, by module and class."""
    found: dict[str, dict[str, list[str]]] = {}
    for folder in ("model_executor/models", "models"):
        for path in (root / folder).rglob("*.py"):
            module = ".".join(("vllm", *path.relative_to(root).with_suffix("").parts))
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ClassDef):
                    names = [ast.unparse(each).split("[")[0].split(".")[-1] for each in node.bases]
                    found.setdefault(node.name, {})[module] = names
    return found


def test_the_table_of_architectures_that_vllm_refuses_equals_its_registry() -> None:
    """Read vLLM's models as text, because an import would need all of vLLM's requirements."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    root = Path(spec.origin).parent
    bases = bases_of_classes(root)

    def ancestors(name: str, module: str, seen: set[str]) -> set[str]:
        known = bases.get(name, {})
        chosen = {module: known[module]} if module in known else known
        for place, parents in chosen.items():
            for parent in set(parents) - seen:
                seen.add(parent)
                ancestors(parent, place, seen)
        return seen

    found = set()
    for architecture, module, name in registered(root / "model_executor/models/registry.py"):
        above = ancestors(name, module, set())
        # a function makes this class, so the text does not show its bases
        unknown = above - bases.keys() - OUTSIDE
        if "SupportsLoRA" not in above and not unknown:
            found.add(architecture)
    assert found == engines()[EngineName.VLLM].refused
