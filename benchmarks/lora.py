"""Time the conversion of 7B-sized adapters to LoRA beside `cp` and PEFT's own conversion.

The base is only a config. Each side runs as a process of its own, measured in CPU seconds. `cp`
copies the written bytes and syncs the copy to the disk. A dry run computes all bytes and writes
none. These three sides run in turn; the table shows the median of each figure.

PEFT's `save_as_lora`, which needs torch, forms the delta of each layer; one layer of each shape is
converted, less a run without conversion.

Python keeps compiled modules in a temporary folder, also if PYTHONDONTWRITEBYTECODE is set.
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

HIDDEN, MLP = 4096, 11008
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
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}


def write_adapter(folder: Path, targets: tuple[str, ...], rank: int, layers: int) -> None:
    """Write an adapter of random vectors with A and B."""
    values = np.random.default_rng(0)
    tensors = {}
    for layer in range(layers):
        for target in targets:
            name = f"base_model.model.model.layers.{layer}.{target}.vera_lambda_"
            tensors[f"{name}b"] = values.normal(size=LINEAR[target][0]).astype(np.float32)
            tensors[f"{name}d"] = values.normal(size=rank).astype(np.float32)
    rows = max(LINEAR[target][0] for target in targets)
    columns = max(LINEAR[target][1] for target in targets)
    tensors["base_model.vera_A"] = values.normal(size=(rank, columns)).astype(np.float32)
    tensors["base_model.vera_B"] = values.normal(size=(rows, rank)).astype(np.float32)
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    config = {
        "peft_type": "VERA",
        "r": rank,
        "target_modules": [target.rpartition(".")[2] for target in targets],
        "save_projection": True,
        "projection_prng_key": 0,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


Figures = tuple[float, ...]
WEIGHTS = "adapter_model.safetensors"


def measured(command: list[str]) -> Figures:
    """Run a command; return its seconds, its CPU seconds and its peak memory in MiB."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    seconds = time.perf_counter() - start
    return seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def into_cache(path: Path) -> None:
    """Read a file into the system's cache, which the conversion bypasses and `cp` reads."""
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 20):
            pass


def medians(sides: dict[str, list[str]], rounds: int, folder: Path) -> dict[str, Figures]:
    """Run the commands in turn, each into an empty folder; return the median of each figure."""
    runs: dict[str, list[Figures]] = {side: [] for side in sides}
    for _ in range(rounds):
        shutil.rmtree(folder / "exact", ignore_errors=True)
        (folder / "copy").unlink(missing_ok=True)
        for side, command in sides.items():
            if side == "cp":
                into_cache(folder / "exact" / WEIGHTS)
            runs[side].append(measured(command))
    return {
        side: tuple(statistics.median(run[i] for run in each) for i in range(3))
        for side, each in runs.items()
    }


PEFTS = """
import sys, torch, peft
torch.set_num_threads(1)
out, width, rank, low = map(int, sys.argv[2:6])
model = torch.nn.Sequential()
model.add_module("q_proj", torch.nn.Linear(width, out, bias=False))
model = peft.get_peft_model(model, peft.VeraConfig(r=rank, target_modules=["q_proj"]))
for name, values in model.named_parameters():
    if "lambda" in name:
        torch.nn.init.normal_(values)
if sys.argv[6:] == ["convert"]:
    peft.save_as_lora(sys.argv[1], model, rank=low)
"""


def peft_seconds(folder: Path, shape: tuple[int, int], rank: int, low: int) -> float:
    """Return the CPU seconds of PEFT's conversion of one layer."""
    command = [sys.executable, "-c", PEFTS, str(folder), *map(str, (*shape, rank, low))]
    return measured([*command, "convert"])[1] - measured(command)[1]


def compare(folder: Path, targets: tuple[str, ...], rank: int, given: argparse.Namespace) -> None:
    """Print a line for each side of one case."""
    write_adapter(folder / "vera", targets, rank, given.layers)
    (folder / "base").mkdir()
    config = {**MODEL, "num_hidden_layers": given.layers}
    (folder / "base" / "config.json").write_text(json.dumps(config))
    program = [sys.executable, "-m", "vera_convert", "to-lora", str(folder / "vera")]
    base = ["--base", str(folder / "base"), "--quiet"]
    exact = [*program, str(folder / "exact"), *base]
    weights = folder / "exact" / WEIGHTS
    copy = f'cp "{weights}" "{folder / "copy"}" && sync "{folder / "copy"}"'
    measured([*exact, "--dry-run"])  # compiles modules that have no .pyc file yet
    dry = [*exact, "--dry-run", "--force"]
    sides = {"exact": exact, "cp": ["bash", "-c", copy], "dry run": dry}
    found = medians(sides, given.rounds, folder)
    low = ["--rank", str(given.low), "--accept-error"]
    found[f"rank {given.low}"] = measured([*program, str(folder / "low"), *base, *low])
    both = sum(path.stat().st_size for path in (folder / "vera").iterdir()) / 2**20
    print(f"{weights.stat().st_size / 2**20:,.0f} MiB; the adapter has {both:,.0f} MiB")
    for what, (seconds, cpu, memory) in found.items():
        print(f"  {what:8} {seconds:7.1f} s, {cpu:6.1f} s of CPU, {memory:6.0f} MiB")
    if given.peft:
        shapes = [LINEAR[target] for target in targets]
        times = {s: peft_seconds(folder / "peft", s, rank, given.low) for s in {*shapes}}
        total = given.layers * sum(times[shape] for shape in shapes)
        print(f"  PEFT     {total:16.0f} s of CPU at rank {given.low}, of one layer of each shape")


def main() -> None:
    """Print the figures of each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, nargs="*", default=[256])
    parser.add_argument("--low", type=int, default=64, help="the rank of the approximation")
    parser.add_argument("--layers", type=int, default=32, help="layers of the model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peft", action="store_true", help="time PEFT's conversion, too")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    given = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    for rank in given.rank:
        for name, targets in CASES.items():
            with tempfile.TemporaryDirectory(dir=given.folder) as temporary:
                os.environ["PYTHONPYCACHEPREFIX"] = str(Path(temporary, "compiled"))
                print(f"rank {rank}, {name}, {given.layers} layers: ", end="", flush=True)
                compare(Path(temporary), targets, rank, given)


if __name__ == "__main__":
    main()
