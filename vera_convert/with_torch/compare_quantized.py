"""Run a quantized base with its adapter in PEFT, by the quantizer's library, beside a merged model.

    exact    the dequantized base with the adapter, in float32
    coarse   the same, in the dtype that the quantized base computes in
    real     the quantized base with the adapter in PEFT

The quantized base rounds each result to its dtype, and so differs from any exact computation.
`coarse` rounds as often, so its distance from `exact` measures how far rounding alone moves the
outputs. Two such distances, as root mean squares over n positions, differ by chance: the logarithm
of their ratio has a standard deviation of 1 / sqrt(n) at most if positions are independent. The
limit allows six of these, and the rounding of the merged weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from vera_convert.adapter.opening import open_adapter
from vera_convert.base.quantized.recognize import method_of
from vera_convert.base.quantized.unpack import Unpacked
from vera_convert.errors import SurroundingsError
from vera_convert.verification.model_comparison import ModelJob, QuantizedComparison, Stage
from vera_convert.with_torch.build import Blueprint, UnfitError, as_stored, build_model, guarded
from vera_convert.with_torch.config_fields import known_fields
from vera_convert.with_torch.runs import Runs, loaded_by_peft, wrapped_model
from vera_convert.with_torch.samples import Outputs
from vera_convert.with_torch.verdict import Reference

_SIGMAS = 6.0
_FIELDS = (
    *("r", "target_modules", "projection_prng_key", "save_projection", "vera_dropout", "bias"),
    *("d_initial", "fan_in_fan_out", "modules_to_save", "init_weights", "task_type"),
    *("layers_to_transform", "layers_pattern"),
)
"""The fields of an adapter's config that PEFT gets."""


def compare_quantized(
    plan: Blueprint, job: ModelJob, reference: Reference, merged: Outputs, runs: Runs
) -> QuantizedComparison:
    """Compare a merged model with its quantized base that has the adapter in PEFT.

    Args:
        plan: how the dequantized base is built.
        job: the models, and how the merged model was made.
        reference: the outputs of the dequantized base with the adapter, and of our own merge.
        merged: the outputs of the merged model.
        runs: reports the runs.
    """
    assert plan.packed is not None  # noqa: S101 -- the base was dequantized
    libraries = f"{job.quantizer} {version(job.quantizer)}, PEFT {version('peft')}"
    try:
        runs.enter(Stage.BUILD)
        real = _real(plan, plan.packed, job)
        dtype = next(each.dtype for each in real.parameters() if each.dtype.is_floating_point)
        as_int8 = [path for path, part in real.named_modules() if _rounds_inputs(part)]
        outputs = runs.outputs(real)
        del real
        runs.enter(Stage.BUILD)
        vera = wrapped_model(build_model(plan).to(dtype), job)
        for path in as_int8:
            module = vera.model.get_submodule(path)
            getattr(module, "base_layer", module).register_forward_pre_hook(_int8_inputs)
        coarse = runs.outputs(vera)
    except (UnfitError, SurroundingsError) as error:
        return QuantizedComparison(libraries, not_compared=str(error))
    exact = reference.wrapped
    chance = math.exp(_SIGMAS / math.sqrt(exact.positions))
    return QuantizedComparison(
        libraries,
        str(dtype).removeprefix("torch."),
        _rms(merged, outputs),
        chance * _rms(coarse, exact) + _rms(reference.remerged, exact),
        _rms(exact, reference.base),
    )


def _rms(one: Outputs, other: Outputs) -> float:
    """Return the root mean square of the differences of all values."""
    pairs = zip(one.values, other.values, strict=True)
    squares = torch.cat([(a.double() - b.double()).square().reshape(-1) for a, b in pairs])
    return math.sqrt(float(squares.mean()))


# --- the quantized base --------------------------------------------------------------------------


def _real(plan: Blueprint, packed: Unpacked, job: ModelJob) -> nn.Module:
    """Return the quantized base, built by its quantizer's library, with the adapter in PEFT.

    Raises:
        UnfitError: a library refuses the base or the adapter, or a known error of the library's
            kernels on this processor would change the outputs.
    """
    with _sanitized(plan, packed) as folder, guarded("build the quantized base"):
        model: nn.Module = plan.model.from_pretrained(
            folder,
            attn_implementation="eager",
            local_files_only=True,
            use_safetensors=True,
            **as_stored(),
            **_loading(packed),
        )
    for module in model.modules():
        _refuse_known_errors(getattr(module, "weight", None))
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # This kernel of bitsandbytes computes in bfloat16, for every compute dtype.
            module.support_avx512bf16_for_cpu = False
    ((adapter_folder, _),) = job.adapters
    with open_adapter(adapter_folder) as adapter:
        config = {name: getattr(adapter.config, name) for name in _FIELDS}
        for name in ("target_modules", "modules_to_save", "layers_to_transform"):
            config[name] = list(v) if isinstance(v := config[name], tuple) else v
        return loaded_by_peft(model.eval(), "VeraConfig", config, adapter.tensors).eval()


@contextmanager
def _sanitized(plan: Blueprint, packed: Unpacked) -> Iterator[Path]:
    """Yield a folder with the weights of a base, and with the known fields of its config."""
    base = packed.stored
    source = base.location.fetched.resolve()
    config = known_fields(type(plan.config), base.config)
    config |= {name: base.config[name] for name in ("model_type", "quantization_config")}
    with TemporaryDirectory(prefix="vera-convert-") as made:
        folder = Path(made)
        (folder / "config.json").write_text(json.dumps(config))
        for name in (*base.files, *([base.index] if base.index else [])):
            (folder / name).symlink_to((source / name).resolve())
        yield folder


def _loading(packed: Unpacked) -> dict[str, Any]:
    """Return the arguments with which PEFT can wrap the layers of a quantized base.

    gptqmodel compiles its kernels for CPUs on the first use, which takes minutes. The kernel in
    torch needs no compiler.
    """
    import transformers

    match method_of(packed.settings):
        case "compressed-tensors":
            settings: object = transformers.CompressedTensorsConfig(dequantize=True)
        case "gptq":
            settings = transformers.GPTQConfig(bits=packed.settings["bits"], backend="torch")
        case "awq":
            settings = transformers.AwqConfig(backend="torch_awq")
        case _:
            return {}
    return {"quantization_config": settings}


def _refuse_known_errors(weight: Any) -> None:  # noqa: ANN401 -- of a quantizer's class
    """Raise `UnfitError` for a weight that a library computes wrongly, or not as a product.

    bitsandbytes' kernel for AVX-512 is wrong if the blocks of a weight do not fit its rows.
    """
    state = getattr(weight, "quant_state", None)
    if state is not None and state.shape[-1] % state.blocksize:
        raise UnfitError("the blocks of a weight do not fit its rows, as bitsandbytes needs.")
    if getattr(weight, "act_quant_kwargs", None) is not None:
        raise UnfitError("torchao quantizes the inputs of layers of this base too.")


# --- rounded inputs ------------------------------------------------------------------------------


def _rounds_inputs(module: nn.Module) -> bool:
    return type(module).__name__ == "Linear8bitLt" and type(module).__module__.startswith(
        "bitsandbytes."
    )


def _int8_inputs(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Round each row of a layer's input to 8 bits, as bitsandbytes does before it multiplies."""
    x = inputs[0].to(torch.float16)
    unit = x.abs().amax(-1, keepdim=True).float().clamp_min(1e-30) / 127
    return ((x / unit).round() * unit).to(inputs[0].dtype), *inputs[1:]
