"""Wakeup: what a poll loop sees of it, with an eventfd and with a socket pair."""
import os
import select
import threading
import unittest
from unittest import mock

from socks5.net import wakeup as module
from socks5.net.wakeup import Wakeup
from tests import support


class WakeupTest(unittest.TestCase):
    def either_way(self):
        """A Wakeup of each kind that this Python has."""
        for eventfd in {False, hasattr(os, "eventfd")}:
            with self.subTest(eventfd=eventfd), mock.patch.object(module, "EVENTFD", eventfd), Wakeup() as wakeup:
                yield wakeup

    def readable(self, wakeup, timeout_s=0):
        return bool(select.select([wakeup], [], [], timeout_s)[0])

    def test_readable_from_set_to_clear(self):
        for wakeup in self.either_way():
            self.assertFalse(self.readable(wakeup))
            for _ in range(3):
                for _ in range(1000):                       # never blocks
                    wakeup.set()
                self.assertTrue(self.readable(wakeup))
                for _ in range(2):
                    wakeup.clear()
                    self.assertFalse(self.readable(wakeup))

    def test_another_thread_wakes_the_poll(self):
        for wakeup in self.either_way():
            thread = threading.Thread(target=wakeup.set)
            thread.start()
            self.assertTrue(self.readable(wakeup, support.PATIENCE_S))
            thread.join()

    @unittest.skipUnless(os.path.isdir("/proc/self/fd"), "counts descriptors in /proc")
    def test_after_close_it_touches_no_descriptor(self):
        before = support.descriptors()
        for wakeup in self.either_way():
            number = wakeup.fileno()
            wakeup.close()
            self.assertEqual(support.descriptors(), before)
            with open(os.devnull) as other:                 # has the number now
                self.assertEqual(other.fileno(), number)
                wakeup.set()
                wakeup.clear()
                wakeup.close()
                self.assertEqual(os.fstat(number), os.fstat(other.fileno()))
