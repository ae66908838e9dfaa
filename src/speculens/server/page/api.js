/* The HTTP side: which model there is, and an answer as chunks. Every failure is a `Refusal`: a sentence to show. */

export class Refusal extends Error {
  /** `status` is 0 where no answer came at all. */
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** What /v1/models says of its first model: `id` and `speculens`. */
export async function model(key) {
  const response = await ask("v1/models", { headers: headers(key) });
  const { data: [first] } = await response.json();
  return first;
}

/** The chunks of a streamed answer, as they come. Aborting `signal` ends the request, and the server stops decoding. */
export async function* chat(body, key, signal) {
  const response = await ask("v1/chat/completions", {
    method: "POST",
    headers: { ...headers(key), "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const data of events(response.body, signal)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refusal(chunk.error.message, response.status);
    yield chunk;
  }
  throw new Refusal("The connection ended before the answer did.");
}

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    throw options.signal?.aborted ? error : new Refusal("The server cannot be reached.");
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => ({}));
  const wait = response.headers.get("Retry-After");
  const message = said.error?.message ?? `The server answered ${response.status} ${response.statusText}.`;
  throw new Refusal(wait ? `${message} Try again in ${wait} s.` : message, response.status);
}

/** The data of server-sent events: lines `data: …`, an empty line ends one. */
async function* events(stream, signal) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const whole = (rest + value).split(/\r?\n\r?\n/);
      rest = whole.pop();
      for (const event of whole) {
        const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } catch (error) {
    throw signal.aborted ? error : new Refusal("The connection broke before the answer ended.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
