"""Build models of transformers from a stranger's folder; run no foreign code, download nothing.

    folder ── our reader ──► config, tensors ──► a class from the Auto classes ──► the model

transformers never sees the path, because transformers would download attention kernels, code and
weights that a config names, and would load adapters and pickles from the folder.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vera_convert.adapter.adapter import Adapter
from vera_convert.adapter.config import SAVED_BY_TASK
from vera_convert.adapter.saved_modules import replaced_name
from vera_convert.assembly.input_files import InputFile
from vera_convert.base.model import BaseModel, read_base
from vera_convert.base.quantized.layer import PackedWeight
from vera_convert.base.quantized.unpack import Unpacked, unpacked
from vera_convert.base.vocabulary import embedding_rows
from vera_convert.embeddings import is_embedding, is_output_head
from vera_convert.errors import SurroundingsError, VeraConvertError
from vera_convert.files.reading import open_local
from vera_convert.files.tensorfile import TensorFile, from_file
from vera_convert.hub.client import no_network
from vera_convert.hub.lookup import HubAccess, Location
from vera_convert.merging.dequantize import Decoder
from vera_convert.text import printable
from vera_convert.verification.model_comparison import INSTEAD
from vera_convert.verification.running import printable_reason
from vera_convert.with_torch.arrays import to_tensor
from vera_convert.with_torch.auto_classes import classes_of, trained_on
from vera_convert.with_torch.config_fields import known_fields

_COUNTED = ("layer", "depth", "block", "stage", "expert", "label")
_MOST = 100_000
"""Parts of the names of fields that count something, and the largest count allowed.

Configs make lists of such a length, and models make as many modules.
"""
_COUNTS_LAYERS = re.compile(
    r"(num|n)_.*(layer|block|stage)s?|.*_layers|(.*_)?depths?|.*layers?_(count|num)|n_layer"
)
_COUNTS_EXPERTS = re.compile(r"(num|n)_.*experts?|.*_experts")
_MORE_LAYERS = 64
_MORE_EXPERTS = 1024
"""How many more layers, and experts, than tensors a model can have: experts can share a tensor."""
_EXTRA_BYTES = 1 << 28
"""How many bytes a model can need beyond the files, for a new head or tables of positions."""


class UnfitError(SurroundingsError):
    """transformers cannot build or run the model of a folder, for a reason other than memory."""


@dataclass(frozen=True, slots=True, eq=False)
class Blueprint:
    """How the model of a folder is built.

    Attributes:
        base: the tensors.
        model: the class of transformers.
        config: the config, as an object of transformers.
        rows: the rows of the vocabulary, if an adapter resizes the vocabulary; else None.
        relabeled: whether an adapter brings a classifier with another number of labels.
        packed: the packed weights of a quantized base that is built dequantized; else None.
        head: (rows, width), the weight that PEFT stored for an adapted head with a resized
            vocabulary; else None.
    """

    base: BaseModel
    model: Any
    config: Any
    rows: int | None = None
    relabeled: bool = False
    packed: Unpacked | None = None
    head: Tensor | None = None

    @property
    def place(self) -> str:
        """The name of the folder in messages."""
        return printable(self.base.location.label)

    @property
    def name(self) -> str:
        """The name of the class."""
        return str(self.model.__name__)


@contextmanager
def guarded(action: str, library: str = "transformers") -> Iterator[None]:
    """Run a library silently and without network, and raise failures as our errors.

    Args:
        action: the action, for messages that begin with "transformers cannot".
        library: the name of the library, for messages.

    Raises:
        UnfitError: transformers failed.
        SurroundingsError: memory ran out.
    """
    import transformers

    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings(), no_network():
            warnings.simplefilter("ignore")
            yield
    except VeraConvertError:
        raise
    except BaseException as error:
        # Libraries in Rust raise a PanicException, which is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise SurroundingsError(f"memory ran out: cannot {action}. {INSTEAD}") from error
        reason = printable_reason(error)
        raise UnfitError(f"{library} cannot {action}: {reason}. {INSTEAD}") from error
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


# --- understanding -------------------------------------------------------------------------------


def blueprint(
    folder: Path,
    *,
    label: str,
    adapters: Iterable[Adapter] = (),
    like: str | None = None,
    dequantize: bool = False,
) -> Blueprint:
    """Find the class of transformers for the model of a folder.

    Args:
        folder: the folder of the model.
        label: the name of the folder in messages.
        adapters: the adapters to wrap the model with. The class that an adapter was trained on
            takes precedence over the class in the config: the head can differ, and with the head
            the names of the layers.
        like: the name of the class, if known.
        dequantize: build the 16-bit model of a quantized base.

    Raises:
        CheckpointError: the folder is malformed.
        UnfitError: transformers has no such class.
        SurroundingsError: a file cannot be read.
    """
    base = read_base(Location(label, folder), HubAccess(offline=True))
    packed = unpacked(base) if dequantize else None
    base = base if packed is None else packed.view
    place = printable(label)
    if base.prefix or "_class_name" in base.config or base.model_type is None:
        raise UnfitError(f"{place} is not a model of transformers. {INSTEAD}")
    if "quantization_config" in base.config and packed is None:
        raise UnfitError(f"{place} is quantized; verify runs no quantized model. {INSTEAD}")
    config = _config(base)
    found = classes_of(config)
    wanted = [like] if like else [*trained_on(adapters, base, config), *base.class_names]
    name = next((name for name in wanted if name in found), None)
    if name is None:
        listed = ", ".join(printable(str(each)) for each in wanted) or "no class"
        raise UnfitError(
            f"{place} names {listed}, and the installed transformers has no such class for "
            f"{printable(str(base.model_type))}.{_code_text(base)} {INSTEAD}"
        )
    labels = _labels(adapters)
    relabeled = labels is not None and labels != config.num_labels
    if relabeled:
        config.num_labels = labels
    if type(config) is not found[name].config_class:
        config = config.get_text_config()  # of a multimodal model, only the text part is built
    rows, head = _resized(adapters, base)
    return Blueprint(base, found[name], config, rows, relabeled, packed, head)


def _config(base: BaseModel) -> Any:  # noqa: ANN401 -- a class of transformers
    """Return the config as an object of transformers, with the fields of the class only."""
    import transformers

    kind, place = base.model_type, printable(base.location.label)
    mapping = transformers.CONFIG_MAPPING
    if kind not in mapping:
        raise UnfitError(
            f"{place} is of type {printable(str(kind))}, which transformers "
            f"{transformers.__version__} does not have.{_code_text(base)}{_written_by(base)} "
            f"{INSTEAD}"
        )
    if _counts_too_many(base.config, len(base.tensors)):
        raise _too_large(place)
    with guarded(f"read the config of {place}"):
        return mapping[kind].from_dict(known_fields(mapping[kind], base.config))


def _written_by(base: BaseModel) -> str:
    """Name the release of transformers that wrote a config, if later than the installed release."""
    release = base.config.get("transformers_version")
    if not isinstance(release, str) or not re.fullmatch(r"\d{1,4}(\.\w{1,8}){1,3}", release):
        return ""
    if _numbers(release) <= _installed():
        return ""
    return f" transformers {printable(release)} wrote the config: install that or a later release."


def _installed() -> tuple[int, ...]:
    import transformers

    return _numbers(transformers.__version__)


def _numbers(release: str) -> tuple[int, ...]:
    """Return the first two numbers of a release."""
    return tuple(int(part) for part in release.split(".")[:2] if part.isdecimal())


def _counts_too_many(value: object, tensors: int, name: str = "") -> bool:
    """Return whether a field of a config, or a field inside it, counts too many of something.

    Args:
        value: the value of the field.
        tensors: how many tensors the files have; each layer has some.
        name: the name of the field.
    """
    if isinstance(value, Mapping):
        return any(_counts_too_many(each, tensors, str(key)) for key, each in value.items())
    if isinstance(value, list):
        return any(_counts_too_many(each, tensors, name) for each in value)
    if not isinstance(value, int):
        return False
    if _COUNTS_EXPERTS.fullmatch(name):
        return abs(value) > tensors + _MORE_EXPERTS
    if _COUNTS_LAYERS.fullmatch(name):
        return abs(value) > tensors + _MORE_LAYERS
    return abs(value) > _MOST and any(word in name for word in _COUNTED)


def _too_large(place: str) -> UnfitError:
    return UnfitError(
        f"{place}: the config describes a model that is far larger than the weights. Is it the "
        f"config of another model? {INSTEAD}"
    )


def _code_text(base: BaseModel) -> str:
    if not base.config.get("auto_map"):
        return ""
    return " The model brings its own code, which is never run."


def _labels(adapters: Iterable[Adapter]) -> int | None:
    """Return the number of labels of an adapter's head; None if no adapter has a head."""
    for adapter in adapters:
        heads = SAVED_BY_TASK.get(adapter.config.task_type or "", ())
        for tensor in adapter.replacements:
            module, _, parameter = replaced_name(tensor.name).rpartition(".")
            last = module.removesuffix(".out_proj").rpartition(".")[2]
            if last in heads and parameter == "weight" and len(tensor.shape) == 2:
                return tensor.shape[0]
    return None


def _resized(adapters: Iterable[Adapter], base: BaseModel) -> tuple[int | None, Tensor | None]:
    """Return the rows of a resized vocabulary, and the weight that PEFT stored for its head.

    PEFT stores a weight only for an adapted head. None stands for a vocabulary of the base's size.
    """
    own = (embedding_rows(base),)
    for adapter in adapters:
        for module, copy in adapter.base_copies.items():
            if is_output_head(module, base.model_type) and copy.shape[:1] != own:
                return copy.shape[0], to_tensor(copy.array())
    for adapter in adapters:
        for tensor in adapter.replacements:
            module = replaced_name(tensor.name).rpartition(".")[0]
            if is_embedding(module) and tensor.shape[:1] != own:
                return tensor.shape[0], None
    return None, None


# --- building ------------------------------------------------------------------------------------


def build_model(plan: Blueprint) -> nn.Module:
    """Return the model in eval mode, with weights in the stored dtypes.

    Weights that the files lack are random, the same in each run.

    Raises:
        CheckpointError: a file is malformed.
        UnfitError: transformers cannot build the model.
        SurroundingsError: a file cannot be read, or memory ran out.
    """
    with guarded(f"build {plan.place}"), torch.random.fork_rng(devices=[]):
        _refuse_too_large(plan)
        torch.manual_seed(0)
        model: nn.Module = plan.model.from_pretrained(
            None,
            config=plan.config,
            state_dict=_tensors(plan),
            **(as_stored() if plan.packed is None else as_stored(torch.float32)),
            attn_implementation="eager",
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=plan.relabeled,
        )
        if plan.rows is not None:  # the adapter holds the values of every row
            model.resize_token_embeddings(plan.rows, mean_resizing=False)
        if plan.head is not None:
            # The new rows of the head are also those of an embedding that is tied to the head.
            old = embedding_rows(plan.base)
            with torch.no_grad():
                model.get_output_embeddings().weight[old:] = plan.head[old:]
        return model.eval()


def as_stored(dtype: str | torch.dtype = "auto") -> dict[str, str | torch.dtype]:
    """Return the argument with which transformers keeps the dtypes of the files, or takes one.

    transformers 4.56 renamed ``torch_dtype`` to ``dtype``.
    """
    return {"dtype" if _installed() >= (4, 56) else "torch_dtype": dtype}


def _refuse_too_large(plan: Blueprint) -> None:
    """Raise `UnfitError` if the config needs much more memory than the weights."""
    with torch.device("meta"):
        model = plan.model(plan.config)
    tensors = (*model.parameters(), *model.buffers())
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    held = plan.base.weights_size if plan.packed is None else plan.packed.nbytes
    if needed > 4 * held + _EXTRA_BYTES:
        raise _too_large(plan.place)


def _tensors(plan: Blueprint) -> dict[str, Tensor]:
    """Return the tensors of a base; the packed weights of a quantized base are dequantized."""
    stored, weights = plan.base, dict[str, PackedWeight]()
    if plan.packed is not None:
        plan.packed.refuse_defects()
        stored, weights = plan.packed.stored, dict(plan.packed.weights)
    folder = stored.location.fetched
    names = plan.base.tensors.keys() - weights.keys()
    found: dict[str, Tensor] = {}
    for shard in stored.files:
        with open_local(folder / shard, within=folder) as source:
            file = TensorFile(source)
            found |= {
                name: to_tensor(from_file(file, name).array())
                for name in file.header.tensors
                if name in names
            }
    files = {shard: InputFile.look(folder / shard, within=folder) for shard in stored.files}
    for name, weight in weights.items():
        values = Decoder(stored, files, weight)(0, weight.matrix[0])
        found[name] = to_tensor(values.reshape(plan.base.tensors[name].info.shape))
    return found
