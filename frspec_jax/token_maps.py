"""Published token maps: the ids of a vocabulary by frequency, most frequent first, without counts.

What FR-Spec and SGLang pass round (`freq_32768.pt`), as torch or pickle stores it, as JSON, as text, or as a tensor of
safetensors or numpy. And the maps of EAGLE-3 drafts, which SGLang reads for such a draft in their place: `d2t` (what is
added to a row's number to have its id) or `t2d` (which ids have a row), out of a file that holds them under these
names, or is called so. They name ids too, but in no order.
A map may stand among the tensors of a draft (vLLM's `token_map`).
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from frspec_jax.errors import UserError, quoted

MAPS = ("token_map", "d2t", "t2d")  # how maps are called in files that hold several tensors
MEND = "give a list of token ids, most frequent first, or count a ranking with python -m train rank"


def is_map(path: Path) -> bool:
    """Whether a file is one by its name; a ranking with counts is an .npz file."""
    return path.suffix in READERS


@dataclasses.dataclass(frozen=True, eq=False)
class TokenMap:
    """The ids of a token map."""

    ids: np.ndarray  # [M] int32, M at most V, each once; of an id that stands there twice the first place counts
    ordered: bool  # most frequent first; else a set, in the order of the ids


def read_map(path: Path, vocab_size: int) -> TokenMap:
    """A token map out of a file.

    Raises:
      UserError: the file is missing or damaged, holds something else, or an id outside the vocabulary; or it is torch's
        and torch is missing.
    """
    try:
        found = READERS[path.suffix](path)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{quoted(path)} is no file; {MEND}") from None
    except Exception as error:  # every format has its own kinds for a file that is cut short or of another make
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{quoted(path)} is no ranking or is damaged ({reason[:200]}); {MEND}") from None
    ids, ordered = _ids(found, path.stem)
    if ids is None or not ids.size:
        raise UserError(f"{quoted(path)} is no ranking or is damaged (it holds no list of whole numbers); {MEND}")
    if ids.min() < 0 or ids.max() >= vocab_size:
        outside = ids[(ids < 0) | (ids >= vocab_size)][0]
        raise UserError(
            f"{quoted(path)} names the id {outside}, outside the checkpoint's vocabulary of {vocab_size:,} ids; "
            "give the map of its own tokenizer"
        )
    return TokenMap(ids[np.sort(np.unique(ids, return_index=True)[1])].astype(np.int32), ordered)


def write_map(path: Path, ids: np.ndarray) -> None:
    """Write ids [M], most frequent first, in the form that the file's name says (`FORMS`).

    Raises:
      UserError: the form is torch's, and torch is missing.
    """
    WRITERS[path.suffix](path, [int(number) for number in ids])


def _ids(found: Any, stem: str) -> tuple[np.ndarray | None, bool]:
    """The ids of what a file called `stem` holds (None: it holds none), and whether they are in an order."""
    named = {stem: found} if not isinstance(found, dict) else found
    if (offsets := _numbers(named.get("d2t"))) is not None:
        return offsets + np.arange(len(offsets)), False
    if (listed := _numbers(named.get("token_map"))) is not None:
        return listed, True
    mask = named.get("t2d")
    if mask is not None and np.asarray(mask).ndim == 1:
        return np.flatnonzero(np.asarray(mask)), False
    return _numbers(found), True


def _numbers(found: Any) -> np.ndarray | None:
    """A list, or an array or tensor of one axis, as integers; what stands alone in an object counts as the object."""
    if isinstance(found, dict) and len(found) == 1:
        found = next(iter(found.values()))
    if isinstance(found, list | tuple):
        found = [one.item() if getattr(one, "shape", None) == () else one for one in found]
        if not all(type(one) is int for one in found):
            return None
    elif not hasattr(found, "shape"):
        return None
    ids = np.asarray(found)
    return ids if ids.ndim == 1 and ids.dtype.kind in "iu" else None


class _PlainPickle(pickle.Unpickler):
    """Reads numbers, lists and objects; what would have to be imported, and could run code, is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise UserError(
            f"a pickle that asks for {module}.{name} could run anything; save the ids as a plain list, or as .json"
        )


def _read_pickle(path: Path) -> Any:
    """A pickled list of plain numbers, or a file of torch's, whose weights-only reader needs torch."""
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            file.seek(0)
            try:
                found = _PlainPickle(file).load()
            except UserError as error:
                raise UserError(f"{quoted(path)}: {error}") from None
            if not isinstance(found, int):  # the older of torch's two formats begins with a number that marks it
                return found
    try:
        import torch
    except ImportError:
        raise UserError(f"reading {quoted(path)} needs torch; run: pip install torch") from None
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_text(path: Path) -> list[int]:
    return [int(word) for word in path.read_text("utf-8-sig").replace(",", " ").split()]


def _read_safetensors(path: Path) -> Any:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        names = list(file.keys())
        # Out of a whole draft, whose weights are no ids and may be of a kind that numpy does not know.
        wanted = [name for name in names if name.rpartition(".")[2] in MAPS] or names
        return {name.rpartition(".")[2]: file.get_tensor(name) for name in wanted}


def _write_torch(path: Path, ids: list[int]) -> None:
    try:
        import torch
    except ImportError:
        raise UserError(f"{path.name} is a file of torch's; run: pip install torch, or choose another --map") from None
    torch.save(ids, path)


def _write_safetensors(path: Path, ids: list[int]) -> None:
    from safetensors.numpy import save

    path.write_bytes(save({"token_map": np.asarray(ids, np.int64)}))


WRITERS: dict[str, Callable[[Path, list[int]], Any]] = {
    ".pt": _write_torch,
    ".json": lambda path, ids: path.write_text(json.dumps(ids) + "\n"),
    ".txt": lambda path, ids: path.write_text("".join(f"{number}\n" for number in ids)),
    ".npy": lambda path, ids: np.save(path, np.asarray(ids, np.int64), allow_pickle=False),
    ".safetensors": _write_safetensors,
}
FORMS = tuple(suffix[1:] for suffix in WRITERS)  # that maps are written in; more are read

READERS: dict[str, Callable[[Path], Any]] = {
    ".json": lambda path: json.loads(path.read_text("utf-8-sig")),
    ".npy": lambda path: np.load(path, allow_pickle=False),
    ".safetensors": _read_safetensors,
    ".txt": _read_text,
    **dict.fromkeys((".bin", ".pickle", ".pkl", ".pt", ".pth"), _read_pickle),
}
