"""The checkpoint folder: everything about a target that a user points at with `--ckpt`.

CKPT/config.json             ModelConfig, and the format's version
CKPT/params/                 the weights (Orbax), in the layout of llama.LlamaParams
CKPT/tokenizer.json, tokenizer_config.json, chat_template.jinja, generation_config.json
CKPT/ranking.npz             token counts (vocabulary.Ranking)
CKPT/drafts/NAME/config.json, params/
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from frspec_jax import drafters, files, sharding
from frspec_jax.config import ModelConfig
from frspec_jax.drafters.base import NO_PARAMS, DraftParams, DraftSpec
from frspec_jax.errors import UserError, quoted, without_advice
from frspec_jax.files import orbax_refusals
from frspec_jax.llama import LlamaParams
from frspec_jax.shapes import model_shapes
from frspec_jax.stored_weights import load_params, opened, save_params

FORMAT = "frspec-jax 1"
DRAFT_FORMAT = "frspec-jax draft 1"
DEFAULT_DRAFT = "default"  # under drafts/: the name of the draft that stands for none being named
EAGLE_FORMAT = "frspec-jax eagle 1"  # what drafts said before there were kinds of them


# Writing -----------------------------------------------------------------------------------------


def fingerprint(params: LlamaParams) -> str:
    """A short name of a target's weights, by which a draft knows whose features it was trained on."""
    digest = hashlib.sha256()
    for array in (params.final_norm, params.embedding[:64]):
        digest.update(np.asarray(array, np.float32).tobytes())
    return digest.hexdigest()[:16]


def write_model(folder: Path, config: ModelConfig, params: LlamaParams) -> None:
    """Fill `folder` (of `new_folder`) with a target's config.json and weights; the tokenizer is the caller's."""
    data = {"format": FORMAT, "fingerprint": fingerprint(params), **config.to_json()}
    (folder / "config.json").write_text(json.dumps(data, indent=2) + "\n")
    save_params(folder / "params", params)


def write_draft(folder: Path, draft: DraftSpec, params: DraftParams, target: str, about: dict[str, Any]) -> None:
    """Fill `folder` (of `new_folder`) with a draft.

    params: its weights; a pytree without arrays is not written. target: the `fingerprint` of its target. about: facts
    for the reader (source, training).
    """
    config = {"format": DRAFT_FORMAT, "kind": draft.kind, "target": target, **draft.to_json(), "about": about}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if jax.tree.leaves(params):
        save_params(folder / "params", params)
    _keep_default(folder.parent)


def add_draft(checkpoint: Checkpoint, name: str, draft: DraftSpec, params: DraftParams = NO_PARAMS) -> Path:
    """Put a draft of one's own into a checkpoint, as CKPT/drafts/NAME; params: its weights, if it has some.

    Raises:
      UserError: no draft can be called so, there is one already, or the folder cannot be written.
    """
    check_draft_name(name)
    out = checkpoint.path / "drafts" / name
    with files.new_folder(out, "--name") as folder:
        write_draft(folder, draft, params, checkpoint.fingerprint, {"source": draft.kind})
    return out


def _draft_names(drafts: Path) -> list[str]:
    # A leading dot marks what is being written, or was left over by a process that was killed.
    every = drafts.iterdir() if drafts.is_dir() else ()
    return sorted(path.name for path in every if not path.name.startswith(".") and (path / "config.json").is_file())


def _keep_default(drafts: Path) -> None:
    """Where a checkpoint's second draft is being written, note which was its only one.

    So a command that names no draft goes on drafting with what it drafted with yesterday.
    """
    names, file = _draft_names(drafts), drafts / DEFAULT_DRAFT
    if drafts.name == "drafts" and len(names) == 1 and not file.exists():
        file.write_text(f"{names[0]}\n", "utf-8")


def amend_draft(folder: Path, draft: DraftSpec, about: dict[str, Any]) -> None:
    """Put another description of the same weights into a draft's config.json, whole or not at all.

    about: further facts for the reader.
    """
    file = folder / "config.json"
    data = json.loads(file.read_text())
    known = data.get("about")
    data |= {**draft.to_json(), "about": {**(known if isinstance(known, dict) else {}), **about}}
    files.write_json(file, data)


def check_draft_name(name: str, flag: str = "--name") -> None:
    """Refuse what cannot be a folder's name under drafts/, or what --draft could not choose.

    Raises:
      UserError: the sentence, with the flag.
    """
    if not name or name != Path(name).name or name.startswith(".") or not name.isprintable():
        raise UserError(f"{flag} {name} must be a plain name, without slashes or a leading dot")
    if name == "none":
        raise UserError(f"{flag} {name} would be no draft to --draft; choose another name")


# Reading -----------------------------------------------------------------------------------------


def _read_config(folder: Path, formats: tuple[str, ...], what: str) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        data = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{quoted(folder)} holds no config.json, so it is no {what}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{quoted(file)} cannot be read ({error}); convert it again") from None
    if not isinstance(data, dict) or data.get("format") not in formats:
        raise UserError(f"{quoted(file)} does not say format {formats[0]!r}, so {quoted(folder)} is no {what}")
    return data


@dataclasses.dataclass(frozen=True, repr=False)
class Checkpoint:
    """An opened checkpoint folder; the weights and the tokenizer are read when they are first asked for."""

    path: Path
    config: ModelConfig
    fingerprint: str

    def __repr__(self) -> str:
        model = f"{self.config.architecture}, {self.config.num_layers} layers, {self.config.vocab_size:,} tokens"
        return f"<Checkpoint {self.path}: {model}; drafts: {', '.join(self.draft_names) or 'none'}>"

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Open a checkpoint folder.

        Raises:
          UserError: the folder is missing, or is a Hugging Face or GGUF model that needs
            conversion (the message has the command), or is damaged.
        """
        path = Path(path)
        if path.suffix == ".gguf":
            out = quoted(path.stem)
            raise UserError(
                f"--ckpt {quoted(path)} is a GGUF file; run: python -m convert gguf {quoted(path)} --out {out}"
            )
        if not path.is_dir():
            raise UserError(f"--ckpt {quoted(path)} is no folder; give one that python -m convert has written")
        if (path / "config.json").is_file() and not (path / "params").exists():
            with contextlib.suppress(ValueError, OSError, TypeError, RecursionError):
                if "architectures" in json.loads((path / "config.json").read_text("utf-8")):
                    raise UserError(
                        f"--ckpt {quoted(path)} is a Hugging Face model; "
                        f"run: python -m convert hf {quoted(path)} --out {quoted(f'{path.name}-jax')}"
                    )
        data = _read_config(path, (FORMAT,), "checkpoint folder")
        try:
            config = ModelConfig.from_json(data)
        except UserError as error:
            raise UserError(f"{quoted(path / 'config.json')} is damaged ({error}); convert the model again") from None
        if not isinstance(data.get("fingerprint"), str):
            raise UserError(
                f"{quoted(path / 'config.json')} is damaged (it has no fingerprint); convert the model again"
            )
        return cls(path, config, data["fingerprint"])

    def params(self, dtype: Any = jnp.float32, mesh: Mesh | None = None) -> LlamaParams:
        """The target's weights, in `dtype`: on the default device, or divided among those of a mesh.

        Of a divided weight each device's part is read by itself: no host and no device ever holds a whole one.

        Raises:
          UserError: the folder is damaged, or the target cannot be divided so.
        """
        if mesh is None:
            return load_params(self.path / "params", model_shapes(self.config, dtype))
        with orbax_refusals(), opened(self.path / "params") as stored:
            return sharding.placed(self.config, mesh, stored, dtype)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, as transformers' `PreTrainedTokenizerFast`."""
        without_advice()
        from transformers import PreTrainedTokenizerFast

        if not (self.path / "tokenizer.json").is_file():
            raise UserError(
                f"{quoted(self.path)} holds no tokenizer.json; convert the model again, from a source that has one"
            )
        # transformers warns of Mistral's split pattern whenever a large vocabulary lies beside a config.json that
        # is not its own; the flag says that the pattern is meant as it stands.
        try:
            return PreTrainedTokenizerFast.from_pretrained(str(self.path), fix_mistral_regex=False)
        except Exception as error:  # tokenizers raises a bare Exception for a file that it cannot parse
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"{quoted(self.path / 'tokenizer.json')} is damaged ({reason}); convert the model again"
            ) from None

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: those of generation_config.json, and the tokenizer's own."""
        ids: set[int] = set()
        file = self.path / "generation_config.json"
        if file.is_file():
            try:
                value = json.loads(file.read_text("utf-8")).get("eos_token_id")
            except (OSError, ValueError, AttributeError, RecursionError) as error:
                raise UserError(f"{quoted(file)} is damaged ({error}); convert the model again") from None
            listed = value if isinstance(value, list) else [] if value is None else [value]
            if not all(
                isinstance(one, int) and not isinstance(one, bool) and 0 <= one < self.config.vocab_size
                for one in listed
            ):
                raise UserError(
                    f"{quoted(file)}: eos_token_id {value!r} must be token ids from 0 to {self.config.vocab_size - 1}; "
                    "convert the model again"
                )
            ids.update(listed)
        if self.tokenizer.eos_token_id is not None:
            ids.add(int(self.tokenizer.eos_token_id))
        return tuple(sorted(ids))

    @property
    def draft_names(self) -> list[str]:
        """The drafts under drafts/, in the order of the alphabet."""
        return _draft_names(self.path / "drafts")

    @property
    def default_draft(self) -> str | None:
        """The draft that stands for none being named: the only one there, or the first one that ever was.

        None: there is none, or several of which nobody knows which was first.
        """
        names = self.draft_names
        if len(names) < 2:
            return names[0] if names else None
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if (kept := (self.path / "drafts" / DEFAULT_DRAFT).read_text("utf-8").strip()) in names:
                return kept
        return "eagle" if "eagle" in names else None

    def draft_folder(self, name: str | None, flag: str = "--draft") -> Path | None:
        """The folder of a draft: by path, by name under drafts/, or (None) the default one, if any.

        flag: that the name was given with, for refusals.
        """
        drafts, names = self.path / "drafts", self.draft_names
        if name is None:
            name = self.default_draft
            if name is None and names:
                raise UserError(f"{quoted(self.path)} holds the drafts {', '.join(names)}; choose one with {flag}")
            return drafts / name if name else None
        if name in names:
            return drafts / name
        if Path(name).is_dir():
            return Path(name)
        known = f"{quoted(self.path)} holds {', '.join(names)}" if names else f"{quoted(self.path)} holds none"
        raise UserError(f"{flag} {quoted(name)} is neither a draft of this checkpoint ({known}) nor a folder")

    def draft_spec(self, folder: Path) -> DraftSpec:
        """What a draft's config.json says, as the class of its kind.

        Raises:
          UserError: the draft was made for another target, or is damaged.
        """
        data = _read_config(folder, (DRAFT_FORMAT, EAGLE_FORMAT), "draft (python -m convert makes one)")
        spec = drafters.spec_of(data, quoted(folder / "config.json"))
        # What reads no features suits any target, and so does its folder.
        fits = spec.hidden_size == self.config.hidden_size and data.get("target") == self.fingerprint
        if spec.hidden_size is not None and not fits:
            raise UserError(
                f"--draft {quoted(folder)} was made for another target than {quoted(self.path)}; "
                "give the draft of this one, or convert it with --target"
            )
        if outside := [tap for tap in spec.taps if not 0 <= tap <= self.config.num_layers]:
            raise UserError(
                f"{quoted(folder / 'config.json')} is damaged (taps names layer {outside[0]}, and the target's are "
                f"0 to {self.config.num_layers}); convert the draft again"
            )
        return spec

    def draft(self, folder: Path, dtype: Any = jnp.float32) -> tuple[DraftSpec, DraftParams]:
        """A draft's configuration and weights.

        Raises:
          UserError: the draft was made for another target, or is damaged.
        """
        spec = self.draft_spec(folder)
        shapes = spec.shapes(self.config, dtype)
        return spec, load_params(folder / "params", shapes) if jax.tree.leaves(shapes) else shapes
