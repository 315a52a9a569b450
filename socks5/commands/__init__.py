"""CONNECT, BIND and UDP ASSOCIATE: each module tells the whole story of one command.  RFC 1928 section 4."""
