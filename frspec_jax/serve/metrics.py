"""What /metrics shows. Reading it never waits for the engine: gauges are lengths, counters count what was delivered."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from frspec_jax.scheduler import Engine, Piece
from frspec_jax.serve.forms import ORIGINS
from frspec_jax.tickets import Figures

FIRST = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
BETWEEN = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
WHOLE = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600)


class Metrics:
    """A registry of one server's own."""

    def __init__(self, engines: Callable[[], Sequence[Engine]]) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        gauge = Gauge("frspec_requests_running", "Requests in a slot", registry=registry)
        gauge.set_function(lambda: sum(engine.running for engine in engines()))
        gauge = Gauge("frspec_requests_waiting", "Requests in the queue", registry=registry)
        gauge.set_function(lambda: sum(engine.waiting for engine in engines()))
        gauge = Gauge("frspec_slots", "Requests that may run at once", registry=registry)
        gauge.set_function(lambda: sum(engine.slots for engine in engines()))
        self.replies = Counter("frspec_replies", "HTTP replies", ["path", "status"], registry=registry)
        self.finished = Counter("frspec_answers", "Answers by how they ended", ["reason"], registry=registry)
        self.prompt_tokens = Counter("frspec_prompt_tokens", "Tokens of prompts", registry=registry)
        self.tokens = Counter(
            "frspec_completion_tokens", "Delivered tokens by how they came", ["origin"], registry=registry
        )
        self.rounds = Counter("frspec_rounds", "Rounds of delivered answers", registry=registry)
        self.round_tokens = Counter("frspec_round_tokens", "Tokens of these, with the bonus", registry=registry)
        self.accepted = Counter(
            "frspec_accepted_at_depth", "Rounds that accepted a draft of this depth", ["depth"], registry=registry
        )
        self.queued = Histogram("frspec_queue_seconds", "Wait for a slot", buckets=FIRST, registry=registry)
        self.first = Histogram("frspec_time_to_first_token_seconds", "From arrival", buckets=FIRST, registry=registry)
        self.between = Histogram(
            "frspec_time_between_tokens_seconds", "A block's share for each token", buckets=BETWEEN, registry=registry
        )
        self.whole = Histogram("frspec_request_seconds", "Arrival to the last token", buckets=WHOLE, registry=registry)

    def text(self) -> bytes:
        """All of it in Prometheus' format."""
        return generate_latest(self.registry)

    def piece(self, piece: Piece, before: Figures | None) -> None:
        """A piece that goes to its client; before: the figures of the one before it."""
        if before is None:
            self.prompt_tokens.inc(piece.figures.prompt_tokens)
            self.queued.observe(piece.figures.queued)
            self.first.observe(piece.figures.first)
        elif piece.taken:
            share = (piece.figures.seconds - before.seconds) / piece.taken
            for _ in range(piece.taken):
                self.between.observe(share)
        for said in piece.said:
            self.tokens.labels(ORIGINS[said.origin]).inc()

    def ended(self, last: Figures | None, reason: str) -> None:
        """An answer that has ended, or whose client has left."""
        self.finished.labels(reason).inc()
        if last is None:
            return
        self.whole.observe(last.seconds)
        self.rounds.inc(last.rounds)
        for accepted, count in enumerate(last.histogram):
            self.round_tokens.inc(count * (accepted + 1))
            for depth in range(1, accepted + 1):
                self.accepted.labels(str(depth)).inc(count)
