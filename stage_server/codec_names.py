"""What the codecs are called in run files and on the command line; imported without the rest by what starts fast."""

from __future__ import annotations

from typing import Literal

BackwardCodec = Literal["none", "bf16", "int8", "int4", "int2"]
ForwardCodec = Literal[BackwardCodec, "int4_token"]

CodecName = BackwardCodec
"""One name for both directions: all but those that only latents can have."""
