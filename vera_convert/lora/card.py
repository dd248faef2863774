"""The model card of a LoRA made from a VeRA adapter."""

from __future__ import annotations

import json
import shlex

from vera_convert._version import __version__
from vera_convert.conversion.projections import ProjectionSource
from vera_convert.hub.lookup import Location
from vera_convert.hub.repo_name import is_repo_id
from vera_convert.lora.engines import EngineName, Form
from vera_convert.lora.plan import LoraPlan
from vera_convert.lora.record import LoraSource
from vera_convert.text import printable

_LIBRARIES = {Form.PEFT: "peft", Form.DIFFUSERS: "diffusers", Form.MLX: "mlx", Form.GGUF: "gguf"}
"""The Hub's name of the library for a form."""


def lora_card(source: LoraSource, plan: LoraPlan, weights: str, *, base: Location | None) -> str:
    """Return the text of the card; nothing of the card tells of this machine.

    Args:
        source: the source of the LoRA.
        plan: the LoRA.
        weights: the name of the file of weights.
        base: where the base lies.
    """
    location, config, options = source.location, source.adapter.config, source.options
    name, trained_on = location.name, config.base_model_name_or_path
    known = trained_on is not None and is_repo_id(trained_on)
    fields = [f"base_model: {json.dumps(printable(trained_on or ''))}"] if known else []
    commit = f" at commit `{location.commit}`" if location.commit else ""
    kind = "an approximation of" if plan.reduced else "the same change of the weights as"
    return "\n".join(
        [
            "---",
            *fields,
            f"library_name: {_LIBRARIES[options.target.form]}",
            "tags:",
            "- lora",
            "- vera",
            "---",
            "",
            f"# LoRA of {printable(name)}",
            "",
            f"A LoRA of rank {plan.rank} in {options.dtype} for {options.target.title}: {kind}",
            f"the VeRA adapter `{_code(name)}`{commit} of rank {config.r}.",
            f"Made by vera-convert {__version__}:",
            "",
            "```",
            _command(source, base),
            "```",
            "",
            f"The metadata of `{weights}` records the SHA-256 of the source, the",
            "options, the origin of A and B, and the largest relative error of a layer's delta.",
            "",
        ]
    )


def _command(source: LoraSource, base: Location | None) -> str:
    """Return the command with all options behind the bytes.

    Repos are named with their commits. A folder with the base is called MODEL.
    """
    given, location = source.options, source.location
    values = {
        "--base": base and (base.address or "MODEL"),
        "--base-dtype": source.base.dtype,
        "--for": None if given.engine is EngineName.PEFT else given.engine,
        "--dtype": None if given.dtype == "float32" else given.dtype,
        "--rank": given.rank,
        "--max-error": given.max_error,
        "--projections": None if given.projections is ProjectionSource.AUTO else given.projections,
        "--generator": given.generator,
    }
    flags = {
        "--accept-error": given.accept_error,
        "--fill-layers": given.fill_layers,
        "--drop-head": given.drop_head,
    }
    words = ["vera-convert", "to-lora", printable(location.address or location.name), "OUT"]
    for option, value in values.items():
        words += [option, str(value)] if value is not None else []
    for old, new in source.base.key_map:
        words += ["--key-map", f"{old}={new}"]
    return shlex.join([*words, *(flag for flag, is_given in flags.items() if is_given)])


def _code(text: str) -> str:
    return printable(text).replace("`", "'")
