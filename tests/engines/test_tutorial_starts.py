"""The tutorial's commands start MLX-LM and llama.cpp, which write the VeRA adapter's text."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import theirwarnings
import torch
from llamacpp import completion, gguf_base, server
from trainedmodels import loaded, saved, trained

from vera_convert import LoraOptions, to_lora

peft = pytest.importorskip("peft")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
pytestmark = theirwarnings.OF_PEFT

LLAMA = "LlamaForCausalLM"
PAGE = Path(__file__).parent.parent.parent / "docs" / "tutorial-lora.md"
LETTERS = ["<unk>", "<s>", "</s>", "▁", "O", *map(chr, range(ord("a"), ord("z") + 1))]
WORDS = [*LETTERS, *(f"<{n}>" for n in range(len(LETTERS), 40))]


def start_of(program: str) -> list[str]:
    """Return the words of the tutorial's only command that starts a program."""
    (line,) = re.findall(rf"^{program} .*$", PAGE.read_text("utf-8"), re.MULTILINE)
    return shlex.split(line)


def value_of(option: str, words: list[str]) -> str:
    return words[words.index(option) + 1]


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the folders of the tutorial: a tiny Llama whose tokens are letters, and its LoRAs."""
    folder = tmp_path_factory.mktemp("tutorial")
    base = saved(folder / "my-model", LLAMA, "float32")
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: n for n, word in enumerate(WORDS)}, "<unk>")
    )
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    letter = tokenizers.Regex(".")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(letter, "isolated")
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.Fuse()]
    )
    special = {"unk_token": "<unk>", "eos_token": "</s>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.save_pretrained(base)
    gguf_base(base, folder / "my-model.gguf", WORDS)
    targets = ["q_proj", "v_proj"]
    adapter = trained(folder / "my-adapter", base, LLAMA, targets=targets, stored=True)
    for engine in ("gguf", "mlx"):
        options = LoraOptions(engine=engine)  # type: ignore[arg-type]
        to_lora(adapter, folder / f"my-lora-{engine}", base=base, options=options)
    return folder


def text_after(prompt: str, folder: Path, adapter: Path | None, length: int) -> str:
    """Return the most likely text after a prompt, by transformers and PEFT."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "my-model")
    model = loaded(LLAMA, folder / "my-model")
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    found: Any = model.generate(input_ids=ids, max_new_tokens=length, do_sample=False)
    text = tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def test_mlx_lm_writes_the_adapters_text(tutorial: Path) -> None:
    pytest.importorskip("mlx_lm")
    words = start_of("mlx_lm.generate")
    program = Path(sys.executable).with_name(words[0])
    prompt = value_of("--prompt", words)
    texts = {}
    for name, command in (("lora", words), ("base", [*words[:3], *words[5:]])):
        done = subprocess.run(
            [program, *command[1:]], cwd=tutorial, capture_output=True, text=True, check=True
        )
        texts[name] = done.stdout.split("==========")[1].strip("\n")
    expected = text_after(prompt, tutorial, tutorial / "my-adapter", len(texts["lora"]) + 1)
    assert texts["lora"]
    assert expected.startswith(texts["lora"])
    assert texts["lora"] != texts["base"]


def test_llama_cpp_writes_the_adapters_text(tutorial: Path) -> None:
    words = start_of("llama-cli")
    model, lora = (tutorial / value_of(option, words) for option in ("--model", "--lora"))
    prompt = value_of("--prompt", words)
    texts = {
        adapter: completion(server(model, adapter), prompt=prompt, n_predict=32, temperature=0)
        for adapter in (lora, None)
    }
    expected = text_after(prompt, tutorial, tutorial / "my-adapter", 32)
    assert texts[lora]["text"] == expected
    assert texts[None]["text"] != expected
