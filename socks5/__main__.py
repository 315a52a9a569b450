"""python -m socks5, and the beginning of each other way to start the program."""
import signal
import sys
from typing import Callable


def load() -> Callable[[], int]:
    """Import the program and return its main function. SIGHUP and SIGUSR1 would end the process meanwhile, which takes
    a tenth of a second: they are blocked before, and obeyed as soon as the server runs."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGUSR1})
    from .cli import main as program
    return program


def main() -> int:
    """The entry point of the installed package."""
    return load()()


if __name__ == "__main__":
    sys.exit(main())
