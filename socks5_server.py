#!/usr/bin/env python3
"""The drop-in entry: python3 socks5_server.py -p 1080"""
import sys

if __name__ == "__main__":
    try:
        from socks5.__main__ import load
        main = load()
    except ModuleNotFoundError as exc:
        sys.stderr.write("socks5-server: no module %s: it needs the folder socks5 beside it\n" % exc.name)
        sys.exit(2)
    sys.exit(main())
