"""Ignore the warnings that PEFT, transformers and torch raise in correct use."""

from __future__ import annotations

import pytest

OF_PEFT = pytest.mark.filterwarnings(
    "ignore:Specified to not (load|save) vera_A and vera_B:UserWarning",
    "ignore:fan_in_fan_out is set to:UserWarning",
    "ignore:Model (with|has) `tie_word_embeddings=True`:UserWarning",
    "ignore:Input and output embeddings are no longer tied after merging:UserWarning",
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",
    # PEFT uses a name of transformers that transformers 5.24 is about to drop.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
)

OF_TORCH = pytest.mark.filterwarnings(
    # torch 2.4 and 2.5 raise these warnings about their own calls.
    "ignore:You are using `torch.load` with `weights_only=False`:FutureWarning",
    "ignore:`torch.cpu.amp.autocast.* is deprecated:FutureWarning",
)
