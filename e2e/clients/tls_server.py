"""An HTTP service by TLS, with Python's own `ssl`: HTTP/1.1, or HTTP/2 by the `h2` library, as ALPN says.
By path:

/            what it sees of the connection and the request, as JSON
/closed      a body that ends with the connection, which ends as TLS ends
/truncated   the same, but the connection ends without `close_notify`

Usage: tls_server.py CERT KEY [--alpn h2,http/1.1] [--clients CA]. Prints {"port": …}; once its input
ends, how many connections there were, how many of them resumed a session, and handshakes that failed.
"""

import argparse
import json
import socket
import ssl
import sys
import threading

import h2.config
import h2.connection
import h2.events
import h2.exceptions

seen = {"connections": 0, "resumed": 0, "failed": 0}
lock = threading.Lock()


def count(what):
    with lock:
        seen[what] += 1


class Connection:
    def __init__(self, stream, name):
        self.stream = stream
        certificate = stream.getpeercert() or {}
        subject = dict(pair[0] for pair in certificate.get("subject", ()))
        self.seen = {
            "alpn": stream.selected_alpn_protocol(),
            "sni": name,
            "tls": stream.version(),
            "client": subject.get("commonName"),
        }

    def http1(self):
        head = b""
        while byte := self.stream.recv(1):
            head += byte
            if not head.endswith(b"\r\n\r\n"):
                continue
            lines = head.decode("latin-1").split("\r\n")
            head = b""
            _method, path, version = lines[0].split(" ")
            fields = dict(line.split(": ", 1) for line in lines[1:] if line)
            if path == "/":
                told = {**self.seen, "http": version, "host": fields["host"]}
                body = json.dumps(told).encode()
                length = f"content-length: {len(body)}\r\n"
                self.stream.sendall(f"HTTP/1.1 200 OK\r\n{length}\r\n".encode() + body)
                continue
            self.stream.sendall(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nall there is")
            if path == "/closed":
                self.stream = self.stream.unwrap()
            else:
                # Ends the bytes below TLS, and says nothing in TLS.
                socket.socket.shutdown(self.stream, socket.SHUT_WR)
            return

    def http2(self):
        config = h2.config.H2Configuration(client_side=False, header_encoding="latin-1")
        connection = h2.connection.H2Connection(config)
        connection.initiate_connection()
        self.stream.sendall(connection.data_to_send())
        while data := self.stream.recv(65536):
            for event in connection.receive_data(data):
                if isinstance(event, h2.events.RequestReceived):
                    fields = dict(event.headers)
                    told = {
                        **self.seen,
                        "http": "HTTP/2",
                        "host": fields[":authority"],
                        "scheme": fields[":scheme"],
                    }
                    connection.send_headers(event.stream_id, [(":status", "200")])
                    body = json.dumps(told).encode()
                    connection.send_data(event.stream_id, body, end_stream=True)
            self.stream.sendall(connection.data_to_send())


def run(context, names, accepted):
    count("connections")
    accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        stream = context.wrap_socket(accepted, server_side=True)
    except OSError:
        count("failed")
        accepted.close()
        return
    if stream.session_reused:
        count("resumed")
    connection = Connection(stream, names.pop(id(stream), None))
    try:
        if stream.selected_alpn_protocol() == "h2":
            connection.http2()
        else:
            connection.http1()
    except (OSError, h2.exceptions.ProtocolError):
        pass
    connection.stream.close()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("cert")
    parser.add_argument("key")
    parser.add_argument("--alpn", default="")
    parser.add_argument("--clients")
    arguments = parser.parse_args()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(arguments.cert, arguments.key)
    if arguments.alpn:
        context.set_alpn_protocols(arguments.alpn.split(","))
    if arguments.clients:
        context.load_verify_locations(arguments.clients)
        context.verify_mode = ssl.CERT_REQUIRED
    names = {}
    context.sni_callback = lambda stream, name, _context: names.update({id(stream): name})
    listener = socket.create_server(("127.0.0.1", 0))
    print(json.dumps({"port": listener.getsockname()[1]}), flush=True)

    def accept():
        while True:
            accepted, _ = listener.accept()
            threading.Thread(target=run, args=(context, names, accepted), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    sys.stdin.read()
    print(json.dumps(seen), flush=True)


if __name__ == "__main__":
    main()
