"""The processes of the program: signals, the main loop, one server in this process, or several in worker processes."""
