"""`opgrpo serve-reward`: one reward as a service, for scorers on other machines."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from typing import Any

from pipelines.rewards.base import build_reward


def serve(name: str, options: Mapping[str, Any], host: str, port: int, token_variable: str | None) -> None:
    """Build a reward and serve it until stopped.

    options: for the reward's factory. token_variable: the environment variable with the token that clients
    must send. Raises ValueError when the reward cannot be built, the token is not set, or other machines could ask without
    one.
    """
    token = _token(token_variable)
    if token is None and not _is_local(host):
        raise ValueError(f"--host {host} lets other machines ask: set a token, and name its variable with --token-variable")
    try:
        import uvicorn

        from pipelines.reward_app import Limits, create_app
    except ImportError as error:
        raise ValueError(f'serving a reward needs {error.name}: pip install "opgrpo[serve]"') from error
    reward = build_reward(name, options)
    uvicorn.run(create_app(reward, token, Limits()), host=host, port=port, access_log=False, server_header=False)


def _token(variable: str | None) -> str | None:
    if variable is None:
        return None
    if not (token := os.environ.get(variable, "").strip()):
        raise ValueError(f"--token-variable names {variable}, which is not set in the environment: set it to a token")
    return token


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
