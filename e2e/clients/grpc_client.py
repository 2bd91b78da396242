"""A gRPC client by `grpcio`, of the service in grpc_server.py and of what stands before it.

Usage: grpc_client.py CASE HOST PORT. Prints what it saw as one JSON object and asserts nothing itself.
Speaks TLS where SIDELANE_E2E_CA names a file of authorities. The peer in peers/tonic has the same cases
but for `talk` and `load`, and prints the same.
"""

import json
import os
import queue
import signal
import sys
import threading

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_server import shown

HOST = "api.localhost"
LIFE_S = 100
MIB = 1024 * 1024
SHORT_RPCS = 10_000
IN_FLIGHT = 100


def channel(target, ca, options, **others):
    """A channel, by TLS where a file of authorities is given."""
    if not ca:
        return grpc.insecure_channel(target, options=options, **others)
    with open(ca, "rb") as file:
        credentials = grpc.ssl_channel_credentials(file.read())
    options = [*options, ("grpc.ssl_target_name_override", HOST)]
    return grpc.secure_channel(target, credentials, options=options, **others)


class Peer:
    """One channel and the methods of `e2e.Peer`."""

    def __init__(self, address, **options):
        host, port = address
        ca = os.environ.get("SIDELANE_E2E_CA")
        self.channel = channel(
            f"{host}:{port}",
            ca,
            options=[
                ("grpc.default_authority", HOST),
                ("grpc.enable_http_proxy", 0),
                ("grpc.enable_retries", 0),
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.max_receive_message_length", -1),
                ("grpc.max_send_message_length", -1),
            ],
            **options,
        )
        self.echo = self.channel.unary_unary("/e2e.Peer/Echo")
        self.count = self.channel.unary_stream("/e2e.Peer/Count")
        self.sum = self.channel.stream_unary("/e2e.Peer/Sum")
        self.chat = self.channel.stream_stream("/e2e.Peer/Chat")
        self.first = self.channel.stream_stream("/e2e.Peer/First")
        self.show = self.channel.unary_unary("/e2e.Peer/Show")
        self.refuse = self.channel.stream_unary("/e2e.Peer/Refuse")
        self.fail = self.channel.unary_unary("/e2e.Peer/Fail")
        self.late = self.channel.unary_stream("/e2e.Peer/Late")
        self.hang = self.channel.unary_stream("/e2e.Peer/Hang")
        self.ignore = self.channel.stream_unary("/e2e.Peer/Ignore")


class Requests:
    """Requests that a test sends one by one; `None` ends them."""

    def __init__(self):
        self.queue = queue.Queue()

    def __iter__(self):
        return self

    def __next__(self):
        message = self.queue.get()
        if message is None:
            raise StopIteration
        return message

    def send(self, message):
        self.queue.put(message)


def status(error):
    trailing = shown(error.trailing_metadata())
    return {
        "code": error.code().value[0],
        "message": error.details(),
        "details": trailing.get("grpc-status-details-bin"),
    }


def outcome(call):
    """The status with which a call ends, and how many messages came before."""
    messages = 0
    try:
        for _ in call:
            messages += 1
    except grpc.RpcError as error:
        return {**status(error), "messages": messages}
    return {"code": 0, "messages": messages}


def case_shapes(address):
    """All four shapes; an empty message is a message."""
    peer = Peer(address)
    down = [message[:4] for message in peer.count(b"1000 100")]
    chat_requests = Requests()
    chat = peer.chat(chat_requests)
    rounds = []
    for number in range(100):
        chat_requests.send(b"%d" % number)
        rounds.append(next(chat) == b"%d" % number)
    chat_requests.send(b"")
    rounds.append(next(chat) == b"")
    chat_requests.send(None)
    first_requests = Requests()
    first = peer.first(first_requests)
    ready = next(first)
    first_requests.send(b"after")
    after = next(first)
    first_requests.send(None)
    return {
        "echo": peer.echo(b"hello") == b"hello",
        "empty": peer.echo(b"") == b"",
        "down": len(down),
        "in_order": down == [index.to_bytes(4, "big") for index in range(1000)],
        "none": len(list(peer.count(b"0 4"))),
        "up": peer.sum(iter([b"a" * size for size in range(100)])).decode(),
        "up_none": peer.sum(iter([])).decode(),
        "up_empty": peer.sum(iter([b"", b"", b""])).decode(),
        "chat": all(rounds) and list(chat) == [],
        "first": [ready.decode(), after.decode(), len(list(first))],
    }


def case_metadata(address):
    metadata = (
        ("x-repeated", "1"),
        ("x-data-bin", b"\x00\x01\xff"),
        ("x-repeated", "2"),
        ("x-data-bin", b""),
    )
    peer = Peer(address)
    reply, call = peer.show.with_call(b"", metadata=metadata, timeout=60)
    bare = json.loads(peer.show(b""))
    return {
        **json.loads(reply),
        "without_deadline": bare["deadline"],
        "initial": shown(call.initial_metadata()),
        "trailing": shown(call.trailing_metadata()),
    }


def case_status(address):
    """Statuses of the service: without a head, after a message, while requests still come."""
    peer = Peer(address)

    def endless():
        while not done.is_set():
            yield b"more"

    done = threading.Event()
    early = outcome(results(peer.refuse.future(endless())))
    done.set()
    return {
        "fail": outcome(results(peer.fail.future(b""))),
        "late": outcome(peer.late(b"")),
        "early": early,
        "unknown": outcome(results(peer.channel.unary_unary("/e2e.Peer/Unknown").future(b""))),
    }


def results(future):
    """A unary call's reply as if it were a stream's."""
    yield future.result()


def case_unary(address):
    """One unary call; its status is all that counts."""
    return outcome(results(Peer(address).echo.future(b"hello")))


def case_deadline(address):
    peer = Peer(address)
    return outcome(peer.hang(b"deadline", timeout=0.5))


def case_cancel(address):
    """The client cancels in mid-stream; its connection goes on."""
    peer = Peer(address)
    call = peer.hang(b"cancel")
    next(call)
    call.cancel()
    return {**outcome(call), "after": peer.echo(b"hello") == b"hello"}


def case_held(address):
    """A stream in mid-air: says so, and shows how it ends."""
    call = Peer(address).hang(b"held")
    next(call)
    print(json.dumps({"held": True}), flush=True)
    return outcome(call)


def case_talk(address):
    """A stream that goes on once a line comes in."""
    requests = Requests()
    chat = Peer(address).chat(requests)
    requests.send(b"before")
    before = next(chat).decode()
    print(json.dumps({"before": before}), flush=True)
    sys.stdin.readline()
    requests.send(b"after")
    after = next(chat).decode()
    requests.send(None)
    return {"after": after, **outcome(chat)}


def case_numbers(address):
    """Numbered messages of many sizes both ways, a bounded number in flight, until a line comes in."""
    slots, ended = threading.Semaphore(IN_FLIGHT), threading.Event()
    sent = 0

    def requests():
        nonlocal sent
        while not ended.is_set():
            slots.acquire()
            yield numbered(sent)
            sent += 1

    def until_told():
        sys.stdin.readline()
        ended.set()
        slots.release()

    replies = Peer(address).chat(requests())
    seen = {"received": 0, "wrong": []}
    threading.Thread(target=until_told, daemon=True).start()

    def checked():
        for reply in replies:
            if reply != numbered(seen["received"]):
                seen["wrong"].append(seen["received"])
            if not seen["received"]:
                print(json.dumps({"begun": True}), flush=True)
            seen["received"] += 1
            slots.release()
            yield reply

    end = outcome(checked())
    return {**end, **seen, "sent": sent}


def numbered(number):
    """A message that no other is equal to, of 4 to 3,003 bytes."""
    return number.to_bytes(4, "big") + bytes(number * 37 % 3000)


def case_load(address):
    """Calls without a pause until the input ends: on channels that are kept, and on one for each call."""
    ended = threading.Event()
    lock = threading.Lock()
    seen = {"calls": 0, "errors": []}
    first = threading.Semaphore(0)

    def call(kept):
        while not ended.is_set():
            peer = kept or Peer(address)
            try:
                same = peer.echo(b"hello", timeout=60) == b"hello"
                error = None if same else "another reply"
            except grpc.RpcError as failed:
                error = str(status(failed))
            if not kept:
                peer.channel.close()
            with lock:
                seen["calls"] += 1
                if error:
                    seen["errors"].append(error)
            first.release()

    threads = [threading.Thread(target=call, args=(kept,)) for kept in (Peer(address), None)]
    for thread in threads:
        thread.start()
    first.acquire()
    print(json.dumps({"calls": True}), flush=True)
    sys.stdin.read()
    ended.set()
    for thread in threads:
        thread.join()
    return seen


def case_large(address):
    message = os.urandom(MIB) * 5
    return {"same": Peer(address).echo(message) == message}


def case_limit(address):
    """Messages of 4 MiB and of a byte more, each way."""
    peer = Peer(address)
    return {
        "below": len(peer.echo(bytes(4 * MIB - 1))) == 4 * MIB - 1,
        "above": outcome(results(peer.echo.future(bytes(4 * MIB + 1)))),
        "answer_above": outcome(peer.count(b"1 %d" % (4 * MIB + 1))),
    }


def case_huge(address):
    """100 MiB each way, in messages of 1 MiB and of 20 MiB."""
    peer = Peer(address)
    message = os.urandom(MIB)
    down = [len(reply) for reply in peer.count(b"100 %d" % MIB)]
    large = [len(reply) for reply in peer.count(b"5 %d" % (20 * MIB))]
    return {
        "down": [len(down), sum(down)],
        "large": [len(large), sum(large)],
        "up": peer.sum(message for _ in range(100)).decode(),
    }


def case_short(address):
    """Many short calls, a bounded number of them at once."""
    peer = Peer(address)
    slots, ended = threading.Semaphore(IN_FLIGHT), queue.Queue()

    def done(future, number):
        slots.release()
        ended.put(future.exception() is None and future.result() == b"%d" % number)

    for number in range(SHORT_RPCS):
        slots.acquire()
        future = peer.echo.future(b"%d" % number)
        future.add_done_callback(lambda future, number=number: done(future, number))
    return {"ok": sum(ended.get() for _ in range(SHORT_RPCS))}


def case_many(address):
    """100 bidirectional streams of one connection, all open at once."""
    peer = Peer(address)
    calls = []
    for _ in range(IN_FLIGHT):
        requests = Requests()
        calls.append((requests, peer.chat(requests)))
    same = True
    for turn in range(10):
        for number, (requests, _) in enumerate(calls):
            requests.send(b"%d %d" % (number, turn))
        for number, (_, replies) in enumerate(calls):
            same &= next(replies) == b"%d %d" % (number, turn)
    for requests, _ in calls:
        requests.send(None)
    return {"same": same, "ended": sum(list(replies) == [] for _, replies in calls)}


def case_stalled(address):
    """One stream whose replies nobody reads and one whose requests nobody reads, beside a ping-pong."""
    stalled = Peer(address)
    unread = stalled.count(b"100000 65536")
    next(unread)

    def endless():
        while True:
            yield bytes(65536)

    ignored = stalled.ignore.future(endless())
    peer = Peer(address)
    requests = Requests()
    chat = peer.chat(requests)
    rounds = 0
    for number in range(500):
        requests.send(b"%d" % number)
        rounds += next(chat) == b"%d" % number
    unread.cancel()
    ignored.cancel()
    return {"rounds": rounds}


def case_gzip(address):
    peer = Peer(address, compression=grpc.Compression.Gzip)
    message = b"abc" * 400_000
    reply, call = peer.echo.with_call(message)
    seen = json.loads(peer.show(b""))
    return {"same": reply == message, "metadata": seen["metadata"]}


def case_health(address):
    stub = health_pb2_grpc.HealthStub(Peer(address).channel)
    seen = {}
    for name in ("e2e.Peer", ""):
        seen[name] = stub.Check(health_pb2.HealthCheckRequest(service=name)).status
    try:
        stub.Check(health_pb2.HealthCheckRequest(service="nobody"))
    except grpc.RpcError as error:
        seen["nobody"] = status(error)["code"]
    watch = stub.Watch(health_pb2.HealthCheckRequest(service="e2e.Peer"))
    seen["watched"] = next(watch).status
    watch.cancel()
    return seen


def case_reflection(address):
    stub = reflection_pb2_grpc.ServerReflectionStub(Peer(address).channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    replies = stub.ServerReflectionInfo(iter([request]))
    services = [service.name for reply in replies for service in reply.list_services_response.service]
    return {"services": sorted(services)}


CASES = {
    "shapes": case_shapes,
    "metadata": case_metadata,
    "status": case_status,
    "unary": case_unary,
    "deadline": case_deadline,
    "cancel": case_cancel,
    "held": case_held,
    "talk": case_talk,
    "numbers": case_numbers,
    "load": case_load,
    "large": case_large,
    "limit": case_limit,
    "huge": case_huge,
    "short": case_short,
    "many": case_many,
    "stalled": case_stalled,
    "gzip": case_gzip,
    "health": case_health,
    "reflection": case_reflection,
}


def main():
    signal.alarm(LIFE_S)
    case, host, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
    print(json.dumps(CASES[case]((host, port))), flush=True)
    # Calls that a case left in mid-air end with the process.
    os._exit(0)


if __name__ == "__main__":
    main()
