"""Connects by TLS and prints, as one JSON object, what it saw: the protocol agreed on, the
certificate, and the first bytes or the answer to a GET; or why there is no TLS.

Usage: tls_peek.py ADDRESS CA ALPN [NAME]: ALPN is `-` or names with commas; with NAME the URL
https://NAME/ is asked for.
"""

import json
import socket
import ssl
import sys


def main():
    address, ca, alpn = sys.argv[1:4]
    name = sys.argv[4] if len(sys.argv) > 4 else None
    host, port = address.rsplit(":", 1)
    context = ssl.create_default_context(cafile=ca)
    if alpn != "-":
        context.set_alpn_protocols(alpn.split(","))
    seen = {}
    try:
        with socket.create_connection((host, int(port)), timeout=30) as plain:
            with context.wrap_socket(plain, server_hostname=name or host) as tls:
                seen["alpn"] = tls.selected_alpn_protocol()
                seen["certificate"] = ssl.DER_cert_to_PEM_cert(tls.getpeercert(True))
                if name:
                    request = f"GET / HTTP/1.1\r\nhost: {name}\r\nconnection: close\r\n\r\n"
                    tls.sendall(request.encode())
                received = b""
                while alpn == "-" or name:
                    more = tls.recv(65536)
                    if not more:
                        break
                    received += more
                seen["received"] = received.decode("latin-1")
    except (ssl.SSLError, OSError) as error:
        seen["error"] = str(error)
    print(json.dumps(seen))


main()
