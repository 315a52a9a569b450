"""The commands CONNECT, BIND and UDP ASSOCIATE.  RFC 1928 section 4."""
