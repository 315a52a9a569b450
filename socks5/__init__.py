"""A SOCKS5 proxy server, to run and to read. In reading order:

    codes     the numbers of RFC 1928 as names              connect   CONNECT: race the destination's addresses
    errors    what can go wrong, carrying the answer        handler   one client, like RFC 1928 from §3 to §6
    wire      every message: bytes in, facts out            server    the ThreadingTCPServer: accept, cap, drain
    config    every tunable, once                           cli       the command line
    auth      which METHOD; is this password right?
    resolve   names to addresses, with the traps closed
    relay     move bytes both ways; knows no SOCKS
    sessions  who is connected

Whoever embeds the server needs Config and Server, and Handler to change what a session does.
"""
__version__ = "0.1.0"

from .config import Config, ConfigError
from .errors import ProtocolError, RequestRefused, SocksError
from .handler import Handler
from .server import Server

__all__ = ["Config", "ConfigError", "Handler", "ProtocolError", "RequestRefused", "Server", "SocksError", "__version__"]
