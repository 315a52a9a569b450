"""Sockets without SOCKS: addresses, name look-ups, listening sockets, waiting for many descriptors."""
