"""A client outside of the Rust world: HTTP/2 by the `h2` library, HTTP/1.1 by `http.client`.

Usage: client.py CASE HOST PORT. Prints what it saw as one JSON object. Asserts nothing itself: what
is right stands in the Rust test that runs it.
"""

import hashlib
import http.client
import json
import socket
import sys

import h2.config
import h2.connection
import h2.events
import h2.exceptions

HOST = "api.localhost"
TIMEOUT_S = 30


class Http2:
    """One HTTP/2 connection by prior knowledge; reads until a stream has ended."""

    def __init__(self, address):
        self.socket = socket.create_connection(address, TIMEOUT_S)
        self.connection = h2.connection.H2Connection(
            h2.config.H2Configuration(
                client_side=True,
                header_encoding=None,
                # The point of some cases is to send what a client should not.
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        self.connection.initiate_connection()
        self.streams = {}
        self.flush()

    def flush(self):
        data = self.connection.data_to_send()
        if data:
            self.socket.sendall(data)

    def open(self, headers, end=True):
        stream = self.connection.get_next_available_stream_id()
        self.streams[stream] = {
            "informational": [],
            "status": None,
            "headers": [],
            "body": b"",
            "trailers": [],
            "reset": None,
            "ended": False,
        }
        self.connection.send_headers(stream, headers, end_stream=end)
        self.flush()
        return stream

    def send(self, stream, data, end):
        """Sends a body under flow control."""
        while data:
            window = self.connection.local_flow_control_window(stream)
            length = min(window, self.connection.max_outbound_frame_size, len(data))
            if length == 0:
                self.receive()
                if self.streams[stream]["reset"] is not None:
                    return
                continue
            self.connection.send_data(stream, data[:length])
            data = data[length:]
            self.flush()
        if end:
            self.connection.end_stream(stream)
            self.flush()

    def receive(self):
        data = self.socket.recv(65536)
        if not data:
            for seen in self.streams.values():
                if not seen["ended"]:
                    seen["ended"], seen["reset"] = True, "closed"
            return
        for event in self.connection.receive_data(data):
            stream = getattr(event, "stream_id", None)
            seen = self.streams.get(stream)
            if isinstance(event, h2.events.InformationalResponseReceived):
                seen["informational"].append(split(event.headers)[0])
            elif isinstance(event, h2.events.ResponseReceived):
                seen["status"], seen["headers"] = split(event.headers)
            elif isinstance(event, h2.events.DataReceived):
                seen["body"] += event.data
                if event.flow_controlled_length:
                    self.connection.acknowledge_received_data(event.flow_controlled_length, stream)
            elif isinstance(event, h2.events.TrailersReceived):
                seen["trailers"] = split(event.headers)[1]
            elif isinstance(event, h2.events.StreamEnded):
                seen["ended"] = True
            elif isinstance(event, h2.events.StreamReset):
                seen["ended"], seen["reset"] = True, int(event.error_code)
            elif isinstance(event, h2.events.ConnectionTerminated):
                if event.error_code == 0:
                    # A warning: the streams that are open may end (RFC 9113, 6.8).
                    continue
                for other in self.streams.values():
                    if not other["ended"]:
                        other["ended"], other["reset"] = True, "goaway"
        self.flush()

    def finish(self, stream):
        while not self.streams[stream]["ended"]:
            self.receive()
        return self.streams[stream]

    def answer(self, headers, body=None):
        stream = self.open(headers, end=body is None)
        if body is not None:
            self.send(stream, body, True)
        return self.finish(stream)


def split(headers):
    """Splits `:status` off; values stay bytes, shown as Latin-1."""
    status, fields = None, []
    for name, value in headers:
        name, value = bytes(name), bytes(value)
        if name == b":status":
            status = int(value)
        else:
            fields.append([name.decode("latin-1"), value.decode("latin-1")])
    return status, fields


def head(method="GET", path="/", authority=HOST, extra=()):
    headers = [(":method", method), (":scheme", "http"), (":path", path)]
    if authority is not None:
        headers.append((":authority", authority))
    return headers + list(extra)


def shown(seen):
    return {**seen, "body": seen["body"].decode("latin-1")}


def case_h2_get(address):
    """Repeated fields, cookie crumbs, a value that is not UTF-8, an odd target."""
    extra = [
        ("x-repeated", "1"),
        ("cookie", "a=1"),
        ("x-repeated", "2"),
        ("cookie", "b=2"),
        (b"x-bytes", b"\xfe\xff"),
        ("te", "trailers"),
    ]
    return shown(Http2(address).answer(head(path="/a%2Fb//c;d?x=%zz&&y=[]", extra=extra)))


def case_h2_trailers(address):
    """A body and trailers up; whatever comes down."""
    client = Http2(address)
    stream = client.open(head("POST", extra=[("trailer", "x-sum")]), end=False)
    client.send(stream, b"hello", False)
    client.connection.send_headers(stream, [("x-sum", "5")], end_stream=True)
    client.flush()
    return shown(client.finish(stream))


def case_h2_continue(address):
    """Sends its body only once it was told to continue."""
    client = Http2(address)
    extra = [("expect", "100-continue"), ("content-length", "4")]
    stream = client.open(head("PUT", extra=extra), end=False)
    while not client.streams[stream]["informational"] and not client.streams[stream]["ended"]:
        client.receive()
    if client.streams[stream]["informational"]:
        client.send(stream, b"body", True)
    return shown(client.finish(stream))


def case_h2_upload(address):
    """8 MiB up and down again; only its digest is shown."""
    body = bytes(range(256)) * (8 * 1024 * 4)
    seen = Http2(address).answer(head("POST", "/echo"), body)
    same = hashlib.sha256(body).hexdigest() == hashlib.sha256(seen["body"]).hexdigest()
    return {**seen, "body": len(seen["body"]), "same": same}


def case_h2_many(address):
    """100 streams of one connection, answered in whatever order."""
    client = Http2(address)
    streams = [client.open(head(path=f"/{number}")) for number in range(100)]
    return {"statuses": [client.finish(stream)["status"] for stream in streams]}


def case_h2_cancel(address):
    """Resets a stream in the middle of its answer; another one of the connection goes on."""
    client = Http2(address)
    stream = client.open(head(path="/endless"))
    while not client.streams[stream]["body"]:
        client.receive()
    client.connection.reset_stream(stream, 8)
    client.flush()
    return shown(client.answer(head(path="/after")))


def refused(headers):
    def case(address):
        return shown(Http2(address).answer(headers))

    return case


def case_http1_keep_alive(address):
    """Ten requests on one connection, with bodies of every framing."""
    connection = http.client.HTTPConnection(*address, timeout=TIMEOUT_S)
    seen = []
    for number in range(10):
        if number % 3 == 0:
            connection.request("GET", f"/{number}", headers={"Host": HOST})
        elif number % 3 == 1:
            connection.request("POST", f"/{number}", body=b"fixed", headers={"Host": HOST})
        else:
            connection.request(
                "POST",
                f"/{number}",
                body=iter([b"chunk", b"ed"]),
                headers={"Host": HOST, "Transfer-Encoding": "chunked"},
                encode_chunked=True,
            )
        local = connection.sock.getsockname()[1]
        response = connection.getresponse()
        seen.append([response.status, response.read().decode("latin-1"), local])
    return {"answers": [row[:2] for row in seen], "connections": len({row[2] for row in seen})}


CASES = {
    "h2-get": case_h2_get,
    "h2-trailers": case_h2_trailers,
    "h2-continue": case_h2_continue,
    "h2-upload": case_h2_upload,
    "h2-many": case_h2_many,
    "h2-cancel": case_h2_cancel,
    "h2-plain": refused(head()),
    "h2-authority-differs": refused(head(extra=[("host", "other.localhost")])),
    "h2-authority-missing": refused(head(authority=None)),
    "h2-authority-from-host": refused(head(authority=None, extra=[("host", HOST)])),
    "h2-host-same": refused(head(extra=[("host", HOST)])),
    "h2-userinfo": refused(head(authority="user@" + HOST)),
    "h2-connection-field": refused(head(extra=[("connection", "close")])),
    "h2-transfer-encoding": refused(head("POST", extra=[("transfer-encoding", "chunked")])),
    "h2-upper-case": refused(head(extra=[("X-Upper", "1")])),
    "h2-value-newline": refused(head(extra=[("x-split", "a\r\nsmuggled: 1")])),
    "h2-length-differs": refused(head("POST", extra=[("content-length", "5")])),
    "h2-connect": refused([(":method", "CONNECT"), (":authority", HOST + ":80")]),
    "http1-keep-alive": case_http1_keep_alive,
}


def main():
    case, host, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
    json.dump(CASES[case]((host, port)), sys.stdout)


if __name__ == "__main__":
    main()
