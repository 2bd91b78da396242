"""A sidecar in one file: what docs/tunnel-protocol.md and tunnel/proto/tunnel.proto say, by the standard library alone.

    peer.py HOST:PORT SUBDOMAIN [--cut BYTES] [--cuts N] [--life SECONDS]

One lane over TCP without TLS, one tunnel, one route. `GET /bytes/N` is answered here, by N bytes of a pattern that depends on
the place (`body`), anything else by 404. With --cut it closes its own connection each time that it has written so many
bytes to it, N times at most, in the middle of a message; the lane comes back by `resume`.

It prints JSON lines: `{"ready": URLS}` once the relay has accepted the announcement (`{"waiting": REASONS}`: another has the
name), `{"cut": N}`, `{"resumed": N, "sent": …, "again": …}` (counted messages sent so far, and how many of them once more). Once
its input ends, or its life, it ends the lane for good (`go_away { last: true }`) and prints `{"received": …, "sent": …, "acknowledged": …}`, its
counted messages. What cannot go on ends it with 1 and a word on standard error.

It does not know: TLS, other carriers, several lanes, requests' bodies (the rest of one is not wanted), reconnection without a
session.
"""

import argparse
import collections
import json
import math
import os
import random
import select
import socket
import sys
import time

# Protobuf: a message is a dict of lists, by the number of the field.


def varint(number):
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def read_varint(data, at):
    """The number at `at` and where it ends; None where it is not whole."""
    number = shift = 0
    while at < len(data):
        number |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 0x80:
            return number, at
        if shift > 63:
            raise Broken("a varint of more than ten bytes")
    return None


def encode(*fields):
    """Fields are (number, value): an int, bytes or str. What is the default is left out, but for b"", an empty message."""
    out = bytearray()
    for number, value in fields:
        if isinstance(value, int):
            if value:
                out += varint(number << 3) + varint(value)
        else:
            value = value.encode() if isinstance(value, str) else value
            out += varint(number << 3 | 2) + varint(len(value)) + value
    return bytes(out)


def decode(data):
    fields, at = collections.defaultdict(list), 0
    while at < len(data):
        key, at = read_varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = read_varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            value, at = data[at : at + size], at + size
        elif kind == 2:
            size, at = read_varint(data, at)
            value, at = data[at : at + size], at + size
        else:
            raise Broken(f"wire type {kind}")
        if at > len(data):
            raise Broken("a field beyond its message's end")
        fields[key >> 3].append(value)
    return fields


def last(fields, number, default=0):
    """Of a repeated singular field the last counts."""
    return fields[number][-1] if fields[number] else default


class Broken(Exception):
    """The relay says what it may not, or does not let this peer go on."""


class Lost(Exception):
    """The connection has ended; the lane may come back."""


# Fields of TunnelMessage.
REQUEST_ID, FLAGS, OPEN = 2, 5, 6
HTTP_REQUEST, HTTP_RESPONSE, HTTP_BODY = 17, 18, 19
HELLO, WELCOME, REFUSE, RESUME, RESUMED, ACK, PING, PONG = 32, 33, 34, 35, 36, 37, 38, 39
GO_AWAY, ANNOUNCE, ANNOUNCED = 40, 41, 42
WINDOW, RESET, DISPATCHED, REFUSED = 48, 49, 50, 51
# Bits of `flags`, and of `features`.
OPEN_BIT, END_BIT, DATAGRAM_BIT = 1, 2, 4
FEATURES = 1 | 2
# Reasons of a refusal after which a resume is dialled again.
WRONG_RELAY, TRY_AGAIN = 4, (5, 7)
# The code for an exchange that this peer does not take.
NO_PROTOCOL = 4

WINDOW_BYTES = 256 * 1024
MESSAGE_BYTES_MAX = 256 * 1024
HANDSHAKE_BYTES_MAX = 64 * 1024
BODY_BYTES_MAX = 32 * 1024
RING_BYTES_MAX = 1024 * 1024
QUEUED_BYTES_MAX = 64 * 1024
MESSAGE_COST = 64
CHARGED_BYTES_MAX = 33 * 1024
ACK_BYTES, ACK_AFTER = 64 * 1024, 0.02
PING_EVERY, PING_AFTER, SILENCE = 5, 1, 10
HANDSHAKE_TIME, GOODBYE = 10, 1


def counted(fields):
    """Whether a message has a number of its own ("Counting")."""
    if last(fields, FLAGS) & DATAGRAM_BIT:
        return False
    if any(fields[n] for n in (HELLO, WELCOME, REFUSE, RESUME, RESUMED, ACK, PING, PONG, WINDOW)):
        return False
    return bool(fields[REQUEST_ID]) or any(fields[n] for n in range(40, 45))


def body(start, size):
    """The bytes of a body from `start` on: eight digits and a line's end, nine bytes, again and again."""
    first = start // 9
    text = b"".join(b"%08d\n" % n for n in range(first, (start + size) // 9 + 1))
    return text[start - first * 9 :][:size]


class Exchange:
    """A response on its way."""

    def __init__(self, limit, size):
        self.limit, self.spent = limit, 0
        self.size, self.at = size, 0
        self.head_sent = self.request_ended = False


class Peer:
    def __init__(self, arguments):
        host, _, port = arguments.relay.rpartition(":")
        self.address, self.subdomain = (host, int(port)), arguments.subdomain
        self.cut, self.cuts, self.done = arguments.cut, arguments.cuts if arguments.cut else 0, 0
        self.welcome, self.attempt, self.resumes = None, 0, 0
        # Counted messages: received, and what is due to be acknowledged; sent, those kept, and their cost.
        self.received = self.ack_bytes = 0
        self.ack_due = None
        self.sent, self.ring, self.ring_bytes = 0, collections.deque(), 0
        self.exchanges = {}
        self.life = time.monotonic() + arguments.life
        # Once the input has ended: when the connection is closed at the latest.
        self.ending = None

    # The connection.

    def connect(self, first, answer):
        """Dials, says `first`, and gives the message of the relay's answer."""
        self.socket = socket.create_connection(self.address, HANDSHAKE_TIME)
        self.input, self.output, self.written = bytearray(), bytearray(), 0
        self.socket.sendall(frame(first))
        while not (message := self.next_message(HANDSHAKE_BYTES_MAX)):
            self.read()
        self.socket.setblocking(False)
        self.heard = self.pinged = time.monotonic()
        self.ping_wanted = False
        if message[REFUSE]:
            return None, decode(last(message, REFUSE))
        if not message[answer]:
            raise Broken(f"an unexpected answer: fields {sorted(message)}")
        return decode(last(message, answer)), None

    def read(self):
        try:
            data = self.socket.recv(256 * 1024)
        except BlockingIOError:
            return
        except OSError as error:
            raise Lost(str(error)) from None
        if not data:
            raise Lost("the relay has closed the connection")
        self.heard = time.monotonic()
        self.input += data

    def next_message(self, longest):
        length = read_varint(self.input, 0)
        if not length:
            return None
        size, at = length
        if size > longest:
            raise Broken(f"a message of {size} bytes")
        if len(self.input) < at + size:
            return None
        message = decode(bytes(self.input[at : at + size]))
        del self.input[: at + size]
        self.message_bytes = at + size
        return message

    def write(self):
        data = self.output
        if self.cuts and self.written + len(data) >= self.cut:
            data = data[: self.cut - self.written]
        try:
            size = self.socket.send(data)
        except BlockingIOError:
            return
        except OSError as error:
            raise Lost(str(error)) from None
        del self.output[:size]
        self.written += size
        if self.cuts and self.written >= self.cut:
            self.cuts -= 1
            self.done += 1
            say(cut=self.done)
            raise Lost("cut")

    # The lane.

    def begin(self):
        hello = encode(
            (1, 1),
            (2, FEATURES),
            (3, os.urandom(16)),
            (4, "peer.py"),
            (6, encode((1, 1), (2, "HTTP"))),
            (7, WINDOW_BYTES),
            (8, MESSAGE_BYTES_MAX),
            (9, RING_BYTES_MAX),
        )
        self.welcome, refused = self.connect(encode((HELLO, hello)), WELCOME)
        if refused:
            raise Broken("not let in: " + last(refused, 2, b"").decode())
        route = encode((1, "peer"), (2, "peer"), (3, self.subdomain))
        self.send(encode((ANNOUNCE, encode((1, 1), (2, encode((1, "peer"))), (3, route)))))

    def send(self, message):
        """A counted message: it is kept until the relay has acknowledged it."""
        self.sent += 1
        self.ring.append(message)
        self.ring_bytes += len(message) + MESSAGE_COST
        self.output += frame(message)

    def acknowledged(self, received):
        if not self.sent - len(self.ring) <= received <= self.sent:
            raise Broken(f"{received} are acknowledged of {self.sent}")
        while self.sent - len(self.ring) < received:
            self.ring_bytes -= len(self.ring.popleft()) + MESSAGE_COST

    def resume(self):
        """Dials until the lane is back, within the grace. Half-read and unwritten bytes went with the connection."""
        self.socket.close()
        grace = last(self.welcome, 7) / 1000 if last(self.welcome, 2) & 1 else 0
        end, pause, others = time.monotonic() + grace, random.uniform(0, 0.05), 0
        while time.monotonic() + pause < end:
            time.sleep(pause)
            pause = min(max(2 * pause, 0.05), 1)
            self.attempt += 1
            session = ((1, last(self.welcome, 3)), (2, last(self.welcome, 4)), (3, last(self.welcome, 6)))
            rest = ((4, self.attempt), (5, self.received), (6, last(self.welcome, 8, b"")))
            try:
                resumed, refused = self.connect(encode((RESUME, encode(*session, *rest))), RESUMED)
            except (OSError, Lost):
                continue
            if refused:
                reason = last(refused, 1)
                others += reason == WRONG_RELAY
                if reason not in (WRONG_RELAY, *TRY_AGAIN) or others > 8:
                    raise Broken("the lane is lost: " + last(refused, 2, b"").decode())
                pause = max(pause, last(refused, 3) / 1000)
                continue
            self.acknowledged(last(resumed, 1))
            # Told by the resume. No exchange's limit was ever raised, so that there is no window to repeat.
            self.ack_bytes, self.ack_due = 0, None
            for message in self.ring:
                self.output += frame(message)
            self.output[:0] = frame(encode((PING, b"\x09" + os.urandom(8))))
            self.resumes += 1
            say(resumed=self.resumes, sent=self.sent, again=len(self.ring))
            return
        raise Broken("the grace is over")

    def run(self):
        self.begin()
        while True:
            try:
                while not self.step():
                    pass
                return
            except (Lost, TimeoutError) as error:
                if self.ending:
                    return
                self.resume()

    def step(self):
        """One turn. True once the lane has ended."""
        while message := self.next_message(MESSAGE_BYTES_MAX):
            self.take(message)
        now = time.monotonic()
        if now - self.heard > SILENCE:
            raise Lost("silence")
        ping_at = self.pinged + PING_EVERY
        if self.ping_wanted:
            ping_at = min(ping_at, self.heard + PING_AFTER)
        if now >= ping_at:
            self.pinged, self.ping_wanted = now, False
            self.output += frame(encode((PING, b"\x09" + os.urandom(8))))
        if self.ack_due is not None and (now >= self.ack_due or self.ack_bytes >= ACK_BYTES):
            self.ack_bytes, self.ack_due = 0, None
            self.output += frame(encode((ACK, encode((1, self.received)))))
        if self.ending and not self.output and (not self.ring or now >= self.ending):
            self.socket.close()
            return True
        for name in list(self.exchanges):
            self.answer(name)
        wake = min(t for t in (now + 1, ping_at, self.ack_due, self.ending) if t is not None)
        writes = [self.socket] if self.output else []
        reads = [self.socket] if self.ending else [self.socket, sys.stdin]
        readable, writable, _ = select.select(reads, writes, [], max(0, wake - now))
        asked = sys.stdin in readable and not os.read(sys.stdin.fileno(), 4096)
        if asked or now >= self.life and not self.ending:
            self.ending = now + GOODBYE
            self.send(encode((GO_AWAY, encode((3, 1)))))
        if writable:
            self.write()
        if self.socket in readable:
            self.read()
        return False

    def take(self, message):
        if counted(message):
            self.received += 1
            self.ack_bytes += self.message_bytes + MESSAGE_COST
            self.ping_wanted = True
            if self.ack_due is None:
                self.ack_due = time.monotonic() + ACK_AFTER
        if message[PING]:
            self.output += frame(encode((PONG, last(message, PING))))
        elif message[ACK]:
            self.acknowledged(last(decode(last(message, ACK)), 1))
        elif message[ANNOUNCED]:
            announced = decode(last(message, ANNOUNCED))
            reasons = b"; ".join(announced[3]).decode()
            if last(announced, 2):
                say(ready=[address.decode() for address in announced[5]])
            elif last(announced, 6):
                say(waiting=reasons)
            else:
                raise Broken("the announcement is refused: " + reasons)
        elif message[GO_AWAY] and last(decode(last(message, GO_AWAY)), 3):
            raise Broken("the relay ends: " + last(decode(last(message, GO_AWAY)), 2, b"").decode())
        elif message[REQUEST_ID]:
            self.exchange(last(message, REQUEST_ID), message)

    # Exchanges.

    def exchange(self, name, message):
        flags = last(message, FLAGS)
        if flags & OPEN_BIT:
            opened = decode(last(message, OPEN, b""))
            if not message[HTTP_REQUEST]:
                refused = encode((1, NO_PROTOCOL), (2, "HTTP alone"))
                self.send(encode((REQUEST_ID, name), (REFUSED, refused)))
                return
            request = decode(last(message, HTTP_REQUEST))
            target = last(request, 2, b"/").decode("latin-1")
            found = target.startswith("/bytes/") and target[7:].isdigit() and last(request, 1, b"GET") == b"GET"
            self.exchanges[name] = Exchange(last(opened, 11) or last(self.welcome, 12), int(target[7:]) if found else None)
        exchange = self.exchanges.get(name)
        if not exchange:
            return  # of one that is over: counted, and dropped
        if message[WINDOW]:
            exchange.limit = max(exchange.limit, last(decode(last(message, WINDOW)), 1))
        if message[RESET]:
            del self.exchanges[name]
        elif flags & END_BIT:
            exchange.request_ended = True

    def answer(self, name):
        """What credit, the ring and the connection have room for."""
        exchange = self.exchanges[name]
        if not exchange.head_sent:
            exchange.head_sent = True
            # Who answers has begun: from here on the relay sends the exchange nowhere else.
            self.send(encode((REQUEST_ID, name), (DISPATCHED, b"")))
            if exchange.size is None:
                head = encode((1, 404), (6, 1))
                self.send_data(name, exchange, HTTP_RESPONSE, head, True)
                return
            head = encode((1, 200), (5, encode((1, "content-type"), (2, "text/plain"))), (6, exchange.size + 1))
            if self.send_data(name, exchange, HTTP_RESPONSE, head, not exchange.size):
                return
        while self.ring_bytes < RING_BYTES_MAX and len(self.output) < QUEUED_BYTES_MAX:
            size = min(BODY_BYTES_MAX, exchange.size - exchange.at)
            payload = encode((1, body(exchange.at, size)))
            cost = min(len(payload), CHARGED_BYTES_MAX) + MESSAGE_COST
            if exchange.spent + cost > exchange.limit:
                return
            exchange.spent += cost
            exchange.at += size
            if self.send_data(name, exchange, HTTP_BODY, payload, exchange.at == exchange.size):
                return

    def send_data(self, name, exchange, field, payload, end):
        """True where that was the last of the exchange."""
        self.send(encode((REQUEST_ID, name), (FLAGS, END_BIT if end else 0), (field, payload)))
        if end:
            if not exchange.request_ended:
                self.send(encode((REQUEST_ID, name), (RESET, b"")))
            del self.exchanges[name]
        return end


def say(**what):
    print(json.dumps(what), flush=True)


def frame(message):
    return varint(len(message)) + message


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("relay", help="HOST:PORT")
    parser.add_argument("subdomain")
    parser.add_argument("--cut", type=int, default=0, help="bytes that are written to each connection")
    parser.add_argument("--cuts", type=int, default=1, help="how often at most")
    parser.add_argument("--life", type=float, default=math.inf, help="seconds")
    arguments = parser.parse_args()
    peer = Peer(arguments)
    try:
        peer.run()
        say(received=peer.received, sent=peer.sent, acknowledged=peer.sent - len(peer.ring))
    except (Broken, OSError) as error:
        sys.exit(f"peer.py: {error}")


if __name__ == "__main__":
    main()
