"""Examples: a question and its gold answer. Torch-free."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Example:
    """A question with its gold answer (see `Prompt.answer`). `solution` is a worked one, if there is
    any: what SFT-H learns and the verifier is tried on. `first_test` is a code task's first assertion,
    which its prompt may show."""

    id: str
    problem: str
    answer: str
    solution: str = ""
    first_test: str = ""


@dataclass(frozen=True, slots=True)
class ExampleSet:
    """Examples in the order of their source, and a hash of all of them."""

    name: str
    examples: tuple[Example, ...]
    origin: str

    @property
    def content_hash(self) -> str:
        digest = hashlib.sha256()
        for e in self.examples:
            row = [e.id, e.problem, e.answer, e.solution, e.first_test]
            digest.update(json.dumps(row, ensure_ascii=False).encode())
        return digest.hexdigest()
