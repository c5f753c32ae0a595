// The server's side of the page: one request, read as a stream of events.

export class ServerError extends Error {}

function headers(key) {
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function failure(response) {
  let text = `The server answered ${response.status}.`;
  try {
    const body = await response.json();
    text = body.error?.message ?? text;
  } catch {
    // Not one of our errors (a proxy's page, perhaps): the status says enough.
  }
  const wait = response.headers.get("Retry-After");
  return new ServerError(wait ? `${text} (in ${wait} s)` : text);
}

export async function models(key) {
  const response = await fetch("v1/models", { headers: headers(key) });
  if (!response.ok) throw await failure(response);
  return (await response.json()).data;
}

// Yields the chunks of a streamed chat completion. Aborting the signal closes the connection, which stops the model.
export async function* chat(body, key, signal) {
  const request = { ...body, stream: true, stream_options: { include_usage: true, include_timings: true } };
  const response = await fetch("v1/chat/completions", { method: "POST", headers: headers(key), body: JSON.stringify(request), signal });
  if (!response.ok) throw await failure(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  let finished = false;
  while (!finished) {
    const { value, done } = await reader.read();
    if (done) break;
    buffer += value;
    const events = buffer.split("\n\n");
    buffer = events.pop();
    for (const event of events) {
      const data = event.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data === "[DONE]") finished = true;
      if (!data || data === "[DONE]") continue;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(chunk.error.message);
      yield chunk;
    }
  }
  if (!finished) throw new ServerError("The connection ended before the answer was complete.");
}
