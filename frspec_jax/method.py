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
    paced: bool = False  # each round drafts and verifies what pays
    lossy: bool = False  # typical acceptance
    slots: int = 0  # M, ids of the text so far that may be proposed besides

    @classmethod
    def parse(cls, name: str) -> Method:
        """The method of a `name`."""
        kind, *more = name.removesuffix(", lossy").split("+")
        named = None if kind == "vanilla" else kind
        slots = sum(int(part.removeprefix("slots")) for part in more if part.startswith("slots"))
        return cls(named, "fr" in more, "copying" in more, "auto" in more, name.endswith(", lossy"), slots)

    @property
    def name(self) -> str:
        """The method in a word, as results and records have it."""
        parts = [self.kind or "vanilla", *["fr"] * self.cropped, *[f"slots{self.slots}"] * bool(self.slots)]
        parts += [*["copying"] * self.copying, *["auto"] * self.paced]
        return "+".join(parts) + ", lossy" * self.lossy

    @property
    def title(self) -> str:
        """The usual name of what drafts, whatever its vocabulary: "EAGLE-2"."""
        return "vanilla" if self.kind is None else drafters.spec_class(self.kind).title

    def label(self, vocab: int | None) -> str:
        """What tables call the method where it may propose `vocab` tokens."""
        if self.paced:
            return self._paced_label(vocab)
        label = self.title
        if self.cropped:
            label = f"FR-Spec {vocab:,}" if self.kind == "eagle" else f"{label} + FR {vocab:,}"
        if self.slots:
            label += f" + {self.slots:,} slots"
        return label + " + copying" * self.copying

    def _paced_label(self, vocab: int | None) -> str:
        """Copying goes without saying there, and its absence does not."""
        if self.kind is None:
            return "lookup alone, auto"
        label = dataclasses.replace(self, paced=False, copying=False).label(vocab)
        return f"{label}, auto" + " without copying" * (not self.copying)
