"""Time `validate` of 7B-sized adapters, with and without A and B, and of 100,000 tensors.

The lower bound starts Python, NumPy and click, and reads every byte of the folder. Each side runs
as a whole process, in turn, and the medians are compared. Memory is the peak of the process, also
shown without the bytes of A and B.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from strip_embed import INTERMEDIATE, RANK, run, write_adapter

LAYERS = 50_000
READ = (
    "import sys, numpy, click, pathlib; "
    "[path.read_bytes() for path in pathlib.Path(sys.argv[1]).iterdir()]"
)


def write_wide_header(folder: Path) -> None:
    """Write a stripped adapter of 50,000 layers: 100,000 short vectors."""
    values = np.random.default_rng(0).standard_normal((2, LAYERS, 8)).astype(np.float32)
    tensors = {
        f"base_model.model.model.layers.{layer}.q_proj.vera_lambda_{which}": values[at, layer]
        for at, which in enumerate("bd")
        for layer in range(LAYERS)
    }
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "VERA", "r": 8, "save_projection": False, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def measure(work: Path, rounds: int) -> dict[str, float]:
    """Return medians of all rounds."""
    program = [sys.executable, "-m", "vera_convert"]
    folders = {name: work / name for name in ("embedded", "stripped", "header")}
    # A separate process writes the inputs, because a child's peak includes the parent's memory.
    subprocess.run([sys.executable, __file__, "--write", work], check=True)
    quiet = ["--base-dtype", "float32", "--offline", "--quiet"]
    run([*program, "strip", str(folders["embedded"]), str(folders["stripped"]), *quiet])
    seconds: dict[str, list[float]] = {}
    peaks: dict[str, float] = {}
    for _ in range(rounds):
        for name, folder in folders.items():
            for what, command in (
                ("peer", [sys.executable, "-c", READ, str(folder)]),
                ("validate", [*program, "validate", str(folder)]),
            ):
                took, peak = run(command)
                seconds.setdefault(f"{name}_{what}", []).append(took)
                peaks[f"{name}_{what}"] = peak
    result = {f"{name}_seconds": statistics.median(all_of) for name, all_of in seconds.items()}
    result |= {
        f"{name}_over_peer": result[f"{name}_validate_seconds"] / result[f"{name}_peer_seconds"]
        for name in folders
    }
    result |= {f"{name}_peak_mib": peak for name, peak in peaks.items() if "validate" in name}
    projections = 2 * RANK * INTERMEDIATE * 4 / (1 << 20)
    result["embedded_peak_beyond_projections_mib"] = peaks["embedded_validate"] - projections
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", type=Path, help="only write the adapters into this folder")
    arguments = parser.parse_args()
    if arguments.write:
        write_adapter(arguments.write / "embedded")
        write_wide_header(arguments.write / "header")
        sys.exit()
    with tempfile.TemporaryDirectory() as folder:
        for name, value in measure(Path(folder), arguments.rounds).items():
            print(f"{name:40} {value:10.3f}")
