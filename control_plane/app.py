"""The composition root of the API: everything that a process holds is made here, and every route is named here."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from litestar import Litestar, Router
from litestar.di import Provide
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin
from litestar.openapi.spec import Components, SecurityScheme
from sqlalchemy.exc import DBAPIError

from control_plane.api import (
    accounts,
    choices,
    context,
    costs,
    datasets,
    health,
    jobs,
    models,
    notices,
    objects,
    streams,
    webhooks,
)
from control_plane.api.errors import answer_failure
from control_plane.api.follower import Follower
from control_plane.api.headers import add_headers
from control_plane.auth import ANYONE, check_routes
from control_plane.db import Database
from control_plane.services import prices
from control_plane.services.catalog import Catalog
from control_plane.settings import Settings
from control_plane.storage import Storage, UrlSigner

log = logging.getLogger(__name__)
LARGEST_JSON = 2 * 1024 * 1024

ROUTES = (
    accounts.AuthController,
    accounts.KeyController,
    accounts.list_teams,
    choices.list_presets,
    choices.list_base_models,
    choices.list_gpu_types,
    costs.get_statement,
    costs.list_costs,
    costs.list_statements,
    costs.summary,
    costs.set_budget,
    datasets.DatasetController,
    health.live,
    health.ready,
    jobs.JobController,
    models.ModelController,
    notices.NotificationController,
    notices.stats,
    objects.ObjectController,
    streams.stream,
    webhooks.WebhookController,
)


def create_app(settings: Settings | None = None) -> Litestar:
    """The API of one installation. Raises RuntimeError when a route does not say who may call it."""
    settings = settings or Settings.from_env()
    secret = settings.secret
    installation = context.Installation(
        settings=settings,
        database=Database(settings.database_url, mail=settings.mails),
        storage=Storage(settings.storage_url, UrlSigner(secret, settings.public_url)),
        catalog=Catalog.load(settings),
        secret=secret,
    )
    app = Litestar(
        route_handlers=ROUTES,
        dependencies={
            "installation": Provide(lambda: installation, sync_to_thread=False),
            "session": Provide(context.provide_session),
            "idempotent": Provide(context.provide_idempotent),
            "paging": Provide(context.provide_paging, sync_to_thread=False),
            "who": Provide(context.provide_who, sync_to_thread=False),
        },
        dto=context.StrictJson,
        return_dto=None,
        exception_handlers={Exception: answer_failure},
        before_send=[add_headers],
        lifespan=[_running],
        request_max_body_size=LARGEST_JSON,
        openapi_config=_openapi(),
        logging_config=None,
    )
    app.state.installation = installation
    app.state.database = installation.database
    app.state.follower = Follower(installation.database)
    check_routes(app)
    return app


@asynccontextmanager
async def _running(app: Litestar) -> AsyncIterator[None]:
    installation: context.Installation = app.state.installation
    try:
        async with installation.database.write() as session:
            await prices.ensure_first(session, installation.catalog)
    except DBAPIError as error:
        log.warning("the database is not ready: %s", error.orig)
    yield
    await app.state.follower.close()
    await installation.database.close()


def _openapi() -> OpenAPIConfig:
    bearer = SecurityScheme(type="http", scheme="bearer", description="An API key, or the accessToken of sign-in")
    return OpenAPIConfig(
        title="BrightRun",
        version=version("brightrun"),
        description="LoRA fine-tuning on GPUs that you own.",
        components=Components(security_schemes={"bearer": bearer}),
        security=[{"bearer": []}],
        openapi_router=Router(path="/schema", guards=[ANYONE], route_handlers=[]),
        render_plugins=[JsonRenderPlugin(path=["/", "/openapi.json"])],
    )
