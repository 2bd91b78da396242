"""WebSockets over HTTP/2: extended CONNECT (RFC 8441) by the `h2` library, and frames by hand.

Usage: ws_h2.py CASE HOST PORT. Prints what it saw as one JSON object and asserts nothing itself.
"""

import json
import sys

from client import HOST, Http2
from h2.connection import ConnectionInputs, ConnectionState, H2ConnectionStateMachine

# To the library the first GOAWAY is a connection's end, though streams may go on behind it.
H2ConnectionStateMachine._transitions[
    ConnectionState.CLIENT_OPEN, ConnectionInputs.RECV_GOAWAY
] = (None, ConnectionState.CLIENT_OPEN)

MASK = bytes([0x37, 0xFA, 0x21, 0x3D])
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


def frame(opcode, payload, fin=True, mask=MASK):
    header = bytes([fin << 7 | opcode])
    bit = 0x80 if mask else 0
    if len(payload) < 126:
        header += bytes([bit | len(payload)])
    elif len(payload) < 65536:
        header += bytes([bit | 126]) + len(payload).to_bytes(2, "big")
    else:
        header += bytes([bit | 127]) + len(payload).to_bytes(8, "big")
    if not mask:
        return header + payload
    key = int.from_bytes(mask * (len(payload) // 4 + 1), "big") >> 8 * (4 - len(payload) % 4)
    masked = (int.from_bytes(payload, "big") ^ key).to_bytes(len(payload), "big")
    return header + mask + masked


class Socket:
    """One WebSocket on a stream."""

    def __init__(self, client, path="/", extra=()):
        self.client = client
        while client.connection.remote_settings.enable_connect_protocol != 1:
            client.receive()
        headers = [
            (":method", "CONNECT"),
            (":protocol", "websocket"),
            (":scheme", "http"),
            (":path", path),
            (":authority", HOST),
            ("sec-websocket-version", "13"),
        ]
        self.stream = client.open(headers + list(extra), end=False)
        self.seen = client.streams[self.stream]
        self.read = 0
        while self.seen["status"] is None and not self.seen["ended"]:
            client.receive()

    def send(self, data, end=False):
        self.client.send(self.stream, data, end)

    def exactly(self, length):
        while len(self.seen["body"]) < self.read + length:
            if self.seen["ended"]:
                raise EOFError
            self.client.receive()
        data = self.seen["body"][self.read : self.read + length]
        self.read += length
        return data

    def frame(self):
        """The next frame: opcode, final or not, payload."""
        head = self.exactly(2)
        length = head[1] & 0x7F
        if length > 125:
            length = int.from_bytes(self.exactly(2 if length == 126 else 8), "big")
        return head[0] & 0xF, head[0] >> 7, self.exactly(length)

    def end(self):
        """Reads to the stream's end; shows the last close code and how the stream ended."""
        code, others = None, 0
        try:
            while True:
                opcode, _, payload = self.frame()
                if opcode == CLOSE:
                    code = int.from_bytes(payload[:2], "big")
                else:
                    others += 1
        except EOFError:
            pass
        return {"code": code, "others": others, "reset": self.seen["reset"]}


def shown(seen):
    return {"status": seen["status"], "headers": seen["headers"], "reset": seen["reset"]}


def case_echo(address):
    """Frames of all lengths and kinds, then a closing handshake that the client begins."""
    extra = [
        ("sec-websocket-protocol", "v1, v2"),
        ("sec-websocket-extensions", "permessage-deflate"),
        ("x-repeated", "1"),
        ("cookie", "a=1"),
        ("x-repeated", "2"),
        ("cookie", "b=2"),
        ("origin", "http://api.localhost"),
    ]
    socket = Socket(Http2(address), "/echo?x=%zz", extra)
    seen = shown(socket.seen)
    if socket.seen["status"] != 200:
        return seen
    same = True
    for length in (0, 5, 125, 126, 65535, 65536, 1_000_000):
        payload = bytes(index & 0xFF for index in range(length))
        socket.send(frame(BINARY, payload))
        same &= socket.frame() == (BINARY, 1, payload)
    socket.send(frame(TEXT, b"one ", fin=False) + frame(PING, b"?") + frame(0, b"two"))
    same &= socket.frame() == (TEXT, 0, b"one ")
    same &= socket.frame() == (PONG, 1, b"?")
    same &= socket.frame() == (0, 1, b"two")
    socket.send(frame(CLOSE, b"\x0f\xa0bye"))
    close = socket.frame()
    socket.send(b"", True)
    return {**seen, "same": same, "close": [close[0], close[2].hex()], "end": socket.end()}


def case_refused(address):
    """A handshake that the service refuses; its body too."""
    socket = Socket(Http2(address), "/refuse")
    socket.client.finish(socket.stream)
    return {**shown(socket.seen), "body": socket.seen["body"].decode()}


def case_unmasked(address):
    """A violation; another WebSocket of the connection goes on."""
    client = Http2(address)
    other, socket = Socket(client), Socket(client)
    socket.send(frame(TEXT, b"good"))
    good = socket.frame()[2].decode()
    socket.send(frame(TEXT, b"bad", mask=None))
    end = socket.end()
    other.send(frame(TEXT, b"still there"))
    return {"good": good, **end, "other": other.frame()[2].decode()}


def case_cancel(address):
    """Resets a stream; another WebSocket and a plain request of the connection go on."""
    client = Http2(address)
    other, socket = Socket(client), Socket(client)
    socket.send(frame(TEXT, b"good"))
    good = socket.frame()[2].decode()
    client.connection.reset_stream(socket.stream, 8)
    client.flush()
    other.send(frame(TEXT, b"still there"))
    return {"good": good, "other": other.frame()[2].decode()}


def case_many(address):
    """50 WebSockets of one connection, one round trip after another on all of them."""
    client = Http2(address)
    sockets = [Socket(client) for _ in range(50)]
    same = True
    for turn in range(10):
        for number, socket in enumerate(sockets):
            socket.send(frame(TEXT, b"%d %d" % (number, turn)))
        for number, socket in enumerate(sockets):
            same &= socket.frame()[2] == b"%d %d" % (number, turn)
    return {"same": same, "sockets": len(sockets)}


def case_held(address):
    """An open WebSocket: says so, and shows how it ends."""
    socket = Socket(Http2(address))
    socket.send(frame(TEXT, b"good"))
    socket.frame()
    print(json.dumps({"held": True}), flush=True)
    return socket.end()


CASES = {
    "echo": case_echo,
    "refused": case_refused,
    "unmasked": case_unmasked,
    "cancel": case_cancel,
    "many": case_many,
    "held": case_held,
}


def main():
    case, host, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
    json.dump(CASES[case]((host, port)), sys.stdout)
    print(flush=True)


if __name__ == "__main__":
    main()
