# The public names of the library: the one list, which `vera_convert` itself reads too.

from vera_convert._version import __version__ as __version__
from vera_convert.base.facts import BaseOptions as BaseOptions
from vera_convert.conversion.migration import Mode as Mode
from vera_convert.conversion.migration import TreeMigration as TreeMigration
from vera_convert.conversion.migration import migrate as migrate
from vera_convert.conversion.migration import migrate_tree as migrate_tree
from vera_convert.conversion.projections import ProjectionSource as ProjectionSource
from vera_convert.conversion.regeneration import Regenerated as Regenerated
from vera_convert.conversion.regeneration import regenerate as regenerate
from vera_convert.conversion.regeneration import regenerate_for as regenerate_for
from vera_convert.conversion.strip_embed import embed as embed
from vera_convert.conversion.strip_embed import strip as strip
from vera_convert.conversion.work import Conversion as Conversion
from vera_convert.counting import Count as Count
from vera_convert.counting import count as count
from vera_convert.draws.generator import Rounding as Rounding
from vera_convert.draws.generator import Variant as Variant
from vera_convert.errors import CheckpointError as CheckpointError
from vera_convert.errors import SurroundingsError as SurroundingsError
from vera_convert.errors import UsageError as UsageError
from vera_convert.errors import VeraConvertError as VeraConvertError
from vera_convert.hub.lookup import HubAccess as HubAccess
from vera_convert.lora.conversion import LoraConversion as LoraConversion
from vera_convert.lora.conversion import to_lora as to_lora
from vera_convert.lora.options import LoraOptions as LoraOptions
from vera_convert.merging.adapters import AdapterSpec as AdapterSpec
from vera_convert.merging.merge import Merge as Merge
from vera_convert.merging.merge import merge as merge
from vera_convert.merging.options import MergeOptions as MergeOptions
from vera_convert.merging.options import Tied as Tied
from vera_convert.rules import Finding as Finding
from vera_convert.rules import Rule as Rule
from vera_convert.rules import Severity as Severity
from vera_convert.schemas import load_schema as load_schema
from vera_convert.schemas import schema_names as schema_names
from vera_convert.summary import AdapterInfo as AdapterInfo
from vera_convert.summary import info as info
from vera_convert.validation.result import Checked as Checked
from vera_convert.validation.result import Validation as Validation
from vera_convert.validation.validate import validate as validate
from vera_convert.verification.options import VerifyOptions as VerifyOptions
from vera_convert.verification.verify import Verification as Verification
from vera_convert.verification.verify import verify as verify

__all__: list[str]  # noqa: PYI035 -- the names above
