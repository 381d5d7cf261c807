"""How a draft is asked for, and what becomes of it: a drafter with its weights, a tree, and the method's name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np

from frspec_jax import pace_tables, tuned
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.config import CONTEXT_SLOTS, VANILLA, TreeConfig
from frspec_jax.defaults import defaults
from frspec_jax.drafters.base import NO_WEIGHTS, Drafter, DraftSpec, DraftWeights, Target, Vanilla
from frspec_jax.errors import UserError, quoted
from frspec_jax.method import Method
from frspec_jax.pace import Pace
from frspec_jax.vocabulary import Ranking, control_ids, reach_of, sub_vocabulary, tokenizer_hash
from pallas_kernels.dispatch import AUTO, Kernels

MOST_SLOTS = 1 << 16  # more would be a vocabulary


@dataclasses.dataclass(frozen=True)
class Draft:
    """What drafts and how: what `load` takes, what flags make, and what `python -m eval tune` searches."""

    name: str | None = None  # a draft's name or folder, "none" for vanilla decoding; None: the default one
    # V', "full", or a share such as "1/4". None: what `eval tune` found best on this device, or with a ranking
    # what suits (`usual_vocab`): a quarter of the vocabulary, and with slots a sixteenth.
    vocab: int | str | None = None
    tree: TreeConfig | None = None  # None: what suits the pace
    # The file that sub-vocabularies are taken from, a ranking or a token map; None: the checkpoint's ranking.
    ranking: str | Path | None = None
    int8: bool = False  # round the draft's head: half the bytes of bfloat16, and the same text
    # Propose besides what followed the same tokens earlier in the text; None: where the pace is auto.
    copying: bool | None = None
    # "auto": each round drafts and verifies what pays (`frspec_jax.pace`). "fixed": the whole tree, as in the papers.
    # None: auto, but fixed where a tree is asked for.
    pace: Literal["auto", "fixed"] | None = None
    # M, so many ids of the text so far may be proposed besides V' (`frspec_jax.slots`); None: CONTEXT_SLOTS where the
    # pace is auto and the draft can have them, and none where it is fixed.
    context_slots: int | None = None

    def __post_init__(self) -> None:
        if self.pace not in (None, "auto", "fixed"):
            raise UserError(f"--pace {self.pace} must be auto or fixed")
        slots = self.context_slots
        if slots is not None and (
            isinstance(slots, bool) or not isinstance(slots, int) or not 0 <= slots <= MOST_SLOTS
        ):
            raise UserError(f"--context-slots {slots} must be a whole number from 0 (none) to {MOST_SLOTS}")

    @property
    def paced(self) -> bool:
        """Whether rounds differ by what pays."""
        return self.pace == "auto" or (self.pace is None and self.tree is None)

    @property
    def copies(self) -> bool:
        """Whether what stands in the text is proposed."""
        return self.paced if self.copying is None else self.copying

    @property
    def off(self) -> bool:
        """Whether nothing is to draft."""
        return self.name == "none"


NO_DRAFT = Draft("none")


@dataclasses.dataclass(frozen=True)
class Drafting:
    """What proposes for a model, and what that is called."""

    drafter: Drafter
    tree: TreeConfig
    method: Method
    vocab: int | None = None  # V'; None where nothing drafts
    folder: Path | None = None  # the draft's
    pace: Pace | None = None  # None: fixed
    odds: pace_tables.Fitted = pace_tables.DEFAULT  # that a pace goes by


NOT_DRAFTING = Drafting(Vanilla(), VANILLA, Method())


def draft_folder(checkpoint: Checkpoint, draft: Draft) -> Path | None:
    """The folder of the draft that is asked for; None: vanilla decoding.

    Raises:
      UserError: it is not there, or something is asked of a draft where there is none.
    """
    folder = None if draft.off else checkpoint.draft_folder(draft.name)
    if folder is not None:
        return folder
    why = 'draft "none" asks for none' if draft.off else f"{quoted(checkpoint.path)} has none"
    if draft.copying and not draft.paced:
        raise UserError(f"--copying on with a fixed pace needs a draft, and {why}; say --pace auto, or add one")
    if draft.vocab is not None:
        raise UserError(f"--draft-vocab {draft.vocab} needs a draft, and {why}; drop the flag or add one")
    if draft.context_slots:
        raise UserError(f"--context-slots {draft.context_slots} needs a draft, and {why}; drop the flag or add one")
    return None


def assembled(
    checkpoint: Checkpoint, target: Target, draft: Draft, kernels: Kernels = AUTO
) -> tuple[Drafting, DraftWeights]:
    """A draft, read and joined to its target.

    Raises:
      UserError: with one sentence that says what to mend.
    """
    folder = draft_folder(checkpoint, draft)
    dtype = target.params.embedding.dtype
    asked, copies = draft.vocab is not None, draft.copies
    if folder is None:
        return looking_up(draft, dtype) if draft.copying and draft.paced else NOT_DRAFTING, NO_WEIGHTS
    pace = pace_of(draft, dtype)
    draft = preferred(checkpoint, folder, draft, dtype)
    if draft.tree == VANILLA:
        return NOT_DRAFTING, NO_WEIGHTS
    spec, params = checkpoint.draft(folder, dtype)
    if not spec.crops:
        if asked and draft.vocab != "full":
            raise UserError(
                f"--draft-vocab {draft.vocab}: a draft of kind {spec.kind} has no head to crop; "
                "drop the flag, or say full"
            )
        draft = dataclasses.replace(draft, vocab="full")
    if draft.context_slots is None:
        draft = dataclasses.replace(draft, context_slots=CONTEXT_SLOTS if draft.paced and spec.in_context else 0)
    known = spec.vocabulary(params)
    ids = draft_ids(checkpoint, draft, known, at_most=not asked)
    assert draft.tree is not None
    if draft.tree.top_k > len(ids):
        raise UserError(f"--draft-top-k {draft.tree.top_k} is larger than --draft-vocab {len(ids)}; lower it")
    whole = checkpoint.config.vocab_size if known is None else len(known)
    slots = slots_of(draft, spec, whole - len(ids))
    method = Method(spec.kind, len(ids) < whole, copies, pace is not None, slots=slots)
    # With a pace, what is looked up is a chain of its own, whichever kind drafts.
    joined: DraftSpec = spec.copies(copies and pace is None)
    drafter, weights = joined.assemble(target, params, ids, kernels=kernels, int8=draft.int8, slots=slots)
    if pace is None:
        return Drafting(drafter, spec.fit(draft.tree), method, len(ids), folder), weights
    pace, odds = spec.fit_pace(pace, len(ids)), pace_tables.read_odds(folder)
    return Drafting(drafter, draft.tree, method, len(ids), folder, pace, odds), weights


def slots_of(draft: Draft, spec: DraftSpec, beyond: int) -> int:
    """M, for a draft whose sub-vocabulary leaves `beyond` ids out: more slots than that would stay empty."""
    asked = draft.context_slots
    if asked and not spec.in_context:
        raise UserError(
            f"--context-slots {asked}: a draft of kind {spec.kind} has no slots; "
            "drop the flag, or give an EAGLE-2 or EAGLE-3 draft"
        )
    return min(asked or 0, beyond)


def pace_of(draft: Draft, dtype: Any) -> Pace | None:
    """What rounds may choose from, within the tree that is asked for; None: they choose nothing."""
    if not draft.paced:
        return None
    best = defaults(dtype)
    pace = dataclasses.replace(best.pace, lookup=draft.copies)
    if draft.tree is None or draft.tree == best.paced:
        return pace
    tree = draft.tree
    if tree == VANILLA:
        raise UserError("--pace auto needs a tree to choose from; drop --tree-size 1, or say --draft none")
    sizes = (*(size for size in pace.sizes if size < tree.size), tree.size)
    growth = dataclasses.replace(pace.growth, size=2, depth=min(tree.depth, pace.growth.depth))
    return dataclasses.replace(pace, sizes=sizes, growth=growth).with_beams(tree.top_k)


def looking_up(draft: Draft, dtype: Any) -> Drafting:
    """No draft but what stands in the text already."""
    pace = pace_of(draft, dtype)
    assert pace is not None
    tree = draft.tree or defaults(dtype).paced
    return Drafting(Vanilla(), tree, Method(copying=True, paced=True), pace=pace)


def preferred(checkpoint: Checkpoint, folder: Path, draft: Draft, dtype: Any) -> Draft:
    """The draft with a pace and a tree, and with V' where `eval tune` found one: what is not asked for is chosen.

    Of a draft that was tuned here its setting is taken, where there is a ranking to take V' from; else what suits
    the device.
    """
    setting = tuned.read(folder, dtype)
    vocab, tree = draft.vocab, draft.tree
    if vocab is None and setting is not None and ranking_file(checkpoint, draft).is_file():
        vocab = setting.draft_vocab
    if tree is None and draft.paced:
        tree = defaults(dtype).paced
    if tree is None:
        # A setting of no tree says that drafting does not pay here; who asks for a part of it still gets a draft.
        asks = draft.vocab is not None or draft.copies
        usual = setting is None or (setting.tree == VANILLA and asks)
        tree = defaults(dtype).tree if setting is None or usual else setting.tree
    return dataclasses.replace(draft, vocab=vocab, tree=tree, pace="auto" if draft.paced else "fixed")


def preferred_tree(checkpoint: Checkpoint, draft: Draft, dtype: Any = None) -> TreeConfig:
    """The tree where none is asked for, of a draft in `dtype` (None: what suits the device)."""
    dtype = defaults().dtype if dtype is None else dtype
    folder = None if draft.off else checkpoint.draft_folder(draft.name)
    tree = None if folder is None else preferred(checkpoint, folder, draft, dtype).tree
    return tree or defaults(dtype).tree


def ranking_file(checkpoint: Checkpoint, draft: Draft) -> Path:
    """Where sub-vocabularies are taken from."""
    return checkpoint.path / "ranking.npz" if draft.ranking is None else Path(draft.ranking)


def draft_ids(
    checkpoint: Checkpoint, draft: Draft, known: np.ndarray | None = None, at_most: bool = False
) -> np.ndarray:
    """The ids [V'] int32 that the draft may propose.

    known: ids that a draft with a vocabulary of its own is limited to. V' then counts among them.
    at_most: of a token map that is shorter than V' take all, as is done where no V' is asked for.
    """
    vocab_size, file = checkpoint.config.vocab_size, ranking_file(checkpoint, draft)
    every = np.arange(vocab_size, dtype=np.int32) if known is None else known
    ranking = None if draft.ranking is None else _ranking(checkpoint, file)  # a file that is named has to be there
    vocab = draft.vocab
    if vocab is None:
        vocab, at_most = min(usual_vocab(vocab_size, draft), len(every)) if file.is_file() else "full", True
    if vocab == "full":
        return every
    size = vocab_of(vocab, vocab_size)
    if size != len(every) and ranking is None:
        if not file.is_file():
            raise UserError(
                f"--draft-vocab {size} needs a ranking, and {quoted(checkpoint.path)} has none; "
                f"count one: python -m train rank CORPUS --ckpt {quoted(checkpoint.path)}"
            )
        ranking = _ranking(checkpoint, file)
    if at_most and ranking is not None and size < len(every):
        size = min(size, reach_of(ranking, every))
    always = control_ids(checkpoint.tokenizer, checkpoint.stop_ids, vocab_size)
    return sub_vocabulary(ranking, size, vocab_size, always, known)


def usual_vocab(vocab_size: int, draft: Draft) -> int:
    """V' where none is asked for: a quarter of the vocabulary, and with slots, which bring what is lacking, less.

    A sixteenth and 512 slots accept what a half alone does (docs/vocabulary.md). Of a small vocabulary a sixteenth
    would be nothing.
    """
    quarter = vocab_size // 4
    return max(vocab_size // 16, min(1024, quarter)) if draft.context_slots else quarter


def _ranking(checkpoint: Checkpoint, file: Path) -> Ranking:
    return Ranking.read(file, tokenizer_hash(checkpoint.tokenizer), checkpoint.config.vocab_size)


def vocab_of(vocab: int | str, vocab_size: int) -> int:
    """V' of a number of tokens, or of a share of the vocabulary such as "1/4"."""
    share = str(vocab).removeprefix("1/") if str(vocab).startswith("1/") else None
    if isinstance(vocab, int) and not isinstance(vocab, bool):
        return vocab
    if share is not None and share.isdecimal() and int(share) > 0:
        return vocab_size // int(share)
    if isinstance(vocab, str) and vocab.isdecimal():
        return int(vocab)
    raise UserError(f"--draft-vocab {vocab!r} must be a number of tokens, full, or a share such as 1/4")
