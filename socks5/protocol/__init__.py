"""The messages of SOCKS5: parse, pack and explain them. No socket, no thread, no decision."""
