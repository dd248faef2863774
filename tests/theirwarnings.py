"""What PEFT and transformers warn of where a test uses them as they are meant to be used."""

from __future__ import annotations

import pytest

OF_PEFT = pytest.mark.filterwarnings(
    "ignore:Specified to not (load|save) vera_A and vera_B:UserWarning",
    "ignore:fan_in_fan_out is set to:UserWarning",
    "ignore:Model (with|has) `tie_word_embeddings=True`:UserWarning",
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",
    # PEFT asks transformers by a name that transformers 5.24 is about to drop.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
)
