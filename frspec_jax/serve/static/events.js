// A chat as it comes: the server's events as objects, and its errors as Error.

/** Ask for a stream; yields each event's object. */
export async function* chat(body, key, signal) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  let reply;
  try {
    reply = await fetch("/v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal });
  } catch (error) {
    throw signal.aborted ? error : new Error("The server cannot be reached.");
  }
  if (!reply.ok) {
    const told = await reply.json().catch(() => null);
    const error = new Error(told?.error?.message ?? `The server said ${reply.status}.`);
    error.status = reply.status;
    throw error;
  }
  let ended = false;
  for await (const data of lines(reply.body, signal)) {
    if (data === "[DONE]") {
      ended = true;
      break;
    }
    const event = JSON.parse(data);
    if (event.error) throw new Error(event.error.message);
    yield event;
  }
  if (!ended && !signal.aborted) throw new Error("The server stopped before the answer was whole.");
}

/** The data of server-sent events: a character or an event may be split over what the network brings. */
async function* lines(stream, signal) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        throw signal.aborted ? error : new Error("The connection to the server broke.");
      }
      if (part.done) return;
      const events = (rest + part.value).split("\n\n");
      rest = events.pop();
      for (const event of events) if (event.startsWith("data: ")) yield event.slice(6);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
