"""What handlers are given: the installation, a session in the right kind of transaction, the caller, the paging."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any, Generic, Literal, TypeAlias, TypeVar

from litestar import Request
from litestar.di import NamedDependency
from litestar.dto import AbstractDTO
from litestar.openapi.spec import Reference, Schema
from litestar.params import FromQuery, QueryParameter
from litestar.typing import FieldDefinition
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.auth import SAFE_METHODS, principal_of
from control_plane.db import Database
from control_plane.errors import ServiceUnavailable
from control_plane.schemas import base
from control_plane.services import idempotency
from control_plane.services.catalog import Catalog
from control_plane.services.listing import Paging
from control_plane.services.scope import Principal
from control_plane.settings import Settings
from control_plane.storage import Storage

T = TypeVar("T")
AnyRequest = Request[Any, Any, Any]
MIB = 1024 * 1024
DISK_RETRY_S = 60


@dataclass(frozen=True)
class Installation:
    """What a process of the API holds; everything else is in the database."""

    settings: Settings
    database: Database
    storage: Storage
    catalog: Catalog
    secret: bytes

    def require_room(self, size: int = 0) -> None:
        """That ``size`` bytes more leave the disk enough to go on with. Raises ServiceUnavailable."""
        least = self.settings.min_free_mib * MIB
        for folder in filter(None, (self.settings.data_dir, self.storage.folder)):
            free = shutil.disk_usage(folder).free
            if free - size < least:
                raise ServiceUnavailable(
                    f"The disk is nearly full: {free // MIB} MiB free, {self.settings.min_free_mib} MiB are kept free",
                    retry_after_s=DISK_RETRY_S,
                )


House: TypeAlias = NamedDependency[Installation]


class StrictJson(AbstractDTO[T], Generic[T]):
    """Bodies are read strictly, and every bad field is named (``schemas.base.decode``)."""

    def decode_bytes(self, value: bytes) -> Any:
        field = self.asgi_connection.route_handler.parsed_data_field
        return base.decode(value, field.annotation)

    @classmethod
    def create_for_field_definition(
        cls, field_definition: FieldDefinition, handler_id: str, backend_cls: Any = None
    ) -> None:
        """Nothing to prepare: the annotation tells all."""

    @classmethod
    def create_openapi_schema(
        cls, field_definition: FieldDefinition, handler_id: str, schema_creator: Any
    ) -> Reference | Schema:
        made: Reference | Schema = schema_creator.for_field_definition(field_definition)
        return made

    @classmethod
    def generate_field_definitions(cls, model_type: type[Any]) -> Any:
        return iter(())

    @classmethod
    def detect_nested_field(cls, field_definition: FieldDefinition) -> bool:
        return False


class Idempotent:
    """``await idempotent(Kind, run)``: ``run()``, once for each ``Idempotency-Key``."""

    def __init__(self, session: AsyncSession, request: idempotency.Request) -> None:
        self._session = session
        self._request = request

    async def __call__(self, kind: type[T], run: Callable[[], Awaitable[T]]) -> T:
        return await idempotency.once(self._session, self._request, kind, run)


Session: TypeAlias = NamedDependency[AsyncSession]
Caller: TypeAlias = NamedDependency[Principal]
Pages: TypeAlias = NamedDependency[Paging]
Once: TypeAlias = NamedDependency[Idempotent]


async def provide_session(request: AnyRequest, installation: House) -> AsyncIterator[AsyncSession]:
    """One transaction a request. It begins at the first statement and has committed before the answer is sent."""
    database = installation.database
    async with database.read() if request.method in SAFE_METHODS else database.write() as session:
        yield session


async def provide_idempotent(request: AnyRequest, session: Session, installation: House) -> Idempotent:
    who: Principal | None = request.scope["state"].get("principal")
    asks = idempotency.Request(
        scope=f"{who.team_id if who else address_of(request)} {request.method} {request.url.path.rstrip('/')}",
        key=request.headers.get("Idempotency-Key"),
        body=await request.body(),
        secret=installation.secret,
    )
    return Idempotent(session, asks)


def provide_paging(
    page: Annotated[int, QueryParameter(ge=1, le=1_000_000)] = 1,
    page_size: Annotated[int, QueryParameter(name="pageSize", ge=1, le=100)] = 20,
    sort_by: Annotated[str | None, QueryParameter(name="sortBy")] = None,
    order: FromQuery[Literal["asc", "desc"]] = "desc",
) -> Paging:
    return Paging(page=page, page_size=page_size, sort_by=sort_by, order=order)


def provide_who(request: AnyRequest) -> Principal:
    return principal_of(request)


def address_of(request: AnyRequest) -> str:
    return request.client.host if request.client else "unknown"
