"""Time `merge --dequantize` beside the quantizer's own library on the CPU, and beside a copy.

The bases have Llama's shapes: bitsandbytes NF4, and compressed-tensors int4, GPTQ and AWQ in groups
of 128. Each side is a process, and the processes run one after another. The table shows the fastest
run of each side: CPU seconds, seconds, and peak memory. If the library is installed (bitsandbytes,
compressed-tensors, gptqmodel), three sides run the library. The first side loads and dequantizes
each weight, and writes nothing. The second side also writes the weights, one file for each file of
the base, as the merge does. The third side, the start, has the same imports and loads nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from vera_convert.base.quantized.bitsandbytes_4bit import TABLES

Tensors = dict[str, NDArray[Any]]
BF16 = ml_dtypes.bfloat16
HIDDEN, WIDE = 4096, 11008
SHAPES = {
    **dict.fromkeys(("self_attn.q_proj", "self_attn.o_proj"), (HIDDEN, HIDDEN)),
    **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (WIDE, HIDDEN)),
    "mlp.down_proj": (HIDDEN, WIDE),
}
RANK = 64


def nf4(path: str, shape: tuple[int, int], values: np.random.Generator) -> Tensors:
    """Return a weight as bitsandbytes stores it."""
    count = shape[0] * shape[1]
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [*shape]}
    return {
        f"{path}.weight": values.integers(0, 256, (count // 2, 1), np.uint8),
        f"{path}.weight.absmax": values.uniform(0.01, 0.1, count // 64).astype(np.float32),
        f"{path}.weight.quant_map": TABLES["nf4"],
        f"{path}.weight.quant_state.bitsandbytes__nf4": np.frombuffer(
            json.dumps(state).encode(), np.uint8
        ),
    }


def int4(path: str, shape: tuple[int, int], values: np.random.Generator) -> Tensors:
    """Return a weight as compressed-tensors stores it."""
    return {
        f"{path}.weight_packed": words((shape[0], shape[1] // 8), values),
        f"{path}.weight_scale": scales((shape[0], shape[1] // 128), values).astype(BF16),
        f"{path}.weight_shape": np.array(shape, np.int64),
    }


def gptq(path: str, shape: tuple[int, int], values: np.random.Generator) -> Tensors:
    """Return a weight as gptqmodel stores it in the format GPTQ."""
    outputs, inputs = shape
    return {
        f"{path}.qweight": words((inputs // 8, outputs), values),
        f"{path}.qzeros": words((inputs // 128, outputs // 8), values),
        f"{path}.scales": scales((inputs // 128, outputs), values).astype(np.float16),
        f"{path}.g_idx": (np.arange(inputs) // 128).astype(np.int32),
    }


def awq(path: str, shape: tuple[int, int], values: np.random.Generator) -> Tensors:
    """Return a weight as AutoAWQ stores it."""
    outputs, inputs = shape
    return {
        f"{path}.qweight": words((inputs, outputs // 8), values),
        f"{path}.qzeros": words((inputs // 128, outputs // 8), values),
        f"{path}.scales": scales((inputs // 128, outputs), values).astype(np.float16),
    }


def words(shape: tuple[int, int], values: np.random.Generator) -> NDArray[np.int32]:
    """Return random words of 32 bits."""
    return values.integers(-(2**31), 2**31, shape).astype(np.int32)


def scales(shape: tuple[int, int], values: np.random.Generator) -> NDArray[Any]:
    """Return random scales."""
    return values.uniform(0.001, 0.01, shape)


_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
BASES: Mapping[str, tuple[str, Callable[..., Tensors], Mapping[str, object]]] = {
    "bitsandbytes NF4": (
        "bitsandbytes",
        nf4,
        {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_compute_dtype": "bfloat16",
        },
    ),
    "compressed-tensors": (
        "compressed_tensors",
        int4,
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": _INT4}},
        },
    ),
    "GPTQ": ("gptqmodel", gptq, {"quant_method": "gptq", "bits": 4, "group_size": 128}),
    "AWQ": ("gptqmodel", awq, {"quant_method": "awq", "bits": 4, "group_size": 128}),
}
"""The library, the packing and the settings of each base."""


def write_base(folder: Path, name: str, layers: int) -> None:
    """Write a base of one shard for each layer."""
    _, pack, settings = BASES[name]
    folder.mkdir()
    weight_map: dict[str, str] = {}
    for layer in range(layers):
        values = np.random.default_rng(layer)
        tensors: Tensors = {}
        for part, shape in SHAPES.items():
            tensors |= pack(f"model.layers.{layer}.{part}", shape, values)
        file = f"model-{layer + 1:05}-of-{layers:05}.safetensors"
        weight_map |= dict.fromkeys(tensors, file)
        save_file(tensors, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "llama", "dtype": "bfloat16", "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))


def write_adapter(folder: Path, layers: int) -> None:
    """Write an adapter of q_proj in every layer."""
    folder.mkdir()
    values = np.random.default_rng(0)
    tensors: Tensors = {
        "base_model.vera_A": values.normal(0, 0.1, (RANK, HIDDEN)).astype(np.float32),
        "base_model.vera_B": values.normal(0, 0.1, (HIDDEN, RANK)).astype(np.float32),
    }
    for layer in range(layers):
        path = f"base_model.model.model.layers.{layer}.self_attn.q_proj.vera_lambda"
        tensors[f"{path}_d"] = np.full(RANK, 0.1, np.float32)
        tensors[f"{path}_b"] = values.normal(0, 0.01, HIDDEN).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "VERA",
        "r": RANK,
        "target_modules": ["q_proj"],
        "projection_prng_key": 0,
        "save_projection": True,
        "base_model_name_or_path": "a/base",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


LIBRARY = """
import sys, torch
from pathlib import Path
from safetensors import safe_open
from safetensors.torch import save_file
folder, out, name, jobs = sys.argv[1:]
torch.set_num_threads(int(jobs))
if name.startswith("bitsandbytes"):
    import bitsandbytes.functional as F
    def dequantize(path, part):
        keys = "absmax", "quant_map", "quant_state.bitsandbytes__nf4"
        state = F.QuantState.from_dict({key: part("weight." + key) for key in keys}, "cpu")
        return F.dequantize_4bit(part("weight"), state)
elif name.startswith("compressed"):
    from compressed_tensors.compressors import unpack_from_int32
    def dequantize(path, part):
        scale, shape = part("weight_scale"), torch.Size(part("weight_shape").tolist())
        q = unpack_from_int32(part("weight_packed"), 4, shape)
        return (q.unflatten(1, (-1, 128)).to(scale.dtype) * scale[:, :, None]).flatten(1)
elif name == "GPTQ":
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
    def dequantize(path, part):
        g_idx, scales = part("g_idx"), part("scales")
        layer = TorchLinear(4, 128, True, False, len(g_idx), scales.shape[1])
        for key in ("qweight", "qzeros", "scales", "g_idx"):
            getattr(layer, key).data = part(key)
        convert_gptq_v1_to_v2_format_module(layer, 4, torch.int32)
        return layer.train().dequantize_weight().T.to(torch.bfloat16)
else:
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
    def dequantize(path, part):
        found = dequantize_gemm(part("qweight"), part("qzeros"), part("scales"), 4, 128)
        return found.T.to(torch.bfloat16)
for file in sorted(Path(folder).glob("*.safetensors")):
    with safe_open(file, "pt") as opened, torch.inference_mode():
        found = {}
        for path in sorted({key.partition("_proj.")[0] + "_proj." for key in opened.keys()}):
            weight = dequantize(path, lambda key: opened.get_tensor(path + key))
            if out:
                found[path + "weight"] = weight.contiguous()
        if out:
            save_file(found, Path(out, file.name), {"format": "pt"})
"""


MEASURE = """
import os, subprocess, sys, time
started = time.perf_counter()
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(child.pid, 0)
print(usage.ru_utime + usage.ru_stime, time.perf_counter() - started, usage.ru_maxrss / 1024)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def measured(command: Sequence[str]) -> tuple[float, float, float]:
    """Return CPU seconds, seconds and the most MiB of a process.

    A small process starts the command: Linux counts the memory of the starting process, too.
    """
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *command], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    cpu, seconds, memory = map(float, done.stdout.split())
    return cpu, seconds, memory


def main() -> None:
    """Measure, and print one line for each side."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=20, help="20 are 1.8 GB of 4-bit weights")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--bases", nargs="+", choices=[*BASES], default=[*BASES])
    options = parser.parse_args()
    for name in options.bases:
        package = BASES[name][0]
        with tempfile.TemporaryDirectory(prefix="vera-convert-bench-") as folder:
            base, adapter, out = (Path(folder, each) for each in ("base", "adapter", "out"))
            write_base(base, name, options.layers)
            write_adapter(adapter, options.layers)
            merge = [sys.executable, "-m", "vera_convert", "merge", str(adapter), str(out)]
            merge += ["--base", str(base), "--dequantize", "--offline", "--quiet", "--force"]
            sides = {"vera-convert merge": [*merge, "--jobs", str(options.jobs)]}
            if find_spec(package) is not None and find_spec("torch") is not None:
                library, written = [sys.executable, "-c", LIBRARY], Path(folder, "written")
                written.mkdir()
                jobs = str(options.jobs)
                sides[f"{package} alone"] = [*library, str(base), "", name, jobs]
                sides[f"{package}, written"] = [*library, str(base), str(written), name, jobs]
                sides[f"{package}, its start"] = [*library, str(adapter / "none"), "", name, "1"]
            sides["cp of the output"] = ["cp", "-r", str(out), str(Path(folder, "copy"))]
            for side, command in sides.items():
                runs = [measured(command) for _ in range(options.rounds)]
                cpu, seconds, memory = (min(run[i] for run in runs) for i in range(3))
                print(f"{name:20} {side:30} {cpu:7.1f} s CPU {seconds:7.1f} s {memory:6.0f} MiB")


if __name__ == "__main__":
    main()
