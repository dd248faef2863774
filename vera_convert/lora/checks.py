"""Find errors and doubts about the adapter, and parts refused or left out by the engine."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from vera_convert import rules
from vera_convert.adapter.adapter import Adapter
from vera_convert.adapter.folder import SideFiles
from vera_convert.adapter.saved_modules import replaced_name
from vera_convert.adapter.values import absurd_values, untrained_layers
from vera_convert.assembly.input_files import InputFile, StoredTensor
from vera_convert.base.facts import BaseFacts
from vera_convert.base.model import BaseModel
from vera_convert.base.vocabulary import check_own_tokens
from vera_convert.conversion.work import Work
from vera_convert.dtypes import FLOATS
from vera_convert.files.file_names import WEIGHTS_NAME
from vera_convert.files.tensorfile import TensorData
from vera_convert.lora.engines import Engine, engines, engines_for, experts_of, is_in_tower
from vera_convert.lora.forms import Extras
from vera_convert.lora.options import LoraOptions
from vera_convert.lora.plan import LoraPlan
from vera_convert.merging.adapter_files import unmerged_findings, unmerged_weights
from vera_convert.rules import Finding, Rule
from vera_convert.tables import table
from vera_convert.targets.linear import kind_of
from vera_convert.text import counted, listed, printable


def adapter_findings(
    work: Work, base_facts: BaseFacts, sides: SideFiles, copied: Collection[str]
) -> Iterator[Finding]:
    """Yield doubts about an adapter: implausible values, missing training, weights left out.

    Args:
        work: the opened adapter.
        base_facts: the base facts.
        sides: the files beside the adapter.
        copied: the files beside the adapter copied with the LoRA.

    Raises:
        CheckpointError: a copied tokenizer has a token without a row in the embedding.
    """
    adapter, label = work.adapter, work.location.label
    layers = [*adapter.layers.values()]
    yield from absurd_values(adapter.file, work.values)
    yield from untrained_layers(layers, work.values, starts_at_one=not adapter.config.init_weights)
    yield from unmerged_findings(unmerged_weights(work.location, sides.copied), label)
    check_own_tokens(adapter, copied, base_facts.base, place=label)


def engine_findings(
    plan: LoraPlan, extras: Extras, options: LoraOptions, base_facts: BaseFacts, *, place: str
) -> Iterator[Finding]:
    """Yield the faults of a LoRA for its engine, and facts for the user.

    Args:
        plan: the LoRA.
        extras: the adapter's heads and biases.
        options: the options of the conversion.
        base_facts: the base facts.
        place: how messages call the adapter.
    """
    engine = options.target
    yield from _base_findings(engine, base_facts)
    yield from _rank_findings(plan, engine, place)
    yield from _name_findings(plan, engine, base_facts)
    yield from _model_findings(plan, engine, base_facts)
    yield from _kind_findings(plan, engine)
    if engine.renames_targets:
        yield from peft_findings([layer.module for layer in plan.layers], base_facts)
    if options.drop_head:
        if extras.tensors:
            names = listed(each.name for each in extras.tensors)
            reason = f"{counted(len(extras.tensors), 'tensor')} left out: {names}."
            yield rules.LORA_HEAD_LEFT_OUT.at(place, reason)
    else:
        yield from _extra_findings(extras, engine, place)


def _base_findings(engine: Engine, base_facts: BaseFacts) -> Iterator[Finding]:
    """Yield the error that the engine takes no LoRA of a base of this kind."""
    base = base_facts.base
    if base is None:
        return
    kind = base.config.get("_class_name")
    if not engine.components and (isinstance(kind, str) or base.prefix):
        named = base.prefix.rstrip("/") or str(kind)
        reason = (
            f"the base is a component of a pipeline, {printable(named)}, which {engine.title} does "
            "not serve."
        )
        found = rules.LORA_BASE_UNKNOWN.at(base.location.label, reason)
        yield found.with_remedy(engines_for(base))
    for name in base.class_names[:1]:
        if name in engine.refused:
            reason = f"{engine.title} takes no LoRA of a {name}."
            found = rules.LORA_BASE_UNKNOWN.at(base.location.label, reason)
            yield found.with_remedy(f"{engines_for(base)} Or merge the adapter.")


def _rank_findings(plan: LoraPlan, engine: Engine, place: str) -> Iterator[Finding]:
    if engine.server_rank(plan.rank) is None:
        highest = engine.ranks[-1]
        reason = f"the LoRA's rank is {plan.rank}, and {engine.title} serves {highest} at most."
        if plan.exact_rank <= highest:
            reason += f" --rank {plan.exact_rank} is exact up to rounding."
        else:
            reason += f" With --rank {highest} --dry-run, the error of the best LoRA is shown."
        yield rules.LORA_RANK_TOO_HIGH.at(place, reason)
    elif engine.fast_rank and plan.rank > engine.fast_rank:
        reason = f"the LoRA's rank is {plan.rank}; {engine.title} is fast up to {engine.fast_rank}."
        yield rules.LORA_RANK_SLOW.at(place, reason)


def _name_findings(plan: LoraPlan, engine: Engine, base_facts: BaseFacts) -> Iterator[Finding]:
    written = [layer.written for layer in plan.layers]
    yield from _left_out(
        [name for name in written if not engine.knows(name)],
        f"{engine.title} looks up no such module, so the layer would have no effect",
    )
    if engine.one_of_a_kind:
        yield from _left_out(
            _overwritten(written),
            f"{engine.title} keeps one LoRA for each name in a layer, and another module of the "
            "layer has the same name",
        )
    if engine.every_layer:
        yield from _left_out(
            _absent_elsewhere(plan, base_facts),
            f"the base has no such module in another layer, and {engine.title} then drops "
            "the LoRA of all layers",
        )
    towers = [name for name in written if is_in_tower(name)]
    if engine.tower:
        reason = (
            f"{engine.title} loads the LoRA of this layer only with {engine.tower}, and for few "
            "kinds of models."
        )
        yield from _at_each(towers, rules.LORA_TOWER, reason)
    reason = f"{engine.title} needs a LoRA of this layer beside the adapted ones."
    yield from _at_each(plan.missing, rules.LORA_LAYERS_MISSING, reason)


def _model_type(base_facts: BaseFacts) -> str:
    """Return the model_type of the base; empty if not known."""
    return (base_facts.base.model_type if base_facts.base is not None else None) or ""


def _model_findings(plan: LoraPlan, engine: Engine, base_facts: BaseFacts) -> Iterator[Finding]:
    """Yield the layers refused by the engine in models of the base's kind."""
    modules = [layer.module for layer in plan.layers]
    model_type = _model_type(base_facts)
    there = {*base_facts.modules, *modules}
    for last, other in engine.needed_in_base.items():
        alone = [
            module
            for module in _called(last, modules)
            if f"{module.removesuffix(last)}{other}" not in there
        ]
        yield from _left_out(
            alone if base_facts.modules else (),
            f"the base has no {other} beside the layer, and {engine.title} refuses {last} then",
        )
    for last, types in engine.whole_in.items():
        split = model_type and model_type not in types
        yield from _left_out(
            _called(last, modules) if split else (),
            f'in a model of type "{printable(model_type)}" {engine.title} has several modules in '
            "place of the layer",
        )


def _called(last: str, modules: Sequence[str]) -> list[str]:
    """Return the modules whose path ends with a name."""
    return [module for module in modules if module.rpartition(".")[2] == last]


def _left_out(names: Sequence[str], reason: str) -> Iterator[Finding]:
    """Yield the error that an engine would refuse a layer or silently leave the layer out."""
    yield from _at_each(names, rules.LORA_NAME_UNKNOWN, f"{reason}.")


def _at_each(names: Iterable[str], rule: Rule, reason: str) -> Iterator[Finding]:
    """Yield a finding for each layer, so that a JSON document lists every layer."""
    for name in names:
        yield rule.at(printable(name), reason)


def _overwritten(names: Sequence[str]) -> list[str]:
    """Return the modules whose layer has another module with the same last name."""
    seen: dict[tuple[str, str], str] = {}
    found = []
    for name in names:
        number = re.search(r"layers\.([0-9]+)\.", name)
        if number is None or experts_of(name):
            continue
        if seen.setdefault((number[1], name.rpartition(".")[2]), name) != name:
            found.append(name)
    return found


def _absent_elsewhere(plan: LoraPlan, base_facts: BaseFacts) -> list[str]:
    """Return the modules of kinds missing in another layer of the base."""
    modules = base_facts.modules
    layers: dict[str, set[str]] = {}
    for module in modules:
        path = module.removesuffix(kind_of(module))
        layers.setdefault(re.sub(r"\d+", "N", path), set()).add(path)
    found = []
    for layer in plan.layers:
        kind = kind_of(layer.module)
        like = layers.get(re.sub(r"\d+", "N", layer.module.removesuffix(kind)), ())
        if any(f"{path}{kind}" not in modules for path in like):
            found.append(layer.module)
    return found


def _kind_findings(plan: LoraPlan, engine: Engine) -> Iterator[Finding]:
    conv1d = [layer.module for layer in plan.layers if layer.shape.conv1d]
    if not engine.conv1d:
        yield from _at_each(conv1d, rules.LORA_CONV1D_REFUSED, "the layer is a Conv1D.")
    tied = [layer.module for layer in plan.layers if layer.tied]
    if not engine.tied_head:
        yield from _left_out(
            tied, f"{engine.title} has no such layer: its tensor is the embedding's"
        )


def _extra_findings(extras: Extras, engine: Engine, place: str) -> Iterator[Finding]:
    if extras.heads and engine.heads is not None:
        modules = {replaced_name(each.name).rpartition(".")[0] for each in extras.heads}
        wrong = sorted(each for each in modules if each.rpartition(".")[2] not in engine.heads)
        if not wrong and len(modules) > 1:
            wrong = sorted(modules)[1:]  # one head is all that any engine takes
        reason = f"{engine.title} does not load this module, which the adapter stores whole."
        yield from _at_each(wrong, rules.LORA_HEAD_REFUSED, reason)
    if extras.biases and not engine.biases:
        first = printable(extras.biases[0].name)
        reason = f"{engine.title} does not load trained biases, such as {first}."
        yield rules.LORA_BIAS_REFUSED.at(place, reason)
    if extras.tensors and engine.heads is None:
        refusing = [each for each in engines().values() if each.heads is not None]
        titles = ", ".join(each.title for each in refusing)
        first = printable(extras.tensors[0].name)
        reason = f"{first} is stored whole. These engines take few such tensors or none: {titles}."
        yield rules.LORA_HEAD_ELSEWHERE.at(place, reason)


def copy_findings(adapter: Adapter, base_facts: BaseFacts, title: str) -> Iterator[Finding]:
    """Yield the copies of adapted output heads that an engine other than PEFT cannot do without.

    VeRA does not train the weight of an adapted head. PEFT stores a copy and loads the copy, and
    every other engine has the base's own weight, so a copy of the same weight can be left out.
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


# --- layers that PEFT loads for VeRA, and not for a LoRA -----------------------------------------

_FUSED_EXPERT = re.compile(r"(.+\.experts)\.[0-9]+\.[^.]+")


def _peft() -> Mapping[str, Any]:
    """Return the tables by types of models.

    PEFT compares the last part of a target, so a longer target changes nothing.
    """
    return table(__file__, "peft_targets.toml")


def peft_findings(modules: Sequence[str], base_facts: BaseFacts) -> Iterator[Finding]:
    """Yield the layers of a LoRA that PEFT does not load because of the model's type.

    Args:
        modules: the paths of the LoRA's layers, in the adapter's model.
        base_facts: the base facts; without a base nothing is found.
    """
    model_type = _model_type(base_facts)
    lost = lost_to_experts(modules, base_facts.modules, model_type)
    if lost:
        name = lost[0].rpartition(".")[2]
        reason = (
            f'in a model of type "{model_type}" PEFT takes the target "{name}" for the fused '
            "experts, and does not load this layer."
        )
        yield from _at_each(lost, rules.LORA_FUSED_EXPERTS, reason)
    reason = f'PEFT refuses a LoRA of this layer in a model of type "{model_type}".'
    yield from _at_each(refused_in_mamba(modules, model_type), rules.LORA_MAMBA_REFUSED, reason)
    reason = f'in a model of type "{model_type}" PEFT renames this layer of a LoRA on loading.'
    yield from _at_each(renamed_on_loading(modules, model_type), rules.LORA_RENAMED, reason)


def lost_to_experts(
    modules: Sequence[str], base_modules: Collection[str], model_type: str
) -> list[str]:
    """Return the modules whose LoRA PEFT takes for a part of the model's fused experts, and loses.

    The LoRA of experts under the names of transformers 4 is loaded if each expert of a
    layer has one. The LoRA of gate and up is loaded only beside one of down.

    Args:
        modules: the paths of all modules of the LoRA.
        base_modules: the paths of all modules of the base.
        model_type: the field of the base's config.
    """
    fused = (each for each in _peft()["fused"] if model_type in each["types"].split())
    names: Mapping[str, str] = next((each["parameters"] for each in fused), {})
    there = Counter(_fused(module, names) for module in modules)
    needed = Counter(_fused(module, names) for module in base_modules)
    has_down = any(parameter == "down_proj" for _, parameter in there)
    lost = []
    for module in modules:
        container, parameter = place = _fused(module, names)
        is_whole = container and has_down and there[place] == needed[place]
        if parameter and not is_whole:
            lost.append(module)
    return lost


def _fused(module: str, names: Mapping[str, str]) -> tuple[str, str]:
    """Return the experts that a module is one of, and PEFT's parameter; empty if there is none."""
    expert = _FUSED_EXPERT.fullmatch(module)
    return expert[1] if expert else "", names.get(module.rpartition(".")[2], "")


def refused_in_mamba(modules: Sequence[str], model_type: str) -> list[str]:
    """Return the modules of which PEFT refuses a LoRA because the model is a Mamba.

    Args:
        modules: the paths of all modules of the LoRA.
        model_type: the field of the base's config.
    """
    if model_type not in _peft()["mamba"].split():
        return []
    return [module for module in modules if module.rpartition(".")[2] in ("out_proj", "conv1d")]


def renamed_on_loading(modules: Sequence[str], model_type: str) -> list[str]:
    """Return the modules of which PEFT loads a LoRA under another name, and loses the LoRA.

    Args:
        modules: the paths of all modules of the LoRA.
        model_type: the field of the base's config.
    """
    renamed = _peft()["renamed"].items()
    patterns = [pattern for pattern, types in renamed if model_type in types.split()]
    return [each for each in modules if any(re.fullmatch(found, each) for found in patterns)]
