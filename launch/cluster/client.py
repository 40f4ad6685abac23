"""A client of a cluster's job API, the only way in which a laptop talks to a cluster.

Every attempt of a search is a job, ``NAME-a1``, ``NAME-a2``, ... Its metadata have the run's name, the run's folder on
the cluster and the configuration, so that any machine can continue the search.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import re
import secrets
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunesweep.models import UserError
from prunesweep.models.errors import nearest
from prunesweep.models.io.scratch import scratch_for_libraries

from .auth import Head, greet

__all__ = ["Attempt", "Cluster", "last_json"]

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
POLL, PATIENCE = 0.5, 5.0  # seconds between two checks of a short job; before connecting again
BANNER = re.compile(r"^(\S+ \S+\tINFO job_manager\.py:\d+ -- .*|Running entrypoint for job .*)\n", re.M)


@dataclass(frozen=True)
class Attempt:
    """One job of a search; times in seconds since 1970."""

    run: str
    number: int
    job: str
    status: str
    folder: str
    config: str
    started: float | None
    ended: float | None
    message: str
    pip: bool

    @property
    def over(self) -> bool:
        """True once the job has ended."""
        return self.status in ENDED


class Cluster:
    """The job API of the head at ``address``.

    Raises:
        UserError: it cannot be reached, or its token is missing or wrong.
    """

    def __init__(self, address: str) -> None:
        self.head: Head = greet(address)
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        for name in (
            "ray.dashboard.modules.dashboard_sdk",
            "ray.dashboard.modules.job.sdk",
            "ray._private.runtime_env.packaging",
        ):
            logging.getLogger(name).setLevel(logging.WARNING)
        try:
            self._client = JobSubmissionClient(self.head.url, headers=dict(self.head.headers))
        except AuthenticationError as error:
            raise UserError(
                f"RAY_AUTH_MODE=token is set here, but no token is, and {self.head.url} wants none: unset RAY_AUTH_MODE"
            ) from error

    def attempts(self, run: str | None = None) -> list[Attempt]:
        """Return the searches that this head remembers, in order of submission.

        Args:
            run: only the attempts of this run.
        """
        found = []
        for job in self._client.list_jobs():
            facts = job.metadata or {}
            if facts.get("prunesweep") == "search" and run in (None, facts["run"]):
                # what a manifest has started has a name of KubeRay's, and is the only attempt that its head knows
                named = re.search(r"-a(\d+)$", job.submission_id)
                found.append(
                    Attempt(
                        run=facts["run"],
                        number=int(named[1]) if named else 1,
                        job=job.submission_id,
                        status=str(job.status.value),
                        folder=facts["folder"],
                        config=_decoded(facts),
                        started=_seconds(job.start_time),
                        ended=_seconds(job.end_time),
                        message=job.message or "",
                        pip=bool(facts.get("pip")),
                    )
                )
        return sorted(found, key=lambda a: (a.started or 0, a.run, a.number))

    def latest(self, run: str) -> Attempt:
        """Return the last attempt of a run.

        Raises:
            UserError: this head does not know the run.
        """
        attempts = self.attempts(run)
        if not attempts:
            known = sorted({a.run for a in self.attempts()})
            raise UserError(
                f"{self.head.url} knows no run {run!r}; known: {', '.join(known) or 'none'}. {nearest(run, known)} "
                "A head forgets its jobs when it is started again: the run's folder is still there, "
                "and submitting its configuration with --resume goes on with it"
            )
        return max(attempts, key=lambda a: a.number)

    def submit(
        self, job: str, entrypoint: str, staged: Path, environment: Mapping[str, Any], metadata: Mapping[str, str]
    ) -> None:
        """Start a job in a copy of a folder.

        Args:
            job: name of the job.
            entrypoint: its command line.
            staged: the folder to copy.
            environment: Ray's runtime environment, without its working directory.
            metadata: strings by name that the head keeps with the job.

        Raises:
            UserError: the cluster rejects the job.
        """
        try:
            with scratch_for_libraries():  # Ray packs the folder into a file that a kill would leave
                self._client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=job,
                    runtime_env={"working_dir": str(staged), **environment},
                    metadata=dict(metadata),
                )
        except RuntimeError as error:
            raise UserError(f"{self.head.url} does not take the job {job}: {error}") from error

    def stop(self, job: str) -> bool:
        """Ask a job to end; return False if it has ended already."""
        return bool(self._client.stop_job(job))

    def status(self, job: str) -> str:
        """Return the status of a job, in Ray's words."""
        return str(self._client.get_job_status(job).value)

    def exit_code(self, job: str) -> int | None:
        """Return the exit code of the job's process; None if it was killed or never started."""
        code = self._client.get_job_info(job).driver_exit_code
        return None if code is None else int(code)

    def logs(self, job: str) -> str:
        """Return what a job has printed so far, without the lines that Ray adds."""
        return BANNER.sub("", self._client.get_job_logs(job))

    def follow(self, job: str, write: Callable[[str], None]) -> str:
        """Pass on a job's output until it ends, renewing lost connections; return its final status.

        Args:
            job: name of the job.
            write: called with each new piece of output.
        """
        shown = 0
        while True:
            with contextlib.suppress(OSError, RuntimeError, _aiohttp_errors()):
                for text in self._tail(job, shown):
                    shown += len(text)
                    write(text)
            with contextlib.suppress(OSError, RuntimeError):
                status = self.status(job)
                if status in ENDED:
                    write(self._client.get_job_logs(job)[shown:])
                    return status
            time.sleep(PATIENCE)

    def _tail(self, job: str, shown: int) -> Iterator[str]:
        """Yield what a job prints after the first ``shown`` characters."""
        loop = asyncio.new_event_loop()
        stream = self._client.tail_job_logs(job).__aiter__()
        try:
            while True:
                text = loop.run_until_complete(anext(stream, None))
                if text is None:
                    return
                skipped, shown = text[shown:], max(shown - len(text), 0)
                if skipped:
                    yield skipped
        finally:
            loop.run_until_complete(stream.aclose())
            loop.close()

    def call(
        self, what: str, arguments: Sequence[str], staged: Path, environment: Mapping[str, Any], *, timeout: float
    ) -> tuple[int | None, str]:
        """Run ``python -m ARGUMENTS`` as a short job, delete it, and return its exit code and output.

        Args:
            what: first part of the job's name.
            arguments: the module and its arguments.
            staged: folder in a copy of which it runs.
            environment: Ray's runtime environment, without its working directory.
            timeout: seconds to wait for its end.

        Raises:
            UserError: the job could not run, or has not ended after ``timeout`` seconds.
        """
        job = f"{what}-{secrets.token_hex(4)}"
        self.submit(job, f"python -m {shlex.join(arguments)}", staged, environment, {"prunesweep": what})
        deadline = time.monotonic() + timeout
        try:
            while self.status(job) not in ENDED:
                if time.monotonic() > deadline:
                    raise UserError(f"{self.head.url}: job {job} has not ended after {timeout:g} s; see its log there")
                time.sleep(POLL)
            info = self._client.get_job_info(job)
            if info.driver_exit_code is None:
                raise UserError(f"{self.head.url}: job {job} could not run: {info.message}")
            return self.exit_code(job), self.logs(job)
        finally:
            with contextlib.suppress(RuntimeError):  # a job that has not ended is stopped, and stays in the list
                self.stop(job)
                self._client.delete_job(job)


def _decoded(facts: Mapping[str, str]) -> str:
    """The configuration in the metadata of a job."""
    config = facts["config"]
    return base64.b64decode(config).decode() if facts.get("encoding") == "base64" else config


def _seconds(milliseconds: int | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def _aiohttp_errors() -> type[Exception]:
    import aiohttp

    return aiohttp.ClientError


def last_json(output: str) -> Any:
    """Return the value of the last line of ``output`` that is JSON, or None."""
    for line in reversed(output.splitlines()):
        with contextlib.suppress(ValueError):
            return json.loads(line)
    return None
