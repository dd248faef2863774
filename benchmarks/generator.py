"""Time the generator beside torch's own draw, and the recognition of stored matrices.

All contenders run in turn, so that other load on the machine affects all. A ratio is the median of
the ratios of all rounds. Peak memory is the memory that a draw needs besides the result.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import tracemalloc
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from vera_convert.draws.generator import Draw, Rounding, Variant, redrawn, rounded
from vera_convert.draws.recognition import recognize, searched_keys

KEY = 40_000
DTYPES = tuple(dict.fromkeys(variant.split("-")[0] for variant in Variant))

Times = dict[str, list[float]]


def torch_draw(dtype: str, rank: int, in_features: int, out_features: int) -> list[Any]:
    """Draw A and B as PEFT does it under this default dtype."""
    source = torch.Generator("cpu").manual_seed(KEY)
    pair = []
    for shape in ((rank, in_features), (out_features, rank)):
        matrix = torch.empty(shape, dtype=getattr(torch, dtype))
        torch.nn.init.kaiming_uniform_(matrix, generator=source)
        pair.append(matrix)
    return pair


def timed(contenders: Mapping[str, Callable[[], object]], rounds: int) -> Times:
    """Return the seconds of each contender in each round, after a round to warm up."""
    times: Times = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, contender in contenders.items():
            start = time.perf_counter()
            contender()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def peak(function: Callable[[], object]) -> int:
    """Return the peak memory in bytes, with the result."""
    tracemalloc.start()
    try:
        result = function()  # noqa: F841 -- held, so that it counts
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def drawing(dims: dict[str, int], rounds: int) -> list[dict[str, object]]:
    """Return a row for each variant: our time, torch's time, the ratio, and the extra memory."""
    theirs = {dtype: partial(torch_draw, dtype, **dims) for dtype in DTYPES}
    drawn = {each: Draw(each, KEY, rounding=Rounding.NONE, **dims) for each in Variant}
    ours = {variant.value: draw.matrices for variant, draw in drawn.items()}
    times = timed({**theirs, **ours}, rounds)
    values = dims["rank"] * (dims["in_features"] + dims["out_features"])
    rows: list[dict[str, object]] = []
    for variant in Variant:
        mine, other = times[variant], times[variant.split("-")[0]]
        result = values * variant.dtype.itemsize
        rows.append(
            {
                "variant": variant,
                "ms": 1000 * statistics.median(mine),
                "torch_ms": 1000 * statistics.median(other),
                "ratio": statistics.median(a / b for a, b in zip(mine, other, strict=True)),
                "bytes_beside_result": peak(ours[variant]) - result,
                "bytes_in_blocks": peak(partial(in_blocks, variant, dims)),
            }
        )
    return rows


def in_blocks(variant: Variant, dims: dict[str, int]) -> None:
    """Draw the matrices in blocks of rows and keep no row."""
    whole = Draw(variant, KEY, dims["rank"], dims["in_features"], dims["out_features"])
    for _ in redrawn(whole, in_features=dims["in_features"], out_features=dims["out_features"]):
        pass


def recognizing(dims: dict[str, int], rounds: int) -> dict[str, float]:
    """Return the median milliseconds to recognize a pair, for each kind of pair."""
    A, B = Draw(Variant.FLOAT32_FUSED, KEY, rounding=Rounding.NONE, **dims).matrices()
    half_A, half_B = rounded(A, Rounding.BF16), rounded(B, Rounding.BF16)
    part = A[:, : A.shape[1] // 2].copy()
    damaged = B.copy()
    damaged[-1, -1] *= -1
    foreign = [np.roll(matrix, 1, axis=1) for matrix in (A, B)]
    times = timed(
        {
            "this key": lambda: recognize(A, B, key=KEY),
            "this key, rounded to bf16": lambda: recognize(half_A, half_B, key=KEY),
            "this key, a larger draw": lambda: recognize(part, B, key=KEY),
            "another key": lambda: recognize(A, B, key=1),
            "no draw: one sign flipped": lambda: recognize(A, damaged, key=KEY),
            "no draw at all": lambda: recognize(*foreign, key=KEY),
            "the search through 65,536 keys alone": lambda: searched_keys(A, B),
        },
        rounds,
    )
    return {name: 1000 * statistics.median(taken) for name, taken in times.items()}


def main() -> None:
    """Run both and print a table, or one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--in-features", type=int, default=4096)
    parser.add_argument("--out-features", type=int, default=11008)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    dims = {name: getattr(options, name) for name in ("rank", "in_features", "out_features")}

    torch.set_num_threads(1)
    rows = drawing(dims, options.rounds)
    found = recognizing(dims, options.rounds)
    if options.json:
        document = {"torch": torch.__version__, **dims, "drawing": rows, "recognizing_ms": found}
        print(json.dumps(document, indent=2))
        return
    print(f"{'drawn':28} {'ms':>6} {'torch':>6} {'ratio':>6} {'beside it':>10} {'in blocks':>10}")
    for row in rows:
        print(
            f"{row['variant']:28} {row['ms']:6.1f} {row['torch_ms']:6.1f} {row['ratio']:6.2f} "
            f"{row['bytes_beside_result']:10,} {row['bytes_in_blocks']:10,}"
        )
    print(f"\n{'recognized':38} {'ms':>6}")
    for name, milliseconds in found.items():
        print(f"{name:38} {milliseconds:6.1f}")


if __name__ == "__main__":
    main()
