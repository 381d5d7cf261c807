"""The scheduler over a batch that says what it is told: order, limits, leaving, faults, and the end of it all."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest

from frspec_jax.batch import Fresh
from frspec_jax.errors import SlotFault, UserError
from frspec_jax.generator import Request
from frspec_jax.scheduler import Ended, Engine, Overloaded, Unready
from frspec_jax.writer import Writer
from tests.support import folders

TOKENIZER = folders.tokenizer()
LETTERS = TOKENIZER("abcdefghijklmnopqrstuvwxyz" * 8).input_ids


class Scripted:
    """A batch whose answers are the alphabet, two tokens a step; it counts and can be held."""

    def __init__(self, slots: int = 2) -> None:
        self.slots, self.texts = slots, {}
        self.order: list[int] = []  # seeds, as they were admitted
        self.gate = threading.Semaphore(10**9)
        self.fault: Exception | None = None
        self.steps = 0

    @property
    def free(self) -> int:
        return self.slots - len(self.texts)

    @property
    def busy(self) -> bool:
        return bool(self.texts)

    def check(self, ids: Any, request: Request) -> int:
        if len(ids) > 100:
            raise UserError("--context 100 is too short")
        return request.max_new_tokens

    def admit(self, ids: Any, request: Request) -> int:
        self.order.append(request.seed)
        if request.seed == 666:
            raise ValueError("no")
        slot = next(n for n in range(self.slots) if n not in self.texts)
        self.texts[slot] = [request, 0]
        return slot

    def cancel(self, slot: int) -> None:
        self.texts.pop(slot)

    def step(self) -> list[Fresh]:
        self.gate.acquire()
        self.steps += 1
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault
        return [self.fresh(slot) for slot in list(self.texts)]

    def fresh(self, slot: int) -> Fresh:
        request, done = self.texts[slot]
        tokens = tuple(LETTERS[done : min(done + (2 if done else 1), request.max_new_tokens)])
        self.texts[slot][1] = done + len(tokens)
        reason = "length" if done + len(tokens) == request.max_new_tokens else None
        if reason:
            del self.texts[slot]
        return Fresh(slot, tokens, (1,) * len(tokens), None, reason, None)


def engine_over(batch: Scripted, **limits: Any) -> Engine:
    return Engine(lambda say: batch, lambda request: Writer(TOKENIZER, request.stop, (2,)), **limits)


def asked(tokens: int = 6, seed: int = 0, **fields: Any) -> tuple[np.ndarray, Request]:
    return np.arange(3), Request(tokens, seed=seed, **fields)


async def text_of(engine: Engine, tokens: int = 6, **fields: Any) -> str:
    return "".join([piece.text async for piece in engine.stream(*asked(tokens, **fields))])


def run(check: Any, batch: Scripted | None = None, **limits: Any) -> Scripted:
    batch = batch or Scripted()

    async def main() -> None:
        async with asyncio.timeout(20):
            async with engine_over(batch, **limits) as engine:
                await check(engine, batch)

    asyncio.run(main())
    return batch


async def until(true: Any) -> None:
    while not true():
        await asyncio.sleep(0.002)


def test_many_at_once():
    async def check(engine, batch):
        texts = await asyncio.gather(*(text_of(engine, n) for n in range(1, 40)))
        assert texts == [("abcdefghijklmnopqrstuvwxyz" * 2)[:n] for n in range(1, 40)]
        assert (engine.running, engine.waiting, batch.free) == (0, 0, 2)

    run(check)


def test_figures():
    async def check(engine, batch):
        pieces = [piece async for piece in engine.stream(*asked(6))]
        last = pieces[-1]
        assert last.finish_reason == "length" and sum(piece.taken for piece in pieces) == 6
        figures = last.figures
        assert (figures.prompt_tokens, figures.completion_tokens, figures.rounds) == (3, 6, 3)
        assert figures.histogram == (1, 2) and figures.accepted_length == pytest.approx(5 / 3)
        assert 0 <= figures.queued <= figures.first <= figures.seconds

    run(check)


def test_first_come_first_served():
    async def check(engine, batch):
        batch.gate = threading.Semaphore(0)
        tasks = []
        for n in range(9):
            tasks.append(asyncio.create_task(text_of(engine, 5 + n % 3, seed=n)))
            await asyncio.sleep(0)
        batch.gate.release(10**6)
        await asyncio.gather(*tasks)
        assert batch.order == list(range(9))

    run(check)


def test_a_full_queue_refuses_at_once_and_all_or_nothing():
    async def check(engine, batch):
        batch.gate = threading.Semaphore(0)
        tickets = engine.submit([asked(), asked(), asked()])
        assert engine.most == 5
        with pytest.raises(Overloaded):
            engine.submit([asked(), asked(), asked()])
        tickets += engine.submit([asked(), asked()])
        with pytest.raises(Overloaded):
            engine.submit([asked()])
        assert engine.retry_after >= 1
        batch.gate.release(10**6)
        for ticket in tickets:
            assert "".join([piece.text async for piece in ticket]) == "abcdef"
        assert await text_of(engine) == "abcdef"

    run(check, queue=3)


def test_a_leaver_frees_its_slot_within_a_step_and_disturbs_nobody():
    async def check(engine, batch):
        stays = asyncio.create_task(text_of(engine, 150))
        leaver = engine.stream(*asked(200, seed=1))
        await anext(leaver)
        batch.gate = threading.Semaphore(0)
        await asyncio.sleep(0.02)  # the step that runs is the last of the old gate
        queued = engine.submit([asked(seed=2), asked(seed=3)])
        queued[0].close()
        await leaver.aclose()
        batch.gate.release(2)
        await until(lambda: batch.order[-1] == 3)
        assert 2 not in batch.order, "who left while waiting was admitted"
        batch.gate.release(10**6)
        assert len(await stays) == 150
        assert "".join([piece.text async for piece in queued[1]]) == "abcdef"

    run(check)


def test_a_stop_text_ends_it_before_the_limit():
    async def check(engine, batch):
        pieces = [piece async for piece in engine.stream(*asked(6, stop=("ef", "zz")))]
        assert "".join(piece.text for piece in pieces) == "abcd" and pieces[-1].finish_reason == "stop"
        assert pieces[-1].figures.completion_tokens == 6
        pieces = [piece async for piece in engine.stream(*asked(100, stop=("e",)))]
        assert "".join(piece.text for piece in pieces) == "abcd"
        assert pieces[-1].figures.completion_tokens == 5  # the block's second token is not of the answer
        await until(lambda: batch.free == 2)

    run(check)


def test_its_time_is_over():
    async def check(engine, batch):
        batch.gate = threading.Semaphore(0)
        tickets = engine.submit([asked(), asked(), asked()], seconds=0.05)
        for ticket in tickets:
            with pytest.raises(Ended, match=r"more than 0\.05 s") as error:
                await anext(ticket)
            assert error.value.kind == "time"
        batch.gate.release(10**6)
        await until(lambda: engine.running == 0)
        assert await text_of(engine) == "abcdef"

    run(check)


def test_a_fault_reaches_one_request():
    async def check(engine, batch):
        batch.gate = threading.Semaphore(0)
        tickets = engine.submit([asked(seed=666), asked(50), asked(50)])
        with pytest.raises(Ended) as error:
            await anext(tickets[0])
        assert error.value.kind == "fault" and "no" not in str(error.value).split()
        batch.fault = SlotFault(0, "broken")
        batch.gate.release(10**6)
        with pytest.raises(Ended):
            _ = [piece async for piece in tickets[1]]
        assert len("".join([piece.text async for piece in tickets[2]])) == 50

    run(check)


def test_a_fault_in_one_text():
    async def check(engine, batch):
        tickets = engine.submit([asked(50), asked(50)])

        def broken(*_):
            raise ValueError("broken")

        tickets[0]._writer.push = broken
        with pytest.raises(Ended):
            await anext(tickets[0])
        assert len("".join([piece.text async for piece in tickets[1]])) == 50
        await until(lambda: batch.free == 2)

    run(check)


def test_a_prompt_that_does_not_fit_is_refused_before_it_waits():
    async def check(engine, batch):
        with pytest.raises(UserError):
            engine.submit([asked(), (np.arange(101), Request(1))])
        assert engine.waiting == engine.running == 0 and batch.order == []

    run(check)


def test_the_thread_dies():
    async def check(engine, batch):
        batch.gate = threading.Semaphore(0)
        tickets = engine.submit([asked(seed=n) for n in range(4)])
        batch.fault = RuntimeError("the device is gone")
        batch.gate.release(10**6)
        for ticket in tickets:
            with pytest.raises(Ended) as error:
                await anext(ticket)
            assert error.value.kind == "engine"
        assert engine.state == "dead" and engine.running == engine.waiting == 0
        with pytest.raises(Unready) as refused:
            await text_of(engine)
        assert refused.value.dead

    run(check)


def test_the_thread_hangs():
    async def check(engine, batch):
        batch.gate = threading.Semaphore(0)
        (ticket,) = engine.submit([asked()])
        with pytest.raises(Ended):
            await anext(ticket)
        assert engine.state == "dead"
        batch.gate.release(10**6)

    run(check, stall=0.2)


def test_loading_fails():
    def build(say):
        raise UserError("--ckpt is nothing")

    async def main():
        engine = Engine(build, lambda request: Writer(TOKENIZER)).start()
        with pytest.raises(UserError):
            await engine.ready()
        assert engine.state == "dead"

    asyncio.run(main())


def test_nothing_is_taken_while_it_loads_or_drains():
    go, batch = threading.Event(), Scripted()

    def build(say):
        say("half way")
        go.wait(10)
        return batch

    async def main():
        engine = Engine(build, lambda request: Writer(TOKENIZER, request.stop)).start()
        await until(lambda: engine.progress == "half way")
        with pytest.raises(Unready, match="half way"):
            engine.submit([asked()])
        go.set()
        await engine.ready()
        batch.gate = threading.Semaphore(0)
        taken = engine.submit([asked(seed=n) for n in range(4)])
        engine.drain()
        with pytest.raises(Unready):
            engine.submit([asked()])
        batch.gate.release(10**6)
        for ticket in taken:
            assert "".join([piece.text async for piece in ticket]) == "abcdef"
        engine.close()
        assert engine.state == "closed" and not engine._thread.is_alive()

    asyncio.run(main())


def test_closing_tells_who_waits():
    async def check(engine, batch):
        batch.gate = threading.Semaphore(0)
        tickets = engine.submit([asked(), asked(), asked()])
        await asyncio.sleep(0.02)
        closing = asyncio.create_task(asyncio.to_thread(engine.close))
        for ticket in tickets:
            with pytest.raises(Ended):
                await anext(ticket)
        batch.gate.release(10**6)
        await closing

    run(check)


def test_clients_in_several_event_loops():
    async def check(engine, batch):
        def elsewhere() -> str:
            return asyncio.run(text_of(engine, 20))

        texts = await asyncio.gather(*(asyncio.to_thread(elsewhere) for _ in range(4)), text_of(engine, 20))
        assert set(texts) == {"abcdefghijklmnopqrst"}

    run(check)


def test_a_client_whose_event_loop_is_gone():
    async def check(engine, batch):
        def abandoned() -> None:
            async def begin() -> None:
                engine.submit([asked(200)])

            asyncio.run(begin())

        await asyncio.to_thread(abandoned)
        await until(lambda: engine.running == 0 and batch.free == 2)
        assert await text_of(engine) == "abcdef"

    run(check)


def test_over_a_model(toy_folder):
    """The engine's text is the model's own."""
    from frspec_jax import api
    from frspec_jax.config import Sampling, TreeConfig
    from frspec_jax.drafting import Draft

    model = api.load(toy_folder, Draft(tree=TreeConfig(4, 2, 2), pace="fixed"), context=256)
    requests = [Request(20, Sampling(0.9 * (n % 2)), seed=n) for n in range(6)]
    ids = model.encode("hello")

    async def main():
        async with Engine.over(model, 3) as engine:

            async def answer(request):
                return "".join([piece.text async for piece in engine.stream(ids, request)])

            return await asyncio.gather(*(answer(request) for request in requests))

    assert asyncio.run(main()) == [model.generate_ids(ids, request).text for request in requests]
