// A WebSocket client by npm's `ws`: the same cases as ../ws_client.py.
//
// Usage: node client.mjs CASE HOST PORT. Prints what it saw as one JSON object, asserts nothing itself.

import { randomBytes } from "node:crypto";
import { once } from "node:events";
import WebSocket from "ws";

const HOST = "api.localhost";
const LIFE_MS = 100_000;

const [name, host, port] = process.argv.slice(2);
setTimeout(() => process.exit(1), LIFE_MS).unref();

/// A connection and its messages in order, each read once.
class Connection {
  constructor(path, subprotocols = [], options = {}) {
    this.socket = new WebSocket(`ws://${host}:${port}${path}`, subprotocols, {
      headers: { Host: HOST },
      perMessageDeflate: { threshold: 0 },
      maxPayload: 1 << 30,
      ...options,
    });
    this.messages = [];
    this.waiting = null;
    this.closed = once(this.socket, "close").then(([code, reason]) => ({
      code,
      reason: reason.toString(),
    }));
    this.socket.on("message", (data, binary) => {
      this.messages.push(binary ? data : data.toString());
      this.waiting?.();
    });
  }

  async open() {
    await once(this.socket, "open");
    return this;
  }

  async receive() {
    while (this.messages.length === 0) {
      await new Promise((resolve) => (this.waiting = resolve));
    }
    return this.messages.shift();
  }

  /// Sends a message, or one in fragments, and says whether it came back.
  async same(message) {
    const parts = Array.isArray(message) ? message : [message];
    parts.forEach((part, index) => this.socket.send(part, { fin: index === parts.length - 1 }));
    const back = await this.receive();
    return typeof back === "string" ? back === parts.join("") : back.equals(Buffer.concat(parts));
  }

  negotiated() {
    const { protocol, extensions } = this.socket;
    return { subprotocol: protocol || null, extensions: extensions || null };
  }
}

async function echo(options) {
  const connection = await new Connection("/echo", [], options).open();
  const seen = {
    text: await connection.same("käse \u2713"),
    binary: await connection.same(Buffer.from(Array.from({ length: 256 }, (_, byte) => byte))),
    empty: (await connection.same("")) && (await connection.same(Buffer.alloc(0))),
    repetitive: await connection.same("abc".repeat(400_000)),
    random: await connection.same(randomBytes(200_000)),
    fragments: await connection.same(["one ", "two ", "", "three"]),
    large: await connection.same(randomBytes(16_000_000)),
  };
  const pong = once(connection.socket, "pong");
  connection.socket.ping("are you there");
  seen.pong = (await pong)[0].toString() === "are you there";
  connection.socket.close(4000, "goodbye: käse");
  return { ...seen, ...connection.negotiated(), ...(await connection.closed) };
}

const cases = {
  echo: () => echo({}),
  "echo-plain": () => echo({ perMessageDeflate: false }),
  async subprotocol() {
    const connection = await new Connection("/echo", ["v0", "v1", "v2"]).open();
    return { ...connection.negotiated(), same: await connection.same("chosen") };
  },
  async refused() {
    const { socket } = new Connection("/refuse");
    const [, response] = await once(socket, "unexpected-response");
    let body = "";
    for await (const part of response) body += part;
    const why = response.rawHeaders.filter(
      (_, index, all) => index % 2 === 1 && all[index - 1].toLowerCase() === "x-why",
    );
    return { status: response.statusCode, why, cookies: response.headers["set-cookie"], body };
  },
  async closed() {
    const connection = await new Connection("/close").open();
    connection.socket.send("close");
    return connection.closed;
  },
  async pushed() {
    const connection = await new Connection("/push").open();
    const { code } = await connection.closed;
    const { messages } = connection;
    const in_order = messages.every((message, index) => message === String(index));
    return { messages: messages.length, in_order, code };
  },
  async pipelined() {
    const count = 20_000;
    const connection = await new Connection("/echo").open();
    for (let number = 0; number < count; number++) connection.socket.send(`message ${number}`);
    let in_order = true;
    for (let number = 0; number < count; number++) {
      in_order &&= (await connection.receive()) === `message ${number}`;
    }
    return { messages: count, in_order };
  },
  async many() {
    const one = async (number) => {
      const connection = await new Connection("/echo").open();
      let all = true;
      for (let turn = 0; turn < 10; turn++) all &&= await connection.same(`${number} ${turn}`);
      connection.socket.close();
      await connection.closed;
      return all;
    };
    const rounds = await Promise.all(Array.from({ length: 200 }, (_, number) => one(number)));
    return { same: rounds.filter(Boolean).length };
  },
};

const seen = await cases[name]();
console.log(JSON.stringify(seen));
process.exit(0);
