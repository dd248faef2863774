"""Time the adapted model beside PEFT's: a forward pass and a training step, and the memory of each.

Both wrap the same random Llama with the same adapter. They run in turn and in changing order, so
that other load on the machine affects both. A ratio is the median of the ratios of all rounds, ours
divided by PEFT's. Peak memory is the memory that a call allocates besides the model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers

from vera_convert.with_torch import VeraConfig, VeraModel

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]


def llama(options: argparse.Namespace, dtype: str) -> Any:  # noqa: ANN401 -- has no types
    """Return the model, with the same weights each time."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=options.width,
        intermediate_size=options.width * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
    )
    model = transformers.LlamaForCausalLM(config)
    return model.to(options.device, getattr(torch, dtype))


def forward(model: Any, tokens: Any) -> None:  # noqa: ANN401
    """Run the model without gradients."""
    with torch.no_grad():
        model(tokens)


def step(model: Any, tokens: Any) -> None:  # noqa: ANN401
    """Run the model with gradients, forwards and backwards."""
    model(tokens, labels=tokens).loss.backward()
    for parameter in model.parameters():
        parameter.grad = None


def seconds(function: Callable[[], None], device: str) -> float:
    """Return the seconds of a call: CPU time, or the time until the GPU is finished."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    start = clock()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def peak(function: Callable[[], None], device: str) -> int:
    """Return the peak memory of a call in bytes."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return int(torch.cuda.max_memory_allocated()) - int(before)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def compared(ours: Callable[[], None], theirs: Callable[[], None], options: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return times, peaks and ratios of two functions."""
    rounds = []
    for turn in range(options.rounds + 1):
        order = (ours, theirs) if turn % 2 else (theirs, ours)
        taken = {function: seconds(function, options.device) for function in order}
        if turn:  # the first call warms up
            rounds.append((taken[ours], taken[theirs]))
    peaks = [peak(function, options.device) for function in (ours, theirs)]
    return {
        "ms": 1000 * statistics.median(mine for mine, _ in rounds),
        "peft_ms": 1000 * statistics.median(other for _, other in rounds),
        "ratio": statistics.median(mine / other for mine, other in rounds),
        "bytes": peaks[0],
        "peft_bytes": peaks[1],
        "bytes_ratio": peaks[0] / peaks[1],
    }


def main() -> None:
    """Run all and print a table, or one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 256])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    tokens = torch.arange(options.tokens, device=options.device)[None] % 1000
    rows = []
    for dtype in options.dtypes:
        for rank in options.ranks:
            fields: dict[str, Any] = {"r": rank, "target_modules": TARGETS}
            theirs = peft.get_peft_model(llama(options, dtype), peft.VeraConfig(**fields))
            ours = VeraModel(llama(options, dtype), VeraConfig(**fields))
            for work in (forward, step):
                pair = [lambda m=m, w=work: w(m, tokens) for m in (ours, theirs)]
                case = {"dtype": dtype, "rank": rank, "work": work.__name__}
                rows.append({**case, **compared(pair[0], pair[1], options)})
    if options.json:
        print(json.dumps({"torch": torch.__version__, "peft": peft.__version__, "rows": rows}))
        return
    print(f"{'':26} {'ms':>8} {'PEFT':>8} {'ratio':>6} {'MiB':>8} {'PEFT':>8} {'ratio':>6}")
    for row in rows:
        print(
            f"{row['dtype']:9} r={row['rank']:<5} {row['work']:8} "
            f"{row['ms']:8.1f} {row['peft_ms']:8.1f} {row['ratio']:6.3f} "
            f"{row['bytes'] / 2**20:8.1f} {row['peft_bytes'] / 2**20:8.1f} "
            f"{row['bytes_ratio']:6.3f}"
        )


if __name__ == "__main__":
    main()
