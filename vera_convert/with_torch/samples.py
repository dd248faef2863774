"""What models are asked, and what they answer: samples drawn or read, and values to be compared."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from vera_convert.base.side_files import tokenizer_files
from vera_convert.errors import UsageError
from vera_convert.files.reading import open_local, parse_json
from vera_convert.hub.lookup import HubAccess, Location, list_files
from vera_convert.text import printable
from vera_convert.verification.model_comparison import INSTEAD
from vera_convert.with_torch.build import UnfitError, guarded

Sample = Mapping[str, Tensor]

_DRAWN_TOKENS = 12
_MOST_TOKENS = 64
"""Tokens of a sample that is drawn, and the most of one that is a line of text."""
_TEXT_BYTES = 1 << 20
_LINE_LETTERS = 4096
"""How much of a text is looked at, and of each line of it."""
_FILE_LIMIT = 100_000_000
"""The most bytes of a tokenizer's file; all of them together can have four times as many."""
_NOT_KEPT = frozenset(("auto_map", "init_inputs", "quantization_config"))
_KEPT_VALUES = 1 << 25
"""Values of all answers of a model together that are kept: 128 MiB, and there are four models."""


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """What a model gave for some samples.

    Attributes:
        values: (positions, values) of each sample.
        are_logits: whether the values of a position are logits, between which it chooses.
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
        """The largest value, whatever its sign."""
        return max(float(each.abs().max()) for each in self.values)


# --- asking --------------------------------------------------------------------------------------


def drawn_samples(model: nn.Module, count: int) -> list[Sample]:
    """Draw samples, the same each time: token ids from the vocabulary, or noise for images.

    Raises:
        UnfitError: the model takes something else.
    """
    config: Any = model.config
    generator = torch.Generator().manual_seed(0)
    kind = getattr(model, "main_input_name", "input_ids")
    if kind == "pixel_values":
        shape = (1, _channels(config), *_image_size(config))
        return [{kind: torch.randn(shape, generator=generator)} for _ in range(count)]
    if kind != "input_ids":
        raise UnfitError(
            f"{type(model).__name__} takes {printable(str(kind))}, for which no samples are made. "
            f"{INSTEAD}"
        )
    length = min(_DRAWN_TOKENS, _room(config))
    return [_with_decoder(model, _ids(model, length, generator), generator) for _ in range(count)]


def text_samples(model: nn.Module, folder: Path, text: Path, count: int) -> list[Sample]:
    """Make samples of the first lines of a text that are not empty.

    Args:
        model: the model that is to take them.
        folder: where its tokenizer lies.
        text: UTF-8. Of a long line, and of many lines, only the beginning is used.
        count: the most samples.

    Raises:
        UsageError: there is no line, it is no text, or the model takes none.
        CheckpointError: a file of the tokenizer is a link out of the folder, malformed, too large.
        SurroundingsError: the file or the tokenizer cannot be read.
    """
    import transformers

    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise UsageError(f"--text: {type(model).__name__} takes no text. Leave the option out.")
    lines = list(_lines(text))[:count]
    if not lines:
        raise UsageError(f"--text {printable(str(text))}: there is no line with something in it.")
    with (
        guarded(f"load the tokenizer of {printable(str(folder))}"),
        _tokenizer_of(folder) as copy,
    ):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            copy, local_files_only=True, trust_remote_code=False
        )
        most = min(_MOST_TOKENS, _room(model.config))
        known = _vocabulary(model)
        encoded = [
            tokenizer(line, truncation=True, max_length=most, return_tensors="pt")["input_ids"]
            for line in lines
        ]
    if any(not ids.numel() or int(ids.max()) >= known for ids in encoded):
        raise UsageError(
            f"--text {printable(str(text))}: the tokenizer of {printable(str(folder))} makes "
            f"nothing of a line, or tokens that the model's {known:,} do not have."
        )
    generator = torch.Generator().manual_seed(0)
    return [_with_decoder(model, ids, generator) for ids in encoded]


@contextmanager
def _tokenizer_of(folder: Path) -> Iterator[Path]:
    """Copy a tokenizer's files, checked, to where transformers can do with them what it likes.

    It would follow links, and names of files in the tokenizer's config, out of the folder.
    """
    location = Location(printable(str(folder)), folder)
    names = [*tokenizer_files(list_files(location, HubAccess(offline=True))), "config.json"]
    room = 4 * _FILE_LIMIT
    with TemporaryDirectory(prefix="vera-convert-") as made:
        for name in names:
            if not (folder / name).exists():
                continue
            with open_local(folder / name, within=folder, limit=_FILE_LIMIT) as source:
                room -= source.size
                if room < 0:
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
    """Return a config without what names files or code."""
    fields = document if isinstance(document, Mapping) else {}
    kept = {
        name: value
        for name, value in fields.items()
        if not name.endswith(("_file", "_files", "_path")) and name not in _NOT_KEPT
    }
    return json.dumps(kept).encode()


def _lines(text: Path) -> Iterator[str]:
    with open_local(text) as file:
        raw = file.read_at(0, min(file.size, _TEXT_BYTES))
        is_whole = file.size <= _TEXT_BYTES
    try:
        decoded = codecs.getincrementaldecoder("utf-8-sig")().decode(raw, final=is_whole)
    except UnicodeDecodeError as error:
        raise UsageError(
            f"--text {printable(str(text))} is no UTF-8: {error.reason} at byte {error.start}."
        ) from error
    lines = (line.strip()[:_LINE_LETTERS] for line in decoded.splitlines())
    return (line for line in lines if line)


def _vocabulary(model: nn.Module) -> int:
    """Return how many tokens a model can be given."""
    embedding = model.get_input_embeddings()
    rows = getattr(embedding, "num_embeddings", None)
    return int(rows if rows is not None else embedding.weight.shape[0])


def _room(config: Any) -> int:  # noqa: ANN401 -- a class of transformers
    """Return how many tokens a model takes, as far as its config says."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    # Some models begin to count positions at two.
    return max(1, found - 2) if isinstance(found, int) and found > 0 else _MOST_TOKENS


def _ids(model: nn.Module, length: int, generator: torch.Generator) -> Tensor:
    known = _vocabulary(model)
    ids = torch.randint(0, known, (1, length), generator=generator)
    end = getattr(model.config.get_text_config(), "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < known:
        ids[0, -1] = end  # some classify by what stands at the end of a text
    return ids


def _with_decoder(model: nn.Module, ids: Tensor, generator: torch.Generator) -> Sample:
    if not getattr(model.config, "is_encoder_decoder", False):
        return {"input_ids": ids}
    if type(model).__name__.endswith(("ForSequenceClassification", "ForQuestionAnswering")):
        return {"input_ids": ids}  # these make the decoder's ids themselves
    length = min(_DRAWN_TOKENS, _room(model.config))
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
            f"the config's image_size is {printable(str(found))}, for which no samples are made. "
            f"{INSTEAD}"
        )
    return sizes


# --- answers -------------------------------------------------------------------------------------


def answers(
    model: nn.Module,
    samples: Sequence[Sample],
    begin: Callable[[int], None] = lambda _place: None,
) -> Answers:
    """Ask a model all samples, one by one, and keep as much as there is room for.

    Args:
        model: the model.
        samples: what it is asked.
        begin: told the place of each sample before it is asked.

    Raises:
        UnfitError: it cannot be run.
        SurroundingsError: memory is short.
    """
    values = []
    are_logits = True
    room = _KEPT_VALUES // len(samples)
    dtype = next(model.parameters()).dtype
    with (
        guarded(f"run {type(model).__name__}"),
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
    ):
        for place, sample in enumerate(samples):
            begin(place)
            torch.manual_seed(0)  # some models hide parts of what they are shown at random
            fed = {
                name: each.to(dtype) if each.is_floating_point() else each
                for name, each in sample.items()
            }
            found, are_logits = _values_of(model(**fed))
            last = max(1, room // found.shape[1])  # the last positions have seen most
            values.append(found[-last:].to(torch.promote_types(dtype, torch.float32)).clone())
    are_finite = all(bool(each.isfinite().all()) for each in values)
    return Answers(tuple(values), are_logits, are_finite)


def _values_of(output: Any) -> tuple[Tensor, bool]:  # noqa: ANN401 -- of any class
    """Return the values of an output, (positions, values), and whether they are logits.

    Only what has at least two values for a position to choose from counts as logits. Where there
    are none, all states that are as wide as the first are taken: the last hidden ones, and pooled
    ones.
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
