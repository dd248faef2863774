"""Copies of the base's weights that PEFT stores for adapted output heads.

VeRA does not train such a weight. PEFT loads the copy, and every other engine has the base's own
weight, so the copy can be left out if both are the same.
"""

from __future__ import annotations

from collections.abc import Iterator

from vera_convert import rules
from vera_convert.adapter.adapter import Adapter
from vera_convert.assembly.input_files import InputFile, StoredTensor
from vera_convert.base.facts import BaseFacts
from vera_convert.base.model import BaseModel
from vera_convert.dtypes import FLOATS
from vera_convert.files.file_names import WEIGHTS_NAME
from vera_convert.files.tensorfile import TensorData
from vera_convert.rules import Finding
from vera_convert.text import printable


def copy_findings(adapter: Adapter, base_facts: BaseFacts, title: str) -> Iterator[Finding]:
    """Yield the copies that an engine other than PEFT cannot do without.

    Shapes are compared in the headers. Values are compared if the base's file lies here and holds
    plain floats.

    Args:
        adapter: the adapter.
        base_facts: the base facts.
        title: how messages call the engine.

    Raises:
        SurroundingsError: a file cannot be read.
    """
    base, match = base_facts.base, base_facts.match
    for module, copy in adapter.base_copies.items():
        if base is None or match is None:
            reason = f"without --base, nothing tells whether {title} has this weight of the base."
            yield rules.LORA_BASE_UNKNOWN.at(printable(copy.name), reason)
            continue
        name = match.tensors[module]
        shape = base.tensors[name].info.shape if name in base.tensors else copy.shape
        if shape not in (copy.shape, copy.shape[::-1]):
            reason = (
                f"the stored weight has shape {[*copy.shape]}, the base's {[*shape]}, and {title} "
                "keeps the base's. If the vocabulary was resized, merge the adapter."
            )
            yield rules.BASE_COPY_DIFFERS.in_tensor(copy.name, reason)
        elif shape == copy.shape and not _is_the_bases(copy, name, adapter, base):
            reason = (
                f"the stored values differ from {printable(name)} of the base, and {title} keeps "
                "the base's."
            )
            yield rules.BASE_COPY_DIFFERS.in_tensor(copy.name, reason)


def _is_the_bases(copy: TensorData, name: str, adapter: Adapter, base: BaseModel) -> bool:
    """Say whether a copy has the base's values, as far as the base's files lie here."""
    tensor, folder = base.tensors.get(name), base.location.folder
    if tensor is None or folder is None or tensor.info.dtype not in FLOATS:
        return True
    path, header = folder / tensor.file, base.files[tensor.file]
    if not path.exists():
        return True
    own = StoredTensor.of(InputFile.look(path, within=folder), header, tensor.info)
    header = adapter.file.header
    file = InputFile.look(adapter.folder / WEIGHTS_NAME, within=adapter.folder)
    return own.is_copied_by(StoredTensor.of(file, header, header.tensors[copy.name]))
