"""Bytes between two connected sockets, both ways. Knows no SOCKS."""
