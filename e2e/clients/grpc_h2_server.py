"""An HTTP/2 service by the `h2` library that says of gRPC what no gRPC library would. By path:

/raw.Echo/…            head at once, then every byte as it comes, then trailers
/raw.Reset/CODE        resets the stream without a head
/raw.ResetLater/CODE   a head and a message, then resets the stream
/raw.TrailersOnly/…    a status in the only head
/raw.Half/…            a head, half of a message, and trailers
/raw.Html/…            502 and a page
/raw.Refused/…         REFUSED_STREAM at first, then an answer
/raw.Goaway/…          an answer, then GOAWAY

Usage: grpc_h2_server.py. Prints {"port": …}; once its input ends, the heads and resets it has seen.
"""

import json
import socket
import sys
import threading

import h2.config
import h2.connection
import h2.events
import h2.exceptions

HEAD = [(":status", "200"), ("content-type", "application/grpc"), ("x-initial", "1")]
END = [("grpc-status", "0"), ("x-trailing", "1"), ("x-trailing", "2")]
MESSAGE = b"\x00\x00\x00\x00\x05hello"

seen = {"connections": 0, "heads": [], "resets": []}
refused = set()


class Connection:
    def __init__(self, accepted):
        self.socket = accepted
        self.connection = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=False, header_encoding="latin-1")
        )
        self.paths = {}
        self.waiting = {}

    def run(self):
        self.connection.initiate_connection()
        self.flush()
        try:
            while data := self.socket.recv(65536):
                for event in self.connection.receive_data(data):
                    self.handle(event)
                self.flush()
        except (OSError, h2.exceptions.ProtocolError):
            pass
        self.socket.close()

    def flush(self):
        if data := self.connection.data_to_send():
            self.socket.sendall(data)

    def handle(self, event):
        connection = self.connection
        if isinstance(event, h2.events.RequestReceived):
            headers = dict(event.headers)
            seen["heads"].append([list(field) for field in event.headers])
            self.paths[event.stream_id] = headers[":path"]
            self.begin(event.stream_id, *headers[":path"].split("/")[1:3])
        elif isinstance(event, h2.events.DataReceived):
            if event.flow_controlled_length:
                connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            if self.paths[event.stream_id].startswith("/raw.Echo/"):
                self.waiting[event.stream_id] += event.data
                self.pour(event.stream_id)
        elif isinstance(event, h2.events.StreamEnded):
            if event.stream_id in self.waiting:
                connection.send_headers(event.stream_id, END, end_stream=True)
        elif isinstance(event, h2.events.StreamReset):
            seen["resets"].append([self.paths.get(event.stream_id), int(event.error_code)])
            self.waiting.pop(event.stream_id, None)
        elif isinstance(event, h2.events.WindowUpdated):
            for stream in list(self.waiting):
                self.pour(stream)

    def pour(self, stream):
        while data := self.waiting[stream]:
            window = self.connection.local_flow_control_window(stream)
            length = min(window, self.connection.max_outbound_frame_size, len(data))
            if length == 0:
                return
            self.connection.send_data(stream, data[:length])
            self.waiting[stream] = data[length:]

    def begin(self, stream, what, detail):
        connection = self.connection
        if what == "raw.Echo":
            self.waiting[stream] = b""
            connection.send_headers(stream, HEAD)
        elif what == "raw.Reset":
            connection.reset_stream(stream, int(detail))
        elif what == "raw.ResetLater":
            connection.send_headers(stream, HEAD)
            connection.send_data(stream, MESSAGE)
            connection.reset_stream(stream, int(detail))
        elif what == "raw.TrailersOnly":
            status = [("grpc-status", "7"), ("grpc-message", "k%C3%A4se"), ("x-only", "1")]
            connection.send_headers(stream, HEAD + status, end_stream=True)
        elif what == "raw.Half":
            connection.send_headers(stream, HEAD)
            connection.send_data(stream, MESSAGE[:7])
            connection.send_headers(stream, END, end_stream=True)
        elif what == "raw.Html":
            head = [(":status", "502"), ("content-type", "text/html")]
            connection.send_headers(stream, head)
            connection.send_data(stream, b"<p>bad gateway", end_stream=True)
        elif what == "raw.Refused" and detail not in refused:
            refused.add(detail)
            connection.reset_stream(stream, 7)
        else:
            connection.send_headers(stream, HEAD)
            connection.send_data(stream, MESSAGE)
            connection.send_headers(stream, END, end_stream=True)
            if what == "raw.Goaway":
                connection.close_connection(last_stream_id=stream)


def main():
    listener = socket.create_server(("127.0.0.1", 0))
    print(json.dumps({"port": listener.getsockname()[1]}), flush=True)

    def accept():
        while True:
            accepted, _ = listener.accept()
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            seen["connections"] += 1
            threading.Thread(target=Connection(accepted).run, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    sys.stdin.read()
    print(json.dumps(seen), flush=True)


if __name__ == "__main__":
    main()
