"""Time `merge` beside PEFT and beside two lower bounds: a copy of the base, and the products alone.

The model has TinyLlama's shapes: 1.1 billion values in bfloat16 in 5 shards; the adapter has rank
256. Each side runs as a whole process, in turn, and syncs its output. The table shows the fastest
run of each side. `--peft` adds PEFT, which takes minutes and gigabytes of memory. `--more` adds the
time for more shards and higher ranks, and the memory for an 8B model of sparse files.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__)
MERGE = [sys.executable, "-m", "vera_convert", "merge", "--offline", "--quiet"]


@dataclass(frozen=True)
class Shapes:
    """The sizes of a Llama, and the number of its shards."""

    hidden: int
    intermediate: int
    layers: int
    kv: int
    vocabulary: int
    shards: int

    def linear(self) -> Mapping[str, tuple[int, int]]:
        """The linear layers of one block, as (outputs, inputs)."""
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (self.kv, self.hidden),
            "self_attn.v_proj": (self.kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor of the model."""
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            for name, shape in self.linear().items():
                yield f"model.layers.{layer}.{name}.weight", shape
            for norm in ("input_layernorm", "post_attention_layernorm"):
                yield f"model.layers.{layer}.{norm}.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocabulary, self.hidden)

    def config(self) -> Mapping[str, object]:
        """Return the config that transformers needs to load the model."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": 2048,
            "model_type": "llama",
            "num_attention_heads": self.hidden // 64,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv // 64,
            "rms_norm_eps": 1e-05,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vocab_size": self.vocabulary,
        }


TINYLLAMA = Shapes(2048, 5632, 22, 256, 32000, 5)
LLAMA_8B = Shapes(4096, 14336, 32, 1024, 128256, 4)
SMALL = Shapes(256, 704, 112, 64, 4000, 1)
"""A model with a thousand tensors, which can lie in a thousand shards; 160 MB."""
ALL = tuple(TINYLLAMA.linear())
QV = ("self_attn.q_proj", "self_attn.v_proj")


# --- inputs --------------------------------------------------------------------------------------


def write_base(folder: Path, shapes: Shapes, *, sparse: bool = False) -> Path:
    """Write a model; a sparse model has zeros only and takes no space."""
    folder.mkdir()
    tensors = dict(shapes.tensors())
    total = 2 * sum(int(np.prod(shape)) for shape in tensors.values())
    parts: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in tensors.items():
        if parts[-1] and size >= total / shapes.shards * len(parts):
            parts.append({})
        parts[-1][name] = shape
        size += 2 * int(np.prod(shape))
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        weight_map |= dict.fromkeys(part, file)
        write_sparse(folder / file, part) if sparse else write_random(folder / file, part)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(shapes.config(), indent=2))
    return folder


def write_random(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Write a shard of small random values."""
    values = np.random.default_rng(0)
    tensors = {
        name: (values.standard_normal(shape, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
        for name, shape in shapes.items()
    }
    save_file(tensors, path, {"format": "pt"})


def write_sparse(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Write a shard's header, and leave a hole for its values."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(shapes):
        start, end = end, end + 2 * int(np.prod(shapes[name]))
        entries[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)


def write_adapter(folder: Path, shapes: Shapes, targets: Sequence[str], rank: int) -> Path:
    """Write an adapter with its projections, as PEFT does."""
    folder.mkdir()
    linear = {name: shape for name, shape in shapes.linear().items() if name in targets}
    inputs = max(shape[1] for shape in linear.values())
    outputs = max(shape[0] for shape in linear.values())
    values = np.random.default_rng(0)
    bounds = ("vera_A", (rank, inputs)), ("vera_B", (outputs, rank))
    tensors = {
        f"base_model.{name}": ((values.random(shape, np.float32) - 0.5) * (24 / shape[1]) ** 0.5)
        for name, shape in bounds
    }
    for layer in range(shapes.layers):
        for name, (out, _) in linear.items():
            path = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{path}.vera_lambda_b"] = values.standard_normal(out, np.float32) * 0.05
            tensors[f"{path}.vera_lambda_d"] = values.standard_normal(rank, np.float32) * 0.1
    save_file(
        {name: tensor.astype(np.float32) for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
        {"format": "pt"},
    )
    config = {
        "peft_type": "VERA",
        "projection_prng_key": 0,
        "r": rank,
        "save_projection": True,
        "target_modules": sorted(name.rpartition(".")[2] for name in targets),
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    return folder


def apart(write: Callable[..., Path], folder: Path, *given: object, **options: object) -> Path:
    """Write inputs in another process.

    Linux includes the memory of a starting process in the peak of the started process.
    """
    process = get_context("spawn").Process(target=write, args=(folder, *given), kwargs=options)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{folder} could not be written")
    return folder


# --- timed commands ------------------------------------------------------------------------------


def run(command: Sequence[str | Path], out: Path | None = None) -> tuple[float, float]:
    """Run a process; return its seconds, with those of a sync of `out`, and its peak in MiB."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} failed")
    if out is not None:
        subprocess.run(["sync", *out.iterdir(), out], check=True)  # noqa: S607 -- our own
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return time.perf_counter() - start, usage.ru_maxrss / unit


def merge(adapter: Path, base: Path, out: Path, *options: str) -> tuple[float, float]:
    """Merge; the command itself syncs."""
    found = run([*MERGE, adapter, out, "--base", base, *options])
    shutil.rmtree(out)
    return found


def copy(base: Path, out: Path) -> float:
    """Copy the base and sync the copy."""
    seconds, _ = run(["cp", "-r", base, out], out)
    shutil.rmtree(out)
    return seconds


def products(shapes: Shapes, targets: Sequence[str], rank: int) -> float:
    """Return the seconds of the products alone, by plain NumPy, in another process."""
    code = f"""
import time, numpy as np
total = 0.0
for out, inputs in {[shapes.linear()[name] for name in targets]}:
    left, right = np.ones((out, {rank}), np.float32), np.ones(({rank}, inputs), np.float32)
    result = np.empty((out, inputs), np.float32)
    np.matmul(left, right, out=result)
    start = time.perf_counter()
    for _ in range({shapes.layers}):
        np.matmul(left, right, out=result)
    total += time.perf_counter() - start
print(total)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(done.stdout)


def peft(adapter: Path, base: Path, out: Path) -> tuple[float, float]:
    """Merge with PEFT into the same number of shards, and sync the shards."""
    code = f"""
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(base)!r}, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, {str(adapter)!r}).merge_and_unload()
model.save_pretrained({str(out)!r}, max_shard_size="450MB")
"""
    found = run([sys.executable, "-c", code], out)
    shutil.rmtree(out)
    return found


# --- the tables ----------------------------------------------------------------------------------


def beside_others(work: Path, rounds: int, *, with_peft: bool) -> dict[str, float]:
    """Compare with the copy, the products and PEFT."""
    base = apart(write_base, work / "base", TINYLLAMA)
    found: dict[str, list[float]] = {}
    for name, targets in (("all", ALL), ("qv", QV)):
        apart(write_adapter, work / name, TINYLLAMA, targets, 256)
    for _ in range(rounds):
        found.setdefault("copy_seconds", []).append(copy(base, work / "out"))
        for name, targets in (("all", ALL), ("qv", QV)):
            seconds, peak = merge(work / name, base, work / "out")
            found.setdefault(f"{name}_seconds", []).append(seconds)
            found.setdefault(f"{name}_peak_mib", []).append(peak)
            bare = products(TINYLLAMA, targets, 256)
            found.setdefault(f"{name}_products_seconds", []).append(bare)
            if with_peft:
                seconds, peak = peft(work / name, base, work / "out")
                found.setdefault(f"{name}_peft_seconds", []).append(seconds)
                found.setdefault(f"{name}_peft_peak_mib", []).append(peak)
    best = {name: min(values) for name, values in found.items()}
    for name in ("all", "qv"):
        floor = best["copy_seconds"] + best[f"{name}_products_seconds"]
        best[f"{name}_over_copy_and_products"] = best[f"{name}_seconds"] / floor
        if with_peft:
            best[f"{name}_over_peft"] = best[f"{name}_seconds"] / best[f"{name}_peft_seconds"]
    return best


def growth(work: Path) -> dict[str, float]:
    """Measure time against shards and rank, and the memory of a large model."""
    best: dict[str, float] = {}
    adapter = apart(write_adapter, work / "small", SMALL, ALL, 64)
    for shards in (1, 10, 100, 1000):
        base = apart(write_base, work / f"shards{shards}", replace(SMALL, shards=shards))
        best[f"shards_{shards}_seconds"] = min(
            merge(adapter, base, work / "out")[0] for _ in range(3)
        )
    base = work / "shards1"
    for rank in (16, 64, 256, 1024):
        adapter = apart(write_adapter, work / f"rank{rank}", SMALL, ALL, rank)
        runs = [merge(adapter, base, work / "out") for _ in range(3)]
        best[f"rank_{rank}_seconds"] = min(seconds for seconds, _ in runs)
        best[f"rank_{rank}_peak_mib"] = max(peak for _, peak in runs)
    large = apart(write_base, work / "large", LLAMA_8B, sparse=True)
    adapter = apart(write_adapter, work / "large-qv", LLAMA_8B, ALL, 256)
    best["sparse_8b_seconds"], best["sparse_8b_peak_mib"] = merge(adapter, large, work / "out")
    return best


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peft", action="store_true")
    parser.add_argument("--more", action="store_true")
    parser.add_argument("--work", type=Path, help="a folder on the disk that is measured")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        # Python compiles modules once, as for an installed package.
        os.environ["PYTHONPYCACHEPREFIX"] = f"{folder}/compiled"
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        found = beside_others(Path(folder), arguments.rounds, with_peft=arguments.peft)
        if arguments.more:
            found |= growth(Path(folder))
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        for name, value in found.items():
            print(f"{name:32} {value:9.3f}")


if __name__ == "__main__":
    main()
