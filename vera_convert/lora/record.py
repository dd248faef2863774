"""The provenance of a LoRA: the record in the metadata of the weights, and the model card.

The same inputs and options give the same record and card, without times and paths.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256

from vera_convert._version import __version__
from vera_convert.adapter.adapter import Adapter
from vera_convert.adapter.lora_record import RECORD_KEY
from vera_convert.base.facts import BaseOptions
from vera_convert.hub.lookup import Location
from vera_convert.hub.repo_name import is_repo_id
from vera_convert.lora.engines import Form
from vera_convert.lora.options import LoraOptions
from vera_convert.lora.plan import LoraPlan
from vera_convert.merging.in_effect import InEffect
from vera_convert.text import printable

_LIBRARIES = {Form.PEFT: "peft", Form.DIFFUSERS: "diffusers", Form.MLX: "mlx", Form.GGUF: "gguf"}
"""The Hub's name of the library for a form."""


@dataclass(frozen=True, slots=True)
class LoraSource:
    """The source of a LoRA.

    Attributes:
        location: where the VeRA adapter lies.
        adapter: the VeRA adapter.
        pair: the A and B in effect.
        options: the options of the conversion.
        base: the options of the base.
    """

    location: Location
    adapter: Adapter
    pair: InEffect
    options: LoraOptions
    base: BaseOptions


def record_of(source: LoraSource, plan: LoraPlan, *, source_sha256: str) -> dict[str, object]:
    """Return the record of a LoRA, but for its error.

    Args:
        source: the source of the LoRA.
        plan: the LoRA.
        source_sha256: the SHA-256 of the adapter's weights; `NO_SHA256` to measure the record.
    """
    adapter, pair = source.adapter, source.pair
    return {
        "format": 1,
        "vera_convert": __version__,
        "source": source.location.record,
        "source_sha256": source_sha256,
        "config_sha256": sha256(adapter.config_file.text).hexdigest(),
        "source_rank": adapter.config.r,
        "rank": plan.rank,
        "layers": len(plan.layers),
        "projections": {
            "origin": pair.origin,
            "draw": asdict(pair.draw) if pair.draw is not None else None,
        },
        "options": dict(source.options.record(source.base)),
    }


def metadata_with(
    record: Mapping[str, object], error: float, others: Mapping[str, str]
) -> dict[str, str]:
    """Return the metadata of the weights; the length does not depend on the error.

    Args:
        record: the record.
        error: the largest relative error of a layer's delta, from 0 to 99.
        others: further metadata.
    """
    shown = f"{error if error >= 1e-99 else 0.0:.2e}"
    own = {RECORD_KEY: json.dumps({**record, "relative_error": shown})}
    return {"format": "pt", **others, **own}


# --- the card ------------------------------------------------------------------------------------


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
    code = printable(name).replace("`", "'")
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
            f"the VeRA adapter `{code}`{commit} of rank {config.r}.",
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
    given, usual, location = source.options, LoraOptions(), source.location
    words = ["vera-convert", "to-lora", printable(location.address or location.name), "OUT"]
    words += ["--base", base.address or "MODEL"] if base is not None else []
    words += ["--base-dtype", source.base.dtype] if source.base.dtype is not None else []
    for name in ("engine", "dtype", "rank", "max_error", "projections", "generator"):
        value = getattr(given, name)
        if value != getattr(usual, name):
            words += [_flag(name), str(value)]
    for old, new in source.base.key_map:
        words += ["--key-map", f"{old}={new}"]
    flags = ("accept_error", "fill_layers", "drop_head")
    return shlex.join([*words, *(_flag(name) for name in flags if getattr(given, name))])


def _flag(option: str) -> str:
    return "--for" if option == "engine" else f"--{option.replace('_', '-')}"
