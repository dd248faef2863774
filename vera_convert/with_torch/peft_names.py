"""Offer the methods of ``peft.PeftModel`` by PEFT's names, for scripts written for PEFT.

`VeraModel` has these methods too; each docstring says how the method differs from PEFT's. Not
offered, with the reasons in ``peft_names.toml``: prompts, model cards, conversion to LoRA, tables
of each layer's status, and publishing on the Hub.
"""

# mypy: allow-subclassing-any
from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from enum import Enum
from functools import lru_cache, wraps
from itertools import chain
from typing import Any, NoReturn, TypeVar, cast

from torch import nn

from vera_convert.adapter.config import FIELDS, VeraConfig
from vera_convert.errors import UsageError
from vera_convert.merging.options import Tied
from vera_convert.tables import table
from vera_convert.text import printable

_TABLES = table(__file__, "peft_names.toml")
DECLINED: Mapping[str, str] = _TABLES["declined"]
"""Names of PEFT that a `VeraModel` lacks, with the reason and the alternative."""

Method = TypeVar("Method", bound=Callable[..., Any])


def takes_pefts_names(method: Method) -> Method:
    """Let a method accept PEFT's names for its arguments, too."""

    @wraps(method)
    def called(*args: object, **kwargs: object) -> object:
        ours = _TABLES["ours"]
        return method(*args, **{ours.get(name, name): value for name, value in kwargs.items()})

    return cast("Method", called)


def check_pefts_arguments(method: str, given: Mapping[str, object]) -> None:
    """Refuse arguments of PEFT's method that this package does not support.

    Raises:
        UsageError: an argument is unknown, or its value would change the result.
    """
    known = _TABLES["harmless"][method]
    for name, value in given.items():
        if name in _TABLES["ignored"][method]:
            continue
        if name not in known:
            raise UsageError(f"{method}() has no argument {printable(name)}.")
        harmless, advice = known[name]
        values = (None if each == "None" else each for each in harmless)
        if not any(value is each or value == each for each in values):
            raise UsageError(f"{method}() does not support this value of {name}: {advice}.")


def own_config(config: object) -> VeraConfig:
    """Return a config of this package for a config of this package or PEFT's ``VeraConfig``.

    Raises:
        UsageError: the object is of another class.
    """
    if isinstance(config, VeraConfig):
        return config
    fields = config.to_dict() if hasattr(config, "to_dict") else None
    if not isinstance(fields, dict) or fields.get("peft_type") != "VERA":
        raise UsageError(
            f"a VeraConfig is expected, of vera_convert.with_torch or of PEFT, not an object of "
            f"the class {type(config).__name__}."
        )
    plain = {
        name: value.value if isinstance(value, Enum) else value
        for name, value in fields.items()
        if name in FIELDS
    }
    return VeraConfig(**plain)


class PeftMethods(nn.Module):
    """PEFT's names for the methods of a `VeraModel`."""

    configs: dict[str, VeraConfig]
    active: tuple[str, ...]
    enabled: bool

    # --- a model that passes for a PeftModel ------------------------------------------------------

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The class that `isinstance` uses; if PEFT is imported, also a ``PeftModel``.

        transformers' Trainer, Accelerate and TRL recognize an adapter only by this class. They then
        look for columns in the wrapped model's signature, and save and load the adapter instead of
        the whole model. `type` still returns the true class, and no method of PEFT is inherited.
        """
        known = getattr(sys.modules.get("peft"), "PeftModel", None)
        own: type = type(self)
        wrapped = self.__dict__.get("_modules", {}).get("model")
        if wrapped is None or not isinstance(known, type):
            return own
        return _passing_for(own, known, type(wrapped).forward)

    def __reduce_ex__(self, protocol: Any) -> Any:  # noqa: ANN401
        """Make copies and pickles of the true class."""
        _, _, *state = super().__reduce_ex__(max(int(protocol), 2))
        return (_unmade, (type(self),), *state)

    @property
    def base_model(self) -> Any:  # noqa: ANN401
        """This object: in PEFT, ``base_model.model`` is the wrapped model."""
        return self

    def get_base_model(self) -> Any:  # noqa: ANN401
        """Return the wrapped model, with its adapted layers."""
        return self.model

    # --- configs and adapters ---------------------------------------------------------------------

    peft_type = "VERA"

    @property
    def peft_config(self) -> dict[str, VeraConfig]:
        """The config of each adapter."""
        return self.configs

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that take part in the forward pass."""
        return [*self.active]

    @property
    def active_adapter(self) -> str:
        """The first of the active adapters.

        Raises:
            UsageError: none is active.
        """
        if not self.active:
            raise UsageError("no adapter is active: call set_adapter().")
        return self.active[0]

    @property
    def active_peft_config(self) -> VeraConfig:
        """The config of the first active adapter."""
        return self.configs[self.active_adapter]

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether any adapter is active and switched on."""
        return bool(self.active) and self.enabled

    @property
    def modules_to_save(self) -> set[str] | None:
        """The modules that the configs name for full training; None without any."""
        found = (each.modules_to_save or () for each in self.configs.values())
        return set(chain.from_iterable(found)) or None

    def set_requires_grad(
        self,
        adapter_names: str | Iterable[str],
        requires_grad: bool = True,  # noqa: FBT001, FBT002 -- as in PEFT
    ) -> None:
        """Let gradients flow to the parameters of these adapters, or stop the gradients."""
        for name in self.require_adapters([adapter_names]):
            self.let_train(name, requires_grad)

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Switch all adapters off inside a ``with`` block; see `disabled`.

        PEFT unmerges merged adapters first. This method refuses, because unmerging changes weights.
        """
        return self.disabled()  # type: ignore[no-any-return]

    def disable_adapter_layers(self) -> None:
        """Switch all adapters off until `enable_adapter_layers` is called."""
        self.switch(on=False)

    def enable_adapter_layers(self) -> None:
        """Switch the active adapters on again."""
        self.switch(on=True)

    # --- training ---------------------------------------------------------------------------------

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return the number of trainable parameters, and of all parameters with adapters.

        As in PEFT, a byte of a 4-bit parameter counts as two values.
        """
        trained = every = 0
        for parameter in self.parameters():
            count = parameter.numel() or getattr(
                parameter, "ds_numel", 0
            )  # DeepSpeed moves values to other devices
            if type(parameter).__name__ == "Params4bit":
                count *= 2 * parameter.element_size()
            every += count
            trained += count if parameter.requires_grad else 0
        return trained, every

    def print_trainable_parameters(self) -> None:
        """Print the number of trainable parameters, in PEFT's words."""
        trained, every = self.get_nb_trainable_parameters()
        share = 100 * trained / every if every else 0.0
        print(  # noqa: T201
            f"trainable params: {trained:,d} || all params: {every:,d} || trainable%: {share:.4f}"
        )

    def prepare_model_for_gradient_checkpointing(self, model: Any) -> Any:  # noqa: ANN401
        """Let gradients reach the first layers, as re-entrant checkpoints need."""
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        return model

    # --- merging ----------------------------------------------------------------------------------

    def merge_adapter(
        self,
        adapter_names: Sequence[str] | None = None,
        safe_merge: bool = True,  # noqa: FBT001, FBT002
        *,
        tied: Tied | None = None,
    ) -> None:
        """Merge these adapters, or the active ones; see `merge`.

        PEFT checks for values that are not finite only with `safe_merge`, changes both of two tied
        weights with a warning, and rounds the delta of a 16-bit adapter before the sum. This method
        checks by default, requires `tied`, and rounds only the sum.
        """
        self.merge(check=safe_merge, tied=tied, adapters=adapter_names)

    def unmerge_adapter(self) -> None:
        """Subtract the merged deltas; see `unmerge`."""
        self.unmerge()

    def merge_and_unload(
        self,
        progressbar: bool = False,  # noqa: ARG002, FBT001, FBT002 -- a merge takes too little time
        safe_merge: bool = True,  # noqa: FBT001, FBT002
        adapter_names: Sequence[str] | None = None,
        *,
        tied: Tied | None = None,
    ) -> Any:  # noqa: ANN401
        """Merge these adapters, or the active ones, and return the model without wrappers.

        Adapters that were merged before stay merged. See `merge_adapter` and `unload`.
        """
        self.merge_adapter(adapter_names, safe_merge, tied=tied)
        return self.unload()

    # --- publishing -------------------------------------------------------------------------------

    def push_to_hub(self, *_: object, **__: object) -> NoReturn:
        """Refuse: this package never writes to the Hub.

        Uploading needs a token with write access, which this package never uses. Save the adapter
        to a folder, check the folder, and upload the folder with the Hub's client.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "vera_convert does not write to the Hub. Save the adapter with save_pretrained(FOLDER) "
            'and upload the folder: "hf upload REPO FOLDER" in a terminal, or '
            "huggingface_hub.upload_folder(repo_id=REPO, folder_path=FOLDER)."
        )


@lru_cache(maxsize=64)
def _passing_for(kind: type, known: type, forward: Callable[..., Any]) -> type:
    """Return a subclass of both classes, which is inspected and never instantiated.

    Its ``forward`` is the wrapped model's: older releases of the Trainer look there for labels.
    """
    fields = {"__module__": kind.__module__, "forward": forward}
    return type(kind.__name__, (kind, known), fields)


def _unmade(kind: Any) -> Any:  # noqa: ANN401
    """Return an object without its state, which pickle sets afterwards."""
    return kind.__new__(kind)
