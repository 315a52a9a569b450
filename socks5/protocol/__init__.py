"""The messages of SOCKS5: bytes in, messages out, and back. No socket, no thread, no decision."""
