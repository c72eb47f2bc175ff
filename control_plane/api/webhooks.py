"""/api/webhooks."""

from __future__ import annotations

import secrets

from litestar import Controller, delete, get, patch, post
from litestar.params import FromPath, JSONBody

from control_plane.api.context import Caller, House, Once, Pages, Session
from control_plane.auth import OWN
from control_plane.schemas.base import Ok, ok
from control_plane.schemas.webhooks import (
    ChangeWebhook,
    CreateWebhook,
    Deliveries,
    DeliveryData,
    DeliveryOut,
    NewSecret,
    NewWebhook,
    WebhookData,
    WebhookOut,
    Webhooks,
)
from control_plane.services import webhooks
from control_plane.services.scope import get_owned
from control_plane.tables import Webhook


class WebhookController(Controller):
    """What is kept for a repeated request holds the nonce of a secret, not the secret."""

    path = "/api/webhooks"
    tags = ("webhooks",)
    guards = (OWN,)

    @post(summary="Have events sent to a URL; the signing secret is shown this once")
    async def create(
        self, data: JSONBody[CreateWebhook], installation: House, session: Session, who: Caller, idempotent: Once
    ) -> Ok[NewWebhook]:
        async def run() -> NewWebhook:
            nonce = secrets.token_hex()
            secret = webhooks.derive(installation.secret, nonce)
            made = await webhooks.create(session, who, data, secret, installation.settings.webhook_networks)
            return NewWebhook(webhook=WebhookOut.of(made), secret=nonce)

        made = await idempotent(NewWebhook, run)
        made.secret = webhooks.derive(installation.secret, made.secret)
        return ok(made)

    @get(summary="The team's webhooks")
    async def list_webhooks(self, session: Session, who: Caller) -> Ok[Webhooks]:
        return ok(Webhooks(webhooks=[WebhookOut.of(row) for row in await webhooks.listed(session, who)]))

    @get("/{webhook_id:str}", summary="One webhook, with its health")
    async def show(self, webhook_id: FromPath[str], session: Session, who: Caller) -> Ok[WebhookData]:
        found = await get_owned(session, Webhook, who.team_id, webhook_id)
        return ok(WebhookData(webhook=WebhookOut.of(found)))

    @patch("/{webhook_id:str}", summary="Change URL or events; disable, or enable again")
    async def change(
        self,
        webhook_id: FromPath[str],
        data: JSONBody[ChangeWebhook],
        installation: House,
        session: Session,
        who: Caller,
    ) -> Ok[WebhookData]:
        networks = installation.settings.webhook_networks
        changed = await webhooks.change(session, who, webhook_id, data, networks)
        return ok(WebhookData(webhook=WebhookOut.of(changed)))

    @delete("/{webhook_id:str}", status_code=200, summary="Delete a webhook and its deliveries")
    async def remove(self, webhook_id: FromPath[str], session: Session, who: Caller) -> Ok[None]:
        await webhooks.remove(session, who, webhook_id)
        return ok(None)

    @post("/{webhook_id:str}/secret", status_code=200, summary="Rotate the secret; the new one is shown this once")
    async def rotate(
        self, webhook_id: FromPath[str], installation: House, session: Session, who: Caller, idempotent: Once
    ) -> Ok[NewSecret]:
        async def run() -> NewSecret:
            nonce = secrets.token_hex()
            rotated = await webhooks.rotate(session, who, webhook_id, webhooks.derive(installation.secret, nonce))
            return NewSecret.of(rotated, secret=nonce, previous_until=rotated.previous_secret_until)

        made = await idempotent(NewSecret, run)
        made.secret = webhooks.derive(installation.secret, made.secret)
        return ok(made)

    @post("/{webhook_id:str}/test", status_code=202, summary="Send it a ping, once")
    async def test(
        self, webhook_id: FromPath[str], session: Session, who: Caller, idempotent: Once
    ) -> Ok[DeliveryData]:
        async def run() -> DeliveryData:
            return DeliveryData(delivery=DeliveryOut.seen(await webhooks.ping(session, who, webhook_id)))

        return ok(await idempotent(DeliveryData, run))

    @get("/{webhook_id:str}/deliveries", summary="What was sent to it lately, newest first")
    async def list_deliveries(
        self, webhook_id: FromPath[str], session: Session, who: Caller, paging: Pages
    ) -> Ok[Deliveries]:
        rows, pagination = await webhooks.deliveries(session, who, webhook_id, paging)
        return ok(Deliveries(deliveries=[DeliveryOut.seen(row) for row in rows], pagination=pagination))
