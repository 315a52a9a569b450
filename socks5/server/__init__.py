"""The ThreadingTCPServer: accept a connection, negotiate, keep a registry of the sessions."""
