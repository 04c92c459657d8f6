"""Asking a judge: any server that speaks OpenAI's chat completions, many requests at a time, with retries."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from noisefit.answers.judging import AGAIN, UNPARSABLE, Answer, grade_of
from noisefit.base.errors import InputError, LocalError

KEYS = ("NOISEFIT_JUDGE_KEY", "OPENAI_API_KEY")  # variables of the environment; the first that is set counts
ASKS = 2  # of a case, where the first reply is no grade
CONNECT_SECONDS = 10
SHOWN = 200  # letters of what a server says
PIECE = 8  # letters of the key that a text may not have


@dataclass(frozen=True)
class Server:
    """Which judge, and how it is asked."""

    base_url: str
    model: str
    key: str  # empty where there is none
    concurrency: int
    timeout: float  # seconds that a reply may take
    retries: int  # of a request that finds no connection, no answer in time, 408, 409, 429 or 500 and above
    max_tokens: int  # of a reply; 0: no limit is sent

    async def ask_all(self, answers: Sequence[Answer], keep: Callable[[Answer, str, list[str]], None]) -> None:
        """Have answers graded, `concurrency` at a time; `keep` gets each one's outcome and replies as they come.

        Raises:
            InputError: the server refuses the key, the model or a case, or is none of this kind.
            LocalError: it stays dead or busy. The requests that are under way are dropped.
        """
        openai = import_openai()
        client = openai.AsyncOpenAI(
            base_url=self.base_url,
            api_key=self.key or "none",  # the client wants one; a server without a key does not look
            timeout=openai.Timeout(self.timeout, connect=min(self.timeout, CONNECT_SECONDS)),
            max_retries=self.retries,
        )
        left = iter(answers)

        async def work() -> None:
            for answer in left:
                keep(answer, *await self._grade(client, answer))

        async with client:
            tasks = [asyncio.create_task(work()) for _ in range(min(self.concurrency, len(answers)))]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _grade(self, client: Any, answer: Answer) -> tuple[str, list[str]]:
        """The outcome of one answer, and the replies, without the key where a server says it."""
        messages = [{"role": "user", "content": answer.case.prompt}]
        replies: list[str] = []
        for _ in range(ASKS):
            reply = await self._reply(client, answer, messages)
            replies.append(without(reply, self.key))
            if grade := grade_of(reply):
                return grade, replies
            # A judge at temperature 0 would say the same again: it is told what was wrong.
            said = {"role": "assistant", "content": reply[-SHOWN:] or "(nothing)"}
            messages = [messages[0], said, {"role": "user", "content": AGAIN}]
        return UNPARSABLE, replies

    async def _reply(self, client: Any, answer: Answer, messages: list[dict[str, str]]) -> str:
        openai = import_openai()
        limit = {"max_tokens": self.max_tokens} if self.max_tokens else {}
        try:
            found = await client.chat.completions.create(model=self.model, messages=messages, temperature=0, **limit)
            content = found.choices[0].message.content
            return content if isinstance(content, str) else ""
        except openai.APIStatusError as error:
            raise self._refused(error.status_code, answer, self._says(error)) from None
        except openai.APITimeoutError:
            why = f"no reply within {self.timeout:g} seconds (--timeout)"
            raise LocalError(f"{self.base_url}: {why}, after {self.retries} retries") from None
        except openai.APIConnectionError as error:
            why = self._says(error.__cause__ or error) or type(error.__cause__).__name__
            raise LocalError(f"{self.base_url}: no connection, after {self.retries} retries: {why}") from None
        except (openai.APIError, ValueError, AttributeError, TypeError, IndexError):
            raise InputError(
                f"{self.base_url}: its reply is no chat completion; expected a server that speaks OpenAI's API, whose "
                "address mostly ends in /v1"
            ) from None

    def _refused(self, status: int, answer: Answer, says: str) -> InputError:
        if status in (401, 403):
            given = f"that of {key_name(os.environ)}" if self.key else f"none: {' or '.join(KEYS)} may hold it"
            return InputError(f"{self.base_url}: the server refuses the key ({status}), which is {given}")
        if status == 404:
            return InputError(
                f"{self.base_url}: no such address, or no model {self.model!r} (404): {says}; --base_url mostly ends "
                "in /v1, and --model is what the server calls it"
            )
        if status in (408, 409, 429) or status >= 500:
            return LocalError(f"{self.base_url}: still status {status} after {self.retries} retries: {says}")
        return InputError(f"row {answer.row}: the server refuses to grade it ({status}): {says}")

    def _says(self, error: BaseException) -> str:
        return without(str(error), self.key)[:SHOWN]


def import_openai() -> Any:
    """The client, which is no requirement of the rest. Raises `InputError` where it is not installed."""
    try:
        import openai
    except ImportError:
        raise InputError("a judge needs the openai client, which is not installed: pip install 'openai>=2'") from None
    return openai


def key_name(environment: Mapping[str, str]) -> str | None:
    """The variable that holds the key; `None` where no key is sent."""
    name = next((name for name in KEYS if name in environment), None)
    return name if name and environment[name].strip() else None


def read_key(environment: Mapping[str, str]) -> str:
    """The key. Raises `InputError`, which does not show it, where it cannot be one."""
    name = key_name(environment)
    key = environment[name].strip() if name else ""
    if not all("!" <= letter <= "~" for letter in key):
        raise InputError(f"{name}: expected a key of ASCII letters, digits and signs without spaces; it has others")
    return key


def check_url(url: str) -> str:
    """The address, without a slash at its end. Raises `InputError` where it is none, or has a password in it."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
    except ValueError:
        raise InputError("--base_url: no address; expected such as http://localhost:8000/v1") from None
    if "@" in url or parts.query or parts.fragment:
        raise InputError(f"--base_url: expected an address alone, without a key or question; a key goes into {KEYS[0]}")
    if not known or not url.isascii() or not url.isprintable() or " " in url:
        raise InputError(f"--base_url {url[:80]}: no address; expected such as http://localhost:8000/v1")
    return url.rstrip("/")


def without(text: str, key: str) -> str:
    """A text without the key, nor any eight letters of it: a server may quote a part, or in another spelling."""
    size = min(PIECE, len(key))
    if not size:
        return text
    pieces = {key[i : i + size] for i in range(len(key) - size + 1)}
    hidden = set[int]()
    for start in range(len(text) - size + 1):
        if text[start : start + size] in pieces:
            hidden.update(range(start, start + size))
    return "".join("*" if i in hidden else letter for i, letter in enumerate(text))
