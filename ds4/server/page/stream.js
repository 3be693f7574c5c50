// An answer as it comes: server-sent events of /v1/chat/completions, one object each.
export async function* answer(body, signal) {
  const response = await fetch("/v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) throw new Error(await fault(response));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the answer broke off");
    text += value.replaceAll("\r\n", "\n");
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) {
      const data = event.split("\n").filter((line) => line.startsWith("data:"));
      const joined = data.map((line) => line.slice(5).trimStart()).join("\n");
      if (joined === "[DONE]") return;
      if (joined) {
        const chunk = JSON.parse(joined);
        if (chunk.error) throw new Error(chunk.error.message);
        yield chunk;
      }
    }
  }
}

async function fault(response) {
  let said = response.statusText;
  try {
    said = (await response.json()).error.message;
  } catch {
    // not JSON: the status has to do
  }
  const wait = response.headers.get("retry-after");
  return `${response.status}: ${said}${wait ? ` (again in ${wait} s)` : ""}`;
}

// Prometheus' text as sums by name, whatever the labels; a label's values where it is named.
export function figures(text) {
  const sums = new Map();
  for (const line of text.split("\n")) {
    const match = /^(\w+)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (!match) continue;
    const [, name, labels, value] = match;
    sums.set(name, (sums.get(name) ?? 0) + Number(value));
    const domain = /domain="(\w+)"/.exec(labels ?? "");
    if (domain) sums.set(`${name}/${domain[1]}`, Number(value));
  }
  return sums;
}
