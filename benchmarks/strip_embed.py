"""Time `strip` and `embed` of a 7B-sized adapter beside `cp -r` and a sync of the same bytes.

The adapter is for a Llama 7B, with all linear layers except the head, at rank 256: 28 MB, of which
A and B take 22. Each side runs as a whole process, in turn, and the medians are compared. Memory is
the peak of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from vera_convert.draws.generator import Draw, Variant

LAYERS, HIDDEN, INTERMEDIATE, RANK, KEY = 32, 4096, 11008, 256, 7
TARGETS = {
    "self_attn.q_proj": HIDDEN,
    "self_attn.k_proj": HIDDEN,
    "self_attn.v_proj": HIDDEN,
    "self_attn.o_proj": HIDDEN,
    "mlp.gate_proj": INTERMEDIATE,
    "mlp.up_proj": INTERMEDIATE,
    "mlp.down_proj": HIDDEN,
}


def write_adapter(folder: Path) -> None:
    """Write the adapter with the safetensors library, as PEFT does."""
    A, B = Draw(Variant.FLOAT32_FUSED, KEY, RANK, INTERMEDIATE, INTERMEDIATE).matrices()
    rng = np.random.default_rng(0)
    tensors = {"base_model.vera_A": A, "base_model.vera_B": B}
    for layer in range(LAYERS):
        for target, out in TARGETS.items():
            path = f"base_model.model.model.layers.{layer}.{target}"
            tensors[f"{path}.vera_lambda_b"] = rng.standard_normal(out, np.float32)
            tensors[f"{path}.vera_lambda_d"] = rng.standard_normal(RANK, np.float32)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "VERA",
        "projection_prng_key": KEY,
        "r": RANK,
        "save_projection": True,
        "target_modules": sorted(name.rpartition(".")[2] for name in TARGETS),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))


def run(command: list[str]) -> tuple[float, float]:
    """Run a process and return its seconds and its peak of memory in MiB."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} failed")
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return time.perf_counter() - start, usage.ru_maxrss / unit


def copy_and_sync(source: Path, target: Path) -> float:
    """Copy a folder with cp, and sync each file and the folder like an output."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)  # noqa: S607 -- our own
    subprocess.run(["sync", *target.iterdir(), target], check=True)  # noqa: S607
    return time.perf_counter() - start


def measure(work: Path, rounds: int) -> dict[str, float]:
    """Return medians of all rounds."""
    program = [sys.executable, "-m", "vera_convert"]
    embedded, stripped = work / "embedded", work / "stripped"
    write_adapter(embedded)
    base = ["--base-dtype", "float32", "--offline", "--quiet"]
    run([*program, "strip", str(embedded), str(stripped), *base])
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        out = work / "out"
        for name, command in {
            "strip": [*program, "strip", str(embedded), str(out), *base],
            "embed": [*program, "embed", str(stripped), str(out), "--offline", "--quiet"],
        }.items():
            seconds, peak = run(command)
            shutil.rmtree(out)
            found.setdefault(f"{name}_seconds", []).append(seconds)
            found.setdefault(f"{name}_peak_mib", []).append(peak)
        found.setdefault("copy_embedded_seconds", []).append(copy_and_sync(embedded, out))
        shutil.rmtree(out)
        found.setdefault("start_seconds", []).append(
            run([sys.executable, "-c", "import numpy, click"])[0]
        )
    medians = {name: statistics.median(values) for name, values in found.items()}
    for name in ("strip", "embed"):
        medians[f"{name}_over_copy"] = medians[f"{name}_seconds"] / medians["copy_embedded_seconds"]
    medians["megabytes"] = (embedded / "adapter_model.safetensors").stat().st_size / 1e6
    return medians


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        medians = measure(Path(folder), arguments.rounds)
    if arguments.json:
        print(json.dumps(medians, indent=2))
    else:
        for name, value in medians.items():
            print(f"{name:24} {value:8.3f}")


if __name__ == "__main__":
    main()
