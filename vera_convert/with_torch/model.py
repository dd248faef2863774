"""A model whose layers are adapted by VeRA: trained, merged, saved and loaded in PEFT's format.

    VeraModel ─┬─ model ─── the caller's model, with adapted layers replaced by VeraLinear, and
               │            modules of modules_to_save by TrainedWhole
               ├─ vera_A.<adapter>  (r, max_in)   one pair for all layers of an adapter, as wide as
               └─ vera_B.<adapter>  (max_out, r)  the widest; drawn from the key, or as stored

A name in ``state_dict()`` is the name in PEFT's file without the prefix ``base_model.`` and with
the adapter's name at the end.
"""

# mypy: allow-subclassing-any
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from vera_convert import rules
from vera_convert.adapter.config import VeraConfig
from vera_convert.adapter.names import A_NAME, B_NAME, PREFIX
from vera_convert.arguments import one_of
from vera_convert.draws.generator import Variant
from vera_convert.errors import CheckpointError, UsageError
from vera_convert.merging.options import Tied
from vera_convert.text import printable
from vera_convert.with_torch.adapters import Adapters
from vera_convert.with_torch.layer import VeraLinear, check_has_values
from vera_convert.with_torch.modules import (
    TrainedWhole,
    modules_of,
    names_of_weights,
    own_tensors,
    put_module,
)
from vera_convert.with_torch.peft_names import DECLINED, check_pefts_arguments, takes_pefts_names
from vera_convert.with_torch.saving import DEFAULT, write_adapters
from vera_convert.with_torch.untying import has_tied_head, settle_parted_head, untie


class VeraModel(Adapters):
    """A model with any number of VeRA adapters.

    The model is changed in place: the first adapter freezes all parameters and wraps the adapted
    layers; `unload` removes the wrappers. All other attributes are the model's, such as
    ``config``, ``generate`` and ``gradient_checkpointing_enable``. PEFT's methods, and PEFT's names
    of arguments, work too (see `peft_names`). If PEFT is installed, transformers' Trainer trains
    and saves this model like a model of PEFT. Without PEFT, the Trainer knows no adapters: it needs
    ``remove_unused_columns=False`` and saves the whole model, so call `save_pretrained` yourself.

    Attributes:
        model: the model.
        configs: the config of each adapter, as saved.
        active: the adapters in the forward pass, in the order in which the branches are added.
        enabled: whether the active adapters are switched on.
        findings: warnings and notes for each loaded adapter.
    """

    def __init__(
        self,
        model: nn.Module,
        config: VeraConfig | None = None,
        adapter: str = DEFAULT,
        *,
        variant: Variant = Variant.FLOAT32_FUSED,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Wrap a model. With a config, add an active adapter (see `add_adapter`).

        The adapter is trainable unless the config's ``inference_mode`` is true, as in PEFT.
        """
        super().__init__(model)
        if config is not None:
            self.add_adapter(
                config,
                adapter,
                variant=variant,
                autocast_adapter_dtype=autocast_adapter_dtype,
            )
            self.set_adapter(adapter, inference_mode=self.configs[adapter].inference_mode)
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            self.prepare_model_for_gradient_checkpointing(model)

    @classmethod
    @takes_pefts_names
    def from_pretrained(
        cls,
        model: nn.Module,
        folder: str | Path,
        adapter: str = DEFAULT,
        trainable: bool = False,  # noqa: FBT001, FBT002 -- in PEFT's order
        config: VeraConfig | None = None,
        **options: Any,  # noqa: ANN401
    ) -> Self:
        """Wrap a model and make a stored adapter active.

        Args:
            model: the model.
            folder: the adapter's, or a repo on the Hub.
            adapter: the name to give the adapter.
            trainable: whether gradients flow; if not, the model stays in eval mode.
            config: see `load_adapter`.
            options: the other arguments of `load_adapter`.
        """
        wrapped = cls(model)
        wrapped.load_adapter(folder, adapter, trainable, config=config, **options)
        wrapped.set_adapter(adapter, trainable=trainable)
        return wrapped

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not there yet
                raise
            if name in DECLINED:
                raise AttributeError(f"VeraModel has no {name}: {DECLINED[name]}.") from None
            return getattr(self.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 -- that of any model
        """Call the model, with the active adapters."""
        return self.model(*args, **kwargs)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Switch all adapters off inside the block, except trained biases.

        Raises:
            UsageError: something is merged.
        """
        before = self.enabled
        self.switch(on=False)
        try:
            yield
        finally:
            self.switch(on=before)

    # --- merging ---------------------------------------------------------------------------------

    def merge(
        self,
        *,
        check: bool = True,
        tied: Tied | None = None,
        adapters: str | Sequence[str] | None = None,
    ) -> None:
        """Add the deltas of the active adapters to the weights, and stop adding the branches.

        Adapters that are merged already are left alone.

        Args:
            check: check first that all merged values are finite; otherwise change nothing.
            tied: how to merge into an adapted head that shares a weight with the embedding.
            adapters: the adapters to merge instead of the active adapters.

        Raises:
            CheckpointError: a merged value would not be finite.
            UsageError: the adapters are switched off, a weight is quantized, a head is tied, or
                there is no such adapter.
            SurroundingsError: a weight is on the meta device.
        """
        merged = self.active if adapters is None else self.require_adapters([adapters])
        tied = None if tied is None else one_of("tied", Tied, tied)
        if not self.enabled:
            raise UsageError("the adapters are switched off: enable the adapters before merging.")
        layers = self.vera_layers()
        layers = {path: each for path, each in layers.items() if each.unmerged(merged)}
        for layer in layers.values():
            layer.dense_weight()
        names = names_of_weights(self.model)
        names_of = {path: names.get(id(layer.weight), []) for path, layer in layers.items()}
        shared = [path for path in layers if len(names_of[path]) > 1]
        if shared and tied is None:
            raise UsageError(
                f"{' and '.join(names_of[shared[0]])} are one tensor. Choose: "
                "Tied.UNTIE gives the layer a new tensor, Tied.ADD changes the shared tensor."
            )
        for path, layer in layers.items():
            if check and not layer.merges_finite(merged):
                reason = "the merged weight would have infinite values or NaN."
                raise CheckpointError(rules.VALUE_NOT_FINITE.at(printable(path), reason))
        if shared and tied is Tied.UNTIE:
            untie(self.model, [layers[path] for path in shared])
        for layer in layers.values():
            layer.merge(merged)

    def unmerge(self) -> None:
        """Subtract the merged deltas. This restores the weights up to rounding, not bit for bit."""
        for layer in self.vera_layers().values():
            layer.unmerge()

    def unload(self) -> nn.Module:
        """Return the model without wrappers, with merged weights and active whole modules.

        A head that is no longer tied stays apart when the model is saved and loaded: see
        `settle_parted_head`. This object cannot be used afterwards.
        """
        for path, module in [*modules_of(self.model)]:
            if isinstance(module, VeraLinear):
                put_module(self.model, path, module.base_layer)
            elif isinstance(module, TrainedWhole):
                put_module(self.model, path, module.current)
        self.configs, self.active = {}, ()
        if self._has_tied_head and not has_tied_head(self.model):
            settle_parted_head(self.model)
        return self.model

    # --- saving ----------------------------------------------------------------------------------

    @takes_pefts_names
    def save_pretrained(
        self,
        folder: str | Path,
        *,
        force: bool = False,
        selected_adapters: str | Sequence[str] | None = None,
        **of_peft: Any,  # noqa: ANN401
    ) -> None:
        """Write adapters in PEFT's format, completely or not at all.

        The adapter ``default`` goes into the folder itself, each other adapter into a subfolder.

        Args:
            folder: the folder to write; an existing folder must be empty. Missing parents are made.
            force: replace a folder that holds only adapters, and keep its README.md.
            selected_adapters: which adapters; None for all.
            of_peft: further arguments of PEFT's method; transformers' Trainer passes some. With
                any of these, files of the same names in the folder are replaced one by one, and all
                other files stay: the Trainer saves into its checkpoint folders.
                ``is_main_process=False`` writes nothing. A gathered ``state_dict``, pickles
                (``safe_serialization=False``) and ``save_embedding_layers=True`` are refused.

        Raises:
            UsageError: the folder exists and must not be replaced, or there is nothing to save.
            SurroundingsError: the disk fails, or the model is on the meta device.
        """
        check_pefts_arguments("save_pretrained", of_peft)
        names = self.configs if selected_adapters is None else selected_adapters
        adapters = {
            name: (self.configs[name], self.adapter_state_dict(name))
            for name in self.require_adapters([names])
        }
        if not adapters:
            raise UsageError("this model has no adapter to save, or none is selected.")
        for _, tensors in adapters.values():
            for key, tensor in tensors.items():
                check_has_values(tensor, key)
        if of_peft.get("is_main_process", True):
            write_adapters(Path(folder), adapters, force=force, update=bool(of_peft))

    def adapter_state_dict(self, adapter: str = DEFAULT) -> dict[str, Tensor]:
        """Return an adapter's tensors, not copied, by their names in PEFT's file."""
        own = own_tensors(self.model)
        tensors = {PREFIX + name: own[name] for name in self._brought.get(adapter, ())}
        tensors |= self._trained(adapter)
        if self.configs[adapter].save_projection:
            tensors[A_NAME] = getattr(self.vera_A, adapter)
            tensors[B_NAME] = getattr(self.vera_B, adapter)
        return {key: tensor.detach() for key, tensor in tensors.items()}
