"""The scheduler while it loads, when its thread dies or hangs, and as it ends."""

from __future__ import annotations

import asyncio
import threading

import pytest

from frspec_jax.errors import UserError
from frspec_jax.scheduler import Ended, Engine, Unready
from frspec_jax.writer import Writer
from tests.support.scripted import TOKENIZER, Scripted, asked, run, text_of, until


def test_the_thread_dies():
    async def check(engine, batch):
        batch.gate = threading.Semaphore(0)
        tickets = engine.submit([asked(seed=n) for n in range(4)])
        batch.fault = RuntimeError("the device is gone")
        batch.gate.release(1000)
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
        batch.gate.release(1000)

    run(check, stall=0.2)


def test_loading_fails():
    def build(say):
        raise UserError("--ckpt is nothing")

    async def main():
        engine = Engine([build], lambda request: Writer(TOKENIZER)).start()
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

    before = threading.enumerate()

    async def main():
        engine = Engine([build], lambda request: Writer(TOKENIZER, request.stop)).start()
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
        batch.gate.release(1000)
        for ticket in taken:
            assert "".join([piece.text async for piece in ticket]) == "abcdef"
        engine.close()
        assert engine.state == "closed"
        ours = [thread for thread in threading.enumerate() if thread not in before and thread.name == "engine"]
        assert not ours

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
        batch.gate.release(1000)
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


def test_where_one_batch_cannot_be_made_no_other_is():
    made = []

    def build(say):
        made.append(say)
        raise UserError("no weights")

    async def main():
        engine = Engine([build, build, build], lambda request: Writer(TOKENIZER)).start()
        with pytest.raises(UserError, match="no weights"):
            await engine.ready()
        engine.close()
        assert engine.state == "dead" and len(made) == 1

    asyncio.run(main())
