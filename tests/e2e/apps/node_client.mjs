// Node's fetch: `node node_client.mjs URL...` requests each in turn and prints the statuses.
for (const url of process.argv.slice(2)) {
  const response = await fetch(url);
  await response.text();
  console.log(response.status);
}
