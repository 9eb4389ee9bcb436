"""The writer under what databases do: answers only what is committed, loses nothing, doubles nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest
from pydantic import SecretStr

from nexhb import devices, partitions, sql
from nexhb import writer as writer_module
from nexhb.config import Database as DatabaseSettings
from nexhb.config import Ingest
from nexhb.db import Connection, Database
from tests.conftest import SOON_S, Agent, Answer, Nexhb, StartDaemon, shown
from tests.proxy import Proxy, Trick


@pytest.fixture
async def proxy(database: Database) -> AsyncIterator[Proxy]:
    """A proxy before the test's database."""
    async with Proxy(database.dsn).serving() as proxy:
        yield proxy


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter waits, so that a test of a lasting failure need not last."""
    monkeypatch.setattr(writer_module, "RETRY_FOR_S", 0.5)
    monkeypatch.setattr(writer_module, "STATEMENT_TIMEOUT_S", 1.0)


async def sent_at_last(agent: Agent, made_at: datetime) -> None:
    """Send one heartbeat again until it is taken, as the agent does."""
    async with asyncio.timeout(SOON_S):
        while (await agent.send(made_at)).status != 200:
            await asyncio.sleep(0.05)


async def test_a_batch_may_span_midnight_and_days(nexhb: Nexhb) -> None:
    midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    moments = [midnight + timedelta(days=days, seconds=seconds) for days in (-3, -1, 0) for seconds in (-1, 0)]
    agents = [await nexhb.agent() for _ in moments]
    answers = await asyncio.gather(*(agent.send(at) for agent, at in zip(agents, moments, strict=True)))
    assert [answer.status for answer in answers] == [200] * len(moments)
    rows = await nexhb.rows("SELECT tableoid::regclass::text AS day, ts FROM device_heartbeats ORDER BY ts")
    assert [(row["day"], row["ts"]) for row in rows] == [
        (partitions.name_of(moment.date()), moment) for moment in sorted(moments)
    ]


async def test_what_another_daemon_wrote_is_a_duplicate(start_daemon: StartDaemon, now: datetime) -> None:
    one, two = await start_daemon(), await start_daemon()
    agent = await one.agent()
    assert (await agent.send(now)).body["deduplicated"] is False
    before = await one.metric("nexhb_staging_batches_total")
    agent.nexhb = two
    fresh = await two.agent("another")
    answers = await asyncio.gather(agent.send(now), fresh.send(now))
    assert [answer.body["deduplicated"] for answer in answers] == [True, False]
    assert await one.metric("nexhb_staging_batches_total") > before
    assert len(await one.rows("SELECT FROM device_heartbeats")) == 2


async def test_what_this_daemon_wrote_is_a_duplicate_without_asking_the_database(nexhb: Nexhb, now: datetime) -> None:
    agent = await nexhb.agent()
    before = await nexhb.metric("nexhb_staging_batches_total")
    assert [(await agent.send(now)).body["deduplicated"] for _ in range(2)] == [False, True]
    assert await nexhb.metric("nexhb_staging_batches_total") == before


async def test_two_daemons_at_once_write_each_bucket_once(start_daemon: StartDaemon, now: datetime) -> None:
    daemons = [await start_daemon(), await start_daemon()]
    agents = [await daemons[0].agent() for _ in range(12)]

    async def replay(nexhb: Nexhb, number: int) -> list[bool]:
        agent = type(agents[0])(nexhb, agents[number].device_id, agents[number].token)
        found = []
        for minute in range(20):
            answer = await agent.send(now - timedelta(minutes=minute))
            assert answer.status == 200
            found.append(answer.body["deduplicated"])
        return found

    both = await asyncio.gather(*(replay(nexhb, number) for number in range(12) for nexhb in daemons))
    assert sum(not deduplicated for found in both for deduplicated in found) == 240
    assert len(await daemons[0].rows("SELECT FROM device_heartbeats")) == 240


async def test_a_row_that_the_database_refuses_is_refused_alone(nexhb: Nexhb, now: datetime) -> None:
    await nexhb.rows("ALTER TABLE device_heartbeats ADD CONSTRAINT odd CHECK (battery_pct <> 66)")
    agents = [await nexhb.agent() for _ in range(30)]
    answers = await asyncio.gather(
        *(
            agent.send(now, battery={"pct": 66.0 if number in (7, 8, 20) else 50.0})
            for number, agent in enumerate(agents)
        )
    )
    assert [number for number, answer in enumerate(answers) if answer.status != 200] == [7, 8, 20]
    assert answers[7].status == 422
    assert "odd" in answers[7].body["errors"][0]["message"]
    assert len(await nexhb.rows("SELECT FROM device_heartbeats")) == 27
    assert len(await nexhb.rows("SELECT FROM device_last_status")) == 27


@pytest.mark.usefixtures("patient")
async def test_the_first_attempt_is_of_the_time_for_retries(start_daemon: StartDaemon, now: datetime) -> None:
    """A lock outlasts it: the device hears so then, and not after another attempt as long."""
    nexhb = await start_daemon()
    agent = await nexhb.agent()
    assert (await agent.send(now - timedelta(minutes=1))).status == 200
    before = await nexhb.metric("nexhb_write_retries_total")
    async with nexhb.database.connected(application="test") as conn, conn.transaction():
        await conn.execute("LOCK TABLE device_last_status IN ACCESS EXCLUSIVE MODE")
        assert (await agent.send(now)).status == 503
        assert await nexhb.metric("nexhb_write_retries_total") == before
    await sent_at_last(agent, now)


async def test_no_transaction_is_left_open_behind_batches_in_a_row(start_daemon: StartDaemon, now: datetime) -> None:
    """Where a batch waits, its transaction begins with the commit before it."""
    nexhb = await start_daemon(ingest=Ingest(batch_max=1))
    agents = [await nexhb.agent() for _ in range(20)]
    async with nexhb.database.connected(application="test") as conn, conn.transaction():
        await conn.execute("LOCK TABLE device_last_status IN ACCESS EXCLUSIVE MODE")
        sending = [asyncio.create_task(agent.send(now)) for agent in agents]
        while await nexhb.metric("nexhb_intake_items") < 20:
            await asyncio.sleep(0.01)
    assert [(await one).status for one in sending] == [200] * 20
    query = "SELECT state, query FROM pg_stat_activity WHERE application_name = 'nexhb writer'"
    assert [tuple(row) for row in await nexhb.rows(query)] == [("idle", "COMMIT")]
    assert len(await nexhb.rows("SELECT DISTINCT xmin FROM device_heartbeats")) == 20


async def test_a_label_outlasts_the_batch_that_brought_it(start_daemon: StartDaemon, now: datetime) -> None:
    nexhb = await start_daemon(ingest=Ingest(batch_max=1))
    await nexhb.rows("ALTER TABLE device_heartbeats ADD CONSTRAINT odd CHECK (battery_pct <> 66)")
    agents = [await nexhb.agent() for _ in range(3)]
    async with nexhb.database.connected(application="test") as conn, conn.transaction():
        await conn.execute("LOCK TABLE device_last_status IN ACCESS EXCLUSIVE MODE")
        sending: list[asyncio.Task[Answer]] = []
        for agent, pct, ssid in zip(agents, (50, 66, 50), ("old", "new", "new"), strict=True):
            sending.append(
                asyncio.create_task(agent.send(now, battery={"pct": pct}, network={"transport": "wifi", "ssid": ssid}))
            )
            while await nexhb.metric("nexhb_intake_items") < len(sending):
                await asyncio.sleep(0.01)
    assert [(await one).status for one in sending] == [200, 422, 200]
    rows = await nexhb.rows("SELECT ssid FROM heartbeat_history ORDER BY device_no")
    assert [row["ssid"] for row in rows] == ["old", "new"]


async def test_a_day_that_is_made_between_two_batches_ends_neithers_transaction(
    start_daemon: StartDaemon, now: datetime
) -> None:
    """What is refused with its row leaves no status behind: the batch's transaction begins after the day was made."""
    nexhb = await start_daemon(ingest=Ingest(batch_max=1))
    missing = now - timedelta(days=2)
    await nexhb.rows("ALTER TABLE device_heartbeats ADD CONSTRAINT odd CHECK (battery_pct <> 66)")
    await nexhb.rows(f"DROP TABLE {partitions.name_of(missing.date())}")
    agents = [await nexhb.agent() for _ in range(3)]
    lost = 'nexhb_write_retries_total{kind="lost"}'
    before = await nexhb.metric(lost)
    async with nexhb.database.connected(application="test") as conn, conn.transaction():
        await conn.execute("LOCK TABLE device_last_status IN ACCESS EXCLUSIVE MODE")
        sending: list[asyncio.Task[Answer]] = []
        for agent, pct, made_at in zip(agents, (50, 66, 50), (now, missing, now), strict=True):
            sending.append(asyncio.create_task(agent.send(made_at, battery={"pct": pct})))
            while await nexhb.metric("nexhb_intake_items") < len(sending):
                await asyncio.sleep(0.01)
    assert [(await one).status for one in sending] == [200, 422, 200]
    rows = await nexhb.rows("SELECT device_id FROM device_last_status ORDER BY device_no")
    assert [row["device_id"] for row in rows] == [agents[0].device_id, agents[2].device_id]
    assert len(await nexhb.rows("SELECT FROM device_heartbeats")) == 2
    assert await nexhb.metric(lost) == before


async def test_a_missing_partition_is_made_by_need(start_daemon: StartDaemon, now: datetime) -> None:
    nexhb = await start_daemon()
    day = (now - timedelta(days=2)).date()
    agent = await nexhb.agent()
    await agent.send(now - timedelta(days=2, minutes=1))
    await nexhb.rows(f"DROP TABLE {partitions.name_of(day)}")
    assert (await agent.send(now - timedelta(days=2))).status == 200
    [row] = await nexhb.rows("SELECT tableoid::regclass::text AS day FROM device_heartbeats")
    assert row["day"] == partitions.name_of(day)


async def test_a_day_that_cannot_be_made_holds_up_no_other(nexhb: Nexhb, now: datetime) -> None:
    day = (now - timedelta(days=2)).date()
    await nexhb.rows(f"ALTER TABLE device_heartbeats DETACH PARTITION {partitions.name_of(day)}")
    await nexhb.rows(
        "DELETE FROM hb_partitions WHERE range_start::date = $1", day
    )  # its name is taken, nobody knows why
    late, live = await nexhb.agent(), await nexhb.agent()
    answers = await asyncio.gather(late.send(now - timedelta(days=2)), live.send(now))
    assert [answer.status for answer in answers] == [503, 200]
    assert "partition" in answers[0].body["detail"]


async def test_a_backend_that_is_terminated_costs_no_heartbeat(nexhb: Nexhb, now: datetime) -> None:
    agents = [await nexhb.agent() for _ in range(20)]
    terminated, stop = 0, asyncio.Event()

    async def nemesis() -> None:
        nonlocal terminated
        pause_s = 0.03  # and longer each time: on a slow machine no connection would ever stand
        while not stop.is_set():
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 1.3, 1.0)
            found = await nexhb.rows(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'nexhb writer'"
            )
            terminated += len(found)

    trouble = asyncio.create_task(nemesis())
    minute = 0
    while terminated < 5:
        minute += 1
        answers = await asyncio.gather(*(agent.send(now - timedelta(minutes=minute)) for agent in agents))
        assert {answer.status for answer in answers} <= {200, 503}
        for agent, answer in zip(agents, answers, strict=True):
            if answer.status != 200:
                await sent_at_last(agent, now - timedelta(minutes=minute))
    stop.set()
    await trouble
    assert len(await nexhb.rows("SELECT FROM device_heartbeats")) == 20 * minute


@pytest.mark.parametrize(("trick", "outcome"), [(Trick.SWALLOW_ANSWER, "committed"), (Trick.CUT_BEFORE, "aborted")])
async def test_a_commit_in_doubt_is_asked_after(
    start_daemon: StartDaemon, proxy: Proxy, now: datetime, trick: Trick, outcome: str
) -> None:
    nexhb = await start_daemon(database=DatabaseSettings(url=SecretStr(proxy.dsn)))
    agent = await nexhb.agent()
    name = f'nexhb_commits_in_doubt_total{{outcome="{outcome}"}}'
    before = await nexhb.metric(name)
    proxy.trick = trick
    answer = await agent.send(now)
    assert proxy.played.is_set()
    # Written once, and known to be: not "deduplicated" against its own first attempt.
    assert (answer.status, answer.body["deduplicated"]) == (200, False)
    assert len(await nexhb.rows("SELECT FROM device_heartbeats")) == 1
    assert await nexhb.metric(name) == before + 1


@pytest.mark.usefixtures("patient")
async def test_a_doubt_ends_with_the_batch_that_was_given_up(
    start_daemon: StartDaemon, proxy: Proxy, now: datetime
) -> None:
    """The next batch of the same length was taken for the one in doubt: 200 for a heartbeat that was nowhere."""
    nexhb = await start_daemon(database=DatabaseSettings(url=SecretStr(proxy.dsn)))
    agents = [await nexhb.agent() for _ in range(2)]
    for agent in agents:
        assert (await agent.send(now - timedelta(minutes=1))).status == 200
    proxy.trick, proxy.refusing = Trick.SWALLOW_ANSWER, True
    assert (await agents[0].send(now)).status == 503
    assert proxy.played.is_set()
    proxy.give_back()
    await sent_at_last(agents[1], now)
    rows = await nexhb.rows("SELECT device_id FROM heartbeat_history WHERE ts = $1 ORDER BY 1", now)
    assert [row["device_id"] for row in rows] == [agent.device_id for agent in agents]


async def test_a_witness_is_this_very_arrival_and_no_other(conn: Connection, now: datetime) -> None:
    """A transaction number that was given out again may be another daemon's, which wrote the same heartbeat."""
    await partitions.ensure(conn, [now.date()])
    late = now - timedelta(days=3)
    for table, at, bucket, more in (
        ("device_heartbeats", now, 10, ""),
        ("late_heartbeats", late, 20, ", reason"),
    ):
        values = "$1, $1, 1, $2, 1, false" + (", 'dropped'" if more else "")
        columns = f"(ts, received_at, device_no, bucket, label_no, clock_wrong{more})"
        await conn.execute(f"INSERT INTO {table} {columns} VALUES ({values})", at, bucket)
    is_stored = sql.queries("writer")["is_stored"]
    second = timedelta(seconds=1)
    for bucket, at in ((10, now), (20, late)):
        assert await conn.fetchval(is_stored, 1, bucket, at, at)
        for other in ((2, bucket, at, at), (1, 30, at, at), (1, bucket, at + second, at), (1, bucket, at, at + second)):
            assert not await conn.fetchval(is_stored, *other), other


async def test_a_commit_that_hangs_is_given_up_and_made_again(
    start_daemon: StartDaemon, proxy: Proxy, now: datetime, patient: None
) -> None:
    nexhb = await start_daemon(database=DatabaseSettings(url=SecretStr(proxy.dsn)))
    agent = await nexhb.agent()
    await agent.send(now - timedelta(minutes=1))
    proxy.trick = Trick.HANG
    await sent_at_last(agent, now)
    assert len(await nexhb.rows("SELECT FROM device_heartbeats")) == 2


async def test_while_the_database_is_away_devices_hear_503_and_afterwards_200(
    start_daemon: StartDaemon, proxy: Proxy, now: datetime, patient: None
) -> None:
    nexhb = await start_daemon(database=DatabaseSettings(url=SecretStr(proxy.dsn)))
    agent = await nexhb.agent()
    assert (await agent.send(now - timedelta(minutes=1))).status == 200
    proxy.take_away()
    answer = await agent.send(now)
    assert answer.status == 503
    assert 2 <= int(answer.headers["Retry-After"]) <= 12
    async with nexhb.http.get(f"{nexhb.url}/readyz") as response:
        assert response.status == 503
        assert "commit" in (await response.json())["reasons"][0]
    # A token that memory does not know: nobody may be told 401 by a daemon that could not look.
    agent.token = devices.new_token()
    assert (await agent.send(now)).status == 503
    proxy.give_back()
    async with asyncio.timeout(SOON_S):
        while True:
            async with nexhb.http.get(f"{nexhb.url}/readyz") as response:
                if response.status == 200:
                    break
    assert (await (await nexhb.agent()).send(now)).status == 200


async def test_what_nobody_foresaw_is_503_and_said_by_readyz_until_it_ends(
    nexhb: Nexhb, conn: Connection, now: datetime
) -> None:
    agent = await nexhb.agent()
    # A class of error that the classifier does not know: 42883, a function that is not there.
    break_it = """CREATE FUNCTION breaks() RETURNS trigger LANGUAGE plpgsql AS
                  $$ BEGIN PERFORM no_such_function(); RETURN NEW; END $$;
                  CREATE TRIGGER breaks BEFORE INSERT ON device_last_status FOR EACH ROW EXECUTE FUNCTION breaks()"""
    await conn.execute(break_it)
    for minute in range(3):
        assert (await agent.send(now - timedelta(minutes=minute))).status == 503
    assert "failed unexpectedly" in str(await nexhb.get("/readyz", 503))
    await conn.execute("DROP TRIGGER breaks ON device_last_status")
    assert (await agent.send(now)).status == 200  # it went on trying
    assert await nexhb.get("/readyz") == {"ready": True, "reasons": []}


async def test_an_unknown_token_is_503_while_the_store_cannot_be_read(
    start_daemon: StartDaemon, proxy: Proxy, now: datetime
) -> None:
    nexhb = await start_daemon(database=DatabaseSettings(url=SecretStr(proxy.dsn)))
    agent = await nexhb.agent()
    agent.token = devices.new_token()
    assert (await agent.send(now)).status == 401
    agent.token = devices.new_token()
    proxy.take_away()
    assert (await agent.send(now)).status == 503


async def test_over_the_bound_is_503_before_the_body_is_read(
    start_daemon: StartDaemon, now: datetime, conn: Connection
) -> None:
    nexhb = await start_daemon(ingest=Ingest(queue_items=3))
    agents = [await nexhb.agent() for _ in range(6)]
    async with conn.transaction():
        await conn.execute("LOCK TABLE device_last_status")
        sends = [asyncio.create_task(agent.send(now)) for agent in agents]
        refused: set[asyncio.Task[Answer]] = set()
        while len(refused) < 3:
            refused, _ = await asyncio.wait(sends, return_when=asyncio.FIRST_COMPLETED)
        assert [task.result().status for task in refused] == [503] * 3
        assert all("Retry-After" in task.result().headers for task in refused)
    answers = await asyncio.gather(*sends)
    assert sorted(answer.status for answer in answers) == [200] * 3 + [503] * 3


async def test_a_heartbeat_that_cannot_be_committed_in_time_is_503(
    start_daemon: StartDaemon, now: datetime, conn: Connection, patient: None
) -> None:
    nexhb = await start_daemon(ingest=Ingest(answer_within_seconds=1))
    agent = await nexhb.agent()
    async with conn.transaction():
        await conn.execute("LOCK TABLE device_last_status")
        answer = await agent.send(now)
    assert answer.status == 503
    await sent_at_last(agent, now)


async def test_what_was_admitted_is_committed_when_the_daemon_stops(
    start_daemon: StartDaemon, now: datetime, conn: Connection
) -> None:
    from nexhb import daemon as daemon_module  # noqa: PLC0415

    nexhb = await start_daemon()
    agents = [await nexhb.agent() for _ in range(10)]
    async with daemon_module.running(nexhb.settings) as second:
        for agent in agents:
            agent.nexhb.url = second.url
        locked = conn.transaction()
        await locked.start()
        await conn.execute("LOCK TABLE device_last_status")
        sends = [asyncio.create_task(agent.send(now)) for agent in agents]
        while await nexhb.metric("nexhb_intake_items") < 10:
            pass
        asyncio.get_running_loop().call_later(0.3, lambda: asyncio.ensure_future(locked.commit()))
    answers = await asyncio.gather(*sends)
    assert [answer.status for answer in answers] == [200] * 10
    assert len(await nexhb.rows("SELECT FROM device_heartbeats")) == 10


async def test_the_status_says_what_the_newest_heartbeat_said_whatever_their_order(nexhb: Nexhb, now: datetime) -> None:
    agent = await nexhb.agent()
    minutes = [5, 1, 9, 3, 0, 7, 2]
    await asyncio.gather(
        *(agent.send(now - timedelta(minutes=minute), battery={"pct": float(minute)}) for minute in minutes)
    )
    status = await nexhb.get(f"/v1/devices/{agent.device_id}")
    assert (status["last_ts"], status["battery_pct"]) == (shown(now), 0)


async def test_what_waits_for_the_writer_is_measured_once_a_batch(
    nexhb: Nexhb, now: datetime, conn: Connection
) -> None:
    agents = [await nexhb.agent() for _ in range(4)]
    assert (await agents[0].send(now - timedelta(minutes=1))).status == 200
    count, waited = [await nexhb.metric(f"nexhb_queue_wait_seconds_{what}") for what in ("count", "sum")]
    loop = asyncio.get_running_loop()
    async with conn.transaction():
        await conn.execute("LOCK TABLE device_last_status")
        sends = [asyncio.create_task(agents[0].send(now))]
        while await nexhb.metric("nexhb_queue_wait_seconds_count") == count:
            pass
        sends += [asyncio.create_task(agent.send(now)) for agent in agents[1:]]
        while await nexhb.metric("nexhb_intake_items") < 4:
            pass
        since = loop.time()
        while loop.time() - since < 0.3:
            await nexhb.metric("nexhb_intake_items")
    assert [answer.status for answer in await asyncio.gather(*sends)] == [200] * 4
    assert await nexhb.metric("nexhb_queue_wait_seconds_count") - count == 2
    assert await nexhb.metric("nexhb_queue_wait_seconds_sum") - waited > 0.3


async def test_an_event_loop_that_stands_still_is_measured(nexhb: Nexhb) -> None:
    lagged = await nexhb.metric("nexhb_loop_lag_seconds_sum")
    time.sleep(1.0)  # noqa: ASYNC251 - the daemon's sweeper sleeps for half of it, on the same loop
    async with asyncio.timeout(SOON_S):
        while await nexhb.metric("nexhb_loop_lag_seconds_sum") - lagged < 0.4:
            pass
