r"""A dataset loader and a prompt template:

python -m dash_exp debug=fast dataset=own dataset.kind=own_dataset:rows dataset.template=own_dataset:prompt \
    dataset.verifier=integer dataset.extraction=first_integer dataset.test_split=test
"""

from collections.abc import Iterator, Mapping
from typing import Any


def rows(split: str, options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Differences below `options.largest`; every fifth is for the test."""
    largest = int(options.get("largest", 9))
    for a in range(largest + 1):
        for b in range(a + 1):
            if ((a + b) % 5 == 0) == (split == "test"):
                yield {"id": f"{a}-{b}", "problem": f"{a}-{b}=", "answer": a - b, "level": a // 5}


def prompt(row: Mapping[str, Any]) -> str:
    """An example, then the problem. Chat messages, a list of role and content, are a prompt too."""
    return f"9-5=4\n{row['problem']}" if row["level"] else str(row["problem"])
