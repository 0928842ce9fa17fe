"""Policy server speaking the openpi websocket protocol, so that an unmodified `openpi-client` drives a robot with it.

On connect the client gets one frame of metadata; then every binary frame it sends is a request (see `sessions`) and
gets one binary frame back. What cannot be answered gets a text frame with the reason, and the connection closes with
1011. GET /healthz answers OK, GET /metrics the Prometheus metrics. Protocol:
https://github.com/Physical-Intelligence/openpi/blob/main/src/openpi/serving/websocket_policy_server.py

Requests of one client are answered in their order; while one is computed, a few more wait and then its socket is not
read any further. Policies run in worker threads, never in the event loop. Needs numpy, msgpack, websockets and
prometheus_client, and onnxruntime for the policy; neither torch nor the rest of this repository.
"""

import asyncio
import hmac
import logging
import signal
import ssl
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request, Response

from export.openpi import pack
from export.sessions import REQUESTS, Client, PolicySource, SessionStore

log = logging.getLogger(__name__)
transport_log = logging.getLogger(f"{__name__}.transport")
# What strangers send to a port is no fault of the server, and is counted in the metrics where it gets that far.
transport_log.setLevel(logging.CRITICAL)

METADATA_VERSION = 1
"""Version of the metadata that clients get on connect."""
MESSAGE_OVERHEAD = 1 << 16
"""Bytes of a message beside its observations: names, dtypes, shapes and texts."""
ERROR_LENGTH = 2000
CLOSE_SECONDS = 2.0
"""How long a closing connection waits for the other side to agree."""


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How a server listens and what it bounds.

    Args:
        host: address to bind; others than the machine's own programs reach the server only if this says so.
        port: TCP port; 0 lets the system choose.
        api_key: what clients must send as `Authorization: Api-Key ...`; None lets everybody in.
        tls_certificate: PEM file of the certificate chain; None serves without TLS.
        tls_key: PEM file of its private key; None if the certificate's file holds it.
        max_clients: connections at the same time; more are closed with 1013.
        max_message_bytes: of a request; twice the source's largest observation by default.
        max_queue: requests of a client that wait while one is computed, in frames.
        workers: threads that run policies.
        keep_seconds: how long a session waits for its client to come back.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    max_clients: int = 64
    max_message_bytes: int | None = None
    max_queue: int = 4
    workers: int = 1
    keep_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name in ("max_clients", "max_queue", "workers", "max_message_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        if not 0 <= self.port < 1 << 16:
            raise ValueError(f"port: got {self.port}, expected 0 to 65535")
        if self.keep_seconds < 0:
            raise ValueError(f"keep_seconds: got {self.keep_seconds}, expected 0 or more")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise ValueError("api_key: expected one line of printable ASCII, which is what a header can carry")
        if self.tls_key is not None and self.tls_certificate is None:
            raise ValueError("tls_key: given without tls_certificate")


class PolicyServer:
    """Serves the policies of a source until it is stopped.

    Args:
        source: metadata, and a policy for every session.
        options: address and bounds.

    Raises:
        ValueError: certificate or key cannot be read.
    """

    def __init__(self, source: PolicySource, options: ServerOptions) -> None:
        self.options = options
        own = {"metadata_version": METADATA_VERSION, "server": "worldmodel", "requests": REQUESTS}
        self._metadata = {**source.metadata, **own}
        self.max_message_bytes: int = options.max_message_bytes or 2 * source.observation_bytes + MESSAGE_OVERHEAD
        self._sessions = SessionStore(source, keep_seconds=options.keep_seconds, keep=options.max_clients)
        self._tls = _tls(options)
        self._clients = 0
        self._metrics = Metrics(self)

    async def run(self, ready: "asyncio.Future[int] | None" = None, stop: asyncio.Event | None = None) -> None:
        """Serves until `stop` is set or the process gets SIGINT or SIGTERM; open connections are closed with 1001.

        Args:
            ready: gets the port as soon as it listens.
            stop: ends the server; None makes it end with the signals.

        Raises:
            OSError: the address cannot be bound.
        """
        if stop is None:
            stop = asyncio.Event()
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, stop.set)
        with ThreadPoolExecutor(self.options.workers, thread_name_prefix="policy") as threads:
            self._threads = threads
            server = await self._listen()
            port = server.sockets[0].getsockname()[1]
            log.info("serving on %s://%s:%d", "wss" if self._tls else "ws", self.options.host, port)
            if ready is not None:
                ready.set_result(port)
            await stop.wait()
            server.close()
            await server.wait_closed()

    async def _listen(self) -> Server:
        """Starts to accept connections."""
        if self.options.host not in ("127.0.0.1", "::1", "localhost") and (
            self.options.api_key is None or not self._tls
        ):
            log.warning("%s: reachable from other machines without TLS or without an API key", self.options.host)
        return await serve(
            self._serve_client,
            self.options.host,
            self.options.port,
            ssl=self._tls,
            compression=None,
            # No robot sends Origin. A browser does, and a web page must not drive the arm.
            origins=[None],
            max_size=self.max_message_bytes,
            max_queue=self.options.max_queue,
            close_timeout=CLOSE_SECONDS,
            process_request=self._before_handshake,
            server_header=None,
            logger=transport_log,
        )

    def _before_handshake(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answers plain HTTP requests and those without the key; None lets the handshake go on."""
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return connection.respond(HTTPStatus.OK, "OK\n")
        if not self._authorised(request.headers):
            self._metrics.errors.labels("unauthorised").inc()
            return connection.respond(HTTPStatus.UNAUTHORIZED, "expected the header Authorization: Api-Key ...\n")
        if path == "/metrics":
            response = connection.respond(HTTPStatus.OK, generate_latest(self._metrics.registry).decode())
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = "text/plain; version=0.0.4; charset=utf-8"
            return response
        return None

    def _authorised(self, headers: Headers) -> bool:
        """Whether the headers carry the key, compared in a time that does not tell how much of it was right."""
        if self.options.api_key is None:
            return True
        given = headers.get_all("Authorization")
        expected = f"Api-Key {self.options.api_key}"
        return len(given) == 1 and hmac.compare_digest(given[0].encode("utf-8", "surrogateescape"), expected.encode())

    async def _serve_client(self, connection: ServerConnection) -> None:
        """Talks to one client until either side is done."""
        if self._clients >= self.options.max_clients:
            self._metrics.errors.labels("busy").inc()
            await connection.close(CloseCode.TRY_AGAIN_LATER, f"{self.options.max_clients} clients are connected")
            return
        loop = asyncio.get_running_loop()

        def give_way() -> None:
            refusal = _refuse(connection, "session_id: another connection has resumed this session")
            asyncio.run_coroutine_threadsafe(refusal, loop)

        self._clients += 1
        log.info("%s: connected", connection.remote_address)
        client = Client(give_way)
        try:
            session_id = await loop.run_in_executor(self._threads, self._sessions.open, client)
            limits = {"message_bytes": self.max_message_bytes, "clients": self.options.max_clients}
            session = {"session_id": session_id, "keep_seconds": self.options.keep_seconds}
            await connection.send(pack({**self._metadata, **session, "limits": limits}))
            while await self._answer(connection, client):
                pass
        except ConnectionClosed as closed:
            if closed.sent is not None and closed.sent.code == CloseCode.MESSAGE_TOO_BIG:
                self._metrics.errors.labels("too_big").inc()
        except Exception as error:
            # A fault of ours or of the policy must end this connection, not the others.
            log.exception("policy failed")
            self._metrics.errors.labels("internal").inc()
            await _refuse(connection, f"the policy failed: {type(error).__name__}; the server's log has the details")
        finally:
            self._clients -= 1
            log.info("%s: disconnected", connection.remote_address)
            self._sessions.close(client)

    async def _answer(self, connection: ServerConnection, client: Client) -> bool:
        """Answers the next request; False if it could not be answered and the connection is closed."""
        frame = await connection.recv()
        started = time.perf_counter()
        if isinstance(frame, str):
            self._metrics.errors.labels("request").inc()
            await _refuse(connection, "got a text frame, expected a binary frame of msgpack")
            return False
        try:
            loop = asyncio.get_running_loop()
            answer, seconds = await loop.run_in_executor(self._threads, self._sessions.answer, client, frame)
        except ValueError as error:
            self._metrics.errors.labels("request").inc()
            await _refuse(connection, str(error))
            return False
        await connection.send(answer)
        total = time.perf_counter() - started
        client.previous_ms = 1e3 * total
        self._metrics.requests.inc()
        self._metrics.total_seconds.observe(total)
        if seconds is not None:
            self._metrics.act_seconds.observe(seconds)
        return True

    @property
    def clients(self) -> int:
        """Open connections."""
        return self._clients

    @property
    def waiting_sessions(self) -> int:
        """Sessions that wait for their client."""
        return self._sessions.waiting


class Metrics:
    """What Prometheus reads."""

    def __init__(self, server: PolicyServer) -> None:
        self.registry = CollectorRegistry()
        buckets = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
        self.requests = Counter("policy_requests", "Answered requests.", registry=self.registry)
        self.errors = Counter(
            "policy_errors", "Connections refused or closed for an error.", ["reason"], registry=self.registry
        )
        self.act_seconds = Histogram(
            "policy_act_seconds", "Time of the policy alone.", registry=self.registry, buckets=buckets
        )
        self.total_seconds = Histogram(
            "policy_request_seconds", "Time from request to answer.", registry=self.registry, buckets=buckets
        )
        clients = Gauge("policy_clients", "Open connections.", registry=self.registry)
        clients.set_function(lambda: server.clients)
        waiting = Gauge("policy_sessions_waiting", "Sessions without a connection.", registry=self.registry)
        waiting.set_function(lambda: server.waiting_sessions)


async def _refuse(connection: ServerConnection, reason: str) -> None:
    """A text frame with the reason, then the end, as openpi does it."""
    text = reason.encode("utf-8", "backslashreplace").decode()
    text = text if len(text) <= ERROR_LENGTH else f"{text[:ERROR_LENGTH]}..."
    log.info("%s: refused: %r", connection.remote_address, text)
    try:
        await connection.send(text)
    except ConnectionClosed:
        return
    await connection.close(CloseCode.INTERNAL_ERROR, "the reason is in the previous frame")


def _tls(options: ServerOptions) -> ssl.SSLContext | None:
    """The context of the certificate; None without one."""
    if options.tls_certificate is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(options.tls_certificate, options.tls_key)
    except OSError as error:
        raise ValueError(f"tls_certificate, tls_key: {options.tls_certificate}: {error}") from None
    return context
