import { answer, figures } from "/stream.js";

const $ = (id) => document.getElementById(id);
const history = [];
let running = null; // the AbortController of the answer that is being written

function element(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

// Text with code blocks set apart; never HTML.
function show(box, text) {
  const parts = text.split(/^```[^\n]*\n?/m);
  box.replaceChildren(
    ...parts.map((part, n) => (n % 2 ? element("pre", "", part.replace(/\n$/, "")) : part)),
  );
}

class Answer {
  constructor(question) {
    this.content = "";
    this.thought = "";
    this.tokens = 0;
    this.start = performance.now();
    this.first = 0;
    this.article = element("article", "assistant");
    this.details = document.createElement("details");
    this.details.open = true;
    this.details.hidden = true;
    this.summary = element("summary", "", "thinking");
    this.thinking = element("div", "text");
    this.details.append(this.summary, this.thinking);
    this.text = element("div", "text");
    this.footer = element("footer", "", "waiting");
    this.article.append(this.details, this.text, this.footer);
    const asked = element("article", "user");
    asked.append(element("div", "text", question));
    $("chat").append(asked, this.article);
  }

  take(chunk) {
    const choice = chunk.choices?.[0];
    const thought = choice?.delta?.reasoning_content ?? "";
    const content = choice?.delta?.content ?? "";
    if (thought || content) {
      this.first ||= performance.now();
      this.tokens += 1;
    }
    if (thought) {
      this.details.hidden = false;
      this.thought += thought;
    }
    if (content && this.thought && !this.content) {
      this.summary.textContent = `thought for ${((performance.now() - this.start) / 1000).toFixed(1)} s`;
      this.details.open = false;
    }
    this.content += content;
    this.usage = chunk.usage ?? this.usage;
    this.timings = chunk.timings ?? this.timings;
    this.reason = choice?.finish_reason ?? this.reason;
  }

  draw() {
    if (this.thought) show(this.thinking, this.thought);
    show(this.text, this.content);
    if (this.first) this.footer.textContent = this.speed();
  }

  speed() {
    const tokens = this.usage?.completion_tokens ?? this.tokens;
    const seconds = (performance.now() - this.first) / 1000;
    const rate = tokens > 1 && seconds > 0 ? (tokens - 1) / seconds : 0;
    const parts = [`${rate.toFixed(1)} tok/s`, `first token ${Math.round(this.first - this.start)} ms`];
    parts.push(`${tokens} tokens`);
    if (this.usage) {
      const cached = this.usage.prompt_tokens_details?.cached_tokens ?? 0;
      parts.push(`prompt ${this.usage.prompt_tokens}, ${cached} cached`);
    }
    if (this.timings?.joules) parts.push(`${this.timings.joules.toFixed(1)} J`);
    if (this.reason === "length") parts.push("cut at the limit");
    return parts.join(" · ");
  }

  fail(error) {
    const stopped = error.name === "AbortError";
    this.footer.textContent = stopped ? `${this.first ? this.speed() + " · " : ""}stopped` : error.message;
    this.footer.classList.toggle("error", !stopped);
  }
}

function request() {
  const level = $("thinking").value;
  const body = {
    model: $("model").value || undefined,
    messages: history,
    stream: true,
    stream_options: { include_usage: true },
    thinking: { type: level === "off" ? "disabled" : "enabled" },
  };
  if (level !== "off") body.reasoning_effort = level;
  return body;
}

async function ask(question) {
  $("empty")?.remove();
  history.push({ role: "user", content: question });
  const written = new Answer(question);
  running = new AbortController();
  $("send").textContent = "Stop";
  let frame = 0;
  const draw = () => {
    const chat = $("chat");
    const atEnd = chat.scrollHeight - chat.scrollTop - chat.clientHeight < 60;
    written.draw();
    if (atEnd) chat.scrollTop = chat.scrollHeight;
    frame = 0;
  };
  $("chat").scrollTop = $("chat").scrollHeight;
  try {
    for await (const chunk of answer(request(), running.signal)) {
      written.take(chunk);
      frame ||= requestAnimationFrame(draw);
    }
    draw();
  } catch (error) {
    draw();
    written.fail(error);
  }
  cancelAnimationFrame(frame);
  if (written.content) history.push({ role: "assistant", content: written.content });
  else history.pop();
  running = null;
  $("send").textContent = "Send";
  refresh();
}

async function refresh() {
  try {
    const [ready, metrics] = await Promise.all([fetch("/ready"), fetch("/metrics")]);
    const about = await ready.json();
    const loaded = about.loaded ? ` ${Math.round(100 * about.loaded)} %` : "";
    $("state").textContent = about.status + loaded;
    $("state").className = `state ${ready.ok ? "ready" : ""}`;
    const now = figures(await metrics.text());
    $("running").textContent = `${now.get("ds4_num_requests_running") ?? 0} of ${now.get("ds4_slots") ?? 0}`;
    $("waiting").textContent = now.get("ds4_num_requests_waiting") ?? 0;
    const asked = now.get("ds4_prefix_cache_queries_total") ?? 0;
    const hits = now.get("ds4_prefix_cache_hits_total") ?? 0;
    $("hits").textContent = asked ? `${Math.round((100 * hits) / asked)} %` : "–";
    const of = (domain) => now.get(`ds4_power_watts/${domain}`);
    const system = of("wall") ?? of("system") ?? now.get("ds4_power_watts");
    $("power").hidden = system === undefined;
    if (system !== undefined) $("watts").textContent = `${Math.round(system)} W`;
  } catch {
    $("state").textContent = "not reachable";
    $("state").className = "state down";
  }
}

async function models() {
  const response = await fetch("/v1/models");
  const { data } = await response.json();
  $("model").replaceChildren(...data.map(({ id }) => new Option(id, id)));
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) return running.abort();
  const question = $("prompt").value.trim();
  if (!question) return;
  $("prompt").value = "";
  ask(question);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!running) $("composer").requestSubmit();
  }
});
$("clear").addEventListener("click", () => {
  running?.abort();
  history.length = 0;
  $("chat").replaceChildren();
  $("prompt").focus();
});
setInterval(() => document.hidden || refresh(), 2000);
refresh();
models().catch(() => {});
