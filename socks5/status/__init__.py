"""What the server does, to be looked at: /metrics, /sessions, the page, and the line on the terminal."""
