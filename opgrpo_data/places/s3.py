"""S3 through s3fs: its session, its credentials and its event loop; but every request is ours, so that none is repeated unseen.

Credentials come by the usual means (environment, ~/.aws, the machine's role) and stay inside botocore.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, ClassVar

import fsspec
from fsspec import AbstractFileSystem
from fsspec.asyn import sync

from opgrpo_data.places.files import Entry
from opgrpo_data.places.objects import Page, Parts
from opgrpo_data.places.retries import Patience

CONNECTIONS = 32
"""Requests that are under way at once: reads of ranges never have more."""

PART_BYTES = 8 * 1024 * 1024
"""A part of a large file that is being written; S3 takes 10,000 parts, so 80 GiB a file."""

PUT_BYTES = 5 * 1024**3
"""The most that one PUT may write."""

MARK = "opgrpo-attempt"
"""Metadata of a published object: which attempt made it."""


def s3_options() -> dict[str, Any]:
    """How s3fs is opened: no cached listings, since other processes write; no repeated request, since we count them."""
    ours = {
        "retries": {"total_max_attempts": 1, "mode": "standard"},
        "max_pool_connections": CONNECTIONS,
        "connect_timeout": 5,
        "read_timeout": 20,
    }
    theirs = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    return {"use_listings_cache": False, "config_kwargs": theirs | ours}


# A forked process must never close what it inherits: it would take the parent's connections out of the parent's event loop.
_inherited: dict[int, AbstractFileSystem] = {}


class S3Objects:
    """`Objects` of an S3 server that knows conditional PUTs (If-None-Match)."""

    _proven: ClassVar[set[str]] = set()
    """Buckets whose server has refused to write over an object."""

    def __init__(self, filesystem: AbstractFileSystem, patience: Patience) -> None:
        self._filesystem = filesystem
        self._patience = patience
        self._process = os.getpid()
        self.parts: Parts | None = S3Parts(self)

    @property
    def filesystem(self) -> AbstractFileSystem:
        """The session. A forked process opens its own: the event loop's thread stayed behind."""
        if self._process != os.getpid():
            _inherited[id(self._filesystem)] = self._filesystem
            self._filesystem = type(self._filesystem)(*self._filesystem.storage_args, **self._filesystem.storage_options)
            self._process = os.getpid()
        self._filesystem.retries = 1
        return self._filesystem

    def call(self, method: str, path: str, moved: int = 0, **given: Any) -> dict[str, Any]:
        """What the server answers to one request about an object; `moved` bytes go with it."""
        bucket, _, key = path.partition("/")
        given |= {"Bucket": bucket} | ({"Key": key} if key else {})
        filesystem = self.filesystem
        answer: dict[str, Any] = sync(
            filesystem.loop, filesystem._call_s3, method, timeout=self._patience.allowed(moved), **given
        )
        return answer

    def url(self, path: str) -> str:
        """See Objects."""
        return f"s3://{path}"

    def get(self, path: str, start: int, stop: int) -> tuple[bytes, int]:
        """See Objects. Raises ConnectionError where the body is not the range asked for."""
        filesystem = self.filesystem
        allowed = self._patience.allowed(stop - start)
        try:
            data, told, length = sync(filesystem.loop, _get, filesystem, path, start, stop, timeout=allowed)
        except OSError as error:
            if _code(error) == "InvalidRange":  # it ends before `start`
                return b"", self.size(path) or 0
            raise
        if told is None:  # a server without ranges sends all
            return data[start:stop], length
        place, _, size = told.rpartition("/")
        if not place.startswith(f"bytes {start}-") or len(data) != min(stop, int(size)) - start:
            raise ConnectionError(f"asked for bytes {start}-{stop - 1}, got {len(data)} bytes said to be {told}")
        return data, int(size)

    def put(self, path: str, data: bytes) -> None:
        """See Objects."""
        self._put(path, data)

    def create(self, path: str, data: bytes, mark: str) -> None:
        """See Objects. One PUT: joining parts under a condition is not atomic with every server (SeaweedFS 4.48).

        Counting tries would not do in place of the mark: aiohttp, too, repeats a PUT whose connection broke, unseen.
        """
        try:
            self._put(path, data, IfNoneMatch="*", Metadata={MARK: mark})
        except OSError as error:
            if _code(error) not in ("PreconditionFailed", "412"):
                raise
            if self.call("head_object", path).get("Metadata", {}).get(MARK) != mark:
                raise FileExistsError(path) from error
        else:
            self._prove(path, data, mark)

    def _prove(self, path: str, data: bytes, mark: str) -> None:
        """Once a process: a server that ignores If-None-Match would let two writers commit, the second over the first."""
        bucket = path.partition("/")[0]
        if bucket in self._proven:
            return
        try:
            self._put(path, data, IfNoneMatch="*", Metadata={MARK: mark})
        except OSError as error:
            if _code(error) not in ("PreconditionFailed", "412"):
                raise
            self._proven.add(bucket)
        else:
            raise OSError(f"{self.url(path)}: the server ignores If-None-Match, so that commits are not safe: see docs/s3.md")

    def _put(self, path: str, data: bytes, **given: Any) -> None:
        if len(data) > PUT_BYTES:
            raise OSError(f"{self.url(path)}: {len(data)} bytes are more than S3 takes at once: make it smaller")
        self.call("put_object", path, len(data), Body=data, **given)

    def size(self, path: str) -> int | None:
        """See Objects."""
        try:
            return int(self.call("head_object", path)["ContentLength"])
        except FileNotFoundError:
            return None

    def page(self, folder: str, *, deep: bool, after: str | None = None) -> Page:
        """See Objects. Folders that consoles make as empty objects are none."""
        bucket, _, key = folder.partition("/")
        given = {"Prefix": f"{key}/" if key else "", "Delimiter": "" if deep else "/"}
        told = self.call("list_objects_v2", bucket, 0, **given, **({} if after is None else {"ContinuationToken": after}))
        files = [
            Entry(f"{bucket}/{item['Key']}", item["Size"], item["LastModified"])
            for item in told.get("Contents", ())
            if not item["Key"].endswith("/")
        ]
        folders = [f"{bucket}/{item['Prefix']}".rstrip("/") for item in told.get("CommonPrefixes", ())]
        return Page(files, folders, told["NextContinuationToken"] if told.get("IsTruncated") else None)

    def delete(self, paths: Sequence[str]) -> None:
        """See Objects."""
        bucket = paths[0].partition("/")[0]
        keys = [{"Key": path.partition("/")[2]} for path in paths]
        told = self.call("delete_objects", bucket, Delete={"Objects": keys, "Quiet": True})
        if failed := told.get("Errors"):
            raise ConnectionError(f"{len(failed)} of {len(keys)} were not removed, {failed[0]['Key']}: {failed[0]['Code']}")


class S3Parts:
    """`Parts` as S3's multipart uploads."""

    size = PART_BYTES

    def __init__(self, objects: S3Objects) -> None:
        self._call = objects.call

    def start(self, path: str) -> str:
        """See Parts."""
        return str(self._call("create_multipart_upload", path)["UploadId"])

    def put(self, path: str, upload: str, number: int, data: bytes) -> str:
        """See Parts."""
        return str(self._call("upload_part", path, len(data), UploadId=upload, PartNumber=number, Body=data)["ETag"])

    def join(self, path: str, upload: str, tags: Sequence[str]) -> None:
        """See Parts."""
        parts = [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(tags, 1)]
        self._call("complete_multipart_upload", path, UploadId=upload, MultipartUpload={"Parts": parts})

    def drop(self, path: str, upload: str) -> None:
        """See Parts."""
        self._call("abort_multipart_upload", path, UploadId=upload)


async def _get(filesystem: AbstractFileSystem, path: str, start: int, stop: int) -> tuple[bytes, str | None, int]:
    """The body, its Content-Range and its Content-Length."""
    bucket, _, key = path.partition("/")
    answer = await filesystem._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}")
    async with answer["Body"] as body:
        return await body.read(), answer.get("ContentRange"), answer["ContentLength"]


def _code(error: BaseException) -> str:
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))
