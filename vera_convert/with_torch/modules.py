"""Find the parts of a wrapped model by the names that adapters use; hold fully trained modules."""

# mypy: allow-subclassing-any
from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from torch import Tensor, nn

from vera_convert.adapter.config import VeraConfig
from vera_convert.adapter.names import PREFIX
from vera_convert.adapter.saved_modules import replaced_name
from vera_convert.errors import UsageError
from vera_convert.targets.linear import ModelLayers
from vera_convert.text import printable
from vera_convert.with_torch.layer import VeraLinear, linear_of


class TrainedWhole(nn.Module):
    """A module of ``modules_to_save``: the frozen original and a trained copy for each adapter.

    Attributes:
        original_module: the model's own.
        modules_to_save: the copies by adapter.
        active: the adapter whose copy replaces the original; None for the original.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict()
        self.active: str | None = None

    def add(self, adapter: str) -> None:
        """Add a copy of the original for an adapter."""
        self.modules_to_save[adapter] = deepcopy(self.original_module)

    def remove(self, adapter: str) -> None:
        """Remove the copy of an adapter, if present, and use the original again."""
        if adapter in self.modules_to_save:
            del self.modules_to_save[adapter]
        self.active = None if self.active == adapter else self.active

    @property
    def current(self) -> nn.Module:
        """The module that computes."""
        return self.original_module if self.active is None else self.modules_to_save[self.active]

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 -- that of any module
        """Call the current module."""
        return self.current(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "modules_to_save"):  # not there yet
                raise
            return getattr(self.current, name)


def modules_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield each module once, with the path in the unwrapped model.

    For a wrapped layer the wrapper is yielded, without the modules inside.
    """
    seen: set[int] = set()

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        yield path, module
        if not isinstance(module, VeraLinear | TrainedWhole):
            for name, child in module.named_children():
                yield from walk(child, f"{path}.{name}" if path else name)

    return walk(model, "")


def layers_of(model: nn.Module) -> ModelLayers:
    """Return the layers of a model for the rules of targets, wrapped layers included."""
    frozen = {
        path: module.base_layer if isinstance(module, VeraLinear) else module
        for path, module in modules_of(model)
    }
    linear = {path: linear_of(module) for path, module in frozen.items() if path}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(output, VeraLinear):
        output = output.base_layer
    return ModelLayers(
        source=type(model).__name__,
        model_type=getattr(getattr(model, "config", None), "model_type", None),
        linear={path: dims for path, dims in linear.items() if dims is not None},
        output_heads=frozenset(path for path, module in frozen.items() if module is output),
        embeddings=tuple(path for path, m in frozen.items() if isinstance(m, nn.Embedding)),
    )


def put_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Replace the module at a path."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def named_in(config: VeraConfig, model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that modules_to_save names, by path.

    As in PEFT, a name means every module whose path ends with the name.

    Raises:
        UsageError: another adapter adapts a layer inside one of the modules.
    """
    names = tuple(name for name in config.modules_to_save or () if name)
    found: dict[str, nn.Module] = {}
    for path, module in modules_of(model):
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if names and path.endswith(names) and not inside:
            if any(isinstance(part, VeraLinear) for part in module.modules()):
                raise UsageError(
                    f"modules_to_save names {printable(path)}, which another adapter adapts: "
                    "give each of the two a model of its own."
                )
            found[path] = module
    return found


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters and buffers by their names before the model was wrapped."""
    return {
        replaced_name(PREFIX + name.replace(".original_module.", ".")): tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if ".modules_to_save." not in name and ".vera_lambda_" not in name
    }


def trained_tensors(model: nn.Module, adapter: str, *, bias: str) -> dict[str, Tensor]:
    """Return the tensors that an adapter trains, by their names in PEFT's file.

    These are d and b, the biases that `bias` of the config selects, and copies of whole modules.
    """
    found: dict[str, Tensor] = {}
    for path, module in modules_of(model):
        name = f"{PREFIX}{path}"
        if isinstance(module, TrainedWhole):
            if adapter in module.modules_to_save:
                whole = module.modules_to_save[adapter].state_dict(keep_vars=True)
                found |= {f"{name}.{key}": tensor for key, tensor in whole.items()}
        elif isinstance(module, VeraLinear):
            ours = adapter in module.vera_lambda_b
            if ours:
                found[f"{name}.vera_lambda_b"] = module.vera_lambda_b[adapter]
                found[f"{name}.vera_lambda_d"] = module.vera_lambda_d[adapter]
            if module.bias is not None and (bias == "all" or (ours and bias != "none")):
                found[f"{name}.base_layer.bias"] = module.bias
        elif bias == "all":
            biases = module.named_parameters(recurse=False)
            found |= {f"{name}.{key}": tensor for key, tensor in biases if key.endswith("bias")}
    return found


def activate(model: nn.Module, adapters: tuple[str, ...], *, enabled: bool) -> None:
    """Make only these adapters take part in the forward pass, in this order; none if not enabled.

    Raises:
        UsageError: two of the adapters replace the same module.
    """
    modules = [*modules_of(model)]
    for path, module in modules:
        if isinstance(module, TrainedWhole):
            own = [name for name in adapters if name in module.modules_to_save]
            if len(own) > 1:
                raise UsageError(
                    f"{' and '.join(own)} each bring their own {printable(path)}, and only one of "
                    "these can be active."
                )
    names = adapters if enabled else ()
    for _, module in modules:
        if isinstance(module, VeraLinear):
            module.active = tuple(name for name in names if name in module.vera_lambda_b)
        elif isinstance(module, TrainedWhole):
            module.active = next((name for name in names if name in module.modules_to_save), None)


def names_of_weights(model: nn.Module) -> dict[int, list[str]]:
    """Return all names of each parameter, by `id`; a tied parameter has several."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name.replace(".base_layer.", "."))
    return names


def share_trained(model: nn.Module) -> None:
    """Give a tied embedding and output head the values of the module that is trained whole.

    No layer of an encoder-decoder reads the copy of `shared`, so a merge leaves the copy out.
    """
    ends = [
        getattr(model, getter, lambda: None)()
        for getter in ("get_input_embeddings", "get_output_embeddings")
    ]
    for path, whole in modules_of(model):
        is_end = any(whole is end for end in ends)
        if is_end and isinstance(whole, TrainedWhole) and path.rpartition(".")[2] != "shared":
            own = whole.original_module.weight
            sharing = [part for _, part in modules_of(model) if part is not whole]
            for part in sharing:
                if not isinstance(part, TrainedWhole) and getattr(part, "weight", None) is own:
                    part.weight = whole.current.weight
