"""The model card names the inputs of a merge; no name can break the card's Markdown."""

from __future__ import annotations

from pathlib import Path

from vera_convert._version import __version__
from vera_convert.hub.lookup import Location
from vera_convert.merging.output import model_card

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_card_names_repos_with_their_commits() -> None:
    base = Location("base", None, "org/base", COMMIT)
    adapters = [
        (Location("one", None, "org/one", COMMIT, "sub"), 1.0),
        (Location("two", Path("/folders/two")), -0.5),
    ]
    assert (
        model_card(base, adapters, library="transformers")
        == f"""\
---
base_model: "org/base"
base_model_relation: finetune
library_name: transformers
tags:
- vera
- merged
---

# Merged model

The weights of the base plus those of the VeRA adapters, each sum rounded once to
the type of its tensor. Made by vera-convert {__version__}; `merge-provenance.json`
beside this card names every input, option and change.

| | name | revision | weight |
| --- | --- | --- | --- |
| Base | `org/base` | `{COMMIT}` |  |
| Adapter | `org/one/sub` | `{COMMIT}` | 1.0 |
| Adapter | `two` |  | -0.5 |
"""
    )


def test_a_card_names_no_local_folder_as_the_base() -> None:
    adapters = [(Location("adapter", Path("/adapter")), 1.0)]
    base = Location("llama", Path("/bases/llama"))
    card = model_card(base, adapters, library="diffusers")
    assert "base_model" not in card
    assert "base_model" not in model_card(base, adapters, library="x", trained_on="./llama")
    named = model_card(base, adapters, library="diffusers", trained_on="org/llama")
    assert 'base_model: "org/llama"\n' in named
    assert "| Base | `llama` |" in named


def test_no_name_breaks_the_markdown_of_the_card() -> None:
    odd = Location("odd", None, 'a`b|c\n---\nx: "\u202e')
    card = model_card(odd, [(odd, 1.0)], library="transformers")
    (line, _) = [line for line in card.splitlines() if "a'b" in line]
    assert line == "| Base | `a'b\\|c\\n---\\nx: \"\\u202e` |  |  |"
