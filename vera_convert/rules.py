"""The catalog: every way a checkpoint can be wrong, each with a stable code.

Hundreds name the family: V0 file, V1 config, V2 tensors, V3 values, V4 projections, V5 base,
V6 verification, V7 LoRA.
A code is never used for another meaning. A reader that meets a defect raises `CheckpointError` with
the `Finding`; commands show it as their one-line refusal, in the same words everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from vera_convert.text import printable


class Severity(StrEnum):
    """How bad a finding is."""

    ERROR = "error"
    """The checkpoint would load wrongly, not at all, or lose something."""
    WARNING = "warning"
    """It works, but not everywhere or not as it seems."""
    NOTE = "note"
    """Worth knowing; nothing is wrong."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One kind of defect: what it is called, why it matters and what to do about it.

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
    "A pipe or a device can block for ever, never end, or change what it gives.",
    "Put the file itself in this place.",
    since="0.1.0",
)
LINK_OUTSIDE = Rule(
    "V002",
    ERROR,
    "a link leads out of the folder",
    "A folder from a stranger could have any file of this machine read and copied.",
    "Put a copy of the file in this place; the Hub cache's links into its blobs are followed.",
    since="0.1.0",
)
FILE_TOO_LARGE = Rule(
    "V003",
    ERROR,
    "a file is larger than its kind ever is",
    "Reading it would take memory and time for nothing: no such file is real.",
    "Restore the file that PEFT wrote.",
    since="0.1.0",
)
FILE_EMPTY = Rule(
    "V004",
    ERROR,
    "a file is empty",
    "A save or a copy that ran out of space, or was stopped, leaves such files.",
    "Copy or download it again.",
    since="0.1.0",
)
NAME_UNSAFE = Rule(
    "V005",
    ERROR,
    "a file name could lead out of its folder",
    "Absolute names, '..', backslashes and colons reach other files on one system or another.",
    "Use plain names inside the folder, with '/' between their parts.",
    since="0.1.0",
)
FILE_UNREADABLE = Rule(
    "V006",
    ERROR,
    "a file cannot be read",
    "Its owner or its mode forbids it; whoever is given such a folder fails on it as well.",
    "Give yourself the right to read it: `chmod u+r FILE`.",
    since="0.1.0",
)
LINK_NOT_CARRIED = Rule(
    "V007",
    WARNING,
    "a link leads elsewhere",
    "It is not followed, so what it leads to is lost when the adapter is converted or published.",
    "Put a copy of the file in this place, or remove the link.",
    since="0.1.0",
)
UNREAD_WEIGHTS = Rule(
    "V008",
    NOTE,
    "weights that PEFT does not read lie beside the adapter",
    "PEFT loads adapter_model.safetensors alone. If the file was trained too, only the program "
    "that wrote the file gives its users the whole model.",
    "Say beside the adapter what reads the file; a conversion copies the file, a merge does not.",
    since="0.2.0",
)
CONFIG_MISSING = Rule(
    "V010",
    ERROR,
    "adapter_config.json is missing",
    "Rank, key and method stand there alone; without it nobody can load the weights.",
    "Pass the folder that holds adapter_config.json, or copy it beside the weights.",
    since="0.1.0",
)
WEIGHTS_MISSING = Rule(
    "V011",
    ERROR,
    "adapter_model.safetensors is missing",
    "The trained vectors are stored there.",
    "Copy or download the weights into the folder.",
    since="0.1.0",
)
PICKLE_ONLY = Rule(
    "V012",
    ERROR,
    "the weights are pickled only",
    "Opening a pickle can run any program that its author chose, so this tool never does.",
    "Where PyTorch is installed, run this in its folder, which reads tensors and nothing else: "
    'python -c "import torch; from safetensors.torch import save_file; '
    "t = torch.load('adapter_model.bin', map_location='cpu', weights_only=True); "
    "save_file({k: v.clone().contiguous() for k, v in t.items()}, 'adapter_model.safetensors', "
    "metadata={'format': 'pt'})\"",
    since="0.1.0",
)
BOTH_KINDS = Rule(
    "V013",
    WARNING,
    "pickled weights lie beside the safetensors file",
    "PEFT and this tool use the safetensors file; other programs may take the pickle instead.",
    "Remove the pickled file if it is not needed.",
    since="0.1.0",
)
MODEL_AS_ADAPTER = Rule(
    "V014",
    ERROR,
    "a whole model's weights lie under an adapter's name",
    "PEFT finds no vector of VeRA there and changes nothing; it may overwrite the base's tensors.",
    "Save the adapter again with PeftModel.save_pretrained, before it is merged.",
    since="0.1.0",
)
ADAPTER_AS_MODEL = Rule(
    "V015",
    ERROR,
    "the adapter's weights lie under a model's name",
    "PEFT looks for adapter_model.safetensors alone, and other loaders take them for a model.",
    "Rename model.safetensors to adapter_model.safetensors.",
    since="0.1.0",
)
MODEL_FOLDER = Rule(
    "V016",
    ERROR,
    "the folder holds a whole model and no adapter",
    "A merged model is loaded by itself and needs no adapter.",
    "Pass the folder of the adapter, or load this one as a model.",
    since="0.1.0",
)
ADAPTER_BELOW = Rule(
    "V017",
    ERROR,
    "the adapter lies in a subfolder",
    "PEFT puts every adapter that is not called default into a subfolder of its name.",
    "Pass the subfolder, or copy its files to where they are looked for; `vera-convert validate "
    "--recursive` checks all that lie below.",
    since="0.1.0",
)
TRAINING_STATE = Rule(
    "V018",
    NOTE,
    "states of a training run lie beside the adapter",
    "States are large and pickled; logs tell paths and the name of the training machine. Nobody "
    "who loads the adapter needs these files.",
    "Leave the files out when you publish the adapter; strip, embed, migrate and merge do.",
    since="0.1.0",
)
STRANGE_FILES = Rule(
    "V019",
    NOTE,
    "files of a download or of another model lie beside the adapter",
    "NAME:Zone.Identifier tells from where NAME was downloaded. A loader can take the weights of "
    "another model for those of the adapter's base.",
    "Remove the files; strip, embed, migrate and merge leave such files out.",
    since="0.2.0",
)
JSON_NOT_UTF8 = Rule(
    "V020",
    ERROR,
    "the text is not UTF-8",
    "JSON is UTF-8; readers refuse anything else, or guess.",
    "Save the file as UTF-8.",
    since="0.1.0",
)
JSON_BOM = Rule(
    "V021",
    ERROR,
    "the text begins with a byte order mark",
    "JSON has none: Python's reader and serde's, which safetensors uses, both refuse it.",
    "Save the file as UTF-8 without a byte order mark.",
    since="0.1.0",
)
JSON_SYNTAX = Rule(
    "V022",
    ERROR,
    "the text is not JSON",
    "No loader can read it.",
    "Restore the file that was written, or copy it again if it was cut off.",
    since="0.1.0",
)
JSON_DUPLICATE_KEY = Rule(
    "V023",
    ERROR,
    "a key stands twice in one JSON object",
    "Some readers take the first value and some the last, so they see different checkpoints.",
    "Remove the entry that is not meant.",
    since="0.1.0",
)
JSON_NOT_FINITE = Rule(
    "V024",
    ERROR,
    "the text holds NaN or Infinity",
    "JSON has no such numbers; most readers refuse them.",
    "Write a finite number, or null.",
    since="0.1.0",
)
JSON_NESTING = Rule(
    "V025",
    ERROR,
    "the JSON is nested absurdly deep",
    "Such files are made to exhaust the reader; a real one has five levels at most.",
    "Restore the file that was written.",
    since="0.1.0",
)
JSON_NUMBER = Rule(
    "V026",
    ERROR,
    "the JSON holds an absurd number",
    "No field has such a value, and readers disagree on what it is.",
    "Write a number of ordinary size.",
    since="0.1.0",
)
JSON_SURROGATE = Rule(
    "V027",
    ERROR,
    "a text holds half of a character",
    "A lone surrogate cannot be written as UTF-8: the safetensors library refuses it.",
    "Write the whole character.",
    since="0.1.0",
)
JSON_TOO_MANY = Rule(
    "V028",
    ERROR,
    "the JSON has an absurd number of values",
    "Such files are made to exhaust memory: a few bytes of text become a hundred in memory.",
    "Restore the file that was written.",
    since="0.1.0",
)
LFS_POINTER = Rule(
    "V030",
    ERROR,
    "the file is a Git LFS pointer, not the weights",
    "The repository was cloned without Git LFS: only a note of where the content lies was copied.",
    "Run `git lfs pull` in that repository, or download it with `hf download`.",
    since="0.1.0",
)
PICKLE_RENAMED = Rule(
    "V031",
    ERROR,
    "a pickle under the name of a safetensors file",
    "Opening a pickle can run any program that its author chose, so this tool never does.",
    "Convert it where it may be opened, with torch.load(..., weights_only=True) and"
    " safetensors.torch.save_file; renaming converts nothing.",
    since="0.1.0",
)
OTHER_FORMAT = Rule(
    "V032",
    ERROR,
    "the file has another format than its name says",
    "A safetensors file begins with the length of its header.",
    "Download or convert the file again.",
    since="0.1.0",
)
LENGTH_MISSING = Rule(
    "V033",
    ERROR,
    "the file ends within its first eight bytes",
    "A safetensors file begins with the length of its header, eight bytes long.",
    "Copy or download the file again.",
    since="0.1.0",
)
HEADER_TOO_LONG = Rule(
    "V034",
    ERROR,
    "the header is longer than 100 MB",
    "The safetensors library refuses it too.",
    "Write the file again with the safetensors library.",
    since="0.1.0",
)
HEADER_CUT_OFF = Rule(
    "V035",
    ERROR,
    "the file ends within its header",
    "The file is incomplete, or the length of its header is wrong.",
    "Copy or download the file again.",
    since="0.1.0",
)
HEADER_START = Rule(
    "V036",
    ERROR,
    "the header does not begin with '{'",
    "The safetensors format demands it, so that the file cannot pass for another kind as well.",
    "Write the file again with the safetensors library.",
    since="0.1.0",
)
METADATA_FORM = Rule(
    "V040",
    ERROR,
    "__metadata__ is not a map of texts",
    "The safetensors library refuses a file with any other value there.",
    "Write numbers and lists as text, or leave them out.",
    since="0.1.0",
)
ENTRY_FORM = Rule(
    "V041",
    ERROR,
    "a tensor's entry is not an object",
    "dtype, shape and data_offsets have to be named; other forms are read by some libraries only.",
    "Write the file again with the safetensors library.",
    since="0.1.0",
)
ENTRY_FIELD_MISSING = Rule(
    "V042",
    ERROR,
    "a tensor's entry lacks a field",
    "Without dtype, shape and data_offsets the tensor cannot be found or read.",
    "Write the file again with the safetensors library.",
    since="0.1.0",
)
ENTRY_FIELD_UNKNOWN = Rule(
    "V043",
    ERROR,
    "a tensor's entry has an unknown field",
    "The format has none; whatever it means (a scale, a compression) would be ignored.",
    "Write the file again with the safetensors library.",
    since="0.1.0",
)
DTYPE_UNKNOWN = Rule(
    "V044",
    ERROR,
    "a tensor has a dtype that safetensors does not know",
    "Its values cannot be read.",
    "Write the tensor in a dtype of the safetensors library.",
    since="0.1.0",
)
SHAPE_FORM = Rule(
    "V045",
    ERROR,
    "a shape is not a list of whole numbers",
    "Sizes are whole numbers from 0 up, 32 of them at most; true, 2.0 and -1 are none.",
    "Write the file again with the safetensors library.",
    since="0.1.0",
)
SHAPE_OVERFLOW = Rule(
    "V046",
    ERROR,
    "a shape is larger than any memory",
    "Its size in bytes overflows 63 bits: readers that do not check compute a small one.",
    "Write the file again with the safetensors library.",
    since="0.1.0",
)
SHAPE_PARTIAL_BYTE = Rule(
    "V047",
    ERROR,
    "a tensor ends within a byte",
    "Its 4-bit or 6-bit values do not fill whole bytes; the safetensors library refuses it.",
    "Write the file again with the safetensors library.",
    since="0.1.0",
)
OFFSETS_FORM = Rule(
    "V048",
    ERROR,
    "data_offsets is not a begin and an end",
    "Two whole numbers from 0 up are expected, the end not before the begin.",
    "Write the file again with the safetensors library.",
    since="0.1.0",
)
OFFSETS_SPAN = Rule(
    "V049",
    ERROR,
    "a tensor's bytes are not as many as its shape and dtype need",
    "Readers that do not check read the neighbor's values, or memory that is not theirs.",
    "Write the file again with the safetensors library.",
    since="0.1.0",
)
DATA_OVERLAP = Rule(
    "V050",
    ERROR,
    "two tensors share bytes",
    "A small file could stand for endless data; the safetensors library refuses it.",
    "Write the file again with the safetensors library.",
    since="0.1.0",
)
DATA_HOLE = Rule(
    "V051",
    ERROR,
    "bytes between two tensors belong to none",
    "Anything could hide there; the safetensors library refuses it.",
    "Write the file again with the safetensors library.",
    since="0.1.0",
)
DATA_CUT_OFF = Rule(
    "V052",
    ERROR,
    "the file ends before its last tensor does",
    "A download or a copy was cut off, so values are missing.",
    "Copy or download the file again.",
    since="0.1.0",
)
DATA_TRAILING = Rule(
    "V053",
    ERROR,
    "bytes after the last tensor belong to none",
    "Anything could hide there; the safetensors library refuses it.",
    "Write the file again with the safetensors library.",
    since="0.1.0",
)
TENSOR_NAME_ABSURD = Rule(
    "V054",
    ERROR,
    "a tensor's name is absurdly long or deep",
    "Names are compared element by element, so that such ones exhaust the reader; real ones have "
    "a dozen elements.",
    "Save the tensors under the names that their modules have.",
    since="0.1.0",
)

# --- V1: config ----------------------------------------------------------------------------------

NOT_VERA = Rule(
    "V101",
    ERROR,
    "the config is not a VeRA adapter's",
    "PEFT picks the method by peft_type; only the exact text VERA is this one.",
    "Pass the folder of an adapter that was trained with PEFT's VeraConfig.",
    since="0.1.0",
)
CONFIG_NOT_OBJECT = Rule(
    "V102",
    ERROR,
    "adapter_config.json holds no JSON object",
    "Every loader expects an object with one entry per field.",
    "Restore the file that PEFT wrote.",
    since="0.1.0",
)
FIELD_TYPE = Rule(
    "V103",
    ERROR,
    "a config field has the wrong type",
    "PEFT fails on it, or reads it as something else than was meant.",
    "Correct the value by hand, or restore the file that PEFT wrote.",
    since="0.1.0",
)
FIELD_RANGE = Rule(
    "V104",
    ERROR,
    "a config field is out of range",
    "PEFT fails on it, or gives results that nobody trained.",
    "Correct the value by hand, or restore the file that PEFT wrote.",
    since="0.1.0",
)
KEY_INVALID = Rule(
    "V105",
    ERROR,
    "projection_prng_key is no seed that PyTorch takes",
    "A and B are drawn from it; PyTorch takes whole numbers from -2^63 to 2^64-1 only.",
    "Set it to the whole number that the adapter was trained with.",
    since="0.1.0",
)
FIELD_VALUE = Rule(
    "V106",
    ERROR,
    "a config field has a value that PEFT does not know",
    "PEFT refuses it when it loads the adapter.",
    "Use one of the values named, or restore the file that PEFT wrote.",
    since="0.1.0",
)
LAYERS_PATTERN_ALONE = Rule(
    "V107",
    ERROR,
    "layers_pattern is set without layers_to_transform",
    "PEFT 0.14 and later refuse to load such a config.",
    "Remove layers_pattern, or name the layers in layers_to_transform.",
    since="0.1.0",
)
UNKNOWN_FIELD = Rule(
    "V110",
    WARNING,
    "the config has a field that no VeraConfig knows",
    "PEFT 0.14 and later drop it with a warning; PEFT 0.13 and earlier refuse the adapter.",
    "It is kept as it is; `vera-convert migrate --to asis --peft-version 0.13` removes it for old "
    "readers.",
    since="0.1.0",
)
FIELD_BY_VERSION = Rule(
    "V111",
    WARNING,
    "a config field is not read by every PEFT",
    "Some releases refuse the adapter for it, or read it as something else.",
    "Load the adapter with a release that reads it, or write the field in the older form.",
    since="0.1.0",
)

BASE_IS_PATH = Rule(
    "V120",
    WARNING,
    "the config calls the base by a path",
    "Nobody else has it there, and the Hub refuses a model card that names it.",
    "Write the base's name on the Hub into base_model_name_or_path.",
    since="0.1.0",
)
BASE_UNNAMED = Rule(
    "V121",
    WARNING,
    "the config names no base",
    "Whoever has the adapter has to guess which model it was trained on.",
    "Write the base's name on the Hub into base_model_name_or_path.",
    since="0.1.0",
)
REVISION_MISSING = Rule(
    "V122",
    NOTE,
    "the config names no revision of the base",
    "A repo can change; then the adapter meets other weights than it was trained on.",
    "Write the commit that it was trained on into revision.",
    since="0.1.0",
)

REVISION_INVALID = Rule(
    "V123",
    WARNING,
    "the config's revision of the base can be none",
    "No loader finds the base by it, and a path such as ../../x can lead out of a cache.",
    "Write the commit that the adapter was trained on into revision, or null.",
    since="0.2.0",
)

TARGET_REGEX_INVALID = Rule(
    "V130",
    ERROR,
    "a pattern in the config is no regular expression",
    "PEFT compiles it with Python's `re` and fails, so nobody can tell which layers are meant.",
    "Correct the pattern, or list the names of the modules in target_modules.",
    since="0.1.0",
)
TARGET_REGEX_SLOW = Rule(
    "V131",
    ERROR,
    "a pattern in the config takes too long to evaluate",
    "PEFT evaluates it on every module's name and would hang as well.",
    "Write the pattern without nested repetition, or list the names in target_modules.",
    since="0.1.0",
)
TARGETS_MATCH_NOTHING = Rule(
    "V132",
    ERROR,
    "the config's targets match no layer of the base",
    "PEFT refuses to wrap the model, and the size of A and B cannot be told.",
    "Check that the base is the adapter's own and that target_modules names its modules.",
    since="0.1.0",
)
TARGETS_UNKNOWN = Rule(
    "V133",
    ERROR,
    "target_modules is null and PEFT has no default for the base",
    "Nothing says which layers are adapted.",
    "List the modules in target_modules.",
    since="0.1.0",
)
TARGETS_BY_VERSION = Rule(
    "V134",
    WARNING,
    "releases of PEFT read the config's targets differently",
    "What they leave unadapted is lost without a word.",
    "Load the adapter with a release that adapts all its layers, or list their full names in "
    "target_modules.",
    since="0.1.0",
)

# --- V2: tensors ---------------------------------------------------------------------------------

NO_LAMBDAS = Rule(
    "V201",
    ERROR,
    "the file adapts no layer",
    "Without vera_lambda_b and vera_lambda_d vectors the adapter changes nothing.",
    "Save the adapter again from the training run; with FSDP or ZeRO-3, gather the state first.",
    since="0.1.0",
)
LAMBDA_UNPAIRED = Rule(
    "V202",
    ERROR,
    "a layer has only one of its two vectors",
    "PEFT loads it without a word and leaves the other vector at its initial value.",
    "Save the adapter again from the training run.",
    since="0.1.0",
)
LAMBDA_SHAPE = Rule(
    "V203",
    ERROR,
    "a lambda is not a vector",
    "A layer scales by vectors: lambda_d of r values and lambda_b of one value per output.",
    "Save the adapter again from the training run.",
    since="0.1.0",
)
LAMBDA_D_LENGTH = Rule(
    "V204",
    ERROR,
    "lambda_d does not have r values",
    "PEFT refuses the file: the rank of the config and the rank of the tensors differ.",
    "If all layers have another rank in common, set r to it; else save the adapter again.",
    since="0.1.0",
)
EMPTY_TENSOR = Rule(
    "V205",
    ERROR,
    "a tensor holds no values",
    "A save under ZeRO-3 or FSDP without gathering writes such husks; the training is not in them.",
    "Save again with the state gathered (stage3_gather_16bit_weights_on_model_save, or "
    "FULL_STATE_DICT).",
    since="0.1.0",
)
TENSOR_DTYPE = Rule(
    "V206",
    ERROR,
    "a trained tensor is not of a float type",
    "Lambdas and projections are float64, float32, float16 or bfloat16; PEFT would cast or fail.",
    "Convert the tensor to float32 and save the file again.",
    since="0.1.0",
)
MIXED_DTYPES = Rule(
    "V207",
    WARNING,
    "lambdas and projections have different types",
    "PEFT writes one type for all of them, so something else wrote or edited this file.",
    "Nothing need be done: every tensor is read in its own type.",
    since="0.1.0",
)
ONE_PROJECTION = Rule(
    "V208",
    ERROR,
    "only one of vera_A and vera_B is stored",
    "Without A, PEFT refuses; without B, it draws B from the key and says nothing.",
    "Remove the one that is left and set save_projection to false, or save the adapter again.",
    since="0.1.0",
)
PROJECTION_SHAPE = Rule(
    "V209",
    ERROR,
    "vera_A or vera_B has an impossible shape",
    "A is (r, largest input) and B is (largest output, r).",
    "Save the adapter again from the training run.",
    since="0.1.0",
)
PROJECTION_TOO_SHORT = Rule(
    "V210",
    ERROR,
    "vera_B has fewer rows than a layer has outputs",
    "The layer uses the leading rows of B, one for each of its outputs.",
    "Save the adapter again from the training run.",
    since="0.1.0",
)
PROJECTIONS_MISSING = Rule(
    "V211",
    ERROR,
    "the config promises projections that the file lacks",
    "With save_projection true every PEFT refuses a file without vera_A.",
    "If they were dropped on purpose set save_projection to false, then run `vera-convert embed`.",
    since="0.1.0",
)
PROJECTIONS_UNANNOUNCED = Rule(
    "V212",
    WARNING,
    "the file holds projections that the config denies",
    "With save_projection false every PEFT ignores them and draws its own.",
    "`vera-convert migrate --to embedded` or `--to stripped` makes file and config agree.",
    since="0.1.0",
)
PROJECTIONS_REPEATED = Rule(
    "V213",
    WARNING,
    "the shared projections are stored again with a layer",
    "They equal the shared ones, so nothing is wrong but the size.",
    "`vera-convert migrate --to asis` writes them once.",
    since="0.1.0",
)
PROJECTIONS_DIFFER = Rule(
    "V214",
    ERROR,
    "a layer stores projections other than the shared ones",
    "VeRA shares one A and one B over all layers; no loader would use the layer's own.",
    "Save the adapter again from the training run.",
    since="0.1.0",
)
WRAPPER_IN_NAMES = Rule(
    "V215",
    ERROR,
    "names carry a part that is left over from a wrapper",
    "PEFT finds none of its names in the file and loads the adapter as one that does nothing.",
    "`vera-convert migrate --to asis` writes the proper names.",
    since="0.1.0",
)
ADAPTER_NAME_LEFT = Rule(
    "V216",
    ERROR,
    "tensor names still carry the adapter's name",
    "PEFT up to 0.20 refuses the file, or loads it as an adapter that does nothing.",
    "`vera-convert migrate --to asis` writes the proper names.",
    since="0.1.0",
)
PREFIX_MISSING = Rule(
    "V217",
    ERROR,
    "tensor names lack PEFT's prefix",
    "No PEFT loads such names: the adapter would do nothing, without an error.",
    "`vera-convert migrate --to asis` writes the proper names.",
    since="0.1.0",
)
LAMBDA_COLUMN = Rule(
    "V218",
    ERROR,
    "a lambda is stored as a column of shape (n, 1)",
    "PEFT up to 0.15 wrote such files after a merge on a 16-bit model, and no PEFT loads them.",
    "`vera-convert migrate --to asis` drops the extra dimension.",
    since="0.1.0",
)
OTHER_VERA = Rule(
    "V219",
    ERROR,
    "a tensor belongs to a variant of VeRA that is not VeRA",
    "Its vectors mean something else, so a merge as plain VeRA would be wrong.",
    "Use the tool that trained it.",
    since="0.1.0",
)
UNKNOWN_TENSOR = Rule(
    "V220",
    ERROR,
    "a tensor has a name of unknown meaning",
    "PEFT drops such tensors without a word, so what was trained in them would be lost.",
    "Remove the tensor, or save the adapter again from the training run.",
    since="0.1.0",
)
UNDECLARED_TENSOR = Rule(
    "V221",
    ERROR,
    "a tensor of the base model is stored that the config does not declare",
    "PEFT overwrites the base model's weight with it and says nothing.",
    "Name its module in modules_to_save (or set bias) if it was trained; else remove the tensor.",
    since="0.1.0",
)
MODULE_TO_SAVE_MISSING = Rule(
    "V222",
    ERROR,
    "a module of modules_to_save has no tensor in the file",
    "PEFT up to 0.14 would keep a freshly initialized module; later ones fail with a KeyError.",
    "Save the adapter again from the training run, or remove the name from modules_to_save.",
    since="0.1.0",
)
BIAS_NOT_STORED = Rule(
    "V223",
    WARNING,
    "the config trains biases that the file does not hold",
    "PEFT up to 0.20 never saved trained biases, so they are lost. It is a note if PEFT 0.21 or "
    "later wrote the file and no base tells whether the model has biases.",
    "Nothing need be done if the model has no biases. Else train again with PEFT 0.21 or later.",
    since="0.1.0",
)
NAME_TAKEN_TWICE = Rule(
    "V224",
    ERROR,
    "two tensors would get the same name",
    "Once the names are brought to their proper form two tensors claim one place.",
    "Remove the one that is stale, or save the adapter again from the training run.",
    since="0.1.0",
)

PROJECTIONS_PER_LAYER = Rule(
    "V225",
    ERROR,
    "the projections are stored with the layers only, not once for all",
    "PEFT looks for base_model.vera_A and refuses the file, or draws its own.",
    "`vera-convert migrate --to asis` writes them once, if they are all equal.",
    since="0.1.0",
)
LAYERS_UNEVEN = Rule(
    "V226",
    NOTE,
    "a target is adapted in fewer layers of the model than another",
    "Hybrid models are so by design. Else the file lacks layers, or the name matches in some only.",
    "Run `vera-convert validate ADAPTER --base MODEL`: the base tells whether layers are missing.",
    since="0.1.0",
)
SEVERAL_ADAPTERS = Rule(
    "V227",
    ERROR,
    "the file holds tensors of several adapters",
    "Their names end with the name of an adapter, and not all with the same.",
    "Keep the tensors of one of them, or save it again from the training run.",
    since="0.1.0",
)
PREFIX_MIXED = Rule(
    "V228",
    ERROR,
    "tensor names begin with PEFT's prefix in some layers and with something else in others",
    "PEFT loads only names with its prefix, and nothing tells whether all are of one adapter.",
    "Save the adapter again from the training run.",
    since="0.1.0",
)
TARGET_NOT_STORED = Rule(
    "V229",
    WARNING,
    "a target of the config has no vectors in the file",
    "If the base has such layers, PEFT adapts them with the initial vectors, which add nothing.",
    "Remove the name from target_modules, or save the adapter again if it was trained.",
    since="0.1.0",
)
EMBEDDING_UNDECLARED = Rule(
    "V231",
    NOTE,
    "the adapter replaces an embedding or a head that its config does not name",
    "So PEFT saves them where the vocabulary was resized; on load they overwrite the base's own.",
    "Nothing need be done if the vocabulary was resized; else remove the tensor.",
    since="0.1.0",
)

# --- V3: values ----------------------------------------------------------------------------------

VALUE_NOT_FINITE = Rule(
    "V301",
    ERROR,
    "a trained value is infinite or no number",
    "It would spread over a whole row or column of a weight.",
    "Take an earlier checkpoint of the training run: it diverged before this one was saved.",
    since="0.1.0",
)
PRODUCT_OVERFLOWS = Rule(
    "V302",
    WARNING,
    "what the adapter adds can overflow float16",
    "In float16 a value above 65,504 becomes infinite, and the model's output no number.",
    "Load base and adapter in bfloat16 or float32.",
    since="0.1.0",
)
UNTRAINED = Rule(
    "V303",
    WARNING,
    "the adapter changes nothing",
    "Every lambda_b or every lambda_d is zero; so lambda_b is before training.",
    "Check that this is the adapter that was trained.",
    since="0.1.0",
)
PROJECTION_CONSTANT = Rule(
    "V304",
    ERROR,
    "vera_A or vera_B holds one value only",
    "Random matrices are what VeRA is trained on; this is a save that went wrong.",
    "Save the adapter again from the training run.",
    since="0.1.0",
)
VALUE_ABSURD = Rule(
    "V305",
    WARNING,
    "a tensor's values are absurdly large or small",
    "No training ends there: the tensor was damaged, or decoded in another type than its own.",
    "Compare the adapter's results with those of the training run, or save it again.",
    since="0.1.0",
)
LAYERS_UNTRAINED = Rule(
    "V306",
    NOTE,
    "a vector is zero in some of the layers",
    "They add nothing; lambda_b begins so, and training did not reach it.",
    "Nothing need be done if these layers were to stay as they are.",
    since="0.1.0",
)

# --- V4: projections -----------------------------------------------------------------------------

NOT_A_DRAW = Rule(
    "V401",
    ERROR,
    "the stored projections are no draw of PyTorch's CPU generator",
    "Nothing but the file itself can bring them back, so dropping them would lose the adapter.",
    "Keep them stored.",
    since="0.1.0",
)
OTHER_KEY = Rule(
    "V402",
    ERROR,
    "the stored projections are the draw of another key than the config's",
    "A loader that draws from the config's key would get other matrices.",
    "Correct projection_prng_key in adapter_config.json if it was edited; else keep them stored.",
    since="0.1.0",
)
OTHER_DRAW = Rule(
    "V403",
    ERROR,
    "PEFT would draw other projections than the stored ones",
    "Once they are dropped, PEFT loads the adapter with the difference that is shown.",
    "If the base is loaded in another dtype than its files have, give that with --base-dtype. Else "
    "keep them stored, or accept the change with --accept-change: `vera-convert embed` restores "
    "them exactly from the fingerprint.",
    since="0.1.0",
)
ROUNDING_UNPROVEN = Rule(
    "V404",
    WARNING,
    "it is not proven that PEFT draws these projections on the base that it will be given",
    "PEFT rounds A and B to the base's dtype, and takes A's width from the base.",
    "Name the base with --base, or its dtype with --base-dtype.",
    since="0.1.0",
)
UNPROVEN_ROWS = Rule(
    "V405",
    ERROR,
    "vera_B has more rows than the longest lambda_b, and no base says why",
    "PEFT draws B as tall as the widest layer that the config matches; A shifts with it.",
    "Name the base with --base.",
    since="0.1.0",
)
PROJECTIONS_CONTRADICT = Rule(
    "V406",
    ERROR,
    "the file holds projections that are not what its config makes PEFT use",
    "save_projection is false, so every PEFT draws its own and ignores these.",
    "Say which are meant: --projections file or --projections key.",
    since="0.1.0",
)
FINGERPRINT_MALFORMED = Rule(
    "V407",
    ERROR,
    "the fingerprint in the metadata cannot be read",
    "It is the only proof of which matrices were dropped.",
    "Strip the adapter again from its embedded form, or remove the metadata entry.",
    since="0.1.0",
)
FINGERPRINT_DISAGREES = Rule(
    "V408",
    ERROR,
    "the fingerprint contradicts the adapter or the base",
    "One of the two was edited after the adapter was stripped.",
    "Restore the file that was edited, or strip the adapter again from its embedded form.",
    since="0.1.0",
)
FINGERPRINT_NOT_MET = Rule(
    "V409",
    ERROR,
    "the matrices that were drawn are not those of the fingerprint",
    "The fingerprint or the config was edited, so what was trained on cannot be restored.",
    "Restore the file that was edited, or strip the adapter again from its embedded form.",
    since="0.1.0",
)
UNPROVEN_DRAW = Rule(
    "V410",
    WARNING,
    "nothing proves that the adapter was trained on the projections that are drawn for it",
    "The adapter records neither A and B nor a fingerprint of them. This is a note if PEFT wrote "
    "the adapter, because PEFT draws the same A and B when it loads the adapter.",
    "Run `vera-convert embed ADAPTER OUT --base MODEL` and compare the results of OUT with those "
    "of the training run. Then publish OUT; if you run `vera-convert strip` on OUT, its output "
    "carries a fingerprint.",
    since="0.1.0",
)
TARGETS_DISAGREE = Rule(
    "V411",
    WARNING,
    "the config matches other layers of the base than the file adapts",
    "PEFT sizes A and B by the layers that the config matches in the model, and saves them all. "
    "This is a note if the other layers of the base's files change nothing.",
    "Nothing need be done if the model class does not build the other layers. Else check that the "
    "base and target_modules are those of the training, and that the file is whole.",
    since="0.1.0",
)
PROJECTIONS_TOO_NARROW = Rule(
    "V412",
    ERROR,
    "the projections would be smaller than a layer of the adapter",
    "A needs a column for each input and B a row for each output of every adapted layer.",
    "Check the dimensions or the base that were given, and target_modules in adapter_config.json.",
    since="0.1.0",
)
PROJECTIONS_TOO_LARGE = Rule(
    "V413",
    ERROR,
    "the projections are absurdly large",
    "Matrices of this size are refused before memory is taken.",
    "Check r, the dimensions and the file.",
    since="0.1.0",
)
PROJECTIONS_IGNORED = Rule(
    "V414",
    WARNING,
    "PEFT 0.11 to 0.20 ignore the stored projections and would use others",
    "Only PEFT 0.21 and later take A and B from the file.",
    "Load the adapter with PEFT 0.21 or later.",
    since="0.1.0",
)
ROUNDING_UNCLEAR = Rule(
    "V415",
    WARNING,
    "the base's tensors do not tell how PEFT rounds projections on it",
    "PEFT casts A and B to the dtype of each adapted layer in turn, and that of a quantized layer "
    "or the order of mixed ones does not stand in the headers.",
    "Give the dtype that the base is loaded in with --base-dtype.",
    since="0.1.0",
)
OTHER_DIMS = Rule(
    "V416",
    WARNING,
    "the stored projections have other dimensions than PEFT demands on the base",
    "PEFT 0.21 refuses to load them; PEFT up to 0.20 does not notice, and draws its own.",
    "`vera-convert migrate --to asis --base MODEL` cuts what is larger; what is smaller is another "
    "base's.",
    since="0.1.0",
)
PROJECTION_TYPES_DIFFER = Rule(
    "V417",
    ERROR,
    "vera_A and vera_B are stored in different types",
    "A fingerprint records one type, so the file could not be restored to its bytes.",
    "Keep them stored, or save both in one type.",
    since="0.1.0",
)
PROJECTIONS_ROUNDED = Rule(
    "V418",
    NOTE,
    "the stored projections are rounded to 16 bits",
    "So PEFT has them on a 16-bit base; PEFT 0.11 to 0.20 use exact ones on a float32 base.",
    "Load the base in the type that the adapter was trained in, or use PEFT 0.21 or later.",
    since="0.1.0",
)
REDRAWN_OTHERWISE = Rule(
    "V419",
    WARNING,
    "PEFT would draw other projections than those that were dropped",
    "The fingerprint tells which they were, but PEFT does not read it.",
    "Restore them with `vera-convert embed` and load the result with PEFT 0.21 or later.",
    since="0.1.0",
)
PROJECTIONS_DAMAGED = Rule(
    "V420",
    ERROR,
    "the stored projections are a draw of which some values are others",
    "Nobody changes a few of millions of random values: a copy, a disk or a program did.",
    "Copy the adapter again. Where no other copy is left, `vera-convert migrate --to embedded "
    "--projections key --base MODEL` puts the key's own draw in their place.",
    since="0.1.0",
)

DIMS_AMBIGUOUS = Rule(
    "V421",
    ERROR,
    "layers are missing from the file, and the dimensions of A and B depend on them",
    "Other dimensions give other values in every column of A and B, so the result would be wrong.",
    "Copy the file again from where it was trained. If the layers were never adapted, write "
    "target_modules or layers_to_transform so that they match the file's layers alone.",
    since="0.2.0",
)

# --- V5: base ------------------------------------------------------------------------------------

BASE_WITHOUT_WEIGHTS = Rule(
    "V501",
    ERROR,
    "the base holds no safetensors weights",
    "Names, shapes and values of its layers are read from there and from nowhere else.",
    "Pass the folder or repo of a model with its weights as *.safetensors.",
    since="0.1.0",
)
BASE_PICKLED = Rule(
    "V502",
    ERROR,
    "the base's weights are pickled only",
    "Opening a pickle can run any program that its author chose, so this tool never does.",
    "Load the model where that may be done and save it with safe_serialization=True, or take "
    "another copy of it with safetensors weights.",
    since="0.1.0",
)
BASE_OTHER_FORMAT = Rule(
    "V503",
    ERROR,
    "the base's weights are in a format that is not read",
    "GGUF, ONNX, TensorFlow and Flax files have other names and often other values.",
    "Pass the model that this file was converted from, with its weights as *.safetensors.",
    since="0.1.0",
)
BASE_IS_ADAPTER = Rule(
    "V504",
    ERROR,
    "the base is itself an adapter and no model",
    "An adapter holds changes to a model, not the model.",
    "Pass the model that the adapter was trained on; its config names it.",
    since="0.1.0",
)
BASE_AMBIGUOUS = Rule(
    "V505",
    ERROR,
    "it is not clear which files are the base's weights",
    "Several files without an index, or several components that fit, leave open which are meant.",
    "Pass the folder of one component of a pipeline; restore the index of a model in shards.",
    since="0.1.0",
)
INDEX_MALFORMED = Rule(
    "V506",
    ERROR,
    "the index of the shards makes no sense",
    "Its weight_map has to give the file of each tensor.",
    "Download the index again, or save the model anew.",
    since="0.1.0",
)
SHARD_MISSING = Rule(
    "V507",
    ERROR,
    "a shard that the index names is missing",
    "A loader would fill its tensors with random values, or stop.",
    "Download the missing file, or the whole model again.",
    since="0.1.0",
)
TENSOR_NOT_IN_SHARD = Rule(
    "V508",
    ERROR,
    "a tensor that the index names is in no shard",
    "A loader would fill it with random values.",
    "Download index and shards again: they are not of one save.",
    since="0.1.0",
)
TENSOR_MISPLACED = Rule(
    "V509",
    ERROR,
    "a tensor lies in another shard than the index says",
    "Loaders that follow the index do not find it.",
    "Download index and shards again: they are not of one save.",
    since="0.1.0",
)
TENSOR_NOT_IN_INDEX = Rule(
    "V510",
    ERROR,
    "a shard holds a tensor that the index does not name",
    "Some loaders take it and some do not.",
    "Download index and shards again: they are not of one save.",
    since="0.1.0",
)
TENSOR_IN_TWO_SHARDS = Rule(
    "V511",
    ERROR,
    "a tensor lies in two shards",
    "Which of the two a loader takes depends on the order in which it reads them.",
    "Download index and shards again: they are not of one save.",
    since="0.1.0",
)
STRAY_WEIGHTS = Rule(
    "V512",
    WARNING,
    "a safetensors file lies beside the base's weights and is not one of them",
    "It is not read. A loader that does not follow the index could take it for the model.",
    "Remove it if it was left over.",
    since="0.1.0",
)
MODEL_CONFIG_FORM = Rule(
    "V513",
    ERROR,
    "the base's config.json holds no JSON object",
    "Every loader expects an object with one entry per field.",
    "Download it again.",
    since="0.1.0",
)
NAMES_DIFFER = Rule(
    "V520",
    ERROR,
    "the adapter's layers are not those of the base",
    "A layer that finds no tensor would be left out without a word; nothing is done by halves.",
    "Check that this is the base that the adapter was trained on. If only its names differ, give "
    "the renaming with --key-map OLD=NEW.",
    since="0.1.0",
)
NAMES_AMBIGUOUS = Rule(
    "V521",
    ERROR,
    "the adapter's names fit the base in more than one way",
    "Each way changes other tensors, and nothing says which was trained.",
    "Give the one renaming that is meant with --key-map OLD=NEW.",
    since="0.1.0",
)
SHAPES_DIFFER = Rule(
    "V522",
    ERROR,
    "a layer of the adapter has another shape than the base's tensor",
    "lambda_b has one value for each output, and A a column for each input, of the layer.",
    "Pass the base that the adapter was trained on: its size must agree too.",
    since="0.1.0",
)
NOT_A_MATRIX = Rule(
    "V523",
    ERROR,
    "a layer of the adapter belongs to a tensor that is no matrix",
    "VeRA adapts linear layers, whose weights have two dimensions.",
    "Pass the base that the adapter was trained on.",
    since="0.1.0",
)
HEAD_TIED = Rule(
    "V524",
    ERROR,
    "the adapter changes an output head that the base shares with its embedding",
    "There is one tensor for both, so a change of the head would change the embedding too.",
    "Say what is meant: `--tied untie` stores a head of its own, `--tied add` changes both.",
    since="0.1.0",
)
REPLACEMENT_CLASH = Rule(
    "V525",
    ERROR,
    "two tensors of the adapter would replace the same one of the base",
    "Only one of them can be meant.",
    "Remove the one that is stale, or save the adapter again from the training run.",
    since="0.1.0",
)
HEAD_SHARED = Rule(
    "V526",
    WARNING,
    "the adapter changes an output head that the base shares with its embedding",
    "Unmerged it works; a merge needs to know whether the embedding is to change too.",
    "When merging, say what is meant: `--tied untie` or `--tied add`.",
    since="0.1.0",
)
ORIENTATION_WRONG = Rule(
    "V527",
    NOTE,
    "fan_in_fan_out is not how the base stores its layers",
    "PEFT corrects it for each layer, with a warning; the results are the same.",
    "Set it to true for Conv1D layers (GPT-2 and its kin) and to false for all others.",
    since="0.1.0",
)

RESULT_NOT_FINITE = Rule(
    "V530",
    ERROR,
    "a merged value is infinite or no number",
    "The base's own value is not finite, or the sum is beyond what the tensor's type can hold.",
    "Check the base's tensor; a sum that is too large for float16 fits with --dtype bfloat16.",
    since="0.1.0",
)
REPLACEMENT_SHAPE = Rule(
    "V531",
    ERROR,
    "a tensor that the adapter replaces has another shape in the base",
    "A model is built to one shape; a vocabulary or a head of another size does not fit into it.",
    "Pass the base that the adapter was trained on, resized as it was then.",
    since="0.1.0",
)
REPLACEMENT_UNKNOWN = Rule(
    "V532",
    ERROR,
    "the adapter replaces a tensor that the base does not have",
    "No loader would ask for it under this name, so what was trained would be lost.",
    "Check that this is the base that the adapter was trained on.",
    since="0.1.0",
)
REPLACEMENT_NEW = Rule(
    "V533",
    WARNING,
    "the adapter brings a head that the base does not have",
    "A merge adds the head to the weights. If neither task_type nor auto_mapping names the class "
    "that has the head, config.json still names the base's class, which ignores the head.",
    "Merge with --architecture CLASS, naming the class that the adapter was trained in.",
    since="0.1.0",
)
REPLACEMENTS_DIFFER = Rule(
    "V534",
    ERROR,
    "two adapters change the same tensor in ways that exclude each other",
    "A replaced tensor is trained whole: neither adding to it nor a weight has a meaning.",
    "Merge one of the two only.",
    since="0.1.0",
)
BASE_COPY_DIFFERS = Rule(
    "V535",
    ERROR,
    "the adapter stores another base weight of an adapted layer than the base has",
    "PEFT would put the stored weight in place of the base's before it adds to it.",
    "Pass the base that the adapter was trained on.",
    since="0.1.0",
)
EMBEDDING_SHARED = Rule(
    "V536",
    WARNING,
    "the adapter replaces an embedding that the base shares with its output head",
    "PEFT trained a copy of the embedding and left the head; a loader of the result gives the head "
    "the new values too.",
    "Compare results of the merged model with those of the adapter.",
    since="0.1.0",
)
DELTA_LOST = Rule(
    "V537",
    WARNING,
    "most of what the adapter adds is lost in the rounding of the base's type",
    "The change of most values is smaller than half of their last bit.",
    "Merge into a wider type with --dtype float32, or serve the adapter unmerged.",
    since="0.1.0",
)
WEIGHTS_LEFT_OUT = Rule(
    "V539",
    WARNING,
    "files of the base that a loader could take for the merged weights are left out",
    "They hold the base's weights in another form, without the adapter.",
    "Convert the merged model again where such a form is needed.",
    since="0.1.0",
)
ADAPTER_IN_BASE = Rule(
    "V540",
    WARNING,
    "an adapter that lies in the base's folder is left out",
    "A loader would add it to the merged weights, or go to the model that it names.",
    "Merge it as well, with --add, if it is meant to be part of the model.",
    since="0.1.0",
)
TOKENIZER_TOO_LARGE = Rule(
    "V541",
    ERROR,
    "the adapter's tokenizer has tokens that the model has no row for",
    "Such a token would stop the model, or read past the end of its embedding.",
    "Pass the base with the resized embedding, or the adapter that stores it.",
    since="0.1.0",
)

LAYER_CUT_OUT = Rule(
    "V542",
    ERROR,
    "a layer of the adapter is a part of a larger tensor of the base",
    "transformers cuts that tensor into several layers when it loads the base; adding to some of "
    "its rows is not implemented.",
    "Merge with PEFT in the release of transformers that the adapter was trained with.",
    since="0.1.0",
)
LAYER_REORDERED = Rule(
    "V543",
    ERROR,
    "a layer of the adapter has its rows in another order in the base's files",
    "transformers reorders them for its rotary embedding when it loads the base; adding to them in "
    "the file's order would be wrong, and the other order is not implemented.",
    "Merge with PEFT in the release of transformers that the adapter was trained with.",
    since="0.1.0",
)
EXPERTS_STACKED = Rule(
    "V544",
    ERROR,
    "a layer of the adapter is one expert of a tensor that holds them all",
    "The base stacks its experts to a tensor of three dimensions; adding to one of them is not "
    "implemented.",
    "Pass the same base in a form that stores each expert's layers by themselves.",
    since="0.1.0",
)
LAYER_OF_SEVERAL = Rule(
    "V545",
    ERROR,
    "a layer of the adapter is several tensors in the base",
    "transformers joins them to one layer when it loads the base; adding to each its share is not "
    "implemented.",
    "Merge with PEFT in the release of transformers that the adapter was trained with.",
    since="0.1.0",
)
NAMES_RENAMED = Rule(
    "V546",
    NOTE,
    "the adapter's layers have other names in the base's files",
    "A class or a release of transformers whose names in memory are others loads nothing of it.",
    "Load it in the class and the release of transformers that it was trained in.",
    since="0.1.0",
)

QUANTIZED_TARGET = Rule(
    "V550",
    ERROR,
    "layers of the adapter are quantized in the base",
    "Quantized values are too coarse to add to: most of the delta would be lost, or all of it.",
    "If the finding says that it can, `vera-convert merge --dequantize` makes a 16-bit model of "
    "the base and the adapter. Otherwise keep the adapter beside the quantized base: "
    "`vera-convert to-lora` gives it a form that more engines load, and nothing is lost. Or merge "
    "into the original model in 16 or 32 bits (--base), which is not quite the model that the "
    "adapter was trained on. Or make a 16-bit model of the base with the quantizer's own tool.",
    since="0.1.0",
)
QUANTIZED_ELSEWHERE = Rule(
    "V551",
    NOTE,
    "other layers of the base are quantized",
    "They are copied as they are, and the config goes on saying how they are to be read.",
    "Nothing need be done: every layer that the adapter changes holds 16 or 32 bits.",
    since="0.1.0",
)
PART_MISSING = Rule(
    "V552",
    ERROR,
    "a quantized weight of the base lacks a part, such as its scale",
    "The packed values mean nothing without this part.",
    "Download the base again, or merge into the original model in 16 or 32 bits.",
    since="0.1.0",
)
PART_MALFORMED = Rule(
    "V553",
    ERROR,
    "a part of a quantized weight has another layout than its format has",
    "Read in any other way, the values would be wrong without a sign of it.",
    "Download the base again, or merge into the original model in 16 or 32 bits.",
    since="0.1.0",
)
NOT_DEQUANTIZABLE = Rule(
    "V554",
    ERROR,
    "the base is quantized in a way that --dequantize does not undo",
    "--dequantize makes a 16-bit model of all of a base, or nothing. docs/quantized-bases.md lists "
    "the formats.",
    "Keep the adapter beside the quantized base: `vera-convert to-lora` gives it a form that more "
    "engines load, and nothing is lost. Or merge into the original model in 16 or 32 bits "
    "(--base), which is not quite the model that the adapter was trained on. Or make a 16-bit "
    "model of the base with the quantizer's own tool.",
    since="0.1.0",
)
DEQUANTIZED = Rule(
    "V555",
    NOTE,
    "the quantized weights of the base become 16-bit weights",
    "Their scales and the config's settings of the quantization are left out.",
    "Nothing need be done; the result is two to four times as large as the base.",
    since="0.1.0",
)
TARGET_IS_QUANTIZED = Rule(
    "V556",
    WARNING,
    "layers of the adapter are quantized in this base, and cannot be dequantized here",
    "PEFT can run the adapter there; it cannot be merged into this base.",
    "To merge, take the original model in 16 or 32 bits that this base was made from.",
    since="0.1.0",
)

BASE_IN_FOLDER = Rule(
    "V557",
    NOTE,
    "the base is a folder here that only the adapter's config names",
    "The name does not prove which model is meant. Names and shapes of the layers were compared "
    "with the adapter's; whether the adapter was trained on these weights cannot be seen.",
    "If another model is meant, name it with --base.",
    since="0.2.0",
)
OTHER_BASE = Rule(
    "V558",
    WARNING,
    "the base is not the model that the adapter's config names",
    "An adapter adds to the weights that it was trained on; on others it does anything.",
    "Name the model that it was trained on with --base. Nothing need be done if this is a copy.",
    since="0.2.0",
)
BASE_MISDESCRIBED = Rule(
    "V559",
    WARNING,
    "the base's config.json describes another model than the base's weights",
    "The adapter fits the weights, but a loader builds the model of the config and would not load "
    "all of the weights.",
    "Put the config.json into the base that belongs to its weights.",
    since="0.2.0",
)
MODEL_TYPE_UNKNOWN = Rule(
    "V560",
    ERROR,
    "the model's type is none whose layers are known from its config",
    "A config names sizes, not layers; they are known for a few types only.",
    "Pass the base itself: its tensors' headers are enough.",
    since="0.1.0",
)
MODEL_FIELD_INVALID = Rule(
    "V561",
    ERROR,
    "a field of the model's config is missing or makes no sense",
    "The shapes of the layers follow from it.",
    "Restore the config.json that belongs to the model.",
    since="0.1.0",
)
PART_VALUES = Rule(
    "V562",
    ERROR,
    "a part of a quantized weight holds values that no quantizer writes",
    "With these values the weights would be infinite, NaN, or those of another group.",
    "Download the base again, or merge into the original model in 16 or 32 bits.",
    since="0.2.0",
)
CAN_DEQUANTIZE = Rule(
    "V563",
    NOTE,
    "layers of the adapter are quantized in this base, and a merge can dequantize them",
    "The weights that the adapter was trained on, plus the delta, make a 16-bit model.",
    "Merge with `vera-convert merge --dequantize`.",
    since="0.2.0",
)

HEAD_CLASS_WRITTEN = Rule(
    "V570",
    NOTE,
    "the merged model's config.json follows the adapter",
    "A loader builds the class, the labels and the vocabulary that config.json names. The base's "
    "config.json has no place for what the adapter brings.",
    "Nothing need be done; --labels names the labels, --architecture another class.",
    since="0.2.0",
)
HEAD_MODULE_MISSING = Rule(
    "V571",
    WARNING,
    "the class of the merged model needs a module that neither base nor adapter stores",
    "A loader fills the module with random values, as happened when the adapter was loaded.",
    "Train with the module in modules_to_save, or start from a base that stores the module.",
    since="0.2.0",
)
HEAD_WITHOUT_PADDING = Rule(
    "V572",
    NOTE,
    "a classifier by last token has no padding token in its config",
    "transformers refuses to classify more than one text at a time without pad_token_id.",
    "Put the tokenizer of the training beside the adapter, or set pad_token_id in config.json.",
    since="0.2.0",
)
TRAINED_NOT_MERGED = Rule(
    "V573",
    WARNING,
    "weights beside the adapter are not merged",
    "No PEFT reads the file, so nothing says what its tensors change. If it was trained, the "
    "merged model lacks what it learned there.",
    "Add the file's tensors with the program that wrote the file, or copy the file yourself.",
    since="0.2.0",
)
REPLACED_BY_CONSTANT = Rule(
    "V574",
    WARNING,
    "the adapter replaces a tensor of the base by a single value",
    "A head, an embedding or a bias whose values are all the same was zeroed, not trained.",
    "Look where the adapter comes from; remove the tensor from the adapter to keep the base's own.",
    since="0.2.0",
)
FILE_NOT_FETCHED = Rule(
    "V575",
    WARNING,
    "a file of the merged model stayed on the Hub",
    "Beside an adapter's weights only files of up to 10 MB are fetched, and a tokenizer of up to "
    "100 MB. Without the file the merged model is not the one that was trained.",
    "Download the adapter with `hf download`, and merge from that folder.",
    since="0.2.0",
)

MERGED_WEIGHT_WRONG = Rule(
    "V601",
    ERROR,
    "a merged weight is not the base's plus the adapter's delta",
    "The model is not the base with this adapter: its outputs differ from those of training.",
    "Merge again, with this adapter on this base.",
    since="0.1.0",
)
MERGED_TENSOR_CHANGED = Rule(
    "V602",
    ERROR,
    "a tensor of the merged model differs from the one that it is a copy of",
    "A merge copies what no adapter adds to: from the base, or from the adapter that replaces it.",
    "Merge again; if the base was changed on purpose, pass the changed one with --base.",
    since="0.1.0",
)
MERGED_TENSOR_MISSING = Rule(
    "V603",
    ERROR,
    "a tensor is missing in the merged model",
    "A loader would fill it with random values.",
    "Merge again, or save the model with all of its tensors.",
    since="0.1.0",
)
MERGED_TENSOR_UNKNOWN = Rule(
    "V604",
    ERROR,
    "the merged model has a tensor too many",
    "A loader that knows its name uses it; nothing says what it should hold.",
    "Merge again into an empty folder.",
    since="0.1.0",
)
MERGED_TENSOR_FORM = Rule(
    "V605",
    ERROR,
    "a tensor of the merged model has another dtype or shape than it should have",
    "Its values were rounded otherwise than it was asked for, or are those of another tensor.",
    "Say with --dtype what the merge was to write, or merge again.",
    since="0.1.0",
)
MERGED_TIE = Rule(
    "V606",
    ERROR,
    "the merged model's config ties head and embedding otherwise than it should",
    "A loader makes one tensor of the two, or two of one.",
    "Say with --tied what the merge was to do, or merge again.",
    since="0.1.0",
)
PROVENANCE_MALFORMED = Rule(
    "V607",
    ERROR,
    "the provenance of the merged model cannot be understood",
    "The options of the merge are read from it, and are not guessed where it was edited.",
    "Restore the file, or remove it and give the options of the merge.",
    since="0.1.0",
)
PROVENANCE_MISSING = Rule(
    "V608",
    WARNING,
    "the merged model has no provenance",
    "Nothing says with which options it was merged, so the usual ones are taken.",
    "Give the options that it was merged with where they were others.",
    since="0.1.0",
)
OTHER_ADAPTER_MERGED = Rule(
    "V609",
    WARNING,
    "the adapter is not, byte for byte, one that was merged",
    "The provenance records another config or header; another form of the same adapter has others.",
    "Nothing need be done where it is the same adapter stripped, embedded or migrated.",
    since="0.1.0",
)
OTHER_BASE_MERGED = Rule(
    "V610",
    WARNING,
    "the base is not the one that was merged",
    "The provenance records files of another size or with another header.",
    "Pass the base that the model was merged from, if it is not the same in another form.",
    since="0.1.0",
)
MODEL_DIFFERS = Rule(
    "V611",
    ERROR,
    "the merged model computes otherwise than the base with the adapter",
    "Weights alone do not make a model: config and tied tensors decide as well.",
    "Merge again, and load the result with the class that the adapter was trained in.",
    since="0.1.0",
)
LOADED_INSTEAD = Rule(
    "V612",
    ERROR,
    "a loader would take another file than the merged weights",
    "What loads is not what was verified, and may be the base without the adapter.",
    "Remove what is named, or save the merged model in an empty folder.",
    since="0.1.0",
)
ADAPTER_IN_MERGED = Rule(
    "V613",
    ERROR,
    "an adapter lies in the merged model's folder",
    "transformers adds it to what it loads, so a delta would be there twice, or another one.",
    "Remove adapter_config.json and the adapter's weights from the folder.",
    since="0.1.0",
)
MERGED_IS_ADAPTER = Rule(
    "V614",
    ERROR,
    "what is given as the merged model is an adapter",
    "An adapter holds changes to a model, not the model.",
    "Pass the model that was made with it; another form of an adapter is given with --adapter.",
    since="0.1.0",
)
MERGED_CONFIG_DIFFERS = Rule(
    "V615",
    ERROR,
    "the merged model's config.json makes another model of its weights than the base's",
    "A merge changes dtype, tie and quantizer in it alone. The same weights now compute otherwise.",
    "Put the base's config.json there, with the merged model's dtype, or merge again.",
    since="0.1.0",
)
MERGED_CONFIG_RESAVED = Rule(
    "V616",
    WARNING,
    "the merged model's config.json has other fields than the base's",
    "transformers writes and leaves out fields when it saves a model; these need not change it.",
    "Look at the fields that are named, or put the base's config.json there.",
    since="0.1.0",
)
MODEL_SHOWS_NOTHING = Rule(
    "V617",
    ERROR,
    "running the model shows nothing, and its weights are the base's",
    "What a merge without effect would pass as well proves no merge.",
    "Take sequences for which the adapter was trained with --text, or train it further.",
    since="0.1.0",
)
MODEL_SHOWS_LITTLE = Rule(
    "V618",
    WARNING,
    "running the model cannot show the adapter; its weights are right",
    "Every weight is the base's with the delta, but the whole model could not confirm it.",
    "If its effect is small, take text like that of its training with --text, or --layers-only.",
    since="0.1.0",
)
MERGED_BUFFER = Rule(
    "V619",
    NOTE,
    "a buffer that a loader makes itself is stored in one of base and merged model alone",
    "Versions of transformers differ in which of these they save; none of them reads them.",
    "Nothing need be done.",
    since="0.1.0",
)
FORM_TENSOR_DIFFERS = Rule(
    "V620",
    ERROR,
    "a trained tensor is not the same in both forms of the adapter",
    "A conversion copies vectors, heads and biases byte for byte.",
    "Convert the adapter again.",
    since="0.1.0",
)
FORM_TENSOR_MISSING = Rule(
    "V621",
    ERROR,
    "a trained tensor is in one form of the adapter alone",
    "A conversion carries every tensor but A and B.",
    "Convert the adapter again.",
    since="0.1.0",
)
FORM_CONFIG_DIFFERS = Rule(
    "V622",
    ERROR,
    "the two forms of the adapter are configured differently",
    "Another layer would be adapted, another base loaded, or other matrices drawn.",
    "Convert the adapter again.",
    since="0.1.0",
)
FORM_PROJECTIONS_DIFFER = Rule(
    "V623",
    ERROR,
    "the two forms of the adapter have different A and B in effect",
    "The delta of every layer is another.",
    "Convert the adapter again; name the base with --base where A and B are drawn.",
    since="0.1.0",
)
FORM_PROJECTIONS_DEPEND = Rule(
    "V624",
    WARNING,
    "PEFT does not use the same A and B for both forms on every base",
    "It draws what is not stored, and rounds that to the dtype that the base is loaded in.",
    "Load both on a base of a dtype for which they agree, or embed the stripped one.",
    since="0.1.0",
)
MERGED_TENSOR_WIDER = Rule(
    "V630",
    WARNING,
    "tensors of the merged model are of a wider dtype than the base's",
    "Their values are right in that dtype; some models keep layers in float32 when they are saved.",
    "Nothing need be done; say with --dtype what the merge was to write, to have it demanded.",
    since="0.1.0",
)
MERGED_OTHER_WEIGHTS = Rule(
    "V631",
    WARNING,
    "weights in another form lie beside those of the merged model",
    "They are not compared. Whoever asks a loader for that form gets what they hold.",
    "Remove them, unless they were made from the merged model.",
    since="0.1.0",
)

# --- V7: LoRA ------------------------------------------------------------------------------------

LORA_RANK_TOO_HIGH = Rule(
    "V701",
    ERROR,
    "the rank of the LoRA is higher than the engine serves",
    "The engine would refuse the adapter when its server starts.",
    "Give --rank or --max-error for the best LoRA of a lower rank, or merge the adapter.",
    since="0.2.0",
)
LORA_HEAD_REFUSED = Rule(
    "V702",
    ERROR,
    "the engine does not load a module that was trained whole",
    "The engine would refuse the adapter, or answer with the base's own module.",
    "Merge the adapter, or leave the module out with --drop-head.",
    since="0.2.0",
)
LORA_BIAS_REFUSED = Rule(
    "V703",
    ERROR,
    "the engine does not load trained biases",
    "The engine would refuse the adapter, or answer with the base's own biases.",
    "Merge the adapter, or leave the biases out with --drop-head.",
    since="0.2.0",
)
LORA_LAYERS_MISSING = Rule(
    "V704",
    ERROR,
    "the engine needs a LoRA of a layer that the adapter does not have",
    "The engine would fail, or silently leave out the adapted layers of this kind.",
    "Write a LoRA of zeros for such layers with --fill-layers.",
    since="0.2.0",
)
LORA_NAME_UNKNOWN = Rule(
    "V705",
    ERROR,
    "the engine does not know a layer of the adapter",
    "The engine would serve the base as if the layer had not been trained.",
    "Merge the adapter and serve the merged model.",
    since="0.2.0",
)
LORA_OVERFLOW = Rule(
    "V706",
    ERROR,
    "a value is too large for the dtype of the LoRA",
    "The value would be stored as infinity, and the layer's output would be NaN.",
    "Give --dtype bfloat16, which has larger exponents, or --dtype float32.",
    since="0.2.0",
)
LORA_ERROR_LARGE = Rule(
    "V707",
    ERROR,
    "a LoRA of this rank loses more than half of a layer's delta",
    "The adapter would no longer do what it was trained for.",
    "Give a higher --rank, or leave the option out for the exact LoRA; --accept-error writes it.",
    since="0.2.0",
)
LORA_HEAD_LEFT_OUT = Rule(
    "V708",
    WARNING,
    "trained modules or biases are left out of the LoRA",
    "The base's own tensors take their place, so the outputs differ from the trained model's.",
    "Leave --drop-head out to keep the tensors, or merge the adapter.",
    since="0.2.0",
)
LORA_HEAD_ELSEWHERE = Rule(
    "V709",
    WARNING,
    "other engines than PEFT refuse this LoRA",
    "Modules and biases that were trained whole are no part of a LoRA for these engines.",
    "Nothing need be done for PEFT; name another engine with --for to see if the engine takes it.",
    since="0.2.0",
)
LORA_RANK_SLOW = Rule(
    "V710",
    WARNING,
    "the rank of the LoRA is higher than the engine's fast kernels take",
    "The engine serves the adapter, but slowly.",
    "Give --rank or --max-error for a LoRA of a lower rank, or merge the adapter.",
    since="0.2.0",
)
LORA_VANISHED = Rule(
    "V711",
    WARNING,
    "values of the LoRA are too small for float16 and become 0",
    "float16 has few exponents; the stated error includes these values.",
    "Give --dtype bfloat16, which has smaller exponents, or --dtype float32.",
    since="0.2.0",
)

LORA_UNREADABLE = Rule(
    "V720",
    ERROR,
    "a folder holds no LoRA that can be compared",
    "The factors of each layer and their scaling must be known to compare their product.",
    "Give a folder with adapter_config.json and adapter_model.safetensors of a plain LoRA.",
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
