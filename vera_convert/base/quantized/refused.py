"""The methods that are known by name and cannot be dequantized here."""

from __future__ import annotations

METHODS = {
    "aqlm": "AQLM",
    "auto-round": "AutoRound",
    "auto_round": "AutoRound",
    "autoround": "AutoRound",
    "bitnet": "BitNet",
    "eetq": "EETQ",
    "fbgemm_fp8": "fp8 (FBGEMM)",
    "fouroversix": "Four Over Six",
    "fp_quant": "FP-Quant",
    "gguf": "GGUF",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "metal": "Metal",
    "modelopt": "ModelOpt",
    "mxfp8": "mxfp8",
    "nvfp4": "NVFP4",
    "quanto": "quanto",
    "quark": "Quark",
    "sinq": "SINQ",
    "spqr": "SpQR",
    "vptq": "VPTQ",
}
"""The name of a method for people, by its ``quant_method``."""
