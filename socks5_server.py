#!/usr/bin/env python3
"""The drop-in entry: python socks5_server.py -p 1080"""
import sys

from socks5.cli import main

if __name__ == "__main__":
    sys.exit(main())
