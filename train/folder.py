"""The folder of a training run, WORK: its settings, its checkpoints, its metrics and their curves."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState

from frspec_jax.errors import UserError
from frspec_jax.files import write_json, writing
from frspec_jax.hosts import first_process
from train import curves


class Run:
    """A training run's folder: settings, checkpoints, and metrics; as a context, it closes what it has opened.

    Whatever the disk refuses, now or in a write in the background that is heard of later, is one sentence, and what
    was saved before stays.

    Args:
      settings: what a resumed run must not change, as JSON.

    Raises:
      UserError: the folder holds a run with other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self._held = folder, contextlib.ExitStack()
        file = folder / "settings.json"
        if file.exists():
            before = _read_settings(file)
            changed = [k for k in settings if before.get(k) != settings[k]]
            if changed:
                what = _difference(changed[0], before.get(changed[0]), settings[changed[0]])
                raise UserError(
                    f"--work {folder} holds a run with another {what}; resume it as it was, or name another folder"
                )
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(file, settings)
        self._clear()
        with self._writing():
            self._last = self._manager("checkpoints", 2)
            self._best = self._manager("best", 1)

    def __enter__(self) -> Run:
        self._held.enter_context(self._writing())  # for what Orbax' own threads log, all the time
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            with contextlib.nullcontext() if kind is None else contextlib.suppress(UserError):  # the first one counts
                self.close()
        finally:
            self._held.close()

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        return writing(f"--work {self.folder}", "name another folder")

    def _clear(self) -> None:
        """Remove what an interrupted or refused write has left; only one process may be in the folder."""
        if first_process():
            for part in self.folder.glob("*/*.orbax-checkpoint-tmp*"):
                shutil.rmtree(part, ignore_errors=True)

    def _manager(self, name: str, keep: int) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        return ocp.CheckpointManager((self.folder / name).resolve(), options=options)

    def restore(self, state: TrainState) -> TrainState:
        """The newest whole checkpoint, or `state` where there is none; placed as `state` is."""
        step = self._last.latest_step()
        if step is None:
            return state
        saved = self._last.restore(step, args=ocp.args.StandardRestore(_arrays(state)))
        return state.replace(step=saved["step"], params=saved["params"], opt_state=saved["opt_state"])

    def save(self, state: TrainState) -> None:
        """Write a checkpoint in the background; an unfinished one is never restored."""
        with self._writing():
            self._best.wait_until_finished()  # whoever resumes from here relies on the best up to here
            self._last.save(int(state.step), args=ocp.args.StandardSave(_arrays(state)))

    def save_best(self, state: TrainState) -> None:
        """Keep these weights as the best so far, likewise; a resumed run comes by the same ones again."""
        if int(state.step) not in self._best.all_steps():
            with self._writing():
                # One write at a time: Orbax numbers the signals between hosts by a counter that all managers share, so
                # that a write begun beside another can leave a host waiting for a number that never comes.
                self._last.wait_until_finished()
                self._best.save(int(state.step), args=ocp.args.StandardSave({"params": state.params}), force=True)

    def best(self, state: TrainState) -> tuple[Any, int]:
        """The best weights and their step, or those of `state` where no evaluation was made."""
        with self._writing():
            self._best.wait_until_finished()
        step = self._best.latest_step()
        if step is None:
            return state.params, int(state.step)
        saved = self._best.restore(step, args=ocp.args.StandardRestore({"params": state.params}))
        return saved["params"], step

    def rows(self, until: int) -> list[dict[str, Any]]:
        """The metrics up to a step."""
        there = (self.folder / "metrics.jsonl").exists()
        return [row for row in (curves.read(self.folder) if there else []) if row["step"] <= until]

    def log(self, row: dict[str, Any]) -> None:
        """Add a row to the metrics, on a line of its own even where a full disk or a kill has cut one short."""
        if first_process():
            with self._writing(), open(self.folder / "metrics.jsonl", "a+b") as file:
                whole = True
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    whole = file.read(1) == b"\n"
                file.write((b"" if whole else b"\n") + json.dumps(row).encode() + b"\n")

    def draw(self) -> None:
        """The curves of what was logged, as WORK/curves.png."""
        if first_process():
            curves.draw([self.folder], self.folder / "curves.png")

    def close(self) -> None:
        """Wait for what is being written, and let go; what could not be written leaves nothing."""
        try:
            with self._writing():
                for manager in (self._last, self._best):
                    manager.wait_until_finished()
                    manager.close()
        finally:
            self._clear()


def _arrays(state: TrainState) -> dict[str, Any]:
    return {"step": jnp.asarray(state.step), "params": state.params, "opt_state": state.opt_state}


def _difference(name: str, before: Any, now: Any) -> str:
    """What was changed, with the flag that would make it as it was: of a recipe, its first figure that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        differing = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        flags = ", ".join(f"--{key.replace('_', '-')} {before[key]}" for key in differing if key in before)
        return f"{name} ({flags})" if flags else name
    return f"{name} ({before})" if isinstance(before, str | int | float) else name


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}); remove {file.parent}, or name another folder") from None
