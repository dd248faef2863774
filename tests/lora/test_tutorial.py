"""The code and the commands of the tutorial run, with the results that the tutorial states."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import theirwarnings
from commandline import Run

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytestmark = theirwarnings.OF_PEFT

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "tutorial-lora.md").read_text("utf-8")


def blocks(kind: str) -> list[str]:
    """Return the code blocks of a language in the tutorial."""
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def start_of(engine: str, text: str) -> str:
    """Return the only command in a text that starts an engine."""
    (line,) = re.findall(rf"^{engine} .*$", text, re.MULTILINE)
    return str(line)


def test_the_code_and_the_commands_run(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainedmodels import saved

    pytest.importorskip("gguf")
    saved(tmp_path / "my-model", "LlamaForCausalLM", "float32")
    monkeypatch.chdir(tmp_path)
    (training,) = blocks("python")
    exec(training, {"batches": torch.randint(3, 30, (4, 2, 8))})  # noqa: S102 -- our own page
    ended = ""
    commands = [line for block in blocks("console") for line in block.splitlines()]
    assert len(commands) == 5
    for line in commands:
        words = shlex.split(line.removeprefix("$ "))
        assert words[0] == "vera-convert"
        done = run(*words[1:])
        assert done.status == 0, done.err
        ended += done.out
    starts = "".join(blocks("sh"))
    for engine, arguments in {
        "vllm": "--enable-lora --max-lora-rank 256 --lora-modules vera=my-lora",
        "llama-cli": "--lora my-lora-gguf/adapter.gguf",
        "mlx_lm.generate": "--adapter-path my-lora-mlx",
    }.items():
        assert arguments in start_of(engine, starts)
        assert arguments in ended


@pytest.mark.parametrize("engine", ["vllm", "llama-cli", "mlx_lm.generate"])
def test_the_readme_starts_each_engine_as_the_tutorial_does(engine: str) -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    named = {"my-model": "MODEL", "my-lora-gguf": "LORA", "my-lora-mlx": "LORA", "my-lora": "LORA"}
    line = start_of(engine, "".join(blocks("sh")))
    for mine, general in named.items():
        line = line.replace(mine, general)
    assert line in readme
