"""Webhooks that fail for long, come back, are disabled or deleted."""

from __future__ import annotations

import asyncio
import json

from sqlalchemy import func, update

from control_plane.db import Database
from control_plane.services import outbox, webhooks
from control_plane.tables import Membership, Notification, Outbox, User, Webhook, now, uuid7
from control_plane.tables.accounts import TeamRole
from control_plane.tables.notices import PING, Channel, NotificationPriority, NotificationType
from scheduler.deliver import RETRY_PAUSES_S
from tests.integration.scheduler.post_office import PATIENCE_S, Ahead, Late, PostOffice, Stuck


async def test_a_receiver_that_comes_back_gets_it(office: PostOffice, clock: Ahead) -> None:
    webhook_id = await office.webhook("/a")
    office.receiver.script["/a"] = [503]
    await office.tell("one")
    async with office.delivering():
        await office.until_row(webhook_id, lambda row: row.last_error)
        assert (await office.the_webhook(webhook_id)).failing_since is not None
        clock.pass_by(seconds=6)
        row = await office.until_row(webhook_id, lambda row: row.delivered_at)
    assert (row.tries, row.last_error) == (2, None)
    assert (await office.the_webhook(webhook_id)).failing_since is None


async def owners_of(office: PostOffice, database: Database) -> set[str]:
    """The team gets a second owner and a member; the owners."""
    async with database.write() as session:
        second, member = (
            User(id=uuid7(), email=f"{uuid7()}@example.com", password_hash="x", name=name) for name in ("B", "C")
        )
        session.add_all([second, member])
        await session.flush()
        session.add(Membership(team_id=office.team.id, user_id=second.id, role=TeamRole.OWNER))
        session.add(Membership(team_id=office.team.id, user_id=member.id, role=TeamRole.MEMBER))
    return {str(office.team.personal_of), str(second.id)}


async def test_gone_disables_at_once_with_one_notice(office: PostOffice, database: Database) -> None:
    owners = await owners_of(office, database)
    gone = await office.webhook("/gone")
    other = await office.webhook("/other")
    office.receiver.script["/gone"] = [410]
    for number in range(3):
        await office.tell(str(number))
    async with office.delivering():
        await office.until_quiet()
        await office.until_calls("/other", 4)
        await office.tell("later")
        await office.until_quiet()

    webhook = await office.the_webhook(gone)
    assert (webhook.enabled, webhook.disabled_reason) == (False, "It answered 410 Gone")
    assert webhook.disabled_at is not None
    assert len(office.receiver.at("/gone")) == 1
    assert {row.last_error for row in await office.rows(gone)} == {"It answered HTTP 410", "The webhook was disabled"}
    notices = await office.notices()
    assert {notice.user_id for notice in notices} == owners
    assert len(notices) == 2
    assert {(n.type, n.priority) for n in notices} == {(NotificationType.SYSTEM, NotificationPriority.HIGH)}
    types = [json.loads(call.body)["type"] for call in office.receiver.at("/other")]
    assert sorted(types) == ["job.completed"] * 4 + ["system"]
    assert len(await office.rows(other)) == 5


async def until_given_up(office: PostOffice, clock: Ahead, webhook_id: str, key: str) -> Outbox:
    """The letter whose dedupe key begins so, tried as often as it is."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            row = next((row for row in await office.rows(webhook_id) if row.dedupe_key.startswith(key)), None)
            if row is not None and row.not_before is None:
                return row
            if row is not None and row.not_before and row.not_before > now():
                clock.pass_by(seconds=(row.not_before - now()).total_seconds())
            await asyncio.sleep(0.02)


async def test_an_owner_hears_once_a_day_that_events_were_given_up(office: PostOffice, database: Database) -> None:
    webhook_id = await office.webhook("/a", events=["job.completed"])
    await office.webhook("/b", events=["system"])
    office.receiver.script["/a"] = [503, 503]
    for key in ("one", "two"):
        await office.tell(key)
    async with database.write() as session:
        await session.execute(update(Outbox).values(tries=len(RETRY_PAUSES_S)))
    async with office.delivering():
        await office.until_calls("/a", 2)
        await office.until_calls("/b", 1)
        await office.until_quiet()
    assert {row.tries for row in await office.rows(webhook_id)} == {len(RETRY_PAUSES_S) + 1}
    (notice,) = await office.notices()
    assert (notice.type, notice.priority) == (NotificationType.SYSTEM, NotificationPriority.HIGH)
    assert notice.title == "Not delivered: job.completed to 127.0.0.1"
    assert "was given up after 10 tries; the last: It answered HTTP 503." in notice.message
    (told,) = office.receiver.at("/b")
    assert json.loads(told.body)["data"]["title"] == notice.title
    assert (await office.the_webhook(webhook_id)).enabled


async def test_when_several_events_were_given_up_for_days_it_is_disabled_once(office: PostOffice, clock: Ahead) -> None:
    webhook_id = await office.webhook("/a", events=["job.completed"])
    office.receiver.script["/a"] = [500] * 19 + [502]
    await office.tell("one")
    async with office.delivering():
        first = await until_given_up(office, clock, webhook_id, "one")
        assert (await office.the_webhook(webhook_id)).enabled
        clock.pass_by(days=2)
        await office.tell("two")
        last = await until_given_up(office, clock, webhook_id, "two")
        await office.tell("three")

    assert (first.tries, last.tries, last.last_error) == (10, 10, "It answered HTTP 502")
    webhook = await office.the_webhook(webhook_id)
    assert webhook.disabled_at is not None
    assert not webhook.enabled
    notices = await office.notices()
    assert [notice.title.partition(":")[0] for notice in notices] == ["Not delivered", "Webhook disabled"]
    since = f"{first.created_at:%Y-%m-%d %H:%M}"
    assert notices[1].message.startswith(f"2 events since {since} UTC were given up, and none was taken; the last")
    assert len(await office.rows()) == 2


async def test_a_dead_receiver_of_which_nobody_wants_much_is_found_out(office: PostOffice, clock: Ahead) -> None:
    """By the notice of what was given up, which it does not take either."""
    webhook_id = await office.webhook("/a")
    office.receiver.script["/a"] = [500] * 20
    await office.tell("one")
    async with office.delivering():
        await until_given_up(office, clock, webhook_id, "one")
        await until_given_up(office, clock, webhook_id, "SYSTEM")
    assert not (await office.the_webhook(webhook_id)).enabled
    assert [notice.title.partition(":")[0] for notice in await office.notices()] == [
        "Not delivered",
        "Webhook disabled",
    ]


async def test_a_ping_that_failed_long_ago_and_a_failure_now_disable_nothing(
    office: PostOffice, clock: Ahead, database: Database
) -> None:
    webhook_id = await office.webhook("/a")
    office.receiver.script["/a"] = [500, 503]
    async with database.write() as session:
        body = outbox.envelope(PING, office.team.id, {})
        await outbox.put(session, Channel.WEBHOOK, webhook_id, body, key="ping", team_id=office.team.id)
    async with office.delivering():
        await office.until_row(webhook_id, lambda row: row.failed_at)
        clock.pass_by(days=30)
        await office.tell("one")
        while not [row for row in await office.rows(webhook_id) if row.last_error == "It answered HTTP 503"]:
            await asyncio.sleep(0.02)
        assert (await office.the_webhook(webhook_id)).enabled
        clock.pass_by(seconds=6)
        await office.until_calls("/a", 3)
        await office.until_quiet()
    assert (await office.the_webhook(webhook_id)).failing_since is None
    assert await office.notices() == []


async def test_the_loss_of_a_notice_of_a_loss_is_not_told_of(office: PostOffice, database: Database) -> None:
    """Otherwise a receiver that refuses notices alone is told of for ever."""
    webhook_id = await office.webhook("/a")
    office.receiver.script["/a"] = [400] * 3
    await office.tell("one")
    async with database.write() as session:
        await session.execute(update(Outbox).values(tries=len(RETRY_PAUSES_S)))
    async with office.delivering():
        await office.until_row(webhook_id, lambda row: row.failed_at, "one")
        notice = await office.until_row(webhook_id, lambda row: row.last_error, "SYSTEM:undelivered")
    async with database.write() as session:
        due = {"tries": len(RETRY_PAUSES_S), "not_before": now()}
        await session.execute(update(Outbox).where(Outbox.id == notice.id).values(due))
        key = Notification.dedupe_key
        await session.execute(update(Notification).values(dedupe_key=func.replace(key, f"{now():%Y-%m-%d}", "before")))
    async with office.delivering():
        await office.until_row(webhook_id, lambda row: row.failed_at, "SYSTEM:undelivered")
    assert len(await office.notices()) == 1


async def test_a_ping_that_is_taken_forgives_nothing(office: PostOffice, database: Database) -> None:
    webhook_id = await office.webhook("/a")
    office.receiver.script["/a"] = [500]
    await office.tell("one")
    async with office.delivering():
        await office.until_row(webhook_id, lambda row: row.last_error, "one")
        async with database.write() as session:
            body = outbox.envelope(PING, office.team.id, {})
            await outbox.put(session, Channel.WEBHOOK, webhook_id, body, key="ping", team_id=office.team.id)
        await office.until_row(webhook_id, lambda row: row.delivered_at, "ping")
    assert (await office.the_webhook(webhook_id)).failing_since is not None


async def test_a_success_ends_the_count_of_days(office: PostOffice, clock: Ahead) -> None:
    webhook_id = await office.webhook("/a")
    office.receiver.script["/a"] = [500, 204, 500]
    await office.tell("one")
    async with office.delivering():
        await office.until_row(webhook_id, lambda row: row.last_error)
        clock.pass_by(days=1)
        await office.until_row(webhook_id, lambda row: row.delivered_at)
        clock.pass_by(days=5)
        await office.tell("two")
        await office.until_calls("/a", 3)
        while (await office.the_webhook(webhook_id)).failing_since is None:
            await asyncio.sleep(0.02)
    assert (await office.the_webhook(webhook_id)).enabled
    assert await office.notices() == []


async def test_disabled_while_a_letter_is_under_way(office: PostOffice, database: Database) -> None:
    webhook_id = await office.webhook("/a")
    for number in range(2):
        await office.tell(str(number))
    stuck = Stuck(office.carrier)
    async with office.delivering(stuck):
        await stuck.arrived.wait()
        async with database.write() as session:
            webhook = await session.get_one(Webhook, webhook_id, with_for_update=True)
            await webhooks.disable(session, webhook, "Disabled by an owner")
    async with office.delivering():
        await asyncio.sleep(0.2)
    assert len(office.receiver.calls) == 1
    assert {row.last_error for row in await office.rows()} == {"The webhook was disabled"}


async def test_a_failure_after_the_disabling_brings_nothing_back(office: PostOffice, database: Database) -> None:
    webhook_id = await office.webhook("/a")
    await office.tell("one")
    late = Late()
    async with office.delivering(late):
        await late.began.wait()
        async with database.write() as session:
            webhook = await session.get_one(Webhook, webhook_id, with_for_update=True)
            await webhooks.disable(session, webhook, "Disabled by an owner")
        late.go.set()
        await asyncio.sleep(0.2)
    row = await office.row(webhook_id)
    assert (row.not_before, row.last_error) == (None, "The webhook was disabled")
    assert (await office.the_webhook(webhook_id)).failing_since is None


async def test_what_was_enqueued_as_it_was_disabled_is_not_sent(office: PostOffice, database: Database) -> None:
    webhook_id = await office.webhook("/a")
    await office.tell("one")
    async with database.write() as session:
        (await session.get_one(Webhook, webhook_id)).enabled = False
    async with office.delivering():
        row = await office.until_row(webhook_id, lambda row: row.failed_at)
    assert (office.receiver.calls, row.last_error) == ([], "The webhook was disabled")


async def test_deleted_while_its_rows_wait(office: PostOffice, database: Database) -> None:
    webhook_id = await office.webhook("/a")
    await office.tell("one")
    async with database.write() as session:
        await session.delete(await session.get_one(Webhook, webhook_id))
    async with office.delivering():
        row = await office.until_row(webhook_id, lambda row: row.failed_at)
    assert (office.receiver.calls, row.last_error) == ([], "The webhook was disabled")
