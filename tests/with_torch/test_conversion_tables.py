"""Compare our renames with the conversion tables of the installed transformers, class by class.

If a new release of transformers has further model types, these tests fail and list the types.
"""

from __future__ import annotations

import pytest

pytest.importorskip("transformers.conversion_mapping", reason="needs transformers 5.0 or later")

from conversiontables import file_text, registry, walk

from vera_convert.base.rename_table import CONVERSIONS_FILE, families
from vera_convert.base.unsupported_layouts import LAYOUTS
from vera_convert.lora.checks import renamed_on_loading

NOT_BUILT = {
    **dict.fromkeys(
        (
            *("BeitForSemanticSegmentation", "ConditionalDetrForSegmentation"),
            *("DetrForSegmentation", "PPChart2TableModel", "xCLIPTextModel", "xCLIPVisionModel"),
            *("Sapiens2ForImageMatting", "Sapiens2ForNormalEstimation", "MtpModel"),
            *("Sapiens2ForPointmapEstimation", "Sapiens2ForPoseEstimation"),
            "Sapiens2ForSemanticSegmentation",
        ),
        "a class whose type is built under another class",
    ),
    **dict.fromkeys(("dots1", "sarvam_mla"), "the table renames only experts in stacks"),
    "legacy": "the table renames only parameters of norms",
    "timm_wrapper": "the class needs a library, and the table adds a prefix to all names",
}
"""Tables for which no model is built here, with the reasons."""
NOT_FOUND = {
    "ViTMSNForImageClassification": "its classifier lies beside the model, not in it",
}
"""Classes whose files lack some layers, with the reasons."""


def test_the_renames_equal_those_of_the_installed_release() -> None:
    """Make all comparisons in one test, because the walk through all classes takes a minute."""
    walked = walk()
    ours = set().union(
        *(family.types for family in families()), *(layout.types for layout in LAYOUTS)
    )
    loras = {}
    for (name, model_type), loaded in walked.loras.items():
        lost = [module for module, is_loaded in loaded.items() if not is_loaded]
        if renamed_on_loading([*loaded], model_type) != lost:
            loras[name] = lost
    faults = {
        "no table of ours": sorted(set(registry()) - walked.met - ours - NOT_BUILT.keys()),
        "layers not found": {n: why for n, why in walked.wrong.items() if n not in NOT_FOUND},
        "other tensors not found": walked.lost,
        "layers of a LoRA that PEFT renames": loras,
    }
    assert {fault: found for fault, found in faults.items() if found} == {}
    assert file_text(walked) == CONVERSIONS_FILE.read_text(encoding="utf-8"), "generate the file"
