"""The methods that the package knows by name and refuses to dequantize."""

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

SIGNS = (
    (r"weight_scale_2", "NVFP4"),
    (r"W_q", "HQQ"),
    (r"weight_scales", "EETQ"),
    (r"weight[.:](?!original\d).*", "torchao or quanto"),
    (r"codes|codebooks", "AQLM"),
    (r"dense_weights|row_offsets|col_vals|in_perm", "SpQR"),
    (r"(res_)?(centroids|indices)(\.weight)?|outlier_(centroids|indices)(\.weight)?", "VPTQ"),
    (r"dqweight|act_global_scale|(forward|backward)_hadamard_matrix", "FP-Quant"),
    (r"qbiases|biases", "MLX or Metal"),
)
"""Patterns of names beside a layer's weight that only the refused quantizers write."""

PACKED = (
    *("W_q", "codes", "packed_weight", "weight._data", "weight._data._data", "dense_weights"),
    *("centroids.weight", "indices"),
)
"""Names of packed values in the files of the refused quantizers."""

TRANSPOSED = ("EETQ",)
"""Methods that store one value in each element, but as (in, out)."""
