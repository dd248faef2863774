"""The catalog of rules: every defect that vera-convert can find, each with a stable code.

Hundreds name the family: V0 file, V1 config, V2 tensors, V3 values, V4 projections, V5 base,
V6 verification, V7 LoRA.
A code keeps its meaning forever. A reader that finds a defect raises `CheckpointError` with the
`Finding`, and every command shows the finding in the same words.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from vera_convert.text import printable


class Severity(StrEnum):
    """How bad a finding is."""

    ERROR = "error"
    """The checkpoint cannot be loaded, loads wrongly, or would lose data."""
    WARNING = "warning"
    """The checkpoint works, but not in every environment, or not as expected."""
    NOTE = "note"
    """Information; the checkpoint is correct."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One kind of defect, with its title, reason and remedy.

    Attributes:
        code: the stable code, such as ``V101``.
        severity: how bad the defect is.
        title: the defect in a few words.
        why: why the defect matters.
        remedy: what to do about the defect.
        since: the first version of vera-convert that has the rule.
    """

    code: str
    severity: Severity
    title: str
    why: str
    remedy: str
    since: str

    def at(
        self, place: str, reason: str, *, file: str | None = None, tensor: str | None = None
    ) -> Finding:
        """Return a finding at a place: a layer, a folder, a base (text that is printable)."""
        return Finding(self, place, reason, file, tensor)

    def in_file(self, file: str, reason: str) -> Finding:
        """Return a finding in a file (a name or path that is printable)."""
        return Finding(self, file, reason, file)

    def in_tensor(self, name: str, reason: str, *, file: str | None = None) -> Finding:
        """Return a finding at a tensor, named as in its file; `file` is shown if given."""
        shown = printable(name)
        place = shown if file is None else f'{file} tensor "{shown}"'
        return Finding(self, place, reason, file, name)

    def as_note(self) -> Rule:
        """Return this rule for a case in which nothing is wrong."""
        return replace(self, severity=Severity.NOTE)

    def as_warning(self) -> Rule:
        """Return this rule for a case in which something may be wrong."""
        return replace(self, severity=Severity.WARNING)


@dataclass(frozen=True, slots=True)
class Finding:
    """One defect in one place.

    Attributes:
        rule: the kind of defect.
        place: the file, tensor, layer or field, as text for people.
        reason: the values that were found, as a sentence.
        file: the file with the defect, if a single file has it: a name or a path.
        tensor: the name of the tensor with the defect, if a single tensor has it.

    Example:
        >>> from vera_convert import validate
        >>> finding = validate("broken").findings[0]
        >>> finding.code, str(finding.severity), finding.file
        ('V104', 'error', 'adapter_config.json')
    """

    rule: Rule
    place: str
    reason: str
    file: str | None = None
    tensor: str | None = None

    @property
    def code(self) -> str:
        """The stable code of the rule, such as ``V101``."""
        return self.rule.code

    @property
    def severity(self) -> Severity:
        """The severity of the rule."""
        return self.rule.severity

    def __str__(self) -> str:
        return f"{self.code} {self.place}: {self.reason} {self.rule.remedy}"


ERROR, WARNING, NOTE = Severity.ERROR, Severity.WARNING, Severity.NOTE

# --- V0: files -----------------------------------------------------------------------------------

NOT_REGULAR = Rule(
    "V001",
    ERROR,
    "not a regular file",
    "Reading a pipe or a device can block forever, never end, or give other bytes each time.",
    "Replace it with a regular file.",
    since="0.1.0",
)
LINK_OUTSIDE = Rule(
    "V002",
    ERROR,
    "a link leads out of the folder",
    "Following the link could expose any file on this machine.",
    "Replace the link with a copy of the file. Links into the Hub cache's blobs are allowed.",
    since="0.1.0",
)
FILE_TOO_LARGE = Rule(
    "V003",
    ERROR,
    "a file is larger than its kind can be",
    "Reading the file would waste memory and time; PEFT writes no file of this size.",
    "Restore the file that PEFT wrote.",
    since="0.1.0",
)
FILE_EMPTY = Rule(
    "V004",
    ERROR,
    "a file is empty",
    "A save or copy that is stopped, or runs out of disk space, leaves empty files.",
    "Copy or download the file again.",
    since="0.1.0",
)
NAME_UNSAFE = Rule(
    "V005",
    ERROR,
    "a file name could lead out of its folder",
    "Absolute names, '..', backslashes and colons can reach other files on some systems.",
    "Use plain names inside the folder, with '/' between the parts.",
    since="0.1.0",
)
FILE_UNREADABLE = Rule(
    "V006",
    ERROR,
    "a file cannot be read",
    "The file's owner or mode forbids reading; other users of the folder would fail too.",
    "Allow reading with `chmod u+r FILE`.",
    since="0.1.0",
)
LINK_NOT_CARRIED = Rule(
    "V007",
    WARNING,
    "a link is not followed",
    "The link leads out of the folder or nowhere, so converting the adapter loses its target.",
    "Replace the link with a copy of the file, or remove the link.",
    since="0.1.0",
)
UNREAD_WEIGHTS = Rule(
    "V008",
    NOTE,
    "the folder holds weights that PEFT does not read",
    "PEFT loads only adapter_model.safetensors. If the file was trained too, only the program "
    "that wrote the file can load the whole model.",
    "Tell users which program reads the file. A conversion copies the file; a merge does not.",
    since="0.2.0",
)
CONFIG_MISSING = Rule(
    "V010",
    ERROR,
    "adapter_config.json is missing",
    "Only this file holds the rank, the key and the method; without it, the weights cannot be "
    "loaded.",
    "Pass the folder that holds adapter_config.json, or copy the file into this folder.",
    since="0.1.0",
)
WEIGHTS_MISSING = Rule(
    "V011",
    ERROR,
    "adapter_model.safetensors is missing",
    "The file holds the trained vectors.",
    "Copy or download the file into this folder.",
    since="0.1.0",
)
PICKLE_ONLY = Rule(
    "V012",
    ERROR,
    "the weights exist only as a pickle",
    "Opening a pickle can run any code that its author chose, so vera-convert opens none.",
    "With PyTorch installed, run this in the adapter's folder; it reads tensors only: python -c"
    ' "import torch; from safetensors.torch import save_file; t = '
    "torch.load('adapter_model.bin', map_location='cpu', weights_only=True); save_file({k: "
    "v.clone().contiguous() for k, v in t.items()}, 'adapter_model.safetensors', "
    "metadata={'format': 'pt'})\"",
    since="0.1.0",
)
BOTH_KINDS = Rule(
    "V013",
    WARNING,
    "the folder holds pickled weights too",
    "PEFT and vera-convert read the safetensors file; other programs may read the pickle.",
    "Remove the pickled file if no program needs it.",
    since="0.1.0",
)
MODEL_AS_ADAPTER = Rule(
    "V014",
    ERROR,
    "an adapter's file name holds a whole model's weights",
    "PEFT finds no VeRA vectors in the file and may overwrite tensors of the base.",
    "Save the adapter with PeftModel.save_pretrained before you merge it.",
    since="0.1.0",
)
ADAPTER_AS_MODEL = Rule(
    "V015",
    ERROR,
    "a model's file name holds the adapter's weights",
    "PEFT reads only adapter_model.safetensors; other loaders would take the file for a model.",
    "Rename model.safetensors to adapter_model.safetensors.",
    since="0.1.0",
)
MODEL_FOLDER = Rule(
    "V016",
    ERROR,
    "the folder holds a model, not an adapter",
    "A merged model loads without an adapter.",
    "Pass the adapter's folder, or load this folder as a model.",
    since="0.1.0",
)
ADAPTER_BELOW = Rule(
    "V017",
    ERROR,
    "the adapter lies in a subfolder",
    'PEFT saves an adapter in a subfolder of its name, unless the name is "default".',
    "Pass the subfolder. To check all adapters below a folder, run `vera-convert validate "
    "--recursive FOLDER`.",
    since="0.1.0",
)
TRAINING_STATE = Rule(
    "V018",
    NOTE,
    "the folder holds files of a training run",
    "Training states are large and pickled, and logs reveal paths and machine names. Nobody "
    "needs them to load the adapter.",
    "Remove the files before you publish the adapter. strip, embed, migrate and merge leave "
    "them out.",
    since="0.1.0",
)
STRANGE_FILES = Rule(
    "V019",
    NOTE,
    "the folder holds files of a download or of another model",
    "NAME:Zone.Identifier reveals the source of a download. A loader can take another model's "
    "weights for the base's.",
    "Remove the files. strip, embed, migrate and merge leave them out.",
    since="0.2.0",
)
JSON_NOT_UTF8 = Rule(
    "V020",
    ERROR,
    "a text file is not UTF-8",
    "JSON must be UTF-8; readers refuse other encodings or guess.",
    "Save the file as UTF-8.",
    since="0.1.0",
)
JSON_BOM = Rule(
    "V021",
    ERROR,
    "a text file begins with a byte order mark",
    "JSON allows none; Python's json and the safetensors library refuse the file.",
    "Save the file as UTF-8 without a byte order mark.",
    since="0.1.0",
)
JSON_SYNTAX = Rule(
    "V022",
    ERROR,
    "a file is not valid JSON",
    "No loader can read the file.",
    "Restore the original file, or copy the file again if it was cut off.",
    since="0.1.0",
)
JSON_DUPLICATE_KEY = Rule(
    "V023",
    ERROR,
    "a JSON object repeats a key",
    "Some readers take the first value and some the last.",
    "Remove the wrong entry.",
    since="0.1.0",
)
JSON_NOT_FINITE = Rule(
    "V024",
    ERROR,
    "JSON contains NaN or Infinity",
    "JSON has no such numbers; most readers refuse them.",
    "Write a finite number, or null.",
    since="0.1.0",
)
JSON_NESTING = Rule(
    "V025",
    ERROR,
    "JSON is nested too deeply",
    "Deep nesting can exhaust a reader; real files have at most five levels.",
    "Restore the original file.",
    since="0.1.0",
)
JSON_NUMBER = Rule(
    "V026",
    ERROR,
    "a number in JSON is too large or too long",
    "No field needs such a number, and readers disagree about its value.",
    "Write a number of ordinary size.",
    since="0.1.0",
)
JSON_SURROGATE = Rule(
    "V027",
    ERROR,
    "a text contains half of a surrogate pair",
    "UTF-8 cannot encode a lone surrogate, so the safetensors library refuses the file.",
    "Write the complete character.",
    since="0.1.0",
)
JSON_TOO_MANY = Rule(
    "V028",
    ERROR,
    "JSON has too many values",
    "A few bytes of such a text take about a hundred bytes of memory.",
    "Restore the original file.",
    since="0.1.0",
)
LFS_POINTER = Rule(
    "V030",
    ERROR,
    "a file is a Git LFS pointer",
    "The repository was cloned without Git LFS, so the file holds only a reference to its content.",
    "Run `git lfs pull` in the repository, or download the repository with `hf download`.",
    since="0.1.0",
)
PICKLE_RENAMED = Rule(
    "V031",
    ERROR,
    "a pickle has the name of a safetensors file",
    "Opening a pickle can run any code that its author chose, so vera-convert opens none.",
    "Convert the file with torch.load(..., weights_only=True) and safetensors.torch.save_file. "
    "Renaming is not enough.",
    since="0.1.0",
)
OTHER_FORMAT = Rule(
    "V032",
    ERROR,
    "a file is not in the format that its name says",
    "A safetensors file begins with the length of its header.",
    "Download or convert the file again.",
    since="0.1.0",
)
LENGTH_MISSING = Rule(
    "V033",
    ERROR,
    "a safetensors file ends within its first eight bytes",
    "The first eight bytes hold the length of the header.",
    "Copy or download the file again.",
    since="0.1.0",
)
HEADER_TOO_LONG = Rule(
    "V034",
    ERROR,
    "a header is longer than 100 MB",
    "The safetensors library refuses such a file.",
    "Write the file again with the safetensors library.",
    since="0.1.0",
)
HEADER_CUT_OFF = Rule(
    "V035",
    ERROR,
    "a safetensors file ends within its header",
    "The file is incomplete, or the length of the header is wrong.",
    "Copy or download the file again.",
    since="0.1.0",
)
HEADER_START = Rule(
    "V036",
    ERROR,
    "a header does not begin with '{'",
    "The safetensors format requires '{', so that no other kind of file can pass for safetensors.",
    "Write the file again with the safetensors library.",
    since="0.1.0",
)
METADATA_FORM = Rule(
    "V040",
    ERROR,
    "__metadata__ is not a map of texts",
    "The safetensors library refuses a file whose __metadata__ has other values than texts.",
    "Write numbers and lists as text, or remove them.",
    since="0.1.0",
)
ENTRY_FORM = Rule(
    "V041",
    ERROR,
    "a tensor's entry is not an object",
    "Each tensor needs an object with dtype, shape and data_offsets.",
    "Write the file again with the safetensors library.",
    since="0.1.0",
)
ENTRY_FIELD_MISSING = Rule(
    "V042",
    ERROR,
    "a tensor's entry lacks a field",
    "A reader needs dtype, shape and data_offsets to find and decode the tensor.",
    "Write the file again with the safetensors library.",
    since="0.1.0",
)
ENTRY_FIELD_UNKNOWN = Rule(
    "V043",
    ERROR,
    "a tensor's entry has an unknown field",
    "The format defines no other field; readers would ignore its meaning, such as a scale.",
    "Write the file again with the safetensors library.",
    since="0.1.0",
)
DTYPE_UNKNOWN = Rule(
    "V044",
    ERROR,
    "a tensor has an unknown dtype",
    "The safetensors library cannot read the values.",
    "Save the tensor in a dtype of the safetensors library.",
    since="0.1.0",
)
SHAPE_FORM = Rule(
    "V045",
    ERROR,
    "a tensor's shape is not a list of whole numbers",
    "A shape has at most 32 sizes, each a whole number of at least 0.",
    "Write the file again with the safetensors library.",
    since="0.1.0",
)
SHAPE_OVERFLOW = Rule(
    "V046",
    ERROR,
    "a tensor is too large for any memory",
    "The size in bytes overflows 63 bits; a reader without a check computes a small size.",
    "Write the file again with the safetensors library.",
    since="0.1.0",
)
SHAPE_PARTIAL_BYTE = Rule(
    "V047",
    ERROR,
    "a tensor ends within a byte",
    "The 4-bit or 6-bit values do not fill whole bytes, so the safetensors library refuses the "
    "file.",
    "Write the file again with the safetensors library.",
    since="0.1.0",
)
OFFSETS_FORM = Rule(
    "V048",
    ERROR,
    "data_offsets is not a valid pair",
    "data_offsets must be two whole numbers of at least 0, begin first, and begin at most end.",
    "Write the file again with the safetensors library.",
    since="0.1.0",
)
OFFSETS_SPAN = Rule(
    "V049",
    ERROR,
    "a tensor's byte count does not match its shape and dtype",
    "A reader without a check would read bytes of the next tensor, or memory outside the file.",
    "Write the file again with the safetensors library.",
    since="0.1.0",
)
DATA_OVERLAP = Rule(
    "V050",
    ERROR,
    "two tensors share bytes",
    "A small file could then expand without limit; the safetensors library refuses the file.",
    "Write the file again with the safetensors library.",
    since="0.1.0",
)
DATA_HOLE = Rule(
    "V051",
    ERROR,
    "bytes between two tensors belong to no tensor",
    "Such a gap can hide data; the safetensors library refuses the file.",
    "Write the file again with the safetensors library.",
    since="0.1.0",
)
DATA_CUT_OFF = Rule(
    "V052",
    ERROR,
    "a file ends before its last tensor",
    "A download or copy was cut off, so values are missing.",
    "Copy or download the file again.",
    since="0.1.0",
)
DATA_TRAILING = Rule(
    "V053",
    ERROR,
    "bytes after the last tensor belong to no tensor",
    "Such bytes can hide data; the safetensors library refuses the file.",
    "Write the file again with the safetensors library.",
    since="0.1.0",
)
TENSOR_NAME_ABSURD = Rule(
    "V054",
    ERROR,
    "a tensor's name is too long or has too many parts",
    "Names are compared part by part, so such a name can exhaust a reader; real names have "
    "about a dozen parts.",
    "Save the tensors under the names of their modules.",
    since="0.1.0",
)

# --- V1: config ----------------------------------------------------------------------------------

NOT_VERA = Rule(
    "V101",
    ERROR,
    "the config is not a VeRA adapter's",
    'PEFT selects the method by peft_type, and VeRA\'s is exactly "VERA".',
    "Pass the folder of an adapter that was trained with PEFT's VeraConfig. To check a tree of "
    "mixed adapters, run `vera-convert validate --recursive FOLDER`.",
    since="0.1.0",
)
CONFIG_NOT_OBJECT = Rule(
    "V102",
    ERROR,
    "adapter_config.json is not a JSON object",
    "Every loader expects an object with one entry for each field.",
    "Restore the file that PEFT wrote.",
    since="0.1.0",
)
FIELD_TYPE = Rule(
    "V103",
    ERROR,
    "a config field has the wrong type",
    "PEFT fails, or reads the value with another meaning.",
    "Correct the value, or restore the file that PEFT wrote.",
    since="0.1.0",
)
FIELD_RANGE = Rule(
    "V104",
    ERROR,
    "a config field is out of range",
    "PEFT fails, or computes results that nobody trained.",
    "Correct the value, or restore the file that PEFT wrote.",
    since="0.1.0",
)
KEY_INVALID = Rule(
    "V105",
    ERROR,
    "projection_prng_key is not a valid seed",
    "PEFT generates A and B from this seed; PyTorch accepts whole numbers from -2^63 to 2^64-1.",
    "Set projection_prng_key to the whole number that was used in training.",
    since="0.1.0",
)
FIELD_VALUE = Rule(
    "V106",
    ERROR,
    "a config field has an unknown value",
    "PEFT refuses to load the adapter.",
    "Use one of the listed values, or restore the file that PEFT wrote.",
    since="0.1.0",
)
LAYERS_PATTERN_ALONE = Rule(
    "V107",
    ERROR,
    "layers_pattern is set without layers_to_transform",
    "PEFT 0.14 and later refuse to load such a config.",
    "Remove layers_pattern, or set layers_to_transform.",
    since="0.1.0",
)
UNKNOWN_FIELD = Rule(
    "V110",
    WARNING,
    "the config has an unknown field",
    "PEFT 0.14 and later ignore the field with a warning; PEFT 0.13 and earlier refuse the "
    "adapter.",
    "For PEFT 0.13 and earlier, remove the field with `vera-convert migrate --to asis "
    "--peft-version 0.13`.",
    since="0.1.0",
)
FIELD_BY_VERSION = Rule(
    "V111",
    WARNING,
    "some releases of PEFT do not read a config field",
    "These releases refuse the adapter, or read the field with another meaning.",
    "Load the adapter with a release that reads the field, or write the field in the older form.",
    since="0.1.0",
)

BASE_IS_PATH = Rule(
    "V120",
    WARNING,
    "the config names the base by a local path",
    "Other users do not have this path, and the Hub refuses a model card that contains a path.",
    "Set base_model_name_or_path to the base's name on the Hub.",
    since="0.1.0",
)
BASE_UNNAMED = Rule(
    "V121",
    WARNING,
    "the config does not name the base",
    "Users must guess which model the adapter was trained on.",
    "Set base_model_name_or_path to the base's name on the Hub.",
    since="0.1.0",
)
REVISION_MISSING = Rule(
    "V122",
    NOTE,
    "the config names no revision of the base",
    "If the repository changes, the adapter is loaded on other weights than in training.",
    "Set revision to the commit that was used in training.",
    since="0.1.0",
)

REVISION_INVALID = Rule(
    "V123",
    WARNING,
    "the config's revision of the base is not a valid git revision",
    "No loader can find this revision, and a path such as ../../x can lead out of a cache.",
    "Set revision to the commit that was used in training, or to null.",
    since="0.2.0",
)

TARGET_REGEX_INVALID = Rule(
    "V130",
    ERROR,
    "a pattern in the config is not a valid regular expression",
    "PEFT compiles the pattern with Python's `re` and fails, so the adapted layers are unknown.",
    "Correct the pattern, or list the module names in target_modules.",
    since="0.1.0",
)
TARGET_REGEX_SLOW = Rule(
    "V131",
    ERROR,
    "a pattern in the config takes too long to evaluate",
    "PEFT matches the pattern with every module name and would hang too.",
    "Rewrite the pattern without nested repetition, or list the module names in target_modules.",
    since="0.1.0",
)
TARGETS_MATCH_NOTHING = Rule(
    "V132",
    ERROR,
    "target_modules matches no layer of the base",
    "PEFT refuses to load the adapter, and the size of A and B is unknown.",
    "Check that --base is the model that was used in training, and that target_modules names "
    "its modules.",
    since="0.1.0",
)
TARGETS_UNKNOWN = Rule(
    "V133",
    ERROR,
    "target_modules is null and PEFT has no default for the base",
    "The adapted layers are unknown.",
    "List the module names in target_modules.",
    since="0.1.0",
)
TARGETS_BY_VERSION = Rule(
    "V134",
    WARNING,
    "releases of PEFT adapt different layers",
    "A release that adapts fewer layers loses the others silently.",
    "Load the adapter with a release that adapts all of its layers, or list the full module "
    "names in target_modules.",
    since="0.1.0",
)

# --- V2: tensors ---------------------------------------------------------------------------------

NO_LAMBDAS = Rule(
    "V201",
    ERROR,
    "the file adapts no layer",
    "The file has no vera_lambda_b and vera_lambda_d, so the adapter changes nothing.",
    "Save the adapter again. With FSDP or ZeRO-3, gather the state first.",
    since="0.1.0",
)
LAMBDA_UNPAIRED = Rule(
    "V202",
    ERROR,
    "a layer has only one of its two vectors",
    "PEFT loads the file silently and leaves the missing vector at its initial value.",
    "Save the adapter again.",
    since="0.1.0",
)
LAMBDA_SHAPE = Rule(
    "V203",
    ERROR,
    "a lambda is not a vector",
    "lambda_d must hold r values, and lambda_b one value for each output.",
    "Save the adapter again.",
    since="0.1.0",
)
LAMBDA_D_LENGTH = Rule(
    "V204",
    ERROR,
    "lambda_d does not have r values",
    "PEFT refuses the file, because the config's rank and the tensors' rank differ.",
    "If all layers have the same other rank, set r to this rank. Otherwise save the adapter again.",
    since="0.1.0",
)
EMPTY_TENSOR = Rule(
    "V205",
    ERROR,
    "a tensor is empty",
    "ZeRO-3 and FSDP save empty tensors unless the state is gathered; the trained values are lost.",
    "Save the adapter again with the state gathered (stage3_gather_16bit_weights_on_model_save "
    "or FULL_STATE_DICT).",
    since="0.1.0",
)
TENSOR_DTYPE = Rule(
    "V206",
    ERROR,
    "a trained tensor does not hold floats",
    "VeRA tensors are float64, float32, float16 or bfloat16; PEFT would cast other types or fail.",
    "Convert the tensor to float32 and save the file again.",
    since="0.1.0",
)
MIXED_DTYPES = Rule(
    "V207",
    WARNING,
    "vectors and projections have different dtypes",
    "PEFT saves all tensors in one dtype, so another program wrote or edited the file.",
    "No action is needed: each tensor is read in its own dtype.",
    since="0.1.0",
)
ONE_PROJECTION = Rule(
    "V208",
    ERROR,
    "the file stores only one of vera_A and vera_B",
    "Without A, PEFT refuses the file. Without B, PEFT silently regenerates B from the key.",
    "Remove the remaining matrix and set save_projection to false, or save the adapter again.",
    since="0.1.0",
)
PROJECTION_SHAPE = Rule(
    "V209",
    ERROR,
    "vera_A or vera_B has a wrong shape",
    "A must be (r, largest input), and B (largest output, r).",
    "Save the adapter again.",
    since="0.1.0",
)
PROJECTION_TOO_SHORT = Rule(
    "V210",
    ERROR,
    "vera_B has fewer rows than a layer has outputs",
    "A layer uses one row of B for each of its outputs.",
    "Save the adapter again.",
    since="0.1.0",
)
PROJECTIONS_MISSING = Rule(
    "V211",
    ERROR,
    "save_projection is true, but the file holds no projections",
    "PEFT refuses a file without vera_A if save_projection is true.",
    "If A and B were dropped on purpose, set save_projection to false and run `vera-convert "
    "embed`. Otherwise save the adapter again.",
    since="0.1.0",
)
PROJECTIONS_UNANNOUNCED = Rule(
    "V212",
    WARNING,
    "save_projection is false, but the file holds projections",
    "PEFT ignores the stored A and B and regenerates both from the key.",
    "Run `vera-convert migrate --to embedded` to keep the stored matrices, or `vera-convert "
    "migrate --to stripped`.",
    since="0.1.0",
)
PROJECTIONS_REPEATED = Rule(
    "V213",
    WARNING,
    "a layer stores copies of the shared projections",
    "The copies are equal to the shared matrices and only make the file larger.",
    "Store the matrices once with `vera-convert migrate --to asis`.",
    since="0.1.0",
)
PROJECTIONS_DIFFER = Rule(
    "V214",
    ERROR,
    "a layer stores projections that differ from the shared ones",
    "All layers of VeRA share A and B, so no loader would use the layer's own matrices.",
    "Save the adapter again.",
    since="0.1.0",
)
WRAPPER_IN_NAMES = Rule(
    "V215",
    ERROR,
    "tensor names contain the name of a wrapper",
    "PEFT does not find its names in the file and loads an adapter that changes nothing.",
    "Correct the names with `vera-convert migrate --to asis`.",
    since="0.1.0",
)
ADAPTER_NAME_LEFT = Rule(
    "V216",
    ERROR,
    "tensor names contain the adapter's name",
    "PEFT 0.20 and earlier refuse the file, or load an adapter that changes nothing.",
    "Correct the names with `vera-convert migrate --to asis`.",
    since="0.1.0",
)
PREFIX_MISSING = Rule(
    "V217",
    ERROR,
    "tensor names lack PEFT's prefix",
    "PEFT loads an adapter that changes nothing, without an error.",
    "Correct the names with `vera-convert migrate --to asis`.",
    since="0.1.0",
)
LAMBDA_COLUMN = Rule(
    "V218",
    ERROR,
    "a lambda is stored as a column of shape (n, 1)",
    "PEFT 0.15 and earlier write this shape after a merge on a 16-bit model; PEFT cannot load "
    "the file.",
    "Correct the shape with `vera-convert migrate --to asis`.",
    since="0.1.0",
)
OTHER_VERA = Rule(
    "V219",
    ERROR,
    "the tensors belong to another variant of VeRA",
    "The vectors have another meaning, so merging them as plain VeRA would be wrong.",
    "Use the program that trained the adapter.",
    since="0.1.0",
)
UNKNOWN_TENSOR = Rule(
    "V220",
    ERROR,
    "a tensor has an unknown name",
    "PEFT silently ignores such a tensor, so its trained values would be lost.",
    "Remove the tensor, or save the adapter again.",
    since="0.1.0",
)
UNDECLARED_TENSOR = Rule(
    "V221",
    ERROR,
    "the file stores a base weight that the config does not declare",
    "PEFT silently overwrites the base's weight with the stored one.",
    "If the weight was trained, add its module to modules_to_save (for a bias, set bias). "
    "Otherwise remove the tensor.",
    since="0.1.0",
)
MODULE_TO_SAVE_MISSING = Rule(
    "V222",
    ERROR,
    "a module of modules_to_save has no tensors in the file",
    "PEFT 0.14 and earlier keep a randomly initialized module; later releases fail with a "
    "KeyError. An encoder-decoder's head, classification_head, is not among the heads that PEFT "
    "saves by itself; there the finding is a warning.",
    "Save the adapter again, or remove the module from modules_to_save.",
    since="0.1.0",
)
BIAS_NOT_STORED = Rule(
    "V223",
    WARNING,
    "the config trains biases, but the file holds none",
    "PEFT 0.20 and earlier do not save trained biases, so the biases are lost. If PEFT 0.21 or "
    "later wrote the file, and no base shows whether the model has biases, the finding is a "
    "note.",
    "If the model has no biases, no action is needed. Otherwise train again with PEFT 0.21 or "
    "later.",
    since="0.1.0",
)
NAME_TAKEN_TWICE = Rule(
    "V224",
    ERROR,
    "two tensors have the same corrected name",
    "After the names are corrected, only one of the tensors can be kept.",
    "Remove the outdated tensor, or save the adapter again.",
    since="0.1.0",
)

PROJECTIONS_PER_LAYER = Rule(
    "V225",
    ERROR,
    "only the layers store projections",
    "PEFT reads base_model.vera_A; without this tensor PEFT refuses the file or regenerates A "
    "and B.",
    "If all copies are equal, store the matrices once with `vera-convert migrate --to asis`.",
    since="0.1.0",
)
LAYERS_UNEVEN = Rule(
    "V226",
    NOTE,
    "a target is adapted in fewer layers than another target",
    "Some hybrid models are built so. Otherwise the file lacks layers, or the name matches only"
    " some layers.",
    "To see whether layers are missing, run `vera-convert validate ADAPTER --base MODEL`.",
    since="0.1.0",
)
SEVERAL_ADAPTERS = Rule(
    "V227",
    ERROR,
    "the file holds tensors of several adapters",
    "The tensor names end with the names of different adapters.",
    "Keep the tensors of one adapter, or save this adapter again.",
    since="0.1.0",
)
PREFIX_MIXED = Rule(
    "V228",
    ERROR,
    "tensor names have different beginnings",
    "PEFT loads only names with its prefix, and the tensors may belong to different adapters.",
    "Save the adapter again.",
    since="0.1.0",
)
TARGET_NOT_STORED = Rule(
    "V229",
    WARNING,
    "a target in the config has no vectors in the file",
    "If the base has such layers, PEFT adapts them with initial vectors, which change nothing.",
    "Remove the name from target_modules. If these layers were trained, save the adapter again.",
    since="0.1.0",
)
EMBEDDING_UNDECLARED = Rule(
    "V231",
    NOTE,
    "the file replaces an embedding or a head that the config does not name",
    "PEFT saves these weights after a vocabulary resize and overwrites the base's weights on "
    "loading.",
    "If the vocabulary was resized, no action is needed. Otherwise remove the tensor.",
    since="0.1.0",
)
TOKEN_ROWS = Rule(
    "V232",
    ERROR,
    "the file stores trained token rows",
    "VeRA in PEFT has no trainable_token_indices, and PEFT silently ignores such rows on loading, "
    "so the trained rows would be lost.",
    "Write the rows into the base's embedding, at the numbers in trainable_token_indices, and "
    "save this base. Then remove the tensor and the field from the adapter.",
    since="0.2.0",
)

# --- V3: values ----------------------------------------------------------------------------------

VALUE_NOT_FINITE = Rule(
    "V301",
    ERROR,
    "a trained value is infinite or NaN",
    "One such value spreads over a whole row or column of a weight.",
    "Training diverged before this save: use an earlier checkpoint of the run.",
    since="0.1.0",
)
PRODUCT_OVERFLOWS = Rule(
    "V302",
    WARNING,
    "the adapter's delta can overflow float16",
    "In float16, values above 65,504 become infinite, and the model's output becomes NaN.",
    "Load the base and the adapter in bfloat16 or float32.",
    since="0.1.0",
)
UNTRAINED = Rule(
    "V303",
    WARNING,
    "the adapter changes nothing",
    "Every lambda_b or every lambda_d is zero. lambda_b is initialized to zero, so the adapter "
    "looks untrained.",
    "Check that this is the trained adapter.",
    since="0.1.0",
)
PROJECTION_CONSTANT = Rule(
    "V304",
    ERROR,
    "vera_A or vera_B holds a single repeated value",
    "VeRA needs random matrices, so the save went wrong.",
    "Save the adapter again.",
    since="0.1.0",
)
VALUE_ABSURD = Rule(
    "V305",
    WARNING,
    "a tensor's values are implausibly large or small",
    "Training does not give such values: the tensor is damaged, or was decoded with a wrong dtype.",
    "Compare the adapter's outputs with those of the training run, or save the adapter again.",
    since="0.1.0",
)
LAYERS_UNTRAINED = Rule(
    "V306",
    NOTE,
    "a vector is zero in some layers",
    "These layers change nothing; lambda_b starts at zero and was not trained there.",
    "If these layers were meant to stay unchanged, no action is needed.",
    since="0.1.0",
)

# --- V4: projections -----------------------------------------------------------------------------

NOT_A_DRAW = Rule(
    "V401",
    ERROR,
    "the stored projections cannot be regenerated",
    "No draw of PyTorch's CPU generator gives these matrices, so only the file can restore them.",
    "Keep A and B in the file.",
    since="0.1.0",
)
OTHER_KEY = Rule(
    "V402",
    ERROR,
    "the stored projections come from another key than the config's",
    "A loader that regenerates A and B from the config's key gets different matrices.",
    "If projection_prng_key was edited, correct it in adapter_config.json. Otherwise keep A and"
    " B in the file.",
    since="0.1.0",
)
OTHER_DRAW = Rule(
    "V403",
    ERROR,
    "PEFT would regenerate different projections",
    "Without the stored matrices, PEFT would load the adapter with the difference shown.",
    "If the base is loaded in another dtype than its files have, pass this dtype with "
    "--base-dtype. Otherwise keep A and B, or strip with --accept-change: `vera-convert embed` "
    "restores both exactly from the fingerprint.",
    since="0.1.0",
)
ROUNDING_UNPROVEN = Rule(
    "V404",
    WARNING,
    "the base is unknown, so the regenerated projections are not proven",
    "PEFT rounds A and B to the base's dtype, and takes the width of A from the base.",
    "Pass the base with --base, or its dtype with --base-dtype.",
    since="0.1.0",
)
UNPROVEN_ROWS = Rule(
    "V405",
    ERROR,
    "vera_B has more rows than the longest lambda_b",
    "PEFT makes B as tall as the widest layer that the config matches, and the height of B "
    "shifts the values. Without the base, the height cannot be checked.",
    "Pass the base with --base.",
    since="0.1.0",
)
PROJECTIONS_CONTRADICT = Rule(
    "V406",
    ERROR,
    "the stored projections and the config disagree",
    "save_projection is false, so PEFT ignores the stored A and B and regenerates both.",
    "Choose the matrices: --projections file for the stored ones, --projections key for the "
    "regenerated ones.",
    since="0.1.0",
)
FINGERPRINT_MALFORMED = Rule(
    "V407",
    ERROR,
    "the fingerprint cannot be read",
    "Only the fingerprint proves which matrices were dropped.",
    "Strip the adapter again from its embedded form, or remove the metadata entry.",
    since="0.1.0",
)
FINGERPRINT_DISAGREES = Rule(
    "V408",
    ERROR,
    "the fingerprint contradicts the adapter or the base",
    "The adapter's config, its metadata or the base changed after the adapter was stripped.",
    "Restore the edited file, pass the right --base, or strip the adapter again from its "
    "embedded form.",
    since="0.1.0",
)
FINGERPRINT_NOT_MET = Rule(
    "V409",
    ERROR,
    "the regenerated matrices do not match the fingerprint",
    "The fingerprint or the config was edited, so the matrices of the training cannot be restored.",
    "Restore the edited file, or strip the adapter again from its embedded form.",
    since="0.1.0",
)
UNPROVEN_DRAW = Rule(
    "V410",
    WARNING,
    "nothing proves which projections the adapter was trained with",
    "The adapter stores neither A and B nor a fingerprint. If PEFT wrote the adapter, the "
    "finding is a note, because PEFT regenerates the same A and B on loading.",
    "Compare the adapter's outputs with those of the training run. If these agree, publish the "
    "output of `vera-convert embed`, or of `vera-convert strip` on the embedded adapter; this "
    "output has a fingerprint.",
    since="0.1.0",
)
TARGETS_DISAGREE = Rule(
    "V411",
    WARNING,
    "the config and the file adapt different layers of the base",
    "PEFT sizes A and B by the layers that the config matches in the model. If the other layers"
    " do not change these sizes, the finding is a note.",
    "If the model class does not build the other layers, no action is needed. Otherwise check "
    "the base, target_modules, and that the file is complete.",
    since="0.1.0",
)
PROJECTIONS_TOO_NARROW = Rule(
    "V412",
    ERROR,
    "a layer of the adapter is larger than the projections",
    "A must have a column for each input, and B a row for each output, of every adapted layer.",
    "Check the given dimensions or base, and target_modules in adapter_config.json.",
    since="0.1.0",
)
PROJECTIONS_TOO_LARGE = Rule(
    "V413",
    ERROR,
    "the projections are too large",
    "vera-convert refuses matrices of this size before it allocates memory.",
    "Check r, the given dimensions and the file.",
    since="0.1.0",
)
PROJECTIONS_IGNORED = Rule(
    "V414",
    WARNING,
    "PEFT 0.11 to 0.20 ignore the stored projections and use different ones",
    "Only PEFT 0.21 and later read A and B from the file.",
    "Load the adapter with PEFT 0.21 or later.",
    since="0.1.0",
)
ROUNDING_UNCLEAR = Rule(
    "V415",
    WARNING,
    "the base's dtype is unclear, so the rounding of the projections is too",
    "PEFT casts A and B to the dtype of each adapted layer in turn. The headers do not show "
    "this dtype for quantized layers, nor the order of layers with different dtypes.",
    "Pass the dtype in which the base is loaded with --base-dtype.",
    since="0.1.0",
)
OTHER_DIMS = Rule(
    "V416",
    WARNING,
    "the stored projections do not have the size that PEFT requires",
    "PEFT 0.21 refuses to load the file; PEFT 0.20 and earlier regenerate A and B silently.",
    "If the matrices are larger, cut them with `vera-convert migrate --to asis --base MODEL`. "
    "If they are smaller, pass the base that was used in training.",
    since="0.1.0",
)
PROJECTION_TYPES_DIFFER = Rule(
    "V417",
    ERROR,
    "vera_A and vera_B have different dtypes",
    "A fingerprint records one dtype, so the stored bytes could not be restored.",
    "Keep A and B in the file, or save both in one dtype.",
    since="0.1.0",
)
PROJECTIONS_ROUNDED = Rule(
    "V418",
    NOTE,
    "the stored projections are rounded to 16 bits",
    "PEFT rounds A and B on a 16-bit base; on a float32 base, PEFT 0.11 to 0.20 use unrounded "
    "matrices.",
    "Load the base in the dtype that was used in training, or use PEFT 0.21 or later.",
    since="0.1.0",
)
REDRAWN_OTHERWISE = Rule(
    "V419",
    WARNING,
    "PEFT would regenerate other projections than the dropped ones",
    "The fingerprint records the dropped matrices, but PEFT does not read the fingerprint.",
    "Restore A and B with `vera-convert embed`, and load the result with PEFT 0.21 or later.",
    since="0.1.0",
)
PROJECTIONS_DAMAGED = Rule(
    "V420",
    ERROR,
    "some values of the stored projections are damaged",
    "All other values match a known draw, so a copy, a disk or a program changed these values.",
    "Copy the adapter again. If no other copy exists, `vera-convert migrate --to embedded "
    "--projections key --base MODEL` regenerates A and B from the key.",
    since="0.1.0",
)

DIMS_AMBIGUOUS = Rule(
    "V421",
    ERROR,
    "the size of A and B depends on layers that the file lacks",
    "With other sizes, every column of A and B has other values, so the result would be wrong.",
    "Copy the file again. If these layers were never adapted, change target_modules or "
    "layers_to_transform to match only the layers in the file.",
    since="0.2.0",
)

# --- V5: base ------------------------------------------------------------------------------------

BASE_WITHOUT_WEIGHTS = Rule(
    "V501",
    ERROR,
    "the base holds no safetensors weights",
    "vera-convert reads names, shapes and values only from safetensors files.",
    "Pass the folder or repository of a model with *.safetensors weights.",
    since="0.1.0",
)
BASE_PICKLED = Rule(
    "V502",
    ERROR,
    "the base's weights exist only as a pickle",
    "Opening a pickle can run any code that its author chose, so vera-convert opens none.",
    "Load the model on a safe machine and save it with safe_serialization=True, or pass a copy "
    "with safetensors weights.",
    since="0.1.0",
)
BASE_OTHER_FORMAT = Rule(
    "V503",
    ERROR,
    "the base's weights are in an unsupported format",
    "GGUF, ONNX, TensorFlow and Flax files have other tensor names and often other values.",
    "Pass the original model with *.safetensors weights.",
    since="0.1.0",
)
BASE_IS_ADAPTER = Rule(
    "V504",
    ERROR,
    "the base is an adapter, not a model",
    "An adapter holds only changes to a model.",
    "Pass the model that the adapter was trained on; its config names this model.",
    since="0.1.0",
)
BASE_AMBIGUOUS = Rule(
    "V505",
    ERROR,
    "the base's weight files are ambiguous",
    "The folder holds several weight files without an index, or several components that fit.",
    "Pass the folder of one component of a pipeline, or restore the index of a sharded model.",
    since="0.1.0",
)
INDEX_MALFORMED = Rule(
    "V506",
    ERROR,
    "the index of the shards is invalid",
    "weight_map must name the file of each tensor.",
    "Download the index again, or save the model again.",
    since="0.1.0",
)
SHARD_MISSING = Rule(
    "V507",
    ERROR,
    "a shard that the index names is missing",
    "A loader would stop, or fill the missing tensors with random values.",
    "Download the missing file, or the whole model.",
    since="0.1.0",
)
TENSOR_NOT_IN_SHARD = Rule(
    "V508",
    ERROR,
    "no shard holds a tensor of the index",
    "A loader would fill the tensor with random values.",
    "The index and the shards come from different saves: download both again.",
    since="0.1.0",
)
TENSOR_MISPLACED = Rule(
    "V509",
    ERROR,
    "a tensor is in another shard than the index says",
    "A loader that follows the index does not find the tensor.",
    "The index and the shards come from different saves: download both again.",
    since="0.1.0",
)
TENSOR_NOT_IN_INDEX = Rule(
    "V510",
    ERROR,
    "a shard holds a tensor that the index does not name",
    "Some loaders load the tensor, and others do not.",
    "The index and the shards come from different saves: download both again.",
    since="0.1.0",
)
TENSOR_IN_TWO_SHARDS = Rule(
    "V511",
    ERROR,
    "two shards hold the same tensor",
    "The tensor that a loader takes depends on the order of reading.",
    "The index and the shards come from different saves: download both again.",
    since="0.1.0",
)
STRAY_WEIGHTS = Rule(
    "V512",
    WARNING,
    "the base's folder holds an extra safetensors file",
    "The index does not name the file, so the file is not read. Other loaders could load it as "
    "the model.",
    "Remove the file if it is a leftover.",
    since="0.1.0",
)
MODEL_CONFIG_FORM = Rule(
    "V513",
    ERROR,
    "the base's config.json is not a JSON object",
    "Every loader expects an object with one entry for each field.",
    "Download the file again.",
    since="0.1.0",
)
BASE_FOR_MISTRAL = Rule(
    "V514",
    ERROR,
    "the base has only Mistral's consolidated weights",
    "transformers does not load such files: Mistral's own programs name the tensors otherwise, "
    "and order the rows of the query and key layers otherwise.",
    "Pass a copy of the model with model.safetensors or its index. If the tensors of the file "
    "have transformers' names, rename the file to model.safetensors.",
    since="0.2.0",
)
BASE_ONLY_VARIANT = Rule(
    "V515",
    ERROR,
    "the base has only a variant of its weights",
    'diffusers and transformers load a variant only if asked, as with variant="fp16".',
    "Download the weights without a variant. Or remove the variant (such as .fp16) from the "
    "names of the weight files and of the index, and from the names in the index.",
    since="0.2.0",
)
NAMES_DIFFER = Rule(
    "V520",
    ERROR,
    "the base has no tensor for a layer of the adapter",
    "A merge without these layers would be incomplete, so vera-convert refuses it.",
    "Check that this is the base that was used in training. If only the names differ, pass "
    "--key-map OLD=NEW.",
    since="0.1.0",
)
NAMES_AMBIGUOUS = Rule(
    "V521",
    ERROR,
    "the adapter's layer names match the base in several ways",
    "Each way changes other tensors, and only one was trained.",
    "Choose the names with --key-map OLD=NEW.",
    since="0.1.0",
)
SHAPES_DIFFER = Rule(
    "V522",
    ERROR,
    "a layer of the adapter has another shape than the base's tensor",
    "lambda_b needs one value for each output of the layer, and A a column for each input.",
    "Pass the base that was used in training, of the same size.",
    since="0.1.0",
)
NOT_A_MATRIX = Rule(
    "V523",
    ERROR,
    "a layer of the adapter is not a matrix in the base",
    "VeRA adapts linear layers, which have two-dimensional weights. PEFT refuses to train VeRA "
    "on a layer of another kind.",
    "If the adapter was trained on another model, in which the layer is linear, pass this model. "
    "Otherwise merge with the program that trained the adapter.",
    since="0.1.0",
)
HEAD_TIED = Rule(
    "V524",
    ERROR,
    "the adapter changes an output head that is tied to the embedding",
    "One tensor serves as both, so changing the head would change the embedding too.",
    "Choose `--tied untie` to store a separate head, or `--tied add` to change both.",
    since="0.1.0",
)
REPLACEMENT_CLASH = Rule(
    "V525",
    ERROR,
    "two tensors of the adapter replace the same tensor of the base",
    "Only one of the two can be kept.",
    "Remove the outdated tensor, or save the adapter again.",
    since="0.1.0",
)
HEAD_SHARED = Rule(
    "V526",
    WARNING,
    "the adapter changes an output head that is tied to the embedding",
    "The unmerged adapter works; a merge must know whether to change the embedding too.",
    "For a merge, pass `--tied untie` or `--tied add`.",
    since="0.1.0",
)
ORIENTATION_WRONG = Rule(
    "V527",
    NOTE,
    "fan_in_fan_out does not match the base's layers",
    "PEFT corrects the value for each layer with a warning; the results do not change.",
    "Set fan_in_fan_out to true for Conv1D layers (such as GPT-2's), and to false for all others.",
    since="0.1.0",
)

RESULT_NOT_FINITE = Rule(
    "V530",
    ERROR,
    "a merged value is infinite or NaN",
    "The base's value is not finite, or the sum does not fit the tensor's dtype.",
    "Check the tensor in the base. If the sum is too large for float16, pass --dtype bfloat16.",
    since="0.1.0",
)
REPLACEMENT_SHAPE = Rule(
    "V531",
    ERROR,
    "a replacement tensor has another shape than the base's tensor",
    "A vocabulary or head of another size does not fit the model.",
    "For an embedding or output head, resize the base's vocabulary as the training did "
    "(resize_token_embeddings of transformers), save the base and pass it. For a classifier, pass "
    "--architecture CLASS, the class that was used in training.",
    since="0.1.0",
)
REPLACEMENT_UNKNOWN = Rule(
    "V532",
    ERROR,
    "the base has no tensor of the name that the adapter replaces",
    "No loader would read this name, so the trained values would be lost.",
    "Check that this is the base that was used in training.",
    since="0.1.0",
)
REPLACEMENT_NEW = Rule(
    "V533",
    WARNING,
    "the adapter adds a head that the base does not have",
    "If task_type and auto_mapping do not name a class with this head, config.json still names "
    "the base's class, which ignores the head.",
    "Merge with --architecture CLASS, the class that was used in training.",
    since="0.1.0",
)
REPLACEMENTS_DIFFER = Rule(
    "V534",
    ERROR,
    "two adapters change the same tensor in incompatible ways",
    "One adapter replaces the tensor, so the other's delta or weight has no meaning.",
    "Merge only one of the two adapters.",
    since="0.1.0",
)
BASE_COPY_DIFFERS = Rule(
    "V535",
    ERROR,
    "the adapter stores a copy of a base weight that differs from the base",
    "PEFT would load the stored weight before it adds the delta.",
    "Pass the base that was used in training.",
    since="0.1.0",
)
EMBEDDING_SHARED = Rule(
    "V536",
    WARNING,
    "the adapter replaces an embedding that is tied to the output head",
    "PEFT trained a copy of the embedding and kept the head; a loader of the merged model uses "
    "the new values for both.",
    "Compare the outputs of the merged model with those of the adapter.",
    since="0.1.0",
)
DELTA_LOST = Rule(
    "V537",
    WARNING,
    "rounding to the base's dtype loses most of the delta",
    "Most changes are smaller than half of the last bit of the weight.",
    "Merge with --dtype float32, or serve the adapter without merging.",
    since="0.1.0",
)
WEIGHTS_LEFT_OUT = Rule(
    "V539",
    WARNING,
    "other weight files of the base are left out of the merged model",
    "These files hold the base's weights without the adapter, and a loader could load them "
    "instead.",
    "If a program needs another format, convert the merged model to this format.",
    since="0.1.0",
)
ADAPTER_IN_BASE = Rule(
    "V540",
    WARNING,
    "an adapter in the base's folder is left out of the merged model",
    "A loader would add this adapter to the merged weights, or load the model that the adapter "
    "names.",
    "To make the adapter part of the model, merge it with --add.",
    since="0.1.0",
)
TOKENIZER_TOO_LARGE = Rule(
    "V541",
    ERROR,
    "the adapter's tokenizer has more tokens than the model has rows",
    "Such a token stops the model, or reads past the end of the embedding.",
    "Pass the base with the resized embedding, or the adapter that stores the embedding.",
    since="0.1.0",
)

LAYER_CUT_OUT = Rule(
    "V542",
    ERROR,
    "a layer of the adapter is part of a larger tensor in the base",
    "transformers splits this tensor into several layers on loading. vera-convert cannot merge "
    "into such a part yet.",
    "Merge with PEFT, in the release of transformers that was used in training.",
    since="0.1.0",
)
LAYER_REORDERED = Rule(
    "V543",
    ERROR,
    "the base stores the rows of a layer in another order",
    "transformers reorders the rows on loading, for rotary embeddings. vera-convert cannot "
    "merge in this order yet.",
    "Merge with PEFT, in the release of transformers that was used in training.",
    since="0.1.0",
)
EXPERTS_STACKED = Rule(
    "V544",
    ERROR,
    "a layer of the adapter is one expert of a stacked tensor",
    "The base stacks its experts in a three-dimensional tensor. vera-convert cannot merge into "
    "a single expert yet.",
    "Pass a copy of the base that stores each expert separately.",
    since="0.1.0",
)
LAYER_OF_SEVERAL = Rule(
    "V545",
    ERROR,
    "the base splits a layer of the adapter into several tensors",
    "transformers joins these tensors on loading. vera-convert cannot divide the delta among "
    "them yet.",
    "Merge with PEFT, in the release of transformers that was used in training.",
    since="0.1.0",
)
NAMES_RENAMED = Rule(
    "V546",
    NOTE,
    "the base's files use other names for the adapter's layers",
    "A class or release of transformers with other names in memory silently loads none of these"
    " tensors.",
    "Load the adapter with the class and the release of transformers that were used in training.",
    since="0.1.0",
)

QUANTIZED_TARGET = Rule(
    "V550",
    ERROR,
    "layers of the adapter are quantized in the base",
    "Quantized values are too coarse: rounding would lose most or all of the delta.",
    "Without --dequantize: serve the adapter on the quantized base (more engines load the output "
    "of `vera-convert to-lora`), or merge into the original 16-bit or 32-bit model with --base; "
    "this model differs slightly from the model of the training.",
    since="0.1.0",
)
QUANTIZED_ELSEWHERE = Rule(
    "V551",
    NOTE,
    "other layers of the base are quantized",
    "The merge copies these layers unchanged, and config.json keeps their settings.",
    "No action is needed: every layer that the adapter changes has 16 or 32 bits.",
    since="0.1.0",
)
PART_MISSING = Rule(
    "V552",
    ERROR,
    "a quantized weight of the base lacks a part, such as its scale",
    "The packed values have no meaning without this part.",
    "Download the base again, or merge into the original 16-bit or 32-bit model.",
    since="0.1.0",
)
PART_MALFORMED = Rule(
    "V553",
    ERROR,
    "a part of a quantized weight has an unexpected layout",
    "With a guessed layout, the values would be wrong without an error.",
    "Download the base again, or merge into the original 16-bit or 32-bit model.",
    since="0.1.0",
)
NOT_DEQUANTIZABLE = Rule(
    "V554",
    ERROR,
    "the base has a format that --dequantize does not support",
    "--dequantize converts a whole base to 16 bits, or nothing.",
    "Serve the adapter on the quantized base; `vera-convert to-lora` writes a form that more "
    "engines load, without loss. Or merge into the original 16-bit or 32-bit model with --base,"
    " which differs slightly from the model of the training. Or convert the base to 16 bits "
    "with the quantizer's own tool.",
    since="0.1.0",
)
DEQUANTIZED = Rule(
    "V555",
    NOTE,
    "the quantized weights of the base become 16-bit weights",
    "The merge leaves out their scales and the quantization settings in config.json.",
    "No action is needed. The merged model is two to four times as large as the base.",
    since="0.1.0",
)
TARGET_IS_QUANTIZED = Rule(
    "V556",
    WARNING,
    "the adapter's layers are quantized in this base and cannot be dequantized",
    "PEFT can run the adapter on this base; a merge is impossible.",
    "Serve the adapter on the quantized base; `vera-convert to-lora` writes a form that more "
    "engines load, without loss. Or merge into the original 16-bit or 32-bit model with --base, "
    "which differs slightly from the model of the training. Or convert the base to 16 bits with "
    "the quantizer's own tool.",
    since="0.1.0",
)

BASE_IN_FOLDER = Rule(
    "V557",
    NOTE,
    "the base is a local folder that only the adapter's config names",
    "A folder name does not prove which model is in the folder. The names and shapes of the "
    "layers fit; the values cannot be checked.",
    "To use another model, pass it with --base.",
    since="0.2.0",
)
OTHER_BASE = Rule(
    "V558",
    WARNING,
    "the base is not the model that the adapter's config names",
    "On other weights than in training, an adapter gives wrong outputs.",
    "Pass the named model with --base. If this base is a copy of the named model, no action is "
    "needed.",
    since="0.2.0",
)
BASE_MISDESCRIBED = Rule(
    "V559",
    WARNING,
    "the base's config.json does not match its weights",
    "The adapter fits the weights, but a loader builds the model that config.json describes and"
    " loads only some of the weights.",
    "Copy the config.json that belongs to these weights into the base.",
    since="0.2.0",
)
MODEL_TYPE_UNKNOWN = Rule(
    "V560",
    ERROR,
    "the model type is unknown",
    "A config holds sizes, not layers; vera-convert knows the layers of a few model types only.",
    "Pass the base itself with --base: vera-convert reads only the headers of its tensors.",
    since="0.1.0",
)
MODEL_FIELD_INVALID = Rule(
    "V561",
    ERROR,
    "a field of the model's config is missing or invalid",
    "The layer shapes depend on this field.",
    "Restore the config.json that belongs to the model.",
    since="0.1.0",
)
PART_VALUES = Rule(
    "V562",
    ERROR,
    "a part of a quantized weight holds impossible values",
    "With these values, weights would become infinite, NaN, or mixed up between groups.",
    "Download the base again, or merge into the original 16-bit or 32-bit model.",
    since="0.2.0",
)
CAN_DEQUANTIZE = Rule(
    "V563",
    NOTE,
    "the adapter's layers are quantized in this base and can be dequantized",
    "A merge adds the delta to the dequantized weights and writes a 16-bit model.",
    "Merge with `vera-convert merge --dequantize`.",
    since="0.2.0",
)
OPTION_WITHOUT_EFFECT = Rule(
    "V564",
    WARNING,
    "an option has no effect",
    "The result is the same as without the option, so the option may be mistyped or misplaced.",
    "Correct the value of the option, or leave the option out.",
    since="0.2.0",
)

HEAD_CLASS_WRITTEN = Rule(
    "V570",
    NOTE,
    "the merged model's config.json follows the adapter",
    "A loader uses the class, labels and vocabulary size of config.json, and the base's values "
    "do not fit the adapter.",
    "No action is needed. To choose labels or another class, pass --labels or --architecture.",
    since="0.2.0",
)
HEAD_MODULE_MISSING = Rule(
    "V571",
    WARNING,
    "the merged model's class needs a module that is not stored",
    "A loader fills the module with random values, as on loading the adapter.",
    "Train with the module in modules_to_save, or merge into a base that stores the module.",
    since="0.2.0",
)
HEAD_WITHOUT_PADDING = Rule(
    "V572",
    NOTE,
    "the config of a sequence classifier has no padding token",
    "Without pad_token_id, transformers cannot classify several texts at once.",
    "Put the tokenizer of the training into the adapter's folder, or set pad_token_id in "
    "config.json.",
    since="0.2.0",
)
TRAINED_NOT_MERGED = Rule(
    "V573",
    WARNING,
    "other weights in the adapter's folder are not merged",
    "PEFT does not read this file. If the file was trained, the merged model lacks its changes.",
    "Merge the file with the program that wrote it, or copy the file into the merged model.",
    since="0.2.0",
)
REPLACED_BY_CONSTANT = Rule(
    "V574",
    WARNING,
    "the adapter replaces a tensor with a single repeated value",
    "A head, embedding or bias with equal values was set to zero or a constant, not trained.",
    "Check the source of the adapter. To keep the base's tensor, remove the tensor from the "
    "adapter.",
    since="0.2.0",
)
FILE_NOT_FETCHED = Rule(
    "V575",
    WARNING,
    "a file of the adapter was not downloaded",
    "vera-convert downloads extra files of up to 10 MB, and a tokenizer of up to 100 MB. "
    "Without this file, the merged model is incomplete.",
    "Download the whole adapter with `hf download`, and merge from the local folder.",
    since="0.2.0",
)

MERGED_WEIGHT_WRONG = Rule(
    "V601",
    ERROR,
    "a merged weight is not the base's weight plus the delta",
    "The model's outputs differ from those of the base with the adapter.",
    "Merge again, with this adapter and this base.",
    since="0.1.0",
)
MERGED_TENSOR_CHANGED = Rule(
    "V602",
    ERROR,
    "a tensor that must be copied unchanged differs",
    "A merge copies every other tensor from the base, or from the adapter that replaces it.",
    "Merge again. If the base was changed on purpose, pass the changed base with --base.",
    since="0.1.0",
)
MERGED_TENSOR_MISSING = Rule(
    "V603",
    ERROR,
    "the merged model lacks a tensor",
    "A loader would fill the tensor with random values.",
    "Merge again, or save the model with all of its tensors.",
    since="0.1.0",
)
MERGED_TENSOR_UNKNOWN = Rule(
    "V604",
    ERROR,
    "the merged model has an extra tensor",
    "A loader that knows this name loads the tensor, and its correct value is unknown.",
    "Merge again into an empty folder.",
    since="0.1.0",
)
MERGED_TENSOR_FORM = Rule(
    "V605",
    ERROR,
    "a merged tensor has an unexpected dtype or shape",
    "The values were rounded differently than requested, or belong to another tensor.",
    "Pass the dtype of the merge with --dtype, or merge again.",
    since="0.1.0",
)
MERGED_TIE = Rule(
    "V606",
    ERROR,
    "the merged model's config ties head and embedding differently than expected",
    "A loader would share one tensor for both, or load two separate tensors.",
    "Pass the --tied option of the merge, or merge again.",
    since="0.1.0",
)
PROVENANCE_MALFORMED = Rule(
    "V607",
    ERROR,
    "merge-provenance.json cannot be read",
    "vera-convert reads the options of the merge from this file and does not guess them.",
    "Restore the file, or remove the file and pass the options of the merge.",
    since="0.1.0",
)
PROVENANCE_MISSING = Rule(
    "V608",
    WARNING,
    "the merged model has no merge-provenance.json",
    "The options of the merge are unknown, so the default options are assumed.",
    "If the merge used other options, pass them.",
    since="0.1.0",
)
OTHER_ADAPTER_MERGED = Rule(
    "V609",
    WARNING,
    "the adapter differs from the merged adapter",
    "merge-provenance.json records another config or header. Another form of the same adapter "
    "has other bytes too.",
    "If this is the merged adapter, stripped, embedded or migrated, no action is needed.",
    since="0.1.0",
)
OTHER_BASE_MERGED = Rule(
    "V610",
    WARNING,
    "the base differs from the merged base",
    "merge-provenance.json records files with another size or header.",
    "Pass the base of the merge. If this base holds the same weights in other files, no action "
    "is needed.",
    since="0.1.0",
)
MODEL_DIFFERS = Rule(
    "V611",
    ERROR,
    "the merged model gives other outputs than the base with the adapter",
    "The config and tied tensors affect the outputs too, not only the weights.",
    "Merge again, and load the merged model with the class that was used in training.",
    since="0.1.0",
)
LOADED_INSTEAD = Rule(
    "V612",
    ERROR,
    "a loader would load another file than the merged weights",
    "The loaded weights are not the verified ones, and may be the base without the adapter.",
    "Remove the named file, or save the merged model in an empty folder.",
    since="0.1.0",
)
ADAPTER_IN_MERGED = Rule(
    "V613",
    ERROR,
    "the merged model's folder holds an adapter",
    "transformers adds this adapter on loading, so the delta would count twice.",
    "Remove adapter_config.json and the adapter's weights from the folder.",
    since="0.1.0",
)
MERGED_IS_ADAPTER = Rule(
    "V614",
    ERROR,
    "the folder passed as the merged model is an adapter",
    "An adapter holds only changes to a model.",
    "Pass the merged model. To compare two forms of an adapter, pass the other form with "
    "--adapter.",
    since="0.1.0",
)
MERGED_CONFIG_DIFFERS = Rule(
    "V615",
    ERROR,
    "the merged model's config.json describes another model",
    "A merge changes only the dtype, the tie and the quantizer of config.json. With other "
    "fields, the same weights give other outputs.",
    "Copy the base's config.json and set the merged model's dtype, or merge again.",
    since="0.1.0",
)
MERGED_CONFIG_RESAVED = Rule(
    "V616",
    WARNING,
    "fields of the merged model's config.json differ from the base's",
    "transformers adds and removes fields when it saves a model, mostly without an effect.",
    "Check the named fields, or copy the base's config.json.",
    since="0.1.0",
)
MODEL_SHOWS_NOTHING = Rule(
    "V617",
    ERROR,
    "the merged model is the base: the adapter has no measurable effect",
    "A merge that added nothing would pass the same test, so the test proves nothing.",
    "Pass texts that the adapter was trained for with --text, or train the adapter further.",
    since="0.1.0",
)
MODEL_SHOWS_LITTLE = Rule(
    "V618",
    WARNING,
    "the weights are correct, but running the model shows no effect of the adapter",
    "Every weight is the base's plus the delta; the whole-model test is inconclusive.",
    "Pass texts like those of the training with --text, or skip the test with --layers-only.",
    since="0.1.0",
)
MERGED_BUFFER = Rule(
    "V619",
    NOTE,
    "only one of base and merged model stores a buffer",
    "Releases of transformers save different buffers, and none of them reads these on loading.",
    "No action is needed.",
    since="0.1.0",
)
FORM_TENSOR_DIFFERS = Rule(
    "V620",
    ERROR,
    "a trained tensor differs between the two forms of the adapter",
    "A conversion copies vectors, heads and biases byte for byte.",
    "Convert the adapter again.",
    since="0.1.0",
)
FORM_TENSOR_MISSING = Rule(
    "V621",
    ERROR,
    "only one form of the adapter has a trained tensor",
    "A conversion copies every tensor but A and B.",
    "Convert the adapter again.",
    since="0.1.0",
)
FORM_CONFIG_DIFFERS = Rule(
    "V622",
    ERROR,
    "the configs of the two forms differ",
    "The forms would adapt other layers, load another base, or regenerate other matrices.",
    "Convert the adapter again.",
    since="0.1.0",
)
FORM_PROJECTIONS_DIFFER = Rule(
    "V623",
    ERROR,
    "the two forms use different A and B",
    "The delta of every layer differs.",
    "Convert the adapter again. If A and B are regenerated, pass the base with --base.",
    since="0.1.0",
)
FORM_PROJECTIONS_DEPEND = Rule(
    "V624",
    WARNING,
    "the two forms use the same A and B only on some bases",
    "PEFT rounds regenerated matrices to the dtype in which the base is loaded.",
    "Load both forms on a base of a dtype for which they agree, or run `vera-convert embed` on "
    "the stripped form.",
    since="0.1.0",
)
MERGED_TENSOR_WIDER = Rule(
    "V630",
    WARNING,
    "merged tensors have a wider dtype than the base's",
    "The values are correct in this dtype; some models save layers in float32.",
    "No action is needed. To require a dtype, pass --dtype.",
    since="0.1.0",
)
MERGED_OTHER_WEIGHTS = Rule(
    "V631",
    WARNING,
    "the merged model's folder holds weights in another format",
    "vera-convert does not compare these weights, and a loader may load them on request.",
    "Remove the files, unless they were made from the merged model.",
    since="0.1.0",
)

# --- V7: LoRA ------------------------------------------------------------------------------------

LORA_RANK_TOO_HIGH = Rule(
    "V701",
    ERROR,
    "the LoRA's rank is higher than the engine supports",
    "The engine would refuse the adapter on startup.",
    "Pass --rank or --max-error for a LoRA of lower rank, or merge the adapter.",
    since="0.2.0",
)
LORA_HEAD_REFUSED = Rule(
    "V702",
    ERROR,
    "the engine does not load a fully trained module",
    "The engine would refuse the adapter, or use the base's module.",
    "Merge the adapter, or leave the module out with --drop-head.",
    since="0.2.0",
)
LORA_BIAS_REFUSED = Rule(
    "V703",
    ERROR,
    "the engine does not load trained biases",
    "The engine would refuse the adapter, or use the base's biases.",
    "Merge the adapter, or leave the biases out with --drop-head.",
    since="0.2.0",
)
LORA_LAYERS_MISSING = Rule(
    "V704",
    ERROR,
    "the engine needs a LoRA for a layer that the adapter lacks",
    "The engine would fail, or silently skip the adapted layers of this kind.",
    "Add zero LoRA layers with --fill-layers.",
    since="0.2.0",
)
LORA_NAME_UNKNOWN = Rule(
    "V705",
    ERROR,
    "the engine does not know a layer of the adapter",
    "The engine would serve the base without the changes to this layer.",
    "Merge the adapter and serve the merged model.",
    since="0.2.0",
)
LORA_OVERFLOW = Rule(
    "V706",
    ERROR,
    "a value is too large for the LoRA's dtype",
    "The stored value would be infinite, and the layer's output NaN.",
    "Pass --dtype bfloat16, which has a larger range, or --dtype float32.",
    since="0.2.0",
)
LORA_ERROR_LARGE = Rule(
    "V707",
    ERROR,
    "the LoRA's rank is too low: more than half of a layer's delta is lost",
    "The adapter would lose most of its training.",
    "Pass a higher --rank, or no --rank for the exact LoRA. To write it anyway, pass "
    "--accept-error.",
    since="0.2.0",
)
LORA_HEAD_LEFT_OUT = Rule(
    "V708",
    WARNING,
    "the LoRA leaves out trained modules or biases",
    "The base's tensors are used instead, so the outputs differ from the trained model's.",
    "To keep the tensors, run without --drop-head, or merge the adapter.",
    since="0.2.0",
)
LORA_HEAD_ELSEWHERE = Rule(
    "V709",
    WARNING,
    "only PEFT loads this LoRA",
    "Other engines do not support fully trained modules and biases.",
    "For PEFT, no action is needed. To check another engine, pass its name with --for.",
    since="0.2.0",
)
LORA_RANK_SLOW = Rule(
    "V710",
    WARNING,
    "the LoRA's rank is higher than the engine's fast kernels support",
    "The engine serves the adapter, but slowly.",
    "Pass --rank or --max-error for a LoRA of lower rank, or merge the adapter.",
    since="0.2.0",
)
LORA_VANISHED = Rule(
    "V711",
    WARNING,
    "small values of the LoRA become 0 in float16",
    "float16 cannot hold such small values; the stated error includes the loss.",
    "Pass --dtype bfloat16, which has a larger range, or --dtype float32.",
    since="0.2.0",
)

LORA_CONV1D_REFUSED = Rule(
    "V712",
    ERROR,
    "the engine takes no LoRA of Conv1D layers",
    "The engine stores the weights of GPT-2 and similar models transposed.",
    "Use --for peft or --for vllm, or merge the adapter.",
    since="0.2.0",
)
LORA_BASE_UNKNOWN = Rule(
    "V713",
    ERROR,
    "the engine's names for the base's layers are not known",
    "The engine finds layers by names of its own, which depend on the kind of the base.",
    "Give --base a folder of the pipeline or of the model with its config, or merge the adapter.",
    since="0.2.0",
)
LORA_UNREADABLE = Rule(
    "V720",
    ERROR,
    "a folder holds no LoRA that can be compared",
    "The factors of each layer and their scaling must be known to compare their product.",
    "Give the folder of a plain LoRA of PEFT, Diffusers or MLX-LM, with its config.",
    since="0.2.0",
)
LORA_DELTA_DIFFERS = Rule(
    "V721",
    ERROR,
    "the delta of a LoRA's layer is not the adapter's",
    "The layer gives other outputs than the adapter's layer.",
    "Run `vera-convert to-lora` again, with the base and the options that the adapter needs.",
    since="0.2.0",
)
LORA_LAYER_LACKING = Rule(
    "V722",
    ERROR,
    "the LoRA lacks a layer of the adapter",
    "The layer would work as in the base.",
    "Run `vera-convert to-lora` again; name the base with --base if its names differ.",
    since="0.2.0",
)
LORA_LAYER_EXTRA = Rule(
    "V723",
    ERROR,
    "the LoRA changes a layer that the adapter does not have",
    "The layer would give other outputs than the base's layer.",
    "Run `vera-convert to-lora` again; name the base with --base if its names differ.",
    since="0.2.0",
)
LORA_TENSOR_DIFFERS = Rule(
    "V724",
    ERROR,
    "a module or bias that was trained whole is not the adapter's in the LoRA",
    "A conversion copies heads and biases byte for byte.",
    "Run `vera-convert to-lora` again.",
    since="0.2.0",
)

# -------------------------------------------------------------------------------------------------
CATALOG: dict[str, Rule] = {
    rule.code: rule
    for rule in sorted(
        (value for value in list(globals().values()) if isinstance(value, Rule)),
        key=lambda rule: rule.code,
    )
}
"""Every rule by code, in order."""
