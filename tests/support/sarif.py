"""A strict schema for the part of SARIF 2.1.0 that this package writes.

The schema was written by hand from the standard. The license of the public schema forbids a copy
here, and the public schema is less strict.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "minLength": 1}
INDEX: Schema = {"type": "integer", "minimum": 0}
LEVEL: Schema = {"enum": ["error", "warning", "note"]}


def record(**fields: Schema) -> Schema:
    """Return the schema of an object that has all of these properties and no others."""
    return {
        "type": "object",
        "properties": fields,
        "required": [*fields],
        "additionalProperties": False,
    }


def list_of(items: Schema, **limits: Any) -> Schema:
    return {"type": "array", "items": items, **limits}


MESSAGE = record(text=TEXT)
RULE = record(
    id={"type": "string", "pattern": "^V[0-9]{3}$"},
    name=TEXT,
    shortDescription=MESSAGE,
    fullDescription=MESSAGE,
    help=MESSAGE,
    defaultConfiguration=record(level=LEVEL),
    properties=record(since=TEXT),
)
# RFC 3986: a URI percent-encodes every other character; a path must not look like a scheme.
URI: Schema = {
    "type": "string",
    "pattern": r"^(?:(?:file|hf)://)?(?:[A-Za-z0-9._~/:@-]|%[0-9A-F]{2})+$",
    "not": {"pattern": r"^(?!file://|hf://)[^/]*:"},
}
LOCATION = record(
    physicalLocation=record(
        artifactLocation=record(uri=URI),
        region=record(startLine={"type": "integer", "minimum": 1}),
    ),
    logicalLocations=list_of(record(fullyQualifiedName=TEXT), minItems=1, maxItems=1),
)
RESULT = record(
    ruleId=TEXT,
    ruleIndex=INDEX,
    level=LEVEL,
    message=MESSAGE,
    locations=list_of(LOCATION, minItems=1, maxItems=1),
    partialFingerprints=record(
        primaryLocationLineHash={"type": "string", "pattern": "^[0-9a-f]{32}:[1-9][0-9]*$"}
    ),
)
INVOCATION = record(
    executionSuccessful={"type": "boolean"},
    exitCode={"type": "integer"},
    toolExecutionNotifications=list_of(record(level=LEVEL, message=MESSAGE)),
)
RUN = record(
    tool=record(
        driver=record(
            name={"const": "vera-convert"},
            version=TEXT,
            rules=list_of(RULE, uniqueItems=True),
        )
    ),
    invocations=list_of(INVOCATION, minItems=1, maxItems=1),
    columnKind={"const": "unicodeCodePoints"},
    results=list_of(RESULT),
)
SARIF: Schema = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    **record(
        **{
            "$schema": {"type": "string", "pattern": "^https://.*sarif.*2[.]1[.]0.*[.]json$"},
            "version": {"const": "2.1.0"},
            "runs": list_of(RUN, minItems=1, maxItems=1),
        }
    ),
}
