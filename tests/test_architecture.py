"""The structure of the package: allowed imports, and modules that a start must not load."""

from __future__ import annotations

import ast
import builtins
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vera_convert"

LAYERS = """
_version
text tables rules errors schemas dtypes delta embeddings progress float16
files: reading file_names strict_json walk json_edit header tensorfile value_range shards
arguments
draws: generator comparison recognition
publish: signals filesystem place staging publishing
hub: repo_name redaction checksum location refusals retry header_cache range_file client
hub: download repos lookup
adapter: config fingerprint names adapter lora_record saved_modules sorting folder
adapter: values opening repairs
targets: patterns linear matching architectures built
base.quantized: packing layer awq bitsandbytes_4bit bitsandbytes_8bit compressed_tensors fp8 gptq
base.quantized: mxfp4 torchao formats
base: model side_files rename_table templates renames unsupported_layouts shared_layers
base.quantized: layer_settings recognize unpack targets
base: orientation vocabulary strategies match bases resizes task_classes saved_places
base: replacements tied
base: facts casts dims identity resolve
conversion: projections proof transforms sizes work strip_embed regeneration migration
assembly: addends blocks input_files copying direct pool finisher writer journal
merging: in_effect dequantize base_files adapters changes options adapter_files inputs
merging: collect plan report model_config output provenance job merge
lora: engines options factors plan stored pipeline_component forms checks record
lora: writing gguf_reading gguf_form reading conversion
counting summary
validation: result selection config tensors base checks validate
verification: provenance model_comparison options running comparator pairs
verification: roundings diagnosis tensors model_files repeated_merge
verification: merged forms lora_config lora_names lora verify
formats: document shared results merge locations validation reports sarif junit github catalog
formats: verification
with_torch
cli: values options output help command refusals completion inspecting converting merging app
__init__ __main__
"""
"""The modules in order, grouped by folder; a module may import only modules that come before."""


def in_order(layers: str) -> list[str]:
    """Return the full name of every module of `layers`; the folder itself comes before its
    modules.
    """
    names: list[str] = []
    for line in layers.split("\n"):
        folder, _, modules = line.rpartition(":")
        names += [folder] * (folder not in ("", *names))
        names += [f"{folder}.{name}".lstrip(".") for name in modules.split()]
    return names


ORDER = in_order(LAYERS)

GROUND = {
    "_version",
    "text",
    "tables",
    "rules",
    "errors",
    "schemas",
    "dtypes",
    "delta",
    "embeddings",
    "progress",
    "float16",
    "arguments",
}
"""Single modules that every folder may import."""
ABOVE_FOLDERS = {"counting", "summary"}
"""Single modules that come after the folders that they use; `formats` shows their results."""

ONLY_IN = {
    "click": {"cli"},
    "huggingface_hub": {"hub.client"},
    "torch": {"with_torch"},
    "transformers": {"with_torch"},
}
"""Libraries that only one part of the package may import."""

ALLOWED = {
    "text": set[str](),
    "rules": set[str](),
    "errors": set[str](),
    "schemas": set[str](),
    "dtypes": set[str](),
    "arguments": set[str](),
    "architectures": set[str](),
    "draws.generator": {"numpy", "ml_dtypes"},
}
"""Modules that import only these libraries beside the standard library."""

LATE = {"huggingface_hub", "torch", "transformers"}
"""Libraries that only functions import, because these are slow to import or may be missing."""

NOT_AT_START = LATE | {"httpx", "numpy", "peft", "requests", "safetensors.torch"}


def modules() -> dict[str, ast.Module]:
    """Return every module by its name in the package; the name of a folder stands for
    `__init__`.
    """
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        name = name.removesuffix(".__init__")
        found[name] = ast.parse(path.read_bytes(), filename=str(path))
    return found


def imports(tree: ast.AST) -> Iterator[str]:
    """Return the full name of every module that the code under `tree` imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            assert node.level == 0, "relative imports hide which layer is meant"
            if node.module == "vera_convert":
                yield from (f"vera_convert.{alias.name}" for alias in node.names)
            else:
                yield node.module


def imports_on_loading(tree: ast.Module) -> Iterator[str]:
    """Return every module that is imported while the module loads, which excludes functions."""
    for node in tree.body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                continue
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                continue
            case ast.ClassDef():
                yield from imports_on_loading(ast.Module(node.body, []))
            case _:
                yield from imports(node)


def layer_of(module: str) -> str:
    """Return the entry of `ORDER` for a module; all of `with_torch` is one entry."""
    return "with_torch" if module.startswith("with_torch.") else module


MODULES = modules()


def test_every_module_has_its_layer() -> None:
    assert {layer_of(name) for name in MODULES} == set(ORDER)
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_layers_above_its_own(module: str) -> None:
    own = ORDER.index(layer_of(module))
    for name in imports(MODULES[module]):
        if name.startswith("vera_convert."):
            other = layer_of(name.removeprefix("vera_convert."))
            # `from vera_convert import __version__` imports no module
            layer = ORDER.index(other if other in ORDER else "__init__")
            assert layer < own or other == layer_of(module) == "with_torch", (
                f"{module} imports {other}"
            )


FOLDERS = sorted({name.partition(".")[0] for name in MODULES if "." in name})


@pytest.mark.parametrize("folder", [name for name in FOLDERS if name != "with_torch"])
def test_a_folder_imports_exactly_the_folders_that_its_docstring_names(folder: str) -> None:
    used = {
        name.removeprefix("vera_convert.").partition(".")[0]
        for module, tree in MODULES.items()
        if module == folder or module.startswith(f"{folder}.")
        for name in imports(tree)
        if name.startswith("vera_convert.")
    }
    docstring = ast.get_docstring(MODULES[folder])
    assert docstring is not None
    named = set(re.findall(r"`(\w+)`", docstring.partition("May import")[2]))
    above = {"formats": ABOVE_FOLDERS, "cli": {*ABOVE_FOLDERS, "_version"}}
    allowed = GROUND | above.get(folder, set())
    assert used - allowed - {folder, "__version__"} == named


SUMS_OF_A_MERGE = {"assembly.blocks", "assembly.writer", "float16", "merging.plan"}


def test_verify_does_not_compute_with_the_code_that_it_verifies() -> None:
    assert MODULES.keys() >= SUMS_OF_A_MERGE
    for module in (name for name in MODULES if name.startswith("verification.")):
        used = {name.removeprefix("vera_convert.") for name in imports(MODULES[module])}
        assert SUMS_OF_A_MERGE.isdisjoint(used), module


def named(tree: ast.Module) -> set[str]:
    """Return every name that a module defines, reads or compares with."""
    found: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
                found.add(name)
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.Constant(value=str(name)):
                found.add(name)
            case ast.alias(name=name):
                found.update(name.split("."))
            case _:
                pass
    return found


def defined(body: list[ast.stmt]) -> Iterator[str]:
    """Return the name of every function, class, field and constant of a module or class."""
    for node in body:
        match node:
            case ast.FunctionDef(name=name):
                yield name
            case ast.ClassDef(name=name, body=inner):
                yield from (name, *defined(inner))
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                yield name
            case _:
                pass


EVERYWHERE = {
    "vera_convert",
    *dir(builtins),
    *(part for name in MODULES for part in name.split(".")),
    *(name for tree in MODULES.values() for name in defined(tree.body)),
}
"""Names that every docstring may mention."""


@pytest.mark.parametrize("module", MODULES)
def test_a_docstring_names_only_modules_functions_and_fields_that_exist(module: str) -> None:
    known = EVERYWHERE | named(MODULES[module])
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            for name in re.findall(
                r"(?<!`)`([A-Za-z_][\w.]*)(?:\(\))?`(?!`)", str(node.value.value)
            ):
                assert {*name.split(".")} <= known, f"{module}: `{name}` does not exist"


@pytest.mark.parametrize("module", MODULES)
def test_a_library_is_imported_only_in_its_part(module: str) -> None:
    own = layer_of(module)
    used = {name.split(".")[0] for name in imports(MODULES[module])}
    libraries = used - set(sys.stdlib_module_names) - {"vera_convert"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    promised = project["dependencies"] + project["optional-dependencies"]["torch"]
    assert libraries <= {requirement.split(">=")[0] for requirement in promised}
    assert libraries <= ALLOWED.get(own, libraries)
    for library in libraries:
        assert {own, own.partition(".")[0]} & ONLY_IN.get(library, {own})


@pytest.mark.parametrize("module", MODULES)
def test_slow_libraries_are_imported_in_functions(module: str) -> None:
    if layer_of(module) != "with_torch":
        assert LATE.isdisjoint(name.split(".")[0] for name in imports_on_loading(MODULES[module]))


@pytest.mark.parametrize(
    "start",
    [
        "import vera_convert",
        "from vera_convert.cli.app import main; sys.argv[1:] = ['--help']; main()",
        "from vera_convert.cli.app import main; sys.argv[1:] = ['info', '--help']; main()",
        "from vera_convert.cli.app import main; sys.argv[1:] = ['validate', '--help']; main()",
    ],
)
def test_a_start_loads_no_slow_library(start: str) -> None:
    code = f"""
import atexit, json, sys
atexit.register(lambda: print(json.dumps(sorted(sys.modules)), file=sys.stderr))
{start}
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    loaded = set(json.loads(run.stderr))
    assert "vera_convert" in loaded
    assert NOT_AT_START.isdisjoint(loaded)
