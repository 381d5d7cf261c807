"""Read the weights of a Hugging Face folder, whichever way they are stored, one tensor at a time.

`model.safetensors` and `pytorch_model.bin`, in one file or in shards with an index. torch is needed
for `.bin` alone.
"""

from __future__ import annotations

import copy
import json
import zipfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from frspec_jax.errors import UserError
from frspec_jax.schema import Entries

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # in the order of preference; sharded: NAME.index.json
READABLE = {"F64", "F32", "F16", "BF16"}
INTEGERS = {"I64", "I32", "BOOL"}  # of maps between vocabularies


class TensorFolder:
    """The tensors of a folder in Hugging Face's format (`weights.TensorSource`).

    files: names that the weights may have, in the order of preference.
    """

    def __init__(self, folder: Path, files: tuple[str, ...] = WEIGHT_FILES) -> None:
        self.label = str(folder)
        self.config = read_json(folder, "config.json")
        if method := self.config.get("quantization_config"):
            kind = method.get("quant_method", "unknown") if isinstance(method, Mapping) else method
            raise UserError(
                f"{folder} holds quantised weights ({kind}); convert the unquantised model, or a GGUF of it"
            )
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        self._loaders: dict[str, Callable[[], np.ndarray]] = {}
        for file in _weight_files(folder, files):
            (self._open_safetensors if file.suffix == ".safetensors" else self._open_pickle)(file)

    @property
    def lossless_dtype(self) -> Any:
        """The smaller of bfloat16 and float32 that holds every stored value exactly.

        float16 becomes float32: bfloat16 keeps 8 of its 11 significant bits, and float32 all of them.
        (float64, which no published model of the family uses, is rounded to float32.)
        """
        return ml_dtypes.bfloat16 if set(self._dtypes.values()) - INTEGERS == {"BF16"} else np.float32

    def names(self) -> Iterable[str]:
        return self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str) -> np.ndarray:
        if self._dtypes[name] not in READABLE:
            raise UserError(
                f"{self.label}: {name} is stored as {self._dtypes[name]}; "
                "float32, float16 and bfloat16 weights can be converted"
            )
        return self._loaders[name]()

    def read_integers(self, name: str) -> np.ndarray:
        """A tensor of integers or truth values."""
        if self._dtypes[name] not in INTEGERS:
            raise UserError(f"{self.label}: {name} is stored as {self._dtypes[name]}; it must hold integers")
        return self._loaders[name]()

    def renamed(self, name_of: Callable[[str], str]) -> TensorFolder:
        """The same tensors under other names.

        Raises:
          UserError: two tensors would share one.
        """
        other, names = copy.copy(self), {name: name_of(name) for name in self._shapes}
        if len(set(names.values())) < len(names):
            new = list(names.values())
            twice = next(name for name in new if new.count(name) > 1)
            raise UserError(f"{self.label} holds {twice} twice, under two names; download it again")
        other._shapes = {names[name]: shape for name, shape in self._shapes.items()}
        other._dtypes = {names[name]: dtype for name, dtype in self._dtypes.items()}
        other._loaders = {names[name]: load for name, load in self._loaders.items()}
        return other

    def without(self, names: Iterable[str]) -> TensorFolder:
        """The same, less some tensors."""
        other, gone = copy.copy(self), set(names)
        other._shapes = {name: shape for name, shape in self._shapes.items() if name not in gone}
        other._dtypes = {name: dtype for name, dtype in self._dtypes.items() if name not in gone}
        return other

    def described(self, config: dict[str, Any]) -> TensorFolder:
        """The same tensors with another config.json."""
        other = copy.copy(self)
        other.config = config
        return other

    def changed(self, name: str, change: Callable[[np.ndarray], np.ndarray]) -> TensorFolder:
        """The same tensors, but for one, to which something is done as it is read; its shape stays."""
        other, load = copy.copy(self), self._loaders[name]
        other._loaders = {**self._loaders, name: lambda: change(load())}
        return other

    def _add(self, name: str, shape: Iterable[int], dtype: str, load: Callable[[], np.ndarray]) -> None:
        self._shapes[name], self._dtypes[name], self._loaders[name] = tuple(shape), dtype, load

    def _open_safetensors(self, file: Path) -> None:
        from safetensors import safe_open

        try:
            opened: Any = safe_open(file, framework="numpy")
        except Exception as error:  # SafetensorError for a file that is cut short, OSError for one that is locked
            raise UserError(f"{file} cannot be read as safetensors ({_reason(file, error)})") from None
        for name in opened.keys():  # noqa: SIM118 (no mapping: it has keys() alone)
            entry = opened.get_slice(name)
            self._add(name, entry.get_shape(), entry.get_dtype(), partial(opened.get_tensor, name))

    def _open_pickle(self, file: Path) -> None:
        try:
            import torch
        except ImportError:
            raise UserError(f"reading {file} needs torch; run: pip install torch") from None
        try:
            # weights_only: a pickle may otherwise run any code. Only torch's zip format can be mapped.
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
            tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
        except Exception as error:  # torch raises many kinds for a file that is cut short or unsafe
            raise UserError(f"{file} cannot be read as weights of torch ({_reason(file, error)})") from None
        codes = {
            torch.float64: "F64",
            torch.float32: "F32",
            torch.float16: "F16",
            torch.bfloat16: "BF16",
            torch.int64: "I64",
            torch.int32: "I32",
            torch.bool: "BOOL",
        }

        def load(tensor: Any) -> np.ndarray:
            tensor = tensor.contiguous()
            if tensor.dtype is torch.bfloat16:  # torch knows no numpy type for it: hand over the bits
                return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
            return tensor.numpy()

        for name, tensor in tensors.items():
            code = codes.get(tensor.dtype, str(tensor.dtype))
            self._add(name, tensor.shape, code, partial(load, tensor))


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object out of a model's folder, or one sentence about what is wrong with it."""
    file = folder / name
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} holds no {name}; give the folder of a Hugging Face model") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read ({_reason(file, error)})") from None
    if not isinstance(data, dict):
        raise UserError(f"{file} is no JSON object; download it again")
    return data


def _weight_files(folder: Path, files: tuple[str, ...]) -> list[Path]:
    for name in files:
        if (folder / name).is_file():
            return [folder / name]
        index = f"{name}.index.json"
        if (folder / index).is_file():
            named = Entries(read_json(folder, index), str(folder / index)).inner("weight_map").data.values()
            if not all(isinstance(shard, str) for shard in named):
                raise UserError(f"{folder / index}: weight_map must name a file for each tensor; download it again")
            shards = sorted(set(named))
            missing = [shard for shard in shards if not (folder / shard).is_file()]
            if missing or not shards:
                raise UserError(
                    f"{folder / index} names {len(shards)} files, of which {len(missing)} are missing "
                    f"({', '.join(missing)}); download them again"
                )
            return [folder / shard for shard in shards]
    raise UserError(f"{folder} holds no weights: none of {', '.join(files)} (nor an index of shards) is there")


def _reason(file: Path, error: Exception) -> str:
    """Why a file cannot be read, and the mend."""
    try:
        pointer = file.stat().st_size < 1024 and file.read_bytes().startswith(b"version https://git-lfs")
    except OSError:
        pointer = False
    if pointer:
        return "it is a Git LFS pointer, not the file itself; run: git lfs pull"
    lines = str(error).strip().splitlines()
    return f"{lines[0][:200] if lines else type(error).__name__}; download it again"
