"""Time the conversion of 7B-sized adapters to LoRA beside a copy of the written bytes.

The base is only a config. Each side runs as a process of its own, measured in CPU seconds. The copy
is synced to the disk like the output of the conversion.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

HIDDEN, MLP, LAYERS = 4096, 11008, 32
LINEAR = {
    **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    "mlp.gate_proj": (MLP, HIDDEN),
    "mlp.up_proj": (MLP, HIDDEN),
    "mlp.down_proj": (HIDDEN, MLP),
}
CASES = {
    "q, v": ("self_attn.q_proj", "self_attn.v_proj"),
    "all linear": tuple(LINEAR),
}
MODEL = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}


def write_adapter(folder: Path, targets: tuple[str, ...], rank: int) -> None:
    """Write an adapter of random vectors with A and B."""
    values = np.random.default_rng(0)
    tensors = {}
    for layer in range(LAYERS):
        for target in targets:
            name = f"base_model.model.model.layers.{layer}.{target}.vera_lambda_"
            tensors[f"{name}b"] = values.normal(size=LINEAR[target][0]).astype(np.float32)
            tensors[f"{name}d"] = values.normal(size=rank).astype(np.float32)
    rows = max(LINEAR[target][0] for target in targets)
    columns = max(LINEAR[target][1] for target in targets)
    tensors["base_model.vera_A"] = values.normal(size=(rank, columns)).astype(np.float32)
    tensors["base_model.vera_B"] = values.normal(size=(rows, rank)).astype(np.float32)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "VERA",
        "r": rank,
        "target_modules": [target.rpartition(".")[2] for target in targets],
        "save_projection": True,
        "projection_prng_key": 0,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def measured(command: list[str]) -> tuple[float, float, float]:
    """Run a command; return its seconds, its CPU seconds and its peak memory in MiB."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    seconds = time.perf_counter() - start
    return seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def main() -> None:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, nargs="*", default=[256])
    parser.add_argument("--low", type=int, default=64, help="the rank of the approximation")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    given = parser.parse_args()
    program = [sys.executable, "-m", "vera_convert", "to-lora"]
    for rank in given.rank:
        for name, targets in CASES.items():
            with tempfile.TemporaryDirectory(dir=given.folder) as temporary:
                folder = Path(temporary)
                write_adapter(folder / "vera", targets, rank)
                (folder / "base").mkdir()
                (folder / "base" / "config.json").write_text(json.dumps(MODEL))
                base = ["--base", str(folder / "base"), "--quiet"]
                exact = measured([*program, str(folder / "vera"), str(folder / "exact"), *base])
                weights = folder / "exact" / "adapter_model.safetensors"
                copy = f'cp "{weights}" "{folder / "copy"}" && sync "{folder / "copy"}"'
                copied = measured(["bash", "-c", copy])
                low = [*base, "--rank", str(given.low), "--accept-error"]
                cut = measured([*program, str(folder / "vera"), str(folder / "low"), *low])
                size = weights.stat().st_size / 2**20
            print(f"rank {rank}, {name}: {size:,.0f} MiB")
            for what, found in (
                ("exact", exact),
                ("copy", copied),
                (f"rank {given.low}", cut),
            ):
                seconds, cpu, memory = found
                print(f"  {what:8} {seconds:7.1f} s, {cpu:6.1f} s of CPU, {memory:6.0f} MiB")


if __name__ == "__main__":
    main()
