"""Time `merge --dequantize` beside the quantizer's own library on the CPU, and beside a copy.

Two bases have Llama's shapes: bitsandbytes NF4, and compressed-tensors int4 in groups of 128. Each
side runs as a whole process, one after another. The table shows the fastest run of each side: CPU
seconds, seconds, and peak memory. If the library is installed (bitsandbytes, compressed-tensors),
its side loads each weight, dequantizes the weight to bfloat16, and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
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
    words = values.integers(-(2**31), 2**31, (shape[0], shape[1] // 8)).astype(np.int32)
    scales = values.uniform(0.001, 0.01, (shape[0], shape[1] // 128)).astype(BF16)
    return {
        f"{path}.weight_packed": words,
        f"{path}.weight_scale": scales,
        f"{path}.weight_shape": np.array(shape, np.int64),
    }


_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
BASES: Mapping[str, tuple[Callable[..., Tensors], Mapping[str, object]]] = {
    "bitsandbytes": (
        nf4,
        {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_compute_dtype": "bfloat16",
        },
    ),
    "compressed_tensors": (
        int4,
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": _INT4}},
        },
    ),
}


def write_base(folder: Path, name: str, layers: int) -> None:
    """Write a base of one shard for each layer."""
    pack, settings = BASES[name]
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
import sys, json, torch
from pathlib import Path
from safetensors import safe_open
torch.set_num_threads(int(sys.argv[3]))
for path in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        for name in names:
            if sys.argv[2] == "bitsandbytes" and name.endswith(".weight"):
                import bitsandbytes.functional as F
                parts = {k: file.get_tensor(k) for k in names if k.startswith(name)}
                state = {k.removeprefix(name + "."): v for k, v in parts.items() if k != name}
                F.dequantize_4bit(parts[name], F.QuantState.from_dict(state, "cpu"))
            elif sys.argv[2] == "compressed_tensors" and name.endswith("weight_packed"):
                from compressed_tensors.compressors import unpack_from_int32
                path = name.removesuffix("weight_packed")
                shape = torch.Size(file.get_tensor(path + "weight_shape").tolist())
                scale = file.get_tensor(path + "weight_scale")
                q = unpack_from_int32(file.get_tensor(name), 4, shape)
                groups = q.unflatten(1, (-1, 128)).to(scale.dtype) * scale[:, :, None]
                groups.flatten(1)
"""


def measured(command: Sequence[str]) -> tuple[float, float, float]:
    """Return CPU seconds, seconds and the most MiB of a process."""
    started = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return usage.ru_utime + usage.ru_stime, seconds, usage.ru_maxrss / 1024


def main() -> None:
    """Measure, and print one line for each side."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=20, help="20 are 1.8 GB of 4-bit weights")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1))
    options = parser.parse_args()
    for name in BASES:
        with tempfile.TemporaryDirectory(prefix="vera-convert-bench-") as folder:
            base, adapter, out = (Path(folder, each) for each in ("base", "adapter", "out"))
            write_base(base, name, options.layers)
            write_adapter(adapter, options.layers)
            merge = [sys.executable, "-m", "vera_convert", "merge", str(adapter), str(out)]
            merge += ["--base", str(base), "--dequantize", "--offline", "--quiet", "--force"]
            sides = {"vera-convert merge": [*merge, "--jobs", str(options.jobs)]}
            if find_spec(name) is not None and find_spec("torch") is not None:
                library = [sys.executable, "-c", LIBRARY, str(base), name, str(options.jobs)]
                sides[f"{name} alone"] = library
            sides["cp of the output"] = ["cp", "-r", str(out), str(Path(folder, "copy"))]
            for side, command in sides.items():
                runs = [measured(command) for _ in range(options.rounds)]
                cpu, seconds, memory = (min(run[i] for run in runs) for i in range(3))
                print(f"{name:20} {side:26} {cpu:7.1f} s CPU {seconds:7.1f} s {memory:6.0f} MiB")


if __name__ == "__main__":
    main()
