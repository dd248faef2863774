"""Make samples for a model, random or from text, and run models on the samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from vera_convert.base.side_files import tokenizer_files
from vera_convert.errors import UsageError
from vera_convert.files.reading import open_local
from vera_convert.files.strict_json import parse_json
from vera_convert.hub.lookup import HubAccess, Location, list_files
from vera_convert.text import printable
from vera_convert.verification.model_comparison import INSTEAD
from vera_convert.with_torch.build import UnfitError, guarded

Sample = Mapping[str, Tensor]

_DRAWN_TOKENS = 12
_MOST_TOKENS = 64
"""The tokens of a random sample, and the most tokens of a line of text."""
_FILE_LIMIT = 100_000_000
"""The most bytes of a tokenizer's file; all files together can have four times as many."""
_NOT_KEPT = frozenset(("auto_map", "init_inputs", "quantization_config"))
_KEPT_VALUES = 1 << 25
"""How many output values of a model are kept: 128 MiB for each of four models."""


@dataclass(frozen=True, slots=True, eq=False)
class Outputs:
    """The outputs of a model for some samples.

    Attributes:
        values: (positions, values) of each sample.
        are_logits: whether the values of a position are logits, of which the largest is chosen.
        are_finite: whether all values are finite.
    """

    values: tuple[Tensor, ...]
    are_logits: bool
    are_finite: bool

    @property
    def positions(self) -> int:
        """How many positions there are."""
        return sum(len(each) for each in self.values)

    @property
    def largest(self) -> float:
        """The largest absolute value."""
        return max(float(each.abs().max()) for each in self.values)


# --- samples -------------------------------------------------------------------------------------


def drawn_samples(model: nn.Module, count: int) -> list[Sample]:
    """Draw random samples, the same in each run: token ids, or noise for image models.

    Raises:
        UnfitError: the model takes neither token ids nor images.
    """
    config: Any = model.config
    generator = torch.Generator().manual_seed(0)
    kind = getattr(model, "main_input_name", "input_ids")
    if kind == "pixel_values":
        shape = (1, _channels(config), *_image_size(config))
        return [{kind: torch.randn(shape, generator=generator)} for _ in range(count)]
    if kind != "input_ids":
        raise UnfitError(
            f"{type(model).__name__} takes {printable(str(kind))}. Only token ids and images can "
            f"be run. {INSTEAD}"
        )
    length = min(_DRAWN_TOKENS, _most_tokens(config))
    return [_with_decoder(model, _ids(model, length, generator), generator) for _ in range(count)]


def text_samples(model: nn.Module, folder: Path, lines: Iterable[str]) -> list[Sample]:
    """Turn lines of text into token ids.

    Args:
        model: the model.
        folder: the folder of the model's tokenizer.
        lines: the lines; a long line is cut.

    Raises:
        UsageError: the model takes no text, or a line has no usable tokens.
        CheckpointError: a file of the tokenizer is malformed, too large, or a link to another
            folder.
        SurroundingsError: the tokenizer cannot be read.
    """
    import transformers

    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise UsageError(f"--text: {type(model).__name__} takes no text. Leave the option out.")
    with (
        guarded(f"load the tokenizer of {printable(str(folder))}, which --text needs"),
        _copied_tokenizer(folder) as copy,
    ):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            copy, local_files_only=True, trust_remote_code=False
        )
        most = min(_MOST_TOKENS, _most_tokens(model.config))
        known = _vocabulary(model)
        encoded = [
            tokenizer(line, truncation=True, max_length=most, return_tensors="pt")["input_ids"]
            for line in lines
        ]
    if any(not ids.numel() or int(ids.max()) >= known for ids in encoded):
        raise UsageError(
            f"--text: for a line, the tokenizer of {printable(str(folder))} gives no tokens, or "
            f"tokens beyond the model's {known:,}."
        )
    generator = torch.Generator().manual_seed(0)
    return [_with_decoder(model, ids, generator) for ids in encoded]


@contextmanager
def _copied_tokenizer(folder: Path) -> Iterator[Path]:
    """Check a tokenizer's files, and copy the files to a temporary folder for transformers.

    In the original folder, transformers would follow links, and file names in the tokenizer's
    config, to other folders.
    """
    location = Location(printable(str(folder)), folder)
    names = [*tokenizer_files(list_files(location, HubAccess(offline=True)))]
    if not names:
        raise UsageError(
            f"--text: {location.label} has no tokenizer. Leave --text out, to run random token ids."
        )
    names.append("config.json")
    bytes_left = 4 * _FILE_LIMIT
    with TemporaryDirectory(prefix="vera-convert-") as made:
        for name in names:
            if not (folder / name).exists():
                continue
            with open_local(folder / name, within=folder, limit=_FILE_LIMIT) as source:
                bytes_left -= source.size
                if bytes_left < 0:
                    raise UnfitError(f"the tokenizer of {location.label} is too large.")
                text = source.read_at(0, source.size)
                source.check_unchanged()
                if name in ("config.json", "tokenizer_config.json"):
                    text = _without_files(
                        parse_json(text, place=source.place, pythons_numbers=True)
                    )
            target = Path(made, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(text)
        yield Path(made)


def _without_files(document: object) -> bytes:
    """Return a config without names of files or code."""
    fields = document if isinstance(document, Mapping) else {}
    kept = {
        name: value
        for name, value in fields.items()
        if not name.endswith(("_file", "_files", "_path")) and name not in _NOT_KEPT
    }
    return json.dumps(kept).encode()


def _vocabulary(model: nn.Module) -> int:
    """Return how many different tokens a model knows."""
    embedding = model.get_input_embeddings()
    rows = getattr(embedding, "num_embeddings", None)
    return int(rows if rows is not None else embedding.weight.shape[0])


def _most_tokens(config: Any) -> int:  # noqa: ANN401 -- a class of transformers
    """Return how many tokens a model takes at most; `_MOST_TOKENS` if its config does not say."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    # Some models number their positions from two.
    return max(1, found - 2) if isinstance(found, int) and found > 0 else _MOST_TOKENS


def _ids(model: nn.Module, length: int, generator: torch.Generator) -> Tensor:
    known = _vocabulary(model)
    ids = torch.randint(0, known, (1, length), generator=generator)
    end = getattr(model.config.get_text_config(), "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < known:
        ids[0, -1] = end  # some models classify by the last token
    return ids


def _with_decoder(model: nn.Module, ids: Tensor, generator: torch.Generator) -> Sample:
    if not getattr(model.config, "is_encoder_decoder", False):
        return {"input_ids": ids}
    if type(model).__name__.endswith(("ForSequenceClassification", "ForQuestionAnswering")):
        return {"input_ids": ids}  # these classes make the decoder's ids
    length = min(_DRAWN_TOKENS, _most_tokens(model.config))
    decoder_ids = torch.randint(0, _vocabulary(model), (1, length), generator=generator)
    return {"input_ids": ids, "decoder_input_ids": decoder_ids}


def _channels(config: Any) -> int:  # noqa: ANN401
    found = getattr(config, "num_channels", 3)
    return found if isinstance(found, int) else 3


def _image_size(config: Any) -> tuple[int, int]:  # noqa: ANN401
    found = getattr(config, "image_size", 224)
    sizes = tuple(found) if isinstance(found, (list, tuple)) else (found, found)
    if len(sizes) != 2 or not all(isinstance(size, int) and 0 < size <= 4096 for size in sizes):
        raise UnfitError(
            f"the config's image_size is {printable(str(found))}, not one or two whole numbers up "
            f"to 4096. {INSTEAD}"
        )
    return sizes


# --- outputs -------------------------------------------------------------------------------------


def run_model(model: nn.Module, samples: Sequence[Sample], begin: Callable[[], None]) -> Outputs:
    """Run a model on each sample, and keep up to `_KEPT_VALUES` output values.

    Args:
        model: the model.
        samples: the samples.
        begin: called before the model runs on each sample.

    Raises:
        UnfitError: the model cannot be run.
        SurroundingsError: memory ran out.
    """
    values = []
    are_logits = True
    most = _KEPT_VALUES // len(samples)
    dtype = next(model.parameters()).dtype
    with (
        guarded(f"run {type(model).__name__}"),
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
    ):
        for sample in samples:
            begin()
            torch.manual_seed(0)  # some models mask parts of their input at random
            inputs = {
                name: each.to(dtype) if each.is_floating_point() else each
                for name, each in sample.items()
            }
            found, are_logits = _values_of(model(**inputs))
            last = max(1, most // found.shape[1])  # the last positions depend on most tokens
            values.append(found[-last:].to(torch.promote_types(dtype, torch.float32)).clone())
    are_finite = all(bool(each.isfinite().all()) for each in values)
    return Outputs(tuple(values), are_logits, are_finite)


def _values_of(output: Any) -> tuple[Tensor, bool]:  # noqa: ANN401 -- of any class
    """Return the values of an output, (positions, values), and whether the values are logits.

    Logits have at least two values for each position. An output without logits is represented by
    all states as wide as the first: the last hidden states, and pooled states.
    """
    found = {name: value for name, value in output.items() if isinstance(value, Tensor)}
    logits = found.get("logits")
    if logits is None and "start_logits" in found:
        logits = torch.stack([found["start_logits"], found["end_logits"]], dim=1)
    if logits is None:
        first = next(iter(found.values()))
        states = [each for each in found.values() if each.shape[-1:] == first.shape[-1:]]
        return torch.cat([each.reshape(-1, first.shape[-1]) for each in states]), False
    if logits.ndim == 4:
        logits = logits.movedim(1, -1)  # of each pixel
    logits = logits.reshape(-1, logits.shape[-1])
    return logits, logits.shape[-1] > 1
