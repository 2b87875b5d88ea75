// Node.js over TLS. `node tls_node.mjs serve PORT CERTIFICATE` answers `/status/N` with N; `node tls_node.mjs ask PORT
// CERTIFICATE COUNT CONNECTIONS` makes COUNT requests, so many connections at once, and prints the statuses.
import fs from "node:fs";
import https from "node:https";

const [mode, port, certificate, count, connections] = process.argv.slice(2);
const pem = fs.readFileSync(certificate);

if (mode === "serve") {
  const server = https.createServer({ key: pem, cert: pem }, (request, response) => {
    const status = Number(/^\/status\/(\d+)/.exec(request.url)?.[1] ?? 404);
    const body = status === 204 ? "" : "as asked\n";
    response.writeHead(status, body ? { "content-length": body.length } : {});
    response.end(body);
  });
  server.listen(Number(port), "127.0.0.1");
} else {
  const agent = new https.Agent({ keepAlive: true, maxSockets: Number(connections), ca: pem });
  const ask = (number) =>
    new Promise((done, failed) => {
      const options = { host: "localhost", family: 4, port, path: `/status/200?id=${number}`, agent };
      https.get(options, (response) => response.resume().on("end", () => done(response.statusCode))).on("error", failed);
    });
  console.log((await Promise.all([...Array(Number(count)).keys()].map(ask))).join(" "));
  agent.destroy();
}
