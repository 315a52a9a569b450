#!/usr/bin/env python3
"""The drop-in entry: python socks5_server.py -p 1080"""
import signal
import sys

if __name__ == "__main__":
    if hasattr(signal, "pthread_sigmask"):          # before the imports, which take a while: it is obeyed after them
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGUSR1})
    from socks5.cli import main
    sys.exit(main())
