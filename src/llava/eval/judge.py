"""Judges: a language model behind an OpenAI-compatible endpoint grades answers, and its replies are kept.

A task that needs one has `judge_requests` (`JudgedTask`). `judge_answers` asks what the store does not hold yet, writes
each reply to the store as it comes, and returns the answers with their replies under `JUDGED` in `AnswerRow.meta`,
which is where `score` reads them. A second call with the same answers asks nothing; without a judge it only reads the
store. A reply belongs to the exact payload that it answered, by hash: a changed answer is asked again. Not covered:
two programs writing one store.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from llava.errors import DataError, EngineError, UsageError
from llava.eval.task import AnswerRow, Question

JUDGED = "judge"
OPENAI_URL = "https://api.openai.com/v1"
KEY_VARIABLE = "OPENAI_API_KEY"
# US dollars for a million tokens in and out, by the longest beginning of a model's name: OpenAI's list of 2023.
PRICES = {"gpt-4": (30.0, 60.0), "gpt-4-turbo": (10.0, 30.0), "gpt-4-1106": (10.0, 30.0), "gpt-3.5-turbo": (0.5, 1.5)}
_LETTERS_PER_TOKEN = 4
_RETRIED = frozenset({408, 409, 429, 500, 502, 503, 504})


@dataclass(frozen=True)
class JudgeRequest:
    """question_id: whose answer it judges. payload: the exact body for /chat/completions."""

    question_id: str
    payload: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Hash of question and payload, by which a stored reply is found."""
        text = json.dumps([self.question_id, self.payload], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Reply:
    """text: what the judge said. model: as it names itself. tokens: (in, out), 0 where it does not say."""

    text: str
    model: str
    tokens: tuple[int, int]


@runtime_checkable
class JudgedTask(Protocol):
    """What a task has besides `Task`'s methods when a judge grades its answers."""

    name: str

    def judge_requests(self, questions: Sequence[Question], answers: Sequence[AnswerRow]) -> list[JudgeRequest]:
        """The first request for each answer that needs a judge."""

    def ask_again(self, request: JudgeRequest, replies: Sequence[str]) -> JudgeRequest | None:
        """The next request when the last reply cannot be read, or None to let it be. request: the first one."""


Ask = Callable[[JudgeRequest], Reply]


@dataclass(frozen=True)
class Judge:
    """An endpoint. model: asked instead of the one that each payload names. key: None takes OPENAI_API_KEY's."""

    url: str = OPENAI_URL
    model: str | None = None
    key: str | None = None
    concurrency: int = 4
    timeout_seconds: float = 120.0
    attempts: int = 6
    wait_seconds: float = 1.0

    def __post_init__(self) -> None:
        if not self._key():
            raise UsageError(
                f"the judge at {self.url} needs a key: set {KEY_VARIABLE} (any word for a server that asks for none). "
                "Nothing was asked. Stored replies are scored without one"
            )
        if not self.url.startswith(("http://", "https://")):
            raise UsageError(f"judge {self.url!r}: an address begins with http:// or https://")

    def _key(self) -> str:
        return self.key if self.key is not None else os.environ.get(KEY_VARIABLE, "")

    def __call__(self, request: JudgeRequest) -> Reply:
        """Ask once, waiting and trying again on limits and failures. Raises EngineError when it gives up."""
        body = json.dumps({**request.payload, **({"model": self.model} if self.model else {})}).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key()}"}
        said = ""
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(self.wait_seconds * 2 ** (attempt - 1))
            message = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", data=body, headers=headers)
            try:
                with urllib.request.urlopen(message, timeout=self.timeout_seconds) as response:
                    return _read_reply(json.load(response))
            except urllib.error.HTTPError as error:
                with error:
                    said = f"{error.code}: {error.read(400).decode(errors='replace')}"
                if error.code not in _RETRIED:
                    break
            except (urllib.error.URLError, TimeoutError, ConnectionError, ValueError) as error:
                said = str(error)
        raise EngineError(
            f"judge {self.url}: question {request.question_id} no reply ({said}); those so far are kept, run again"
        )


def _read_reply(body: Any) -> Reply:
    try:
        text = body["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"no completion: {json.dumps(body)[:200]}") from None
    usage = body.get("usage") or {}
    return Reply(text or "", body.get("model", ""), (usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)))


class ReplyStore:
    """Replies in a JSONL file, found by request. A last line that a kill cut off is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._replies: dict[str, Reply] = {}
        whole = path.read_bytes() if path.is_file() else b""
        kept = whole[: whole.rfind(b"\n") + 1]
        if len(kept) < len(whole):
            path.write_bytes(kept)
        for number, line in enumerate(kept.splitlines(), start=1):
            try:
                row = json.loads(line)
                self._replies[row["key"]] = Reply(row["reply"], row["model"], (row["tokens_in"], row["tokens_out"]))
            except (ValueError, KeyError, TypeError):
                raise DataError(f"{path}:{number}: no stored reply; take the line out, and it is asked again") from None

    def get(self, request: JudgeRequest) -> Reply | None:
        """The reply to this exact request, if it is there."""
        return self._replies.get(request.key)

    def put(self, request: JudgeRequest, reply: Reply) -> None:
        """Keep a reply; it is in the file when this returns."""
        self._replies[request.key] = reply
        row: dict[str, Any] = {
            "key": request.key,
            "question_id": request.question_id,
            "reply": reply.text,
            "model": reply.model,
        }
        row |= {"tokens_in": reply.tokens[0], "tokens_out": reply.tokens[1], "payload": dict(request.payload)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def judge_answers(
    task: JudgedTask,
    questions: Sequence[Question],
    answers: Sequence[AnswerRow],
    *,
    store: ReplyStore,
    judge: Judge | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[AnswerRow]:
    """The answers with their judge's replies. say: told the cost before and after.

    Raises UsageError when replies are missing and there is no judge; EngineError when the judge does not answer.
    """
    firsts = task.judge_requests(questions, answers)
    open_requests = [request for first in firsts if (request := _next_missing(task, first, store)) is not None]
    if open_requests and judge is None:
        raise UsageError(
            f"{task.name}: {len(open_requests):,} of {len(firsts):,} answers have no judge's reply in {store.path}; "
            f"give a judge's address, and its key in {KEY_VARIABLE}"
        )
    if open_requests and judge is not None:
        say(f"{task.name}: {estimate_cost(open_requests, model=judge.model)}")
        spent = _ask_all(task, firsts, store, judge)
        say(f"{task.name}: {_cost(judge.model or open_requests[0].payload['model'], *_sum(spent))} (measured)")
    said: dict[str, tuple[str, ...]] = {}
    for first in firsts:
        said[first.question_id] = (*said.get(first.question_id, ()), *_replies(task, first, store))
    return [
        replace(answer, meta={**answer.meta, JUDGED: said[answer.question_id]})
        if answer.question_id in said
        else answer
        for answer in answers
    ]


def replies_of(answer: AnswerRow, *, task: str) -> Sequence[str]:
    """The judge's replies to an answer, first to last. Raises DataError when it was not judged."""
    if JUDGED not in answer.meta:
        raise DataError(f"{task}: question {answer.question_id} was not judged; give a judge, or its stored replies")
    replies: Sequence[str] = answer.meta[JUDGED]
    return replies


def estimate_cost(requests: Sequence[JudgeRequest], *, model: str | None = None) -> str:
    """What asking once will take at most: four letters a token in, `max_tokens` out."""
    letters = sum(len(str(turn["content"])) for request in requests for turn in request.payload["messages"])
    out = sum(int(request.payload.get("max_tokens", 256)) for request in requests)
    cost = _cost(model or requests[0].payload["model"], letters // _LETTERS_PER_TOKEN, out)
    return f"{len(requests):,} requests to the judge, {cost} (estimated, at most)"


def _cost(model: str, tokens_in: int, tokens_out: int) -> str:
    tokens = f"{tokens_in:,} tokens in, {tokens_out:,} out"
    known = [name for name in PRICES if model.startswith(name)]
    if not known:
        return f"{tokens}, price of {model} not known"
    price_in, price_out = PRICES[max(known, key=len)]
    return f"{tokens}, {(tokens_in * price_in + tokens_out * price_out) / 1e6:.2f} US dollars at list price"


def _sum(replies: Sequence[Reply]) -> tuple[int, int]:
    return sum(reply.tokens[0] for reply in replies), sum(reply.tokens[1] for reply in replies)


def _chain(task: JudgedTask, first: JudgeRequest, store: ReplyStore) -> Iterator[tuple[JudgeRequest, Reply | None]]:
    """A request, then what follows from its replies, each with its stored reply; ends at the first that has none."""
    request: JudgeRequest | None = first
    replies: list[str] = []
    while request is not None:
        reply = store.get(request)
        yield request, reply
        if reply is None:
            return
        replies.append(reply.text)
        request = task.ask_again(first, replies)


def _next_missing(task: JudgedTask, first: JudgeRequest, store: ReplyStore) -> JudgeRequest | None:
    return next((request for request, reply in _chain(task, first, store) if reply is None), None)


def _replies(task: JudgedTask, first: JudgeRequest, store: ReplyStore) -> list[str]:
    return [reply.text for _, reply in _chain(task, first, store) if reply is not None]


def _ask_all(task: JudgedTask, firsts: Sequence[JudgeRequest], store: ReplyStore, judge: Judge) -> list[Reply]:
    """Round after round, ask what is missing; replies are stored by this thread alone."""
    spent: list[Reply] = []
    while missing := [found for first in firsts if (found := _next_missing(task, first, store)) is not None]:
        failed: EngineError | None = None
        with ThreadPoolExecutor(judge.concurrency) as pool:
            futures = {pool.submit(judge, request): request for request in missing}
            for future in as_completed(futures):
                try:
                    reply = future.result()
                except CancelledError:
                    continue
                except EngineError as error:
                    failed = failed or error
                    for other in futures:
                        other.cancel()  # those under way are paid for, and their replies are kept
                    continue
                spent.append(reply)
                store.put(futures[future], reply)
        if failed is not None:
            raise failed
    return spent
