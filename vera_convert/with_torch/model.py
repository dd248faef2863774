"""A model whose layers are adapted by VeRA: trained, merged, saved and loaded in PEFT's format.

    VeraModel ─┬─ model ─── the caller's own; its adapted layers are replaced by VeraLinear, what
               │            modules_to_save names by TrainedWhole
               ├─ vera_A.<adapter>  (r, max_in)   one pair for all layers of an adapter, as wide as
               └─ vera_B.<adapter>  (max_out, r)  the widest; drawn from the key, or as stored

A name in ``state_dict()`` is the one in PEFT's file without ``base_model.`` in front and with the
adapter's name at the end.
"""

# mypy: allow-subclassing-any
from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from vera_convert.adapter.config import VeraConfig
from vera_convert.adapter.folder import is_training_state
from vera_convert.adapter.names import A_NAME, B_NAME, PREFIX
from vera_convert.adapter.tensors import replaced_name
from vera_convert.conversion.projections import Meant
from vera_convert.draws.generator import Rounding, Variant
from vera_convert.errors import CheckpointError, UsageError
from vera_convert.files.reading import printable
from vera_convert.hub.lookup import HubAccess, fetch_adapter, locate
from vera_convert.merging.parts import Tied
from vera_convert.rules import VALUE_NOT_FINITE, Finding
from vera_convert.with_torch.contents import Contents, new_contents, stored_contents
from vera_convert.with_torch.layer import SharedMatrix, VeraLinear, check_has_values
from vera_convert.with_torch.parts import (
    TrainedWhole,
    activate,
    modules_of,
    named_in,
    names_of_weight,
    own_tensors,
    put_module,
    trained_tensors,
    untie,
)
from vera_convert.with_torch.writing import DEFAULT, write_adapters


class VeraModel(nn.Module):
    """A model with any number of VeRA adapters.

    The model is changed in place: all its parameters are frozen and adapted layers are wrapped;
    `unload` takes that back. Attributes that this class lacks are the model's: ``config``,
    ``generate``, ``gradient_checkpointing_enable`` and whatever else it has.

    Attributes:
        model: the model.
        configs: the config of each adapter, as it would be saved.
        active: the adapters that take part in the forward pass; what they add is summed in order.
        findings: by adapter that was loaded, what its user should know.
    """

    def __init__(
        self,
        model: nn.Module,
        config: VeraConfig | None = None,
        *,
        adapter: str = DEFAULT,
        variant: Variant = Variant.FLOAT32_FUSED,
    ) -> None:
        """Wrap a model. With a config, its adapter is added (see `add_adapter`) and active."""
        super().__init__()
        if any(isinstance(module, VeraLinear) for module in model.modules()):
            raise UsageError("the model is wrapped already: add an adapter to its VeraModel.")
        self.model = model
        self.vera_A, self.vera_B = SharedMatrix(), SharedMatrix()
        self.configs: dict[str, VeraConfig] = {}
        self.active: tuple[str, ...] = ()
        self.findings: dict[str, tuple[Finding, ...]] = {}
        self._brought: dict[str, set[str]] = {}  # embeddings that came with an adapter
        if config is not None:
            self.add_adapter(config, adapter=adapter, variant=variant)
            self.set_adapter(adapter)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        folder: str | Path,
        *,
        adapter: str = DEFAULT,
        trainable: bool = False,
        projections: Meant = Meant.AUTO,
        variant: Variant | None = None,
        rounding: Rounding | None = None,
        key_map: Sequence[tuple[str, str]] = (),
        revision: str | None = None,
        access: HubAccess | None = None,
    ) -> Self:
        """Wrap a model and make a stored adapter active; see `load_adapter` and `set_adapter`."""
        wrapped = cls(model)
        wrapped.load_adapter(
            folder,
            adapter=adapter,
            projections=projections,
            variant=variant,
            rounding=rounding,
            key_map=key_map,
            revision=revision,
            access=access,
        )
        wrapped.set_adapter(adapter, trainable=trainable)
        return wrapped

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not there yet
                raise
            return getattr(self.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 -- that of any model
        """Do what the model does, with the active adapters."""
        return self.model(*args, **kwargs)

    # --- adapters --------------------------------------------------------------------------------

    def add_adapter(
        self,
        config: VeraConfig,
        *,
        adapter: str = DEFAULT,
        variant: Variant = Variant.FLOAT32_FUSED,
    ) -> None:
        """Add a new adapter. It is not active yet, and adds nothing while its b is zero.

        Args:
            config: which layers, which rank, which key.
            adapter: its name.
            variant: how A and B are drawn. PEFT takes what the machine's CPU and torch's default
                dtype make of the key, which nearly everywhere is float32-fused.

        Raises:
            CheckpointError: a field of the config has no valid value, or it matches no layer.
            UsageError: the name is taken or is none, or what is named cannot be adapted or saved.
            SurroundingsError: the model is on the meta device.
        """
        self._place(adapter, new_contents(config, self.model, variant=variant))

    def load_adapter(
        self,
        folder: str | Path,
        *,
        adapter: str = DEFAULT,
        projections: Meant = Meant.AUTO,
        variant: Variant | None = None,
        rounding: Rounding | None = None,
        key_map: Sequence[tuple[str, str]] = (),
        revision: str | None = None,
        access: HubAccess | None = None,
    ) -> None:
        """Add an adapter in PEFT's format, as PEFT 0.21 loads it. It is not active yet.

        A and B that are stored are used as they are, others are drawn and rounded for this model.
        Biases and embeddings that the adapter brings replace the model's own for good.

        Args:
            folder: the adapter's, or a repo on the Hub.
            adapter: the name to give it.
            projections: which A and B are meant where file, flag and key disagree.
            variant: how A and B are drawn where they are not stored and no fingerprint says it.
            rounding: what they are then rounded to; None for what the dtypes of the layers do.
            key_map: pairs (OLD, NEW) that rename leading paths of the adapter's modules; one that
                fits all layers is used where they do not fit as they are.
            revision: the adapter's, on the Hub.
            access: how the Hub is reached.

        Raises:
            CheckpointError: the adapter is malformed, or does not fit the model.
            UsageError: the name is taken or is none; stored projections are meant and not there.
            SurroundingsError: a file or a repo fails, or the model is on the meta device.
        """
        access = access or HubAccess()
        place = locate(str(folder), kind="adapter", access=access, revision=revision)
        place = fetch_adapter(place, access, is_training_state=is_training_state)
        contents = stored_contents(
            place.fetched,
            self.model,
            projections=projections,
            variant=variant,
            rounding=rounding,
            key_map=key_map,
        )
        self._place(adapter, contents)
        trained = {replaced_name(key): value for key, value in self._trained(adapter).items()}
        targets = own_tensors(self.model) | trained
        with torch.no_grad():
            for name, values in contents.replacements.items():
                targets[name].copy_(values)
        self._brought[adapter] = contents.replacements.keys() - trained.keys()

    def set_adapter(self, *adapters: str, trainable: bool = True) -> None:
        """Make these adapters active, no others, and let gradients flow to them alone.

        Args:
            adapters: their names, in the order in which what they add is summed.
            trainable: whether gradients flow at all: to d and b, and to what modules_to_save and
                bias name.

        Raises:
            UsageError: there is no such adapter, something is merged, or two of them would each
                put a module of their own in one place.
        """
        for name in adapters:
            if name not in self.configs:
                raise UsageError(f"this model has no adapter {printable(name)}.")
        adapters = tuple(dict.fromkeys(adapters))
        self._refuse_merged("other adapters are made active")
        activate(self.model, adapters)
        self.active = adapters
        self.requires_grad_(requires_grad=False)
        for name in adapters:
            for tensor in self._trained(name).values():
                if isinstance(tensor, nn.Parameter):  # a whole module has buffers too
                    tensor.requires_grad_(trainable)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return what an optimizer is to change: the parameters that gradients flow to."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Switch all adapters off inside the block; trained biases stay, the model has no others.

        Raises:
            UsageError: something is merged.
        """
        self._refuse_merged("adapters are switched off")
        activate(self.model, ())
        try:
            yield
        finally:
            activate(self.model, self.active)

    # --- merging ---------------------------------------------------------------------------------

    def merge(self, *, check: bool = True, tied: Tied | None = None) -> None:
        """Add what the active adapters do to the weights, so that their branches can rest.

        Args:
            check: see first whether all merged values are finite, and change nothing if not.
            tied: what becomes of an adapted head whose weight is the embedding's as well.

        Raises:
            CheckpointError: a merged value would not be finite.
            UsageError: something is merged already, a weight is quantised, or a head is tied.
            SurroundingsError: a weight is on the meta device.
        """
        self._refuse_merged("merging")
        layers = {path: layer for path, layer in self._layers() if layer.active}
        for layer in layers.values():
            layer.dense_weight()
        shared = [path for path in layers if len(names_of_weight(self.model, path)) > 1]
        if shared and tied is None:
            names = " and ".join(names_of_weight(self.model, shared[0]))
            raise UsageError(
                f"{names} are one tensor. Say what is meant: Tied.UNTIE gives the adapted layer "
                "one of its own, Tied.ADD changes both."
            )
        for path, layer in layers.items():
            if check and not layer.merges_finite():
                reason = "after the merge its weight would hold values that are not finite."
                raise CheckpointError(VALUE_NOT_FINITE.at(printable(path), reason))
        if shared and tied is Tied.UNTIE:
            untie(self.model, [layers[path] for path in shared])
        for layer in layers.values():
            layer.merge()

    def unmerge(self) -> None:
        """Subtract what was merged. That restores weights but for rounding, not bit for bit."""
        for _, layer in self._layers():
            layer.unmerge()

    def unload(self) -> nn.Module:
        """Return the model without wrappers: merged if it was, its active whole modules in place.

        This object is of no use afterwards.
        """
        for path, module in [*modules_of(self.model)]:
            if isinstance(module, VeraLinear):
                put_module(self.model, path, module.base_layer)
            elif isinstance(module, TrainedWhole):
                put_module(self.model, path, module.current)
        self.configs, self.active = {}, ()
        return self.model

    # --- saving ----------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, *, force: bool = False) -> None:
        """Write all adapters in PEFT's format, whole or not at all.

        The adapter called `default` goes into the folder itself, each other into a subfolder.

        Args:
            folder: where to; it must not exist.
            force: replace a folder that holds nothing but adapters.

        Raises:
            UsageError: the folder exists and may not be replaced, or there is nothing to save.
            SurroundingsError: the disk fails, or the model is on the meta device.
        """
        if not self.configs:
            raise UsageError("this model has no adapter to save.")
        adapters = {
            name: (config, self.adapter_state_dict(name)) for name, config in self.configs.items()
        }
        for _, tensors in adapters.values():
            for key, tensor in tensors.items():
                check_has_values(tensor, key)
        write_adapters(Path(folder), adapters, force=force)

    def adapter_state_dict(self, adapter: str = DEFAULT) -> dict[str, Tensor]:
        """Return an adapter's tensors by the names that they have in PEFT's file, not copied."""
        own = own_tensors(self.model)
        tensors = {PREFIX + name: own[name] for name in self._brought.get(adapter, ())}
        tensors |= self._trained(adapter)
        if self.configs[adapter].save_projection:
            tensors[A_NAME] = getattr(self.vera_A, adapter)
            tensors[B_NAME] = getattr(self.vera_B, adapter)
        return {key: tensor.detach() for key, tensor in tensors.items()}

    # ---------------------------------------------------------------------------------------------

    def _layers(self) -> Iterator[tuple[str, VeraLinear]]:
        return (
            (p, module) for p, module in modules_of(self.model) if isinstance(module, VeraLinear)
        )

    def _trained(self, adapter: str) -> dict[str, Tensor]:
        return trained_tensors(self.model, adapter, bias=self.configs[adapter].bias)

    def _place(self, adapter: str, contents: Contents) -> None:
        """Put the parts of an adapter where they belong, or change nothing if that cannot be."""
        config = contents.config
        self._check_new(adapter, config)
        whole = named_in(config, self.model)
        for path in contents.vectors:
            for tensor in self.model.get_submodule(path).parameters():
                check_has_values(tensor, f"the layer {printable(path)}")
        for path, (d, b) in contents.vectors.items():
            layer = self._wrapped(path)
            layer.add(adapter, d, b, dropout=config.vera_dropout)
        self.vera_A.put(adapter, contents.A.to(layer.vera_lambda_d[adapter]))
        self.vera_B.put(adapter, contents.B.to(layer.vera_lambda_d[adapter]))
        for path, module in whole.items():
            if not isinstance(module, TrainedWhole):
                put_module(self.model, path, TrainedWhole(module))
            self.model.get_submodule(path).add(adapter)
        self.configs[adapter] = config
        self.findings[adapter] = contents.findings
        for tensor in self._trained(adapter).values():
            tensor.requires_grad_(requires_grad=False)  # until it is active

    def _wrapped(self, path: str) -> VeraLinear:
        module = self.model.get_submodule(path)
        if isinstance(module, VeraLinear):
            return module
        layer = VeraLinear(module, self.vera_A, self.vera_B)
        layer.train(module.training)
        put_module(self.model, path, layer)
        return layer

    def _check_new(self, adapter: str, config: VeraConfig) -> None:
        """Refuse an adapter that this model cannot take beside what it has."""
        holders = (nn.ParameterDict(), nn.ModuleDict(), self.vera_A)
        if adapter in self.configs:
            raise UsageError(f"this model has an adapter {adapter} already.")
        usual = re.fullmatch(r"[A-Za-z0-9_-]+", adapter)
        if not usual or any(hasattr(holder, adapter) for holder in holders):
            raise UsageError(
                f'"{printable(adapter)}" cannot name an adapter: use letters, digits, _ and -, '
                "and no word that torch has another use for."
            )
        if config.bias != "none" and any(other.bias != "none" for other in self.configs.values()):
            raise UsageError(
                "two adapters of one model cannot both train biases: there is one of each."
            )
        self._refuse_merged("an adapter is added")

    def _refuse_merged(self, before: str) -> None:
        merged = next((layer.merged for _, layer in self._layers() if layer.merged), ())
        if merged:
            raise UsageError(f"{', '.join(merged)} is merged: call unmerge() before {before}.")
