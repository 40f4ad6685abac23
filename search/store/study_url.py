"""What ``search.study`` may say: where Optuna's studies of a search are kept."""

from __future__ import annotations

from urllib.parse import parse_qsl, urlsplit

__all__ = ["JOURNAL", "PACKAGES", "PASSWORD", "why_not"]

JOURNAL = "journal"  # in the run's folder
PASSWORD = "PRUNESWEEP_STUDY_PASSWORD"  # variable of the environment
PACKAGES = {"postgresql": "psycopg", "redis": "redis", "rediss": "redis"}  # by scheme


def why_not(url: str) -> str:
    """Why a value of ``search.study`` cannot be used, without what may be a password; empty where it can."""
    if url == JOURNAL:
        return ""
    kinds = "journal, postgresql://USER@HOST/DATABASE or redis://HOST:6379/0"
    try:
        parts = urlsplit(url)
        has_password = bool(parts.password) or any("password" in key.lower() for key, _ in parse_qsl(parts.query))
        parts.port  # noqa: B018 (raises ValueError)
    except ValueError as error:
        return f"study: is no URL ({error}); take {kinds}"
    if has_password:
        where = "PGPASSWORD or ~/.pgpass" if parts.scheme.startswith("postgres") else "the environment"
        return (
            f"study: has a password, which would be kept in the run and shown: leave it out, and give it by {PASSWORD}"
            f"{f', {where}' if where != 'the environment' else ''} where the search is driven"
        )
    if parts.scheme not in PACKAGES:
        return f"study: takes {kinds}, not {parts.scheme or url}://..."
    return ""
