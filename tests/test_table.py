"""table.py: SIGUSR1 and the table of live sessions; each state, and what it counts."""
import json
import os
import re
import signal
import socket
import unittest

from socks5 import client, log
from socks5.protocol.codes import Cmd
from socks5.protocol.messages import Greeting
from socks5.relay.tunnel import Tunnel
from tests.support import (ask, connect_through, dial, echoes, greeted, logging_of, need, read_to_end, running, spawned,
                           target, udp_socket, wait_until)

ORDER = ["id", "client", "user", "cmd", "dst", "state", "age", "idle", "up", "down", "rate"]


def facts(line):
    return dict(re.findall(r"(\w+)=(\S+)", line))


class Lines(unittest.TestCase):
    def tables(self, server):
        """{state: facts} of the table as it is now, and its lines."""
        with logging_of(self) as logs:
            server.log_sessions_soon()
            logs.wait("live sessions=")
        lines = [line.partition("INFO ")[2] for line in logs.output if line.startswith("INFO live ")]
        return {facts(line)["state"]: facts(line) for line in lines if "state=" in line}, lines

    def test_every_state_in_one_order(self):
        def finish(connection):
            connection.sendall(b"abc")
            connection.shutdown(socket.SHUT_WR)
            read_to_end(connection)

        with running() as server, target() as echo, target(finish) as finished:
            with dial(server.server_address) as silent, greeted(server.server_address) as waiting, \
                    connect_through(server.server_address, *echo) as relaying, \
                    connect_through(server.server_address, *finished) as half:
                silent.sendall(Greeting(b"\0").pack()[:1])
                ask(waiting, Cmd.BIND, "0.0.0.0", 0)
                relaying.sendall(b"hello")
                self.assertEqual((relaying.recv(5), half.recv(3), half.recv(1)), (b"hello", b"abc", b""))
                wait_until(lambda: sorted(session.moved() for session in server.sessions)
                           == [(0, 0), (0, 0), (0, 3), (5, 5)])
                states, lines = self.tables(server)
        for line in lines[:-1]:
            self.assertEqual(re.findall(r"(\w+)=", line), ORDER)
        self.assertEqual(lines[-1], "live sessions=4 pid=%d" % os.getpid())
        self.assertEqual(set(states), {"negotiating", "waiting", "relaying", "half-closed"})
        self.assertEqual((states["relaying"]["up"], states["relaying"]["down"]), ("5", "5"))
        self.assertEqual(states["relaying"]["dst"], "%s:%d" % echo)
        self.assertEqual((states["half-closed"]["down"], states["negotiating"]["cmd"]), ("3", "-"))
        for name, state in states.items():
            if name in ("relaying", "half-closed"):
                self.assertLessEqual(float(state["idle"]), float(state["age"]))
            else:
                self.assertEqual(state["idle"], "-")

    def test_datagrams(self):
        with running() as server, udp_socket() as peer, client.associate(server.server_address[:2]) as udp:
            udp.sendto(b"question", peer.getsockname())
            peer.recvfrom(100)
            wait_until(lambda: [session.moved() for session in server.sessions] == [(8, 0)])
            states, _ = self.tables(server)
            with client.associate(server.server_address[:2]):
                unused = max(server.sessions, key=lambda session: session.number)
                wait_until(lambda: unused.relay and unused.relay.watched, "it is relayed")
                idle_s = unused.idle_s(unused.relay.moved_at + 5)
                self.assertAlmostEqual(idle_s, 5, msg="before its first datagram")
        self.assertEqual((states["relaying"]["cmd"], states["relaying"]["up"]), ("UDP_ASSOCIATE", "8"))
        self.assertGreaterEqual(float(states["relaying"]["idle"]), 0)

    def test_the_rate_is_since_the_last_table(self):
        with running() as server, target() as echo, connect_through(server.server_address, *echo) as sock:
            sock.sendall(bytes(1000))
            wait_until(lambda: [session.moved() for session in server.sessions] == [(1000, 1000)])
            first, _ = self.tables(server)
            second, _ = self.tables(server)
        self.assertGreater(int(first["relaying"]["rate"]), 0)
        self.assertEqual((second["relaying"]["rate"], second["relaying"]["up"]), ("0", "1000"))

    def test_as_json_idle_is_a_number_or_null(self):
        with running() as server, target() as echo, greeted(server.server_address), \
                connect_through(server.server_address, *echo):
            wait_until(lambda: [bool(session.relay) for session in server.sessions].count(True) == 1, "it is relayed")
            with logging_of(self) as logs:
                server.log_sessions_soon()
                logs.wait("live sessions=")
            said = [json.loads(log.JsonFormatter().format(record)) for record in logs.records]
        idle = {line["state"]: line["idle"] for line in said if "state" in line}
        self.assertEqual(idle["negotiating"], None)
        self.assertIsInstance(idle["relaying"], float)

    def test_idle_is_since_the_last_byte(self):
        with running() as server, target() as echo, connect_through(server.server_address, *echo) as sock:
            session, = server.sessions
            wait_until(lambda: isinstance(session.relay, Tunnel))
            now = session.relay.moved_at
            self.assertEqual(session.idle_s(now + 5), 5)
            self.assertTrue(echoes(sock))
            wait_until(lambda: session.relay.moved_at > now)
            self.assertLess(session.idle_s(now + 5), 5)


class Signal(unittest.TestCase):
    def setUp(self):
        need(self, hasattr(signal, "SIGUSR1"), "SIGUSR1")

    def test_one_process_and_several(self):
        for workers in (1, 2) if hasattr(os, "fork") else (1,):
            with self.subTest("%d" % workers), spawned("-w", workers) as server, target() as echo:
                with connect_through(server.port, *echo) as sock:
                    self.assertTrue(echoes(sock))
                    server.signal(signal.SIGUSR1)
                    line = server.wait_line(r"live id=.* state=relaying .*").group()
                    self.assertEqual(re.findall(r"(\w+)=", line), ORDER)
                    wait_until(lambda: sum("live sessions=" in line for line in list(server.log)) == workers)
