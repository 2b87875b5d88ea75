// A Node service between two others: `node node_tier.mjs PORT NEXT_PORT` asks the next one for the same path, some
// milliseconds after the request came, and answers with what came back. It forwards `traceparent` where it got one.
import http from "node:http";

const [port, nextPort] = process.argv.slice(2).map(Number);
const agent = new http.Agent({ keepAlive: true, maxSockets: 64 });

const server = http.createServer((request, response) => {
  const { traceparent } = request.headers;
  const options = { host: "127.0.0.1", port: nextPort, path: request.url, agent };
  if (traceparent) options.headers = { traceparent };
  setTimeout(() => {
    http.get(options, (answer) => answer.pipe(response));
  }, Math.random() * 5);
});
server.listen(port, "127.0.0.1", 256);
process.on("SIGTERM", () => process.exit(0));
