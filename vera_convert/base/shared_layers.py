"""Layers that share one tensor in the files: a change of one layer would change the others.

Some classes have a layer at several places, such as the class heads of Deformable DETR's decoder.
The files store the tensors once, and each loader gives these to all of the layers. PEFT adapts, or
saves whole, one of the places. A tied output head and its embedding are no concern of this module.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache

from vera_convert import rules
from vera_convert.adapter.sorting import same_tensor
from vera_convert.base.model import BaseModel
from vera_convert.base.unsupported_layouts import Inside
from vera_convert.files.tensorfile import TensorData
from vera_convert.rules import Finding
from vera_convert.text import printable

_DECODERS = "d_fine deformable_detr deimv2 rt_detr_v2 grounding-dino mm-grounding-dino"
_NUMBERED = "deformable_detr grounding-dino mm-grounding-dino"
_LAYERS: tuple[tuple[str, str, str], ...] = (
    (_DECODERS, "class_embed", "model.decoder.class_embed"),
    (_DECODERS, "bbox_embed", "model.decoder.bbox_embed"),
    (_NUMBERED, "class_embed.#", "class_embed.0"),
    (_NUMBERED, "bbox_embed.#", "bbox_embed.0"),
    ("dab-detr", "model.decoder.bbox_embed", "bbox_predictor"),
    ("pp_doclayout_v3", "model.decoder.class_embed", "model.enc_score_head"),
    ("pp_doclayout_v3", "model.decoder.bbox_embed", "model.enc_bbox_head"),
    ("pp_doclayout_v3", "decoder.class_embed", "enc_score_head"),
    ("pp_doclayout_v3", "decoder.bbox_embed", "enc_bbox_head"),
    ("granite_speech5_ctc", "ctc_head", "encoder.out"),
    ("diffusion_gemma", "model.encoder.language_model.layers", "model.decoder.layers"),
    ("diffusion_gemma", "model.encoder.language_model.norm", "model.decoder.norm"),
    ("diffusion_gemma", "encoder.language_model.layers", "decoder.layers"),
    ("diffusion_gemma", "encoder.language_model.norm", "decoder.norm"),
    ("luke", "entity_predictions.decoder", "luke.entity_embeddings.entity_embeddings"),
    ("neomme", "unembedding_projection", "model.embed_tokens.embedding_projection"),
    ("udop", "encoder.embed_patches.proj", "patch_embed.proj"),
    ("pe_audio_video", "audio_model.text_model", "text_model"),
    ("pe_audio_video", "video_model.text_model", "text_model"),
    *(
        (
            "pe_audio_video",
            f"audio_video_encoder.embedder.{kind}_encoder",
            f"{kind}_model.{kind}_encoder",
        )
        for kind in ("audio", "video")
    ),
    ("csm", "backbone_model.embed_tokens.embed_audio_tokens", "depth_decoder.model.embed_tokens"),
    *(
        (types, f"{start}lm_heads.{number}", f"{start}input_embeds_layers.{number + 1}")
        for types, start in (("fine_acoustics", ""), ("bark", "fine_acoustics."))
        for number in range(7)
    ),
)
"""Model types of transformers, and two paths whose layers share their tensors.

The files hold the tensors under one of the paths. # stands for any number; a number in the other
path is the layer with which all share.
"""


@cache
def shared_layers() -> Mapping[str, tuple[tuple[str, str], ...]]:
    """Return pairs of paths that share their tensors, by model type."""
    found: dict[str, tuple[tuple[str, str], ...]] = {}
    for types, one, other in _LAYERS:
        found |= {each: (*found.get(each, ()), (one, other)) for each in types.split()}
    return found


def shared_places(
    weights: Mapping[str, str], outputs: Mapping[str, int], base: BaseModel
) -> Iterator[tuple[str, Inside]]:
    """Yield each layer that shares the tensor with other layers, and the place of the layer.

    Args:
        weights: the name of each layer's weight in the files, also of a weight that the base lacks.
        outputs: the outputs of each layer.
        base: the base.
    """
    for module, name in weights.items() if base.model_type in shared_layers() else ():
        target = _stored_name(name, base)
        if target is not None and _is_shared(target, base):
            shape = base.tensors[target].info.shape
            if len(shape) == 2 and shape[0] == outputs[module]:
                yield module, Inside((target,), shape[1], None, _finding(module, target))


def shared_replacements(
    tensors: Mapping[str, TensorData], base: BaseModel
) -> tuple[dict[str, str], dict[str, Finding]]:
    """Return the base's names of tensors that replace shared tensors, and why others must not.

    A model with trained biases stores a shared bias under each name, with the same values. A module
    saved whole has values of its own under one of the names.

    Args:
        tensors: the adapter's tensors by the name in the base, or by the name that the base lacks.
        base: the base.
    """
    groups: dict[str, list[str]] = {}
    for name in tensors if base.model_type in shared_layers() else ():
        target = _stored_name(name, base)
        if target is not None and _is_shared(target, base):
            groups.setdefault(target, []).append(name)
    copies: dict[str, str] = {}
    refused: dict[str, Finding] = {}
    for target, (first, *others) in groups.items():
        if others and all(same_tensor(tensors[first], tensors[other]) for other in others):
            copies |= dict.fromkeys((first, *others), target)
        else:
            refused |= {name: _finding(name, target) for name in (first, *others)}
    return copies, refused


def _sharing(name: str, base: BaseModel) -> Iterator[str]:
    """Yield the names of a tensor in all layers that share the tensor, nearest first.

    Of the layers that differ in their number alone, 0 and 1 stand for all.
    """
    pairs = shared_layers().get(base.model_type or "", ())
    found = {name: None}
    for _ in range(2 if pairs else 0):  # two pairs lead from any name to any other
        for each in [*found]:
            for one, other in pairs:
                near = (_moved(each, one, other), _moved(each, other, one))
                found |= dict.fromkeys(filter(None, near))
    yield from found


def _moved(name: str, old: str, new: str) -> str | None:
    """Return a name with another beginning; None if the name begins otherwise."""
    begins = re.match(re.escape(old).replace(r"\#", r"\d+") + r"(?=\.)", name)
    return None if begins is None else new.replace("#", "1") + name[begins.end() :]


def _stored_name(name: str, base: BaseModel) -> str | None:
    """Return the name under which a base stores a tensor, its own or another; None if absent."""
    return next((each for each in _sharing(name, base) if each in base.tensors), None)


def _is_shared(name: str, base: BaseModel) -> bool:
    """Say whether a tensor of the base is also the tensor of another layer."""
    return any(each not in base.tensors for each in _sharing(name, base))


def _finding(name: str, target: str) -> Finding:
    reason = f'the base stores "{printable(target)}" for several layers.'
    return rules.LAYERS_SHARE.at(printable(name), reason)


def shared_block(module: str, base: BaseModel) -> str | None:
    """Return the tensor of a block shared by several layers, as in Zamba2; None if absent."""
    if "shared" not in module:
        return None
    path = re.compile(re.sub(r"\d+", r"\\d+", re.escape(f"{module}.weight")))
    return next(filter(path.fullmatch, base.tensors), None)
