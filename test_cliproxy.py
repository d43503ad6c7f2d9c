#!/usr/bin/env python3
"""Tests of cliproxy.py, and the CLIs they run against.

    python3 test_cliproxy.py                    everything (gets pytest into a private venv if it is missing)
    python3 test_cliproxy.py -k cancel -x       any options of pytest
    python3 test_cliproxy.py -m real            only the real CLIs, as far as they are on the PATH, against a scripted model server

Run as `test_cliproxy.py _play NAME DIR ...` this file *is* a CLI: it plays claude, gemini, codex or qwen with the event shapes
that the real ones were seen to print, by a script in DIR. So the suite needs no network, no node and no account.
"""
import json
import os
import sys

# === The fake CLI ====================================================================================================
# Above every other import, because it is started for each request. A script is a list of steps; what `say`, `think`, `end`
# and `fail` print is what the CLI of that name prints (claude 2.1.197, gemini 0.61.0, codex 0.169.0, qwen 0.15.10).

VERSIONS = {"claude": "2.1.197 (Claude Code)", "gemini": "0.61.0", "codex": "codex-cli 0.169.0", "qwen": "0.15.10"}
HELLO = ["Hello ", "there, ", "how ", "can ", "I ", "help?"]
DEFAULT_SCRIPT = {"steps": [["begin"], ["say", HELLO], ["end"]]}
ZERO = {"input_tokens": 0, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": 0}
BUBBLEWRAP = "warning: Codex could not find bubblewrap on PATH. Codex will use the bundled bubblewrap in the meantime."


def claude_event(event):
    return {"type": "stream_event", "event": event, "session_id": "a94b", "parent_tool_use_id": None, "uuid": "f1"}


def claude_result(error, text, status=None, reason="end_turn"):
    return {"type": "result", "subtype": "success", "is_error": error, "api_error_status": status, "duration_ms": 124, "num_turns": 1,
            "result": text, "stop_reason": reason, "session_id": "a94b", "total_cost_usd": 0, "usage": ZERO}


def claude_lines(step, *args):
    """What claude -p --output-format stream-json --verbose --include-partial-messages prints for a step."""
    if step == "begin":
        return [{"type": "system", "subtype": "init", "cwd": "/w", "session_id": "a94b", "tools": list(args), "mcp_servers": [], "model": "claude-sonnet-5",
                 "permissionMode": "default", "slash_commands": [], "apiKeySource": "none", "claude_code_version": "2.1.197"},
                {"type": "system", "subtype": "status", "status": "requesting", "uuid": "c5", "session_id": "a94b"},
                claude_event({"type": "message_start", "message": {"id": "msg_1", "type": "message", "role": "assistant", "model": "claude-sonnet-5",
                              "content": [], "stop_reason": None, "usage": {**ZERO, "input_tokens": 62, "cache_read_input_tokens": 10, "output_tokens": 1}}}),
                claude_event({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}})]
    if step in ("say", "think"):
        kind, key = ("text_delta", "text") if step == "say" else ("thinking_delta", "thinking")
        return [claude_event({"type": "content_block_delta", "index": 0, "delta": {"type": kind, key: piece}}) for piece in args[0]]
    if step == "end":
        return [{"type": "assistant", "message": {"id": "msg_1", "type": "message", "role": "assistant", "content": [], "stop_reason": None, "usage": ZERO}},
                claude_event({"type": "content_block_stop", "index": 0}),
                claude_event({"type": "message_delta", "delta": {"stop_reason": args[0] if args else "end_turn", "stop_sequence": None}, "usage": {"output_tokens": 6}}),
                claude_event({"type": "message_stop"}), claude_result(False, "")]
    reset = [{"type": "rate_limit_event", "rate_limit_info": {"status": "rejected", "resetsAt": args[2], "rateLimitType": "five_hour"}}] if len(args) > 2 else []
    return [*reset, claude_result(True, args[0], args[1], "stop_sequence")]


def gemini_lines(step, *args):
    """What gemini -o stream-json prints for a step."""
    at = "2026-11-22T23:35:59.108Z"
    if step == "begin":
        return [{"type": "init", "timestamp": at, "session_id": "cliproxy", "model": "gemini-2.5-pro"}, {"type": "message", "timestamp": at, "role": "user", "content": "Q"}]
    if step == "say":
        return [{"type": "message", "timestamp": at, "role": "assistant", "content": piece, "delta": True} for piece in args[0]]
    if step == "end":
        return [{"type": "result", "timestamp": at, "status": "success", "stats": {"total_tokens": 78, "input_tokens": 72, "output_tokens": 6, "cached": 10}}]
    return [{"type": "result", "timestamp": at, "status": "error", "error": {"type": "Error", "message": args[0]}, "stats": {}}]


def codex_lines(step, *args):
    """What codex exec --json prints for a step: an answer comes in one piece."""
    if step == "begin":
        return [{"type": "thread.started", "thread_id": "01a2"}, {"type": "turn.started"}]
    if step in ("say", "think"):
        return [{"type": "item.completed", "item": {"id": "item_0", "type": "agent_message" if step == "say" else "reasoning", "text": "".join(args[0])}}]
    if step == "end":
        return [{"type": "turn.completed", "usage": {"input_tokens": 72, "cached_input_tokens": 10, "output_tokens": 6, "reasoning_output_tokens": 0}}]
    return [{"type": "error", "message": args[0]}, {"type": "turn.failed", "error": {"message": args[0]}}]


def qwen_lines(step, *args):
    """What qwen -o stream-json --include-partial-messages prints for a step."""
    if step == "begin":
        return [{"type": "system", "subtype": "init", "uuid": "2e", "session_id": "e6", "cwd": "/w", "tools": list(args), "mcp_servers": [], "model": "scripted"},
                claude_event({"type": "message_start", "message": {"id": "e6", "role": "assistant", "model": "scripted", "content": []}}),
                claude_event({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}})]
    if step in ("say", "think"):
        kind, key = ("text_delta", "text") if step == "say" else ("thinking_delta", "thinking")
        return [claude_event({"type": "content_block_delta", "index": 0, "delta": {"type": kind, key: piece}}) for piece in args[0]]
    usage = {"input_tokens": 72, "output_tokens": 6, "cache_read_input_tokens": 10, "total_tokens": 78}
    failed = [claude_event({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": f"[API Error: {args[0]}]"}})] if step == "fail" else []
    return [*failed, claude_event({"type": "content_block_stop", "index": 0}), claude_event({"type": "message_stop"}),
            {"type": "result", "subtype": "success", "uuid": "f3", "session_id": "e6", "is_error": False, "duration_ms": 340, "num_turns": 1, "result": "",
             "usage": usage if step == "end" else {**usage, "input_tokens": 0, "output_tokens": 0}, "permission_denials": []}]


LINES = {"claude": claude_lines, "gemini": gemini_lines, "codex": codex_lines, "qwen": qwen_lines}


def given(arguments, stdin):
    """All that a CLI can see of the request: argv, environment, stdin, its directory and the files of its place."""
    import fcntl
    import struct
    import termios
    place, seen = os.path.dirname(os.getcwd()), {}
    for folder, _, names in os.walk(place):
        for name in names:
            path = os.path.join(folder, name)
            if not os.path.islink(path):
                with open(path, encoding="utf-8", errors="replace") as f:
                    seen[os.path.relpath(path, place)] = f.read()
    terminals = [fd for fd in (0, 1, 2) if os.isatty(fd)]
    size = struct.unpack("HHHH", fcntl.ioctl(terminals[0], termios.TIOCGWINSZ, b"\0" * 8))[:2] if terminals else None
    raw = not termios.tcgetattr(terminals[0])[3] & (termios.ECHO | termios.ICANON) if terminals else None
    return {"argv": arguments, "env": dict(os.environ), "stdin": stdin, "cwd": os.getcwd(), "files": seen, "in_cwd": os.listdir("."),
            "links": sorted(os.path.relpath(os.path.join(d, n), place) for d, _, ns in os.walk(place) for n in ns if os.path.islink(os.path.join(d, n))),
            "mode": os.stat(place).st_mode & 0o777, "session_leader": os.getsid(0) == os.getpid(), "tty": terminals, "size": size, "raw": raw}


def play(name, folder, arguments):
    """Be the CLI `name` once: answer its probes, else take stdin and do the steps of DIR/name.json."""
    import signal
    import time
    probes = {("--version",): VERSIONS[name], ("auth", "status"): "{}", ("login", "status"): "Logged in using ChatGPT",
              ("debug", "models", "--bundled"): json.dumps({"models": [{"slug": "gpt-5.5", "model_messages": "long", "tool_mode": "shell"}]})}
    if tuple(arguments) in probes:
        print(probes[tuple(arguments)])
        return 0
    try:
        with open(os.path.join(folder, name + ".json")) as f:
            script = json.load(f)
    except FileNotFoundError:
        script = DEFAULT_SCRIPT
    structured = "stream-json" in arguments or "--json" in arguments
    stdin = "" if script.get("deaf") else sys.stdin.buffer.read().decode("utf-8", "replace")
    if script.get("reveal"):
        number = len([n for n in os.listdir(folder) if n.startswith(name + ".given")])
        with open(os.path.join(folder, f"{name}.given.{number}.tmp"), "w") as f:
            json.dump(given(arguments, stdin), f)
        os.rename(f.name, f.name[:-4])
    out = sys.stdout.buffer
    for step, *args in script["steps"]:
        if step in ("begin", "say", "think", "end", "fail") and structured:
            for line in LINES[name](step, *args):
                out.write(json.dumps(line).encode() + b"\n")
                out.flush()
        elif step == "say":
            out.write("".join(args[0]).encode())
        elif step == "end":
            out.write(b"\n")
        elif step == "fail":
            sys.stderr.write(f"[API Error: {args[0]}]\n" if name == "qwen" else f"ERROR: {args[0]}\n")
        elif step == "line":
            out.write(json.dumps(args[0]).encode() + b"\n")
        elif step == "bytes":
            out.write(bytes.fromhex(args[0]))
        elif step == "err":
            sys.stderr.write(args[0])
            sys.stderr.flush()
        elif step == "sleep":
            time.sleep(args[0])
        elif step == "wait":
            while not os.path.exists(os.path.join(folder, args[0])):
                time.sleep(0.01)
        elif step == "touch":
            open(os.path.join(folder, args[0]), "w").close()
        elif step == "words":
            for i in range(args[0]):
                out.write((json.dumps(LINES[name]("say", [f"w{i} "])[0]) + "\n").encode() if structured else b"w ")
                out.flush()
                time.sleep(args[1])
        elif step == "grandchild":
            pid = os.fork()
            if pid == 0:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                signal.pause()
            with open(os.path.join(folder, args[0]), "w") as f:
                f.write(str(pid))
        elif step == "deaf to TERM":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        elif step == "kill":
            out.flush()
            os.kill(os.getpid(), args[0])
        elif step == "exit":
            out.flush()
            return args[0]
        out.flush()
    return 0


if __name__ == "__main__" and sys.argv[1:2] == ["_play"]:
    sys.exit(play(sys.argv[2], sys.argv[3], sys.argv[4:]))


# === Getting pytest ==================================================================================================


def with_pytest():
    """Run this file again with a Python that has pytest: a private venv under the cache directory, made on first use."""
    import subprocess
    import venv
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    home = os.path.join(cache, "cliproxy-test", "py%d.%d" % sys.version_info[:2])
    python = os.path.join(home, "bin", "python3")
    if "CLIPROXY_TEST_VENV" in os.environ:
        sys.exit(f"pytest is still missing in {home}: remove that folder and run this again")
    if subprocess.run([python, "-c", "import pytest"], stderr=subprocess.DEVNULL).returncode if os.path.exists(python) else True:
        print(f"pytest is missing; installing it into {home}", file=sys.stderr)
        try:
            venv.create(home, with_pip=True, clear=True)
            subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "pytest"], check=True)
        except (subprocess.CalledProcessError, OSError) as e:
            sys.exit(f"could not install pytest ({e}). On Debian and Ubuntu: apt install python3-venv; or: pip install pytest")
    os.execve(python, [python, __file__, *sys.argv[1:]], {**os.environ, "CLIPROXY_TEST_VENV": home})


try:
    import pytest
except ImportError:
    if __name__ != "__main__":
        raise
    with_pytest()

import base64
import contextlib
import glob
import http.client
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
import cliproxy  # noqa: E402
from cliproxy import Done, ImagePart, Message, Request, Text, TextPart, Thinking, Usage  # noqa: E402

SCRIPT = os.path.join(HERE, "cliproxy.py")
CLIS = ("claude", "gemini", "codex", "qwen")
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
LIMIT = 20.0            # seconds until a wait for something that must happen is a failure


def eventually(what, condition):
    """The first true value of condition(); a failure that says `what` when it does not come."""
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    pytest.fail(f"after {LIMIT:g} s: {what}")


def alive(pid):
    """Is this a process that runs (and no zombie)?"""
    shown = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(shown) and not shown.startswith("Z")


def children_of(pid):
    rows = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True).stdout.split("\n")
    return [int(row.split()[0]) for row in rows if row.split()[1:2] == [str(pid)] and not row.split()[2].startswith("Z")]


# === The proxy under test ============================================================================================


class Answered:
    """An HTTP response that has been read: status, headers, body (bytes)."""

    def __init__(self, response):
        self.status, self.headers, self.body = response.status, response.headers, response.read()

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def text(self):
        assert self.status == 200, self.body
        return self.json["choices"][0]["message"]["content"]

    @property
    def error(self):
        """(status, type, code, param) of an error answer."""
        e = self.json["error"]
        assert set(e) == {"message", "type", "param", "code"} and e["message"], e
        return self.status, e["type"], e["code"], e["param"]

    @property
    def message(self):
        return self.json["error"]["message"]

    @property
    def frames(self):
        """The JSON of each SSE frame; "[DONE]" and comments as they are."""
        assert self.headers["Content-Type"].startswith("text/event-stream")
        assert self.body.endswith(b"\n\n")
        return [json.loads(f[6:]) if f.startswith("data: {") else f[6:] if f.startswith("data: ") else f for f in self.body.decode().split("\n\n")[:-1]]


class Proxy:
    """cliproxy.py, running in a process of its own with fake CLIs on its PATH and an empty home."""

    def __init__(self, folder, clis=CLIS, flags=(), env=None, providers=None, python=sys.executable):
        self.folder = str(folder)
        for name in ("bin", "home", "tmp"):
            os.makedirs(os.path.join(self.folder, name), exist_ok=True)
        for name in clis:
            self.install(name)
        if providers:
            path = os.path.join(self.folder, "providers.json")
            with open(path, "w") as f:
                json.dump({"providers": providers}, f)
            flags = [*flags, "--providers", path]
        self.env = {"PATH": os.path.join(self.folder, "bin") + ":/usr/bin:/bin", "HOME": os.path.join(self.folder, "home"), "LANG": "C.UTF-8",
                    "TMPDIR": os.path.join(self.folder, "tmp"), "PYTHONDEVMODE": "0", "SECRET_OF_OURS": "do not pass on", **(env or {})}
        self.log_path = os.path.join(self.folder, "log")
        with open(self.log_path, "w") as log:
            self.process = subprocess.Popen([python, "-W", "error", SCRIPT, "--port", "0", *flags], env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.port = int(eventually("the proxy prints its address", self._address))
        self.pid = self.process.pid

    def _address(self):
        if self.process.poll() is not None:
            pytest.fail("the proxy ended: " + self.log())
        m = re.search(r"http://[^:]+:(\d+)/v1", self.log())
        return m and m.group(1)

    def install(self, name):
        path = os.path.join(self.folder, "bin", name)
        with open(path + ".new", "w") as f:
            f.write(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{__file__}" _play {name} "{self.folder}" "$@"\n')
        os.chmod(path + ".new", 0o755)
        os.replace(path + ".new", path)

    def play(self, name, *steps, **more):
        """From now on the CLI `name` does these steps."""
        path = os.path.join(self.folder, name + ".json")
        with open(path + ".new", "w") as f:
            json.dump({"steps": steps, **more}, f)
        os.replace(path + ".new", path)

    def touch(self, name):
        open(os.path.join(self.folder, name), "w").close()

    def exists(self, name):
        return os.path.exists(os.path.join(self.folder, name))

    def given(self, name, number=0):
        """What a CLI that was told to reveal itself was given."""
        with open(os.path.join(self.folder, f"{name}.given.{number}")) as f:
            return json.load(f)

    def log(self):
        with open(self.log_path) as f:
            return f.read()

    def lines(self, words):
        return [line for line in self.log().split("\n") if words in line]

    def connect(self, host="127.0.0.1"):
        return socket.create_connection((host, self.port), timeout=LIMIT)

    def request(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT)
        with contextlib.closing(connection):
            connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
            return Answered(connection.getresponse())

    def post(self, body, path="/v1/chat/completions", **headers):
        return self.request("POST", path, json.dumps(body), **{"Content-Type": "application/json", **headers})

    def ask(self, model, content="Hi", headers=None, **body):
        messages = content if isinstance(content, list) else [{"role": "user", "content": content}]
        return self.post({"model": model, "messages": messages, **body}, **(headers or {}))

    def raw(self, data, until_closed=True):
        """What comes back for these bytes on one connection, until the proxy closes it (or one response's head)."""
        with self.connect() as s:
            s.sendall(data)
            got = b""
            while True:
                piece = s.recv(65536)
                if not piece or (not until_closed and b"\r\n\r\n" in got + piece):
                    return got + piece
                got += piece

    def started(self, model, stream=True, **body):
        """A socket on which a request has been sent and nothing been read."""
        s = self.connect()
        data = json.dumps({"model": model, "stream": stream, "messages": [{"role": "user", "content": "Hi"}], **body}).encode()
        s.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(data), data))
        return s

    def spawner(self):
        return eventually("the spawner runs", lambda: children_of(self.pid))[0]

    def running(self):
        """The pids of the CLIs that run now."""
        return children_of(self.spawner())

    def settled(self):
        """Wait until start-up has looked at every CLI and none runs any more."""
        eventually("start-up has looked at all CLIs", lambda: "  echo " in self.log())
        eventually("no CLI is left", lambda: not self.running())

    def stop(self, number=signal.SIGTERM):
        """End it; its exit status. Fails if it leaves a process or a file."""
        spawner = children_of(self.pid)
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(LIMIT)
        eventually("the spawner is gone", lambda: not any(alive(pid) for pid in spawner))
        eventually("nothing is left in the temporary directory", lambda: not os.listdir(os.path.join(self.folder, "tmp")))
        return status


@pytest.fixture
def serve(tmp_path):
    """serve(...) -> a Proxy, ended after the test."""
    made = []

    def start(*args, **kw):
        made.append(Proxy(tmp_path / str(len(made)), *args, **kw))
        return made[-1]
    yield start
    for proxy in made:
        proxy.stop()
        assert "Traceback" not in proxy.log(), proxy.log()


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """One proxy for all the tests that change no setting."""
    proxy = Proxy(tmp_path_factory.mktemp("shared"))
    proxy.settled()
    yield proxy
    assert proxy.stop() == 0
    assert "Traceback" not in proxy.log(), proxy.log()


@pytest.fixture
def proxy(shared):
    """The shared proxy, with no script left over; afterwards nothing may run any more."""
    for path in glob.glob(os.path.join(shared.folder, "*")):
        if os.path.isfile(path) and not path.endswith("log"):
            os.unlink(path)
    yield shared
    eventually("no CLI is left", lambda: not shared.running())
    eventually("no place is left", lambda: [p for p in glob.glob(os.path.join(shared.folder, "tmp", "*", "*")) if "prepared-" not in p] == [])


def run(*args, **env):
    """cliproxy.py with these arguments, to its end."""
    return subprocess.run([sys.executable, "-W", "error", SCRIPT, *args], capture_output=True, text=True, timeout=60,
                          env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "LANG": "C.UTF-8", **env})


