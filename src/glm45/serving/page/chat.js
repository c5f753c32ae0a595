// The chat: what was said, what is being said, and the keys and buttons that change it.

import { chat, models } from "./client.js";
import { copy, element } from "./markdown.js";
import { Settings } from "./settings.js";
import { AssistantTurn, UserTurn } from "./view.js";

const STORE = "glm45.chat";
const STARTERS = [
  "Explain how a mixture of experts decides which experts a token goes to.",
  "Write a Python function that merges overlapping intervals, with tests.",
  "把这句话翻译成英文：海内存知己，天涯若比邻。",
  "A train leaves at 14:05 and arrives at 16:48. How long does it travel?",
];
const THINKING_LABELS = { auto: "Thinking: auto", on: "Thinking: on", off: "Thinking: off" };

const $ = (id) => document.getElementById(id);
const input = $("input");
const scroll = $("scroll");

let messages = load();
let turns = [];
let running = null; // the AbortController of the answer that is being written
let follows = true; // whether the view stays at the end as text comes
const settings = new Settings(showSettings);

// What was said

function load() {
  try {
    return JSON.parse(localStorage.getItem(STORE)) ?? [];
  } catch {
    return [];
  }
}

function save() {
  try {
    localStorage.setItem(STORE, JSON.stringify(messages));
  } catch {
    // The browser's store is full: the conversation goes on, and is not kept.
  }
}

function forServer() {
  return messages.map((message) => Object.fromEntries(Object.entries(message).filter(([name]) => !name.startsWith("_"))));
}

function resultsAfter(index) {
  const results = new Map();
  for (let at = index + 1; messages[at]?.role === "tool"; at += 1) results.set(messages[at].tool_call_id, messages[at].content);
  return results;
}

// What is on screen

const handlers = {
  edit(message, text) {
    if (!text.trim()) return;
    stop();
    messages.splice(messages.indexOf(message));
    send(text);
  },
  retry(message) {
    stop();
    messages.splice(messages.indexOf(message));
    answer();
  },
  results(message, results) {
    messages.splice(messages.indexOf(message) + 1, Infinity, ...results);
    answer();
  },
};

function show() {
  turns = [];
  messages.forEach((message, index) => {
    if (message.role === "user") turns.push(new UserTurn(message, handlers));
    if (message.role === "assistant") {
      const turn = new AssistantTurn(message, handlers);
      turn.update(false, resultsAfter(index));
      turns.push(turn);
    }
  });
  $("thread").replaceChildren(...turns.map((turn) => turn.node));
  turns.at(-1)?.node.classList.add("last");
  $("welcome").hidden = messages.length > 0;
  $("thread").hidden = messages.length === 0;
}

function showSettings(current) {
  $("thinking-label").textContent = THINKING_LABELS[current.values.thinking];
  $("thinking").classList.toggle("on", current.values.thinking === "on");
  const count = current.toolsProblem ? 0 : current.tools.length;
  $("tools-label").textContent = count === 1 ? "1 tool" : `${count} tools`;
  $("tools-pill").hidden = count === 0;
}

function showRunning() {
  $("send").classList.toggle("stop", running !== null);
  $("send-icon").setAttribute("href", running ? "#i-stop" : "#i-send");
  const label = running ? "Stop (Esc)" : "Send (Enter)";
  $("send").title = label;
  $("send").setAttribute("aria-label", label);
  $("send").disabled = !running && !input.value.trim();
}

function toEnd() {
  scroll.scrollTop = scroll.scrollHeight;
}

function complain(error) {
  const text = error instanceof TypeError ? "The server cannot be reached." : error.message;
  $("banner-text").textContent = text.charAt(0).toUpperCase() + text.slice(1);
  $("banner").hidden = false;
}

function grow() {
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
  showRunning();
}

// What is being said

function send(text) {
  messages.push({ role: "user", content: text });
  answer();
}

function stop() {
  running?.abort();
}

async function answer() {
  stop();
  if (settings.toolsProblem) {
    complain(new Error(settings.toolsProblem));
    return;
  }
  const request = settings.request(forServer());
  const message = { role: "assistant", content: "" };
  const writing = (running = new AbortController());
  messages.push(message);
  $("banner").hidden = true;
  follows = true;
  show();
  showRunning();
  toEnd();
  const turn = turns.at(-1);
  const painter = new Painter(turn);
  const clock = new Clock();
  try {
    for await (const chunk of chat(request, settings.key, writing.signal)) {
      clock.take(message, chunk);
      painter.paint();
      $("status").textContent = clock.live;
    }
  } catch (error) {
    if (error.name !== "AbortError") complain(error);
  }
  painter.stop();
  finish(message, turn, clock);
  if (running === writing) running = null;
  showRunning();
}

function finish(message, turn, clock) {
  $("status").textContent = "";
  if (!messages.includes(message)) return; // it was edited away meanwhile
  message._figures = clock.figures;
  const cut = message.tool_calls && clock.finish !== "tool_calls";
  if (cut) delete message.tool_calls; // a call that was cut short cannot be answered
  if (!message.content && !message.reasoning_content && !message.tool_calls) messages.splice(messages.indexOf(message), 1);
  if (cut || !messages.includes(message)) show();
  else turn.update(false, new Map());
  if (follows) toEnd();
  save();
}

// Adds chunks to the message and counts what they tell.
class Clock {
  constructor() {
    this.began = performance.now();
    this.numPieces = 0;
    this.finish = null;
  }

  take(message, chunk) {
    if (chunk.usage) this.usage = chunk.usage;
    if (chunk.timings) this.timings = chunk.timings;
    const choice = chunk.choices[0];
    if (!choice) return;
    const { delta } = choice;
    this.finish = choice.finish_reason ?? this.finish;
    if (delta.content || delta.reasoning_content || delta.tool_calls) {
      this.first ??= performance.now();
      this.numPieces += 1;
    }
    if (delta.reasoning_content) message.reasoning_content = (message.reasoning_content ?? "") + delta.reasoning_content;
    if (delta.content) message.content += delta.content;
    if ((delta.content || delta.tool_calls) && message.reasoning_content) message._thoughtSeconds ??= (performance.now() - this.began) / 1000;
    for (const call of delta.tool_calls ?? []) {
      message.tool_calls ??= [];
      if (call.id) message.tool_calls[call.index] = { id: call.id, type: "function", function: { name: call.function.name, arguments: "" } };
      message.tool_calls[call.index].function.arguments += call.function.arguments;
    }
  }

  get live() {
    const seconds = (performance.now() - this.first) / 1000;
    return seconds > 0.5 ? `${(this.numPieces / seconds).toFixed(1)} tokens/s` : "";
  }

  get figures() {
    const { usage, timings } = this;
    const parts = [];
    if (usage) parts.push(`${usage.completion_tokens} tokens`);
    if (timings?.tokens_per_second) parts.push(`${timings.tokens_per_second.toFixed(1)} tokens/s`);
    if (timings?.first_token_seconds !== undefined && timings?.first_token_seconds !== null) parts.push(`first after ${timings.first_token_seconds.toFixed(2)} s`);
    if (timings?.draft_acceptance !== undefined && timings?.draft_acceptance !== null) parts.push(`MTP ${Math.round(100 * timings.draft_acceptance)} % accepted`);
    if (this.finish === "length") parts.push("cut at the token limit");
    if (!this.finish) parts.push("stopped");
    return parts.join(" · ");
  }
}

// Paints at most once a frame, and rests five times as long as painting takes, so that long answers stay smooth.
class Painter {
  constructor(turn) {
    this.turn = turn;
    this.frame = 0;
    this.restsUntil = 0;
  }

  paint() {
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0;
      const began = performance.now();
      if (began < this.restsUntil) return this.paint();
      this.turn.update(true, new Map());
      if (follows) toEnd();
      this.restsUntil = performance.now() + 5 * (performance.now() - began);
    });
  }

  stop() {
    cancelAnimationFrame(this.frame);
  }
}

// Keys and buttons

function submit() {
  const text = input.value.trim();
  if (running || !text) return;
  input.value = "";
  grow();
  send(text);
}

function newChat() {
  stop();
  messages = [];
  save();
  $("banner").hidden = true;
  show();
  input.focus();
}

function editLast() {
  const turn = turns.findLast((one) => one instanceof UserTurn);
  if (turn) turn.edit();
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) stop();
  else submit();
});
input.addEventListener("input", grow);
input.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    submit();
  }
  if (event.key === "ArrowUp" && !input.value) {
    event.preventDefault();
    editLast();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    if (!$("settings").hidden) settings.toggle(false);
    else stop();
  }
  if (event.altKey && event.code === "KeyN") { event.preventDefault(); newChat(); }
  if (event.altKey && event.code === "KeyS") { event.preventDefault(); settings.toggle(); }
  if (event.altKey && event.code === "KeyT") { event.preventDefault(); settings.nextThinking(); }
  const typing = ["INPUT", "TEXTAREA"].includes(document.activeElement?.tagName);
  if (event.key === "/" && !typing) { event.preventDefault(); input.focus(); }
});
scroll.addEventListener("scroll", () => {
  follows = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 60;
  $("to-end").hidden = follows || messages.length === 0;
});
$("to-end").addEventListener("click", () => { follows = true; toEnd(); });
$("new-chat").addEventListener("click", newChat);
$("thinking").addEventListener("click", () => settings.nextThinking());
$("tools-pill").addEventListener("click", () => settings.toggle(true));
$("banner-close").addEventListener("click", () => { $("banner").hidden = true; });
$("banner-retry").addEventListener("click", () => {
  if (messages.at(-1)?.role === "assistant") messages.pop();
  if (messages.length) answer();
});
$("export").addEventListener("click", () => copy(JSON.stringify(forServer(), null, 2), element("span", {}, element("use"))));

for (const text of STARTERS) $("starters").append(element("button", { type: "button", onclick: () => send(text) }, text));
show();
grow();
toEnd();
models(settings.key).then(
  ([model]) => {
    $("model").textContent = model.id;
    document.title = `${model.id} · glm45`;
    $("welcome-model").textContent = `${model.id} · context of ${model.max_model_len.toLocaleString("en")} tokens`;
  },
  complain,
);
