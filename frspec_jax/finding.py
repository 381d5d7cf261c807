"""What `frspec doctor` says of one thing: how it stands, and what would mend it."""

from __future__ import annotations

import dataclasses

from frspec_jax.entry import spelled

GOOD, NOTE, BAD = "ok", "note", "mend"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line: how it stands, of what, and what to do about it."""

    state: str  # ok, note (nothing to do, but worth knowing) or mend
    what: str
    found: str
    mend: str = ""

    def __str__(self) -> str:
        line = f"{self.state:<5}{self.what:<14}{self.found}"
        return spelled(f"{line}\n     {'':<14}-> {self.mend}" if self.mend else line)
