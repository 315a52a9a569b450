"""A SOCKS5 proxy server, to run and to read. In reading order:

    the protocol                                          a session's work
      codes      the numbers of RFC 1928 as names           waiting    until one of several sockets is ready
      errors     what can go wrong, carrying the answer     splice     bytes by way of a pipe in the kernel
      fields     what a message is made of                  relay      move bytes both ways; knows no SOCKS
      wire       every message: bytes in, facts out         connect    CONNECT: race the addresses
      inbox      what the client sends, piece by piece      bind       BIND: wait for the one peer
      trace      every message, field by field              fragments  a datagram that comes in pieces
    who may do what                                         datagrams  many datagrams in few calls
      config     every tunable, once                        udp        UDP ASSOCIATE: one association
      auth       which METHOD; is this password right?    the server
      throttle   makes guessing slow                        handler    one client, like RFC 1928 §3 to §6
      rules      who may reach what                         listening  the sockets that are listened on
      resolve    names to addresses, traps closed           spares     threads that wait in accept()
      counts     how many there are, in all processes       lobby      where the silent wait in a crowd
      sessions   who is connected                           home       on which CPU the threads run
    around it                                               server     the ThreadingTCPServer: accept, cap, drain
      client     the other side of the protocol             table      SIGUSR1: who is doing what
      check      what would be served to whom, in words     workers    several processes, one supervisor
      logs       how lines of the log look                  renewal    a worker that had a crowd makes way
      selftest   the server, tried by its own client
      cli        the command line

Whoever embeds the server needs Config and Server, and Handler to change what a session does.
"""
__version__ = "0.1.0"

from .config import Config, ConfigError
from .errors import ProtocolError, RequestRefused, SocksError
from .handler import Handler
from .server import Server

__all__ = ["Config", "ConfigError", "Handler", "ProtocolError", "RequestRefused", "Server", "SocksError", "__version__"]
