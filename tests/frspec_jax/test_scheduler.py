"""The scheduler over a batch that says what it is told: order, limits, leaving, faults; and over a model."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from frspec_jax.errors import UserError
from frspec_jax.request import Request
from frspec_jax.scheduler import Ended, Engine, Overloaded
from tests.support.scripted import Scripted, asked, engine_over, run, text_of, until


def hold(*batches):
    """From now on each waits before a step until its gate is released."""
    for batch in batches:
        batch.gate = threading.Semaphore(0)


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
        hold(batch)
        tasks = []
        for n in range(9):
            tasks.append(asyncio.create_task(text_of(engine, 5 + n % 3, seed=n)))
            await asyncio.sleep(0)
        batch.gate.release(1000)
        await asyncio.gather(*tasks)
        assert batch.order == list(range(9))

    run(check)


def test_the_batch_with_the_fewest_requests_takes_the_next():
    batches = [Scripted(3), Scripted(3)]

    async def main():
        async with asyncio.timeout(20), engine_over(*batches, queue=4) as engine:
            assert engine.slots == 6 and engine.most == 10
            hold(*batches)
            tickets = engine.submit([asked(60, seed=n) for n in range(10)])
            for least in (2, 4, 6):
                await until(lambda least=least: engine.running >= least)
                first, second = (len(batch.order) for batch in batches)
                assert abs(first - second) <= 1
                for batch in batches:
                    batch.gate.release(1)  # who waited during this step is taken in before the next
            for batch in batches:
                batch.gate.release(1000)
            texts = ["".join([piece.text async for piece in ticket]) for ticket in tickets]
            assert texts == [("abcdefghijklmnopqrstuvwxyz" * 3)[:60]] * 10
            await until(lambda: not engine.running)
        assert sorted(batches[0].order + batches[1].order) == list(range(10))

    asyncio.run(main())


def test_who_leaves_frees_its_slot_whichever_batch_has_it():
    batches = [Scripted(1), Scripted(1)]

    async def main():
        async with asyncio.timeout(20), engine_over(*batches) as engine:
            hold(*batches)
            tickets = engine.submit([asked(150, seed=n) for n in range(2)])
            await until(lambda: engine.running == 2)
            for ticket in tickets:
                ticket.close()
            for batch in batches:
                batch.gate.release(1)
            await until(lambda: engine.running == 0)
            assert [batch.free for batch in batches] == [1, 1]

    asyncio.run(main())


def test_one_thread_that_dies_ends_the_engine():
    batches = [Scripted(1), Scripted(1)]

    async def main():
        async with asyncio.timeout(20), engine_over(*batches) as engine:
            hold(*batches)
            tickets = engine.submit([asked(seed=n) for n in range(3)])
            await until(lambda: engine.running == 2)
            batches[1].fault = RuntimeError("broken")
            batches[1].gate.release(1)
            for ticket in tickets:
                with pytest.raises(Ended):
                    await anext(ticket)
            assert engine.state == "dead"
            batches[0].gate.release(1000)

    asyncio.run(main())


def test_a_full_queue_refuses_at_once_and_all_or_nothing():
    async def check(engine, batch):
        hold(batch)
        tickets = engine.submit([asked(), asked(), asked()])
        assert engine.most == 5
        with pytest.raises(Overloaded):
            engine.submit([asked(), asked(), asked()])
        tickets += engine.submit([asked(), asked()])
        with pytest.raises(Overloaded):
            engine.submit([asked()])
        assert engine.retry_after >= 1
        batch.gate.release(1000)
        for ticket in tickets:
            assert "".join([piece.text async for piece in ticket]) == "abcdef"
        assert await text_of(engine) == "abcdef"

    run(check, queue=3)


def test_a_leaver_frees_its_slot_within_a_step_and_disturbs_nobody():
    async def check(engine, batch):
        stays = asyncio.create_task(text_of(engine, 150))
        leaver = engine.stream(*asked(200, seed=1))
        await anext(leaver)
        hold(batch)
        await asyncio.sleep(0.02)  # the step that runs is the last of the old gate
        queued = engine.submit([asked(seed=2), asked(seed=3)])
        queued[0].close()
        await leaver.aclose()
        batch.gate.release(2)
        await until(lambda: batch.order[-1] == 3)
        assert 2 not in batch.order, "who left while waiting was admitted"
        batch.gate.release(1000)
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
        hold(batch)
        tickets = engine.submit([asked(), asked(), asked()], seconds=0.05)
        for ticket in tickets:
            with pytest.raises(Ended, match=r"more than 0\.05 s") as error:
                await anext(ticket)
            assert error.value.kind == "time"
        batch.gate.release(1000)
        await until(lambda: engine.running == 0)
        assert await text_of(engine) == "abcdef"

    run(check)


def test_a_fault_reaches_one_request():
    async def check(engine, batch):
        hold(batch)
        tickets = engine.submit([asked(seed=666), asked(50), asked(50)])
        with pytest.raises(Ended) as error:
            await anext(tickets[0])
        assert error.value.kind == "fault" and "no" not in str(error.value).split()
        batch.faults[0] = ValueError("broken")
        batch.gate.release(1000)
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


@pytest.mark.sweep
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
