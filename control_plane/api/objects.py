"""/api/objects: signed URLs of an object store that is a folder. The signature is the only permission."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from email.message import Message
from typing import Any

from litestar import Controller, Response, get, put
from litestar.exceptions import InternalServerException
from litestar.params import FromPath
from litestar.response import Stream

from control_plane.api.context import AnyRequest, House, Installation
from control_plane.auth import SIGNED_URL
from control_plane.errors import Conflict, Forbidden, NotFound, PayloadTooLarge, ValidationFailed
from control_plane.schemas.base import Ok, ok
from control_plane.services import datasets
from control_plane.storage import UrlSigner


class ObjectController(Controller):
    path = "/api/objects"
    tags = ("objects",)
    include_in_schema = False

    @put("/{key:path}", guards=[SIGNED_URL], status_code=200, request_max_body_size=None)
    async def upload(self, key: FromPath[str], request: AnyRequest, installation: House) -> Ok[None]:
        """Streamed in bounded memory; beyond the declared size, or once confirmed, nothing is stored."""
        key, claims = _verified(request, key, installation)
        limit, dataset_id = int(claims["limit"]), claims["dataset"]
        if (request.content_length or 0) > limit:
            raise _too_large(limit)
        installation.require_room(limit)
        await _require_uploading(installation, dataset_id)
        digest = hashlib.sha256()
        await installation.storage.put(key, _bounded(request, limit, installation, dataset_id, digest))
        async with installation.database.write() as session:
            await datasets.set_sha256(session, dataset_id, digest.hexdigest())
        return ok(None)

    @get("/{key:path}", guards=[SIGNED_URL])
    async def download(self, key: FromPath[str], request: AnyRequest, installation: House) -> Response[Any]:
        key, claims = _verified(request, key, installation)
        size = await installation.storage.size(key)
        if size is None:
            raise NotFound("The file is not there any more")
        disposition = Message()
        disposition.add_header("Content-Disposition", "attachment", filename=claims.get("name", key.rsplit("/")[-1]))
        headers = {"Content-Length": str(size), "Content-Disposition": disposition["Content-Disposition"]}
        return Stream(installation.storage.stream(key), media_type="application/octet-stream", headers=headers)


def _verified(request: AnyRequest, key: str, installation: Installation) -> tuple[str, dict[str, str]]:
    key = key.lstrip("/")
    claims = {name: str(values[0]) for name, values in request.query_params.dict().items() if len(values) == 1}
    signer = UrlSigner(installation.secret, installation.settings.public_url)
    if not signer.verify(request.method, key, claims):
        raise Forbidden("This signed URL is not valid, or has expired: ask for a new one")
    return key, claims


async def _bounded(
    request: AnyRequest, limit: int, installation: Installation, dataset_id: str, digest: Any
) -> AsyncIterator[bytes]:
    """The body's chunks. What it raises undoes the upload, up to the last moment."""
    received = 0
    try:
        async for chunk in request.stream():
            received += len(chunk)
            if received > limit:
                raise _too_large(limit)
            if chunk:
                digest.update(chunk)
                yield chunk
    except InternalServerException as error:
        raise ValidationFailed("The upload was cut short") from error
    await _require_uploading(installation, dataset_id)


async def _require_uploading(installation: Installation, dataset_id: str) -> None:
    async with installation.database.read() as session:
        uploading = await datasets.is_uploading(session, dataset_id)
    if not uploading:
        raise Conflict("The dataset takes no file any more: create a new one")


def _too_large(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"The file is larger than the declared fileSize of {limit} bytes")
