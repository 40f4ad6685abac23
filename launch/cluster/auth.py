"""Find the token of a Ray cluster, and ask the cluster whether it requires one.

Ray's own order is kept: ``RAY_AUTH_TOKEN``, the file ``RAY_AUTH_TOKEN_PATH``, ``~/.ray/auth_token``. A token is sent
only to a cluster that asks for one, in a header; it is never written anywhere.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from prunesweep.models import UserError

__all__ = ["Head", "find_token", "greet"]

TIMEOUT = 15.0  # seconds


@dataclass(frozen=True)
class Head:
    """A head that answers: its address, its version of Ray, and the headers that it requires."""

    url: str
    ray: str
    headers: dict[str, str] = field(default_factory=dict, repr=False)


def find_token() -> tuple[str, str] | None:
    """Return a token and the place where it was found, or None.

    Raises:
        UserError: ``RAY_AUTH_TOKEN_PATH`` names a file that cannot be read.
    """
    token = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    if token:
        return token, "RAY_AUTH_TOKEN"
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        token = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        if named:
            raise UserError(f"RAY_AUTH_TOKEN_PATH={named}: cannot be read: {error.strerror}") from error
        return None
    return (token, str(path)) if token else None


def greet(address: str) -> Head:
    """Ask the dashboard of a head for its version of Ray, with a token if it requires one.

    Raises:
        UserError: nothing or something else answers, or the token is missing or wrong.
    """
    url = address.rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise UserError(
            f"--address {address}: must be the http address of the head's dashboard, for example http://HEAD:8265"
        )
    status, body = _get(url, {})
    headers: dict[str, str] = {}
    if status in (401, 403):
        if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
            raise UserError(f"{url} wants a token, and RAY_AUTH_MODE=disabled is set here: unset it")
        found = find_token()
        if found is None:
            raise UserError(
                f"{url} wants a token: set RAY_AUTH_TOKEN_PATH to a file with the head's token (0600), or "
                "RAY_AUTH_TOKEN, or copy the head's ~/.ray/auth_token to this machine"
            )
        token, where = found
        headers = {"Authorization": f"Bearer {token}"}
        status, body = _get(url, headers)
        if status in (401, 403):
            raise UserError(f"{url} refuses the token of {where}: it is another cluster's; take that of this head")
    try:
        version = json.loads(body)["ray_version"] if status == 200 else None
    except (ValueError, KeyError, TypeError):
        version = None
    if version is None:
        raise UserError(f"{url} answers with {status}, and not as Ray's dashboard does: is the port right (8265)?")
    return Head(url, version, headers)


def _get(url: str, headers: dict[str, str]) -> tuple[int, str]:
    request = urllib.request.Request(f"{url}/api/version", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            return answer.status, answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, ""
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"nothing answers at {url}: {reason}. Is the head up, with ray[default] and its dashboard, "
            "and the tunnel open?"
        ) from error
