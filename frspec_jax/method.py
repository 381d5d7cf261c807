"""What a way of decoding is called: in records ("eagle+fr+copying"), and in tables ("FR-Spec 12,288 + copying")."""

from __future__ import annotations

import dataclasses

from frspec_jax import drafters


@dataclasses.dataclass(frozen=True)
class Method:
    """A way of decoding. `Method()` is vanilla."""

    kind: str | None = None  # of draft, as its config.json names it; None: nothing drafts
    cropped: bool = False  # to a sub-vocabulary: FR-Spec
    copying: bool = False
    lossy: bool = False  # typical acceptance

    @classmethod
    def parse(cls, name: str) -> Method:
        """The method of a `name`."""
        kind, *more = name.removesuffix(", lossy").split("+")
        return cls(None if kind == "vanilla" else kind, "fr" in more, "copying" in more, lossy=name.endswith(", lossy"))

    @property
    def name(self) -> str:
        """The method in a word, as results and records have it."""
        parts = [self.kind or "vanilla", *["fr"] * self.cropped, *["copying"] * self.copying]
        return "+".join(parts) + ", lossy" * self.lossy

    @property
    def title(self) -> str:
        """The usual name of what drafts, whatever its vocabulary: "EAGLE-2"."""
        return "vanilla" if self.kind is None else drafters.spec_class(self.kind).title

    def label(self, vocab: int | None) -> str:
        """What tables call the method where it may propose `vocab` tokens."""
        label = self.title
        if self.cropped:
            label = f"FR-Spec {vocab:,}" if self.kind == "eagle" else f"{label} + FR {vocab:,}"
        return label + " + copying" * self.copying
