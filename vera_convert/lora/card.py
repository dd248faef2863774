"""The model card of a LoRA that was made from a VeRA adapter."""

from __future__ import annotations

import json
import shlex

from vera_convert._version import __version__
from vera_convert.hub.lookup import Location
from vera_convert.hub.repo_name import is_repo_id
from vera_convert.lora.engines import EngineName
from vera_convert.lora.options import LoraOptions
from vera_convert.text import printable


def lora_card(
    location: Location, base: str | None, options: LoraOptions, *, source_rank: int, rank: int
) -> str:
    """Return the text of the card; nothing of the card tells of this machine.

    Args:
        location: where the VeRA adapter lies.
        base: the base as the adapter's config names it.
        options: the options of the conversion.
        source_rank: the rank of the VeRA adapter.
        rank: the rank of the LoRA.
    """
    name = location.name
    known = base is not None and is_repo_id(base)
    fields = [f"base_model: {json.dumps(printable(base or ''))}"] if known else []
    commit = f" at commit `{location.commit}`" if location.commit else ""
    exact = options.rank is None and options.max_error is None
    kind = "the same change of the weights as" if exact else "an approximation of"
    return "\n".join(
        [
            "---",
            *fields,
            "library_name: peft",
            "tags:",
            "- lora",
            "- vera",
            "---",
            "",
            f"# LoRA of {printable(name)}",
            "",
            f"A LoRA of rank {rank} in {options.dtype}: {kind} the VeRA adapter",
            f"`{_code(name)}`{commit} of rank {source_rank}. Made by vera-convert {__version__}:",
            "",
            "```",
            _command(name, options),
            "```",
            "",
            "The metadata of `adapter_model.safetensors` records the SHA-256 of the source, the",
            "options, the origin of A and B, and the largest relative error of a layer's delta.",
            "",
        ]
    )


def _command(name: str, options: LoraOptions) -> str:
    words = ["vera-convert", "to-lora", printable(name), "OUT"]
    if options.engine is not EngineName.PEFT:
        words += ["--for", options.engine]
    if options.dtype != "float32":
        words += ["--dtype", options.dtype]
    if options.rank is not None:
        words += ["--rank", str(options.rank)]
    if options.max_error is not None:
        words += ["--max-error", repr(options.max_error)]
    flags = {"--fill-layers": options.fill_layers, "--drop-head": options.drop_head}
    return shlex.join([*words, *(flag for flag, given in flags.items() if given)])


def _code(text: str) -> str:
    return printable(text).replace("`", "'")
