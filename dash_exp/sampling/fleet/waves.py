"""A batch asked for in waves, so that its groups finish one after the other."""

from __future__ import annotations

import math


def groups_at_once(prompts: int, waves: int, servers: int) -> int | None:
    """As many completions as how many of `prompts` groups have are on their way at a time: those of a wave,
    but one for every server at least, for none idles while there is work. None: all of them."""
    return max(math.ceil(prompts / waves), servers) if waves > 1 else None
