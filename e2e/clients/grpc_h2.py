"""gRPC as bytes, by the `h2` library: streams that no gRPC library would open, and answers unrepaired.

Usage: grpc_h2.py CASE HOST PORT, before the service in grpc_h2_server.py. Prints what it saw as one
JSON object and asserts nothing itself.
"""

import concurrent.futures
import json
import random
import sys

from client import Http2, head, shown

CODES = range(14)


def rpc(path, extra=(), method="POST", content_type="application/grpc"):
    fields = [("content-type", content_type), ("te", "trailers"), *extra]
    return head(method, path, extra=fields)


def message(payload):
    return b"\x00" + len(payload).to_bytes(4, "big") + payload


def call(address, path, body=message(b"hello"), **options):
    return shown(Http2(address).answer(rpc(path, **options), body))


def status(seen):
    """Status and message, wherever they stand, and how the stream ended."""
    fields = dict(seen["headers"] + seen["trailers"])
    return {
        "http": seen["status"],
        "grpc": int(fields["grpc-status"]) if "grpc-status" in fields else None,
        "message": fields.get("grpc-message"),
        "error": fields.get("x-sidelane-error"),
        "reset": seen["reset"],
        "body": len(seen["body"]),
    }


def case_resets(address):
    return {str(code): status(call(address, f"/raw.Reset/{code}")) for code in CODES}


def case_resets_later(address):
    return {str(code): status(call(address, f"/raw.ResetLater/{code}")) for code in CODES}


def case_cancel_codes(address):
    """The client resets its stream in mid-air with each code, on one connection."""
    client = Http2(address)
    for code in CODES:
        stream = client.open(rpc(f"/raw.Echo/{code}"), end=False)
        client.send(stream, message(b"hello"), False)
        while len(client.streams[stream]["body"]) < 10:
            client.receive()
        client.connection.reset_stream(stream, code)
        client.flush()
    return status(shown(client.answer(rpc("/raw.Other/after"), message(b""))))


def case_answers(address):
    names = ("TrailersOnly", "Half", "Html", "Refused", "Goaway", "Goaway")
    return {name: call(address, f"/raw.{name}/x") for name in names}


def case_requests(address):
    """Requests that are no RPC, or not a whole one."""
    return {
        "get": status(shown(Http2(address).answer(rpc("/raw.Other/x", method="GET")))),
        "half": status(call(address, "/raw.Echo/half", message(b"hello")[:7])),
        "prefix": status(call(address, "/raw.Echo/prefix", b"\x00\x00")),
        "nothing": status(call(address, "/raw.Echo/nothing", b"")),
        "plus": status(call(address, "/raw.Other/plus", content_type="application/grpc+proto")),
        "semicolon": status(call(address, "/raw.Other/a", content_type="application/grpc;x=y")),
    }


def case_metadata(address):
    extra = [
        ("x-repeated", "1"),
        ("x-data-bin", "AAH/"),
        ("x-repeated", "2"),
        ("x-forwarded-for", "10.0.0.1"),
        ("grpc-timeout", "30S"),
        ("grpc-encoding", "x-own"),
    ]
    # The flag says compressed, by an encoding that nobody between the ends knows.
    return call(address, "/raw.Echo/metadata", b"\x01" + message(b"packed")[1:], extra=extra)


def case_pieces(address):
    """The head comes before any message; a message's pieces come before it is whole."""
    client = Http2(address)
    stream = client.open(rpc("/raw.Echo/pieces"), end=False)
    seen = client.streams[stream]
    while seen["status"] is None:
        client.receive()
    size, pieces = 0, 200
    client.send(stream, b"\x00" + (pieces * 1000).to_bytes(4, "big"), False)
    for number in range(pieces):
        client.send(stream, bytes([number]) * 1000, False)
        # All but the prefix that may wait for the first piece.
        while len(seen["body"]) < size + 1005:
            client.receive()
        size += 1000
    client.connection.end_stream(stream)
    client.flush()
    client.finish(stream)
    body = seen["body"]
    same = body[5:] == b"".join(bytes([number]) * 1000 for number in range(pieces))
    return {**status(shown(seen)), "same": same}


def one(address, choice):
    """One stream or connection with one of many ends."""
    client = Http2(address)
    if choice < 7:
        paths = ("Other/x", "Reset/8", "ResetLater/2", "TrailersOnly/x", "Half/x", "Html/x", "Goaway/x")
        client.answer(rpc(f"/raw.{paths[choice]}"), message(b"hello"))
    else:
        stream = client.open(rpc("/raw.Echo/x", [("grpc-timeout", "20m")] if choice == 7 else []), end=False)
        client.send(stream, message(b"hello")[: choice - 4], False)
        if choice == 7:
            client.finish(stream)
        elif choice == 8:
            client.connection.reset_stream(stream, 8)
            client.flush()
        elif choice == 9:
            client.connection.end_stream(stream)
            client.flush()
            client.finish(stream)
        elif choice == 10:
            client.send(stream, message(bytes(50_000)), True)
    client.socket.close()


def case_ends(address):
    """Thousands of ends, the same ones in every run."""
    count, threads = 2_000, 8

    def run(seed):
        choices = random.Random(seed)
        for _ in range(count // threads):
            one(address, choices.randrange(12))

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, range(threads)))
    return {"ends": count}


CASES = {
    "resets": case_resets,
    "resets-later": case_resets_later,
    "cancel-codes": case_cancel_codes,
    "answers": case_answers,
    "requests": case_requests,
    "metadata": case_metadata,
    "pieces": case_pieces,
    "ends": case_ends,
}


def main():
    case, host, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
    print(json.dumps(CASES[case]((host, port))))


if __name__ == "__main__":
    main()
