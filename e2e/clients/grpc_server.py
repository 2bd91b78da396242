"""A gRPC service by `grpcio`, without generated code: messages are bytes, methods of `e2e.Peer` say
what they do. Beside it stand the health and reflection services of its own packages.

Echo     unary: the request again, gzipped        Chat     bidirectional: each message again
Count    server streaming: `COUNT SIZE`           First    bidirectional: says `ready`, then as Chat
Sum      client streaming: `COUNT BYTES`          Refuse   client streaming: 8 after one message
Show     unary: the request's metadata as JSON    Fail     unary: 3, a message, details; no head
Hang     server streaming: one message, no end    Late     server streaming: one message, then 9
Ignore   client streaming: never reads

Usage: grpc_server.py [CERT KEY]; with them by TLS. Prints {"port": …}; once its input ends, which calls were cancelled.
"""

import asyncio
import json
import pathlib
import sys

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

SERVICE = "e2e.Peer"
LIFE_S = 120
OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.so_reuseport", 0),
]

cancelled = []


def shown(metadata):
    """Values by name, in order; binary ones in hexadecimal digits."""
    seen = {}
    for name, value in metadata or ():
        seen.setdefault(name, []).append(value.hex() if isinstance(value, bytes) else value)
    return seen


async def echo(request, context):
    context.set_compression(grpc.Compression.Gzip)
    return request


async def count(request, _context):
    number, size = (int(word) for word in request.split())
    for index in range(number):
        yield index.to_bytes(4, "big") + bytes(size - 4)


async def total(requests, _context):
    messages, size = 0, 0
    async for request in requests:
        messages, size = messages + 1, size + len(request)
    return f"{messages} {size}".encode()


async def chat(requests, context):
    # Some clients give a caller the stream only once its head has come.
    await context.send_initial_metadata(())
    async for request in requests:
        yield request


async def first(requests, _context):
    yield b"ready"
    async for request in requests:
        yield request


async def show(_request, context):
    await context.send_initial_metadata(
        (("x-initial", "1"), ("x-initial", "2"), ("x-initial-bin", b"\x00\xfe\xff"))
    )
    context.set_trailing_metadata(
        (("x-trailing", "1"), ("x-trailing", "2"), ("x-trailing-bin", b"\xff\xfe\x00"))
    )
    seen = shown(context.invocation_metadata())
    remaining = context.time_remaining()
    return json.dumps({"metadata": seen, "deadline": remaining is not None}).encode()


async def refuse(requests, context):
    async for _ in requests:
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "enough")


async def fail(_request, context):
    context.set_trailing_metadata((("grpc-status-details-bin", b"\x08\x03\xff"),))
    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "käse 100%\nsecond line")


async def late(_request, context):
    yield b"one"
    await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "after one message")


async def hang(request, _context):
    try:
        yield b"hanging"
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        cancelled.append(request.decode())
        raise


async def ignore(_requests, _context):
    await asyncio.Event().wait()


HANDLERS = {
    "Echo": grpc.unary_unary_rpc_method_handler(echo),
    "Count": grpc.unary_stream_rpc_method_handler(count),
    "Sum": grpc.stream_unary_rpc_method_handler(total),
    "Chat": grpc.stream_stream_rpc_method_handler(chat),
    "First": grpc.stream_stream_rpc_method_handler(first),
    "Show": grpc.unary_unary_rpc_method_handler(show),
    "Refuse": grpc.stream_unary_rpc_method_handler(refuse),
    "Fail": grpc.unary_unary_rpc_method_handler(fail),
    "Late": grpc.unary_stream_rpc_method_handler(late),
    "Hang": grpc.unary_stream_rpc_method_handler(hang),
    "Ignore": grpc.stream_unary_rpc_method_handler(ignore),
}


async def main():
    server = grpc.aio.server(options=OPTIONS)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, HANDLERS)])
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    await servicer.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
    names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    if len(sys.argv) > 2:
        cert, key = (pathlib.Path(name).read_bytes() for name in sys.argv[1:3])
        credentials = grpc.ssl_server_credentials([(key, cert)])
        port = server.add_secure_port("127.0.0.1:0", credentials)
    else:
        port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(json.dumps({"port": port}), flush=True)
    end = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await asyncio.wait_for(end, LIFE_S)
    print(json.dumps({"cancelled": cancelled}), flush=True)
    await server.stop(None)


if __name__ == "__main__":
    asyncio.run(main())
