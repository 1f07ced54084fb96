"""A client over plain sockets: HTTP/1.1 as far as the load generator needs it, and its faults."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
import ssl
import time
import urllib.parse
from collections.abc import AsyncIterator, Mapping, Sequence

from hmf_jax.serving.load.call import Call, encoded
from hmf_jax.serving.load.reply import Reply

_SLOW = 10  # bytes per second


@dataclasses.dataclass
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    used: bool = False


class Client:
    """Sends calls to one server and keeps connections open between them.

    Args:
      url: http://HOST:PORT, or https; a path in it comes before the paths of the calls.
      headers: of every call.

    Raises ValueError for another url.
    """

    def __init__(
        self, url: str, headers: Mapping[str, str] | None = None, timeout: float = 600.0
    ) -> None:
        parts = urllib.parse.urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not the address of a server, like http://127.0.0.1:8000.")
        self._host, secure = parts.hostname, parts.scheme == "https"
        self._port = parts.port or (443 if secure else 80)
        self._ssl = ssl.create_default_context() if secure else None
        # Paths of calls begin with /v1: so may the address, as it does for OpenAI's clients.
        self._before = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Host": parts.netloc, "Accept": "*/*"} | dict(headers or {})
        self._timeout = timeout
        self._idle: list[_Connection] = []

    async def send(self, call: Call, earlier: Sequence[Reply] = ()) -> Reply:
        """Makes a call and reads the reply, or misbehaves as the call says. Never raises for what
        the server does."""
        made = call.body(earlier) if callable(call.body) else call.body
        reply = Reply(call, made if isinstance(made, Mapping) else {}, time.perf_counter())
        connection = None
        try:
            async with asyncio.timeout(self._timeout):
                connection = await self._connection(call)
                reply.sent = time.perf_counter()
                if await self._talk(connection, call, encoded(made), reply):
                    self._idle.append(connection)
                    connection = None
        except TimeoutError:
            reply.failure = f"no end after {self._timeout:g} s"
        except (OSError, EOFError, ValueError) as e:
            reply.failure = f"the connection broke: {type(e).__name__} {e}".rstrip()
        finally:
            if connection is not None:
                connection.writer.transport.abort()
        reply.ended = time.perf_counter()
        reply.finish()
        return reply

    async def get(self, path: str) -> Reply:
        """GET of a path."""
        return await self.send(Call(path=path, method="GET", expect=(200,)))

    async def close(self) -> None:
        """Closes idle connections."""
        for connection in self._idle:
            connection.writer.close()
        for connection in self._idle:
            with contextlib.suppress(OSError):
                await connection.writer.wait_closed()
        self._idle.clear()

    async def _connection(self, call: Call) -> _Connection:
        while self._idle and call.fault != "never_read":
            connection = self._idle.pop()
            if not connection.reader.at_eof():
                return connection
            connection.writer.close()
        if call.fault == "never_read":  # small buffers, so that the server notices
            plain = socket.socket()
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            plain.setblocking(False)
            address = (self._host, self._port)
            await asyncio.get_running_loop().sock_connect(plain, address)
            name = self._host if self._ssl else None
            pair = await asyncio.open_connection(
                sock=plain, limit=512, ssl=self._ssl, server_hostname=name
            )
        else:
            pair = await asyncio.open_connection(self._host, self._port, limit=2**20, ssl=self._ssl)
        return _Connection(*pair)

    async def _talk(self, connection: _Connection, call: Call, body: bytes, reply: Reply) -> bool:
        """One request and its answer; whether the connection can be used again."""
        reader, writer = connection.reader, connection.writer
        headers = self._headers | ({"Content-Type": "application/json"} if body else {})
        headers |= {"Content-Length": str(len(body))} | dict(call.headers)
        lines = [f"{call.method} {self._before}{call.path} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        writer.write("\r\n".join([*lines, "", ""]).encode())
        if call.fault == "slow_body":
            answered = asyncio.create_task(_head(reader))  # the server may lose patience
            for i in range(len(body)):
                writer.write(body[i : i + 1])
                await asyncio.wait({answered}, timeout=1 / _SLOW)
                if answered.done():
                    break
            status, reply.headers = await answered
        else:
            writer.write(body)
            try:
                await writer.drain()
            except ConnectionError:  # refused before it was read to its end: there is an answer
                pass
            if call.fault in ("close_queued", "never_read"):
                await asyncio.sleep(call.wait if call.fault == "never_read" else 0)
                reply.left = True
                return False
            head = _head(reader)
            if call.fault == "close_prefill":
                try:
                    status, reply.headers = await asyncio.wait_for(head, call.wait)
                except TimeoutError:
                    reply.left = True
                    return False
            else:
                status, reply.headers = await head
        reply.begun, reply.status = time.perf_counter(), status
        if reply.streamed and status == 200:
            await _stream(reader, call, reply)
        else:
            parts = [part async for part in _body(reader, call, reply)]
            reply.body = b"".join(parts)
            reply.whole()
        keeps = reply.headers.get("connection", "").lower() != "close"
        if reply.streamed and reply.error:  # ends with the connection
            keeps = False
        return keeps and not reply.left and call.fault is None and status != 413


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers, these in lower case."""
    line = await reader.readline()
    version, _, rest = line.partition(b" ")
    if not version.startswith(b"HTTP/1."):
        raise EOFError("before an answer" if not line else f"not HTTP: {line[:40]!r}")
    headers = {}
    while (line := await reader.readline()) not in (b"\r\n", b"\n"):
        if not line:
            raise EOFError("within the headers")
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    return int(rest[:3]), headers


async def _body(reader: asyncio.StreamReader, call: Call, reply: Reply) -> AsyncIterator[bytes]:
    """The parts of a body as they come."""
    headers = reply.headers
    if call.method == "HEAD" or reply.status in (204, 304):
        return
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await reader.readline()).split(b";")[0] or b"x", 16):
            yield await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readline()
    elif "content-length" in headers:
        if size := int(headers["content-length"]):
            yield await reader.readexactly(size)
    else:
        while part := await reader.read(65536):
            yield part


async def _stream(reader: asyncio.StreamReader, call: Call, reply: Reply) -> None:
    """Reads events, or closes the connection where the call says so."""
    rest, fault = b"", call.fault or ""
    leave_at = {"close_first": 1, "close_middle": 2}.get(fault)
    async for part in _body(reader, call, reply):
        *blocks, rest = (rest + part).split(b"\n\n")
        now = time.perf_counter()
        for block in blocks:
            ended = reply.event(block, now)
            if (leave_at and len(reply.times) >= leave_at) or (ended and fault == "close_last"):
                reply.left = True
                return
    if rest:
        reply.problem(f"the stream ended within an event: {rest[:80]!r}")
