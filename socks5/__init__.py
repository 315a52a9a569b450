"""A SOCKS5 proxy server. Its modules in reading order; a folder imports only from those above it:

    values            the values of options, parsed from text
    config            every option once: name, unit, default, help text

    protocol/         bytes to messages and back: no socket, no thread, no decision
        codes         the numbers of RFC 1928 as names
        errors        exceptions that carry the REP
        fields        what a message is made of
        messages      every message of SOCKS5
        proxy         the PROXY header, in which a load balancer names the client
        facts         typed values of a line in the log, and how text shows them
        memory        caches, giving memory back, and going on when it has run out
        envelope      messages encapsulated by a security context: RFC 1961
        trace         a message explained, field by field
    access/           who may do what
        files         the files that options name, opened for reading
        shared        memory that the server processes share
        passwords     hashes of passwords: slow to compute, on purpose; turns at computing them
        throttle      the rate limit for wrong passwords
        logins        a login from the attempt to the verdict
        users         the users file, the METHOD choice, is this password right?
        gssapi        GSS-API by ctypes: credentials and security contexts
        subnegotiation  which security context, which protection: RFC 1961
        rules         may this client reach that destination?
        check         what a configuration would serve to whom, in words
    net/              sockets without SOCKS
        addresses     IP addresses and endpoints
        resolver      names to addresses
        listeners     the sockets that the server listens on
        poller        wait for many descriptors: epoll, poll or select
        lookups       names looked up in threads: fair turns, a time limit
        encapsulated  a client's socket that speaks through an envelope: RFC 1961
        wakeup        a descriptor by which one thread wakes another
        shares        a limited number of things, of which no address takes all
        writer        the thread that writes lines to a descriptor
        affinity      on which CPU a thread may run, and whether it may interrupt others
    relay/            bytes between two sockets
        splice        a kernel pipe, through which bytes go without a copy
        bucket        token buckets for rate limits, which the server processes share
        pipe          one direction
        relay         what the relay loop relays: a tunnel, or the sockets of a UDP association
        tunnel        both directions: a state machine that never waits
        protected     a tunnel whose client speaks through an envelope
        limited       a direction under a rate limit
        busy          one connection in the calling thread: its first moments, and a busy tunnel
        watch         what the loop waits for: descriptors, silent newcomers, other threads
        loop          the thread that relays every quiet tunnel of the process, and every association
    commands/         what a client can ask for
        authorize     what one client may reach, by the rules in force
        connect       CONNECT: Happy Eyeballs over the destination's addresses (RFC 8305)
        dialogue      the client's side of the protocol, towards another proxy
        upstream      CONNECT, BIND and UDP ASSOCIATE through another proxy
        bind          BIND: listen for the one peer that the client expects
        rates         which rate limits hold for a session, and for its datagrams
        udp           UDP ASSOCIATE: relay datagrams
        enveloped     datagrams through an envelope
        datagrams     many datagrams in few system calls
        fragments     reassemble fragmented datagrams
    server/           one process
        counters      how many sessions there are, in all processes; what else may be counted
        inbox         what the client sends before its tunnel stands, and the record of it
        session       what is known of one client, and how the log shows it
        sessions      the registry of live sessions: limits, deadlines, eviction
        principal     authenticate a client by GSSAPI, RFC 1961
        handler       one client, like RFC 1928 sections 3 to 6
        acceptors     threads that wait in accept()
        newcomers     a connection before its handler: PROXY header, silent clients
        tracing       where the trace is written to
        server        the ThreadingTCPServer: accept, limit, drain
    process/          several processes
        orders        what a server process is told to do, and the way to a worker
        signals       signals become orders
        systemd       sockets that systemd has opened, and what it is told
        identity      give up root: --run-as
        files         read users and rules again, with descriptors kept in reserve
        companion     what the supervisor knows of the status page
        control       the main loop: stop, reload, log sessions
        worker        a worker process
        alone         one server in this process
        supervisor    start, restart and stop worker processes
    status/           what the server does, to be looked at
        meter         counters in shared memory, a row for each process
        metrics       /metrics, for Prometheus
        channel       ask a worker
        views         sessions and handshakes as JSON
        history       the last minutes, and the summary for the page
        line          the line on the terminal
        web           the HTTP server
        beside        all of it, beside the servers
    brief             a session in a short line, for people at a terminal
    client            the other side of the protocol
    log               formats of the log, and its handler
    selftest          the server, tried by its own client
    cli               the command line

The words of this package:

    client            the program that connects to the proxy and sends a request
    destination       the host and port that a CONNECT or a datagram names
    peer              the host that connects to the listener of a BIND
    remote            the other end of a tunnel: the destination or the peer
    acceptor          a thread that waits in accept() and runs the handler
    handler           the code for one client up to its tunnel: a StreamRequestHandler
    tunnel            two connected sockets, and the bytes between them in both directions
    relay loop        the thread with an event loop that relays all quiet tunnels of a process
    session           one connection of a client, from accept to close
    evict             close one session, so that another can be served
    drain             stop accepting, and let sessions end within --drain-timeout
"""
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .commands.authorize import Authorizer
    from .config import Config, ConfigError
    from .protocol.errors import ProtocolError, RequestRefused, SocksError
    from .server.handler import Handler
    from .server.server import Server

__version__ = "0.1.0"
__all__ = ["Authorizer", "Config", "ConfigError", "Handler", "ProtocolError", "RequestRefused", "Server", "SocksError",
           "__version__"]

_MODULES = {"Authorizer": ".commands.authorize", "Config": ".config", "ConfigError": ".config",
            "Handler": ".server.handler", "ProtocolError": ".protocol.errors", "RequestRefused": ".protocol.errors",
            "Server": ".server.server", "SocksError": ".protocol.errors"}


def __getattr__(name: str) -> object:
    """Import a name of the package when it is first asked for: `python -m socks5` has to hold signals back before the
    imports, which take a while.                                                                           PEP 562"""
    if name not in _MODULES:
        raise AttributeError("module %r has no attribute %r" % (__name__, name))
    value = globals()[name] = getattr(import_module(_MODULES[name], __name__), name)
    return value
