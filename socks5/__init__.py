"""A SOCKS5 proxy server, to run and to read. In reading order:

    codes      the numbers of RFC 1928 as names          waiting    until one of several sockets is ready
    errors     what can go wrong, carrying the answer    splice     bytes by way of a pipe in the kernel
    wire       every message: bytes in, facts out        relay      move bytes both ways; knows no SOCKS
    config     every tunable, once                       sessions   who is connected
    auth       which METHOD; is this password right?     handler    one client, like RFC 1928 §3 to §6
    throttle   makes guessing slow                       listening  the sockets that are listened on
    rules      who may reach what                        home       on which CPU the threads run
    resolve    names to addresses, with the traps closed server     the ThreadingTCPServer: accept, cap, drain
    connect    CONNECT: race the addresses               check      what would be served to whom, in words
    bind       BIND: wait for the one peer               cli        the command line
    fragments  a datagram that comes in pieces           client     the other side of the protocol
    datagrams  many datagrams in few calls               lobby      where whoever says nothing yet waits
    udp        UDP ASSOCIATE: one association

Whoever embeds the server needs Config and Server, and Handler to change what a session does.
"""
__version__ = "0.1.0"

from .config import Config, ConfigError
from .errors import ProtocolError, RequestRefused, SocksError
from .handler import Handler
from .server import Server

__all__ = ["Config", "ConfigError", "Handler", "ProtocolError", "RequestRefused", "Server", "SocksError", "__version__"]
