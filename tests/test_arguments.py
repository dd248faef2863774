"""Every public function accepts a choice as member or string, and names any other value."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
from adapters import good_adapter
from commandline import Run
from merges import filled_base

import vera_convert
from vera_convert import (
    AdapterSpec,
    BaseOptions,
    MergeOptions,
    Mode,
    ProjectionSource,
    Rounding,
    Tied,
    UsageError,
    Variant,
    VeraConvertError,
    VerifyOptions,
)
from vera_convert.arguments import adapter_and_weight, dtype_name, peft_version, size_in_bytes
from vera_convert.files.file_names import CONFIG_NAME
from vera_convert.lora.engines import EngineName
from vera_convert.rules import Severity


@dataclass(frozen=True)
class Inputs:
    """A folder with an adapter, a base, and the merged model of both."""

    folder: Path
    counter: Iterator[int]

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def merged(self) -> Path:
        return self.folder / "merged"

    def out(self) -> Path:
        return self.folder / f"out-{next(self.counter)}"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("arguments")
    found = Inputs(folder, iter(range(100_000)))
    good_adapter(found.adapter)
    filled_base(found.base)
    vera_convert.merge(found.adapter, found.merged, base=found.base)
    good_adapter(folder / "tree" / "one")
    return found


FUNCTIONS: dict[str, Callable[[Inputs], dict[str, Any]]] = {
    "count": lambda i: {"model": i.base, "rank": 4, "targets": ["q_proj"]},
    "embed": lambda i: {"adapter": i.adapter, "out": i.out(), "base": i.base},
    "info": lambda i: {"adapter": i.adapter, "base": i.base},
    "load_schema": lambda _: {"name": "adapter_config"},
    "merge": lambda i: {"adapter": i.adapter, "out": i.out(), "base": i.base},
    "migrate": lambda i: {"adapter": i.adapter, "out": i.out(), "base": i.base, "to": "asis"},
    "migrate_tree": lambda i: {
        "tree": i.folder / "tree",
        "out": i.out(),
        "base": i.base,
        "to": "asis",
    },
    "regenerate": lambda i: {"out": i.out(), "rank": 4, "in_features": 8, "out_features": 8},
    "regenerate_for": lambda i: {"adapter": i.adapter, "out": i.out(), "base": i.base},
    "schema_names": lambda _: {},
    "strip": lambda i: {"adapter": i.adapter, "out": i.out(), "base": i.base},
    "to_lora": lambda i: {"adapter": i.adapter, "out": i.out(), "base": i.base},
    "validate": lambda i: {"adapters": i.adapter, "base": i.base},
    "verify": lambda i: {
        "adapter": i.adapter,
        "merged": i.merged,
        "base": i.base,
        "options": VerifyOptions(layers_only=True),
    },
}
"""The public functions, each with valid arguments."""

RECORDS: dict[str, dict[str, Any]] = {
    "AdapterSpec": {"adapter": "a"},
    "BaseOptions": {},
    "HubAccess": {},
    "LoraOptions": {},
    "MergeOptions": {},
    "VerifyOptions": {},
}
"""The public records that a caller makes, each with its required fields."""


@dataclass(frozen=True)
class Spellings:
    """Spellings of an argument: those in a group of `alike` are equal; each of `wrong` is
    refused.
    """

    alike: tuple[tuple[Any, ...], ...] = ()
    wrong: tuple[Any, ...] = ()
    names: str = ""


def choices(kind: type[StrEnum]) -> Spellings:
    """Return the members and their strings; the refusal of other values names all strings."""
    alike = tuple((member, str(member.value)) for member in kind)
    return Spellings(alike, ("banana", "", 5, True, object(), [*kind]), ".*".join(kind))


FLAG = Spellings(wrong=("no", 1, object()), names="True or False")
PLACE = Spellings(((Path("a"), "a"),), (5, b"a", object(), ["a"], "", "a\0"), "pathlib|empty|NUL")
OUT = Spellings(wrong=(5, None, b"a", object(), "", "a\0"), names="out")
TEXT = Spellings(wrong=(5, b"a", object(), ""), names="text|empty")
WHOLE = Spellings(wrong=("eight", 1.5, True, object(), 0, -1), names="whole number")
NUMBER = Spellings(
    ((2, 2.0),), ("two", float("nan"), float("inf"), object(), True), "finite number"
)
DTYPE = Spellings(
    (
        ("bfloat16", "bf16", "BF16", "torch.bfloat16"),
        ("float16", "fp16", "F16", "half"),
        ("float32", "fp32", "F32"),
        ("float64", "fp64", "F64"),
    ),
    ("int4", "", 16, object()),
    "float64, float32, bfloat16, float16",
)
GENERATOR = choices(Variant)
MEANT = choices(ProjectionSource)
SIZE = Spellings(
    ((5_000_000_000, "5GB", "5 gb", "5G"), (1 << 29, "0.5GiB", "512MiB")),
    ("big", "5", "GB", "-5GB", 0, -1, 1.5, object(), True),
    "size|whole number",
)
VERSION = Spellings(
    (((0, 13), "0.13"), ((0, 13, 2), "0.13.2")),
    ("new", "0.9", (0, 9), "1", 0.13, object(), ("0", "13")),
    "0.13|0.11",
)
ACCESS = Spellings(wrong=("token", object(), {}), names="HubAccess")
BASE = Spellings(wrong=(5, b"a", object(), ["a"], ""), names="base")
KEY_MAP = Spellings(
    (((("a", "b"),), ("a=b",), "a=b", {"a": "b"}),),
    ("a", 5, [5], [("a",)], [("a", 5)], ["a b=c"], object()),
    "OLD=NEW|text",
)
ROUNDING = Spellings(
    (*choices(Rounding).alike, (Rounding.BF16, "bfloat16"), (Rounding.FP16, "float16")),
    ("banana", 16, object()),
    ".*".join(Rounding).replace("+", r"\+"),
)
CODES = Spellings(((["V1"], ("V1",)),), ("V1", 5, [5], ["banana"], object()), "text|code")
ADD = Spellings(wrong=("a", 5, [5], [object()]), names="add")

ARGUMENTS: dict[str, Spellings] = {
    "accept_change": FLAG,
    "accept_error": FLAG,
    "access": ACCESS,
    "adapter": Spellings(
        wrong=(5, None, b"a", object(), ["a"], ""), names="pathlib|adapter is empty"
    ),
    "adapters": Spellings(
        wrong=(5, None, b"a", object(), [5], "", [""]), names="pathlib|adapters is empty"
    ),
    "architecture": Spellings(wrong=(5, b"a", object(), "a b", ""), names="text|class|empty"),
    "base": BASE,
    "base_dtype": DTYPE,
    "cache_dir": Spellings(((Path("a"), "a"),), (5, b"a", object(), ""), "cache_dir"),
    "check": FLAG,
    "checksums": FLAG,
    "deep": FLAG,
    "dequantize": FLAG,
    "device": Spellings(wrong=("tpu", "cuda:x", "", 5, object()), names="cpu, cuda|Device"),
    "drop_head": FLAG,
    "dry_run": FLAG,
    "dtype": DTYPE,
    "engine": choices(EngineName),
    "fail_on": choices(Severity),
    "fill_layers": FLAG,
    "force": FLAG,
    "generator": GENERATOR,
    "ignore": CODES,
    "in_features": WHOLE,
    "jobs": WHOLE,
    "key": Spellings(wrong=("seven", 1.5, True, object()), names="whole number"),
    "key_map": KEY_MAP,
    "labels": Spellings(
        ((["a", "b"], ("a", "b"), "a,b"),),
        (5, [5], ["a", "a"], [""], "", ",", object()),
        "text|label|empty",
    ),
    "layers_only": FLAG,
    "lora": Spellings(wrong=(5, b"a", object(), ""), names="pathlib|lora is empty"),
    "max_error": Spellings(((0, 0.0),), ("half", -0.1, 1, float("nan"), object()), "number|share"),
    "max_shard_size": SIZE,
    "model": Spellings(wrong=(5, b"a", object(), ["a"], ""), names="pathlib|model is empty"),
    "name": Spellings(wrong=("banana", 5), names="adapter_config"),
    "offline": FLAG,
    "options": Spellings(wrong=("fast", object(), {}), names="Options"),
    "other": Spellings(wrong=(5, b"a", object(), ""), names="pathlib|other is empty"),
    "merged": Spellings(wrong=(5, b"a", object(), ""), names="pathlib|merged is empty"),
    "out": OUT,
    "out_features": WHOLE,
    "peft_version": VERSION,
    "places": Spellings(
        (({"a": "b"}, (("a", "b"),), [["a", Path("b")]]),),
        ("a=b", 5, [5], [("a",)], [("a", 5)], {5: "b"}, {"": "b"}, {"a": ""}),
        "give {NAME: MODEL}|text|pathlib|places is empty",
    ),
    "progress": FLAG,
    "projections": MEANT,
    "rank": Spellings(WHOLE.alike, (*WHOLE.wrong, 10**9), "whole number|up to"),
    "recursive": FLAG,
    "resume": FLAG,
    "revision": TEXT,
    "rounding": ROUNDING,
    "samples": WHOLE,
    "select": CODES,
    "targets": Spellings(
        ((["q_proj", "v_proj"], "q_proj,v_proj"),),
        (5, [5], ["banana"], "", ",", [""], object()),
        "text|q_proj|empty",
    ),
    "text": Spellings(((Path("a"), "a"),), (5, b"a", object(), ""), "text"),
    "tied": choices(Tied),
    "to": choices(Mode),
    "token": TEXT,
    "tree": Spellings(wrong=(5, None, b"a", object(), "", "a\0"), names="tree"),
    "weight": NUMBER,
}
"""The spellings of each argument, by the argument's name."""

OF_RECORDS = {
    "BaseOptions.model": PLACE,
    "AdapterSpec.adapter": PLACE,
}
OF_RECORDS |= {"MergeOptions.add": ADD, "VerifyOptions.add": ADD, "LoraOptions.rank": WHOLE}
OF_RECORDS["LoraOptions.dtype"] = Spellings(
    DTYPE.alike[:3], (*DTYPE.wrong, "float64"), "float32, bfloat16, float16"
)
CALLBACK = Spellings(wrong=(5, True, "yes", object()), names="function")


def spellings_of(owner: str, argument: str) -> Spellings:
    if argument in ("progress", "runs") and owner in FUNCTIONS:
        return CALLBACK
    return OF_RECORDS.get(f"{owner}.{argument}") or ARGUMENTS[argument]


def parameters() -> Iterator[tuple[str, str]]:
    for name in FUNCTIONS:
        for argument in inspect.signature(getattr(vera_convert, name)).parameters:
            yield name, argument


def record_fields() -> Iterator[tuple[str, str]]:
    for name in RECORDS:
        for field in dataclasses.fields(getattr(vera_convert, name)):
            yield name, field.name


def outcome(name: str, inputs: Inputs, **changed: Any) -> object:
    """Return a comparable form of a function's result, or of the error."""
    arguments = FUNCTIONS[name](inputs) | changed
    if name == "validate" and "select" not in changed:
        arguments["ignore"] = changed.get("ignore", [])
    try:
        result = getattr(vera_convert, name)(**arguments)
    except VeraConvertError as error:
        return type(error), _without_out(str(error), arguments)
    return _without_out(repr(_comparable(result)), arguments)


def _comparable(result: object) -> object:
    if dataclasses.is_dataclass(result):
        return {
            field.name: getattr(result, field.name)
            for field in dataclasses.fields(result)
            if field.name in ("changes", "bytes_after", "draw", "sha256_A", "embedded", "targets")
        }
    return type(result)


def _without_out(text: str, arguments: dict[str, Any]) -> str:
    return text.replace(str(arguments.get("out")), "OUT")


def test_every_public_function_and_record_is_tried() -> None:
    public = {name: getattr(vera_convert, name) for name in vera_convert.__all__}
    functions = {name for name, value in public.items() if inspect.isfunction(value)}
    assert functions == set(FUNCTIONS)
    made_by_callers = {n for n, v in public.items() if dataclasses.is_dataclass(v)} - {
        *("AdapterInfo", "Checked", "Conversion", "Count", "Finding", "LoraConversion", "Merge"),
        *("Regenerated", "Rule", "TreeMigration", "Validation", "Verification"),
    }
    assert made_by_callers == set(RECORDS)


@pytest.mark.parametrize(("name", "argument"), [*parameters()])
def test_a_function_refuses_a_wrong_value_and_names_the_choices(
    name: str, argument: str, inputs: Inputs
) -> None:
    ways = spellings_of(name, argument)
    assert ways.wrong
    before = {*inputs.folder.iterdir()}
    for wrong in ways.wrong:
        arguments = FUNCTIONS[name](inputs) | {argument: wrong}
        with pytest.raises(UsageError, match=f"(?s){ways.names}"):
            getattr(vera_convert, name)(**arguments)
    assert {*inputs.folder.iterdir()} == before


@pytest.mark.parametrize(("name", "argument"), [*parameters()])
def test_a_function_accepts_every_choice_as_member_and_as_string(
    name: str, argument: str, inputs: Inputs
) -> None:
    for alike in spellings_of(name, argument).alike:
        first, *others = [outcome(name, inputs, **{argument: value}) for value in alike]
        assert others == [first] * (len(alike) - 1)


def test_the_string_of_a_mode_has_the_effect_of_the_mode(inputs: Inputs) -> None:
    for mode, projections in (("embedded", True), ("stripped", False)):
        done = vera_convert.migrate(inputs.adapter, inputs.out(), to=mode, base=inputs.base)
        assert done.embedded is projections
        config = json.loads((done.out / "adapter_config.json").read_text())
        assert config["save_projection"] is projections


def test_the_string_of_a_merge_option_has_the_effect_of_the_option(
    tmp_path: Path, inputs: Inputs
) -> None:
    import numpy as np
    from safetensors.numpy import load_file

    own = np.random.default_rng(3).normal(size=(4, 16)).astype(np.float32)
    adapter = good_adapter(tmp_path / "own", tensors={"base_model.vera_A": own})
    weights, changed = {}, "model.layers.0.self_attn.q_proj.weight"
    for projections in (ProjectionSource.KEY, "key", "file"):
        out = tmp_path / f"{type(projections).__name__}-{projections}"
        options = MergeOptions(projections=projections)  # type: ignore[arg-type]
        vera_convert.merge(adapter, out, base=inputs.base, options=options)
        weights[out.name] = load_file(out / "model.safetensors")[changed]
    assert (weights["str-key"] == weights["ProjectionSource-key"]).all()
    assert (weights["str-key"] != weights["str-file"]).any()


@pytest.mark.parametrize(("name", "field"), [*record_fields()])
def test_a_record_refuses_a_wrong_value_and_names_the_choices(name: str, field: str) -> None:
    ways = spellings_of(name, field)
    assert ways.wrong
    for wrong in ways.wrong:
        with pytest.raises(UsageError, match=f"(?s){ways.names}"):
            getattr(vera_convert, name)(**RECORDS[name] | {field: wrong})


@pytest.mark.parametrize(("name", "field"), [*record_fields()])
def test_a_record_accepts_every_choice_as_member_and_as_string(name: str, field: str) -> None:
    for alike in spellings_of(name, field).alike:
        first, *others = [
            getattr(vera_convert, name)(**RECORDS[name] | {field: value}) for value in alike
        ]
        assert others == [first] * (len(alike) - 1)
        found = getattr(first, field)
        assert all(type(getattr(other, field)) is type(found) for other in others)


def test_a_message_names_the_parameter_in_python_and_the_flag_on_the_command_line(
    inputs: Inputs, run: Run
) -> None:
    with pytest.raises(UsageError, match=r"^rank is 0: "):
        vera_convert.LoraOptions(rank=0)
    with pytest.raises(UsageError, match=r"^max_error is 2: "):
        vera_convert.LoraOptions(max_error=2)
    with pytest.raises(UsageError, match=r"^an item of labels is empty: "):
        MergeOptions(labels=["a", ""])
    call = ("to-lora", inputs.adapter, inputs.folder / "lora", "--base", inputs.base)
    assert "error: --rank is 0: " in run(*call, "--rank", "0").err
    assert "error: --max-error is 2: " in run(*call, "--max-error", "2").err


def test_further_adapters_are_records_or_texts() -> None:
    options = MergeOptions(add=["a", "b=0.5", AdapterSpec("c", 2)])  # type: ignore[list-item]
    assert options.add == (AdapterSpec("a", None), AdapterSpec("b", 0.5), AdapterSpec("c", 2.0))
    given = VerifyOptions(add=["a", "b=0.5"])  # type: ignore[list-item]
    assert given.add == (AdapterSpec("a", None), AdapterSpec("b", 0.5))
    assert adapter_and_weight("add", "a=b") == ("a=b", None)


def test_a_weight_that_is_no_number_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    with pytest.raises(UsageError, match=r"give a number as the weight, such as .*adapter=0\.5"):
        MergeOptions(add=[f"{tmp_path / 'adapter'}=half"])  # type: ignore[list-item]
    (tmp_path / "adapter=half").mkdir()
    assert MergeOptions(add=[f"{tmp_path / 'adapter'}=half"]).add  # type: ignore[list-item]


def test_a_dtype_of_torch_is_read_by_its_name() -> None:
    torch = pytest.importorskip("torch")
    assert dtype_name("dtype", torch.bfloat16) == "bfloat16"
    assert BaseOptions(dtype=torch.float16).dtype == "float16"
    with pytest.raises(UsageError, match="float64"):
        dtype_name("dtype", torch.int8)


def test_numbers_of_numpy_are_accepted() -> None:
    import numpy as np

    assert MergeOptions(jobs=np.int64(3), weight=np.float32(0.5)).jobs == 3  # type: ignore[arg-type]
    assert MergeOptions(check=np.True_).check  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="whole number"):
        MergeOptions(jobs=np.float64(3))  # type: ignore[arg-type]


def test_a_path_that_is_too_long_is_no_path_of_a_file(tmp_path: Path) -> None:
    long, adapter, out = "a" * 5_000, good_adapter(tmp_path / "adapter"), tmp_path / "out"
    calls: list[Callable[[], object]] = [
        lambda: vera_convert.info(long),
        lambda: vera_convert.count(long, rank=4),
        lambda: vera_convert.validate(f"{long}/{CONFIG_NAME}"),
        lambda: vera_convert.validate(long, recursive=True),
        lambda: vera_convert.strip(long, out),
        lambda: vera_convert.migrate_tree(long, out, to="asis"),
        lambda: vera_convert.merge(adapter, long, base=adapter),
        lambda: vera_convert.merge(adapter, out, base=long),
        lambda: vera_convert.verify(adapter, merged=long),
        lambda: vera_convert.verify(adapter, lora=long),
        lambda: vera_convert.verify(adapter, other=long),
    ]
    for call in calls:
        with suppress(vera_convert.VeraConvertError):
            call()  # raises no other error


def test_a_wrong_value_is_shown_in_one_short_line() -> None:
    with pytest.raises(UsageError) as caught:
        MergeOptions(dtype="x\x1b[2J\n" * 1000)
    assert len(str(caught.value)) < 700
    assert "\x1b" not in str(caught.value)
    with pytest.raises(UsageError, match="bits"):
        MergeOptions(dtype=10**5000)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["1KB", "1 kB", "1K", "1000B", "0.001MB"])
def test_a_size_can_have_a_unit(text: str) -> None:
    assert size_in_bytes("size", text) == 1000


@pytest.mark.parametrize("text", ["iB", "1i", "1e3GB", "1.GB", "٣GB", "1GB1", "0.1B", "9" * 30])
def test_a_malformed_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="size"):
        size_in_bytes("size", text)


@pytest.mark.parametrize("text", ["0.10", "0", "0.13.", "v0.13", "0.13.2.dev0", "1" * 5000 + ".0"])
def test_a_malformed_version_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"0\.1[13]"):
        peft_version("peft_version", text)


def test_a_folder_with_the_name_of_an_option_keeps_its_name(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    ended = run("info", "base", "--revision", "main")
    assert ended.err.startswith("error: --revision must be left out, because base is a folder")
