// A command line client by npm's `ws`: sends each line that is typed and shows each message.
//
// Usage: node type.mjs URL. Prints one JSON object per event; the end of its input closes.

import { createInterface } from "node:readline";
import WebSocket from "ws";

const LIFE_MS = 100_000;
setTimeout(() => process.exit(1), LIFE_MS).unref();
const show = (event) => console.log(JSON.stringify(event));

// Every name of localhost is this machine, also where the resolver does not say so (RFC 6761).
const lookup = (name, options, done) =>
  options.all ? done(null, [{ address: "127.0.0.1", family: 4 }]) : done(null, "127.0.0.1", 4);
const socket = new WebSocket(process.argv[2], { lookup });
socket.on("open", () => {
  show({ connected: true });
  createInterface({ input: process.stdin })
    .on("line", (line) => socket.send(line))
    .on("close", () => socket.close(1000));
});
socket.on("message", (data) => show({ echoed: data.toString() }));
socket.on("close", (code) => {
  show({ code });
  process.exit(0);
});
