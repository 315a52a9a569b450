#!/usr/bin/env python3
"""The drop-in entry: python socks5_server.py -p 1080"""
import sys

if __name__ == "__main__":
    try:
        from socks5.__main__ import load
        main = load()
    except ModuleNotFoundError as exc:              # such as Debian's python3-minimal, which has no socketserver
        sys.stderr.write("socks5-server: no module %s: it needs the folder socks5 beside it, and all of Python's "
                         "standard library (Debian: apt install python3; python3-minimal is not enough)\n" % exc.name)
        sys.exit(2)
    sys.exit(main())
