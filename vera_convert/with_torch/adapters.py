"""Add, load, activate and delete the adapters of a wrapped model."""

# mypy: allow-subclassing-any
from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vera_convert.adapter.config import VeraConfig
from vera_convert.adapter.saved_modules import replaced_name
from vera_convert.arguments import one_of, place
from vera_convert.conversion.projections import ProjectionSource
from vera_convert.draws.generator import Rounding, Variant
from vera_convert.errors import UsageError
from vera_convert.hub.lookup import HubAccess, fetch_adapter, locate
from vera_convert.rules import Finding
from vera_convert.text import printable
from vera_convert.with_torch.layer import SharedMatrix, VeraLinear, check_has_values
from vera_convert.with_torch.loading import Contents, new_contents, stored_contents
from vera_convert.with_torch.modules import (
    TrainedWhole,
    activate,
    modules_of,
    named_in,
    own_tensors,
    put_module,
    trained_tensors,
)
from vera_convert.with_torch.peft_names import (
    PeftMethods,
    check_pefts_arguments,
    own_config,
    takes_pefts_names,
)
from vera_convert.with_torch.saving import DEFAULT
from vera_convert.with_torch.untying import has_tied_head


class Adapters(PeftMethods):
    """The adapters of a `VeraModel`, whose docstring describes the attributes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise UsageError(
                "model is not a torch.nn.Module: load the model first, for example with "
                "AutoModelForCausalLM.from_pretrained of transformers."
            )
        if any(isinstance(module, VeraLinear) for module in model.modules()):
            raise UsageError("the model is wrapped already: add an adapter to its VeraModel.")
        self.model = model
        self._has_tied_head = has_tied_head(model)
        self.vera_A, self.vera_B = SharedMatrix(), SharedMatrix()
        self.configs: dict[str, VeraConfig] = {}
        self.active: tuple[str, ...] = ()
        self.enabled = True
        self.findings: dict[str, tuple[Finding, ...]] = {}
        self._brought: dict[str, set[str]] = {}  # embeddings that an adapter brought

    @takes_pefts_names
    def add_adapter(
        self,
        config: VeraConfig | str,
        adapter: str | VeraConfig = DEFAULT,
        *,
        variant: Variant = Variant.FLOAT32_FUSED,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add a new adapter, not yet active. An adapter with a zero b has no effect.

        Args:
            config: the layers, the rank, the key. PEFT's ``VeraConfig`` works too.
            adapter: the name. PEFT's order, the name first, works too.
            variant: the variant of the generator that draws A and B. PEFT's variant depends on
                the CPU and on torch's default dtype, and is float32-fused nearly everywhere.
            autocast_adapter_dtype: keep d, b, A and B in float32 even if the layers are in 16
                bits; otherwise use the layers' dtype.

        Raises:
            CheckpointError: a field of the config is invalid, or the config matches no layer.
            UsageError: the name is taken or invalid, or a named layer cannot be adapted or saved.
            SurroundingsError: the model is on the meta device.
        """
        if isinstance(config, str):
            config, adapter = adapter, config
        contents = new_contents(
            own_config(config), self.model, variant=one_of("variant", Variant, variant)
        )
        self._place(str(adapter), contents, widened=autocast_adapter_dtype)

    @takes_pefts_names
    def load_adapter(
        self,
        folder: str | Path,
        adapter: str = DEFAULT,
        trainable: bool = False,  # noqa: FBT001, FBT002 -- in PEFT's order
        *,
        config: VeraConfig | None = None,
        subfolder: str | None = None,
        projections: ProjectionSource = ProjectionSource.AUTO,
        variant: Variant | None = None,
        rounding: Rounding | None = None,
        key_map: Sequence[tuple[str, str]] = (),
        revision: str | None = None,
        access: HubAccess | None = None,
        autocast_adapter_dtype: bool = True,
        **of_peft: Any,  # noqa: ANN401
    ) -> None:
        """Load an adapter in PEFT's format, as PEFT 0.21 does, without making the adapter active.

        Stored A and B are used unchanged; otherwise A and B are drawn, and rounded for this model.
        Biases and embeddings of the adapter replace the model's own permanently. If the model has
        an adapter of this name, the values are replaced in place, and an optimizer stays valid.

        Args:
            folder: the adapter's, or a repo on the Hub.
            adapter: the name to give the adapter.
            trainable: whether gradients flow to the adapter; if not, the whole model is put into
                eval mode, as in PEFT.
            config: a config to use instead of the folder's, which may be missing.
            subfolder: the adapter's folder inside `folder`.
            projections: the source of A and B: ``auto``, ``file`` or ``key``.
            variant: the variant of the generator, if A and B are not stored and no fingerprint
                names the variant.
            rounding: the rounding of drawn A and B; None to derive it from the layers' dtypes.
            key_map: pairs (OLD, NEW) that rename leading paths of the adapter's modules. If the
                names do not fit, the first pair with which all layers fit is used.
            revision: the adapter's, on the Hub.
            access: how the Hub is reached.
            autocast_adapter_dtype: see `add_adapter`.
            of_peft: further arguments of PEFT's method. Arguments without effect on the result are
                accepted, such as ``low_cpu_mem_usage``; all others are refused with the reason.

        Raises:
            CheckpointError: the adapter is malformed, or does not fit the model.
            UsageError: the name is invalid, the adapter of this name is merged or has other layers,
                stored projections are required and missing, or an argument is not supported.
            SurroundingsError: a file or a repo cannot be read, or the model is on the meta device.
        """
        check_pefts_arguments("load_adapter", of_peft)
        projections = one_of("projections", ProjectionSource, projections)
        variant = None if variant is None else one_of("variant", Variant, variant)
        rounding = None if rounding is None else one_of("rounding", Rounding, rounding)
        access = access or HubAccess()
        name = place("folder", folder) if subfolder is None else f"{folder}/{subfolder}"
        found = locate(name, kind="adapter", access=access, revision=revision)
        contents = stored_contents(
            fetch_adapter(found, access).fetched,
            self.model,
            config=None if config is None else own_config(config),
            projections=projections,
            variant=variant,
            rounding=rounding,
            key_map=key_map,
        )
        contents = replace(contents, config=replace(contents.config, inference_mode=not trainable))
        if adapter in self.configs:
            self._refill(adapter, contents)
        else:
            self._place(adapter, contents, widened=autocast_adapter_dtype)
        self._replace(adapter, contents)
        if trainable:
            self.let_train(adapter, trainable)
        else:
            self.eval()

    def delete_adapter(self, adapter: str) -> None:
        """Delete an adapter. Biases and embeddings that the adapter brought stay in the model.

        If no other adapter is active, the first remaining adapter becomes active, as in PEFT, and
        trainable if the deleted adapter was. Without adapters, the model computes like the base.

        Raises:
            UsageError: the model lacks the adapter, the adapter is merged, or another would become
                active while something is merged.
        """
        self.require_adapters([adapter])
        has_successor = self.active == (adapter,)
        self.refuse_merged("an adapter is deleted", None if has_successor else adapter)
        trained = any(tensor.requires_grad for tensor in self._trained(adapter).values())
        self.let_train(adapter, False)  # noqa: FBT003
        for _, module in modules_of(self.model):
            if isinstance(module, VeraLinear | TrainedWhole):
                module.remove(adapter)
        self.vera_A.drop(adapter)
        self.vera_B.drop(adapter)
        del self.configs[adapter]
        self.findings.pop(adapter, None)
        self._brought.pop(adapter, None)
        self.active = tuple(name for name in self.active if name != adapter)
        if has_successor and self.configs:
            successor = min(self.configs)
            warnings.warn(
                f"the active adapter {adapter} is deleted: {successor} is active now.",
                stacklevel=2,
            )
            self.set_adapter(successor, trainable=trained)

    def set_adapter(
        self,
        *adapters: str | Sequence[str],
        trainable: bool = True,
        inference_mode: bool = False,
    ) -> None:
        """Activate only the given adapters, trainable by default.

        All other parameters of the model stay frozen or trainable as before.

        Args:
            adapters: names, or a list of names, in the order of the branches.
            trainable: whether gradients flow to d and b, and to the modules and biases that
                modules_to_save and bias name.
            inference_mode: PEFT's word for the opposite of `trainable`.

        Raises:
            UsageError: an adapter is missing or merged, or two of the adapters replace the same
                module.
        """
        names = self.require_adapters(adapters)
        self.refuse_merged("other adapters are made active")
        activate(self.model, names, enabled=self.enabled)
        self.active = names
        for name in self.configs:
            self.let_train(name, name in names and trainable and not inference_mode)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the parameters for an optimizer, to which gradients flow."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    # ---------------------------------------------------------------------------------------------

    def vera_layers(self) -> dict[str, VeraLinear]:
        """Return the wrapped layers by path."""
        found = modules_of(self.model)
        return {path: module for path, module in found if isinstance(module, VeraLinear)}

    def _trained(self, adapter: str) -> dict[str, Tensor]:
        return trained_tensors(self.model, adapter, bias=self.configs[adapter].bias)

    def switch(self, *, on: bool) -> None:
        """Let the active adapters take part in the forward pass, or switch all adapters off.

        Raises:
            UsageError: something is merged.
        """
        if not on:
            self.refuse_merged("adapters are switched off")
        activate(self.model, self.active, enabled=on)
        self.enabled = on

    def let_train(self, adapter: str, trainable: bool) -> None:  # noqa: FBT001
        """Let gradients flow to all trained parameters of an adapter, or stop the gradients."""
        for tensor in self._trained(adapter).values():
            if isinstance(tensor, nn.Parameter):  # whole modules also have buffers
                tensor.requires_grad_(trainable)

    def _place(self, adapter: str, contents: Contents, *, widened: bool) -> None:
        """Add the tensors and modules of an adapter; change nothing if a tensor does not fit."""
        config = contents.config
        self._check_new(adapter, config)
        whole = named_in(config, self.model)
        for path in contents.vectors:
            for tensor in self.model.get_submodule(path).parameters():
                check_has_values(tensor, f"the layer {printable(path)}")
        if not self.configs:
            self.model.requires_grad_(requires_grad=False)
        for path, (d, b) in contents.vectors.items():
            layer = self._wrapped(path)
            layer.add(adapter, d, b, dropout=config.vera_dropout, widened=widened)
        self.vera_A.put(adapter, contents.A.to(layer.vera_lambda_d[adapter]))
        self.vera_B.put(adapter, contents.B.to(layer.vera_lambda_d[adapter]))
        for path, module in whole.items():
            if not isinstance(module, TrainedWhole):
                put_module(self.model, path, TrainedWhole(module))
            self.model.get_submodule(path).add(adapter)
        self.configs[adapter] = config
        self.findings[adapter] = contents.findings
        self.let_train(adapter, False)  # noqa: FBT003 -- until the adapter is active

    def _refill(self, adapter: str, contents: Contents) -> None:
        """Replace an adapter's values by a stored adapter's, of the same layers and rank."""
        self.refuse_merged("other values are loaded", adapter)
        layers = self.vera_layers()
        layers = {path: each for path, each in layers.items() if adapter in each.vera_lambda_d}
        if layers.keys() != contents.vectors.keys() or contents.config.r != self.configs[adapter].r:
            raise UsageError(
                f"this model has an adapter {adapter} with other layers or another rank: load this "
                "adapter by another name, or delete the other adapter first."
            )
        with torch.no_grad():
            for path, layer in layers.items():
                d, b = contents.vectors[path]
                layer.vera_lambda_d[adapter].copy_(d)
                layer.vera_lambda_b[adapter].copy_(b)
        for matrix, values in ((self.vera_A, contents.A), (self.vera_B, contents.B)):
            matrix.put(adapter, values.to(getattr(matrix, adapter)))
        self.findings[adapter] = contents.findings

    def _replace(self, adapter: str, contents: Contents) -> None:
        """Replace values of the model's own parameters by an adapter's values."""
        trained = {replaced_name(key): value for key, value in self._trained(adapter).items()}
        targets = own_tensors(self.model) | trained
        with torch.no_grad():
            for name, values in contents.replacements.items():
                targets[name].copy_(values)
        self._brought[adapter] = contents.replacements.keys() - trained.keys()

    def _wrapped(self, path: str) -> VeraLinear:
        module = self.model.get_submodule(path)
        if isinstance(module, VeraLinear):
            return module
        layer = VeraLinear(module, self.vera_A, self.vera_B)
        layer.train(module.training)
        put_module(self.model, path, layer)
        return layer

    def _check_new(self, adapter: str, config: VeraConfig) -> None:
        """Refuse an adapter that clashes with the model's other adapters."""
        holders = (nn.ParameterDict(), nn.ModuleDict(), self.vera_A)
        if adapter in self.configs:
            raise UsageError(f"this model already has an adapter {adapter}.")
        usual = re.fullmatch(r"[A-Za-z0-9_-]+", adapter)
        if not usual or any(hasattr(holder, adapter) for holder in holders):
            raise UsageError(
                f'"{printable(adapter)}" cannot name an adapter: use letters, digits, _ and -, '
                "and no attribute of torch's containers."
            )
        if config.bias != "none" and any(other.bias != "none" for other in self.configs.values()):
            raise UsageError(
                "only one adapter of a model can train biases: the model has one of each."
            )

    def require_adapters(self, adapters: Iterable[str | Iterable[str]]) -> tuple[str, ...]:
        """Return the adapters of the given names, and lists of names, each once.

        Raises:
            UsageError: the model lacks one of the adapters.
        """
        listed = ([each] if isinstance(each, str) else each for each in adapters)
        names = tuple(dict.fromkeys(chain.from_iterable(listed)))
        for name in names:
            if name not in self.configs:
                raise UsageError(
                    f"this model has no adapter {printable(name)}. The adapters of this model: "
                    f"{', '.join(self.configs) or 'none'}."
                )
        return names

    def refuse_merged(self, before: str, adapter: str | None = None) -> None:
        """Raise `UsageError` if this adapter is merged; for None, if any adapter is merged."""
        layers = self.vera_layers().values()
        merged = dict.fromkeys(name for layer in layers for name in layer.merged)
        if adapter in merged or (adapter is None and merged):
            raise UsageError(f"{', '.join(merged)} is merged: call unmerge() before {before}.")
