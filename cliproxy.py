#!/usr/bin/env python3
"""CLIProxy: the AI coding CLIs you are logged in to, behind one local OpenAI-compatible endpoint.

    python3 cliproxy.py --port 8080
    export OPENAI_BASE_URL=http://localhost:8080/v1 OPENAI_API_KEY=none
    python3 cliproxy.py doctor          what is installed, logged in, answering

One way through the file, and it is the order of its sections:

    socket -> Dialect.parse -> Request -> Router -> Driver -> Child      (bytes to the CLI)
    socket <- Dialect.frames <- Event, Event, ... Done <- Driver <- Child  (lines from the CLI)

The words used here, one for each thing:
    provider   a CLI with its settings, an entry of providers.json
    dialect    an HTTP API (OpenAI chat completions)
    driver     a way to talk to a CLI (jsonl: a JSON object a line; text: a terminal)
    strategy   a driver with the flags and rules one provider needs for it; best first
    turn       a request at one provider, and its answer
    event      a piece of the answer: Text, Thinking, Usage, Done
    frame      one SSE message;  chunk: one HTTP chunk;  delta: the JSON field
    line       a str without its newline
    child      a process;  group: it and whatever it started
    scope      when to give up on a turn: a deadline, or a client that has gone
    place      the private directory of one child: work/ (empty, its cwd), tmp/, home/ and files
    slot       the right to run one child of a provider

    grep -n '^# ===' cliproxy.py        prints the contents.
"""
from __future__ import annotations

import sys

if sys.platform == "win32":
    print("cliproxy needs Linux or macOS (it uses os.fork and pseudo-terminals). On Windows, run it inside WSL.", file=sys.stderr)
    sys.exit(2)
if sys.version_info < (3, 9):
    print("cliproxy needs Python 3.9 or newer; this is %d.%d. Try: python3.9 cliproxy.py" % sys.version_info[:2], file=sys.stderr)
    sys.exit(2)

import argparse
import base64
import binascii
import codecs
import datetime
import errno
import fcntl
import fnmatch
import glob
import hashlib
import hmac
import io
import json
import os
import pty
import queue
import re
import selectors
import shutil
import signal
import socket
import socketserver
import struct
import tempfile
import termios
import threading
import time
import tty
import urllib.parse
import uuid
from collections import deque
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Set, Tuple, Union

VERSION = "0.1.0"

# === Values ==========================================================================================================
# The nouns that travel. All frozen: a value made in one section is never changed in another.


@dataclass(frozen=True)
class TextPart:
    """Words in a message."""
    text: str


@dataclass(frozen=True)
class ImagePart:
    """An image in a message: `mime` like image/png, `data` in base64."""
    mime: str
    data: str


@dataclass(frozen=True)
class CallPart:
    """A tool call an assistant message made: `arguments` is the JSON text, as the model wrote it."""
    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class ResultPart:
    """What a tool answered to the call with this id."""
    id: str
    name: str
    text: str


Part = Union[TextPart, ImagePart, CallPart, ResultPart]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is system, user, assistant or tool."""
    role: str
    parts: Tuple[Part, ...]
    name: str = ""

    @property
    def text(self) -> str:
        return "".join(p.text for p in self.parts if isinstance(p, TextPart))


@dataclass(frozen=True)
class Request:
    """What a client asked, whatever dialect it came in.

    `params` holds what steers the answer, under one name each: temperature, top_p, max_tokens, stop (list of str), seed,
    effort, response_format, presence_penalty, frequency_penalty, n, tools ...; absent means the client did not say.
    """
    model: str
    messages: Tuple[Message, ...]
    params: Mapping[str, Any]
    stream: bool = False
    stream_usage: bool = False
    key_id: str = ""


@dataclass(frozen=True)
class Text:
    """A piece of the answer as it arrives; the pieces joined are the whole answer."""
    text: str


@dataclass(frozen=True)
class Thinking:
    """A piece of the model's reasoning, as far as the CLI shows it."""
    text: str


@dataclass(frozen=True)
class Usage:
    """Tokens as the CLI counted them; None where it did not say. `input` includes `cached`, `output` includes `reasoning`."""
    input: Optional[int] = None
    output: Optional[int] = None
    cached: Optional[int] = None
    reasoning: Optional[int] = None

    def merged(self, later: Usage) -> Usage:
        return Usage(*(new if new is not None else old for old, new in
                       ((self.input, later.input), (self.output, later.output), (self.cached, later.cached), (self.reasoning, later.reasoning))))


@dataclass(frozen=True)
class Done:
    """The end of an answer: stop, length or content_filter. Every stream of events ends in one of these, or raises."""
    reason: str


@dataclass(frozen=True)
class Waiting:
    """Nothing came for a keep-alive interval. Lets a dialect say so to the client; never part of the answer."""


Event = Union[Text, Thinking, Usage, Done, Waiting]


# === Errors ==========================================================================================================
# Every way to fail. An error is raised, never passed on as an event. A dialect turns it into its own JSON; here stand the
# HTTP status and what OpenAI calls the type and the code (platform.openai.com/docs/guides/error-codes).


class ClientGone(Exception):
    """The client closed its connection. Nobody is left to be told; the log says 499."""


class Cancelled(Exception):
    """Another part of the same request failed, so this one is not wanted any more."""


class FormatChanged(Exception):
    """A CLI ran well and said nothing that the strategy's rules understand. The next strategy may."""


class ProxyError(Exception):
    """What happened, why, and what to do about it, in one sentence each.

    `retry_after` is in seconds; `should_retry` goes out as x-should-retry, which openai-python and -node obey
    (_base_client.py, _should_retry); None leaves it to the client.
    """
    status, type, code = 500, "server_error", "internal_error"
    should_retry: Optional[bool] = None

    def __init__(self, what: str, why: str = "", do: str = "", *, param: Optional[str] = None, code: Optional[str] = None,
                 retry_after: Optional[float] = None, close: bool = False):
        self.message = what + (f": {why}" if why else "") + (f". {do[0].upper()}{do[1:]}" if do else "")
        super().__init__(self.message)
        self.what = what
        self.param, self.retry_after, self.close = param, retry_after, close
        if code:
            self.code = code


class BadRequest(ProxyError):
    """The request is not one; `param` names the field."""
    status, type, code = 400, "invalid_request_error", "invalid_value"


class Unauthorized(ProxyError):
    """The key given to this proxy is missing or wrong."""
    status, type, code = 401, "invalid_request_error", "invalid_api_key"


class Forbidden(ProxyError):
    """The Host or Origin header is not one this proxy answers to."""
    status, type, code = 403, "invalid_request_error", "forbidden"


class NotFound(ProxyError):
    """No such path."""
    status, type, code = 404, "invalid_request_error", "unknown_url"


class MethodNotAllowed(ProxyError):
    """The path is there, the method is not."""
    status, type, code = 405, "invalid_request_error", "method_not_allowed"


class RequestTimeout(ProxyError):
    """The client took too long to send its request."""
    status, type, code = 408, "invalid_request_error", "request_timeout"


class TooLarge(ProxyError):
    """The body is over the limit."""
    status, type, code = 413, "invalid_request_error", "request_too_large"


class UnsupportedMedia(ProxyError):
    """The body is not declared as JSON."""
    status, type, code = 415, "invalid_request_error", "unsupported_media_type"


class Busy(ProxyError):
    """All slots are taken and the queue's deadline has passed, or there are too many connections."""
    status, type, code, should_retry = 429, "rate_limit_error", "rate_limit_exceeded", True


class Loop(ProxyError):
    """The request came from a CLI that this very proxy started."""
    status, type, code, should_retry = 508, "invalid_request_error", "loop_detected", False


class Stopping(ProxyError):
    """The proxy is shutting down."""
    status, type, code, should_retry = 503, "server_error", "shutting_down", True


class ProviderError(ProxyError):
    """A provider failed. The subclasses are the error classes that providers.json may name."""
    status, type, code = 502, "server_error", "provider_error"
    advice = "try again, or use another model"


class ModelNotFound(ProviderError):
    status, type, code = 404, "invalid_request_error", "model_not_found"
    advice = "GET /v1/models lists what can be served"


class NotLoggedIn(ProviderError):
    status, type, code, should_retry = 401, "authentication_error", "not_logged_in", False
    advice = "{login}"


class AuthenticationFailed(ProviderError):
    status, type, code, should_retry = 401, "authentication_error", "provider_authentication_failed", False
    advice = "its login or key was refused, so renew it: {login}"


class PermissionDenied(ProviderError):
    status, type, code, should_retry = 403, "permission_error", "provider_permission_denied", False
    advice = "check what this account may use, or log in with another: {login}"


class RateLimited(ProviderError):
    status, type, code, should_retry = 429, "rate_limit_error", "rate_limit_exceeded", True
    advice = "wait, or use another model"


class QuotaUsedUp(ProviderError):
    status, type, code = 429, "insufficient_quota", "insufficient_quota"
    advice = "wait for the limit to reset, or use another model"


class BillingRefused(ProviderError):
    status, type, code, should_retry = 402, "insufficient_quota", "insufficient_quota", False
    advice = "check the plan and the billing page of that account"


class ContextLengthExceeded(ProviderError):
    status, type, code, should_retry = 400, "invalid_request_error", "context_length_exceeded", False
    # LangChain and others look for "maximum context length"; LiteLLM, and so aider, for "model's maximum context limit".
    advice = "shorten the messages: they exceed the model's maximum context limit (its maximum context length)"


class Refused(ProviderError):
    status, type, code, should_retry = 400, "invalid_request_error", "content_filter", False
    advice = "rephrase the request"


class ProviderBadRequest(ProviderError):
    status, type, code, should_retry = 400, "invalid_request_error", "invalid_value", False
    advice = "change the request: its service will not take it as it is"


class ParameterRefused(ProviderBadRequest):
    """Its service does not take one parameter, `parameter`. The router leaves that out and asks again."""
    parameter = ""


class Overloaded(ProviderError):
    status, type, code, should_retry = 503, "server_error", "overloaded", True


class UpstreamFailed(ProviderError):
    """The provider's own service answered 5xx; 500 is passed on as 500."""
    status, type, code, should_retry = 500, "server_error", "provider_server_error", True


class Unreachable(ProviderError):
    status, type, code, should_retry = 502, "server_error", "provider_unreachable", True
    advice = "check this machine's network, or try again"


class Crashed(ProviderError):
    status, type, code, should_retry = 502, "server_error", "provider_crashed", True


class TimedOut(ProviderError):
    status, type, code, should_retry = 504, "server_error", "provider_timeout", False
    advice = "raise the time-out in providers.json, or use a faster model"


ERROR_CLASSES = {
    "not_logged_in": NotLoggedIn, "authentication": AuthenticationFailed, "permission": PermissionDenied, "rate_limit": RateLimited, "quota": QuotaUsedUp,
    "billing": BillingRefused, "context_length": ContextLengthExceeded, "model_not_found": ModelNotFound, "refusal": Refused,
    "bad_request": ProviderBadRequest, "overloaded": Overloaded, "server_error": UpstreamFailed, "unreachable": Unreachable,
    "crashed": Crashed, "timeout": TimedOut, "parameter": ParameterRefused,
}
WHAT_HAPPENED = {
    "not_logged_in": "{name} is not logged in", "authentication": "{name} could not authenticate",
    "permission": "{name} is not allowed to do this", "rate_limit": "{name} is rate limited",
    "quota": "{name} has used up its limit", "billing": "{name} was refused for billing reasons",
    "context_length": "the request is too long for {name}", "model_not_found": "{name} does not know the model",
    "refusal": "{name} declined", "bad_request": "{name}'s service refused the request", "overloaded": "{name}'s service is overloaded",
    "server_error": "{name}'s service failed", "unreachable": "{name} could not reach its service, or lost it", "crashed": "{name} crashed",
    "timeout": "{name} timed out", "parameter": "{name}'s service refused a parameter",
}


# === Built-in providers ==============================================================================================
# providers.json, word for word, so that the script alone is enough. The repository's file is this text
# (`cliproxy.py providers --builtin`), and a test holds the two equal. Its format is checked by PROVIDERS_SHAPE below.

BUILTIN_PROVIDERS = r'''{
  "version": 1,
  "defaults": {
    "env": {
      "pass": ["PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_*", "TZ", "XDG_*", "DBUS_SESSION_BUS_ADDRESS",
               "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "no_proxy", "all_proxy",
               "SSL_CERT_FILE", "SSL_CERT_DIR", "NODE_EXTRA_CA_CERTS"],
      "set": {"TERM": "dumb", "NO_COLOR": "1", "TMPDIR": "{dir}/tmp"}
    },
    "slots": 8,
    "timeouts": {"queue": 60, "start": 60, "first": 600, "idle": 300, "total": 3600},
    "errors": [
      {"error": "parameter", "match": "^(?=.*(?:unsupported|not support|may only be set|cannot both be|not allowed|deprecated)).*?\\b(?P<parameter>temperature|top_p|seed|stop_sequences|presence_penalty|frequency_penalty|reasoning_effort|response_format|logit_bias)\\b"},
      {"error": "not_logged_in", "match": "not logged in|please run /login|no auth type is selected|please set an auth method|missing api key|missing environment variable|authorization is required|specify the GEMINI_API_KEY"},
      {"error": "context_length", "match": "prompt is too long|context_length_exceeded|maximum context length|input token count|ran out of room in the model's context window|input exceeds the maximum length|request too large|range of input length"},
      {"error": "model_not_found", "match": "issue with the selected model|is not found for api version|model_not_found|model .{1,80} does not exist|model .{1,80} not found"},
      {"error": "billing", "match": "credit balance|insufficient_quota|quota exceeded\\. check your plan|to use codex with your chatgpt plan|extra usage|billing|payment required"},
      {"error": "quota", "match": "(?<!not your )usage limit|hit your .{0,24}limit|daily quota|quota will reset|exhausted your (capacity|daily)"},
      {"error": "billing", "status": [402]},
      {"error": "rate_limit", "status": [429]},
      {"error": "rate_limit", "match": "rate.?limit|too many requests|\\b429\\b|exceeded your current quota|resource.?exhausted|temporarily limiting requests"},
      {"error": "authentication", "status": [401]},
      {"error": "permission", "status": [403]},
      {"error": "authentication", "match": "invalid api key|api_key_invalid|api key not valid|failed to authenticate|unauthenticated|unauthorized"},
      {"error": "model_not_found", "status": [404]},
      {"error": "context_length", "status": [413]},
      {"error": "bad_request", "status": [400, 409, 422]},
      {"error": "overloaded", "status": [503, 529]},
      {"error": "overloaded", "match": "overloaded|at capacity|model is unavailable"},
      {"error": "server_error", "status": [500, 501, 502, 504]},
      {"error": "server_error", "match": "experiencing high demand|internal server error|server_error"},
      {"error": "unreachable", "match": "unable to connect|connection (error|failed|refused|reset|to the api was lost)|fetch failed|econn|enotfound|etimedout|stream disconnected|(?:^|: )terminated\\b|without a finish reason|network error"},
      {"error": "timeout", "match": "timed? ?out|timeout"}
    ],
    "reset": [
      "(?:retry after|reset after|retry_after|retry-after|try again in)\\W{0,3}(?P<duration>\\d+(?:\\.\\d+)?(?:h\\d*m?|m|s)?[\\dhms.]*)",
      "try again at (?P<date>[A-Z][a-z]{2} \\d+[a-z]{2}, \\d{4} \\d+:\\d+ [AP]M)",
      "resets (?:at )?(?P<clock>\\d+(?::\\d+)?[ap]m) \\((?P<zone>[A-Za-z_/+-]+)\\)"
    ]
  },
  "providers": {
    "claude": {
      "title": "Claude Code, by Anthropic",
      "binary": "claude",
      "install": "npm install -g @anthropic-ai/claude-code",
      "login": "run \"claude\" and type /login",
      "version": {"argv": ["--version"], "match": "(\\d+\\.\\d+\\.\\d+)", "tested": ["2.1.0", "2.1.999"]},
      "logged_in": [{"argv": ["auth", "status"], "exit": 0}],
      "models": {
        "default": "sonnet",
        "names": ["sonnet", "sonnet[1m]", "opus", "haiku", "fable", "claude-sonnet-5", "claude-opus-4-8", "claude-fable-5", "claude-haiku-4-5-20251001"],
        "aliases": {"claude-haiku-4-5": "claude-haiku-4-5-20251001"},
        "also": "claude-*"
      },
      "env": {
        "pass": ["ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_BASE_URL", "CLAUDE_CODE_OAUTH_TOKEN", "CLAUDE_CONFIG_DIR",
                 "CLAUDE_CODE_USE_BEDROCK", "CLAUDE_CODE_USE_VERTEX", "AWS_*", "CLOUD_ML_REGION", "ANTHROPIC_VERTEX_PROJECT_ID",
                 "GOOGLE_APPLICATION_CREDENTIALS"],
        "set": {
          "CLAUDE_CODE_DISABLE_ATTACHMENTS": "1",
          "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
          "CLAUDE_CODE_MAX_RETRIES": "0",
          "CLAUDE_CODE_DISABLE_NONSTREAMING_FALLBACK": "1",
          "CLAUDE_CODE_DISABLE_CLAUDE_MDS": "1",
          "CLAUDE_CODE_DISABLE_LEGACY_MODEL_REMAP": "1",
          "DISABLE_COMPACT": "1",
          "CLAUDE_CODE_MAX_CONTEXT_TOKENS": "1000000000",
          "DISABLE_AUTOUPDATER": "1",
          "ANTHROPIC_CUSTOM_HEADERS": "{env:ANTHROPIC_CUSTOM_HEADERS|}\nx-cliproxy-hop: {hop}",
          "MAX_THINKING_TOKENS": "{thinking}",
          "CLAUDE_CODE_MAX_OUTPUT_TOKENS": "{max_tokens}",
          "CLAUDE_CODE_EXTRA_BODY": {"json": {"temperature": "{temperature}", "top_p": "{top_p}", "stop_sequences": "{stop}"}}
        }
      },
      "derive": {
        "thinking": {"from": "effort", "map": {"none": "0", "minimal": "0"}},
        "level": {"from": "effort", "map": {"low": "low", "medium": "medium", "high": "high", "xhigh": "xhigh", "max": "max"}}
      },
      "files": {
        "system.md": "{system}",
        "history.jsonl": {"lines": [{"for": "history:anthropic",
          "user": {"type": "user", "uuid": "{id}", "parentUuid": "{parent}", "sessionId": "{uuid}", "timestamp": "2026-01-01T00:00:00.000Z",
                   "isMeta": true, "message": {"role": "user", "content": "{content}"}},
          "assistant": {"type": "assistant", "uuid": "{id}", "parentUuid": "{parent}", "sessionId": "{uuid}", "timestamp": "2026-01-01T00:00:00.000Z",
                        "message": {"id": "msg_{id}", "type": "message", "role": "assistant", "model": "claude", "content": "{content}"}},
          "end": {"type": "assistant", "uuid": "{id}", "parentUuid": "{parent}", "sessionId": "{uuid}", "timestamp": "2026-01-01T00:00:00.000Z", "isApiErrorMessage": true,
                  "message": {"id": "msg_{id}", "type": "message", "role": "assistant", "model": "<synthetic>", "content": [{"type": "text", "text": "x"}]}}}]}
      },
      "args": ["--tools", "", "--no-session-persistence", "--strict-mcp-config", "--setting-sources", "", "--disable-slash-commands",
               "--model", "{model}", ["--system-prompt-file", "{file:system.md}"], {"unless": "system", "argv": ["--system-prompt", ""]},
               ["--effort", "{level}"], ["--resume", "{file:history.jsonl}"]],
      "strategies": [
        {
          "driver": "jsonl",
          "images": true,
          "argv": ["-p", "--input-format", "stream-json", "--output-format", "stream-json", "--verbose", "--include-partial-messages", "@args"],
          "stdin": [{"type": "user", "uuid": "{uuid}", "message": {"role": "user", "content": ["{*last:anthropic}", {"type": "text", "text": ""}]}}],
          "events": [
            {"if": {"event.delta.type": "text_delta"}, "text": "event.delta.text"},
            {"if": {"event.delta.type": "thinking_delta"}, "thinking": "event.delta.thinking"},
            {"if": {"type": "system", "subtype": "init"}, "must_be_empty": "tools"},
            {"if": {"event.type": "message_start"}, "usage": {
              "input": ["event.message.usage.input_tokens", "event.message.usage.cache_read_input_tokens", "event.message.usage.cache_creation_input_tokens"],
              "cached": "event.message.usage.cache_read_input_tokens"}},
            {"if": {"event.type": "message_delta", "event.delta.stop_reason": ["max_tokens", "model_context_window_exceeded"]},
             "usage": {"output": "event.usage.output_tokens"}, "done": "length", "kill": true},
            {"if": {"event.type": "message_delta", "event.delta.stop_reason": "refusal"}, "usage": {"output": "event.usage.output_tokens"}, "done": "content_filter", "kill": true},
            {"if": {"event.type": "message_delta", "@text": false}, "usage": {"output": "event.usage.output_tokens"}, "done": "stop", "kill": true},
            {"if": {"event.type": "message_delta"}, "usage": {"output": "event.usage.output_tokens"}, "done": "stop"},
            {"if": {"type": "rate_limit_event", "rate_limit_info.status": "rejected"}, "reset": "rate_limit_info.resetsAt"},
            {"if": {"type": "result", "is_error": true}, "error": {"message": "result", "status": "api_error_status", "kind": "error"}},
            {"if": {"type": "result", "stop_reason": "refusal"}, "done": "content_filter"},
            {"if": {"type": "result"}, "done": "stop"},
            {"if": {"type": ["system", "stream_event", "assistant", "user", "rate_limit_event", "control_response"]}, "skip": true}
          ]
        },
        {
          "driver": "text",
          "argv": ["-p", "--input-format", "text", "--output-format", "text", "@args"],
          "stdin": "{prompt}",
          "guard": "^\\s*/",
          "stream": false
        }
      ],
      "status": "API Error: (\\d{3})\\b|Request rejected \\((\\d{3})\\)"
    },
    "gemini": {
      "title": "Gemini CLI, by Google",
      "binary": "gemini",
      "install": "npm install -g @google/gemini-cli",
      "login": "run \"gemini\" and choose a login, or set GEMINI_API_KEY",
      "version": {"argv": ["--version"], "match": "(\\d+\\.\\d+\\.\\d+)", "tested": ["0.58.0", "0.61.999"]},
      "logged_in": [{"env": ["GEMINI_API_KEY", "GOOGLE_API_KEY"]}, {"file": "~/.gemini/oauth_creds.json"},
                    {"file": "~/.gemini/.env", "match": "GEMINI_API_KEY\\s*="}, {"file": "~/.gemini/gemini-credentials.json"}],
      "models": {
        "default": "gemini-2.5-pro",
        "names": ["gemini-2.5-pro", "gemini-2.5-flash", "gemini-2.5-flash-lite", "gemini-3-pro-preview", "gemini-3-flash-preview"],
        "aliases": {"pro": "gemini-2.5-pro", "flash": "gemini-2.5-flash"},
        "also": "gemini-*"
      },
      "env": {
        "pass": ["GEMINI_API_KEY", "GOOGLE_*", "CODE_ASSIST_ENDPOINT"],
        "set": {
          "GEMINI_CLI_HOME": "{dir}/home",
          "GEMINI_SYSTEM_MD": "{file:system.md}",
          "GEMINI_CLI_TRUST_WORKSPACE": "true",
          "GEMINI_CLI_NO_RELAUNCH": "true",
          "GEMINI_CLI_CUSTOM_HEADERS": "x-cliproxy-hop: {hop}",
          "NO_BROWSER": "true",
          "TERM": "xterm-256color",
          "COLORTERM": "truecolor",
          "CLIPROXY_DOLLAR": "$"
        }
      },
      "found": {
        "login_type": {"file": "~/.gemini/settings.json", "match": "\"selectedType\"\\s*:\\s*\"([^\"]+)\""}
      },
      "derive": {
        "budget": {"from": "effort", "models": "gemini-2\\.5", "map": {"none": 0, "minimal": 512, "low": 2048, "medium": 8192, "high": 24576, "xhigh": 32768, "max": 32768}},
        "level": {"from": "effort", "models": "gemini-3", "map": {"none": "LOW", "minimal": "LOW", "low": "LOW", "medium": "MEDIUM", "high": "HIGH", "xhigh": "HIGH", "max": "HIGH"}},
        "kind": {"from": "model", "map": {"gemini-2.5-pro": "chat-base-2.5", "gemini-2.5-flash": "chat-base-2.5", "gemini-2.5-flash-lite": "chat-base-2.5",
                                          "gemini-3-pro-preview": "chat-base-3", "gemini-3-flash-preview": "chat-base-3"}}
      },
      "links": {
        "home/.gemini/oauth_creds.json": "~/.gemini/oauth_creds.json",
        "home/.gemini/google_accounts.json": "~/.gemini/google_accounts.json",
        "home/.gemini/gemini-credentials.json": "~/.gemini/gemini-credentials.json",
        "home/.gemini/.env": "~/.gemini/.env"
      },
      "files": {
        "system.md": "{system|}",
        "home/.gemini/settings.json": {"escape": {"$": "${CLIPROXY_DOLLAR}"}, "json": {
          "security": {"auth": {"selectedType": "{found:login_type|gemini-api-key}"}},
          "general": {"maxAttempts": 1, "retryFetchErrors": false, "enableAutoUpdate": false, "enableAutoUpdateNotification": false,
                      "plan": {"enabled": false}, "topicUpdateNarration": false},
          "tools": {"core": ["mcp_*"], "useRipgrep": false},
          "context": {"includeDirectoryTree": false, "discoveryMaxDirs": 0, "memoryBoundaryMarkers": []},
          "model": {"skipNextSpeakerCheck": true, "disableLoopDetection": true, "compressionThreshold": 1000000},
          "experimental": {"dynamicModelConfiguration": true, "enableAgents": false},
          "modelConfigs": {
            "modelChains": {
              "preview": [{"model": "none", "isLastResort": true, "actions": {"terminal": "prompt", "transient": "prompt", "not_found": "prompt", "unknown": "prompt"}, "stateTransitions": {"terminal": "terminal", "transient": "terminal", "not_found": "terminal", "unknown": "terminal"}}],
              "auto-preview": [{"model": "none", "isLastResort": true, "actions": {"terminal": "prompt", "transient": "prompt", "not_found": "prompt", "unknown": "prompt"}, "stateTransitions": {"terminal": "terminal", "transient": "terminal", "not_found": "terminal", "unknown": "terminal"}}],
              "default": [{"model": "none", "isLastResort": true, "actions": {"terminal": "prompt", "transient": "prompt", "not_found": "prompt", "unknown": "prompt"}, "stateTransitions": {"terminal": "terminal", "transient": "terminal", "not_found": "terminal", "unknown": "terminal"}}],
              "auto-default": [{"model": "none", "isLastResort": true, "actions": {"terminal": "prompt", "transient": "prompt", "not_found": "prompt", "unknown": "prompt"}, "stateTransitions": {"terminal": "terminal", "transient": "terminal", "not_found": "terminal", "unknown": "terminal"}}],
              "lite": [{"model": "none", "isLastResort": true, "actions": {"terminal": "prompt", "transient": "prompt", "not_found": "prompt", "unknown": "prompt"}, "stateTransitions": {"terminal": "terminal", "transient": "terminal", "not_found": "terminal", "unknown": "terminal"}}]
            },
            "modelIdResolutions": {"{model}": {"default": "{model}", "contexts": []}},
            "customAliases": {"{model}": {"extends": "{kind|chat-base}", "modelConfig": {"model": "{model}", "generateContentConfig": {
              "temperature": "{temperature}", "topP": "{top_p}", "maxOutputTokens": "{max_tokens}", "stopSequences": "{stop}", "seed": "{seed}",
              "presencePenalty": "{presence_penalty}", "frequencyPenalty": "{frequency_penalty}",
              "responseMimeType": "{json_mime}", "responseJsonSchema": "{schema}",
              "thinkingConfig": {"thinkingBudget": "{budget}", "thinkingLevel": "{level}"}}}}}
          },
          "privacy": {"usageStatisticsEnabled": false}, "telemetry": {"enabled": false}, "skills": {"enabled": false},
          "hooksConfig": {"enabled": false}, "ide": {"enabled": false}, "useWriteTodos": false, "ui": {"showCompatibilityWarnings": false}
        }},
        "history.jsonl": {"lines": [
          {"sessionId": "cliproxy", "projectHash": "x", "startTime": "2026-01-01T00:00:00.000Z", "lastUpdated": "2026-01-01T00:00:00.000Z", "kind": "main"},
          {"id": "d04923d38bb0f6017037e74183378ef4", "timestamp": "2026-01-01T00:00:00.000Z", "type": "user", "content": [{"text": "x", "thought": true}]},
          {"for": "history:gemini",
           "user": {"id": "{id}", "timestamp": "2026-01-01T00:00:00.000Z", "type": "user", "content": [{"text": "x", "thought": true}, "{*content}"]},
           "assistant": {"id": "{id}", "timestamp": "2026-01-01T00:00:00.000Z", "type": "gemini", "content": "{content}"},
           "end": {"id": "{id}", "timestamp": "2026-01-01T00:00:00.000Z", "type": "user", "content": [{"text": "x", "thought": true}]}}]}
      },
      "args": ["-m", "{model}", "-p", "", "--session-file", "{file:history.jsonl}"],
      "strategies": [
        {
          "driver": "jsonl",
          "images": true,
          "argv": ["-o", "stream-json", "@args"],
          "stdin": "{prompt}",
          "split": "^\\s*/",
          "events": [
            {"if": {"type": "message", "role": "assistant"}, "text": "content"},
            {"if": {"type": "error", "message": {"match": "blocked due to safety|SAFETY|PROHIBITED"}}, "done": "content_filter"},
            {"if": {"type": "error", "message": {"match": "returned an empty (?:text )?response|no final response text"}}, "hold": "message"},
            {"if": {"type": "error"}, "error": {"message": "message"}},
            {"if": {"type": "result", "@held": {"exists": true}}, "usage": {"input": "stats.input_tokens", "output": "stats.output_tokens", "cached": "stats.cached"}, "done": "stop", "drop_held": true},
            {"if": {"type": "result", "status": "success"}, "usage": {"input": "stats.input_tokens", "output": "stats.output_tokens", "cached": "stats.cached"}, "done": "stop"},
            {"if": {"type": "result"}, "error": {"message": "error.message"}},
            {"if": {"type": ["init", "message", "tool_use", "tool_result"]}, "skip": true}
          ]
        },
        {
          "driver": "text",
          "images": true,
          "argv": ["-o", "text", "@args"],
          "stdin": "{prompt}",
          "split": "^\\s*/",
          "drop": ["^\\[STARTUP\\]"],
          "failed": "(?m)^\\[ERROR\\] (.+)",
          "stream": true
        }
      ],
      "errors": [
        {"error": "not_logged_in", "exit": [41]},
        {"error": "refusal", "match": "blocked due to safety"},
        {"error": "authentication", "match": "API_KEY_INVALID"}
      ],
      "status": "(?m)\"code\": ?(\\d{3})\\b|^  (?:status|code): (\\d{3})\\b",
      "failure": "client-error-\\S+ (\\w*Error: .*)",
      "exit_status": {"144": 400, "145": 401, "146": 402, "147": 403, "157": 413, "173": 429, "244": 500, "246": 502, "247": 503, "248": 504, "17": 529}
    },
    "codex": {
      "title": "Codex CLI, by OpenAI",
      "binary": "codex",
      "install": "npm install -g @openai/codex",
      "login": "run \"codex login\"",
      "version": {"argv": ["--version"], "match": "(\\d+\\.\\d+\\.\\d+)", "tested": ["0.165.0", "0.169.999"]},
      "logged_in": [{"argv": ["login", "status"], "exit": 0}, {"file": "{env:CODEX_HOME|~/.codex}/config.toml", "match": "(?m)^model_provider\\s*=\\s*\"(?!openai\")"}],
      "models": {
        "default": "{found:model|gpt-5.5}",
        "names": ["gpt-5.5", "gpt-6-astra", "gpt-6.1-sol", "gpt-6.1-terra", "gpt-6-sol", "gpt-6-luna"],
        "aliases": {},
        "also": "gpt-*"
      },
      "env": {
        "pass": ["CODEX_API_KEY", "OPENAI_API_KEY", "OPENAI_BASE_URL", "AZURE_OPENAI_API_KEY"],
        "set": {"CODEX_HOME": "{dir}/home"}
      },
      "found": {
        "provider": {"file": "{env:CODEX_HOME|~/.codex}/config.toml", "match": "\\A(?:[^\\[]|\\[(?!\\w))*?(?m:^)model_provider\\s*=\\s*\"(?!openai\")([^\"]+)\""},
        "model": {"file": "{env:CODEX_HOME|~/.codex}/config.toml", "match": "\\A(?:[^\\[]|\\[(?!\\w))*?(?m:^)model\\s*=\\s*\"([^\"]+)\""},
        "mcp_servers": {"file": "{env:CODEX_HOME|~/.codex}/config.toml", "match": "(?m)^\\s*\\[mcp_servers\\.([A-Za-z0-9_-]+)\\]", "all": true}
      },
      "links": {
        "home/auth.json": "{env:CODEX_HOME|~/.codex}/auth.json",
        "home/config.toml": "{env:CODEX_HOME|~/.codex}/config.toml",
        "home/.env": "{env:CODEX_HOME|~/.codex}/.env"
      },
      "prepare": {
        "catalog.json": {"argv": ["debug", "models", "--bundled"], "each": "models",
          "set": {"tool_mode": null, "apply_patch_tool_type": null, "multi_agent_version": null, "comp_hash": null, "auto_compact_token_limit": null,
                  "experimental_supported_tools": [], "supports_search_tool": false, "context_window": 1000000000, "max_context_window": 1000000000,
                  "truncation_policy": {"mode": "bytes", "limit": 1000000000}, "base_instructions": ""},
          "drop": ["model_messages"]}
      },
      "files": {
        "schema.json": {"json": "{schema}"},
        "home/sessions/2026/01/01/rollout-2026-01-01T00-00-00-{uuid}.jsonl": {"if": "history", "lines": [
          {"timestamp": "2026-01-01T00:00:00.000Z", "type": "session_meta", "payload": {"id": "{uuid}", "timestamp": "2026-01-01T00:00:00.000Z", "cwd": "{dir}/work", "originator": "codex_exec", "cli_version": "0.169.0", "source": "exec", "model_provider": "{found:provider|cliproxy}"}},
          {"for": "history:responses", "each": {"timestamp": "2026-01-01T00:00:00.000Z", "type": "response_item", "payload": "{item}"}}]}
      },
      "args": ["--skip-git-repo-check", "--ignore-rules",
        "-c", "sandbox_mode=\"read-only\"", "-c", "approval_policy=\"never\"",
        "-c", "include_permissions_instructions=false", "-c", "include_environment_context=false", "-c", "include_apps_instructions=false",
        "-c", "include_collaboration_mode_instructions=false", "-c", "skills.include_instructions=false", "-c", "skills.bundled.enabled=false",
        "-c", "project_doc_max_bytes=0", "-c", "web_search=\"disabled\"", "-c", "history.persistence=\"none\"", "-c", "analytics.enabled=false",
        "-c", "check_for_update_on_startup=false", "-c", "agents.enabled=false", "-c", "developer_instructions=\"\"", "-c", "instructions=\"\"", "-c", "notify=[]",
        "-c", "tools.experimental_request_user_input={enabled=false}", "-c", "tools.update_plan={enabled=false}",
        "-c", "features.shell_tool=false", "-c", "features.unified_exec=false", "-c", "features.view_image=false", "-c", "features.goals=false",
        "-c", "features.multi_agent=false", "-c", "features.multi_agent_v2=false", "-c", "features.plugins=false", "-c", "features.apps=false",
        "-c", "features.image_generation=false", "-c", "features.tool_suggest=false", "-c", "features.hooks=false", "-c", "features.skill_search=false",
        "-c", "features.sleep_tool=false", "-c", "features.browser_use=false", "-c", "features.computer_use=false", "-c", "features.in_app_browser=false",
        "-c", "features.shell_snapshot=false", "-c", "features.memories=false", "-c", "features.incremental_tools=false",
        "-c", "features.reasoning_effort_override=false", "-c", "features.content_item_kinds=false", "-c", "features.unbounded_connection_retries=false",
        ["-c", "model_catalog_json=\"{prepared:catalog.json}\""],
        {"each": "found:mcp_servers", "argv": ["-c", "mcp_servers.{item}.enabled=false"]},
        {"if": "found:provider", "argv": ["-c", "model_providers.{found:provider}.request_max_retries=0", "-c", "model_providers.{found:provider}.stream_max_retries=0",
                                          "-c", "model_providers.{found:provider}.http_headers.x-cliproxy-hop=\"{hop}\""]},
        {"unless": "found:provider", "argv": ["-c", "model_provider=\"cliproxy\"", "-c",
          "model_providers.cliproxy={name=\"OpenAI\",wire_api=\"responses\",requires_openai_auth=true,request_max_retries=0,stream_max_retries=0,stream_idle_timeout_ms=300000}"]},
        ["-c", "model_reasoning_effort=\"{level}\""],
        ["-c", "model_reasoning_summary=\"{summary}\""],
        ["--output-schema", "{file:schema.json}"],
        "-m", "{model}"],
      "derive": {
        "level": {"from": "effort", "map": {"none": "none", "minimal": "minimal", "low": "low", "medium": "medium", "high": "high", "xhigh": "xhigh", "max": "max"}},
        "summary": {"from": "effort", "map": {"low": "auto", "medium": "auto", "high": "auto", "xhigh": "auto", "max": "auto"}}
      },
      "strategies": [
        {
          "driver": "jsonl",
          "images": true,
          "argv": ["exec", {"if": "history", "argv": ["resume", "{uuid}"]}, "--json", "@args", "-"],
          "stdin": "{prompt}",
          "events": [
            {"if": {"type": "item.completed", "item.type": "agent_message"}, "text": "item.text"},
            {"if": {"type": "item.completed", "item.type": "reasoning"}, "thinking": "item.text"},
            {"if": {"type": "turn.completed"}, "usage": {"input": "usage.input_tokens", "output": "usage.output_tokens", "cached": "usage.cached_input_tokens", "reasoning": "usage.reasoning_output_tokens"}, "done": "stop"},
            {"if": {"type": "turn.failed", "error.message": {"match": "reason: max_output_tokens"}}, "done": "length"},
            {"if": {"type": "turn.failed", "error.message": {"match": "reason: content_filter"}}, "done": "content_filter"},
            {"if": {"type": "turn.failed"}, "error": {"message": "error.message"}},
            {"if": {"type": ["thread.started", "turn.started", "item.started", "item.updated", "item.completed", "error"]}, "skip": true}
          ]
        },
        {
          "driver": "text",
          "images": true,
          "argv": ["exec", {"if": "history", "argv": ["resume", "{uuid}"]}, "@args", "-"],
          "stdin": "{prompt}",
          "stream": false
        }
      ],
      "errors": [
        {"error": "context_length", "match": "input exceeds the maximum length|input_too_large"},
        {"error": "bad_request", "match": "invalid_request_error|^\\{\"detail\"|unsupported|invalid value|no prompt provided"}
      ],
      "status": "unexpected status (\\d{3})|last status: (\\d{3})|\"code\": ?(\\d{3})\\b",
      "failure": "(?m)^(?:ERROR|Error): (.*)"
    },
    "qwen": {
      "title": "Qwen Code, by Alibaba",
      "binary": "qwen",
      "install": "npm install -g @qwen-code/qwen-code",
      "login": "run \"qwen auth\", or set OPENAI_API_KEY, OPENAI_BASE_URL and OPENAI_MODEL",
      "version": {"argv": ["--version"], "match": "(\\d+\\.\\d+\\.\\d+)", "tested": ["0.15.0", "0.15.999"]},
      "logged_in": [{"env": ["OPENAI_API_KEY", "DASHSCOPE_API_KEY"]}, {"file": "~/.qwen/oauth_creds.json"}, {"file": "~/.qwen/.env", "match": "API_KEY\\s*="},
                    {"file": "~/.qwen/settings.json", "match": "\"(apiKey|envKey)\"\\s*:\\s*\"[^\"]"}],
      "models": {
        "default": "",
        "names": ["qwen3-coder-plus", "qwen3-coder-flash"],
        "aliases": {"coder": "qwen3-coder-plus"},
        "also": "qwen*"
      },
      "env": {
        "pass": ["OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_MODEL", "DASHSCOPE_API_KEY", "QWEN_DEFAULT_AUTH_TYPE"],
        "set": {
          "QWEN_HOME": "{dir}/home",
          "QWEN_RUNTIME_DIR": "{dir}/run",
          "QWEN_CODE_SYSTEM_SETTINGS_PATH": "{file:settings.json}",
          "QWEN_SYSTEM_MD": "{file:system.md}",
          "QWEN_CODE_NO_RELAUNCH": "1",
          "QWEN_CODE_MAX_OUTPUT_TOKENS": "32000",
          "QWEN_DEBUG_LOG_FILE": "1",
          "CLIPROXY_DOLLAR": "$"
        }
      },
      "found": {
        "model_providers": {"file": "~/.qwen/settings.json", "json": "modelProviders"}
      },
      "links": {
        "home/settings.json": "~/.qwen/settings.json",
        "home/oauth_creds.json": "~/.qwen/oauth_creds.json",
        "home/.env": "~/.qwen/.env"
      },
      "files": {
        "work/.qwen/output-language.md": "",
        "system.md": "{system|}",
        "settings.json": {"escape": {"$": "${CLIPROXY_DOLLAR}"}, "spread": {"what": "model.generationConfig", "over": "modelProviders.openai"}, "json": {
          "$version": 4,
          "modelProviders": "{found:model_providers}",
          "general": {"enableAutoUpdate": false, "chatRecording": false},
          "privacy": {"usageStatisticsEnabled": false}, "telemetry": {"enabled": false},
          "memory": {"enableManagedAutoMemory": false, "enableManagedAutoDream": false, "enableAutoSkill": false},
          "model": {"skipStartupContext": true, "skipNextSpeakerCheck": true, "skipLoopDetection": true,
                    "chatCompression": {"contextPercentageThreshold": 0},
                    "generationConfig": {"maxRetries": 0, "customHeaders": {"x-cliproxy-hop": "{hop}"},
                      "extra_body": {"messages": "{messages:openai}", "temperature": "{temperature}", "top_p": "{top_p}", "max_tokens": "{max_tokens}",
                                     "stop": "{stop}", "seed": "{seed}", "presence_penalty": "{presence_penalty}", "frequency_penalty": "{frequency_penalty}",
                                     "response_format": "{response_format}", "reasoning_effort": "{effort}", "logit_bias": "{logit_bias}"}}},
          "context": {"fileName": ".cliproxy-no-context-file"}, "ide": {"enabled": false}, "disableAllHooks": true,
          "mcp": {"allowed": ["cliproxy"]},
          "permissions": {"deny": ["tool_search", "agent", "task_stop", "send_message", "skill", "list_directory", "read_file", "grep_search",
            "glob", "edit", "write_file", "run_shell_command", "todo_write", "ask_user_question", "exit_plan_mode", "web_fetch", "lsp",
            "cron_create", "cron_list", "cron_delete", "monitor", "save_memory"]}
        }}
      },
      "args": ["--extensions=none", ["-m", "{model}"]],
      "watch": {"files": "run/debug/*.txt", "match": "\\[RETRY\\] Attempt 1 failed with status \\d+[^\\n]*Error: (?P<message>(?P<status>\\d{3})[^\\n]*)"},
      "strategies": [
        {
          "driver": "jsonl",
          "images": true,
          "argv": ["-o", "stream-json", "--include-partial-messages", "@args"],
          "stdin": "{transcript}",
          "guard": "^\\s*[/?!]",
          "events": [
            {"if": {"event.delta.type": "text_delta", "event.delta.text": {"match": "^\\[API Error: "}}, "hold": "event.delta.text"},
            {"if": {"event.delta.type": "text_delta"}, "text": "event.delta.text"},
            {"if": {"event.delta.type": "thinking_delta"}, "thinking": "event.delta.thinking"},
            {"if": {"type": "system", "subtype": "init"}, "must_be_empty": "tools"},
            {"if": {"type": "result", "is_error": true}, "error": {"message": "error.message"}},
            {"if": {"type": "result", "@held": {"match": "Model stream ended with empty response text"}}, "usage": {"input": "usage.input_tokens", "output": "usage.output_tokens"}, "done": "stop", "drop_held": true},
            {"if": {"type": "result", "@held": {"exists": true}, "usage.output_tokens": 0}, "error": {"message": "@held"}},
            {"if": {"type": "result", "@held": {"match": "\\(cause: [^)]*\\)\\]$"}}, "error": {"message": "@held"}},
            {"if": {"type": "result"}, "usage": {"input": "usage.input_tokens", "output": "usage.output_tokens", "cached": "usage.cache_read_input_tokens"}, "done": "stop"},
            {"if": {"type": ["system", "stream_event", "assistant", "user"]}, "skip": true}
          ]
        },
        {
          "driver": "text",
          "images": true,
          "argv": ["-o", "text", "@args"],
          "stdin": "{transcript}",
          "guard": "^\\s*[/?!]",
          "stream": true
        }
      ],
      "errors": [{"error": "not_logged_in", "match": "qwen oauth"}],
      "status": "(?m)^\\[API Error: (\\d{3})\\b|^(\\d{3})\\b",
      "failure": "(\\[API Error: .*\\])"
    },
    "echo": {
      "title": "built in: says the last user message back, so that a machine with no CLI answers too",
      "binary": "{python}",
      "install": "",
      "login": "",
      "models": {"default": "echo", "names": [], "aliases": {}, "also": ""},
      "slots": 64,
      "args": ["-I", "-S", "{self}", "_echo"],
      "strategies": [
        {
          "driver": "jsonl",
          "argv": ["@args", "--json"],
          "stdin": [{"messages": "{messages:openai}"}],
          "events": [
            {"if": {"type": "delta"}, "text": "text"},
            {"if": {"type": "done"}, "usage": {"input": "usage.input", "output": "usage.output"}, "done": "stop"}
          ]
        },
        {"driver": "text", "argv": ["@args"], "stdin": [{"messages": "{messages:openai}"}], "stream": true}
      ]
    }
  }
}
'''


# === Configuration ===================================================================================================
# providers.json becomes Providers. A mistake is named by its JSON path with what was expected, and the server refuses to
# start on it. Files are laid over one another: objects merge, all else replaces, and a provider that is null is gone.
# (Not RFC 7396, where every null removes: null is a value that the templates need.)


class ConfigError(Exception):
    """A mistake in providers.json or on the command line, in words for the person who wrote it."""


# A hole in a template: {name}, {name:argument}, {name|default}; {*name} splices a list. TOML and JSON braces never look so.
HOLE = re.compile(r"\{(\*?)([a-z_]+)(?::([A-Za-z0-9_./-]+))?(?:\|([^{}]*))?\}")
PARAMETERS = ("temperature", "top_p", "max_tokens", "stop", "seed", "presence_penalty", "frequency_penalty", "effort",
              "response_format", "logit_bias")
FORMATS = ("anthropic", "gemini", "openai", "responses")
VARIABLES = {"dir", "self", "python", "uuid", "hop", "env", "file", "found", "prepared", "model", "system", "prompt",
             "transcript", "messages", "history", "last", "schema", "json_mime", "item", "id", "parent", "content", *PARAMETERS}


def _regex(value: Any, path: str) -> None:
    if not isinstance(value, str):
        raise ConfigError(f"{path}: expected a regular expression (a string), found {_show(value)}")
    try:
        re.compile(value)
    except re.error as e:
        raise ConfigError(f"{path}: expected a regular expression, found {_show(value)}: {e}") from None


def _template(value: Any, path: str) -> None:
    """Any JSON whose strings may have holes; the names of the holes are checked against VARIABLES when a provider is made."""


def _event_test(value: Any, path: str) -> None:
    if isinstance(value, dict):
        check(value, {"match?": _regex, "exists?": bool}, path)


def _launch_args(value: Any, path: str) -> None:
    if not isinstance(value, list):
        raise ConfigError(f"{path}: expected a list of arguments, found {_show(value)}")
    for i, arg in enumerate(value):
        if isinstance(arg, dict):
            check(arg, {"if?": str, "unless?": str, "each?": str, "argv": _launch_args}, f"{path}[{i}]")
        elif isinstance(arg, list):
            _launch_args(arg, f"{path}[{i}]")
        elif not isinstance(arg, str):
            raise ConfigError(f"{path}[{i}]: expected a string, a list or an object with \"argv\", found {_show(arg)}")


def _error_class(value: Any, path: str) -> None:
    if not isinstance(value, str) or value not in ERROR_CLASSES:
        raise ConfigError(f"{path}: expected one of {', '.join(ERROR_CLASSES)}, found {_show(value)}")


def _driver_name(value: Any, path: str) -> None:
    if not isinstance(value, str) or value not in DRIVERS:
        raise ConfigError(f"{path}: expected one of {', '.join(DRIVERS)}, found {_show(value)}")


_ERROR_RULES = [{"error": _error_class, "match?": _regex, "status?": [int], "exit?": [int], "kind?": [str]}]
_ENV = {"pass?": [str], "set?": {"*": _template}}
_TIMEOUTS = {"queue?": float, "start?": float, "first?": float, "idle?": float, "total?": float}
_EVENT_RULE = {"if": {"*": _event_test}, "text?": str, "thinking?": str, "hold?": str, "done?": str, "kill?": bool, "drop_held?": bool, "skip?": bool,
               "must_be_empty?": str, "reset?": str, "error?": {"message": str, "status?": str, "kind?": str},
               "usage?": {"input?": _template, "output?": _template, "cached?": _template, "reasoning?": _template}}
_STRATEGY = {"driver": _driver_name, "argv": _launch_args, "stdin?": _template, "images?": bool, "split?": _regex, "guard?": _regex,
             "events?": [_EVENT_RULE], "begin?": _regex, "end?": _regex, "drop?": [_regex], "failed?": _regex, "stream?": bool, "terminal?": [str]}
_PROVIDER = {
    "title?": str, "binary": str, "install?": str, "login?": str,
    "version?": {"argv": [str], "match": _regex, "tested?": [str]},
    "logged_in?": [{"argv?": [str], "exit?": int, "env?": [str], "file?": str, "match?": _regex}],
    "models": {"default": str, "names?": [str], "aliases?": {"*": str}, "also?": str},
    "env?": _ENV, "found?": {"*": {"file": str, "match?": _regex, "all?": bool, "json?": str}},
    "derive?": {"*": {"from": str, "map": {"*": _template}, "models?": _regex}},
    "links?": {"*": str}, "files?": {"*": _template}, "args?": _launch_args,
    "prepare?": {"*": {"argv": [str], "each?": str, "set?": {"*": _template}, "drop?": [str]}},
    "watch?": {"files": str, "match": _regex}, "strategies": [_STRATEGY], "errors?": _ERROR_RULES, "exit_status?": {"*": int},
    "status?": _regex, "failure?": _regex, "slots?": int, "timeouts?": _TIMEOUTS,
}
PROVIDERS_SHAPE = {"version": int, "defaults?": {"env?": _ENV, "slots?": int, "timeouts?": _TIMEOUTS, "errors?": _ERROR_RULES, "reset?": [_regex]},
                   "providers": {"*": _PROVIDER}}
_JSON_NAMES = {dict: "an object", list: "a list", str: "a string", int: "a whole number", float: "a number", bool: "true or false"}


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def check(value: Any, shape: Any, path: str) -> None:
    """Raise ConfigError unless `value` has the shape: a type, [shape], {key: shape} (key? may be absent, * is any key), a check."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            raise ConfigError(f"{path}: expected an object, found {_show(value)}")
        known = {k.rstrip("?"): v for k, v in shape.items()}
        for key in shape:
            if not key.endswith("?") and key != "*" and key not in value:
                kind = type(known[key]) if isinstance(known[key], (dict, list)) else known[key]
                raise ConfigError(f"{path}.{key}: is missing; expected {_JSON_NAMES.get(kind, 'a value')}")
        for key, item in value.items():
            if key not in known and "*" not in known:
                raise ConfigError(f"{path}.{key}: is not a setting; expected one of {', '.join(sorted(known))}")
            check(item, known.get(key, known.get("*")), f"{path}.{key}")
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise ConfigError(f"{path}: expected a list, found {_show(value)}")
        for i, item in enumerate(value):
            check(item, shape[0], f"{path}[{i}]")
    elif isinstance(shape, type):
        fits = isinstance(value, (int, float) if shape is float else shape) and (shape is bool or not isinstance(value, bool))
        if not fits:
            raise ConfigError(f"{path}: expected {_JSON_NAMES[shape]}, found {_show(value)}")
    else:
        shape(value, path)


def merged(base: Any, over: Any) -> Any:
    """`base` with `over` laid over it: objects merge, everything else replaces."""
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    return {**base, **{key: merged(base.get(key), value) for key, value in over.items()}}


def holes(template: Any) -> Iterator[Tuple[str, str]]:
    """(name, argument) of every hole in a template, the names in if/unless/each included."""
    if isinstance(template, str):
        for m in HOLE.finditer(template):
            yield m.group(2), m.group(3) or ""
    elif isinstance(template, list):
        for item in template:
            yield from holes(item)
    elif isinstance(template, dict):
        for key, item in template.items():
            yield from holes(key)
            if key in ("if", "unless", "each", "for") and isinstance(item, str):
                name, _, arg = item.partition(":")
                yield name, arg
            yield from holes(item)


def dig(value: Any, path: Sequence[str]) -> Any:
    """The value at a path of keys inside nested objects; None where there is none."""
    for key in path:
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


class EventRule:
    """One row of a strategy's `events`: if these fields have these values, this is what the line means. The first that fits counts."""

    def __init__(self, row: Mapping[str, Any]):
        self.tests = [(tuple(path.split(".")), self._test(want)) for path, want in row["if"].items()]
        self.row = row
        self.paths = {k: tuple(row[k].split(".")) for k in ("text", "thinking", "hold", "must_be_empty", "reset") if k in row}
        self.usage = {k: [tuple(p.split(".")) for p in ([v] if isinstance(v, str) else v)] for k, v in row.get("usage", {}).items()}
        self.error = {k: tuple(v.split(".")) for k, v in row.get("error", {}).items()}

    @staticmethod
    def _test(want: Any) -> Callable[[Any], bool]:
        if isinstance(want, list):
            return lambda v: v in want
        if not isinstance(want, dict):
            return lambda v: v == want and type(v) is type(want)
        if "match" in want:
            pattern = re.compile(want["match"])
            return lambda v: isinstance(v, str) and pattern.search(v) is not None
        return lambda v: (v is not None) == want.get("exists", True)

    def fits(self, line: Mapping[str, Any]) -> bool:
        return all(test(dig(line, path)) for path, test in self.tests)


@dataclass(frozen=True)
class Strategy:
    """One way to run a provider. `row` is its entry in providers.json; `uses` are the holes of its templates, `native` the
    request parameters that those stand for."""
    driver: str
    row: Mapping[str, Any]
    events: Tuple[EventRule, ...]
    native: frozenset
    uses: frozenset = frozenset()

    @property
    def images(self) -> bool:
        return bool(self.row.get("images"))


@dataclass(frozen=True)
class Provider:
    """A CLI with its settings: one entry of providers.json, its defaults filled in, its rules compiled."""
    name: str
    row: Mapping[str, Any]
    strategies: Tuple[Strategy, ...]
    errors: Tuple[Tuple[Mapping[str, Any], Optional[re.Pattern]], ...]
    resets: Tuple[re.Pattern, ...]
    timeouts: Mapping[str, float]

    @property
    def login(self) -> str:
        return self.row.get("login") or f'run "{self.row["binary"]}" and log in'

    def binary(self, environ: Mapping[str, str]) -> Optional[str]:
        """The path of the CLI, or None when it is not installed. A few stat calls; starts nothing."""
        name = self.row["binary"]
        return sys.executable if name == "{python}" else shutil.which(os.path.expanduser(name), path=environ.get("PATH", os.defpath))


def make_provider(name: str, row: Mapping[str, Any], defaults: Mapping[str, Any], path: str) -> Provider:
    """A Provider from its checked row; ConfigError names a hole that nothing fills, or a strategy without rules."""
    env, base = row.get("env", {}), defaults.get("env", {})
    row = {**row, "env": {"pass": [*base.get("pass", []), *env.get("pass", [])], "set": {**base.get("set", {}), **env.get("set", {})}},
           "slots": row.get("slots", defaults.get("slots", 8))}
    derived = row.get("derive", {})
    strategies = []
    for i, s in enumerate(row["strategies"]):
        where = f"{path}.strategies[{i}]"
        if s["driver"] == "jsonl" and not s.get("events"):
            raise ConfigError(f"{where}.events: is missing; a jsonl strategy needs rules that say what a line means")
        used, direct = set(), set()
        for part in (row["env"]["set"], row.get("files", {}), row.get("args", []), s["argv"], s.get("stdin", "")):
            for var, _ in holes(part):
                if var not in VARIABLES and var not in derived:
                    raise ConfigError(f"{where}: {{{var}}} is not a variable; expected one of {', '.join(sorted(VARIABLES | set(derived)))}")
                direct.add(var)
                used.add(derived[var]["from"] if var in derived else var)
        if used & {"schema", "json_mime"}:
            used.add("response_format")
        strategies.append(Strategy(s["driver"], s, tuple(EventRule(r) for r in s.get("events", [])), frozenset(used & set(PARAMETERS)), frozenset(direct)))
    if not strategies:
        raise ConfigError(f"{path}.strategies: expected at least one strategy, found none")
    rules = [*row.get("errors", []), *defaults.get("errors", [])]
    return Provider(name, row, tuple(strategies), tuple((r, re.compile(r["match"], re.I) if "match" in r else None) for r in rules),
                    tuple(re.compile(r, re.I) for r in defaults.get("reset", [])), {**defaults.get("timeouts", {}), **row.get("timeouts", {})})


def merged_providers(files: Sequence[str]) -> Dict[str, Any]:
    """The built-in providers, a providers.json beside the script, then each of `files`, laid over one another and checked.

    The result may still name variables that do not exist; make_provider() finds those."""
    beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), "providers.json")
    config: Dict[str, Any] = json.loads(BUILTIN_PROVIDERS)
    for path in [*([beside] if os.path.exists(beside) else []), *files]:
        try:
            with open(path, encoding="utf-8") as f:
                patch = json.load(f)
        except OSError as e:
            raise ConfigError(f"{path} cannot be read: {e.strerror}") from None
        except ValueError as e:
            raise ConfigError(f"{path} is not JSON: {e}") from None
        config = merged(config, patch)
        if isinstance(config, dict) and isinstance(config.get("providers"), dict):
            config["providers"] = {name: row for name, row in config["providers"].items() if row is not None}
        check(config, PROVIDERS_SHAPE, path + ": $")
    check(config, PROVIDERS_SHAPE, "$")
    if config["version"] != 1:
        raise ConfigError(f"$.version: expected 1, found {_show(config['version'])}; this file is for another version of cliproxy")
    return config


def load_providers(config: Mapping[str, Any]) -> Dict[str, Provider]:
    """{name: Provider} of a checked configuration, in its order."""
    defaults = config.get("defaults", {})
    for name in config["providers"]:
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
            raise ConfigError(f"$.providers.{name}: expected a name of a-z, 0-9, - and _")
    return {name: make_provider(name, row, defaults, f"$.providers.{name}") for name, row in config["providers"].items()}


@dataclass(frozen=True)
class Settings:
    """What the command line and the environment say about the server."""
    host: str = ""                      # "" is 127.0.0.1 and ::1
    port: int = 8080
    keys: Tuple[str, ...] = ()
    allow_hosts: Tuple[str, ...] = ()
    cors_origins: Tuple[str, ...] = ()
    strict: bool = False
    keepalive: float = 10.0             # seconds of silence before a comment; clients give up after 60
    max_body: int = 32 << 20            # bytes; a few images in base64
    max_connections: int = 512
    drain: float = 30.0                 # seconds that SIGTERM leaves to running requests


# === Scopes ==========================================================================================================
# When to give up: at a deadline, when the client has hung up, when told to. The one place that waits for a child.
# An epoll/kqueue object per turn, because poll() does not work on macOS terminals and select() not beyond 1,024 descriptors.


class Scope:
    """The limits of one turn. `limits` are seconds: start, first (event), idle (between events), total.

    The client's socket is watched in every wait, so a client that goes away is noticed before the first word too.
    Used by one thread; only cancel() may be called from another.
    """

    def __init__(self, limits: Mapping[str, float], client: Optional[socket.socket] = None, keepalive: float = 10.0):
        self._limits, self._client, self._keepalive = limits, client, keepalive
        self._selector = selectors.DefaultSelector()
        self._wake, self._waker = os.pipe()
        self._selector.register(self._wake, selectors.EVENT_READ)
        if client is not None:
            self._selector.register(client, selectors.EVENT_READ)
        self._watched: Dict[int, int] = {}
        self._silent = False
        self._end = time.monotonic() + limits.get("total", 3600)
        self.enter("start")

    def __enter__(self) -> Scope:
        return self

    def __exit__(self, *exc: Any) -> None:
        self._selector.close()
        os.close(self._wake)
        os.close(self._waker)

    def enter(self, stage: str) -> None:
        """From now on the time-out `stage` counts: queue, start, first or idle. Silence is counted anew as well."""
        now = time.monotonic()
        self._stage, self._deadline = stage, min(now + self._limits.get(stage, 600), self._end)
        self._quiet, self._silent = now + self._keepalive, False

    def cancel(self) -> None:
        """Make the current or next wait raise Cancelled. For other threads."""
        os.write(self._waker, b"x")

    def silent(self) -> bool:
        """True once for each keep-alive interval in which nothing came, as the last wait() found."""
        silent, self._silent = self._silent, False
        return silent

    def wait(self, reads: Iterable[int], writes: Iterable[int] = (), at_most: Optional[float] = None) -> frozenset:
        """The descriptors that are ready; empty when it is time for a keep-alive, or `at_most` seconds have passed.

        Raises ClientGone, Cancelled, or TimedOut naming the time-out that was hit."""
        self._watch(reads, writes)
        until = time.monotonic() + at_most if at_most is not None else self._quiet
        while True:
            now = time.monotonic()
            if now >= self._deadline:
                stage = "total" if self._deadline == self._end else self._stage
                raise TimedOut(f"no answer within the {stage} time-out of {self._limits.get(stage, 0):g} s", do=TimedOut.advice)
            ready = set()
            for key, _ in self._selector.select(max(0.0, min(self._deadline, until, self._quiet) - now)):
                if key.fileobj is self._client:
                    self._look_at_client()
                elif key.fd == self._wake:
                    raise Cancelled
                else:
                    ready.add(key.fd)
            now = time.monotonic()
            if not ready and now >= self._quiet:        # begin the next interval here, or a caller that does not ask silent() would spin
                self._quiet, self._silent, until = now + self._keepalive, True, now
            if ready or now >= until:
                return frozenset(ready)

    def forget(self) -> None:
        """Watch no descriptor of a child any more. To be called before one is closed."""
        self._watch((), ())

    def _watch(self, reads: Iterable[int], writes: Iterable[int]) -> None:
        want = {fd: selectors.EVENT_READ for fd in reads}
        for fd in writes:
            want[fd] = want.get(fd, 0) | selectors.EVENT_WRITE
        if want == self._watched:
            return
        for fd in self._watched.keys() - want.keys():
            self._selector.unregister(fd)
        for fd, mask in want.items():
            if fd not in self._watched:
                self._selector.register(fd, mask)
            elif mask != self._watched[fd]:
                self._selector.modify(fd, mask)
        self._watched = want

    def _look_at_client(self) -> None:
        assert self._client is not None
        try:
            if self._client.recv(1, socket.MSG_PEEK) == b"":
                raise ClientGone
        except OSError:
            raise ClientGone from None
        # Readable but not closed: it has sent its next request already (pipelining). Stop watching, or select() would spin.
        self._selector.unregister(self._client)
        self._client = None


class Slots:
    """At most `limit` turns at a time, first come, first served. A waiter that leaves gives up its place at once."""

    def __init__(self, limit: int):
        self.limit, self.busy = limit, 0
        self._lock, self._queue = threading.Lock(), deque()  # type: ignore[var-annotated]

    def acquire(self, scope: Scope, name: str) -> None:
        """Take a slot, waiting in line for the scope's `queue` time; Busy when that is over."""
        with self._lock:
            if self.busy < self.limit:
                self.busy += 1
                return
            here, there = os.pipe()
            self._queue.append((here, there))
        try:
            scope.enter("queue")
            while not scope.wait([here]):
                pass
        except BaseException as e:
            with self._lock:
                if (here, there) in self._queue:
                    self._queue.remove((here, there))
                else:                       # the slot was handed over in the moment we left
                    self._pass_on()
            if isinstance(e, TimedOut):
                raise Busy(f"all {self.limit} slots of {name} are taken", "the queue's time-out has passed",
                           "try again, or raise slots in providers.json", retry_after=5) from None
            raise
        finally:
            scope.forget()
            os.close(here)
            os.close(there)

    def release(self) -> None:
        """Give the slot to the next in line, or back."""
        with self._lock:
            self._pass_on()

    def _pass_on(self) -> None:
        if self._queue:
            os.write(self._queue.popleft()[1], b"x")
        else:
            self.busy -= 1


# === Terminal text ===================================================================================================
# Bytes from a terminal become the lines a person would see. Pure and incremental: any split of the input gives the same lines.

# CSI (ECMA-48 5.4), OSC and the other strings up to ST or BEL, charset selections, and all two-byte escapes.
_ESCAPE = re.compile(r"\x1b(?:\[([0-?]*)[ -/]*([@-~])|[\]PX^_].*?(?:\x07|\x1b\\)|[ -/]+[0-~]|[0-OQ-WYZ\\`-~])", re.S)
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
MAX_ESCAPE = 4096     # a longer unfinished sequence is garbage, not a colour


class TerminalText:
    """feed(bytes) -> finished lines; end() -> the last, unfinished one. Knows UTF-8, ANSI, carriage return, backspace, erase."""

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._rest = ""                 # an escape sequence that has not ended yet
        self._line: List[str] = []
        self._column = 0

    def feed(self, data: bytes, final: bool = False) -> List[str]:
        text = self._rest + self._decode(data, final)
        self._rest, lines, at = "", [], 0
        while at < len(text):
            stop = _CONTROLS.search(text, at)
            lines += self._print(text[at:stop.start() if stop else len(text)])
            if stop is None:
                break
            at = self._control(text, stop.start(), final)
            if at < 0:
                break
        return lines

    def end(self) -> str:
        rest = self.feed(b"", final=True)
        return "\n".join([*rest, "".join(self._line)])

    def _print(self, text: str) -> List[str]:
        """Write plain text and newlines at the cursor; the lines that are finished by it."""
        first, *others = text.split("\n")
        lines = []
        self._put(first)
        for piece in others:
            lines.append("".join(self._line))
            self._line, self._column = [], 0
            self._put(piece)
        return lines

    def _put(self, text: str) -> None:
        if self._column > len(self._line):
            self._line += " " * (self._column - len(self._line))
        self._line[self._column:self._column + len(text)] = text
        self._column += len(text)

    def _control(self, text: str, at: int, final: bool) -> int:
        """Obey the control character at `at`; the place behind it, or -1 if its sequence has not ended yet."""
        c = text[at]
        if c == "\r":
            self._column = 0
        elif c == "\b":
            self._column = max(0, self._column - 1)
        elif c == "\x1b":
            m = _ESCAPE.match(text, at)
            if m is None and len(text) - at < MAX_ESCAPE and not final:
                self._rest = text[at:]
                return -1
            if m is None or m.end() - at > MAX_ESCAPE:
                return at + 1
            if m.group(2):
                self._csi(m.group(1), m.group(2))
            return m.end()
        return at + 1

    def _csi(self, parameters: str, action: str) -> None:
        n = int(parameters) if parameters.isdigit() else 0
        if action == "K":               # erase in line: 0 to its end, 1 to its start, 2 all of it
            if n == 1:
                self._line[:self._column] = " " * self._column
            else:
                del self._line[self._column if n == 0 else 0:]
        elif action == "G":
            self._column = max(0, n - 1)
        elif action == "C":
            self._column += max(1, n)
        elif action == "D":
            self._column = max(0, self._column - max(1, n))


# === Processes =======================================================================================================
# A command becomes a Child. The one place that forks, signals and reaps.
#
# A process that has threads must not fork (Python 3.12 warns; a lock held by another thread stays locked in the child), and
# whatever kills the proxy, kill -9 included, must leave no CLI behind. So a small process with one thread, forked before the
# first thread, does all of it:
#
#     proxy    --  {"spawn": 7, "argv": [...], "env": {...}, "cwd": ...}  -->  spawner  -- fork, setsid, exec -->  child
#     proxy    <--  {"started": 7, "pid": 4711} + descriptors  --              spawner
#     proxy    <--  {"exited": 4711, "status": 0}  --                          spawner
#
# over a socket pair, a JSON object a line, descriptors as SCM_RIGHTS. When the proxy's end closes, for whatever reason, the
# spawner kills every group and removes the private directories. It sits in a session of its own, so that neither Ctrl-C nor a
# kill of the proxy's group reaches it first.

TERM_TO_KILL = 0.5          # seconds between SIGTERM and SIGKILL: the CLIs end within 70 ms of SIGTERM
STDERR_KEPT = 16384         # bytes of a child's stderr that are kept for error messages
PTY_ROWS, PTY_COLUMNS = 200, 32000      # so wide that nothing is ever wrapped


def _start(job: Mapping[str, Any]) -> Tuple[int, List[int]]:
    """Fork and exec one child; its pid and our ends of [stdin, stdout, stderr]. Runs in the spawner, which has one thread.

    job["tty"] lists which of 0, 1, 2 are the terminal; the others are pipes. OSError if the program cannot be started."""
    ours, theirs, on_tty = [-1, -1, -1], [-1, -1, -1], job["tty"]
    for fd in (0, 1, 2):
        if fd not in on_tty:
            r, w = os.pipe()
            ours[fd], theirs[fd] = (w, r) if fd == 0 else (r, w)
    report, reporter = os.pipe()
    if on_tty:
        pid, master = pty.fork()
    else:
        pid, master = os.fork(), -1
    if pid == 0:
        _become(job, theirs, reporter)
    os.close(reporter)
    for fd in theirs:
        if fd >= 0:
            os.close(fd)
    with open(report, "rb") as f:           # EOF as soon as exec has closed the other end
        failure = f.read()
    if on_tty:
        os.set_inheritable(master, False)
        ours = [master if fd in on_tty else ours[fd] for fd in (0, 1, 2)]
    if failure:
        for fd in set(ours):
            os.close(fd)
        os.waitpid(pid, 0)
        raise OSError(int(failure), os.strerror(int(failure)))
    return pid, ours


def _become(job: Mapping[str, Any], theirs: Sequence[int], reporter: int) -> None:
    """In the new process: set up descriptors, signals and directory, then exec. Never returns."""
    try:
        if job["tty"]:                      # pty.fork() has made a session with the terminal as 0, 1 and 2
            tty.setraw(0)                   # no echo, no 4,096-byte lines, no LF to CRLF
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", PTY_ROWS, PTY_COLUMNS, 0, 0))
        else:
            os.setsid()
        for fd in (0, 1, 2):
            if theirs[fd] >= 0:
                os.dup2(theirs[fd], fd)
        for sig in (signal.SIGPIPE, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(sig, signal.SIG_DFL)
        os.umask(0o077)
        os.chdir(job["cwd"])
        os.execve(job["argv"][0], job["argv"], job["env"])
    except OSError as e:
        os.write(reporter, str(e.errno).encode())
    finally:
        os._exit(127)


def _kill_group(pid: int, sig: int) -> None:
    try:
        os.killpg(pid, sig)
    except (ProcessLookupError, PermissionError):
        pass                                # gone already; macOS says EPERM of a group of zombies


def _remove(root: str) -> None:
    """Remove the directory of all places; again, if something was made in it meanwhile: by a CLI as it was killed, by a probe at start-up."""
    for _ in range(20):
        shutil.rmtree(root, ignore_errors=True)
        if not os.path.exists(root):
            return
        time.sleep(0.05)


class _SpawnerProcess:
    """The loop of the spawner. Everything here runs in its own process, in one thread."""

    def __init__(self, control: socket.socket, root: str):
        self._control, self._root, self._buffer = control, root, b""
        self._alive: Dict[int, str] = {}                        # pid -> its place
        self._due: List[Tuple[float, int, int]] = []            # (when, pid, signal)
        self._outbox: deque = deque()                           # (bytes, descriptors) not sent yet
        self._jobs: deque = deque()                             # children to start, one a round: ends and exits never wait behind many starts

    def run(self) -> None:
        wake_r, wake_w = os.pipe()
        os.set_blocking(wake_r, False)
        os.set_blocking(wake_w, False)
        signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(sig, signal.SIG_IGN)                  # we end when the proxy ends, not before
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ)
            selector.register(wake_r, selectors.EVENT_READ)
            while True:
                selector.modify(self._control, selectors.EVENT_READ | (selectors.EVENT_WRITE if self._outbox else 0))
                now = time.monotonic()
                pause = 0.0 if self._jobs else max(0.0, min(d[0] for d in self._due) - now) if self._due else None
                for key, mask in selector.select(pause):
                    if key.fd == wake_r:
                        os.read(wake_r, 4096)
                    elif mask & selectors.EVENT_WRITE:
                        self._flush()
                    if key.fd != wake_r and mask & selectors.EVENT_READ and not self._receive():
                        return self._end_all()
                self._reap()
                self._signal_due()
                if self._jobs:
                    self._spawn(self._jobs.popleft())

    def _receive(self) -> bool:
        try:
            data = self._control.recv(1 << 16)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if not data:
            return False
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            job = json.loads(line)
            if "spawn" in job:
                self._jobs.append(job)
            elif job["end"] in self._alive:
                when = time.monotonic() + job["after"]
                self._due.append((when, job["end"], job["signal"]))
                if job["signal"] != signal.SIGKILL:
                    self._due.append((when + TERM_TO_KILL, job["end"], signal.SIGKILL))
        return True

    def _spawn(self, job: Mapping[str, Any]) -> None:
        try:
            pid, fds = _start(job)
        except OSError as e:
            return self._send({"failed": job["spawn"], "errno": e.errno})
        self._alive[pid] = job["cwd"]
        self._send({"started": job["spawn"], "pid": pid, "fds": [sorted(set(fds)).index(fd) for fd in fds]}, sorted(set(fds)))

    def _send(self, message: Mapping[str, Any], fds: Sequence[int] = ()) -> None:
        self._outbox.append((json.dumps(message).encode() + b"\n", fds))
        self._flush()

    def _flush(self) -> None:
        while self._outbox:
            data, fds = self._outbox[0]
            try:
                sent = socket.send_fds(self._control, [data], list(fds)) if fds else self._control.send(data)
            except BlockingIOError:
                return
            except OSError:
                return                      # the proxy has gone; the next recv says so
            for fd in fds:
                os.close(fd)
            if sent < len(data):
                self._outbox[0] = (data[sent:], ())
            else:
                self._outbox.popleft()

    def _reap(self) -> None:
        while self._alive:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            # Whatever the child had started goes with it; the group's number cannot be in use again yet.
            _kill_group(pid, signal.SIGKILL)
            if self._alive.pop(pid, None) is not None:
                self._due = [d for d in self._due if d[1] != pid]
                self._send({"exited": pid, "status": os.waitstatus_to_exitcode(status)})

    def _signal_due(self) -> None:
        now = time.monotonic()
        for when, pid, sig in [d for d in self._due if d[0] <= now]:
            self._due.remove((when, pid, sig))
            if pid in self._alive:
                _kill_group(pid, sig)

    def _end_all(self) -> None:
        for pid in self._alive:
            _kill_group(pid, signal.SIGTERM)
        give_up = time.monotonic() + TERM_TO_KILL
        self._outbox.clear()
        while self._alive and time.monotonic() < give_up:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid:
                _kill_group(pid, signal.SIGKILL)
                self._alive.pop(pid, None)
            else:
                time.sleep(0.01)
        for pid in self._alive:
            _kill_group(pid, signal.SIGKILL)
        _remove(self._root)


class Spawner:
    """The proxy's end of the spawner. Make it before the first thread is started; spawn() may then be called from any thread."""

    def __init__(self) -> None:
        self.root = tempfile.mkdtemp(prefix="cliproxy-")        # mode 0700; every place is made in here
        self._socket, theirs = socket.socketpair()
        self._lock, self._numbers = threading.Lock(), iter(range(1, 1 << 62))
        self._starting: Dict[int, Tuple[threading.Event, List[Any]]] = {}
        self._children: Dict[int, Child] = {}
        self.gone = threading.Event()
        self.pid = os.fork()
        if self.pid == 0:
            self._socket.close()
            self._run(theirs)
        theirs.close()
        self._thread: Optional[threading.Thread] = None

    def _run(self, control: socket.socket) -> None:
        try:
            os.setsid()
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 0)
            os.dup2(null, 1)
            control.setblocking(False)
            _SpawnerProcess(control, self.root).run()
        except BaseException:
            sys.excepthook(*sys.exc_info())     # type: ignore[arg-type]
            os._exit(1)
        os._exit(0)

    def spawn(self, argv: Sequence[str], env: Mapping[str, str], cwd: str, on_tty: Sequence[int] = (), place: str = "") -> Child:
        """A running child. argv[0] is a path. OSError if it cannot be started. `place` is removed when it has ended."""
        event: Tuple[threading.Event, List[Any]] = (threading.Event(), [])
        job = {"argv": list(argv), "env": dict(env), "cwd": cwd, "tty": list(on_tty)}
        with self._lock:
            if self._thread is None:        # the first thread of the process starts here, long after the fork
                self._thread = threading.Thread(target=self._listen, name="spawner", daemon=True)
                self._thread.start()
            number = next(self._numbers)
            self._starting[number] = event
            self._tell({"spawn": number, **job})
        event[0].wait()
        answer = event[1][0]
        if isinstance(answer, OSError):
            raise answer
        pid, fds = answer
        child = Child(self, pid, fds, place)
        with self._lock:
            early = self._children.get(pid)     # it may have ended before we got here
            self._children[pid] = child
        if isinstance(early, int):
            self._ended(pid, early)
        return child

    def end(self, pid: int, after: float = 0.0, sig: int = signal.SIGTERM) -> None:
        """Signal the group of a child after so many seconds, and SIGKILL it TERM_TO_KILL later. Nothing happens if it has ended."""
        with self._lock:
            try:
                self._tell({"end": pid, "after": after, "signal": int(sig)})
            except OSError:
                pass                        # the spawner has gone and has taken its children along

    def close(self) -> None:
        """End the spawner, every child and every place; returns when they are gone."""
        if self._thread is None:
            self._socket.close()
        else:
            try:
                self._socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass                        # it was killed, and its socket is closed already
            self._thread.join()
        try:
            os.waitpid(self.pid, 0)
        except ChildProcessError:
            pass
        _remove(self.root)

    def _tell(self, message: Mapping[str, Any]) -> None:
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def _listen(self) -> None:
        buffer, passed = b"", deque()       # type: ignore[var-annotated]
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self._socket, 1 << 16, 16)
            except OSError:
                data, fds = b"", []
            if not data:
                break
            for fd in fds:
                os.set_inheritable(fd, False)
            passed.extend(fds)
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                self._heard(json.loads(line), passed)
        self._socket.close()
        self.gone.set()
        for event, answer in list(self._starting.values()):
            answer.append(OSError(0, "the process that starts CLIs has gone"))
            event.set()
        for pid, child in list(self._children.items()):
            _kill_group(pid, signal.SIGKILL)        # it was killed itself, so it could not do this
            child.ended(-signal.SIGKILL)

    def _heard(self, message: Mapping[str, Any], passed: deque) -> None:
        if "exited" in message:
            self._ended(message["exited"], message["status"])
        elif "failed" in message:
            event, answer = self._starting.pop(message["failed"])
            answer.append(OSError(message["errno"], os.strerror(message["errno"])))
            event.set()
        else:
            event, answer = self._starting.pop(message["started"])
            distinct = [passed.popleft() for _ in range(max(message["fds"]) + 1)]
            answer.append((message["pid"], [distinct[i] for i in message["fds"]]))
            event.set()

    def _ended(self, pid: int, status: int) -> None:
        with self._lock:
            child = self._children.pop(pid, None)
            if child is None:
                self._children[pid] = status    # type: ignore[assignment]
                return
        child.ended(status)


class Child:
    """A running CLI: three descriptors and an exit status. Used by one thread; `with` makes sure that it ends.

    Leaving the `with` block kills the group at once, unless release() has been called: then the CLI may end by itself
    (it may still have a login token to write) and is told to after `grace` seconds.
    """

    def __init__(self, spawner: Spawner, pid: int, fds: Sequence[int], place: str):
        self.pid, self.place, self.status = pid, place, None    # type: Tuple[int, str, Optional[int]]
        self.stdin, self.stdout, self.stderr = fds
        self._spawner, self._left, self._exited = spawner, False, threading.Event()
        self._to_write, self._close_stdin = memoryview(b""), True
        self._errors, self._scope = b"", None       # type: Tuple[bytes, Optional[Scope]]
        for fd in set(fds):
            os.set_blocking(fd, False)
        self._reads = {self.stdout, self.stderr}

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exc: Any) -> None:
        if not self._left and not self._exited.is_set():
            self._spawner.end(self.pid)
        if self._scope:
            self._scope.forget()            # a closed descriptor's number is soon another one's
        for fd in {self.stdin, self.stdout, self.stderr} - {-1}:
            os.close(fd)
        self.stdin = self.stdout = self.stderr = -1

    def release(self, grace: float = 2.0) -> None:
        """The answer is complete: let it end by itself, for so many seconds."""
        self._left = True
        self._spawner.end(self.pid, after=grace)

    def kill(self) -> None:
        """SIGKILL now: for a CLI that would go on to spend quota."""
        self._left = True
        self._spawner.end(self.pid, sig=signal.SIGKILL)

    def ended(self, status: int) -> None:
        """Called by the spawner's thread when the process has been reaped."""
        self.status = status
        if self.place:
            shutil.rmtree(self.place, ignore_errors=True)
        self._exited.set()

    def wait(self, seconds: float) -> Optional[int]:
        """The exit status (negative: the signal), or None if it has not ended after so many seconds."""
        self._exited.wait(seconds)
        return self.status

    def write(self, data: bytes) -> None:
        """Queue data for stdin, then EOF. It is written while output() is being read, so neither side can block the other."""
        self._to_write = memoryview(data)

    def errors(self) -> str:
        """The end of what it wrote to stderr, as clean text."""
        text = TerminalText()
        return "\n".join([*text.feed(self._errors), text.end()]).strip()

    def output(self, scope: Scope, poll: Optional[Callable[[], Optional[float]]] = None) -> Iterator[bytes]:
        """stdout piece by piece, to its end; b"" when nothing came for poll() seconds or for a keep-alive interval."""
        self._scope = scope
        while True:
            writing = self.stdin >= 0 and (len(self._to_write) > 0 or self._close_stdin)
            ready = scope.wait(self._reads, [self.stdin] if writing else (), poll() if poll else None)
            if self.stdin in ready and writing:
                self._write_some(scope)
            if self.stderr in ready and self.stderr != self.stdout:
                self._read_errors(scope)
            if self.stdout in ready:
                data = self._read(self.stdout)
                if data == b"":
                    break
                if data:
                    yield data
            elif not ready:
                yield b""
        scope.forget()
        self._drain_errors()

    def _write_some(self, scope: Scope) -> None:
        try:
            if self._to_write:
                self._to_write = self._to_write[os.write(self.stdin, self._to_write[:1 << 16]):]
        except BlockingIOError:
            return
        except OSError:                     # it has closed its stdin, or ended: what it says next tells why
            self._to_write = memoryview(b"")
        if not self._to_write:
            self._close_stdin = False
            if self.stdin != self.stdout:
                scope.forget()
                os.close(self.stdin)
                self.stdin = -1

    def _read_errors(self, scope: Scope) -> None:
        data = self._read(self.stderr)
        if data:
            self._errors = (self._errors + data)[-STDERR_KEPT:]
        elif data == b"":
            self._reads = {self.stdout}

    def _drain_errors(self) -> None:
        """What is left in the pipe once stdout has ended; the child writes its reason just before it ends."""
        if self.stderr in (self.stdout, -1):
            return
        self.wait(0.5)
        for _ in range(STDERR_KEPT):
            data = self._read(self.stderr)
            if not data:
                return
            self._errors = (self._errors + data)[-STDERR_KEPT:]

    @staticmethod
    def _read(fd: int) -> Optional[bytes]:
        """Some bytes, b"" at the end, None if there is nothing yet. Linux reports the end of a terminal as EIO."""
        try:
            return os.read(fd, 1 << 16)
        except BlockingIOError:
            return None
        except OSError as e:
            if e.errno != errno.EIO:
                raise
            return b""


# === Prompts =========================================================================================================
# A conversation becomes what a CLI can be given: the four wire shapes that all of them use, and the templates of
# providers.json filled with them. Prompts go by stdin or by a file in a private directory, never by argv.


def anthropic_messages(messages: Sequence[Message]) -> List[Dict[str, Any]]:
    """Messages API messages (docs.anthropic.com/en/api/messages). System messages travel elsewhere there, so they are left out, and
    so are blank ones, which that API does not take. Neighbours of one role are one message, or claude would put a newline between them."""
    out: List[Dict[str, Any]] = []
    for m in messages:
        blocks: List[Dict[str, Any]] = []
        for p in m.parts:
            if isinstance(p, TextPart):
                blocks.append({"type": "text", "text": p.text})
            elif isinstance(p, ImagePart):
                blocks.append({"type": "image", "source": {"type": "base64", "media_type": p.mime, "data": p.data}})
            elif isinstance(p, CallPart):
                blocks.append({"type": "tool_use", "id": p.id, "name": p.name, "input": json.loads(p.arguments or "{}")})
            else:
                blocks.append({"type": "tool_result", "tool_use_id": p.id, "content": p.text})
        if m.role == "system" or all(b["type"] == "text" and not b["text"].strip() for b in blocks):
            continue
        role = "assistant" if m.role == "assistant" else "user"
        if out and out[-1]["role"] == role:
            out[-1]["content"] += blocks
        else:
            out.append({"role": role, "content": blocks})
    return out


def gemini_contents(messages: Sequence[Message]) -> List[Dict[str, Any]]:
    """Gemini API contents (ai.google.dev/api/generate-content). System messages travel elsewhere there, so they are left out."""
    out = []
    names = {p.id: p.name for m in messages for p in m.parts if isinstance(p, CallPart)}    # an OpenAI tool message has only the id
    for m in messages:
        parts: List[Dict[str, Any]] = []
        for p in m.parts:
            if isinstance(p, TextPart):
                parts.append({"text": p.text})
            elif isinstance(p, ImagePart):
                parts.append({"inlineData": {"mimeType": p.mime, "data": p.data}})
            elif isinstance(p, CallPart):
                parts.append({"functionCall": {"id": p.id, "name": p.name, "args": json.loads(p.arguments or "{}")}})
            else:
                parts.append({"functionResponse": {"id": p.id, "name": p.name or names.get(p.id, ""), "response": {"output": p.text}}})
        if m.role != "system":
            out.append({"role": "assistant" if m.role == "assistant" else "user", "content": parts})
    return out


def openai_messages(messages: Sequence[Message]) -> List[Dict[str, Any]]:
    """Chat completions messages (platform.openai.com/docs/api-reference/chat), as the client would have sent them."""
    out: List[Dict[str, Any]] = []
    for m in messages:
        content: Any = [{"type": "text", "text": p.text} if isinstance(p, TextPart) else
                        {"type": "image_url", "image_url": {"url": f"data:{p.mime};base64,{p.data}"}}
                        for p in m.parts if isinstance(p, (TextPart, ImagePart))]
        if len(content) == 1 and content[0]["type"] == "text":
            content = content[0]["text"]
        calls = [{"id": p.id, "type": "function", "function": {"name": p.name, "arguments": p.arguments}} for p in m.parts if isinstance(p, CallPart)]
        results = [p for p in m.parts if isinstance(p, ResultPart)]
        if results:
            out += [{"role": "tool", "tool_call_id": p.id, "content": p.text} for p in results]
            continue
        row: Dict[str, Any] = {"role": m.role, "content": content or (None if calls else "")}
        if m.name:
            row["name"] = m.name
        if calls:
            row["tool_calls"] = calls
        out.append(row)
    return out


def responses_items(messages: Sequence[Message]) -> List[Dict[str, Any]]:
    """Responses API input items (platform.openai.com/docs/api-reference/responses); a system message is role developer there."""
    out: List[Dict[str, Any]] = []
    for m in messages:
        kind = "output_text" if m.role == "assistant" else "input_text"
        content = [{"type": kind, "text": p.text} if isinstance(p, TextPart) else
                   {"type": "input_image", "image_url": f"data:{p.mime};base64,{p.data}"}
                   for p in m.parts if isinstance(p, (TextPart, ImagePart))]
        if content:
            out.append({"type": "message", "role": "developer" if m.role == "system" else m.role, "content": content})
        out += [{"type": "function_call", "call_id": p.id, "name": p.name, "arguments": p.arguments} for p in m.parts if isinstance(p, CallPart)]
        out += [{"type": "function_call_output", "call_id": p.id, "output": p.text} for p in m.parts if isinstance(p, ResultPart)]
    return out


def transcript(messages: Sequence[Message], guard: Optional[str] = None) -> str:
    """The whole conversation as one text, for a CLI that takes nothing else. A lone user message stays as it is, byte for byte,
    unless the pattern `guard` fits its start (a CLI would take it for a command) or it is nothing but images (for no input at all)."""
    first, only_images = messages[0], not messages[0].text and any(isinstance(p, ImagePart) for p in messages[0].parts)
    if len(messages) == 1 and first.role == "user" and not only_images and not (guard and re.match(guard, first.text)):
        return first.text
    blocks = []
    for m in messages:
        said = "".join(p.text if isinstance(p, (TextPart, ResultPart)) else f"[calls {p.name} with {p.arguments}]"
                       for p in m.parts if not isinstance(p, ImagePart))
        blocks.append(f"<{m.role}>\n{said}\n</{m.role}>")
    return "\n\n".join(blocks) + "\n\n<assistant>\n"


WIRE_FORMATS: Dict[str, Callable[[Sequence[Message]], List[Dict[str, Any]]]] = {
    "anthropic": anthropic_messages, "gemini": gemini_contents, "openai": openai_messages, "responses": responses_items}
MISSING: Any = type("Missing", (), {"__repr__": lambda self: "MISSING"})()      # a hole that nothing fills: what holds it is left out


def estimate_tokens(text: str) -> int:
    """A rough count for when a CLI gives none: four bytes of UTF-8 a token, as OpenAI's guide has it for English."""
    return (len(text.encode("utf-8", "replace")) + 3) // 4


def split_last(messages: Sequence[Message], before: Optional[str]) -> Tuple[Tuple[Message, ...], Optional[str]]:
    """(history, prompt): for a CLI that takes the last words by stdin and all else natively.

    The prompt is the last text of the last user message; its images and other texts stay in the history, before it. What
    the pattern `before` finds at the prompt's start moves there too (gemini takes a leading / for a command of its own)."""
    last = messages[-1]
    texts = [i for i, p in enumerate(last.parts) if isinstance(p, TextPart) and p.text]
    if last.role != "user" or not texts:
        return tuple(messages), None
    prompt = last.parts[texts[-1]].text     # type: ignore[union-attr]
    rest = tuple(p for i, p in enumerate(last.parts) if i != texts[-1])
    head = re.match(before, prompt) if before else None
    if head and head.end() < len(prompt):
        rest, prompt = (*rest, TextPart(head.group())), prompt[head.end():]
    return (*messages[:-1], replace(last, parts=rest)) if rest else tuple(messages[:-1]), prompt


class Variables:
    """What the holes of a turn's templates stand for. lookup(name, argument) gives the value or MISSING."""

    def __init__(self, turn: Turn, strategy: Strategy, place: str, outside: Mapping[str, Any]):
        self._request, self._place, self._outside = turn.request, place, outside
        self._files: Dict[str, str] = {}
        messages = turn.request.messages
        lead = next((i for i, m in enumerate(messages) if m.role != "system"), len(messages))
        history, prompt = split_last(messages[lead:], strategy.row.get("split")) if lead < len(messages) else ((), None)
        guard = strategy.row.get("guard")
        if prompt is not None and guard and re.match(guard, prompt):
            prompt = f"<user>\n{prompt}\n</user>"
        uses_prompt = any(name == "prompt" for name, _ in holes(strategy.row.get("stdin", "")))
        start = 1 + max((i for i, m in enumerate(messages) if m.role in ("assistant", "tool")), default=-1)     # of what was said last
        self._history: Sequence[Message] = (*messages[:lead], *history) if uses_prompt else messages[:start]
        self._last: Sequence[Message] = messages[start:]
        systems = [m.text for m in messages if m.role == "system" and m.text]
        form = turn.request.params.get("response_format") or {}
        self._values: Dict[str, Any] = {
            "dir": place, "self": os.path.abspath(__file__), "python": sys.executable, "uuid": str(uuid.uuid4()), "model": turn.model or MISSING,
            "system": "\n\n".join(systems) or MISSING,
            "prompt": prompt if prompt else MISSING, "transcript": transcript(messages, guard),
            "schema": form.get("json_schema", {}).get("schema", MISSING) if form.get("type") == "json_schema" else MISSING,
            "json_mime": "application/json" if form.get("type") in ("json_object", "json_schema") else MISSING,
            "history": True if self._history else MISSING}
        self._derived = turn.provider.row.get("derive", {})
        self._model = turn.model or ""

    def wrote(self, name: str, path: str) -> None:
        self._files[name] = path

    def with_item(self, values: Mapping[str, Any]) -> Callable[[str, str], Any]:
        return lambda name, arg: values[name] if name in values else self.lookup(name, arg)

    def lookup(self, name: str, arg: str) -> Any:
        if name in WIRE_GROUPS and arg:
            messages = {"messages": self._request.messages, "history": self._history, "last": self._last}[name]
            shaped = WIRE_FORMATS[arg](messages)
            if name == "last":
                return shaped[0]["content"] if shaped and shaped[0]["role"] == "user" else MISSING
            return shaped or MISSING
        if name == "file":
            return self._files.get(arg, MISSING)
        if name == "env":
            return os.environ.get(arg) or MISSING
        if name in self._values:
            return self._values[name]
        if name in self._derived:
            row = self._derived[name]
            return derived(row, self._model if row["from"] == "model" else self._request.params.get(row["from"]), self._model)
        if name in PARAMETERS:
            value = self._request.params.get(name)
            return MISSING if value is None else value
        return self._outside.get(f"{name}:{arg}" if arg else name, MISSING)


def derived(row: Mapping[str, Any], value: Any, model: str) -> Any:
    """What a row of `derive` makes of a value for this model; MISSING where its map or its models leave it out."""
    return row["map"].get(value, MISSING) if re.search(row.get("models", ""), model) else MISSING


WIRE_GROUPS = ("messages", "history", "last")
Lookup = Callable[[str, str], Any]


def fill(template: Any, lookup: Lookup) -> Any:
    """The template with its holes filled. What holds a MISSING value is left out: a string, a list's item, an object's key."""
    if isinstance(template, str):
        return _fill_string(template, lookup)
    if isinstance(template, list):
        out: List[Any] = []
        for item in template:
            value = fill(item, lookup)
            splice = isinstance(item, str) and HOLE.fullmatch(item)
            if splice and splice.group(1):
                out += [] if value is MISSING else value
            elif value is not MISSING:
                out.append(value)
        return out
    if isinstance(template, dict):
        filled = ((fill(k, lookup), fill(v, lookup)) for k, v in template.items())
        return {k: v for k, v in filled if k is not MISSING and v is not MISSING}
    return template


def _fill_string(template: str, lookup: Lookup) -> Any:
    def value_of(m: re.Match) -> Any:
        value = lookup(m.group(2), m.group(3) or "")
        return m.group(4) if value is MISSING and m.group(4) is not None else value
    whole = HOLE.fullmatch(template)
    if whole:
        value = value_of(whole)
        return fill(value, lookup) if whole.group(4) is not None and value == whole.group(4) else value
    values = [value_of(m) for m in HOLE.finditer(template)]
    if any(v is MISSING for v in values):
        return MISSING
    left = iter(values)
    return HOLE.sub(lambda m: str(next(left)), template)


def fill_args(args: Sequence[Any], shared: Sequence[Any], lookup: Lookup) -> List[str]:
    """An argv: "@args" is the provider's shared list; a nested list is left out if anything in it is MISSING; objects branch or repeat."""
    out: List[str] = []
    for arg in args:
        if arg == "@args":
            out += fill_args(shared, (), lookup)
        elif isinstance(arg, list):
            group = [fill(a, lookup) for a in arg]
            out += [] if any(a is MISSING for a in group) else map(str, group)
        elif isinstance(arg, dict):
            out += _fill_branch(arg, lookup)
        else:
            value = fill(arg, lookup)
            out += [] if value is MISSING else [str(value)]
    return out


def _fill_branch(arg: Mapping[str, Any], lookup: Lookup) -> List[str]:
    kind = next(k for k in ("if", "unless", "each") if k in arg)
    value = lookup(*arg[kind].partition(":")[::2])
    if kind == "each":
        items = [] if value is MISSING else value
        return [a for item in items for a in fill_args([arg["argv"]], (), lambda n, x, item=item: item if n == "item" else lookup(n, x))]  # type: ignore[misc]
    return fill_args([arg["argv"]], (), lookup) if (value is MISSING) == (kind == "unless") else []


def fill_lines(spec: Mapping[str, Any], variables: Variables) -> Any:
    """A JSON-lines file: its templates in order; {"for": "history:FORMAT", ...} is written once for each message, and its
    "end", if it has one, after the last: what keeps a CLI from adding words of its own to a history that ends in a user's."""
    if "if" in spec and variables.lookup(*spec["if"].partition(":")[::2]) is MISSING:
        return MISSING
    lines: List[Any] = []
    for row in spec["lines"]:
        if not (isinstance(row, dict) and "for" in row):
            lines.append(fill(row, variables.lookup))
            continue
        items, parent = variables.lookup(*row["for"].partition(":")[::2]), None
        for item in [] if items is MISSING else items:
            values = {"item": item, "content": item.get("content"), "id": str(uuid.uuid4()), "parent": parent}
            lines.append(fill(row.get("each") or row[item["role"]], variables.with_item(values)))
            parent = values["id"]
        if parent and "end" in row:
            lines.append(fill(row["end"], variables.with_item({"id": str(uuid.uuid4()), "parent": parent})))
    return "".join(json.dumps(line) + "\n" for line in lines) or MISSING


def escaping(lookup: Lookup, marks: Mapping[str, str]) -> Lookup:
    """The same lookup, with every one of `marks` in a client's words replaced. gemini and qwen put environment variables, keys among
    them, in place of $NAME and ${NAME} in their settings, once over; the person's own settings (`found`) may ask for that."""
    def escaped(value: Any) -> Any:
        if isinstance(value, str):
            for mark, instead in marks.items():
                value = value.replace(mark, instead)
        elif isinstance(value, list):
            return [escaped(v) for v in value]
        elif isinstance(value, dict):
            return {k: escaped(v) for k, v in value.items()}
        return value
    return lambda name, arg: lookup(name, arg) if name == "found" else escaped(lookup(name, arg))


def spread(value: Any, what: str = "", over: str = "") -> Any:
    """`value` with what stands at the path `what` laid over the same key of every item of the list at the path `over`.

    For qwen, which takes no settings of ours for a model that the person's settings define, unless they are in that definition."""
    items, path = dig(value, over.split(".")), what.split(".")
    for item in items if isinstance(items, list) else ():
        if isinstance(item, dict):
            item[path[-1]] = merged(item.get(path[-1]), dig(value, path))
    return value


@dataclass(frozen=True)
class Launch:
    """Everything needed to start a child."""
    argv: List[str]
    env: Dict[str, str]
    cwd: str
    stdin: bytes
    on_tty: Tuple[int, ...]
    place: str


def child_environment(provider: Provider, lookup: Lookup, own_ports: Sequence[int], environ: Mapping[str, str]) -> Dict[str, str]:
    """The allow-listed variables of ours, and the provider's own. A base URL that leads back to this proxy is left out (no recursion)."""
    env = {}
    for name, value in environ.items():
        if any(fnmatch.fnmatchcase(name, p) for p in provider.row["env"]["pass"]) and not leads_here(value, own_ports):
            env[name] = value
    for name, template in provider.row["env"]["set"].items():
        if isinstance(template, dict):
            value = fill(template["json"], lookup)
            value = json.dumps(value) if value else MISSING
        else:
            value = fill(template, lookup)
        if value is not MISSING:
            env[name] = str(value).lstrip("\n")
    return env


def leads_here(url: str, own_ports: Sequence[int]) -> bool:
    """Is this the URL of a port of ours on this machine?"""
    m = re.match(r"https?://(?:[^@/]*@)?(\[[0-9a-fA-F:]+\]|[^:/]+)(?::(\d+))?", url)
    here = m and (m.group(1).strip("[]").lower() in ("localhost", "::1", "0.0.0.0", "::", socket.gethostname().lower()) or m.group(1).startswith("127."))
    return bool(m and here and int(m.group(2) or 80) in own_ports)


def make_place(root: str, provider: Provider, lookup: Lookup) -> str:
    """A new private directory (0700) with work/ (the cwd, empty), tmp/, home/ and links to the login files the person has."""
    place = tempfile.mkdtemp(prefix=provider.name + "-", dir=root)
    for name in ("work", "tmp", "home"):
        os.mkdir(os.path.join(place, name), 0o700)
    for name, target in provider.row.get("links", {}).items():
        source, link = os.path.expanduser(fill(target, lookup)), os.path.join(place, name)
        if os.path.exists(source):
            os.makedirs(os.path.dirname(link), 0o700, exist_ok=True)
            os.symlink(source, link)
    return place


def make_launch(turn: Turn, strategy: Strategy, binary: str, place: str, variables: Variables, own_ports: Sequence[int]) -> Launch:
    """Write a turn's files into its place and give the command. BadRequest if the conversation does not fit the way in."""
    row, lookup = turn.provider.row, variables.lookup
    for name, spec in row.get("files", {}).items():
        if isinstance(spec, dict) and "lines" in spec:
            content = fill_lines(spec, variables)
        elif isinstance(spec, dict):
            content = spread(fill(spec["json"], escaping(lookup, spec.get("escape", {}))), **spec.get("spread", {}))
            content = content if content is MISSING else json.dumps(content)
        else:
            content = fill(spec, lookup)
        if content is not MISSING:
            path = os.path.join(place, fill(name, lookup))
            os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as f:
                f.write(content.encode("utf-8", "replace"))
            variables.wrote(name, path)
    stdin = strategy.row.get("stdin", "")
    data = fill(stdin, lookup)
    if isinstance(stdin, list):
        complete = all(fill(part, lookup) is not MISSING for line in stdin for part in _leaves(line))
        data = "".join(json.dumps(line) + "\n" for line in data) if complete else MISSING
    if data is MISSING:
        raise BadRequest(f"{turn.provider.name} needs a user message with text as the last one",
                         "it has no text" if turn.request.messages[-1].role == "user" else f"this conversation ends in a message of role {turn.request.messages[-1].role}",
                         param="messages")
    terminal = strategy.row.get("terminal", ["stdout"] if strategy.driver == "text" else [])
    on_tty = tuple(fd for fd, name in enumerate(("stdin", "stdout", "stderr")) if name in terminal)
    argv = [binary, *fill_args(strategy.row["argv"], row.get("args", []), lookup)]
    return Launch(argv, child_environment(turn.provider, lookup, own_ports, os.environ), os.path.join(place, "work"), data.encode("utf-8", "replace"), on_tty, place)


def _leaves(template: Any) -> Iterator[str]:
    """The strings in a template that are one hole without a default: what must not be missing."""
    if isinstance(template, str):
        m = HOLE.fullmatch(template)
        if m and m.group(4) is None:
            yield template
    elif isinstance(template, (list, dict)):
        for item in template.values() if isinstance(template, dict) else template:
            yield from _leaves(item)


# === Drivers =========================================================================================================
# One class for each way to talk to a CLI: a child's output becomes events. A driver knows no CLI by name; what differs
# between CLIs stands in providers.json. (`resident` drivers, which keep their child, are further rows of DRIVERS.)

MAX_LINE = 64 << 20         # bytes; a JSON line longer than this is not an answer
WATCH_EVERY = 0.05          # seconds between looks at a file that a strategy watches
FLAGS_REFUSED = re.compile(r"unknown (option|argument|flag|command)|unexpected argument|unrecognized (option|argument|subcommand)|invalid value", re.I)


@dataclass(frozen=True)
class Turn:
    """A request at one provider: `model` is the name the CLI is given, "" for its own default."""
    provider: Provider
    model: str
    request: Request


def parse_reset(provider: Provider, text: str, now: Optional[float] = None) -> Optional[float]:
    """Seconds until a limit resets, from the CLI's own words ("34s", "3h20m5s", "2:13am (UTC)", "Nov 23rd, 2026 12:00 AM"), or None."""
    now = time.time() if now is None else now
    for pattern in provider.resets:
        m = pattern.search(text)
        found = m.groupdict() if m else {}
        if found.get("duration"):
            units = re.findall(r"(\d+(?:\.\d+)?)(h|ms|m|s)?", found["duration"])
            return sum(float(n) * {"h": 3600, "m": 60, "ms": 0.001, "s": 1, "": 1}[unit] for n, unit in units)
        if found.get("date"):
            plain = re.sub(r"(\d)(?:st|nd|rd|th)", r"\1", found["date"])
            try:
                return max(0.0, datetime.datetime.strptime(plain, "%b %d, %Y %I:%M %p").timestamp() - now)
            except ValueError:
                continue
        if found.get("clock"):
            zone = datetime.timezone.utc if found.get("zone", "").upper() in ("UTC", "GMT") else None
            at = datetime.datetime.strptime(found["clock"].upper(), "%I:%M%p" if ":" in found["clock"] else "%I%p")
            today = datetime.datetime.fromtimestamp(now, zone)
            then = today.replace(hour=at.hour, minute=at.minute, second=0, microsecond=0)
            return (then - today).total_seconds() % 86400
    return None


def classify(provider: Provider, message: str, status: Optional[int] = None, kind: str = "", exit_status: Optional[int] = None,
             reset: Optional[float] = None) -> Optional[ProviderError]:
    """The error that a CLI's words, HTTP status or exit status mean by the provider's rules; None if no rule fits."""
    message = message.strip()
    status = http_status(provider, message) if status is None else status
    if status is None and exit_status is not None:
        status = provider.row.get("exit_status", {}).get(str(exit_status))
    for rule, pattern in provider.errors:
        found = pattern.search(message) if pattern is not None else None
        if pattern is not None and not found:
            continue
        if any(key in rule and value not in rule[key] for key, value in (("status", status), ("exit", exit_status), ("kind", kind))):
            continue
        error = provider_error(provider, rule["error"], message, reset)
        if isinstance(error, ParameterRefused) and found:
            error.parameter = found.group("parameter")
        return error
    return None


def http_status(provider: Provider, text: str) -> Optional[int]:
    """The HTTP status that a CLI's words name, by the provider's `status` rule."""
    m = re.search(provider.row["status"], text) if "status" in provider.row else None
    return int(next(g for g in m.groups() if g)) if m else None


def plain_words(message: str) -> str:
    """A CLI's error message on one line, without its wrapping: the text inside "[API Error: ...]" and of a JSON error object."""
    text = " ".join(message.split())
    m = re.match(r"\[?API Error: (.*?)\]?( Please .*)?$", text)
    text = m.group(1) if m else text
    start = text.find("{")
    try:
        body, end = json.JSONDecoder().raw_decode(text[start:]) if start >= 0 else (None, 0)
    except ValueError:
        return text
    inner = dig(body, ("error", "message")) or dig(body, ("message",)) or dig(body, ("detail",))
    return text[:start] + inner + text[start + end:] if isinstance(inner, str) else text


def provider_error(provider: Provider, name: str, message: str, reset: Optional[float] = None) -> ProviderError:
    """An error of a class named as in providers.json, worded for a person."""
    cls, words = ERROR_CLASSES[name], plain_words(message)
    retry_after = reset if reset is not None else parse_reset(provider, message)
    if cls is NotLoggedIn:                  # "claude is not logged in: run "claude" and type /login"
        return cls(WHAT_HAPPENED[name].format(name=provider.name), provider.login)
    error = cls(WHAT_HAPPENED[name].format(name=provider.name), words[:600].rstrip("."), cls.advice.format(login=provider.login), retry_after=retry_after,
                param="model" if cls is ModelNotFound else "messages" if cls is ContextLengthExceeded else None)
    if cls is QuotaUsedUp:
        error.should_retry = retry_after is not None and retry_after <= 120     # a retry sooner than the reset only burns a spawn
    return error


def no_answer(provider: Provider, child: Child, said: str, unknown: int) -> Exception:
    """Why a child ended without an answer that the rules understand: by its words, its exit status, or a changed format."""
    status, errors = child.wait(2.0), child.errors()
    for text in (errors, said):             # stderr first: what was said may be the model's own words
        known = classify(provider, _failure(provider, text), http_status(provider, text), exit_status=status)
        if known:
            return known
    if status and FLAGS_REFUSED.search(errors or said):
        return FormatChanged(" ".join((errors or said).split())[:200])
    if status == 0 and (unknown or said):   # not what was said: this goes to the log, and may be the model's own words
        return FormatChanged(" ".join(errors.split())[:200] or (f"{unknown} lines of unknown types" if unknown else "its lines are no JSON"))
    if status is not None and status < 0:
        how = f"was killed by signal {-status} ({signal.Signals(-status).name})"
    else:
        how = f"ended with exit status {status}" if status is not None else "closed its output and went on running"
    return Crashed(f"{provider.name} {how} before its answer was complete", " ".join(_failure(provider, errors or said).split())[-400:], Crashed.advice)


def _failure(provider: Provider, text: str) -> str:
    """The error itself in what a CLI printed around it, by the provider's `failure` rule."""
    found = re.findall(provider.row["failure"], text) if "failure" in provider.row else []
    return found[-1] if found else text


class JsonLines:
    """One process a turn, a JSON object a line; the strategy's event rules say what each line means."""

    def __init__(self, turn: Turn, strategy: Strategy):
        self._provider, self._strategy = turn.provider, strategy
        self._held, self._reset, self._seen_text, self._unknown = "", None, False, 0    # type: Tuple[str, Optional[float], bool, int]
        self._noise: List[str] = []

    def events(self, child: Child, scope: Scope) -> Iterator[Event]:
        """Events as they come, a Done last. Raises the error the CLI reports, Crashed, TimedOut or FormatChanged."""
        buffer, watch = b"", FileWatch(self._provider, child)
        for data in child.output(scope, watch.every):
            if not data:
                watch.look(scope)
                if scope.silent():
                    yield Waiting()
                continue
            *lines, buffer = (buffer + data).split(b"\n") if b"\n" in data else (buffer + data,)
            if len(buffer) > MAX_LINE:
                raise Crashed(f"{self._provider.name} wrote a line of over {MAX_LINE >> 20} MiB", do=Crashed.advice)
            for line in lines:
                for event in self._line(line, child, scope):
                    watch.stop()
                    yield event
                    if isinstance(event, Done):
                        return
        if buffer:
            for event in self._line(buffer, child, scope):
                yield event
                if isinstance(event, Done):
                    return
        raise no_answer(self._provider, child, self._held or "\n".join(self._noise[-20:]), self._unknown)

    def _line(self, raw: bytes, child: Child, scope: Scope) -> Iterator[Event]:
        try:
            line = json.loads(raw)
        except ValueError:
            if raw.strip():
                self._noise.append(raw.decode("utf-8", "replace").strip()[:1000])
            return
        if not isinstance(line, dict):
            self._noise.append(str(line)[:1000])
            return
        scope.enter("idle" if self._seen_text else "first")
        line["@text"], line["@held"] = self._seen_text, self._held or None
        for rule in self._strategy.events:
            if rule.fits(line):
                yield from self._obey(rule, line, child)
                return
        self._unknown += 1

    def _obey(self, rule: EventRule, line: Mapping[str, Any], child: Child) -> Iterator[Event]:
        row, paths = rule.row, rule.paths
        if rule.error:
            raise self._failure(rule, line, child)
        if "must_be_empty" in paths and dig(line, paths["must_be_empty"]):
            raise Crashed(f"{self._provider.name} started with tools switched on", _show(dig(line, paths["must_be_empty"])),
                          "it was stopped, because behind this proxy a CLI is a model and no agent: check its version with `cliproxy.py doctor`")
        if "reset" in paths:
            at = dig(line, paths["reset"])
            self._reset = max(0.0, float(at) - time.time()) if isinstance(at, (int, float)) else None
        if "hold" in paths:
            self._held += str(dig(line, paths["hold"]) or "")
        for key, cls in (("thinking", Thinking), ("text", Text)):
            value = dig(line, paths[key]) if key in paths else None
            if isinstance(value, str) and value:
                if self._held:
                    yield Text(self._held)
                    self._held = ""
                self._seen_text = self._seen_text or cls is Text
                yield cls(value)
        if rule.usage:
            yield Usage(**{key: self._count(line, where) for key, where in rule.usage.items()})
        if "done" in row:
            if self._held and not row.get("drop_held"):
                yield Text(self._held)
            child.kill() if row.get("kill") else child.release()
            yield Done(row["done"])

    @staticmethod
    def _count(line: Mapping[str, Any], where: Sequence[Sequence[str]]) -> Optional[int]:
        found = [n for n in (dig(line, path) for path in where) if isinstance(n, int)]
        return sum(found) if found else None

    def _failure(self, rule: EventRule, line: Mapping[str, Any], child: Child) -> ProviderError:
        said = self._held if rule.error["message"] == ("@held",) else dig(line, rule.error["message"])
        message = said if isinstance(said, str) else child.errors() or "it gave no reason"
        status, kind = dig(line, rule.error.get("status", ("@none",))), dig(line, rule.error.get("kind", ("@none",)))
        if not isinstance(status, int):     # gemini's answer has it on stderr only, some milliseconds before; its exit status is slower
            status = http_status(self._provider, message) or http_status(self._provider, child.errors())
        exit_status = child.wait(1.0) if "exit_status" in self._provider.row and status is None else None
        found = classify(self._provider, message, status, str(kind or ""), exit_status, self._reset)
        return found or ProviderError(f"{self._provider.name} failed", plain_words(message)[:600], ProviderError.advice)


class FileWatch:
    """For a CLI that hides a failure behind minutes of retries and tells only its log file: reads that file until the first event."""

    def __init__(self, provider: Provider, child: Child):
        row = provider.row.get("watch")
        self._provider, self._pattern = provider, re.compile(row["match"]) if row else None
        self._files = os.path.join(child.place, row["files"]) if row else ""

    def every(self) -> Optional[float]:
        return WATCH_EVERY if self._pattern else None

    def stop(self) -> None:
        self._pattern = None

    def look(self, scope: Scope) -> None:
        """Raise the error that the log names, if it names one."""
        for path in glob.glob(self._files) if self._pattern else ():
            with open(path, encoding="utf-8", errors="replace") as f:
                m = self._pattern.search(f.read())
            if m:
                error = classify(self._provider, m.group("message"), int(m.group("status")))
                raise error or ProviderError(f"{self._provider.name} failed", m.group("message"), ProviderError.advice)


class PlainText:
    """One process a turn on a terminal; what it prints, cleaned of escapes and of the lines the strategy drops, is the answer.

    `begin` and `end` are the lines between which the answer stands, `drop` the lines in it that are none (spinners, prompts).
    `failed` finds on stderr what went wrong where the exit status does not tell. With stream false nothing is passed on before the
    CLI has ended well, because some print their errors as an answer.
    """

    def __init__(self, turn: Turn, strategy: Strategy):
        self._provider, row = turn.provider, strategy.row
        self._begin, self._end, self._failed = (re.compile(row[k]) if k in row else None for k in ("begin", "end", "failed"))
        self._drop = [re.compile(p) for p in row.get("drop", [])]
        self._stream, self._started, self._ended = row.get("stream", False), "begin" not in row, False
        self._gap, self._said = "", []      # type: Tuple[str, List[str]]

    def events(self, child: Child, scope: Scope) -> Iterator[Event]:
        """As JsonLines.events; the text comes line by line, or whole."""
        terminal, watch = TerminalText(), FileWatch(self._provider, child)
        for data in child.output(scope, watch.every):
            if not data:
                watch.look(scope)
                if scope.silent():
                    yield Waiting()
                continue
            scope.enter("idle")
            for text in self._take(terminal.feed(data)):
                watch.stop()
                yield text
        last = list(self._take(terminal.end().split("\n")))
        status = child.wait(2.0)
        if status != 0:
            raise no_answer(self._provider, child, "\n".join(self._said), 0)
        failed = self._failed.search(child.errors()) if self._failed else None
        if failed:
            raise classify(self._provider, failed.group(1)) or ProviderError(f"{self._provider.name} failed", failed.group(1)[:600], ProviderError.advice)
        yield from last
        if not self._stream and self._said:
            yield Text("\n".join(self._said).rstrip("\n"))
        if not any(s.strip() for s in self._said):
            raise no_answer(self._provider, child, "", 0)
        child.release()
        yield Done("stop")

    def _take(self, lines: Sequence[str]) -> Iterator[Event]:
        """The lines that belong to the answer. A newline goes out only with the text behind it, so the last one never does."""
        for line in lines:
            if not self._started:
                self._started = bool(self._begin and self._begin.search(line))
                continue
            self._ended = self._ended or bool(self._end and self._end.search(line))
            if self._ended or any(p.search(line) for p in self._drop):
                continue
            if self._stream and line:
                yield Text(self._gap + line)
            self._gap = "\n" if self._stream and line else self._gap + "\n"
            self._said.append(line)


DRIVERS: Dict[str, Any] = {"jsonl": JsonLines, "text": PlainText}


# === Router ==========================================================================================================
# One answer out of the strategies of a provider: which provider a model name means, a slot, a place, a child, its events,
# the step down when a strategy is broken; and what the CLI does not do itself: stop sequences, max_tokens.


def whole_characters(events: Iterator[Event]) -> Iterator[Event]:
    """The same events, with characters that JavaScript cut in two (a surrogate pair over two deltas) put together again."""
    half = ""
    for event in events:
        if not isinstance(event, (Text, Thinking)):
            yield event
            continue
        text, half = half + event.text, ""
        if "\ud800" <= text[-1:] <= "\udbff":
            text, half = text[:-1], text[-1]
        if not text.isascii():
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if text:
            yield type(event)(text)


def stop_at(events: Iterator[Event], stops: Sequence[str]) -> Iterator[Event]:
    """The same events, ended before the stop sequence that is complete first, also one that is split over events. Emulates `stop`."""
    held = ""
    for event in events:
        if isinstance(event, Text):
            held += event.text
            _, at = min(((i + len(s), i) for s in stops for i in [held.find(s)] if i >= 0), default=(0, -1))
            if at >= 0:
                if held[:at]:
                    yield Text(held[:at])
                yield Done("stop")
                return
            keep = max((n for s in stops for n in range(1, len(s)) if held.endswith(s[:n])), default=0)
            out, held = held[:len(held) - keep], held[len(held) - keep:]
            if out:
                yield Text(out)
            continue
        if held and isinstance(event, Done):
            yield Text(held)
            held = ""
        yield event


def limit_tokens(events: Iterator[Event], most: int) -> Iterator[Event]:
    """The same events, ended after about `most` tokens (by estimate_tokens). Emulates `max_tokens`."""
    left = most * 4
    for event in events:
        if isinstance(event, Text):
            data = event.text.encode()
            if len(data) > left:
                text = data[:left].decode("utf-8", "ignore")
                if text:
                    yield Text(text)
                yield Done("length")
                return
            left -= len(data)
        yield event


class Answer:
    """An answer on its way: its events, and where they come from. The route is final once the first event is there.

    params: {parameter: "native" | "emulated" | "ignored"} for each that the client gave.
    """

    def __init__(self, turn: Turn, scope: Scope):
        self.turn, self.scope = turn, scope
        self.strategy: Optional[Strategy] = None
        self.params: Dict[str, str] = {}
        self.usage, self.estimated, self.finish = Usage(), False, ""
        self.queued = self.spawned = self.first = 0.0       # seconds since `began`
        self.began = time.monotonic()
        self.events: Iterator[Event] = iter(())
        self._answer_chars: List[str] = []

    def since(self) -> float:
        return time.monotonic() - self.began

    def counted(self, events: Iterator[Event]) -> Iterator[Event]:
        """The same events, their usage added up, `length` told from `stop` by the token count where the CLI does not tell them apart."""
        most = self.turn.request.params.get("max_tokens")
        for event in events:
            if isinstance(event, Usage):
                self.usage = self.usage.merged(event)
                continue
            if isinstance(event, (Text, Thinking)):
                self.first = self.first or self.since()
                self._answer_chars.append(event.text)
            if isinstance(event, Done):
                if event.reason == "stop" and self.params.get("max_tokens") == "native" and most and (self.usage.output or 0) >= most:
                    event = Done("length")
                self.finish = event.reason
                self._estimate()
                yield event
                return
            yield event

    def _estimate(self) -> None:
        """Fill in what the CLI did not count, and remember that it is an estimate."""
        if self.usage.input is None or self.usage.output is None:
            self.estimated = True
            asked = "".join(p.text for m in self.turn.request.messages for p in m.parts if isinstance(p, (TextPart, ResultPart)))
            self.usage = Usage(estimate_tokens(asked), estimate_tokens("".join(self._answer_chars))).merged(self.usage)


WIRE_NAMES = {"stop_sequences": "stop", "reasoning_effort": "effort", "max_output_tokens": "max_tokens", "max_completion_tokens": "max_tokens"}
INERT = {"n", "stream", "parallel_tool_calls"}      # given, obeyed by the dialect or without any effect here


class Router:
    """Finds the provider of a model name and gets the answer from it. All methods may be called from any thread."""

    def __init__(self, providers: Mapping[str, Provider], spawner: Spawner, own_ports: Sequence[int] = (), log: Callable[..., None] = lambda **kw: None,
                 strict: bool = False):
        self.providers, self.spawner, self.own_ports, self._log, self._strict = providers, spawner, own_ports, log, strict
        self.hop = uuid.uuid4().hex
        self._slots = {name: Slots(p.row["slots"]) for name, p in providers.items()}
        self._lock = threading.Lock()
        self._broken: Dict[Tuple[str, str], str] = {}       # (provider, driver) -> the binary it broke with
        self.logged_in: Dict[str, Optional[bool]] = {}      # what the last look at each provider found
        self._refused: Set[Tuple[str, str, str]] = set()    # (provider, model, parameter) that its service would not take
        self._prepared: Dict[Tuple[str, str], Any] = {}     # (provider, binary) -> {"prepared:NAME": path}

    # --- which provider ---

    def installed(self) -> List[Provider]:
        return [p for p in self.providers.values() if p.binary(os.environ)]

    def models(self) -> List[Tuple[str, Provider]]:
        """(model name, provider) of all that can be served now: no process is started for it."""
        return [(name, p) for p in self.installed() for name in [p.name, *(m for m in p.row["models"].get("names", []) if m != p.name)]]

    def resolve(self, model: str) -> Tuple[Provider, str]:
        """(provider, the CLI's name for the model): a provider's name, provider/model, a listed name, an alias, or a wildcard."""
        if model in self.providers:
            return self._ready(self.providers[model]), ""
        prefix, slash, rest = model.partition("/")
        if slash and prefix in self.providers:
            if rest.startswith("-"):        # a CLI would take it for a flag
                raise ModelNotFound(f"the model `{model}` does not exist here", "no name of a model begins with -", ModelNotFound.advice, param="model")
            provider = self._ready(self.providers[prefix])
            return provider, provider.row["models"].get("aliases", {}).get(rest, rest)
        for candidates in (self.installed(), self.providers.values()):      # an installed one first; else say what to install
            for provider in candidates:
                known = provider.row["models"]
                if model in known.get("names", []) or model in known.get("aliases", {}):
                    return self._ready(provider), known.get("aliases", {}).get(model, model)
            for provider in candidates:
                if provider.row["models"].get("also") and fnmatch.fnmatchcase(model, provider.row["models"]["also"]):
                    return self._ready(provider), model
        names = ", ".join(name for name, _ in self.models())
        raise ModelNotFound(f"the model `{model}` does not exist here", f"this proxy can serve {names}",
                            "use one of these, or provider/model, such as claude/opus", param="model")

    @staticmethod
    def _ready(provider: Provider) -> Provider:
        if provider.binary(os.environ) is None:
            raise ModelNotFound(f"{provider.name} is not installed on this machine", f"there is no `{provider.row['binary']}` on the PATH",
                                f"install it: {provider.row.get('install', '')}; then {provider.login}", param="model")
        return provider

    # --- one answer ---

    def answer(self, request: Request, scope: Scope) -> Answer:
        """An Answer whose events are pulled by the caller; closing them ends the child. Raises ProxyError at once for what is wrong
        with the request itself."""
        provider, model = self.resolve(request.model)
        answer = Answer(Turn(provider, model or self._default_model(provider), request), scope)
        answer.events = self._run(answer)
        return answer

    def _default_model(self, provider: Provider) -> str:
        template = provider.row["models"]["default"]
        value = fill(template, lambda name, arg: self._outside(provider).get(f"{name}:{arg}", MISSING)) if template else ""
        return "" if value is MISSING else value

    def _run(self, answer: Answer) -> Iterator[Event]:
        turn, scope = answer.turn, answer.scope
        slots, name = self._slots[turn.provider.name], turn.provider.name
        slots.acquire(scope, name)
        try:
            answer.queued = answer.since()
            yield from self._down_the_strategies(answer)
        finally:
            slots.release()

    def _down_the_strategies(self, answer: Answer) -> Iterator[Event]:
        """The best strategy that works; before the first event the next one, or the same one without a parameter that was refused."""
        turn, binary = answer.turn, answer.turn.provider.binary(os.environ) or ""
        name, identity = turn.provider.name, self._identity(binary)
        ways, failure = deque(self._fitting(turn, identity)), None      # type: Tuple[deque, Optional[FormatChanged]]
        while ways:
            strategy, committed = ways.popleft(), False
            answer.strategy, answer.params = strategy, self._params(turn, strategy)
            try:
                for event in self._attempt(answer, strategy, binary):
                    committed = committed or not isinstance(event, Waiting)
                    yield event
                return
            except ParameterRefused as e:
                parameter = WIRE_NAMES.get(e.parameter, e.parameter)
                if committed or answer.params.get(parameter) != "native":
                    raise
                self._refused.add((name, turn.model, parameter))
                self._log(level="warning", event="parameter-refused", provider=name, model=turn.model, parameter=parameter, why=e.message)
                ways.appendleft(strategy)
            except (AuthenticationFailed, Unreachable) as e:
                if self.logged_in.get(name) is False:       # codex asks its service all the same, and says only what that said
                    raise provider_error(turn.provider, "not_logged_in", e.message) from None
                raise
            except FormatChanged as e:
                failure = e
                if self._broken.get((name, strategy.driver)) != identity:
                    self._broken[name, strategy.driver] = identity
                    self._log(level="warning", event="step-down", provider=name, strategy=strategy.driver, why=str(e),
                              hint="this version of the CLI prints what the rules do not know; run: cliproxy.py doctor --live")
                if committed:
                    break
        raise Crashed(f"{name} answered in a form that no strategy understands", str(failure or ""),
                      "see `cliproxy.py doctor --live`: this version of the CLI may be newer than what cliproxy was tested with")

    def _fitting(self, turn: Turn, identity: str) -> List[Strategy]:
        """The strategies that can carry this request, best first, without those that broke with this very binary."""
        has_images = any(isinstance(p, ImagePart) for m in turn.request.messages for p in m.parts)
        fitting = [s for s in turn.provider.strategies if s.images or not has_images]
        if not fitting:
            raise BadRequest(f"{turn.provider.name} cannot take images", "its CLI has no way in for them here", "send text only, or use another model", param="messages")
        working = [s for s in fitting if self._broken.get((turn.provider.name, s.driver)) != identity]
        return working or fitting

    def _params(self, turn: Turn, strategy: Strategy) -> Dict[str, str]:
        """native, emulated or ignored, for each parameter the client gave. BadRequest for an ignored one under --strict."""
        out = {}
        for name in turn.request.params:
            if name not in INERT:
                refused = (turn.provider.name, turn.model, name) in self._refused
                native = not refused and self._takes(turn, strategy, name)
                out[name] = "native" if native else "emulated" if name in ("stop", "max_tokens") else "ignored"
        ignored = [name for name, how in out.items() if how == "ignored"]
        if ignored and self._strict:
            raise BadRequest(f"{turn.provider.name} has no way to honour {', '.join(ignored)}", "the proxy runs with --strict",
                             "leave it out, or use another model", param=ignored[0], code="unsupported_parameter")
        return out

    @staticmethod
    def _takes(turn: Turn, strategy: Strategy, name: str) -> bool:
        """Does this value of a parameter get to the CLI? Some take a JSON schema but no JSON mode, or an effort for some models only."""
        value = turn.request.params[name]
        if name not in strategy.native or name in strategy.uses:
            return name in strategy.native
        if name == "response_format":
            return ("schema" if value["type"] == "json_schema" else "json_mime") in strategy.uses
        rows = (row for var, row in turn.provider.row["derive"].items() if var in strategy.uses and row["from"] == name)
        return any(derived(row, value, turn.model) is not MISSING for row in rows)

    def _attempt(self, answer: Answer, strategy: Strategy, binary: str) -> Iterator[Event]:
        """One child, one answer."""
        turn, scope, params = answer.turn, answer.scope, answer.turn.request.params
        outside = {"hop": self.hop, **self._outside(turn.provider), **self.prepared(turn.provider, binary)}
        place = ""
        try:
            place = make_place(self.spawner.root, turn.provider, lambda name, arg: os.environ.get(arg) or MISSING if name == "env" else MISSING)
            given = replace(turn.request, params={k: v for k, v in params.items() if answer.params.get(k) == "native"})
            launch = make_launch(turn, strategy, binary, place, Variables(replace(turn, request=given), strategy, place, outside), self.own_ports)
            scope.enter("start")
            scope.wait((), at_most=0.0)     # nothing is started for a client that has gone while others were
            child = self.spawner.spawn(launch.argv, launch.env, launch.cwd, launch.on_tty, place)
        except OSError as e:
            shutil.rmtree(place, ignore_errors=True)
            raise Crashed(f"{turn.provider.name} could not be started", e.strerror or str(e), Crashed.advice) from None
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
        with child:
            answer.spawned = answer.since()
            child.write(launch.stdin)
            events = whole_characters(DRIVERS[strategy.driver](turn, strategy).events(child, scope))
            if answer.params.get("stop") == "emulated":
                events = stop_at(events, params["stop"])
            if answer.params.get("max_tokens") == "emulated":
                events = limit_tokens(events, params["max_tokens"])
            for event in answer.counted(events):
                if not isinstance(event, (Waiting, Done)):
                    scope.enter("idle")
                yield event

    # --- what a provider needs to know before its first turn ---

    @staticmethod
    def _identity(binary: str) -> str:
        """Changes when the CLI is updated: its real path, time and size."""
        try:
            at = os.stat(binary)
        except OSError:
            return binary
        return f"{os.path.realpath(binary)}:{at.st_mtime_ns}:{at.st_size}"

    def _outside(self, provider: Provider) -> Dict[str, Any]:
        """What the provider's `found` rules find in the person's own settings: names and definitions of models, never a secret."""
        out: Dict[str, Any] = {}
        for name, row in provider.row.get("found", {}).items():
            path = os.path.expanduser(fill(row["file"], lambda n, arg: os.environ.get(arg) or MISSING))
            try:
                with open(path, encoding="utf-8", errors="replace") as f:
                    text = f.read()
                found = [dig(json.loads(text), row["json"].split("."))] if "json" in row else re.findall(row.get("match", ""), text)
            except (OSError, ValueError):
                continue
            if found and found[0] is not None:
                out["found:" + name] = found if row.get("all") else found[0]
        return out

    def prepared(self, provider: Provider, binary: str) -> Dict[str, str]:
        """{"prepared:NAME": path} of the files that are made once from what the CLI itself prints (codex: its model catalog)."""
        rows = provider.row.get("prepare", {})
        if not rows:
            return {}
        key = (provider.name, self._identity(binary))
        with self._lock:
            waiting = self._prepared.setdefault(key, threading.Lock())
        if isinstance(waiting, dict):
            return waiting
        with waiting:
            if not isinstance(self._prepared[key], dict):
                made = {f"prepared:{name}": self._prepare(provider, binary, name, row) for name, row in rows.items()}
                self._prepared[key] = {name: path for name, path in made.items() if path}
            return self._prepared[key]

    def _prepare(self, provider: Provider, binary: str, name: str, row: Mapping[str, Any]) -> Optional[str]:
        status, out, errors = self.probe(provider, binary, row["argv"], 30)
        try:
            data = json.loads(out) if status == 0 else None
        except ValueError:
            data = None
        items = data.get(row["each"]) if isinstance(data, dict) and "each" in row else None
        if items is None:
            self._log(level="warning", event="prepare-failed", provider=provider.name, file=name, why=(errors or out)[:200].strip())
            return None
        for item in items:
            item.update(row.get("set", {}))
            for gone in row.get("drop", []):
                item.pop(gone, None)
        try:
            path = os.path.join(tempfile.mkdtemp(prefix="prepared-", dir=self.spawner.root), name)
            with open(path, "w", encoding="utf-8") as f:
                json.dump(data, f)
        except OSError as e:
            self._log(level="warning", event="prepare-failed", provider=provider.name, file=name, why=e.strerror)
            return None
        return path

    def probe(self, provider: Provider, binary: str, args: Sequence[str], seconds: float) -> Tuple[Optional[int], str, str]:
        """(exit status, stdout, stderr) of the CLI run with these arguments in a place of its own; status None after a time-out."""
        env_only = lambda name, arg: (os.environ.get(arg) or MISSING) if name == "env" else {"dir": place}.get(name, MISSING)  # noqa: E731
        place = ""
        try:
            place = make_place(self.spawner.root, provider, env_only)
            env = child_environment(provider, env_only, self.own_ports, os.environ)
            child = self.spawner.spawn([binary, *args], env, os.path.join(place, "work"), place=place)
        except OSError as e:
            shutil.rmtree(place, ignore_errors=True)
            return 127, "", e.strerror or str(e)
        out = b""
        with Scope({"start": seconds, "total": seconds}) as scope, child:
            child.write(b"")
            try:
                for data in child.output(scope):
                    out += data
            except TimedOut:
                return None, out.decode("utf-8", "replace"), child.errors()
            return child.wait(2.0), out.decode("utf-8", "replace"), child.errors()


# === Dialects ========================================================================================================
# One class for each HTTP API: JSON in, frames out, no I/O. A dialect knows nothing of providers.

MAX_CHOICES = 8             # n: every choice is a process
MAX_STOPS, MAX_STOP_LENGTH = 16, 1000
IMAGE_TYPES = ("image/png", "image/jpeg", "image/webp", "image/gif")
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
# Fields that would change the answer if a provider obeyed them, and so are reported when it does not; all other unknown
# fields (user, store, metadata, service_tier, cache keys ...) are taken without a word, as real clients expect.
REPORTED = ("presence_penalty", "frequency_penalty", "logit_bias", "logprobs", "top_logprobs", "tools", "tool_choice", "functions",
            "function_call", "modalities", "audio", "prediction", "verbosity", "web_search_options")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class ChatCompletions:
    """OpenAI chat completions: POST /v1/chat/completions (platform.openai.com/docs/api-reference/chat), read leniently.

    A body in the shape of the Responses API on this route (Cursor sends it) is understood too.
    """

    def parse(self, body: Any, key_id: str) -> Request:
        """The Request a body means. BadRequest names the field that is wrong; unknown fields are no error."""
        if not isinstance(body, dict):
            raise BadRequest("the body must be a JSON object", f"it is {_JSON_NAMES.get(type(body), 'null')}")
        if "messages" not in body and "input" in body:
            body = self._from_responses(body)
        given = {k: v for k, v in body.items() if v is not None}
        model = self._typed(given, "model", str)
        if not model:
            raise BadRequest("you must provide a model", "`model` is missing", "GET /v1/models lists the names", param="model", code="missing_required_parameter")
        if len(model) > 200 or not model.isprintable():
            raise BadRequest("`model` is not a name", "it is over 200 characters long or holds control characters", param="model")
        messages = given.get("messages")
        if not isinstance(messages, list) or not messages:
            raise BadRequest("`messages` must be a list with at least one message", f"found {_show(messages)}", param="messages",
                             code="missing_required_parameter" if messages is None else "invalid_type")
        parsed = tuple(m for i, raw in enumerate(messages) for m in self._message(raw, f"messages[{i}]"))
        if all(m.role == "system" for m in parsed):
            raise BadRequest("there is nothing to answer", "all messages are of role system or developer", "add a user message", param="messages")
        options = given.get("stream_options")
        return Request(model, parsed, self._params(given), bool(given.get("stream")),
                       isinstance(options, dict) and bool(options.get("include_usage")), key_id)

    @staticmethod
    def _typed(body: Mapping[str, Any], name: str, *types: type, low: Optional[float] = None, high: Optional[float] = None) -> Any:
        """body[name] if it has one of the types and lies between the limits, None if it is absent."""
        value = body.get(name)
        if value is None:
            return None
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise BadRequest(f"`{name}` must be {_JSON_NAMES[types[0]]}", f"found {_show(value)}", param=name, code="invalid_type")
        if low is not None and not low <= value <= (high if high is not None else value):
            raise BadRequest(f"`{name}` must be {f'between {low:g} and {high:g}' if high is not None else f'at least {low:g}'}", f"found {_show(value)}",
                             param=name, code="decimal_above_max_value" if value > low else "integer_below_min_value")
        return value

    def _params(self, body: Mapping[str, Any]) -> Dict[str, Any]:
        reasoning = body.get("reasoning")
        effort = body.get("reasoning_effort") or (reasoning.get("effort") if isinstance(reasoning, dict) else None)
        if effort is not None and effort not in EFFORTS:
            raise BadRequest(f"`reasoning_effort` must be one of {', '.join(EFFORTS)}", f"found {_show(effort)}", param="reasoning_effort")
        params = {
            "temperature": self._typed(body, "temperature", float, int, low=0, high=2), "top_p": self._typed(body, "top_p", float, int, low=0, high=1),
            "max_tokens": self._typed(body, "max_completion_tokens", int, low=1) or self._typed(body, "max_tokens", int, low=1),
            "n": self._typed(body, "n", int, low=1, high=MAX_CHOICES), "stop": self._stops(body.get("stop")), "effort": effort, "seed": body.get("seed"),
            "response_format": self._response_format(body.get("response_format"))}
        for name in REPORTED:
            if body.get(name) not in (None, [], {}, False, "auto" if name == "tool_choice" else None):
                params[name] = body[name]
        choice = body.get("tool_choice")
        if not body.get("tools") and (choice == "required" or isinstance(choice, dict)):
            raise BadRequest("`tool_choice` asks for a call but there are no `tools`", param="tool_choice")
        return {name: value for name, value in params.items() if value is not None}

    @staticmethod
    def _stops(stop: Any) -> Optional[List[str]]:
        stops = [stop] if isinstance(stop, str) else stop
        if stops is None or stops == []:
            return None
        if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_LENGTH for s in stops):
            raise BadRequest(f"`stop` must be a string or a list of up to {MAX_STOPS} strings of 1 to {MAX_STOP_LENGTH} characters", f"found {_show(stop)}", param="stop")
        return stops

    @staticmethod
    def _response_format(form: Any) -> Optional[Dict[str, Any]]:
        if form is None or form == {"type": "text"}:
            return None
        kind = form.get("type") if isinstance(form, dict) else None
        if kind not in ("json_object", "json_schema"):
            raise BadRequest("`response_format.type` must be text, json_object or json_schema", f"found {_show(form)}", param="response_format")
        if kind == "json_schema" and not isinstance(dig(form, ("json_schema", "schema")), dict):
            raise BadRequest("`response_format.json_schema.schema` must be an object", f"found {_show(form)}", param="response_format.json_schema.schema")
        return form

    def _message(self, raw: Any, path: str) -> List[Message]:
        if not isinstance(raw, dict) or not isinstance(raw.get("role"), str):
            raise BadRequest(f"`{path}` must be an object with a role", f"found {_show(raw)}", param=path, code="invalid_type")
        role = {"developer": "system", "function": "tool"}.get(raw["role"], raw["role"])
        if role not in ("system", "user", "assistant", "tool"):
            raise BadRequest(f"`{path}.role` must be system, developer, user, assistant, tool or function", f"found {_show(raw['role'])}", param=f"{path}.role")
        parts = self._parts(raw.get("content"), f"{path}.content")
        if role == "tool":
            parts = [ResultPart(str(raw.get("tool_call_id") or raw.get("name") or ""), str(raw.get("name") or ""), "".join(p.text for p in parts if isinstance(p, TextPart)))]
        if role == "assistant":
            calls = raw.get("tool_calls") or ([{"id": dig(raw, ("function_call", "name")), "function": raw["function_call"]}] if raw.get("function_call") else [])
            for i, call in enumerate(calls if isinstance(calls, list) else []):
                name, arguments = dig(call, ("function", "name")), dig(call, ("function", "arguments"))
                if not isinstance(name, str) or not isinstance(arguments, str) or not _is_json_object(arguments):
                    raise BadRequest(f"`{path}.tool_calls[{i}].function` must have a name and JSON arguments", f"found {_show(call)}", param=f"{path}.tool_calls[{i}]")
                parts.append(CallPart(str(call.get("id") or name), name, arguments))
        return [Message(role, tuple(parts), str(raw.get("name") or "") if role != "tool" else "")]

    def _parts(self, content: Any, path: str) -> List[Part]:
        if content is None or content == "":
            return []
        if isinstance(content, str):
            return [TextPart(_clean(content))]
        if not isinstance(content, list):
            raise BadRequest(f"`{path}` must be a string or a list of parts", f"found {_show(content)}", param=path, code="invalid_type")
        parts: List[Part] = []
        for i, part in enumerate(content):
            kind = part.get("type") if isinstance(part, dict) else "text" if isinstance(part, str) else None
            if kind in ("text", "input_text", "output_text", "refusal"):
                text = part if isinstance(part, str) else part.get("text", part.get("refusal"))
                if not isinstance(text, str):
                    raise BadRequest(f"`{path}[{i}].text` must be a string", f"found {_show(part)}", param=f"{path}[{i}].text", code="invalid_type")
                parts += [TextPart(_clean(text))] if text else []
            elif kind in ("image_url", "input_image"):
                url = part.get("image_url")
                parts.append(self._image(url.get("url") if isinstance(url, dict) else url, f"{path}[{i}].image_url"))
            else:
                raise BadRequest(f"`{path}[{i}].type` {_show(kind)} is not supported", "text and image_url parts are", param=f"{path}[{i}].type", code="unsupported_value")
        return parts

    @staticmethod
    def _image(url: Any, path: str) -> ImagePart:
        m = re.match(r"data:([a-z]+/[a-z+.-]+)(?:;[^,;]*)*;base64,", url) if isinstance(url, str) else None
        if m is None:
            raise BadRequest(f"`{path}` must be a data: URL in base64", f"found {_show(url)[:40]}; this proxy fetches nothing from the network for a request",
                             "send data:image/png;base64,...", param=path, code="invalid_image_url")
        mime, data = m.group(1).replace("image/jpg", "image/jpeg"), url[m.end():]
        if mime not in IMAGE_TYPES:
            raise BadRequest(f"`{path}` is of type {mime}", f"the types taken are {', '.join(IMAGE_TYPES)}", param=path, code="invalid_image_format")
        try:
            base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError):
            raise BadRequest(f"`{path}` is not valid base64", param=path, code="invalid_base64") from None
        return ImagePart(mime, data)

    @staticmethod
    def _from_responses(body: Mapping[str, Any]) -> Dict[str, Any]:
        """A Responses API body as a chat body: `input`, `instructions`, and the fields that have other names there."""
        items = body["input"]
        messages: List[Any] = [{"role": "system", "content": body["instructions"]}] if isinstance(body.get("instructions"), str) else []
        for item in [{"role": "user", "content": items}] if isinstance(items, str) else items if isinstance(items, list) else []:
            kind = item.get("type") if isinstance(item, dict) else None
            if kind == "function_call":
                messages.append({"role": "assistant", "tool_calls": [{"id": item.get("call_id"), "function": {"name": item.get("name"), "arguments": item.get("arguments")}}]})
            elif kind == "function_call_output":
                out = item.get("output")
                messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": out if isinstance(out, (str, list)) else json.dumps(out)})
            elif kind != "reasoning":
                messages.append(item)
        form = dig(body, ("text", "format"))
        if isinstance(form, dict) and form.get("type") == "json_schema":
            form = {"type": "json_schema", "json_schema": form}
        return {**body, "messages": messages, "max_completion_tokens": body.get("max_output_tokens"), "response_format": form}

    # --- answers ---

    @staticmethod
    def usage(answers: Sequence[Answer]) -> Dict[str, Any]:
        """OpenAI's usage object; the choices of one request share their prompt but are counted as the CLIs counted them."""
        prompt, completion = sum(a.usage.input or 0 for a in answers), sum(a.usage.output or 0 for a in answers)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
                "prompt_tokens_details": {"cached_tokens": sum(a.usage.cached or 0 for a in answers)},
                "completion_tokens_details": {"reasoning_tokens": sum(a.usage.reasoning or 0 for a in answers)}}

    def frames(self, request: Request, answers: Sequence[Answer], events: Iterator[Tuple[int, Event]]) -> Iterator[bytes]:
        """SSE frames of a streamed answer: a role chunk for each choice, one kind of delta in a chunk, one finish reason, usage last."""
        base = {"id": "chatcmpl-" + uuid.uuid4().hex, "object": "chat.completion.chunk", "created": int(time.time()), "model": request.model}
        if request.stream_usage:
            base["usage"] = None

        def chunk(index: int, delta: Mapping[str, str], finish: Optional[str] = None) -> bytes:
            return self._frame({**base, "choices": [{"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}]})
        for i in range(len(answers)):
            yield chunk(i, {"role": "assistant", "content": ""})
        for index, event in events:
            if isinstance(event, Text):
                yield chunk(index, {"content": event.text})
            elif isinstance(event, Thinking):
                yield chunk(index, {"reasoning_content": event.text})
            elif isinstance(event, Waiting):
                yield b": keep-alive\n\n"
            elif isinstance(event, Done):
                yield chunk(index, {}, event.reason)
        if request.stream_usage:
            yield self._frame({**base, "choices": [], "usage": self.usage(answers)})
        yield b"data: [DONE]\n\n"

    def whole(self, request: Request, answers: Sequence[Answer], events: Iterable[Tuple[int, Event]]) -> bytes:
        """The JSON of an answer that is not streamed."""
        texts, thoughts = [[] for _ in answers], [[] for _ in answers]      # type: Tuple[List[List[str]], List[List[str]]]
        for index, event in events:
            if isinstance(event, (Text, Thinking)):
                (texts if isinstance(event, Text) else thoughts)[index].append(event.text)
        choices = []
        for i, answer in enumerate(answers):
            message: Dict[str, Any] = {"role": "assistant", "content": "".join(texts[i]), "refusal": None}
            if thoughts[i]:
                message["reasoning_content"] = "".join(thoughts[i])
            choices.append({"index": i, "message": message, "logprobs": None, "finish_reason": answer.finish})
        return json.dumps({"id": "chatcmpl-" + uuid.uuid4().hex, "object": "chat.completion", "created": int(time.time()), "model": request.model,
                           "choices": choices, "usage": self.usage(answers)}).encode()

    @staticmethod
    def error(error: ProxyError) -> Dict[str, Any]:
        """OpenAI's error object (platform.openai.com/docs/guides/error-codes)."""
        return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}

    def error_frame(self, error: ProxyError) -> bytes:
        """An error after the first word. openai-python raises on it; no finish reason and no [DONE] follow."""
        return self._frame(self.error(error))

    @staticmethod
    def _frame(data: Mapping[str, Any]) -> bytes:
        return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


def _clean(text: str) -> str:
    """The text with lone surrogates, which no UTF-8 can carry, as U+FFFD: what every encoder on the way would make of them."""
    return text if text.isascii() else _LONE_SURROGATE.sub("\ufffd", text)


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text or "{}"), dict)
    except ValueError:
        return False


def merged_events(answers: Sequence[Answer]) -> Iterator[Tuple[int, Event]]:
    """(choice, event) of several answers as they come, each pulled by a thread of its own; the first failure ends all of them."""
    if len(answers) == 1:
        with _closing(answers[0].events) as events:
            for event in events:
                yield 0, event
        return
    arrived: queue.Queue = queue.Queue(maxsize=4 * len(answers))      # small: a slow client has to slow the CLIs down
    over = threading.Event()

    def put(item: Any) -> None:
        while not over.is_set():
            try:
                return arrived.put(item, timeout=0.2)
            except queue.Full:
                continue

    def pull(index: int) -> None:
        try:
            with _closing(answers[index].events) as events:
                for event in events:
                    put((index, event))
                    if over.is_set():
                        return
            put((index, None))
        except BaseException as e:          # carried to the thread that answers the client, and raised there
            put((index, e))
    threads = [threading.Thread(target=pull, args=(i,), name=f"choice-{i}", daemon=True) for i in range(len(answers))]
    for t in threads:
        t.start()
    try:
        left = len(answers)
        while left:
            index, item = arrived.get()
            if isinstance(item, BaseException):
                raise item
            left -= item is None
            if item is not None:
                yield index, item
    finally:
        over.set()
        for answer in answers:
            answer.scope.cancel()
        for t in threads:
            t.join()


class _closing:
    """contextlib.closing for a generator, which says what it is for: closing the events is what cancels a turn."""

    def __init__(self, events: Iterator[Event]):
        self._events = events

    def __enter__(self) -> Iterator[Event]:
        return self._events

    def __exit__(self, *exc: Any) -> None:
        close = getattr(self._events, "close", None)
        if close:
            close()


DIALECTS = {"/chat/completions": ChatCompletions()}


# === Server ==========================================================================================================
# Sockets, chunks, keys, limits, the request log. A thread for each connection; the thread pulls the events and writes the
# frames, so a client that reads slowly slows its CLI down and nothing piles up.

IDLE_SECONDS, HEAD_SECONDS, BODY_SECONDS, WRITE_SECONDS = 120.0, 20.0, 120.0, 120.0     # time-outs for slow and for absent clients
LINGER_SECONDS = 2.0        # for a client that is still sending what was refused
STOP_POLL = 0.2             # seconds between a listener's looks at whether it is to stop
COMMIT_AFTER = 30.0         # seconds without an event until a stream gets its 200 and keep-alives; clients give up after 60
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
PATHS = {"/chat/completions": ("POST",), "/models": ("GET",), "/health": ("GET",), "/": ("GET",)}


def log(**fields: Any) -> None:
    """One key=value line on stderr. No prompt text, no key."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S")
    plain = re.compile(r"[!#-<>-~]+").fullmatch      # printable, without space, quote and equals sign
    words = (f"{k}={v if not isinstance(v, str) or plain(v) else json.dumps(v)}" for k, v in fields.items() if v is not None)
    sys.stderr.write(f"time={stamp} {' '.join(words)}\n")
    sys.stderr.flush()


class TimedReader(io.RawIOBase):
    """A socket's input with an absolute deadline: a client that sends a byte a second cannot hold a thread for ever."""

    def __init__(self, connection: socket.socket):
        self._connection, self.deadline = connection, time.monotonic() + IDLE_SECONDS

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise socket.timeout("the request took too long")
        self._connection.settimeout(left)
        try:
            return self._connection.recv_into(buffer)
        finally:
            self._connection.settimeout(WRITE_SECONDS)


class Handler(BaseHTTPRequestHandler):
    """One connection: HTTP/1.1 with keep-alive. The only place with a broad `except`: a fault in one request must not end the rest."""

    protocol_version, default_request_version = "HTTP/1.1", "HTTP/1.0"      # with its own default, 0.9, an error would have no status line
    server_version = "cliproxy/" + VERSION
    disable_nagle_algorithm = True      # without it a frame waits up to 40 ms for the client's delayed ACK
    server: Listener

    def version_string(self) -> str:
        return self.server_version

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self._reader = TimedReader(self.connection)
        self.rfile = io.BufferedReader(self._reader, 1 << 16)   # type: ignore[assignment]

    def handle_one_request(self) -> None:
        self._reader.deadline = time.monotonic() + IDLE_SECONDS
        self._expects_continue = self._committed = False
        self._unread = False            # is there a body that nobody has read? It would be taken for the next request
        self._began, self._fields = time.monotonic(), {}        # type: Tuple[float, Dict[str, Any]]
        try:
            super().handle_one_request()
        except OSError:                 # reset, broken pipe: the client has gone
            self.close_connection = True

    def finish(self) -> None:
        """Closed with bytes unread, a connection is reset, and the client may lose our answer. So what it still sends is dropped, for a while."""
        if self._unread:
            try:
                self.connection.shutdown(socket.SHUT_WR)
                self._reader.deadline = time.monotonic() + LINGER_SECONDS
                while self.rfile.read1(1 << 16):    # type: ignore[attr-defined]
                    pass
            except OSError:
                pass
        super().finish()

    def parse_request(self) -> bool:
        self._reader.deadline = time.monotonic() + HEAD_SECONDS
        self._began = time.monotonic()
        parsed = super().parse_request()
        self._unread = parsed and ("Transfer-Encoding" in self.headers or self.headers.get("Content-Length", "0") != "0")
        return parsed

    def handle_expect_100(self) -> bool:
        self._expects_continue = True   # sent when the body is read, so that a refused request never sends its body
        return True

    def send_error(self, code: int, message: Optional[str] = None, explain: Optional[str] = None) -> None:
        """The errors that http.server finds by itself (bad request line, header limits), in JSON like all others."""
        error = BadRequest(message or "the request is not HTTP", code="bad_request_line", close=True)
        error.status = int(code)
        self._send_error(error)

    def log_message(self, *args: Any) -> None:
        pass                            # log_request() below says more

    def log_request(self, code: Any = "-", size: Any = "-") -> None:
        self._fields["status"] = int(code)

    def do_GET(self) -> None:
        self._guarded(self._get)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._guarded(self._post)

    def do_OPTIONS(self) -> None:
        self._guarded(self._options)

    def do_PUT(self) -> None:
        self._guarded(self._get)

    do_DELETE = do_PATCH = do_PUT

    # --- every request ---

    def _guarded(self, serve: Callable[[str], None]) -> None:
        state = self.server.state
        path = self._path()
        with state.counted():
            try:
                self._check_caller(path)
                serve(path)
            except ProxyError as e:
                self._send_error(e)
            except (ClientGone, ConnectionError, socket.timeout):
                self._fields["status"], self.close_connection = 499, True
            except Exception as e:
                log(level="error", event="internal-error", path=path, error=f"{type(e).__name__}: {e}")
                sys.excepthook(*sys.exc_info())     # type: ignore[arg-type]
                self._send_error(ProxyError("cliproxy made a mistake", f"{type(e).__name__}: {e}", "please report it with the traceback in its log", close=True))
            finally:
                self._log_line(path)

    def _path(self) -> str:
        path = urllib.parse.unquote(self.path.partition("?")[0]).rstrip("/")     # SDKs send model names as claude%2Fopus
        return (path[3:] if path == "/v1" or path.startswith("/v1/") else path) or "/"

    def _log_line(self, path: str) -> None:
        fields, self._fields = self._fields, {}
        log(method=self.command, path=self.path.partition("?")[0][:200], **fields, ms=round((time.monotonic() - self._began) * 1000))

    def _check_caller(self, path: str) -> None:
        """Host, Origin, hop and key. Together with the JSON content type they keep web pages away from the CLIs."""
        settings = self.server.state.settings
        if self.headers.get("x-cliproxy-hop"):
            raise Loop("this request was sent by a CLI that a cliproxy has started", "the CLI's base URL leads back to a cliproxy",
                       "give the CLI its vendor's address again", close=True)
        host = self.headers.get("Host", "")
        if self.server.is_loopback and not _host_allowed(_host_name(host), settings.allow_hosts):
            raise Forbidden(f"the Host header {_show(host)} is not allowed", "it protects against web pages that point a name of theirs at this machine",
                            "add --allow-host with that name if it is yours", close=True)
        origin = self.headers.get("Origin")
        if origin and not self._cors_origin() and _host_name(origin.partition("://")[2]) not in LOCAL_NAMES:
            raise Forbidden(f"requests from the web page {_show(origin)} are not allowed", do=f"add --cors-origin {origin} if it is yours", close=True)
        if settings.keys and not (self.command == "OPTIONS" or path == "/health"):
            self._fields["key"] = self._key_id()

    def _key_id(self) -> str:
        """A short name for the key that was given. Every key is compared, in constant time, whatever the outcome."""
        scheme, _, bearer = self.headers.get("Authorization", "").partition(" ")
        given = [bearer.strip() if scheme.lower() == "bearer" else "", *(self.headers.get(h, "") for h in ("x-api-key", "api-key", "x-goog-api-key"))]
        right = [key for key in self.server.state.settings.keys for g in given if hmac.compare_digest(key.encode(), g.encode("utf-8", "replace"))]
        if not right:
            said = any(given)
            raise Unauthorized("incorrect API key provided" if said else "you didn't provide an API key",
                               "this proxy was started with --api-key", "send it as `Authorization: Bearer KEY`", close=True)
        return hashlib.sha256(right[0].encode()).hexdigest()[:8]

    def _cors_origin(self) -> Optional[str]:
        origin, allowed = self.headers.get("Origin"), self.server.state.settings.cors_origins
        return origin if origin and ("*" in allowed or origin in allowed) else None

    def _options(self, path: str) -> None:
        methods = _methods(path)
        if not methods:
            raise NotFound(f"there is no {self.path.partition('?')[0]} here")
        headers = {"Allow": ", ".join([*methods, "HEAD", "OPTIONS"])}
        if self._cors_origin() and self.headers.get("Access-Control-Request-Method"):
            headers.update({"Access-Control-Allow-Methods": headers["Allow"], "Access-Control-Max-Age": "600",
                            "Access-Control-Allow-Headers": self.headers.get("Access-Control-Request-Headers", "authorization, content-type")})
        self._send(204, None, b"", headers)

    # --- GET ---

    def _get(self, path: str) -> None:
        if self.command not in ("GET", "HEAD"):
            self._refuse_method(path)
        router = self.server.state.router
        if path == "/models":
            return self._send_json(200, {"object": "list", "data": [self._model(*m) for m in router.models()]})
        if path.startswith("/models/"):
            name = path[len("/models/"):]
            provider, _ = router.resolve(name)
            return self._send_json(200, self._model(name, provider))
        if path in ("/health", "/"):
            return self._send_json(200, {"status": "stopping" if self.server.state.stopping.is_set() else "ok", "version": VERSION,
                                         "providers": [p.name for p in router.installed()]})
        self._refuse_method(path)

    def _refuse_method(self, path: str) -> None:
        if _methods(path):
            raise MethodNotAllowed(f"{self.command} is not allowed here", f"{path} takes {' and '.join(_methods(path))}", close=True)
        raise NotFound(f"there is no {self.path.partition('?')[0]} here", "this proxy serves POST /v1/chat/completions and GET /v1/models",
                       "set the client to the chat completions API, and its base URL to http://HOST:PORT/v1", close=self.command not in ("GET", "HEAD"))

    def _model(self, name: str, provider: Provider) -> Dict[str, Any]:
        return {"id": name, "object": "model", "created": self.server.state.started, "owned_by": provider.name}

    # --- POST ---

    def _post(self, path: str) -> None:
        dialect = DIALECTS.get(path)
        if dialect is None:
            self._refuse_method(path)
        if self.server.state.stopping.is_set():
            raise Stopping("cliproxy is stopping", "it was told to", "try again in a moment", retry_after=5, close=True)
        assert dialect is not None
        try:
            body = json.loads(self._body())
        except (ValueError, RecursionError) as e:       # no UTF-8, no JSON, a number of 5,000 digits
            raise BadRequest("we could not parse the JSON body of your request", str(e), code="invalid_json") from None
        request = dialect.parse(body, self._fields.get("key", ""))
        self._fields.update(model=request.model, stream=int(request.stream))
        scopes: List[Scope] = []
        try:
            answers = [self._start(request, scopes) for _ in range(request.params.get("n", 1))]
            self._answer(dialect, request, answers)
        finally:
            for scope in scopes:
                scope.__exit__()

    def _start(self, request: Request, scopes: List[Scope]) -> Answer:
        state = self.server.state
        provider, _ = state.router.resolve(request.model)
        scopes.append(Scope(provider.timeouts, self.connection, state.settings.keepalive))
        return state.router.answer(request, scopes[-1])

    def _body(self) -> bytes:
        """The request's body, of declared length or chunked, within the limits of size and time."""
        kind = self.headers.get("Content-Type", "")
        if kind.partition(";")[0].strip().lower() != "application/json":
            raise UnsupportedMedia(f"the content type {_show(kind)} is not taken", "the body must be JSON", "send `Content-Type: application/json`", close=True)
        most = self.server.state.settings.max_body
        chunked = self.headers.get("Transfer-Encoding", "").lower() == "chunked"
        length = self.headers.get("Content-Length", "")
        if not chunked and not (length.isascii() and length.isdigit()):
            raise BadRequest("the request has no length", "neither Content-Length nor Transfer-Encoding: chunked is given", close=True)
        if not chunked and int(length) > most:
            raise TooLarge(f"the body of {int(length)} bytes is too large", f"the limit is {most} bytes", "send less, or start cliproxy with a larger --max-body-mb", close=True)
        if self._expects_continue:
            self.send_response_only(100)
            self.end_headers()
        self._reader.deadline = time.monotonic() + BODY_SECONDS
        try:
            data = self._chunked_body(most) if chunked else self.rfile.read(int(length))
        except socket.timeout:
            raise RequestTimeout("the request took too long to arrive", f"the limit is {BODY_SECONDS:g} s", close=True) from None
        if not chunked and len(data) < int(length):
            raise ClientGone
        self._unread = False
        return data

    def _chunked_body(self, most: int) -> bytes:
        """RFC 9112, section 7.1. Extensions and trailers are read and left aside."""
        pieces, total = [], 0
        while True:
            line = self.rfile.readline(1024)
            size = line.partition(b";")[0].strip()
            if not re.fullmatch(rb"[0-9a-fA-F]{1,8}", size) or not line.endswith(b"\n"):
                raise BadRequest("the body's chunked encoding is broken", f"a chunk begins with {_show(line.decode('latin-1'))}", close=True)
            n = int(size, 16)
            total += n
            if total > most:
                raise TooLarge("the body is too large", f"the limit is {most} bytes", "send less, or start cliproxy with a larger --max-body-mb", close=True)
            if n == 0:
                while self.rfile.readline(1024).strip():
                    pass
                return b"".join(pieces)
            piece = self.rfile.read(n)
            if len(piece) < n or self.rfile.readline(8).strip():
                raise BadRequest("the body's chunked encoding is broken", "a chunk is not as long as it says", close=True)
            pieces.append(piece)

    def _answer(self, dialect: ChatCompletions, request: Request, answers: List[Answer]) -> None:
        """Pull the first event, so that an early failure still has its own status; then the status line; then the rest."""
        events = merged_events(answers)
        try:
            if not request.stream:
                body = dialect.whole(request, answers, events)
                return self._send(200, "application/json", body, self._route_headers(answers))
            early = self._first(events)
            frames = dialect.frames(request, answers, _chain(early, events))
            self._start_stream(answers)
            try:
                for frame in frames:
                    self._send_frame(frame)
            except ProxyError as e:         # too late for a status: the dialect's own error, and no finish reason
                self._fields["error"] = e.code
                log(level="warning", event="failed-mid-stream", error=e.what)      # not why: that may quote the answer
                self._send_frame(dialect.error_frame(e))
            self._end_stream()
        finally:
            events.close()                  # type: ignore[attr-defined]
            self._note(answers)

    @staticmethod
    def _first(events: Iterator[Tuple[int, Event]]) -> List[Tuple[int, Event]]:
        """The events up to the first that counts: it commits the answer. A long silence commits it too."""
        early, until = [], time.monotonic() + COMMIT_AFTER
        for item in events:
            if not isinstance(item[1], Waiting):
                return [*early, item]
            if time.monotonic() >= until:
                return [item]
        return early

    def _note(self, answers: Sequence[Answer]) -> None:
        first = answers[0]
        ms = lambda seconds: round(seconds * 1000) if seconds else None     # noqa: E731
        self._fields.update(provider=first.turn.provider.name + ("/" + first.turn.model if first.turn.model else ""),
                            strategy=first.strategy.driver if first.strategy else None, n=len(answers) if len(answers) > 1 else None,
                            tokens_in=sum(a.usage.input or 0 for a in answers), tokens_out=sum(a.usage.output or 0 for a in answers),
                            finish=first.finish or None, queue_ms=ms(first.queued), spawn_ms=ms(first.spawned - first.queued), first_ms=ms(first.first))

    def _route_headers(self, answers: Sequence[Answer]) -> Dict[str, str]:
        first = answers[0]
        params = [f"{name}={how}" for name, how in first.params.items()] + (["usage=estimated"] if first.estimated else [])
        headers = {"x-cliproxy-provider": first.turn.provider.name, "x-cliproxy-model": first.turn.model or "default",
                   "x-cliproxy-strategy": first.strategy.driver if first.strategy else "none"}
        if params:
            headers["x-cliproxy-params"] = ", ".join(params)
        return {k: re.sub(r"[^ -~]", "?", v) for k, v in headers.items()}

    # --- writing ---

    def _send_json(self, status: int, value: Any, headers: Optional[Mapping[str, str]] = None) -> None:
        self._send(status, "application/json", json.dumps(value).encode(), headers or {})

    def _send(self, status: int, kind: Optional[str], body: bytes, headers: Mapping[str, str]) -> None:
        self._head(status, {**({"Content-Type": kind} if kind else {}), **({"Content-Length": str(len(body))} if status != 204 else {}), **headers})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, headers: Mapping[str, str]) -> None:
        self._committed = True
        self.close_connection = self.close_connection or self._unread
        self.send_response(status)
        origin = self._cors_origin() if hasattr(self, "headers") else None
        always = {"x-request-id": "req_" + uuid.uuid4().hex}
        if origin:
            always.update({"Access-Control-Allow-Origin": origin, "Vary": "Origin", "Access-Control-Expose-Headers": "*"})
        for name, value in {**always, **headers}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def _send_error(self, error: ProxyError) -> None:
        """An error as the dialect's JSON, with the headers that the OpenAI clients obey. After the status line: only a log line."""
        self._fields["error"] = error.code
        if self._committed:
            self.close_connection = True
            return
        self.close_connection = self.close_connection or error.close
        headers = {}
        if error.retry_after is not None:
            headers["Retry-After"] = str(max(1, -int(-error.retry_after // 1)))
        if error.should_retry is not None:
            headers["x-should-retry"] = "true" if error.should_retry else "false"
        if isinstance(error, Unauthorized):
            headers["WWW-Authenticate"] = "Bearer"
        if isinstance(error, MethodNotAllowed):
            headers["Allow"] = ", ".join(_methods(self._path()))
        self._send_json(error.status, ChatCompletions.error(error), headers)

    def _start_stream(self, answers: Sequence[Answer]) -> None:
        self._chunked = self.request_version != "HTTP/1.0"
        self.close_connection = self.close_connection or not self._chunked
        self._head(200, {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no",
                         **({"Transfer-Encoding": "chunked"} if self._chunked else {}), **self._route_headers(answers)})

    def _send_frame(self, frame: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(frame), frame) if self._chunked else frame)

    def _end_stream(self) -> None:
        if self._chunked:
            self.wfile.write(b"0\r\n\r\n")


def _chain(early: Iterable[Tuple[int, Event]], rest: Iterator[Tuple[int, Event]]) -> Iterator[Tuple[int, Event]]:
    yield from early
    yield from rest


def _methods(path: str) -> Tuple[str, ...]:
    """What a path takes; nothing if there is no such path. A model's name may have slashes of its own."""
    return PATHS.get("/models" if path.startswith("/models/") else path, ())


def _host_name(host: str) -> str:
    """The name in "name:port" or "[::1]:port", in lower case, without a final dot."""
    m = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([^:/\[\]]*))(?::\d+)?", host.strip())
    return ((m.group(1) or m.group(2)).lower().rstrip(".") if m else "")


def _host_allowed(name: str, allowed: Sequence[str]) -> bool:
    return name in LOCAL_NAMES or name.startswith("127.") and re.fullmatch(r"127(\.\d{1,3}){3}", name) is not None or name in (a.lower() for a in allowed)


class State:
    """What all connections share: settings, router, how many requests are running, whether we are stopping."""

    def __init__(self, settings: Settings, router: Router):
        self.settings, self.router, self.started = settings, router, int(time.time())
        self.stopping, self.idle = threading.Event(), threading.Condition()
        self.running = 0
        self.places = threading.BoundedSemaphore(settings.max_connections)

    def counted(self) -> State:
        return self

    def __enter__(self) -> None:
        with self.idle:
            self.running += 1

    def __exit__(self, *exc: Any) -> None:
        with self.idle:
            self.running -= 1
            self.idle.notify_all()

    def drained(self, seconds: float) -> bool:
        """Wait until no request is running, at most so long."""
        with self.idle:
            return self.idle.wait_for(lambda: self.running == 0, seconds)


class Listener(socketserver.ThreadingMixIn, HTTPServer):
    """A listening address. One thread for each connection, up to Settings.max_connections; beyond it 503 at once."""

    daemon_threads, block_on_close, request_queue_size, allow_reuse_address = True, False, 256, True

    def __init__(self, family: int, address: Tuple[str, int], state: State):
        self.address_family, self.state = family, state
        self.is_loopback = address[0] == "::1" or address[0].startswith("127.")
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        socketserver.TCPServer.server_bind(self)        # HTTPServer's own looks up our name in the DNS, for seconds at times
        self.server_name, self.server_port = self.server_address[0], self.server_address[1]     # type: ignore[assignment]

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self.state.places.acquire(blocking=False):
            body = json.dumps(ChatCompletions.error(Busy("too many connections", f"the limit is {self.state.settings.max_connections}", "try again later"))).encode()
            try:
                request.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\nConnection: close\r\n"
                                b"Content-Length: %d\r\n\r\n" % len(body) + body)
            except OSError:
                pass                    # it has gone already
            return self.shutdown_request(request)
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.state.places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


def open_listeners(settings: Settings, state: State) -> List[Listener]:
    """Listeners on --host, or on 127.0.0.1 and ::1 (many clients try ::1 first for "localhost"). ConfigError in words if that fails."""
    targets = [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
    if settings.host:
        try:
            found = socket.getaddrinfo(settings.host, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as e:        # no name could be so
            raise ConfigError(f"the host {settings.host} is unknown: {getattr(e, 'strerror', None) or e}") from None
        targets = list(dict.fromkeys((info[0], info[4][0]) for info in found))      # type: ignore[misc]
    listeners: List[Listener] = []
    for family, host in targets:
        try:
            listeners.append(Listener(family, (host, listeners[0].server_port if listeners else settings.port), state))
        except OSError as e:
            if listeners and e.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                continue                # no IPv6 on this machine
            for listener in listeners:
                listener.server_close()
            if e.errno == errno.EADDRINUSE:
                raise ConfigError(f"port {settings.port} is taken by another program: stop it, or choose another port with --port {settings.port + 1}") from None
            raise ConfigError(f"cannot listen on {host} port {settings.port}: {e.strerror}") from None
    return listeners


# === Command line ====================================================================================================


def probe_version(router: Router, provider: Provider, binary: str) -> Tuple[str, bool]:
    """(version, inside the tested range); ("", True) if the CLI has no version rule, ("unknown", False) if it does not say."""
    row = provider.row.get("version")
    if not row:
        return "", True
    _, out, errors = router.probe(provider, binary, row["argv"], 60)
    m = re.search(row["match"], out + errors)
    if not m:
        return "unknown", False
    number = lambda text: [int(n) for n in re.findall(r"\d+", text)]      # noqa: E731
    low, high = row.get("tested", [m.group(1), m.group(1)])
    return m.group(1), number(low) <= number(m.group(1)) <= number(high)


def probe_login(router: Router, provider: Provider, binary: str) -> Optional[bool]:
    """Is somebody logged in? By the rules of `logged_in`, the first that says yes; None if there are none. Nothing secret is read."""
    rules = provider.row.get("logged_in")
    if not rules:
        return None
    for rule in rules:
        if any(os.environ.get(name) for name in rule.get("env", [])):
            return True
        if "file" in rule:
            path = os.path.expanduser(fill(rule["file"], lambda n, arg: os.environ.get(arg) or MISSING))
            try:
                with open(path, encoding="utf-8", errors="replace") as f:
                    if "match" not in rule or re.search(rule["match"], f.read()):
                        return True
            except OSError:
                continue
        if "argv" in rule and router.probe(provider, binary, rule["argv"], 60)[0] == rule.get("exit", 0):
            return True
    return False


def look_at(router: Router, provider: Provider, say: Callable[[str], None]) -> bool:
    """Say one line about a provider: found, version, tested, logged in, and what to type if something is missing. True if all is well."""
    binary = provider.binary(os.environ)
    if binary is None:
        say(f"  {provider.name:<8} not installed      {provider.row.get('install') or 'see its website'}")
        return False
    version, tested = probe_version(router, provider, binary)
    login = router.logged_in[provider.name] = probe_login(router, provider, binary)
    state = f"{version or 'built in':<18} {'' if tested else 'untested version; '}"
    say(f"  {provider.name:<8} {state}{'ready' if login is not False else 'not logged in: ' + provider.login}")
    return login is not False


def live_check(router: Router, provider: Provider) -> Tuple[bool, str]:
    """One real round trip: (good, what came of it)."""
    request = Request(provider.name, (Message("user", (TextPart("Reply with the one word: ready"),)),), {})
    began = time.monotonic()
    try:
        with Scope(provider.timeouts) as scope:
            answer = router.answer(request, scope)
            text = "".join(e.text for e in answer.events if isinstance(e, Text))
    except ProxyError as e:
        return False, e.message
    shown = text.strip().replace("\n", " ")[:40]
    return True, f"answered {shown!r} by {answer.strategy.driver if answer.strategy else '?'} in {time.monotonic() - began:.1f} s"


def command_doctor(args: argparse.Namespace, providers: Dict[str, Provider]) -> int:
    """Exit status 0 if at least one CLI is ready (with --live: answers) and none that is installed is broken, else 1."""
    spawner = Spawner()
    try:
        router, good = Router(providers, spawner, log=log), True
        names = args.provider or list(providers)
        unknown = [n for n in names if n not in providers]
        if unknown:
            raise ConfigError(f"there is no provider {unknown[0]}; there are {', '.join(providers)}")
        ready = 0
        for provider in (providers[n] for n in names):
            fine = look_at(router, provider, print)
            installed = provider.binary(os.environ) is not None
            if args.live and installed:
                fine, came = live_check(router, provider)
                print(f"  {'':<8} {'live: ' + came}")
            good = good and (fine or not installed)
            ready += fine and provider.name != "echo"
        return 0 if good and (ready or "echo" in (args.provider or [])) else 1
    finally:
        spawner.close()


def command_providers(args: argparse.Namespace, config: Mapping[str, Any]) -> int:
    """Print the merged providers as JSON."""
    sys.stdout.write(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    return 0


def command_echo(args: argparse.Namespace) -> int:
    """The CLI behind the model `echo`: reads one JSON line with messages, says the last user message back, word by word."""
    messages = json.loads(sys.stdin.buffer.readline() or b'{"messages": []}')["messages"]
    said = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
    words = re.findall(r"\S+\s*|\s+", said if isinstance(said, str) else "")
    for word in words:
        sys.stdout.write(json.dumps({"type": "delta", "text": word}) + "\n" if args.json else word)
        sys.stdout.flush()
    asked = sum(len(str(m.get("content", "")).split()) for m in messages)
    sys.stdout.write(json.dumps({"type": "done", "usage": {"input": asked, "output": len(words)}}) + "\n" if args.json else "\n")
    return 0


def settings_from(args: argparse.Namespace) -> Settings:
    """Settings of the flags and the environment. ConfigError for a bind that would let strangers in."""
    keys = tuple(k for k in [*args.api_key, *os.environ.get("CLIPROXY_API_KEY", "").replace(",", " ").split()] if k)
    local = args.host in ("", "localhost", "::1") or args.host.startswith("127.")
    if not local and not keys:
        raise ConfigError(f"--host {args.host} lets other machines in, so it needs a key: add --api-key KEY, or set CLIPROXY_API_KEY")
    if not 0 <= args.port <= 65535:
        raise ConfigError(f"--port must be between 0 and 65535, found {args.port}")
    for name in ("keepalive", "max_body_mb", "max_connections"):
        if getattr(args, name) <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be more than 0, found {getattr(args, name):g}")
    if args.drain < 0:
        raise ConfigError(f"--drain must not be negative, found {args.drain:g}")
    return Settings(host=args.host, port=args.port, keys=keys, allow_hosts=tuple(args.allow_host), cors_origins=tuple(args.cors_origin), strict=args.strict,
                    keepalive=args.keepalive, max_body=args.max_body_mb << 20, max_connections=args.max_connections, drain=args.drain)


def command_serve(args: argparse.Namespace, providers: Dict[str, Provider]) -> int:
    """Serve until SIGTERM or Ctrl-C, then let running requests finish; a second signal ends them."""
    settings = settings_from(args)
    spawner = Spawner()                     # before any thread
    ports: List[int] = []
    try:
        state = State(settings, Router(providers, spawner, ports, log, settings.strict))
        listeners = open_listeners(settings, state)
        ports += [listener.server_port for listener in listeners]
        signals: queue.SimpleQueue = queue.SimpleQueue()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda n, _: signals.put(n))
        threads = [threading.Thread(target=listener.serve_forever, args=(STOP_POLL,), name=f"listen-{listener.server_address[0]}", daemon=True) for listener in listeners]
        for t in threads:
            t.start()
        base = f"http://{'localhost' if listeners[0].is_loopback else settings.host}:{ports[0]}/v1"
        print(f"cliproxy {VERSION} on {base}   (OPENAI_BASE_URL={base})", file=sys.stderr, flush=True)
        threading.Thread(target=_greet, args=(state,), name="look", daemon=True).start()
        _wait_for_signal(signals, spawner)
        state.stopping.set()
        closers = [threading.Thread(target=listener.shutdown) for listener in listeners]     # all at once, because each waits for its poll
        for t in closers:
            t.start()
        for t, listener in zip(closers, listeners):
            t.join()
            listener.server_close()
        if state.running:
            log(event="stopping", running=state.running, drain_seconds=settings.drain)
        end = time.monotonic() + settings.drain
        while not state.drained(0.1) and time.monotonic() < end and signals.empty():
            pass
        return 1 if spawner.gone.is_set() else 0
    finally:
        spawner.close()


def _greet(state: State) -> None:
    """Say what was found, one provider at a time, while the server is answering already."""
    def say(line: str) -> None:
        if not state.stopping.is_set():     # what was found then is only that no process can be started any more
            print(line, file=sys.stderr, flush=True)
    for provider in state.router.providers.values():
        look_at(state.router, provider, say)
        binary = provider.binary(os.environ)
        if binary:
            state.router.prepared(provider, binary)


def _wait_for_signal(signals: queue.SimpleQueue, spawner: Spawner) -> None:
    """Until a signal comes, or the spawner is gone, without which nothing can be served."""
    while not spawner.gone.is_set():
        try:
            signals.get(timeout=1.0)
            return
        except queue.Empty:
            continue
    log(level="error", event="spawner-gone", hint="the process that starts the CLIs was killed; start cliproxy again")


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cliproxy.py", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="The AI coding CLIs you are logged in to (claude, gemini, codex, qwen), behind one local OpenAI-compatible endpoint.",
        epilog="paste one of these:\n  python3 cliproxy.py --port 8080\n  python3 cliproxy.py doctor --live\n"
               "  curl localhost:8080/v1/chat/completions -H 'content-type: application/json' \\\n"
               "       -d '{\"model\":\"echo\",\"messages\":[{\"role\":\"user\",\"content\":\"Hello\"}]}'")
    parser.add_argument("--version", action="version", version="cliproxy " + VERSION)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--providers", metavar="FILE", action="append", default=[], help="merge this file over the built-in providers (repeatable)")
    commands = parser.add_subparsers(dest="command", metavar="serve|doctor|providers")
    serve = commands.add_parser("serve", parents=[common], help="serve (what happens when no command is given)")
    serve.add_argument("--host", default="", metavar="ADDRESS", help="address to listen on (default: 127.0.0.1 and ::1)")
    serve.add_argument("--port", type=int, default=8080, help="0 takes a free one and prints it (default: %(default)s)")
    serve.add_argument("--api-key", metavar="KEY", action="append", default=[], help="demand this key (repeatable; or CLIPROXY_API_KEY, comma-separated)")
    serve.add_argument("--allow-host", metavar="NAME", action="append", default=[], help="answer to this Host header too, such as a tunnel's name (repeatable)")
    serve.add_argument("--cors-origin", metavar="ORIGIN", action="append", default=[], help="let web pages of this origin in; * is all (repeatable)")
    serve.add_argument("--strict", action="store_true", help="answer 400 to a parameter that the provider cannot honour, instead of ignoring it")
    serve.add_argument("--keepalive", metavar="SECONDS", type=float, default=10.0, help="silence after which a stream gets a comment line (default: %(default)s)")
    serve.add_argument("--max-body-mb", metavar="MB", type=int, default=32, help="largest request body (default: %(default)s)")
    serve.add_argument("--max-connections", metavar="N", type=int, default=512, help="connections at the same time (default: %(default)s)")
    serve.add_argument("--drain", metavar="SECONDS", type=float, default=30.0, help="time for running requests after SIGTERM (default: %(default)s)")
    doctor = commands.add_parser("doctor", parents=[common], help="what is installed, tested, logged in; exit status 0 if all is well")
    doctor.add_argument("provider", nargs="*", help="only these")
    doctor.add_argument("--live", action="store_true", help="one real request to each (uses a little of your quota)")
    listing = commands.add_parser("providers", parents=[common], help="print the merged providers as JSON")
    listing.add_argument("--builtin", action="store_true", help="print providers.json as this script carries it")
    parser.epilog = re.sub(r"(?s).*?\n\n(?:options|optional arguments):\n.*?(?=  --(?!help))", "options of serve:\n", serve.format_help(), count=1) + "\n" + str(parser.epilog)
    echo = commands.add_parser("_echo")
    echo.add_argument("--json", action="store_true")
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    commands = ("serve", "doctor", "providers", "_echo")
    if not any(w in commands for w in words[:1]) and not any(w in ("-h", "--help", "--version") for w in words):
        words.insert(0, "serve")
    args = argument_parser().parse_args(words)
    if args.command == "_echo":
        return command_echo(args)
    if args.command == "providers" and args.builtin:
        sys.stdout.write(BUILTIN_PROVIDERS)     # before any file is read: it may be on its way into providers.json
        return 0
    try:
        config = merged_providers(args.providers)
        providers = load_providers(config)
        if args.command == "providers":
            return command_providers(args, config)
        return (command_doctor if args.command == "doctor" else command_serve)(args, providers)
    except ConfigError as e:
        print(f"cliproxy: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:                 # `cliproxy.py providers | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
