"""The web application that serves one reward; its protocol stands in `pipelines.rewards.http`. Needs FastAPI to be imported."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import FastAPI, Header, HTTPException, Request
from pydantic import BaseModel, Field, ValidationError

from pipelines import media as files
from pipelines.rewards.base import Media, Reward
from pipelines.rewards.judge import Judgement, failed, judge

PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Limits:
    """What one request may hold. pixels: over all its frames, before any is decoded."""

    body_bytes: int = 256 * 1024**2
    samples: int = 256
    pixels: int = 2**27


class Sample(BaseModel):
    """One sample of a request; media are its frames, base64 PNG."""

    prompt: str
    metadata: dict[str, Any]
    kind: Literal["image", "video"]
    media: list[str] = Field(min_length=1)


class ScoreRequest(BaseModel):
    """The body of POST /score."""

    samples: list[Sample]


class TooLargeError(ValueError):
    """The request is over a limit."""


def create_app(reward: Reward, token: str | None, limits: Limits) -> FastAPI:
    """/health for anyone; /about and /score for whoever has the token, or for all when it is None."""
    app = FastAPI(openapi_url=None)
    # Rewards are not thread-safe: one thread scores, request by request, and the event loop stays free to answer.
    scorer = ThreadPoolExecutor(1, "scorer")

    def check(authorization: str | None) -> None:
        given = (authorization or "").encode()
        if token is not None and not hmac.compare_digest(given, f"Bearer {token}".encode()):
            raise HTTPException(401, "a token is needed: Authorization: Bearer ...", {"WWW-Authenticate": "Bearer"})

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/about")
    async def about(authorization: Annotated[str | None, Header()] = None) -> dict[str, str]:
        check(authorization)
        return {"reward": reward.name, "version": reward.version}

    @app.post("/score")
    async def score(request: Request, authorization: Annotated[str | None, Header()] = None) -> dict[str, Any]:
        check(authorization)
        try:
            body = await _body(request, limits.body_bytes)
            return await asyncio.get_running_loop().run_in_executor(scorer, _scored, reward, body, limits)
        except TooLargeError as error:
            raise HTTPException(413, str(error)) from error
        except ValidationError as error:
            raise HTTPException(422, _told(error)) from error

    return app


async def _body(request: Request, limit: int) -> bytes:
    """The request's body. Too large a one is read on for a while, unseen: whoever is cut off would miss the answer."""
    body, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= limit:
            body += chunk
        elif size > 4 * limit:
            break
    if size > limit:
        raise TooLargeError(f"the body has more than {limit} bytes: send smaller batches")
    return bytes(body)


def _scored(reward: Reward, body: bytes, limits: Limits) -> dict[str, Any]:
    """The answer to POST /score. Raises ValidationError when the body is no request, TooLargeError when it is too large."""
    samples = ScoreRequest.model_validate_json(body).samples
    if len(samples) > limits.samples:
        raise TooLargeError(f"{len(samples)} samples, at most {limits.samples}: send smaller batches")
    told: dict[int, Judgement] = {}
    frames: dict[int, list[bytes]] = {}
    for number, sample in enumerate(samples):
        try:
            frames[number] = _pngs(sample)
        except ValueError as error:
            told[number] = failed(f"media: {error}")
    if (pixels := sum(_pixels(data) for pngs in frames.values() for data in pngs)) > limits.pixels:
        raise TooLargeError(f"{pixels} pixels, at most {limits.pixels}: send smaller batches")
    readable: dict[int, Media] = {}
    for number, pngs in frames.items():
        try:
            readable[number] = _decoded(pngs, samples[number].kind)
        except ValueError as error:
            told[number] = failed(f"media: {error}")
    chosen = [samples[number] for number in readable]
    if readable:
        said = judge(reward, list(readable.values()), [s.prompt for s in chosen], [s.metadata for s in chosen])
        told |= zip(readable, said, strict=True)
    scores = [_answer(told[number]) for number in range(len(samples))]
    return {"reward": reward.name, "version": reward.version, "scores": scores}


def _pngs(sample: Sample) -> list[bytes]:
    """The frames' bytes. Raises ValueError unless each is base64 of a PNG, and an image has one frame."""
    if sample.kind == "image" and len(sample.media) != 1:
        raise ValueError(f"an image has one frame, got {len(sample.media)}")
    try:
        pngs = [base64.b64decode(text, validate=True) for text in sample.media]
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"not base64: {error}") from error
    # PIL would look for a header behind other chunks: then we would count the pixels of something else.
    if not all(data.startswith(PNG) and data[12:16] == b"IHDR" and len(data) >= 24 for data in pngs):
        raise ValueError("not a PNG")
    return pngs


def _pixels(png: bytes) -> int:
    """Width times height, as the header says."""
    return int.from_bytes(png[16:20], "big") * int.from_bytes(png[20:24], "big")


def _decoded(pngs: Sequence[bytes], kind: Literal["image", "video"]) -> Media:
    decoded = [files.decode(data) for data in pngs]
    if len({frame.shape for frame in decoded}) > 1:
        raise ValueError("the frames of a video have several sizes")
    return np.stack(decoded) if kind == "video" else decoded[0]


def _answer(judgement: Judgement) -> dict[str, Any]:
    if judgement.value is None:
        return {"error": judgement.error}
    return {"value": float(judgement.value), "detail": json.loads(judgement.detail or "{}")}


def _told(error: ValidationError) -> str:
    """The first few problems of a body, in one line, without the body."""
    problems = error.errors(include_url=False, include_input=False, include_context=False)[:3]
    return "; ".join(f"{'.'.join(map(str, problem['loc'])) or 'body'}: {problem['msg']}" for problem in problems)
