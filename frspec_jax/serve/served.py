"""What a server serves: a checkpoint under its names, an engine over it, and a second one without drafts."""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from frspec_jax import api
from frspec_jax.api import NO_DRAFT, Generator
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.detokenizer import text_of
from frspec_jax.request import Request
from frspec_jax.scheduler import Engine, Say
from frspec_jax.serve.faults import ApiError
from frspec_jax.serve.metrics import Metrics
from frspec_jax.serve.prompts import Encoder
from frspec_jax.token_bytes import TokenBytes
from frspec_jax.writer import Writer

log = logging.getLogger(__name__)
NAMES_NOTED = 1000  # unknown fields that are remembered, so that each is logged once


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a server behaves."""

    names: tuple[str, ...]  # of the model
    slots: int = 8  # of each replica
    queue: int = 64
    seconds: float = 600.0  # that a request may take, waiting included
    body_bytes: int = 4 * 2**20
    choices: int = 128  # answers to one request
    keys: tuple[bytes, ...] = ()  # none: everyone may ask
    origins: tuple[str, ...] = ()  # web pages of other hosts that may ask
    control_tokens: bool = False  # within users' texts
    compare: bool = True  # answer without drafts too, on demand


class Served:
    """A checkpoint that is loaded in the engine's threads, by `load`: once for each of the meshes."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        load: Callable[[Mesh | None], Generator],
        settings: Settings,
        meshes: Sequence[Mesh | None] = (None,),
    ) -> None:
        self.checkpoint, self.settings, self._load = checkpoint, settings, load
        self.encoder = Encoder(checkpoint, settings.control_tokens)
        self.token_bytes = TokenBytes(checkpoint.tokenizer)
        self.vocab_size = checkpoint.config.vocab_size
        self.model: Generator | None = None
        builds = [functools.partial(self._build, mesh) for mesh in meshes]
        self.engine = Engine(builds, self._writer, queue=settings.queue)
        self._vanilla: Engine | None = None
        self.metrics = Metrics(lambda: [self.engine, *([self._vanilla] if self._vanilla else [])])
        self._unknown: set[str] = set()
        self._created = int(time.time())

    def _build(self, mesh: Mesh | None, say: Say) -> Any:
        say("reading the weights")
        model = self._load(mesh)
        self.model = self.model or model
        say(f"compiling for {self.settings.slots} slots [{model.drafting.method.name}]")
        return _batch(model, self.settings.slots)

    def _writer(self, request: Request) -> Writer:
        return Writer(self.checkpoint.tokenizer, request.stop, self.checkpoint.stop_ids)

    async def engine_for(self, speculative: bool) -> Engine:
        """The engine; one that drafts nothing, if that is asked for and the first one drafts.

        The second shares the weights, has a single slot, and is made when it is first asked for, in a thread of its
        own: others do not wait for its compiling.
        """
        model = self.model
        if speculative or model is None or model.drafting.method.name == "vanilla":
            return self.engine
        if not self.settings.compare:
            raise ApiError(400, "this server was started with --compare off", param="speculative")
        if self._vanilla is None or self._vanilla.state == "dead":

            def build(say: Say) -> Any:
                say("compiling what decodes without drafts")
                runtime = model.runtime
                plain = api.load(
                    self.checkpoint,
                    NO_DRAFT,
                    dtype=runtime.dtype,
                    context=runtime.context,
                    kernels=runtime.kernels,
                    target=model.weights.target,
                    mesh=runtime.mesh,
                )
                return _batch(plain, 1)

            self._vanilla = Engine([build], self._writer, queue=min(8, self.settings.queue)).start()
        await self._vanilla.ready()
        return self._vanilla

    def drain(self) -> None:
        """Take no more requests."""
        for engine in (self.engine, self._vanilla):
            if engine is not None:
                engine.drain()

    @property
    def left(self) -> int:
        """Requests that run or wait."""
        return sum(engine.running + engine.waiting for engine in (self.engine, self._vanilla) if engine is not None)

    def close(self) -> None:
        """End the engines; whoever still waits gets an error."""
        for engine in (self.engine, self._vanilla):
            if engine is not None:
                engine.close()

    def card(self, name: str) -> dict[str, Any]:
        """The model as /v1/models shows it, and what the page wants to know."""
        card: dict[str, Any] = {"id": name, "object": "model", "created": self._created, "owned_by": "frspec-jax"}
        if self.model is not None:
            card["max_model_len"] = self.model.runtime.context
            card["method"] = self.model.drafting.method.name
            card["draft_vocab"] = self.model.draft_vocab
            card["compares"] = self.settings.compare and self.model.drafting.method.name != "vanilla"
        return card

    def text_of(self, ids: np.ndarray) -> str:
        """What token ids say."""
        return text_of(self.checkpoint.tokenizer, ids.tolist())

    def note_unknown(self, name: str) -> None:
        """Log a field that is passed over, once."""
        if name not in self._unknown and len(self._unknown) < NAMES_NOTED:
            self._unknown.add(name)
            log.info("a field is not known and passed over", extra={"fields": {"field": name[:60]}})


def _batch(model: Generator, slots: int) -> Any:
    from frspec_jax.batch import Batch

    batch = Batch(model, slots)
    batch.warm_up()
    return batch
